"""The store: every film decoded once into a uint8 memory map, so that a training item is a slice and not a file."""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np
from tqdm import tqdm

from lib.data.decoding import check_file, read_film
from lib.locks import FULL, SPARE_BYTES, exclusive, spawned, write_whole

if TYPE_CHECKING:  # worker processes import this module: pandas would double their start-up
    import pandas as pd

    from lib.data.release import Release

VERSION = 1  # of the pixels: raise it whenever the same film would be stored differently
_CHUNK = 32  # films a worker decodes per task
_CHECKPOINT_SECONDS = 15.0
_CHECKED_BYTES = 16 * 2**20  # of the pixels are held against their digests whenever a store is opened
_PROGRESS = np.dtype([("signature", np.uint64), ("digest", np.uint64), ("done", bool)])


class StoreError(RuntimeError):
    """A store that cannot be built or opened; the message names the films or the folder and what to do, on one line:
    see `release.printable`."""

    def __init__(self, message: str):
        from lib.data.release import printable  # pandas, see above

        super().__init__(printable(message))


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
    digests : uint64 (N,)
        Of each film's pixels, taken when it was decoded.
    """

    images: np.memmap
    films: "pd.DataFrame"
    size: int
    fingerprint: str
    unreadable: list[str]
    digests: np.ndarray

    @property
    def digest(self) -> str:
        """Of all pixels in their order: equal wherever, whenever and from whatever files they were decoded."""
        content = self.digests.astype("<u8").tobytes() + f"size {self.size}".encode()
        return hashlib.blake2b(content, digest_size=16).hexdigest()

    def verify(self, rows: np.ndarray | None = None) -> None:
        """Hold the pixels of `rows`, by default of all films, against their digests (about a second per GB).

        Raises
        ------
        StoreError
            Some differ; the message names the folder, the first such film and the way out.
        """
        rows = np.arange(len(self.images)) if rows is None else rows
        damaged = [row for row in rows.tolist() if _digest(self.images[row]) != self.digests[row]]
        if damaged:
            folder = Path(getattr(self.images, "filename", "")).parent
            raise StoreError(
                f"{folder} is damaged: {len(damaged)} of {len(rows)} films checked are not as they were stored, the "
                f"first is {self.films['image'][damaged[0]]}; delete that folder, it is built again"
            )

    def remarks(self) -> list[tuple[str, str, str]]:
        """(kind, item, detail), see `Release.problems`, of every film of one grey, and of every film with the very
        pixels that an earlier one has in the store."""
        greys = {_digest(np.full((self.size, self.size), grey, np.uint8)): grey for grey in range(256)}
        images, splits, found, first = list(self.films["image"]), list(self.films["split"]), [], {}
        for row, digest in enumerate(self.digests.tolist()):
            earlier = first.setdefault(digest, row)
            if digest in greys:
                found.append(("film of one grey", images[row], f"every pixel is {greys[digest]}"))
            elif earlier != row:
                apart = f"; that is a {splits[earlier]} film, this a {splits[row]} film"
                apart = apart if splits[earlier] != splits[row] else ""
                found.append(("film repeated", images[row], f"the same pixels as {images[earlier]}{apart}"))
        return found

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

    A finished store is checked before it is used: all of its pixels up to 16 MiB, of larger ones that much in films
    spread over the store; `Store.verify` checks all. A store without digests, of an older version, is built again.

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
        What to do when films turn out unreadable (missing, no regular file, not PNG, JPEG or DICOM, truncated, damaged,
        not square): 'error' decodes all others, then raises naming them (missing ones before any work); 'skip' finishes
        the store without them and lists them in `Store.unreadable`.

    Raises
    ------
    StoreError
        Unreadable films, missing files, a damaged store, a folder that cannot be written, too little disk space, a
        worker that was killed.
    """
    if size < 1:
        raise ValueError(f"size is {size}; it must be at least 1 pixel")
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    if on_unreadable not in ("error", "skip"):
        raise ValueError(f"on_unreadable is {on_unreadable!r}; it must be 'error' or 'skip'")
    if not len(release.films):
        raise StoreError("the release has no films")
    folder = Path(os.path.realpath(Path(folder).expanduser()))  # a link to a folder that is still to be made
    signatures, absent = _signatures(release.films)
    if absent and on_unreadable == "error":
        raise StoreError(_unreadable_message(absent, len(signatures)))
    fingerprint = _fingerprint(signatures, size)

    reuse = partial(_reuse, folder, release.films, size, fingerprint)
    store = reuse()
    if store is None:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with _writing(folder), exclusive(folder / "lock", f"waiting for another process that is building {folder}"):
            store = reuse()  # another process may have built it while this one waited
            if store is None:
                _build(folder, release.films, size, signatures, fingerprint, workers or cpus, on_unreadable == "skip")
                store = reuse()
    if store is None:
        raise StoreError(f"{folder} changed while it was being opened; open it again")
    if store.unreadable and on_unreadable == "error":
        raise StoreError(_unreadable_message(_read_manifest(folder)["unreadable"], len(release.films)))
    return store


