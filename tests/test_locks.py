"""Locks among processes, files that appear whole or not at all, and workers that end with their process."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool

import pytest

from lib.locks import exclusive, spawned, try_lock, whole, write_whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("sync", [False, True])
def test_what_a_killed_writer_left_is_written_over(tmp_path, sync):
    (tmp_path / ".table.tmp.csv").write_bytes(b"half a row " * 99)
    write_whole(tmp_path / "table.csv", b"a,b\n", sync)
    assert (tmp_path / "table.csv").read_bytes() == b"a,b\n" and names(tmp_path) == ["table.csv"]


def test_a_writer_that_is_killed_leaves_one_temporary_at_most(tmp_path):
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom lib.locks import whole\n"
        "with whole(Path(sys.argv[1])) as path:\n    path.write_bytes(b'half')\n    os.kill(os.getpid(), 9)\n"
    )
    for _ in range(2):
        dead = subprocess.run([sys.executable, "-c", code, tmp_path / "table.csv"], timeout=60)
        assert dead.returncode == -signal.SIGKILL and names(tmp_path) == [".table.tmp.csv"]
    write_whole(tmp_path / "table.csv", b"a,b\n")
    assert (tmp_path / "table.csv").read_bytes() == b"a,b\n" and names(tmp_path) == ["table.csv"]


def test_a_writer_that_fails_leaves_the_file_as_it_was(tmp_path):
    write_whole(tmp_path / "table.csv", b"old")
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "table.csv") as temporary:
        temporary.write_bytes(b"ne")
        raise KeyboardInterrupt
    assert (tmp_path / "table.csv").read_bytes() == b"old" and names(tmp_path) == ["table.csv"]
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(IsADirectoryError, match="folder.csv"):
        write_whole(tmp_path / "folder.csv", b"new")
    assert names(tmp_path) == ["folder.csv", "table.csv"]


def test_two_writers_of_a_file_take_turns(tmp_path):
    second = threading.Thread(target=write_whole, args=(tmp_path / "table.csv", b"second"))
    with whole(tmp_path / "table.csv") as temporary:
        second.start()
        second.join(0.2)
        assert second.is_alive()
        temporary.write_bytes(b"first, and longer")
    second.join(60)
    assert (tmp_path / "table.csv").read_bytes() == b"second" and names(tmp_path) == ["table.csv"]


def test_who_waited_for_a_file_that_is_moved_takes_the_lock_of_the_next(tmp_path, monkeypatch):
    waiting, inside, leave = (threading.Event() for _ in range(3))
    flock = fcntl.flock

    def flock_and_tell(file, operation):
        if not operation & fcntl.LOCK_NB:
            waiting.set()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock_and_tell)

    def wait():
        with exclusive(tmp_path / "lock", ""):
            inside.set()
            leave.wait(60)

    other = threading.Thread(target=wait)
    with exclusive(tmp_path / "lock", ""):
        other.start()
        assert waiting.wait(60)
        os.replace(tmp_path / "lock", tmp_path / "moved")
    try:
        assert inside.wait(60) and try_lock(tmp_path / "lock") is None
    finally:
        leave.set()
        other.join(60)
    file = try_lock(tmp_path / "moved")
    assert file is not None
    os.close(file)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_who_may_not_write_can_take_a_lock_that_is_there(tmp_path, monkeypatch, number):
    """A study on a disk that is read-only is read under the lock of its release."""
    (tmp_path / "lock").touch()
    real = os.open

    def read_only(path, flags, *mode):
        if flags & os.O_RDWR:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", read_only)
    held = try_lock(tmp_path / "lock")
    assert held is not None and try_lock(tmp_path / "lock") is None
    os.close(held)
    with pytest.raises(OSError, match=os.strerror(number)):
        try_lock(tmp_path / "none")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, number):
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match=r"its file system keeps no locks: mount it with them: .*table\.csv"):
        try_lock(tmp_path / "table.csv")


def test_only_a_file_can_be_locked(tmp_path):
    (tmp_path / "victim").write_bytes(b"mine")
    for name, make in {
        "link": lambda path: path.symlink_to(tmp_path / "victim"),
        "folder": lambda path: path.mkdir(),
        "pipe": os.mkfifo,
    }.items():
        make(tmp_path / name)
        with pytest.raises(OSError, match=name):
            try_lock(tmp_path / name)
        make(tmp_path / f".{name}.tmp.csv")
        with pytest.raises(OSError, match=rf"\.{name}\.tmp\.csv"):
            write_whole(tmp_path / f"{name}.csv", b"new")
        assert not (tmp_path / f"{name}.csv").exists()
    assert (tmp_path / "victim").read_bytes() == b"mine"


def test_workers_end_with_a_process_that_is_killed():
    code = (
        "import os\nfrom lib.locks import spawned\n"
        "with spawned(1) as pool:\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n    os.kill(os.getpid(), 9)\n"
    )
    # Not communicate(): the worker holds the pipe for as long as it lives.
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
    give_up = time.monotonic() + 60
    while is_alive(worker):
        assert time.monotonic() < give_up, os.kill(worker, signal.SIGKILL)
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but that nobody has waited for does not."""
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return bool(status.strip()) and not status.startswith("Z")


def test_a_killed_worker_is_an_error_and_what_was_not_begun_is_given_up():
    with pytest.raises(BrokenProcessPool), spawned(1) as pool:
        list(pool.map(os._exit, [9] * 50))
    with pytest.raises(ZeroDivisionError), spawned(1) as pool:
        futures = [pool.submit(time.sleep, 0.02) for _ in range(3000)]
        futures[0].result()
        raise ZeroDivisionError
    assert futures[-1].cancelled()
