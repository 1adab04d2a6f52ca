"""What the readers of releases share: text files read row by row, boxes, and faults that name their file and row."""

import contextlib
import csv
import fnmatch
import itertools
import math
import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from lib.data.release import BOX_COLUMNS, BOX_PIXELS, FILM_COLUMNS, ReleaseError

_LARGEST_FILE = 2**28  # bytes: thirty times the list of all films of NIH
_LONGEST_CELL = 1000  # characters: names, ids and labels are far from it, and a message stays readable


def open_root(root: str | Path, advice: str, on_missing: str = "error", **fractions: float) -> Path:
    """The folder of a release, absolute, once the arguments that every reader takes are checked.

    Raises
    ------
    ValueError
        `on_missing` is neither 'error' nor 'skip', or one of the named fractions is not within (0, 1).
    ReleaseError
        `root` is not a folder; the message ends with `advice`.
    """
    for name, value in fractions.items():
        if not 0 < value < 1:
            raise ValueError(f"{name} is {value}; it must lie between 0 and 1, both excluded")
    if on_missing not in ("error", "skip"):
        raise ValueError(f"on_missing is {on_missing!r}; it must be 'error' or 'skip'")
    try:
        folder = Path(root).expanduser().resolve()
        os.fsdecode(folder).encode()
        status = os.stat(folder)
    # ValueError: a NUL in the name, or bytes that are no text, which no table could hold.
    except (OSError, RuntimeError, ValueError) as error:
        name = cut(str(root), 200)
        raise ReleaseError(f"{name} is not a folder that can be opened ({error_text(error)}); {advice}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise ReleaseError(f"{folder} is not a folder; {advice}")
    return folder


def find_file(root: Path, pattern: str, required: bool = True) -> Path | None:
    """The one file of a folder whose name matches `pattern`; None where there is none and none is required.

    Names are compared without case: a box list named BBox_list_2017.csv must not count as a release without boxes.
    Raises ReleaseError where several files match, or none does that is required.
    """
    with _listing(root) as entries:
        found = sorted(entry.name for entry in entries if fnmatch.fnmatchcase(entry.name.lower(), pattern.lower()))
    if len(found) > 1:
        raise ReleaseError(f"{root} holds {len(found)} files named {pattern}: {some(found)}; keep exactly one")
    if not found and required:
        raise ReleaseError(
            f"{root} holds no {pattern}; copy it there from the release, or point the data root at the folder that "
            "has it"
        )
    return root / found[0] if found else None


@contextlib.contextmanager
def _listing(folder: Path) -> Iterator[Iterator[os.DirEntry]]:
    try:
        with os.scandir(folder) as entries:
            yield entries
    except OSError as error:
        raise ReleaseError(
            f"{folder} cannot be listed ({error_text(error)}); mend the folder or its permissions"
        ) from error


def find_films(root: Path, folders: Sequence[Path], suffixes: Sequence[str], problems: list) -> dict[str, str]:
    """Path of every film in `folders` by its stem, the file's name without its suffix.

    Films are regular files, or links that lead to one: not folders, pipes, or links that lead nowhere. Each folder is
    listed once, and only links are looked up: 112,120 single look-ups would cost minutes on a network disk.

    Parameters
    ----------
    root : folder of the release, below which notes name the others
    folders : where films may lie; of several files of one stem, one in the earlier folder is taken
    suffixes : ends of a film's name in small letters, found in any case; within a folder, the earlier is taken
    problems : list of (kind, item, detail), added to: 'film found twice'
    """
    paths: dict[str, str] = {}
    for folder in folders:
        found, where = [], folder.relative_to(root).as_posix()
        if not where.isprintable():
            raise ReleaseError(f"{folder} has a character in its name that cannot be seen; rename this folder")
        with _listing(folder) as entries:
            for entry in entries:
                stem, suffix = os.path.splitext(entry.name)
                is_named = (suffix := suffix.lower()) in suffixes
                if is_named and (entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path)):
                    found.append((-suffixes.index(suffix), entry.name, stem, entry.path))
        here = {stem: path for _, _, stem, path in sorted(found)}
        if again := len(found) - len(here):
            detail = f"{again} files under a stem that another file has: {' goes before '.join(suffixes)}"
            problems.append(("film found twice", where, detail))
        if again := len(here.keys() & paths.keys()):
            problems.append(("film found twice", where, f"{again} films are in an earlier folder too, which is used"))
        paths = here | paths
    return paths


def read_lines(path: Path) -> list[tuple[int, list[str]]]:
    """(row number, stripped cells) of every line of a csv that is not blank; utf-8 with or without BOM, any line ends.

    A record is one line, so that a quote left open is the fault of its own row and swallows no other. Raises
    ReleaseError where there is no such regular file, and for a row that is no csv in utf-8, or has a cell of more than
    1,000 characters or with a character that cannot be seen.
    """
    return list(_lines(path))


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_FILE:
            fault = f"{status.st_size:,} bytes long" if stat.S_ISREG(status.st_mode) else "a folder, a pipe or a device"
            raise ReleaseError(f"{path} is {fault}, not a list of films; copy it again from the release")
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            for number, line in enumerate(file, 1):
                try:
                    cells = [cell.strip() for cell in next(csv.reader([line], strict=True), [])]
                    sound = len(line) <= _LONGEST_CELL and line.rstrip("\r\n").isprintable()
                    if not sound and (fault := next(filter(None, map(_cell_fault, cells)), None)):
                        raise csv.Error(fault)
                except csv.Error as error:
                    fault = "a quote is not closed in its row" if "unexpected end" in str(error) else error
                    advice = "mend it, or copy it again from the release"
                    message = f"{path} is not a readable csv in utf-8, row {number}: {fault}; {advice}"
                    raise ReleaseError(message) from error
                if any(cells):
                    yield number, cells
    except FileNotFoundError:
        raise ReleaseError(f"{path} is missing; copy it there from the release") from None
    except OSError as error:
        message = f"{path} cannot be read ({error_text(error)}); mend the file or its permissions"
        raise ReleaseError(message) from error


