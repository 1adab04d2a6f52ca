"""The NIH ChestX-ray14 release (Wang et al., CVPR 2017) as it lies on disk: films, labels, splits and boxes, checked
before any work."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from lib.data import reading
from lib.data.release import CLASSES, FINDINGS, NO_FINDING, Release, ReleaseError, problem_frame

_ALIASES = {"Infiltrate": "Infiltration", "Pleural Thickening": "Pleural_Thickening"}
_HEADER = "Image Index|Finding Labels|Follow-up #|Patient ID|Patient Age|Patient Gender|View Position".split("|")
_COLUMNS = dict(zip("image labels follow_up patient age sex view".split(), _HEADER))
_YEARS = {"": 1.0, "Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
_OLDEST = 120
_NOBODY = ("nan", "none", "null", "na", "n/a", "<na>", "#n/a")
_NIH_NAME = re.compile(r"(000[0-9]{5})_[0-9]{3}\.png", re.I)  # of patient; a date, as of own films, begins otherwise


def read_release(
    root: str | Path, *, validation_fraction: float = 0.1, seed: int = 0, on_missing: Literal["error", "skip"] = "error"
) -> Release:
    """Read and check a release in NIH layout.

    Expects `Data_Entry_2017*.csv` (either header generation), `train_val_list.txt`, `test_list.txt`, the films in
    `images/`, `images_*/` or `images_*/images/`, and, if there is one, `BBox_List_2017*.csv`. No film is opened.

    A film lies under its Image Index, as .png, .jpg or .jpeg; where several files have that stem, the one in the
    earlier folder is used, of one folder .png before .jpg before .jpeg, and the others are noted.

    A patient is one person whatever the spelling of a number ('00000001', '1' and '1.0'), and must be the one that the
    name of a film says where it has the form of NIH's, 00000001_000.png; other names say nothing.

    Parameters
    ----------
    validation_fraction : float in (0, 1)
        Share of the films of train_val_list.txt, approximately, whose patients become the validation split.
    seed : int
        Of the draw of validation patients.
    on_missing : 'error' or 'skip'
        What to do where one part names a film that another part lacks: a film without its file (a link that leads to
        none counts as missing), a listed film without a row in Data_Entry, a box for an unknown film. 'skip' goes on
        without them and notes each in `problems`, unless all are missing. Films in neither list are always left out and
        noted.

    Returns
    -------
    Release
        Repaired and noted: label aliases, repeated labels, impossible ages, repeated lines and boxes; boxes that reach
        past their film are clipped.

    Raises
    ------
    ReleaseError
        Missing, empty or malformed files, unknown labels, 'No Finding' beside a finding, paths in Image Index, repeated
        films, Patient IDs that are no id, two spellings of one, or not the one of the film's name, films or patients on
        both sides of the split, empty splits, boxes without area, wholly outside their film or larger than two.
    """
    advice = "give the folder that holds Data_Entry_2017*.csv, the two lists and images/"
    root = reading.open_root(root, advice, on_missing, validation_fraction=validation_fraction)
    problems: list[tuple[str, str, str]] = []

    entry_file = reading.find_file(root, "Data_Entry_2017*.csv")
    films = read_entries(entry_file, problems)
    known = set(films["image"])
    films["split"] = _assign_lists(root, films["image"], entry_file, on_missing, problems)
    films = _locate(root, films[films["split"] != ""], on_missing, problems)
    _require_disjoint_patients(films, root)
    films["split"] = _draw_validation(films, validation_fraction, seed)
    films = reading.film_frame(films.reset_index(drop=True))
    _require_splits(films, root)

    box_file = reading.find_file(root, "BBox_List_2017*.csv", required=False)
    boxes = read_boxes(box_file, films, known, on_missing, problems) if box_file else reading.box_frame([])
    if boxes.empty:
        fault = "has no box of a film that is used" if box_file else "not in the release"
        detail = f"{fault}: everything that needs boxes is unavailable"
        problems.append(("no boxes", box_file.name if box_file else "BBox_List_2017.csv", detail))

    release = Release(root, films, boxes, problem_frame(problems))
    positives = pd.DataFrame(release.targets, columns=CLASSES).groupby(films["split"]).sum().T.unstack()
    absent = [
        ("class without positives", name, f"no {split} film has it") for split, name in positives.index[positives == 0]
    ]
    return replace(release, problems=problem_frame(problems + absent))


def read_entries(path: Path, problems: list) -> pd.DataFrame:
    """The rows of Data_Entry: image, labels, follow_up, patient, age, sex, view; what is repaired is added to
    `problems`. Raises ReleaseError for the rows that cannot be used."""
    header, lines = reading.read_table(path)
    # The released header names two columns in one, 'OriginalImage[Width,Height]'; split at its comma it still has one
    # cell per value.
    names = ["Patient Gender" if name == "Patient Sex" else name for name in header]
    absent = [name for name in _HEADER if name not in names]
    if absent:
        has = reading.some(filter(None, header), 12)
        raise ReleaseError(
            f"{path} lacks the columns {', '.join(absent)} in its first line; it has {has}; copy it again from the "
            "release, with commas between its cells"
        )
    twice = [name for name in _HEADER if names.count(name) > 1]
    if twice:
        raise ReleaseError(
            f"{path} has the columns {', '.join(twice)} twice in its first line (Patient Sex is Patient Gender); keep "
            "one of each"
        )
    place = {key: names.index(name) for key, name in _COLUMNS.items()}

    rows, faults, seen = [], [], {}
    spellings: dict[str, tuple[str, int]] = {}
    for number, cells in lines:
        if len(cells) <= max(place.values()) or any(cells[len(header) :]):
            faults.append(f"row {number} has {len(cells)} cells, but the first line {len(header)}")
            continue
        row = {key: cells[column] for key, column in place.items()}
        image, follow_up = row["image"], re.fullmatch(r"([0-9]{1,9})(\.0)?", row["follow_up"])
        labels, label_fault = _parse_labels(row["labels"], image, problems)
        fault = _name_fault(image)
        first = seen.setdefault(reading.spelling(image), number)
        if not fault and first != number:
            fault = f"{image} is there already, in row {first} (in capitals or small letters)"
        patient, patient_fault = _parse_patient(row["patient"], image)
        fault = fault or patient_fault or label_fault
        if not fault and not follow_up:
            fault = f"Follow-up # {row['follow_up']!r} of {image} is not a number (0, 1, 2, ...)"
        other, first = spellings.setdefault(reading.spelling(patient), (patient, number))
        if not fault and other != patient:
            fault = f"Patient ID {patient!a} of {image} and {other!a} in row {first} are one in two spellings"
        if fault:
            faults.append(f"row {number}: {fault}")
            continue
        age = _parse_age(row["age"], image, problems)
        rows.append((image, labels, int(follow_up[1]), patient, age, row["sex"], row["view"]))
    reading.require(faults, path, "Correct or remove these rows.")
    films = pd.DataFrame(rows, columns=list(_COLUMNS))
    _note_patients(films, problems)
    return films


def _note_patients(films: pd.DataFrame, problems: list) -> None:
    """Add what hints at two persons under one Patient ID to `problems`: two sexes, or an age that falls."""
    named = films[films["sex"] != ""].groupby("patient")["sex"]
    sexes = named.nunique()
    problems += reading.notes("patient of two sexes", sexes.index[sexes > 1], "one Patient ID, two in Patient Gender")
    aged = films[["patient", "follow_up", "age"]].dropna().sort_values(["patient", "follow_up"], kind="stable")
    fall = aged.groupby("patient")["age"].diff() < -1
    detail = "younger by more than a year at a later Follow-up #"
    problems += reading.notes("age falls", aged["patient"][fall].unique(), detail)


def _parse_patient(text: str, image: str) -> tuple[str, str | None]:
    """(Patient ID, what is wrong with it or None).

    '1', '00000001' and pandas' '1.0' are one patient, '1': another spelling must not carry a patient across the split
    unseen. For the same reason other spellings of numbers are refused, and a number that is not the one of a film named
    as NIH names them.
    """
    if not text or text.lower() in _NOBODY:
        return text, f"{image} has no Patient ID" + (f" ({text!r})" if text else "")
    if match := re.fullmatch(r"0*([0-9]+)(\.0)?", text):
        text = match[1]
    # What programs make of a whole number; 1.10 or -10 may be a name.
    elif re.fullmatch(
        r"[-+]?inf(inity)?|\+?\d+([.,]0*)?|\d*[.,]?\d*e[-+]\d+", unicodedata.normalize("NFKC", text), re.I
    ):
        return text, f"Patient ID {text!r} of {image} is a number, but not written with the digits 0 to 9 alone"
    elif not text.isprintable():
        return text, f"Patient ID {text!r} of {image} has a character that cannot be seen"
    if (named := _NIH_NAME.fullmatch(image)) and text != str(int(named[1])):
        return text, f"Patient ID {text!r} of {image} is not the {int(named[1])} that its name says"
    return text, None


def _name_fault(name: str) -> str | None:
    """What is wrong with an Image Index, or None."""
    if "/" in name or "\\" in name:
        return f"Image Index {reading.cut(repr(name))} has a path in it; write the bare file name"
    if not name.lower().endswith(".png") or len(name) < 5 or not name.isprintable():
        shown = reading.cut(repr(name))
        return f"Image Index {shown} is not the name of a .png file (which the film itself may lack: .jpg will do)"
    return None


def _parse_labels(text: str, image: str, problems: list) -> tuple[str, str | None]:
    """(labels as the release has them, what is wrong with them or None)."""
    if text in CLASSES:
        return text, None
    said = [name.strip() for name in text.split("|")]
    problems += [("label alias", image, f"{name} read as {_ALIASES[name]}") for name in said if name in _ALIASES]
    names = [_ALIASES.get(name, name) for name in said]
    for name in names:
        if name not in CLASSES:
            return text, f"unknown label {reading.cut(repr(name))} of {image}; the labels are {', '.join(CLASSES)}"
    if len(set(names)) < len(names):
        problems.append(("label repeated", image, text))
        names = list(dict.fromkeys(names))
    if NO_FINDING in names and len(names) > 1:
        return text, f"{image} is labelled 'No Finding' and a finding at once ({text})"
    return "|".join(names), None


def _parse_age(text: str, image: str, problems: list) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([YMWD]?)", text.upper())
    age = float(match[1]) * _YEARS[match[2]] if match else math.nan
    if not age <= _OLDEST:
        problems.append(("age impossible", image, f"{text!r} read as unknown"))
        return math.nan
    return age


def read_list(path: Path, problems: list) -> list[str]:
    """The film names of a list, one a line, each once; repeated lines are added to `problems`."""
    lines = reading.read_lines(path)
    faults = [f"row {number}: {fault}" for number, cells in lines if (fault := _name_fault(cells[0]))]
    faults += [f"row {number} has more than a film name: {cells[1]!r}" for number, cells in lines if any(cells[1:])]
    reading.require(faults, path, "One film name a line.")
    if not lines:
        raise ReleaseError(f"{path} is empty; copy it again from the release")
    counts = Counter(cells[0] for _, cells in lines)
    again = [f"{name} stands there {count} times, used once" for name, count in counts.items() if count > 1]
    problems += [("line repeated", path.name, detail) for detail in again]
    return list(counts)


def read_names(path: str | Path, known: Collection[str]) -> set[str]:
    """The films of a list of another's making, one a line: folders before a name, and what follows it on its line
    (labels, say), are left out.

    ReleaseError where no name is among `known`: such a list would silently say nothing about any film.
    """
    path = Path(path)
    lines = reading.read_lines(path)
    faults = [f"row {number} does not begin with a film name" for number, cells in lines if not cells[0]]
    reading.require(faults, path, "One film name a line.")
    if not lines:
        raise ReleaseError(f"{path} is empty; it must name one film a line")
    known = set(known)
    names = [cells[0].split()[0] for _, cells in lines]
    bare = {re.split(r"[/\\]", name)[-1] for name in names}
    bare |= {whole for _, cells in lines if (whole := re.split(r"[/\\]", cells[0])[-1]) in known}  # names with blanks
    if bare.isdisjoint(known):
        raise ReleaseError(
            f"{path} names no film of this release; it begins with {reading.cut(repr(names[0]))}, the release has "
            f"{min(known)!r}"
        )
    return bare


def read_boxes(path: Path, films: pd.DataFrame, known: set[str], on_missing: str, problems: list) -> pd.DataFrame:
    """The table `Release.boxes` of a box list.

    Parameters
    ----------
    films : image and labels of the films that are kept
    known : names of the films that Data_Entry has
    on_missing : see `read_release`
    problems : list of (kind, item, detail), added to
    """
    lines = reading.read_lines(path)
    if not lines:
        raise ReleaseError(f"{path} is empty; copy it again from the release, or remove it to work without boxes")
    header = lines[0][1]
    # Read by position: the header is 'Bbox [x,y,w,h],,,' and its empty tail has no values beneath it.
    if header[:2] != ["Image Index", "Finding Label"] or len(header) < 6 or not header[2].startswith("Bbox"):
        raise ReleaseError(
            f"{path} must begin with 'Image Index,Finding Label,Bbox [x,y,w,h]'; it begins with "
            f"{reading.cut(repr(','.join(header)))}; copy it again from the release"
        )
    labels = dict(zip(films["image"], films["labels"]))
    boxes, faults, aliases = {}, [], Counter()
    for number, cells in lines[1:]:
        try:
            image, said = cells[:2]
            if any(cells[6:]):
                raise ValueError
            x, y, w, h = sides = reading.numbers(cells[2:6])
        except ValueError:
            faults.append(f"row {number} is not a film, a label and four numbers")
            continue
        name = _ALIASES.get(said, said)
        if said in _ALIASES:
            aliases[said] += 1
        box = f"box {x:g}, {y:g}, {w:g}, {h:g} of {image}"
        fault = _name_fault(image)
        if fault is None and name not in FINDINGS:
            fault = f"unknown label {name!r}; the labels are {', '.join(FINDINGS)}"
        fault = fault or reading.box_fault(x, y, w, h, box)
        if fault is None and image not in known and on_missing == "error":
            fault = (
                f"{image} is not in Data_Entry (skip_bad_films: true, that is on_missing='skip', goes on without "
                "its boxes)"
            )
        if fault:
            faults.append(f"row {number}: {fault}")
        elif image not in labels:
            where = "its film is left out" if image in known else "not in Data_Entry"
            problems.append(("box left out", image, f"row {number}: {where}"))
        elif (key := (image, name, *reading.clip_box(sides, box, image, number, problems))) in boxes:
            problems.append(("box repeated", image, f"row {number}: {name}, used once"))
        else:
            boxes[key] = None
            if name not in labels[image].split("|"):
                detail = f"row {number}: {name}, but the film is labelled {labels[image]}"
                problems.append(("box without its label", image, detail))
    reading.require(faults, path, "Correct or remove these rows.")
    counts = [f"{alias} read as {_ALIASES[alias]} in {count} rows" for alias, count in aliases.items()]
    problems += [("label alias", path.name, detail) for detail in counts]
    return reading.box_frame(list(boxes))


def _assign_lists(root: Path, images: pd.Series, entry_file: Path, on_missing: str, problems: list) -> pd.Series:
    """'train' (for train_val_list.txt), 'test', or '' for films in neither list."""
    lists = {"train": "train_val_list.txt", "test": "test_list.txt"}
    train_val, test = (read_list(root / name, problems) for name in lists.values())
    both = sorted(set(train_val) & set(test))
    if both:
        raise ReleaseError(
            f"{root}: {len(both)} films are in train_val_list.txt and in test_list.txt: {reading.some(both)}. "
            "Remove them from one of the two."
        )
    if len(test) > len(train_val):
        detail = f"names {len(test)} films, train_val_list.txt {len(train_val)}: are the two swapped?"
        problems.append(("test larger than train", "test_list.txt", detail))
    listed = dict.fromkeys(train_val, "train") | dict.fromkeys(test, "test")
    known = set(images)
    unknown = [name for name in listed if name not in known]
    fault = f"films of train_val_list.txt and test_list.txt have no row in {entry_file}"
    cure = "Take lists and csv from the same release"
    reading.require_all(unknown, len(listed), on_missing, fault, cure, "these films")
    problems += reading.notes("listed film without a row", unknown, f"not in {entry_file.name}: left out")
    split = images.map(listed).fillna("")
    unlisted = "in neither train_val_list.txt nor test_list.txt: left out"
    problems += reading.notes("film in no list", images[split == ""], unlisted)
    return split


def _locate(root: Path, films: pd.DataFrame, on_missing: str, problems: list) -> pd.DataFrame:
    """Films with their paths."""
    parents = [root / "images", *sorted(root.glob("images_*"))]
    folders = [folder for parent in parents for folder in (parent, parent / "images") if folder.is_dir()]
    if not folders:
        raise ReleaseError(
            f"{root} has no folder of films; put them in images/, or in images_001/images/ to images_012/images/ as "
            "released"
        )
    paths = reading.find_films(root, folders, [".png", ".jpg", ".jpeg"], problems)
    films = films.assign(path=[paths.get(name[: -len(".png")]) for name in films["image"]])
    missing = list(films["image"][films["path"].isna()])
    where = reading.some((folder.relative_to(root).as_posix() for folder in folders), 12)
    fault = f"of {len(films)} films are missing from {where} under {root}"
    reading.require_all(
        missing, len(films), on_missing, fault, "Complete the download (a link must lead to its film)", "these films"
    )
    problems += reading.notes("film missing", missing, "no such file: left out")
    return films.dropna(subset="path")


def _require_disjoint_patients(films: pd.DataFrame, root: Path) -> None:
    sides = films.groupby("patient")["split"].nunique()
    both = list(sides.index[sides > 1])
    if both:
        patients, names = reading.some(both), reading.some(films["image"][films["patient"].isin(both)])
        raise ReleaseError(
            f"{root}: {len(both)} patients are on both sides of the split (patient {patients}; films {names}). "
            "Move all films of a patient to train_val_list.txt or all to test_list.txt."
        )


def _require_splits(films: pd.DataFrame, root: Path) -> None:
    for split, name in (("train", "train_val_list.txt"), ("val", "train_val_list.txt"), ("test", "test_list.txt")):
        if split not in set(films["split"]):
            raise ReleaseError(
                f"{root}: the {split} split is empty; {name} must name films that are on disk, from more than one "
                "patient (the only one of a class is never drawn for val)"
            )


def _draw_validation(films: pd.DataFrame, fraction: float, seed: int) -> pd.Series:
    """Splits with patients of 'train' moved to 'val' until about `fraction` of the films are there.

    Patients are drawn at random, but where two patients or more have a class, both sides keep a positive film of it if
    possible: first one patient for each class, rarest class first, then patients in random order for whom there is
    still room. Depends on seed and patients, not on the order of the rows.
    """
    pool = films[films["split"] == "train"]
    if pool.empty:
        return films["split"]
    order = np.random.default_rng(seed).permutation(np.sort(pool["patient"].unique()))
    sizes = pool.groupby("patient").size().loc[order].to_numpy()
    positives = pool["labels"].str.get_dummies("|").groupby(pool["patient"]).max().loc[order].to_numpy()
    room = max(1, round(fraction * len(pool)))
    left, chosen, n_chosen = positives.sum(axis=0), np.zeros(len(order), bool), 0

    def movable(i: int) -> bool:  # never the last patient, nor the last one of a class
        return not chosen[i] and n_chosen < len(order) - 1 and bool(np.all(left[positives[i] > 0] > 1))

    def move(i: int) -> None:
        nonlocal n_chosen, room, left
        chosen[i], n_chosen, room, left = True, n_chosen + 1, room - sizes[i], left - positives[i]

    for column in np.argsort(left, kind="stable"):
        candidates = [i for i in np.flatnonzero(positives[:, column]) if movable(i)]
        if candidates and not positives[chosen, column].any():
            # The first drawn for whom there is room, else the first drawn.
            move(min(candidates, key=lambda i: sizes[i] > max(room, 1)))
    for i in range(len(order)):
        if sizes[i] <= room and movable(i):
            move(i)
    return films["split"].mask(films["patient"].isin(order[chosen]) & (films["split"] == "train"), "val")
