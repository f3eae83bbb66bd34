"""Two tokenizations of one text: the bytes of tokens, aligned spans, shared vocabulary."""
