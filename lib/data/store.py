"""The store: every film decoded once into a uint8 memory map, so that a training item is a slice and not a file."""

import contextlib
import errno
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np
from tqdm import tqdm

from lib.data.decoding import decode_film
from lib.locks import exclusive, write_whole

if TYPE_CHECKING:  # worker processes import this module: pandas would double their start-up
    import pandas as pd

    from lib.data.release import Release

VERSION = 1  # of the pixels: raise it whenever the same film would be stored differently
_CHUNK = 32  # films a worker decodes per task
_CHECKPOINT_SECONDS = 15.0
_SPARE_BYTES = 64 * 2**20
_FULL = (errno.ENOSPC, errno.EDQUOT)


class StoreError(RuntimeError):
    """A store that cannot be built or opened; the message names the films or the folder and what to do."""


@dataclass(frozen=True)
class Store:
    """Decoded films.

    Attributes
    ----------
    images : np.memmap, uint8 (N, size, size), read-only
        Row i is film i of `films`.
    films : DataFrame
        The films of the release, same order, without the unreadable ones; RangeIndex.
    size : int
        Pixels along a side.
    fingerprint : str
        Of the source files (names, sizes, modification times, order), `size` and the store's version.
    unreadable : list of str
        Names of the films that could not be decoded (only with on_unreadable='skip').
        `release.without(store.unreadable)` has the films of the store.
    """

    images: np.memmap
    films: "pd.DataFrame"
    size: int
    fingerprint: str
    unreadable: list[str]

    def rows(self, split: str) -> np.ndarray:
        """Rows of the films of a split ('train', 'val', 'test'), or of 'all', int64, ascending."""
        if split not in ("train", "val", "test", "all"):
            raise ValueError(f"split is {split!r}; it must be 'train', 'val', 'test' or 'all'")
        return np.flatnonzero((self.films["split"] == split).to_numpy() | (split == "all"))


def open_store(
    release: "Release",
    folder: str | Path,
    size: int,
    *,
    workers: int | None = None,
    on_unreadable: Literal["error", "skip"] = "error",
) -> Store:
    """Open the store of a release, building it first where it is absent, unfinished or out of date.

    A finished store (`images.npy` and, written last, `store.json`) is reused when its fingerprint equals that of the
    source. A killed build resumes: films decoded before are kept unless their file changed.
    One process builds; others that open the same folder meanwhile wait and reuse.

    Pixels: colour and transparency are dropped (grey by ITU-R 601; alpha ignored), 16-bit films are scaled by their
    full range (divided by 257), shrinking averages over areas, enlarging is bilinear. What DICOM films become:
    `lib.data.decoding.decode_film`.

    Parameters
    ----------
    size : int
        Side of the stored films in pixels.
    workers : int, optional
        Decoding processes; default the CPUs this process may use. With 1, decoding happens in this process. More are
        started by spawning, so a script must call this below `if __name__ == "__main__":`.
    on_unreadable : 'error' or 'skip'
        What to do when films turn out unreadable (not PNG or DICOM, truncated, damaged, not square): 'error' decodes
        all others, then raises naming them; 'skip' finishes the store without them and lists them in
        `Store.unreadable`.

    Raises
    ------
    StoreError
        Unreadable films, missing files, too little disk space, a worker that was killed.
    """
    if size < 1:
        raise ValueError(f"size is {size}; it must be at least 1 pixel")
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    if on_unreadable not in ("error", "skip"):
        raise ValueError(f"on_unreadable is {on_unreadable!r}; it must be 'error' or 'skip'")
    if not len(release.films):
        raise StoreError("the release has no films")
    folder = Path(folder).expanduser().resolve()
    signatures = _signatures(release.films)
    fingerprint = _fingerprint(signatures, size)

    reuse = partial(_reuse, folder, release.films, size, fingerprint)
    store = reuse()
    if store is None:
        folder.mkdir(parents=True, exist_ok=True)
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with _lock(folder):
            store = reuse()  # another process may have built it while this one waited
            if store is None:
                paths = list(release.films["path"])
                _build(folder, paths, size, signatures, fingerprint, workers or cpus, on_unreadable == "skip")
                store = reuse()
    if store is None:
        raise StoreError(f"{folder} changed while it was being opened; open it again")
    if store.unreadable and on_unreadable == "error":
        raise StoreError(_unreadable_message(_read_manifest(folder)["unreadable"], len(release.films)))
    return store


# ---- source


def _signatures(films: "pd.DataFrame") -> np.ndarray:
    """One uint64 per film of its name, file size and modification time, and of the store's version."""
    out, missing = np.empty(len(films), np.uint64), []
    for i, (image, path) in enumerate(zip(films["image"], films["path"], strict=True)):
        try:
            stat = os.stat(path)
        except OSError:
            missing.append(path)
            continue
        key = f"{VERSION}\0{image}\0{stat.st_size}\0{stat.st_mtime_ns // 1_000_000}".encode()
        out[i] = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    if missing:
        raise StoreError(f"{len(missing)} films cannot be found: {', '.join(missing[:5])}; read the release again")
    return out


