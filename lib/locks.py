"""Locks among processes, and files that no process ever sees half-written.

The kernel keeps the locks, so a lock goes with its holder however that ends, and none is ever stale.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import current_process
from pathlib import Path


def try_lock(path: str | Path) -> int | None:
    """Take the lock of the file `path`, which is made if it is missing.

    Returns
    -------
    int or None
        A file descriptor that holds the lock until it is closed or this process ends; None where another holder has it.

    Raises
    ------
    OSError
        `path` cannot be opened for writing.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file


@contextmanager
def exclusive(path: str | Path, waiting: str) -> Iterator[None]:
    """Hold the lock of the file `path` within the context; where another process has it, say `waiting` and wait.

    Raises
    ------
    OSError
        `path` cannot be opened for writing.
    RuntimeError
        Another process has it, and this one is a worker of `multiprocessing` that runs a script from the top.
    """
    file = try_lock(path)
    if file is None:
        if getattr(current_process(), "_inheriting", False):
            # multiprocessing runs a script again in each worker, which would now wait for the process that waits for
            # it.
            raise RuntimeError(
                "this script starts processes that run it again: put its calls below `if __name__ == '__main__':`"
            )
        print(waiting, flush=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(file)


def write_whole(path: Path, content: bytes, sync: bool = False) -> None:
    """Write a file under a temporary name and move it into place; with `sync` it is on the disk by then.

    `records.atomic` always is, which would take long for thousands of small films.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    os.replace(temporary, path)
