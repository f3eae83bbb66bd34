"""Whole models on one process, also where a ZeRO-3 launch would shard everything that is built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def plain_loading() -> Iterator[None]:
    """
    Build and load models on this process alone.

    While a ZeRO-3 training's options are alive, transformers shards every model it builds, on all processes together;
    a model that only the main process builds would wait for the others forever.
    """
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    active = reference() if reference is not None else None
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if active is not None:
            deepspeed.set_hf_deepspeed_config(active)


__all__ = ["plain_loading"]
