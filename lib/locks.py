"""Locks among processes, files that no process ever sees half-written, and workers that never outlive their process.

The kernel keeps the locks, so a lock goes with its holder however that ends, and none is ever stale.
"""

import errno
import fcntl
import multiprocessing
import os
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

# A quota and a limit of a file's size are full disks too.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SPARE_BYTES = 64 * 2**20  # what is left free of a disk, and least of all needed to begin with


def _lock(path: str | Path, wait: bool) -> int | None:
    """A descriptor that holds the lock of the file that bears the name `path` by then: its holder may have moved or
    removed the one that was waited for. None where another has it and `wait` is False."""
    while True:
        # A link would have another folder's file locked, and written over.
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES) or not os.path.lexists(path):
                raise
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)  # who may not write may still wait for a writer
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(errno.EINVAL, "Not a regular file", str(path))
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(file), os.lstat(path)):
                return file
        except BlockingIOError:
            os.close(file)
            return None
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(file)
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF):
                raise OSError(error.errno, "its file system keeps no locks: mount it with them", str(path)) from error
            raise
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def try_lock(path: str | Path) -> int | None:
    """Take the lock of the file `path`, which is made if it is missing.

    Returns
    -------
    int or None
        A file descriptor that holds the lock until it is closed or this process ends; None where another holder has it.

    Raises
    ------
    OSError
        `path` cannot be opened for writing, or is a link or another thing that is no file.
    """
    return _lock(path, wait=False)


@contextmanager
def exclusive(path: str | Path, waiting: str) -> Iterator[None]:
    """Hold the lock of the file `path` within the context; where another process has it, say `waiting` and wait.

    The holder may move or remove the file: whoever waited for it then takes the lock of the next one of that name.

    Raises
    ------
    OSError
        `path` cannot be opened for writing, or is a link or another thing that is no file.
    RuntimeError
        Another process has it, and this one is a worker of `multiprocessing` that runs a script from the top.
    """
    file = try_lock(path)
    if file is None:
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            # multiprocessing runs a script again in each worker, which would now wait for the process that waits for
            # it.
            raise RuntimeError(
                "this script starts processes that run it again: put its calls below `if __name__ == '__main__':`"
            )
        print(waiting, flush=True)
        file = _lock(path, wait=True)
    try:
        yield
    finally:
        os.close(file)


@contextmanager
def whole(path: str | Path, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success move it into place, on failure remove it.

    A file has one temporary, `.<stem>.tmp<suffix>`, whose lock is held while it is written: what a killed writer left
    behind is written over by the next, and two writers take turns.

    Parameters
    ----------
    path : path-like
        Final name, in a folder that is there.
    sync : bool
        Whether file and name are on the disk by the end; it would take long for thousands of small films.

    Yields
    ------
    Path
        Where to write: `open(..., "wb")` and the like. The lock goes with this very file, so whatever moves a file of
        its own to this name (safetensors' `save_file` does) is not protected from a second writer.

    Raises
    ------
    OSError
        Of the writing, as it is.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    file = _lock(temporary, wait=False)
    if file is None:
        print(f"waiting for another process that writes {path}", flush=True)
        file = _lock(temporary, wait=True)
    try:
        try:
            yield temporary
            if sync:
                _sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if sync:
            _sync(path.parent)
    finally:
        os.close(file)


def write_whole(path: str | Path, content: bytes, sync: bool = False) -> None:
    """Write `content` to a file that appears whole or not at all, see `whole`."""
    # Not "wb": what is truncated to nothing first is flushed by ext4 as it is closed, which thousands of films notice.
    with whole(path, sync) as temporary, open(temporary, "r+b") as file:
        file.write(content)
        file.truncate()


@contextmanager
def spawned(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of fresh processes; what they have not begun when the context is left, by an error too, is given up.

    They end with this process even where it is killed, which the executor's own would not notice. Where one of them is
    killed or cannot start, the results raise `concurrent.futures.process.BrokenProcessPool`.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=_end_with_parent) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _sync(path: Path) -> None:
    """Have a file, or the names of a folder, on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
