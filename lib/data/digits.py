"""Scikit-learn's handwritten digits as a release: 1,797 real images that come with the library, to run the analyses
beyond chest films."""

import os
from functools import partial
from numbers import Integral
from pathlib import Path

import cv2
import numpy as np

from lib.data import reading
from lib.data.release import DIGITS, Release, ReleaseError, problem_frame
from lib.data.rsna import draw_splits
from lib.data.writing import write_once, write_png
from lib.locks import write_whole

TABLE = "digits.csv"
SIDE = 8  # values along a side of the data
FILMS = 1797
TEST_FRACTION = 0.3
_BRIGHTEST = 16


def write_digits(root: str | Path, *, size: int = 32) -> None:
    """Write the digits as 8-bit PNG files images/digit_0000.png ... , digits.csv (image, label) and, last, digits.json.

    The data are 8 x 8 values 0 to 16, each a count of ink in one 4 x 4 block of a 32 x 32 drawing. They are scaled to 0
    to 255 (bright is ink) and enlarged by nearest neighbour, which puts each count back over its block: no grey is
    invented, none overshoots, and averaging the blocks returns the data.

    An interrupted call is continued by the next; a call for what is already there returns at once.

    Parameters
    ----------
    root : folder, new or empty or of an earlier call
    size : side of the images in pixels, a multiple of 8 up to 1024

    Raises
    ------
    ValueError : another size
    lib.data.release.ReleaseError : `root` holds digits of another size, damaged ones, or something else, or cannot be
    written
    """
    if isinstance(size, bool) or not isinstance(size, Integral) or not SIDE <= size <= 1024 or size % SIDE:
        raise ValueError(f"size is {size!r:.80}: it must be a multiple of {SIDE} pixels, up to 1024")
    root, size = Path(root), int(size)
    write_once(root, "digits", {"format": 1, "size": size}, partial(_is_complete, root), partial(_write, root, size))


def _is_complete(root: Path) -> bool:
    files = (root / TABLE, *(root / "images").glob("digit_*.png"))
    return len(files) > FILMS and all(path.is_file() and path.stat().st_size for path in files)


def _write(root: Path, size: int, anew: bool) -> None:
    """Write everything but digits.json; the images are so few that what is there is written over in any case."""
    from sklearn.datasets import load_digits  # here: seconds, and only the first call needs it

    data = load_digits()
    names = [f"digit_{i:04d}.png" for i in range(len(data.target))]
    pixels = np.floor(data.images * (255 / _BRIGHTEST) + 0.5).astype(np.uint8)
    (root / "images").mkdir(exist_ok=True)
    for name, image in zip(names, pixels, strict=True):
        enlarged = cv2.resize(image, (size, size), interpolation=cv2.INTER_NEAREST)
        write_png(root / "images" / name, enlarged)
    rows = [f"{name},{label}" for name, label in zip(names, data.target, strict=True)]
    write_whole(root / TABLE, "\n".join(["image,label", *rows, ""]).encode())


def read_digits(root: str | Path, *, validation_fraction: float, seed: int) -> Release:
    """Read the folder of `write_digits` as a release of ten classes, '0' to '9', one per image.

    The data do not say who wrote which digit: each image counts as a patient of its own, so writers may be on both
    sides of the split, and intervals over patients are intervals over images. There are no boxes, ages, sexes or views
    (NaN and '').

    Parameters
    ----------
    validation_fraction : float in (0, 1)
        Share of the training images (70 % of all) that becomes the validation split; every digit is divided on its own.
    seed : int
        Of the draw.

    Raises
    ------
    ReleaseError
        The folder was not written to the end, or its table or images are damaged or missing.
    """
    advice = "write the digits there with write_digits (data_root empty does that)"
    root = reading.open_root(root, advice, validation_fraction=validation_fraction)
    again = f"delete {root} to have it written again"
    reading.find_file(root, "digits.json")  # written last
    path = reading.find_file(root, TABLE)
    lines = reading.read_lines(path)
    if not lines or lines[0][1] != ["image", "label"]:
        raise ReleaseError(f"{path} must begin with 'image,label'; {again}")
    wrong = [(number, cells) for number, cells in lines[1:] if len(cells) != 2 or cells[1] not in DIGITS]
    faults = [f"row {number} is {','.join(cells)!r}, not an image and a digit" for number, cells in wrong]
    reading.require(faults, path, "Delete the folder to have it written again.")
    images, labels = ([cells[column] for _, cells in lines[1:]] for column in (0, 1))
    there = set(os.listdir(root / "images")) if (root / "images").is_dir() else set()
    missing = [name for name in images if name not in there]
    if missing:
        raise ReleaseError(
            f"{len(missing)} images of {path} are missing from images/: {reading.some(missing)}. "
            f"Delete {root} to have it written again."
        )
    if len(set(images)) < len(images) or any(labels.count(digit) < 3 for digit in DIGITS):
        raise ReleaseError(f"{path} names an image twice, or has fewer than 3 of a digit; {again}")
    fractions = {"test_fraction": TEST_FRACTION, "validation_fraction": validation_fraction}
    split, paths = draw_splits(images, labels, **fractions, seed=seed), [str(root / "images" / name) for name in images]
    films = reading.film_frame({"image": images, "patient": images, "labels": labels, "split": split, "path": paths})
    return Release(root, films, reading.box_frame([]), problem_frame([]), DIGITS)
