"""What the readers of releases share: text files read row by row, boxes, and faults that name their file and row."""

import csv
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from lib.data.release import BOX_COLUMNS, BOX_PIXELS, FILM_COLUMNS, ReleaseError


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
    root = Path(root).expanduser().resolve()
    if not root.is_dir():
        raise ReleaseError(f"{root} is not a folder; {advice}")
    return root


def find_file(root: Path, pattern: str, required: bool = True) -> Path | None:
    """The one file of a folder whose name matches `pattern`; None where there is none and none is required.

    Names are compared without case: a box list named BBox_list_2017.csv must not count as a release without boxes.
    Raises ReleaseError where several files match, or none does that is required.
    """
    found = sorted(path for path in root.iterdir() if fnmatch.fnmatchcase(path.name.lower(), pattern.lower()))
    if len(found) > 1:
        names = some(path.name for path in found)
        raise ReleaseError(f"{root} holds {len(found)} files named {pattern}: {names}; keep exactly one")
    if not found and required:
        raise ReleaseError(
            f"{root} holds no {pattern}; copy it there from the release, or point the data root at the folder that "
            "has it"
        )
    return found[0] if found else None


def read_lines(path: Path) -> list[tuple[int, list[str]]]:
    """(line number, stripped cells) of every line of a csv that is not blank; utf-8 with or without BOM, any line
    ends. Raises ReleaseError where the file is missing or not such a csv."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except FileNotFoundError:
        raise ReleaseError(f"{path} is missing; copy it there from the release") from None
    except (UnicodeDecodeError, csv.Error) as error:
        message = f"{path} is not a readable csv in utf-8 ({error}); copy it again from the release"
        raise ReleaseError(message) from error
    return [(number, cells) for number, cells in lines if any(cells)]


def read_table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header of a csv, and its rows as `read_lines` gives them. Raises ReleaseError where it has no rows."""
    lines = read_lines(path)
    if len(lines) < 2:
        raise ReleaseError(f"{path} has no rows; copy it again from the release")
    return lines[0][1], lines[1:]


def some(items: Iterable, limit: int = 5) -> str:
    """The first `limit` items, for a message, and how many more there are."""
    items = [str(item) for item in items]
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def require(faults: Sequence[str], path: Path, advice: str) -> None:
    """Raise ReleaseError where a file has faults; the message names the first five and ends with `advice`."""
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ReleaseError(f"{path}: {'; '.join(faults[:5])}{more}. {advice}")


def require_all(missing: Sequence[str], on_missing: str, fault: str, cure: str, without: str) -> None:
    """Raise ReleaseError where one part of a release names items that another lacks, unless `on_missing` is 'skip'.

    The message: '<how many> <fault>: <the first five>. <cure>, or set skip_bad_films ... to go on without <without>.'
    """
    if missing and on_missing == "error":
        raise ReleaseError(
            f"{len(missing)} {fault}: {some(missing)}. {cure}, or set skip_bad_films: true (on_missing='skip') "
            f"to go on without {without}."
        )


def notes(kind: str, items: Iterable[str], detail: str) -> list[tuple[str, str, str]]:
    """The same problem of several items, see `Release.problems`."""
    return [(kind, item, detail) for item in items]


def box_fault(x: float, y: float, w: float, h: float, box: str) -> str | None:
    """What is wrong with a box that the message calls `box`, or None."""
    if not (all(map(math.isfinite, (x, y, w, h))) and w > 0 and h > 0):
        return f"{box} has no area"
    if x >= BOX_PIXELS or y >= BOX_PIXELS or x + w <= 0 or y + h <= 0:
        return f"{box} lies outside its film (boxes are in pixels of the 1024 x 1024 release)"
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