def verify_folder(folder: Path, size: int) -> None:
    """Hold all films of a finished store against their digests, without the release that it was built from.

    Raises
    ------
    StoreError
        Some differ, or the folder holds no finished store.
    """
    import pandas as pd

    if manifest := _read_manifest(folder):
        films = pd.DataFrame({"image": [f"that of row {row}" for row in range(len(manifest["digests"]) // 16)]})
        if store := _reuse(folder, films, size, manifest["fingerprint"]):
            return store.verify()
    raise StoreError(f"{folder} is not as it was built: delete that folder, it is built again")


# ---- source


def _signatures(films: "pd.DataFrame") -> tuple[np.ndarray, list[dict]]:
    """One uint64 per film of its name, file size and modification time, and of the store's version; and the films whose
    file is missing or refused, which are unreadable before they are opened."""
    out, absent = np.empty(len(films), np.uint64), []
    for i, (image, path) in enumerate(zip(films["image"], films["path"], strict=True)):
        try:
            status = os.stat(path)
            check_file(status)
            seen = f"{status.st_size}\0{status.st_mtime_ns // 1_000_000}"
        except (OSError, ValueError) as error:
            seen = f"it cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
            absent.append({"image": image, "path": path, "reason": seen})
        key = f"{VERSION}\0{image}\0{seen}".encode()
        out[i] = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    return out, absent


def _fingerprint(signatures: np.ndarray, size: int) -> str:
    return hashlib.blake2b(signatures.astype("<u8").tobytes() + f"size {size}".encode(), digest_size=16).hexdigest()


# ---- finished stores


def _read_manifest(folder: Path) -> dict | None:
    """store.json; None where it is not, word by word, what a build of this version wrote."""
    path = folder / "store.json"
    try:
        manifest = json.loads(path.read_bytes()) if path.is_file() else None
        if isinstance(manifest, dict) and manifest.pop("checksum", None) == _checksum(manifest):
            return manifest
    except (OSError, ValueError, RecursionError):
        pass
    return None


def _checksum(manifest: dict) -> str:
    return hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=16).hexdigest()


def _map(path: Path, dtype: type | np.dtype, shape: tuple[int, ...]) -> np.memmap | None:
    """The array of an .npy file, read-only; None unless it is what a build writes for that type and shape."""
    header = _header(dtype, shape)
    try:
        if not path.is_file() or path.stat().st_size != len(header) + np.dtype(dtype).itemsize * math.prod(shape):
            return None
        with open(path, "rb") as file:
            if file.read(len(header)) == header:
                return np.memmap(file, dtype, "r", len(header), shape)
    except OSError:
        pass
    return None


def _header(dtype: type | np.dtype, shape: tuple[int, ...]) -> bytes:
    buffer, descr = io.BytesIO(), np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _digest(pixels: np.ndarray) -> int:
    return int.from_bytes(
        hashlib.blake2b(np.ascontiguousarray(pixels).data.cast("B"), digest_size=8).digest(), "little"
    )


def _reuse(folder: Path, films: "pd.DataFrame", size: int, fingerprint: str) -> Store | None:
    manifest = _read_manifest(folder)
    if manifest is None or manifest["fingerprint"] != fingerprint:
        return None
    unreadable = [item["image"] for item in manifest["unreadable"]]
    digests = np.frombuffer(bytes.fromhex(manifest["digests"]), "<u8").astype(np.uint64)
    images = _map(folder / "images.npy", np.uint8, (len(digests), size, size))
    # A rebuild removes store.json before it replaces images.npy: the same manifest after opening means that these are
    # its images.
    if images is None or _read_manifest(folder) != manifest:
        return None
    films = films[~films["image"].isin(unreadable)].reset_index(drop=True)
    store = Store(images, films, size, fingerprint, unreadable, digests)
    checked = min(len(films), -(-_CHECKED_BYTES // size**2))
    store.verify(np.linspace(0, len(films) - 1, checked).astype(np.int64))
    return store


def _unreadable_message(unreadable: list[dict], n_films: int) -> str:
    listed = "; ".join(f"{item['path']}: {item['reason']}" for item in unreadable[:20])
    more = f"; and {len(unreadable) - 20} more" if len(unreadable) > 20 else ""
    return (
        f"{len(unreadable)} of {n_films} films are unreadable: {listed}{more}. Replace these files and open the "
        "store again, or set skip_bad_films: true (on_unreadable='skip') to go on without them."
    )


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Make the folder; what goes wrong with it within the context is said in a sentence."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno in FULL:
            message = f"the disk of {folder} is full; make room and open the store again: it resumes ({error.strerror})"
        else:
            at = f" at {error.filename}" if error.filename else ""
            message = (
                f"{folder} holds no store of this release and cannot be written ({error.strerror or error}{at}); "
                "delete what is in the way, or choose another folder"
            )
        raise StoreError(message) from error


# ---- building


def _build(
    folder: Path, films: "pd.DataFrame", size: int, signatures: np.ndarray, fingerprint: str, workers: int, skip: bool
) -> None:
    """Decode into folder/building, then publish: remove store.json, move images.npy, write store.json.

    With `skip` unreadable films are left out and listed; without, they are an error once all others are decoded.
    """
    building, paths = folder / "building", list(films["path"])
    for name in ("store.json", "images.npy"):  # replaced at the end: a folder in their place must not wait until then
        if (folder / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(folder / name))
    building.mkdir(exist_ok=True)
    progress = _prepare(building, size, signatures)
    reasons = _decode_all(building, paths, size, progress, workers)
    unreadable = [
        {"image": films["image"].iloc[row], "path": paths[row], "reason": reason}
        for row, reason in sorted(reasons.items())
    ]
    if unreadable and not skip:
        raise StoreError(_unreadable_message(unreadable, len(paths)))
    if len(unreadable) == len(paths):
        raise StoreError(
            f"not one of the {len(paths)} films is readable; the first is {paths[0]}: {reasons[0]}. Put readable films "
            "in their place and open the store again"
        )
    if unreadable:
        _close_gaps(building, len(paths), size, list(reasons))

    (folder / "store.json").unlink(missing_ok=True)
    os.replace(building / "images.npy", folder / "images.npy")
    digests = np.delete(progress["digest"], list(reasons)).astype("<u8").tobytes().hex()
    manifest = {"version": VERSION, "fingerprint": fingerprint, "size": size, "films": len(paths)}
    manifest |= {"unreadable": unreadable, "digests": digests}
    content = json.dumps(manifest | {"checksum": _checksum(manifest)}, indent=1)
    write_whole(folder / "store.json", content.encode(), sync=True)
    shutil.rmtree(building)


def _prepare(building: Path, size: int, signatures: np.ndarray) -> np.ndarray:
    """Make room for the images, or find those of an earlier build -> progress: which films are done."""
    images, shape = building / "images.npy", (len(signatures), size, size)
    earlier = _map(images, np.uint8, shape)
    progress = _map(building / "progress.npy", _PROGRESS, signatures.shape)
    if earlier is not None and progress is not None:
        progress = np.array(progress)
        progress["done"] &= progress["signature"] == signatures
        for row in np.flatnonzero(progress["done"]):
            progress["done"][row] = _digest(earlier[row]) == progress["digest"][row]
        progress["signature"] = signatures
        return progress
    shutil.rmtree(building)
    building.mkdir()
    header, needed = _header(np.uint8, shape), math.prod(shape)
    free = shutil.disk_usage(building).free
    message = (
        f"the store needs {needed / 2**30:.2f} GiB in {building}, and {SPARE_BYTES // 2**20} MiB to spare, where "
        f"{free / 2**30:.2f} GiB are free; make room (an older images.npy in {building.parent} may be deleted) or "
        "choose another folder"
    )
    if free < needed + SPARE_BYTES:
        raise StoreError(message)
    try:
        with open(images, "xb") as file:
            # Reserved now: a quota is hit before the work and not after hours of it.
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, len(header) + needed)
            file.truncate(len(header) + needed)
            file.write(header)
    except OSError as error:
        if error.errno in FULL:
            images.unlink()
            raise StoreError(f"{message} ({error.strerror})") from error
        raise
    progress = np.zeros(len(signatures), _PROGRESS)
    progress["signature"] = signatures
    return progress


def _decode_all(building: Path, paths: list[str], size: int, progress: np.ndarray, workers: int) -> dict[int, str]:
    """Decode what is not done, keeping the progress file up to date -> {row: reason} of the unreadable films."""
    images, reasons = str(building / "images.npy"), {}
    offset = len(_header(np.uint8, (len(paths), size, size)))
    todo = [(int(row), paths[row]) for row in np.flatnonzero(~progress["done"])]
    tasks = [(images, offset, size, todo[i : i + _CHUNK]) for i in range(0, len(todo), _CHUNK)]
    bar = {"total": len(paths), "initial": len(paths) - len(todo), "unit": "film", "desc": "decoding"}
    saved = time.monotonic()

    def save() -> None:
        # Pixels reach the disk before the record that calls them done.
        with open(images, "rb") as file:
            os.fsync(file.fileno())
        buffer = io.BytesIO()
        np.save(buffer, progress)
        write_whole(building / "progress.npy", buffer.getvalue(), sync=True)

    save()
    try:
        with (
            contextlib.closing(_results(tasks, workers)) as results,
            tqdm(**bar, file=sys.stdout, mininterval=5, ascii=True) as shown,
        ):
            for digests, failed in results:
                progress["digest"][list(digests)] = list(digests.values())
                progress["done"][list(digests)] = True
                reasons |= failed
                shown.update(len(digests) + len(failed))
                if time.monotonic() - saved > _CHECKPOINT_SECONDS:
                    save()
                    saved = time.monotonic()
    except (BrokenProcessPool, MemoryError) as error:
        raise StoreError(
            "a decoding process was killed (out of memory?) or could not start (a script's calls belong below "
            "`if __name__ == '__main__':`); open the store again to resume, with fewer workers"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            save()
    return reasons


def _close_gaps(building: Path, n_films: int, size: int, gaps: list[int]) -> None:
    """Move the rows of readable films together and cut the file behind them."""
    # Rows are about to lose their numbers: killed from here on, the build starts again.
    (building / "progress.npy").unlink()
    kept = np.delete(np.arange(n_films), gaps)
    before, header = (_header(np.uint8, (n, size, size)) for n in (n_films, len(kept)))
    if len(header) != len(before):
        raise StoreError(
            f"the header of {building}/images.npy changes its length; delete {building} and open the store again"
        )
    images = np.memmap(building / "images.npy", np.uint8, "r+", len(before), (n_films, size, size))
    for row, source in enumerate(kept):
        if row != source:
            images[row] = images[source]
    images.flush()
    with open(building / "images.npy", "r+b") as file:
        file.write(header)
        file.truncate(len(header) + len(kept) * size * size)
        os.fsync(file.fileno())


def _results(tasks: list[tuple], workers: int) -> Iterator[tuple[dict[int, int], dict[int, str]]]:
    """Results of `_decode_chunk`, in any order."""
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(_decode_chunk, tasks)
        return
    with spawned(workers) as pool:
        futures = [pool.submit(_decode_alone, task) for task in tasks]
        for future in as_completed(futures):
            yield future.result()


def _decode_alone(task: tuple) -> tuple[dict[int, int], dict[int, str]]:
    cv2.setNumThreads(1)  # each worker has a CPU
    return _decode_chunk(task)


def _decode_chunk(task: tuple) -> tuple[dict[int, int], dict[int, str]]:
    """Decode films into their rows of the images file -> ({row: digest}, {row: reason} of the unreadable)."""
    images, offset, size, films = task
    digests: dict[int, int] = {}
    failed: dict[int, str] = {}
    # pwrite and not a writable map: on a full disk it raises, where touching a mapped page would kill the process with
    # SIGBUS.
    file = os.open(images, os.O_WRONLY)
    try:
        for row, path in films:
            try:
                pixels = np.ascontiguousarray(read_film(path, size))
            except ValueError as error:
                failed[row] = str(error)
                continue
            _write_at(file, pixels.data.cast("B"), offset + row * size * size)
            digests[row] = _digest(pixels)
    finally:
        os.close(file)
    return digests, failed


def _write_at(file: int, data: memoryview, at: int) -> None:
    while len(data):
        written = os.pwrite(file, data, at)
        data, at = data[written:], at + written
