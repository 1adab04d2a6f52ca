"""One PNG file as a square grey film."""

import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np


def decode_film(data: bytes, size: int) -> np.ndarray:
    """One PNG file's bytes as a grey film, uint8 (size, size). Raises ValueError saying what is wrong with it."""
    _check_png(data)
    film = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if film is None:
        raise ValueError("its pixels cannot be decoded")
    height, width = film.shape[:2]
    if height != width:
        raise ValueError(f"it is not square ({width} x {height}): boxes and crops assume the square films of the release")
    if film.ndim == 3:
        film = cv2.cvtColor(film, cv2.COLOR_BGRA2GRAY if film.shape[2] == 4 else cv2.COLOR_BGR2GRAY)
    # Halves first where they nest: OpenCV averages 2 x 2 ten times faster than 4 x 4, and rounding twice moves a pixel by one grey level
    # at most.
    while len(film) % (2 * size) == 0:
        film = cv2.resize(film, (len(film) // 2, len(film) // 2), interpolation=cv2.INTER_AREA)
    if len(film) != size:
        film = cv2.resize(film, (size, size), interpolation=cv2.INTER_AREA if len(film) > size else cv2.INTER_LINEAR)
    if film.dtype == np.uint16:
        film = ((film.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return film


def _check_png(data: bytes) -> None:
    """Walk the chunks to IEND and check their sums: some versions of OpenCV return a truncated PNG as a film whose rest is blank."""
    if not data:
        raise ValueError("it is empty")
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError("it is not a PNG file")
    view, at = memoryview(data), 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 12 + length
        if end > len(data):
            break
        if zlib.crc32(view[at + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            raise ValueError("it is damaged (a checksum is wrong)")
        if data[at + 4 : at + 8] == b"IEND":
            return
        at = end
    raise ValueError("it is truncated")


def read_films(paths: Iterable[str], size: int) -> np.ndarray:
    """A few films straight from their files, to look at: uint8 (N, size, size). A film that cannot be read raises ValueError with its path."""
    films = []
    for path in paths:
        try:
            films.append(decode_film(Path(path).read_bytes(), size))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return np.stack(films)
