"""The text files of an NIH release, read row by row and checked: Data_Entry, the two lists, BBox_List."""

import csv
import fnmatch
import math
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import pandas as pd

CLASSES: tuple[str, ...] = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis", "Hernia", "Infiltration", "Mass",
    "No Finding", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax",
)  # fmt: skip
NO_FINDING = "No Finding"
FINDINGS: tuple[str, ...] = tuple(name for name in CLASSES if name != NO_FINDING)
BOX_PIXELS = 1024

BOX_COLUMNS = ("image", "class", "x1", "y1", "x2", "y2")

_ALIASES = {"Infiltrate": "Infiltration", "Pleural Thickening": "Pleural_Thickening"}
_ENTRY_COLUMNS = {
    "image": ("Image Index",),
    "labels": ("Finding Labels",),
    "follow_up": ("Follow-up #",),
    "patient": ("Patient ID",),
    "age": ("Patient Age",),
    "sex": ("Patient Gender", "Patient Sex"),
    "view": ("View Position",),
}
_YEARS = {"": 1.0, "Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
_OLDEST = 120


class ReleaseError(ValueError):
    """A release that cannot be used as it is; the message names the file, the rows and what to do."""


# ---- files


def find_file(root: Path, pattern: str, required: bool = True) -> Path | None:
    # Names are compared without case: a box list named BBox_list_2017.csv must not count as a release without boxes.
    found = sorted(path for path in root.iterdir() if fnmatch.fnmatchcase(path.name.lower(), pattern.lower()))
    if len(found) > 1:
        raise ReleaseError(f"{root} holds {len(found)} files named {pattern}: {some([p.name for p in found])}; keep exactly one")
    if not found and required:
        raise ReleaseError(f"{root} holds no {pattern}; copy it there from the release, or point the data root at the folder that has it")
    return found[0] if found else None


def read_lines(path: Path) -> list[tuple[int, list[str]]]:
    """(line number, stripped cells) of every line of a csv that is not blank; utf-8 with or without BOM, any line ends."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except FileNotFoundError:
        raise ReleaseError(f"{path} is missing; copy it there from the release") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ReleaseError(f"{path} is not a readable csv in utf-8 ({error}); copy it again from the release") from error
    return [(number, cells) for number, cells in lines if any(cells)]


def some(items, limit: int = 5) -> str:
    items = [str(item) for item in items]
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def require(faults: list[str], path: Path, advice: str) -> None:
    if faults:
        raise ReleaseError(f"{path}: {'; '.join(faults[:5])}{f'; and {len(faults) - 5} more' if len(faults) > 5 else ''}. {advice}")


def problem_frame(problems: list[tuple[str, str, str]]) -> pd.DataFrame:
    return pd.DataFrame(problems, columns=["kind", "item", "detail"], dtype="str")


def box_frame(rows: list[tuple]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=list(BOX_COLUMNS))
    return frame.astype({"image": "str", "class": "str", "x1": float, "y1": float, "x2": float, "y2": float})


def box_fault(x: float, y: float, w: float, h: float, box: str) -> str | None:
    """What is wrong with a box that the message calls `box`, or None."""
    if not (all(map(math.isfinite, (x, y, w, h))) and w > 0 and h > 0):
        return f"{box} has no area"
    if x >= BOX_PIXELS or y >= BOX_PIXELS or x + w <= 0 or y + h <= 0:
        return f"{box} lies outside its film (boxes are in pixels of the 1024 x 1024 release)"
    return None


def clip_box(x: float, y: float, w: float, h: float) -> tuple[float, float, float, float]:
    """Corners x1, y1, x2, y2 of the part of a box that lies on its film."""
    return max(x, 0.0), max(y, 0.0), min(x + w, float(BOX_PIXELS)), min(y + h, float(BOX_PIXELS))


def _name_fault(name: str) -> str | None:
    """What is wrong with an Image Index, or None."""
    if "/" in name or "\\" in name:
        return f"Image Index {name!r} has a path in it; write the bare file name"
    if not name.lower().endswith(".png") or len(name) < 5:
        return f"Image Index {name!r} is not the name of a .png file"
    return None


# ---- Data_Entry


def read_entries(path: Path, problems: list) -> pd.DataFrame:
    lines = read_lines(path)
    if len(lines) < 2:
        raise ReleaseError(f"{path} has no rows; copy it again from the release")
    header = lines[0][1]
    # The released header names two columns in one, 'OriginalImage[Width,Height]'; split at its comma it still has one cell per value.
    place = {key: next((header.index(name) for name in names if name in header), None) for key, names in _ENTRY_COLUMNS.items()}
    absent = [_ENTRY_COLUMNS[key][0] for key, column in place.items() if column is None]
    if absent:
        raise ReleaseError(f"{path} lacks the columns {', '.join(absent)} in its first line; it has {', '.join(filter(None, header))}")

    rows, faults, seen = [], [], {}
    for number, cells in lines[1:]:
        if len(cells) <= max(place.values()):
            faults.append(f"row {number} has {len(cells)} cells, too few")
            continue
        row = {key: cells[column] for key, column in place.items()}
        image = row["image"]
        fault = _name_fault(image)
        if fault is None and image in seen:
            fault = f"{image} is there already, in row {seen[image]}"
        if fault is None and not row["patient"]:
            fault = f"{image} has no Patient ID"
        labels, label_fault = _parse_labels(row["labels"], image, problems)
        fault = fault or label_fault
        if fault is None and not row["follow_up"].removesuffix(".0").isdigit():
            fault = f"Follow-up # {row['follow_up']!r} of {image} is not a number"
        if fault:
            faults.append(f"row {number}: {fault}")
            continue
        seen[image] = number
        row["labels"] = labels
        row["follow_up"] = int(row["follow_up"].removesuffix(".0"))
        row["age"] = _parse_age(row["age"], image, problems)
        # '00000001' and '1' are one patient: a zero-padded id must not carry a patient across the split unseen.
        row["patient"] = row["patient"].lstrip("0") or "0" if row["patient"].isdigit() else row["patient"]
        rows.append(row)
    require(faults, path, "Correct or remove these rows.")
    return pd.DataFrame(rows).astype(
        {"image": "str", "patient": "str", "age": float, "sex": "str", "view": "str", "follow_up": int, "labels": "str"}
    )


def _parse_labels(text: str, image: str, problems: list) -> tuple[str, str | None]:
    if text in CLASSES:
        return text, None
    names = [name.strip() for name in text.split("|")]
    for name in names:
        if name in _ALIASES:
            problems.append(("label alias", image, f"{name} read as {_ALIASES[name]}"))
    names = [_ALIASES.get(name, name) for name in names]
    for name in names:
        if name not in CLASSES:
            return text, f"unknown label {name!r} of {image}; the labels are {', '.join(CLASSES)}"
    if len(set(names)) < len(names):
        problems.append(("label repeated", image, text))
        names = list(dict.fromkeys(names))
    if NO_FINDING in names and len(names) > 1:
        return text, f"{image} is labelled 'No Finding' and a finding at once ({text})"
    return "|".join(names), None


def _parse_age(text: str, image: str, problems: list) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([YMWD]?)", text.upper())
    age = float(match[1]) * _YEARS[match[2]] if match else math.nan
    if not age <= _OLDEST:
        problems.append(("age impossible", image, f"{text!r} read as unknown"))
        return math.nan
    return age


# ---- lists


def read_list(path: Path, problems: list) -> list[str]:
    lines = read_lines(path)
    names = [cells[0] for _, cells in lines]
    require([f"row {number}: {fault}" for number, cells in lines if (fault := _name_fault(cells[0]))], path, "One film name a line.")
    if not names:
        raise ReleaseError(f"{path} is empty; copy it again from the release")
    counts = Counter(names)
    problems += [
        ("line repeated", path.name, f"{name} stands there {count} times, used once") for name, count in counts.items() if count > 1
    ]
    return list(counts)


def read_names(path: str | Path, known: Collection[str]) -> set[str]:
    """The films of a list of another's making, one a line: folders before a name, and what follows it on its line (labels, say), are left out.

    ReleaseError where no name is among `known`: such a list would silently say nothing about any film.
    """
    path = Path(path)
    lines = read_lines(path)
    require([f"row {number} does not begin with a film name" for number, cells in lines if not cells[0]], path, "One film name a line.")
    if not lines:
        raise ReleaseError(f"{path} is empty; it must name one film a line")
    names = {cells[0].split()[0].rsplit("/", 1)[-1] for _, cells in lines}
    if names.isdisjoint(known):
        raise ReleaseError(f"{path} names no film of this release; it begins with {lines[0][1][0].split()[0]!r}, the release has {min(known)!r}")
    return names


# ---- BBox_List


def read_boxes(path: Path, films: pd.DataFrame, known: set[str], on_missing: str, problems: list) -> pd.DataFrame:
    lines = read_lines(path)
    if not lines:
        raise ReleaseError(f"{path} is empty; copy it again from the release, or remove it to work without boxes")
    header = lines[0][1]
    # Read by position: the header is 'Bbox [x,y,w,h],,,' and its empty tail has no values beneath it.
    if header[:2] != ["Image Index", "Finding Label"] or len(header) < 6 or not header[2].startswith("Bbox"):
        raise ReleaseError(f"{path} must begin with 'Image Index,Finding Label,Bbox [x,y,w,h]'; it begins with {','.join(header)!r}")
    labels = dict(zip(films["image"], films["labels"], strict=True))
    rows, faults, seen, aliases = [], [], set(), {}
    for number, cells in lines[1:]:
        try:
            image, name = cells[:2]
            x, y, w, h = (float(cell) for cell in cells[2:6])
        except ValueError:
            faults.append(f"row {number} is not a film, a label and four numbers")
            continue
        if name in _ALIASES:
            aliases[name] = aliases.get(name, 0) + 1
            name = _ALIASES[name]
        box = f"box {x:g}, {y:g}, {w:g}, {h:g} of {image}"
        fault = _name_fault(image)
        if fault is None and name not in FINDINGS:
            fault = f"unknown label {name!r}; the labels are {', '.join(FINDINGS)}"
        fault = fault or box_fault(x, y, w, h, box)
        if fault is None and image not in known and on_missing == "error":
            fault = f"{image} is not in Data_Entry (skip_bad_films: true, that is on_missing='skip', goes on without its boxes)"
        if fault:
            faults.append(f"row {number}: {fault}")
            continue
        if image not in labels:
            problems.append(("box left out", image, f"row {number}: {'its film is left out' if image in known else 'not in Data_Entry'}"))
            continue
        corners = clip_box(x, y, w, h)
        if corners != (x, y, x + w, y + h):
            problems.append(("box clipped", image, f"row {number}: the {box} reaches past its film"))
        if (image, name, *corners) in seen:
            problems.append(("box repeated", image, f"row {number}: {name}, used once"))
            continue
        seen.add((image, name, *corners))
        if name not in labels[image].split("|"):
            problems.append(("box without its label", image, f"row {number}: {name}, but the film is labelled {labels[image]}"))
        rows.append((image, name, *corners))
    require(faults, path, "Correct or remove these rows.")
    problems += [("label alias", path.name, f"{alias} read as {_ALIASES[alias]} in {count} rows") for alias, count in aliases.items()]
    return box_frame(rows)
