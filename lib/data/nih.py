"""The NIH ChestX-ray14 release (Wang et al., CVPR 2017) as it lies on disk: films, labels, splits and boxes, checked
before any work."""

import math
import os
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from lib.data.release import (
    CLASSES,
    FILM_COLUMNS,
    FINDINGS,
    NO_FINDING,
    Release,
    ReleaseError,
    box_fault,
    box_frame,
    clip_box,
    problem_frame,
)
from lib.data.rows import find_file, read_lines, require, some

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


def _name_fault(name: str) -> str | None:
    """What is wrong with an Image Index, or None."""
    if "/" in name or "\\" in name:
        return f"Image Index {name!r} has a path in it; write the bare file name"
    if not name.lower().endswith(".png") or len(name) < 5:
        return f"Image Index {name!r} is not the name of a .png file"
    return None


def read_entries(path: Path, problems: list) -> pd.DataFrame:
    lines = read_lines(path)
    if len(lines) < 2:
        raise ReleaseError(f"{path} has no rows; copy it again from the release")
    header = lines[0][1]
    # The released header names two columns in one, 'OriginalImage[Width,Height]'; split at its comma it still has one
    # cell per value.
    place = {
        key: next((header.index(name) for name in names if name in header), None)
        for key, names in _ENTRY_COLUMNS.items()
    }
    absent = [_ENTRY_COLUMNS[key][0] for key, column in place.items() if column is None]
    if absent:
        raise ReleaseError(
            f"{path} lacks the columns {', '.join(absent)} in its first line; it has {', '.join(filter(None, header))}"
        )

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


def read_list(path: Path, problems: list) -> list[str]:
    lines = read_lines(path)
    names = [cells[0] for _, cells in lines]
    require(
        [f"row {number}: {fault}" for number, cells in lines if (fault := _name_fault(cells[0]))],
        path,
        "One film name a line.",
    )
    if not names:
        raise ReleaseError(f"{path} is empty; copy it again from the release")
    counts = Counter(names)
    problems += [
        ("line repeated", path.name, f"{name} stands there {count} times, used once")
        for name, count in counts.items()
        if count > 1
    ]
    return list(counts)


def read_names(path: str | Path, known: Collection[str]) -> set[str]:
    """The films of a list of another's making, one a line: folders before a name, and what follows it on its line
    (labels, say), are left out.

    ReleaseError where no name is among `known`: such a list would silently say nothing about any film.
    """
    path = Path(path)
    lines = read_lines(path)
    require(
        [f"row {number} does not begin with a film name" for number, cells in lines if not cells[0]],
        path,
        "One film name a line.",
    )
    if not lines:
        raise ReleaseError(f"{path} is empty; it must name one film a line")
    names = {cells[0].split()[0].rsplit("/", 1)[-1] for _, cells in lines}
    if names.isdisjoint(known):
        raise ReleaseError(
            f"{path} names no film of this release; it begins with {lines[0][1][0].split()[0]!r}, the release has "
            f"{min(known)!r}"
        )
    return names


def read_boxes(path: Path, films: pd.DataFrame, known: set[str], on_missing: str, problems: list) -> pd.DataFrame:
    lines = read_lines(path)
    if not lines:
        raise ReleaseError(f"{path} is empty; copy it again from the release, or remove it to work without boxes")
    header = lines[0][1]
    # Read by position: the header is 'Bbox [x,y,w,h],,,' and its empty tail has no values beneath it.
    if header[:2] != ["Image Index", "Finding Label"] or len(header) < 6 or not header[2].startswith("Bbox"):
        raise ReleaseError(
            f"{path} must begin with 'Image Index,Finding Label,Bbox [x,y,w,h]'; it begins with {','.join(header)!r}"
        )
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
            fault = (
                f"{image} is not in Data_Entry (skip_bad_films: true, that is on_missing='skip', goes on without "
                "its boxes)"
            )
        if fault:
            faults.append(f"row {number}: {fault}")
            continue
        if image not in labels:
            problems.append(
                (
                    "box left out",
                    image,
                    f"row {number}: {'its film is left out' if image in known else 'not in Data_Entry'}",
                )
            )
            continue
        corners = clip_box(x, y, w, h)
        if corners != (x, y, x + w, y + h):
            problems.append(("box clipped", image, f"row {number}: the {box} reaches past its film"))
        if (image, name, *corners) in seen:
            problems.append(("box repeated", image, f"row {number}: {name}, used once"))
            continue
        seen.add((image, name, *corners))
        if name not in labels[image].split("|"):
            problems.append(
                ("box without its label", image, f"row {number}: {name}, but the film is labelled {labels[image]}")
            )
        rows.append((image, name, *corners))
    require(faults, path, "Correct or remove these rows.")
    problems += [
        ("label alias", path.name, f"{alias} read as {_ALIASES[alias]} in {count} rows")
        for alias, count in aliases.items()
    ]
    return box_frame(rows)


