"""Rouge-L by the published instruction-following protocol, as a metric module of `evaluate`."""
