"""The end of a process that has worked with others."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import NoReturn


def run_and_end(main: Callable[[], int]) -> NoReturn:
    """
    Do all that this process is for, and end it.

    A process that has worked with others ends after the exit hooks that `main` has registered, without Python's
    teardown: a thread of gloo that drops a tensor meanwhile aborts it, and the launcher counts finished work as
    failed (pytorch/pytorch#179291). `destroy_process_group` alone does not end these threads where a module that
    was imported later keeps the group as a default argument, as deepspeed.comm does.

    Args:
        main (`Callable[[], int]`): returns the exit code.

    Raises:
        SystemExit: with that code.
    """
    finished = False

    def leave() -> None:
        if finished:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    atexit.register(leave)  # the first hook that is registered runs last
    code = main()
    distributed = sys.modules.get("torch.distributed")
    if code == 0 and distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        finished = True
    sys.exit(code)


__all__ = ["run_and_end"]
