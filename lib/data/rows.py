"""The text files of a release, read row by row: every fault names its file and its row."""

import csv
import fnmatch
from pathlib import Path

from lib.data.release import ReleaseError


def find_file(root: Path, pattern: str, required: bool = True) -> Path | None:
    # Names are compared without case: a box list named BBox_list_2017.csv must not count as a release without boxes.
    found = sorted(path for path in root.iterdir() if fnmatch.fnmatchcase(path.name.lower(), pattern.lower()))
    if len(found) > 1:
        raise ReleaseError(
            f"{root} holds {len(found)} files named {pattern}: {some([p.name for p in found])}; keep exactly one"
        )
    if not found and required:
        raise ReleaseError(
            f"{root} holds no {pattern}; copy it there from the release, or point the data root at the folder that "
            "has it"
        )
    return found[0] if found else None


def read_lines(path: Path) -> list[tuple[int, list[str]]]:
    """(line number, stripped cells) of every line of a csv that is not blank; utf-8 with or without BOM, any line
    ends."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except FileNotFoundError:
        raise ReleaseError(f"{path} is missing; copy it there from the release") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ReleaseError(
            f"{path} is not a readable csv in utf-8 ({error}); copy it again from the release"
        ) from error
    return [(number, cells) for number, cells in lines if any(cells)]


def some(items, limit: int = 5) -> str:
    items = [str(item) for item in items]
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def require(faults: list[str], path: Path, advice: str) -> None:
    if faults:
        raise ReleaseError(
            f"{path}: {'; '.join(faults[:5])}{f'; and {len(faults) - 5} more' if len(faults) > 5 else ''}. {advice}"
        )
