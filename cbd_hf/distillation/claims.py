"""One writer to a directory at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate import PartialState
from filelock import FileLock, Timeout

from cbd_hf.distillation.rounds import on_main


logger = logging.getLogger(__name__)


@contextmanager
def claimed(directory: Path, state: PartialState) -> Iterator[None]:
    """
    A context in which no other run of this package writes to a directory: two that were started by mistake would
    overwrite each other's files. The processes of one launch claim it together.

    The claim is a lock on `<directory>.lock`, which the system gives back however a process ends. Where the file
    system has no locks, there is no claim, and a warning says so.

    Args:
        directory (`Path`): it need not exist.
        state (`PartialState`): of the processes that share the work.

    Raises:
        FileExistsError: another run has claimed it.
    """
    path = Path(f"{directory}.lock")
    lock = FileLock(path, timeout=0)

    def claim() -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise FileExistsError(
                f"Another run is writing to {directory}: wait until it ends, or choose another output_dir. (It holds "
                f"{path}, which needs no deleting.)"
            ) from None
        except (OSError, NotImplementedError) as error:
            logger.warning("%s cannot be locked (%s): do not start a second run that writes to it.", directory, error)

    on_main(state, claim)
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):  # Windows keeps a file that is open; an empty one then stays
                path.unlink()
            lock.release()


__all__ = ["claimed"]