def read_release(
    root: str | Path, *, validation_fraction: float = 0.1, seed: int = 0, on_missing: Literal["error", "skip"] = "error"
) -> Release:
    """Read and check a release in NIH layout.

    Expects `Data_Entry_2017*.csv` (either header generation), `train_val_list.txt`, `test_list.txt`, the films in
    `images/`, `images_*/` or
    `images_*/images/`, and, if there is one, `BBox_List_2017*.csv`. No film is opened.

    Parameters
    ----------
    validation_fraction : float in (0, 1)
        Share of the films of train_val_list.txt, approximately, whose patients become the validation split.
    seed : int
        Of the draw of validation patients.
    on_missing : 'error' or 'skip'
        What to do where one part names a film that another part lacks: a film without its file, a listed film without a
        row in Data_Entry, a box for an unknown film. 'skip' goes on without them and notes each in `problems`. Films in
        neither list are always left out and noted.

    Returns
    -------
    Release
        Repaired and noted: label aliases, repeated labels, impossible ages, repeated lines and boxes; boxes that reach
        past their film are clipped.

    Raises
    ------
    ReleaseError
        Missing, empty or malformed files, unknown labels, 'No Finding' beside a finding, paths in Image Index, repeated
        films, films or patients on both sides of the split, empty splits, boxes without area or wholly outside their
        film.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}; it must lie between 0 and 1, both excluded")
    if on_missing not in ("error", "skip"):
        raise ValueError(f"on_missing is {on_missing!r}; it must be 'error' or 'skip'")
    root = Path(root).expanduser().resolve()
    if not root.is_dir():
        raise ReleaseError(
            f"{root} is not a folder; give the folder that holds Data_Entry_2017*.csv, the two lists and images/"
        )
    problems: list[tuple[str, str, str]] = []

    entry_file = find_file(root, "Data_Entry_2017*.csv")
    films = read_entries(entry_file, problems)
    known = set(films["image"])
    films["split"] = _assign_lists(root, films, entry_file, on_missing, problems)
    films = films[films["split"] != ""]
    films = _locate(root, films, on_missing, problems)
    _require_disjoint_patients(films, root)
    films["split"] = _draw_validation(films, validation_fraction, seed)
    films = films.reset_index(drop=True)[list(FILM_COLUMNS)]
    _require_splits(films, root)

    box_file = find_file(root, "BBox_List_2017*.csv", required=False)
    if box_file is None:
        problems.append(
            ("no boxes", "BBox_List_2017.csv", "not in the release: everything that needs boxes is unavailable")
        )
        boxes = box_frame([])
    else:
        boxes = read_boxes(box_file, films, known, on_missing, problems)

    release = Release(root, films, boxes, problem_frame(problems))
    counts = pd.DataFrame(release.targets, columns=list(CLASSES)).groupby(films["split"]).sum()
    absent = [
        ("class without positives", name, f"no {split} film has it")
        for split in counts.index
        for name in CLASSES
        if not counts.loc[split, name]
    ]
    return replace(release, problems=problem_frame(problems + absent))


def _assign_lists(root: Path, films: pd.DataFrame, entry_file: Path, on_missing: str, problems: list) -> pd.Series:
    """'train' (for train_val_list.txt), 'test', or '' for films in neither list."""
    train_val = read_list(root / "train_val_list.txt", problems)
    test = read_list(root / "test_list.txt", problems)
    both = sorted(set(train_val) & set(test))
    if both:
        raise ReleaseError(
            f"{root}: {len(both)} films are in train_val_list.txt and in test_list.txt: {some(both)}. Remove them "
            "from one of the two."
        )
    listed = dict.fromkeys(train_val, "train") | dict.fromkeys(test, "test")
    known = set(films["image"])
    unknown = [name for name in listed if name not in known]
    if unknown and on_missing == "error":
        raise ReleaseError(
            f"{len(unknown)} films of train_val_list.txt and test_list.txt have no row in {entry_file}: "
            f"{some(unknown)}. "
            "Take lists and csv from the same release, or set skip_bad_films: true (on_missing='skip') to go on "
            "without these films."
        )
    problems += [("listed film without a row", name, f"not in {entry_file.name}: left out") for name in unknown]
    split = films["image"].map(listed).fillna("").astype("str")
    problems += [
        ("film in no list", name, "in neither train_val_list.txt nor test_list.txt: left out")
        for name in films["image"][split == ""]
    ]
    return split


def _locate(root: Path, films: pd.DataFrame, on_missing: str, problems: list) -> pd.DataFrame:
    """Films with their paths. Each folder is listed once: 112,120 single look-ups would cost minutes on a network
    disk."""
    batches = sorted(path for path in root.glob("images_*") if path.is_dir())
    folders = [
        folder for parent in [root / "images", *batches] for folder in (parent, parent / "images") if folder.is_dir()
    ]
    if not folders:
        raise ReleaseError(
            f"{root} has no folder of films; put them in images/, or in images_001/images/ to images_012/images/ as "
            "released"
        )
    paths: dict[str, str] = {}
    for folder in folders:
        with os.scandir(folder) as entries:
            found = {entry.name: entry.path for entry in entries if entry.name.lower().endswith(".png")}
        again = len(found.keys() & paths.keys())
        if again:
            where = folder.relative_to(root).as_posix()
            problems.append(("film found twice", where, f"{again} films are in an earlier folder too, which is used"))
        paths.update(found | paths if again else found)
    located = films.assign(path=films["image"].map(paths))
    missing = list(located["image"][located["path"].isna()])
    if missing and on_missing == "error":
        raise ReleaseError(
            f"{len(missing)} of {len(films)} films are missing from "
            f"{some([f.relative_to(root).as_posix() for f in folders], 12)} "
            f"under {root}: {some(missing)}. "
            "Complete the download, or set skip_bad_films: true (on_missing='skip') to go on without these films."
        )
    problems += [("film missing", name, "no such file: left out") for name in missing]
    return located.dropna(subset="path").astype({"path": "str"})


def _require_disjoint_patients(films: pd.DataFrame, root: Path) -> None:
    sides = films.groupby("patient")["split"].nunique()
    both = list(sides.index[sides > 1])
    if both:
        names = films["image"][films["patient"].isin(both)]
        raise ReleaseError(
            f"{root}: {len(both)} patients are on both sides of the split (patient {some(both)}; films {some(names)}). "
            "Move all films of a patient to train_val_list.txt or all to test_list.txt."
        )


def _require_splits(films: pd.DataFrame, root: Path) -> None:
    sizes = films["split"].value_counts()
    for split, name in {"train": "train_val_list.txt", "val": "train_val_list.txt", "test": "test_list.txt"}.items():
        if split not in sizes:
            raise ReleaseError(
                f"{root}: the {split} split is empty; {name} must name films that are on disk, from more than one "
                "patient"
            )


def _draw_validation(films: pd.DataFrame, fraction: float, seed: int) -> pd.Series:
    """Splits with patients of 'train' moved to 'val' until about `fraction` of the films are there.

    Patients are drawn at random, but where two patients or more have a class, both sides keep a positive film of it if
    possible: first one patient for each class, rarest class first, then patients in random order for whom there is
    still room. Depends on seed and patients, not on the order of the rows.
    """
    pool = films[films["split"] == "train"]
    patients = np.sort(pool["patient"].unique())
    order = np.random.default_rng(seed).permutation(patients) if len(patients) else patients
    n_films = pool.groupby("patient").size()
    has = pool["labels"].str.get_dummies("|").groupby(pool["patient"]).max() if len(pool) else pd.DataFrame()
    positives = has.loc[order].to_numpy() if len(pool) else np.zeros((0, 0))
    sizes = n_films.loc[order].to_numpy() if len(pool) else np.zeros(0)
    room = max(1, round(fraction * len(pool)))
    left, chosen = positives.sum(axis=0), np.zeros(len(order), bool)

    def movable(i: int) -> bool:  # never the last patient, nor the last one of a class
        return not chosen[i] and chosen.sum() < len(order) - 1 and bool(np.all(left[positives[i] > 0] > 1))

    def move(i: int) -> None:
        nonlocal room, left
        chosen[i], room, left = True, room - sizes[i], left - positives[i]

    for column in np.argsort(left, kind="stable"):
        if positives[chosen, column].any():
            continue
        candidates = [i for i in np.flatnonzero(positives[:, column]) if movable(i)]
        if candidates:
            move(
                min(candidates, key=lambda i: sizes[i] > max(room, 1))
            )  # the first drawn for whom there is room, else the first drawn
    for i in range(len(order)):
        if sizes[i] <= room and movable(i):
            move(i)
    return films["split"].mask(films["patient"].isin(order[chosen]) & (films["split"] == "train"), "val")