def _cell_fault(cell: str) -> str | None:
    """What is wrong with a cell of any column, or None."""
    if len(cell) > _LONGEST_CELL:
        return f"a cell has {len(cell):,} characters ({cut(repr(cell), 50)})"
    if not cell.isprintable() and not cell.replace("\t", "").isprintable():
        return f"a cell has a character that is not utf-8 or cannot be seen ({cut(ascii(cell))})"
    return None


def spelling(name: str) -> str:
    """What two names have in common that differ in case or in the form of their characters only."""
    return unicodedata.normalize("NFKC", name).casefold()


def numbers(cells: Sequence[str]) -> list[float]:
    """Cells as numbers. ValueError where one is not a number in ASCII; float alone would take 1_0 and other digits."""
    if not all(cell.isascii() and "_" not in cell for cell in cells):
        raise ValueError
    return [float(cell) for cell in cells]


def read_table(path: Path) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """The header of a csv, and its rows as `read_lines` gives them, one after the other: the cells of 112,120 films are
    100 MB. Raises ReleaseError where it has no rows."""
    lines = _lines(path)
    header, first = next(lines, None), next(lines, None)
    if first is None:
        raise ReleaseError(f"{path} has no rows; copy it again from the release")
    return header[1], itertools.chain([first], lines)


def some(items: Iterable, limit: int = 5) -> str:
    """The first `limit` items, for a message, and how many more there are."""
    items = list(items)
    return ", ".join(cut(str(item)) for item in items[:limit]) + (
        f" and {len(items) - limit} more" if len(items) > limit else ""
    )


def cut(text: str, limit: int = 80) -> str:
    """Text of at most `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def error_text(error: Exception) -> str:
    """What the system says of an error, without the path."""
    return getattr(error, "strerror", None) or str(error)


def require(faults: Sequence[str], path: Path, advice: str) -> None:
    """Raise ReleaseError where a file has faults; the message names the first five and ends with `advice`."""
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ReleaseError(f"{path}: {'; '.join(cut(fault, 400) for fault in faults[:5])}{more}. {advice}")


def require_all(missing: Sequence[str], total: int, on_missing: str, fault: str, cure: str, without: str) -> None:
    """Raise ReleaseError where one part of a release names items that another lacks: any of them, or, where
    `on_missing` is 'skip', all `total`.

    The message: '<how many> <fault>: <the first five>. <cure>, or set skip_bad_films ... to go on without <without>.'
    """
    if missing and (on_missing == "error" or len(missing) == total):
        way = f", or set skip_bad_films: true (on_missing='skip') to go on without {without}"
        if len(missing) == total:
            way = "; skip_bad_films cannot help where all are missing"
        raise ReleaseError(f"{len(missing)} {fault}: {some(missing)}. {cure}{way}.")


def notes(kind: str, items: Iterable[str], detail: str) -> list[tuple[str, str, str]]:
    """The same problem of several items, see `Release.problems`."""
    return [(kind, item, detail) for item in items]


def box_fault(x: float, y: float, w: float, h: float, box: str) -> str | None:
    """What is wrong with a box that the message calls `box`, or None."""
    if not (all(map(math.isfinite, (x, y, w, h))) and x + w > x and y + h > y):
        return f"{box} has no area"
    if x >= BOX_PIXELS or y >= BOX_PIXELS or x + w <= 0 or y + h <= 0:
        return f"{box} lies outside its film (boxes are in pixels of the 1024 x 1024 release)"
    if max(w, h) > 2 * BOX_PIXELS:
        return f"{box} is larger than two films (boxes are in pixels of the 1024 x 1024 release)"
    return None


def clip_box(
    sides: Sequence[float], box: str, image: str, number: int, problems: list
) -> tuple[float, float, float, float]:
    """Corners x1, y1, x2, y2 of the part of a box that lies on its film; what is cut off is noted.

    Parameters
    ----------
    sides : x, y, width and height
    box, image, number : what the note calls the box, its film, and its row
    problems : list of (kind, item, detail), added to
    """
    x, y, w, h = sides
    corners = max(x, 0.0), max(y, 0.0), min(x + w, float(BOX_PIXELS)), min(y + h, float(BOX_PIXELS))
    if corners != (x, y, x + w, y + h):
        problems.append(("box clipped", image, f"row {number}: the {box} reaches past its film"))
    return corners


def box_frame(rows: list[tuple]) -> pd.DataFrame:
    """The table `Release.boxes` of (image, class, x1, y1, x2, y2)."""
    types = dict.fromkeys(BOX_COLUMNS[:2], "str") | dict.fromkeys(BOX_COLUMNS[2:], float)
    return pd.DataFrame(rows, columns=list(BOX_COLUMNS)).astype(types)


def film_frame(columns: Mapping | pd.DataFrame) -> pd.DataFrame:
    """The table `Release.films` of the given columns, in its order and types.

    Age, sex, view and follow-up that are not given are NaN, '', '' and 0; columns of the release's own, str, follow.
    """
    films = pd.DataFrame({"age": math.nan, "sex": "", "view": "", "follow_up": 0} | dict(columns))
    types = dict.fromkeys([*FILM_COLUMNS, *columns], "str") | {"age": float, "follow_up": int}
    return films.astype(types)[list(types)]