def _fingerprint(signatures: np.ndarray, size: int) -> str:
    return hashlib.blake2b(signatures.astype("<u8").tobytes() + f"size {size}".encode(), digest_size=16).hexdigest()


# ---- finished stores


def _read_manifest(folder: Path) -> dict | None:
    try:
        return json.loads((folder / "store.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _reuse(folder: Path, films: "pd.DataFrame", size: int, fingerprint: str) -> Store | None:
    manifest = _read_manifest(folder)
    if manifest is None or manifest.get("fingerprint") != fingerprint:
        return None
    try:
        images = np.load(folder / "images.npy", mmap_mode="r")
    except (FileNotFoundError, ValueError, EOFError):
        return None
    unreadable = [item["image"] for item in manifest["unreadable"]]
    expected = (len(films) - len(unreadable), size, size)
    # A rebuild removes store.json before it replaces images.npy: the same manifest after opening means that these are
    # its images.
    if images.shape != expected or images.dtype != np.uint8 or _read_manifest(folder) != manifest:
        return None
    return Store(images, films[~films["image"].isin(unreadable)].reset_index(drop=True), size, fingerprint, unreadable)


def _unreadable_message(unreadable: list[dict], n_films: int) -> str:
    listed = "; ".join(f"{item['path']}: {item['reason']}" for item in unreadable[:20])
    more = f"; and {len(unreadable) - 20} more" if len(unreadable) > 20 else ""
    return (
        f"{len(unreadable)} of {n_films} films are unreadable: {listed}{more}. Replace these files and open the "
        "store again, or set skip_bad_films: true (on_unreadable='skip') to go on without them."
    )


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Exclusive among processes that would build the store in `folder`."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(exclusive(folder / "lock", f"waiting for another process that is building {folder}"))
        except OSError as error:
            fault = f"holds no store of this release and cannot be written ({error.strerror})"
            raise StoreError(f"{folder} {fault}; choose another folder") from error
        yield


# ---- building


def _build(
    folder: Path, paths: list[str], size: int, signatures: np.ndarray, fingerprint: str, workers: int, skip: bool
) -> None:
    """Decode into folder/building, then publish: remove store.json, move images.npy, write store.json.

    With `skip` unreadable films are left out and listed; without, they are an error once all others are decoded.
    """
    building = folder / "building"
    building.mkdir(exist_ok=True)
    offset, done = _prepare(building, size, signatures)
    reasons = _decode_all(building, paths, size, signatures, offset, done, workers)
    failed = [(paths[row], reason) for row, reason in sorted(reasons.items())]
    unreadable = [{"image": os.path.basename(path), "path": path, "reason": reason} for path, reason in failed]
    if unreadable and not skip:
        raise StoreError(_unreadable_message(unreadable, len(paths)))
    if len(unreadable) == len(paths):
        raise StoreError(f"not one of the {len(paths)} films is readable; the first is {paths[0]}: {reasons[0]}")
    if unreadable:
        _close_gaps(building, len(paths), size, offset, list(reasons))

    (folder / "store.json").unlink(missing_ok=True)
    os.replace(building / "images.npy", folder / "images.npy")
    manifest = {"version": VERSION, "fingerprint": fingerprint, "size": size, "films": len(paths)}
    content = json.dumps(manifest | {"unreadable": unreadable}, indent=1)
    write_whole(folder / "store.json", content.encode(), sync=True)
    shutil.rmtree(building)


def _prepare(building: Path, size: int, signatures: np.ndarray) -> tuple[int, np.ndarray]:
    """Make room for the images, or find those of an earlier build -> (offset of the first pixel in images.npy, which
    films are done)."""
    images = building / "images.npy"
    shape = (len(signatures), size, size)
    try:
        earlier, progress = np.load(images, mmap_mode="r"), np.load(building / "progress.npy")
        if earlier.shape == shape and earlier.dtype == np.uint8 and progress["signature"].shape == signatures.shape:
            return earlier.offset, (progress["signature"] == signatures) & progress["done"]
    except (OSError, ValueError, IndexError, EOFError):
        pass  # nothing usable: start from the beginning
    for name in ("images.npy", "progress.npy"):
        (building / name).unlink(missing_ok=True)
    needed, free = int(np.prod(shape)), shutil.disk_usage(building).free
    message = (
        f"the store needs {needed / 2**30:.2f} GiB in {building}, where {free / 2**30:.2f} GiB are free; make room "
        f"(an older images.npy in {building.parent} may be deleted) or choose another folder"
    )
    if free < needed + _SPARE_BYTES:
        raise StoreError(message)
    offset = np.lib.format.open_memmap(images, mode="w+", dtype=np.uint8, shape=shape).offset
    try:
        # Reserved now: a quota is hit before the work and not after hours of it.
        if hasattr(os, "posix_fallocate"):  # not on macOS
            with open(images, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, offset + needed)
    except OSError as error:
        if error.errno in _FULL:
            images.unlink()
            raise StoreError(message) from error
    return offset, np.zeros(len(signatures), bool)


def _decode_all(
    building: Path, paths: list[str], size: int, signatures: np.ndarray, offset: int, done: np.ndarray, workers: int
) -> dict[int, str]:
    """Decode what is not done, keeping the progress file up to date -> {row: reason} of the unreadable films."""
    images, reasons = str(building / "images.npy"), {}
    todo = [(int(row), paths[row]) for row in np.flatnonzero(~done)]
    tasks = [(images, offset, size, todo[i : i + _CHUNK]) for i in range(0, len(todo), _CHUNK)]
    bar = {"total": len(paths), "initial": len(paths) - len(todo), "unit": "film", "desc": "decoding"}
    saved = time.monotonic()

    def save() -> None:
        # Pixels reach the disk before the record that calls them done.
        with open(images, "rb") as file:
            os.fsync(file.fileno())
        _write_progress(building / "progress.npy", signatures, done)

    save()
    try:
        with (
            contextlib.closing(_results(tasks, workers)) as results,
            tqdm(**bar, file=sys.stdout, mininterval=5, ascii=True) as progress,
        ):
            for rows, failed in results:
                done[rows] = True
                done[list(failed)] = False
                reasons |= failed
                progress.update(len(rows))
                if time.monotonic() - saved > _CHECKPOINT_SECONDS:
                    save()
                    saved = time.monotonic()
    except BrokenProcessPool as error:
        raise StoreError(
            "a decoding process was killed (out of memory?); open the store again to resume, with fewer workers"
        ) from error
    except OSError as error:
        if error.errno not in _FULL:
            raise
        message = f"the disk of {building} is full; make room and open the store again: it resumes"
        raise StoreError(message) from error
    finally:
        with contextlib.suppress(OSError):
            save()
    return reasons


def _close_gaps(building: Path, n_films: int, size: int, offset: int, gaps: list[int]) -> None:
    """Move the rows of readable films together and cut the file behind them."""
    # Rows are about to lose their numbers: killed from here on, the build starts again.
    (building / "progress.npy").unlink()
    images = np.load(building / "images.npy", mmap_mode="r+")
    kept = np.delete(np.arange(n_films), gaps)
    for row, source in enumerate(kept):
        if row != source:
            images[row] = images[source]
    images.flush()
    with open(building / "images.npy", "r+b") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(kept), size, size)}
        np.lib.format.write_array_header_1_0(file, header)
        if file.tell() != offset:
            message = f"the header of {file.name} changed its length; delete {building} and open the store again"
            raise StoreError(message)
        file.truncate(offset + len(kept) * size * size)
        os.fsync(file.fileno())


def _results(tasks: list[tuple], workers: int) -> Iterator[tuple[list[int], dict[int, str]]]:
    """Results of `_decode_chunk`, in any order."""
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(_decode_chunk, tasks)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        futures = [pool.submit(_decode_chunk, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _decode_chunk(task: tuple) -> tuple[list[int], dict[int, str]]:
    """Decode films into their rows of the images file -> (rows tried, {row: reason} of the unreadable)."""
    images, offset, size, films = task
    failed: dict[int, str] = {}
    # pwrite and not a writable map: on a full disk it raises, where touching a mapped page would kill the process with
    # SIGBUS.
    file = os.open(images, os.O_WRONLY)
    try:
        for row, path in films:
            try:
                pixels = decode_film(Path(path).read_bytes(), size, os.path.splitext(path)[1])
            except (OSError, ValueError) as error:
                failed[row] = f"it cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
                continue
            _write_at(file, np.ascontiguousarray(pixels).data.cast("B"), offset + row * size * size)
    finally:
        os.close(file)
    return [row for row, _ in films], failed


def _write_at(file: int, data: memoryview, at: int) -> None:
    while len(data):
        written = os.pwrite(file, data, at)
        data, at = data[written:], at + written


def _write_progress(path: Path, signatures: np.ndarray, done: np.ndarray) -> None:
    progress = np.empty(len(done), [("signature", np.uint64), ("done", bool)])
    progress["signature"], progress["done"] = signatures, done
    buffer = io.BytesIO()
    np.save(buffer, progress)
    write_whole(path, buffer.getvalue(), sync=True)
