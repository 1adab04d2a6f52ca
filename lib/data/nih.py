"""The NIH ChestX-ray14 release (Wang et al., CVPR 2017) as it lies on disk: films, labels, splits and boxes, checked before any work."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from lib.data.nih_files import (
    BOX_PIXELS,
    CLASSES,
    FINDINGS,
    NO_FINDING,
    ReleaseError,
    box_frame,
    find_file,
    problem_frame,
    read_boxes,
    read_entries,
    read_list,
    some,
)

UNHEALTHY = "Unhealthy"
PNEUMONIA = "Pneumonia"
DIGITS: tuple[str, ...] = tuple("0123456789")
TASKS = ("multilabel", "binary", "pneumonia", "digits")
FILM_COLUMNS = ("image", "patient", "age", "sex", "view", "follow_up", "labels", "split", "path")


@dataclass(frozen=True)
class Release:
    """A checked release, of NIH ChestX-ray14 or in the same shape.

    Attributes
    ----------
    root : Path
        The folder it was read from.
    films : DataFrame
        One row a film, RangeIndex: image (str, bare file name), patient (str), age (float, years, NaN when impossible), sex, view (str),
        follow_up (int), labels ('A|B', or '' where no class holds), split ('train', 'val' or 'test'), path (str, absolute).
    boxes : DataFrame
        image, class (str), x1, y1, x2, y2 (float, pixels of the 1024 x 1024 release, x2 and y2 exclusive, 0 <= x1 < x2 <= 1024).
    problems : DataFrame
        kind, item, detail (str): everything that was found broken, left out or repaired.
    classes : tuple of str
        The vocabulary of `films['labels']`, in the order of `targets`.
    """

    root: Path
    films: pd.DataFrame
    boxes: pd.DataFrame
    problems: pd.DataFrame
    classes: tuple[str, ...] = CLASSES

    @property
    def targets(self) -> np.ndarray:
        """Multi-hot labels in the order of `classes`, uint8 (N, len(classes))."""
        codes, combinations = pd.factorize(self.films["labels"])
        table = np.zeros((len(combinations), len(self.classes)), np.uint8)
        for row, combination in enumerate(combinations):
            for name in filter(None, combination.split("|")):
                table[row, self.classes.index(name)] = 1
        return table[codes]

    def without(self, images, reason: str = "left out by the caller") -> "Release":
        """The release without the named films and their boxes, each of them noted in `problems`.

        Rows are renumbered. Raises ReleaseError when a split would be left empty.
        """
        names = set(images)
        films = self.films[~self.films["image"].isin(names)].reset_index(drop=True)
        boxes = self.boxes[~self.boxes["image"].isin(names)].reset_index(drop=True)
        notes = [("film left out", name, reason) for name in self.films["image"] if name in names]
        empty = [split for split in ("train", "val", "test") if split not in set(films["split"])]
        if empty:
            raise ReleaseError(f"{self.root}: without the {len(notes)} films left out ({reason}) the {empty[0]} split is empty; repair those films")
        return replace(self, films=films, boxes=boxes, problems=pd.concat([self.problems, problem_frame(notes)], ignore_index=True))


def read_release(
    root: str | Path, *, validation_fraction: float = 0.1, seed: int = 0, on_missing: Literal["error", "skip"] = "error"
) -> Release:
    """Read and check a release in NIH layout.

    Expects `Data_Entry_2017*.csv` (either header generation), `train_val_list.txt`, `test_list.txt`, the films in `images/`, `images_*/` or
    `images_*/images/`, and, if there is one, `BBox_List_2017*.csv`. No film is opened.

    Parameters
    ----------
    validation_fraction : float in (0, 1)
        Share of the films of train_val_list.txt, approximately, whose patients become the validation split.
    seed : int
        Of the draw of validation patients.
    on_missing : 'error' or 'skip'
        What to do where one part names a film that another part lacks: a film without its file, a listed film without a row in
        Data_Entry, a box for an unknown film. 'skip' goes on without them and notes each in `problems`. Films in neither list are always
        left out and noted.

    Returns
    -------
    Release
        Repaired and noted: label aliases, repeated labels, impossible ages, repeated lines and boxes; boxes that reach past their film
        are clipped.

    Raises
    ------
    ReleaseError
        Missing, empty or malformed files, unknown labels, 'No Finding' beside a finding, paths in Image Index, repeated films, films or
        patients on both sides of the split, empty splits, boxes without area or wholly outside their film.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}; it must lie between 0 and 1, both excluded")
    if on_missing not in ("error", "skip"):
        raise ValueError(f"on_missing is {on_missing!r}; it must be 'error' or 'skip'")
    root = Path(root).expanduser().resolve()
    if not root.is_dir():
        raise ReleaseError(f"{root} is not a folder; give the folder that holds Data_Entry_2017*.csv, the two lists and images/")
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
        problems.append(("no boxes", "BBox_List_2017.csv", "not in the release: everything that needs boxes is unavailable"))
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


def task_targets(targets: np.ndarray, task: str, no_finding: bool = True) -> tuple[np.ndarray, list[str]]:
    """Targets and class names of a task.

    Parameters
    ----------
    targets : uint8 (N, 15), or (N, 10) for 'digits'
        `Release.targets`.
    task : 'multilabel', 'binary', 'pneumonia' or 'digits'
        'multilabel': all 15 outputs, or the 14 findings where `no_finding` is False. 'binary': one output, Unhealthy = 1 iff the film is
        not labelled 'No Finding' (Khakzar et al., section 4). 'pneumonia': one output, against all other films, healthy or not (Nam & Lee,
        section 3). 'digits': the ten digits.

    Returns
    -------
    (uint8 (N, M), list of M class names)

    Raises
    ------
    ValueError
        Unknown task, or targets of a release that does not have its classes.
    """
    _require_task(task)
    classes = DIGITS if task == "digits" else CLASSES
    if targets.shape[1:] != (len(classes),):
        raise ValueError(f"targets are {targets.shape}, but task {task!r} needs a release of {len(classes)} classes: choose the task of this release")
    if task == "digits":
        return targets.copy(), list(DIGITS)
    column = CLASSES.index(NO_FINDING)
    if task == "binary":
        return 1 - targets[:, column : column + 1], [UNHEALTHY]
    if task == "pneumonia":
        return targets[:, [CLASSES.index(PNEUMONIA)]], [PNEUMONIA]
    if no_finding:
        return targets.copy(), list(CLASSES)
    return np.delete(targets, column, axis=1), list(FINDINGS)


def task_boxes(boxes: pd.DataFrame, task: str) -> pd.DataFrame:
    """Boxes with the classes of the task, rows kept and not merged.

    'multilabel' and 'digits': unchanged; 'binary': every class is 'Unhealthy'; 'pneumonia': those of Pneumonia only, renumbered.
    """
    _require_task(task)
    if task == "pneumonia":
        return boxes[boxes["class"] == PNEUMONIA].reset_index(drop=True)
    return boxes.assign(**{"class": UNHEALTHY}) if task == "binary" else boxes.copy()


def film_boxes(boxes: pd.DataFrame, image_size: int) -> pd.DataFrame:
    """Boxes scaled from the 1024 x 1024 release to films of image_size x image_size pixels, unrounded."""
    corners = ["x1", "y1", "x2", "y2"]
    scaled = boxes.copy()
    scaled[corners] = boxes[corners] * (image_size / BOX_PIXELS)
    return scaled


def _require_task(task: str) -> None:
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; it must be {', '.join(map(repr, TASKS[:-1]))} or {TASKS[-1]!r}")


# ---- lists, files, splits


def _assign_lists(root: Path, films: pd.DataFrame, entry_file: Path, on_missing: str, problems: list) -> pd.Series:
    """'train' (for train_val_list.txt), 'test', or '' for films in neither list."""
    train_val = read_list(root / "train_val_list.txt", problems)
    test = read_list(root / "test_list.txt", problems)
    both = sorted(set(train_val) & set(test))
    if both:
        raise ReleaseError(
            f"{root}: {len(both)} films are in train_val_list.txt and in test_list.txt: {some(both)}. Remove them from one of the two."
        )
    listed = dict.fromkeys(train_val, "train") | dict.fromkeys(test, "test")
    known = set(films["image"])
    unknown = [name for name in listed if name not in known]
    if unknown and on_missing == "error":
        raise ReleaseError(
            f"{len(unknown)} films of train_val_list.txt and test_list.txt have no row in {entry_file}: {some(unknown)}. "
            "Take lists and csv from the same release, or set skip_bad_films: true (on_missing='skip') to go on without these films."
        )
    problems += [("listed film without a row", name, f"not in {entry_file.name}: left out") for name in unknown]
    split = films["image"].map(listed).fillna("").astype("str")
    problems += [
        ("film in no list", name, "in neither train_val_list.txt nor test_list.txt: left out") for name in films["image"][split == ""]
    ]
    return split


def _locate(root: Path, films: pd.DataFrame, on_missing: str, problems: list) -> pd.DataFrame:
    """Films with their paths. Each folder is listed once: 112,120 single look-ups would cost minutes on a network disk."""
    batches = sorted(path for path in root.glob("images_*") if path.is_dir())
    folders = [folder for parent in [root / "images", *batches] for folder in (parent, parent / "images") if folder.is_dir()]
    if not folders:
        raise ReleaseError(
            f"{root} has no folder of films; put them in images/, or in images_001/images/ to images_012/images/ as released"
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
            f"{len(missing)} of {len(films)} films are missing from {some([f.relative_to(root).as_posix() for f in folders], 12)} "
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
            raise ReleaseError(f"{root}: the {split} split is empty; {name} must name films that are on disk, from more than one patient")


def _draw_validation(films: pd.DataFrame, fraction: float, seed: int) -> pd.Series:
    """Splits with patients of 'train' moved to 'val' until about `fraction` of the films are there.

    Patients are drawn at random, but where two patients or more have a class, both sides keep a positive film of it if possible: first
    one patient for each class, rarest class first, then patients in random order for whom there is still room.
    Depends on seed and patients, not on the order of the rows.
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
            move(min(candidates, key=lambda i: sizes[i] > max(room, 1)))  # the first drawn for whom there is room, else the first drawn
    for i in range(len(order)):
        if sizes[i] <= room and movable(i):
            move(i)
    return films["split"].mask(films["patient"].isin(order[chosen]) & (films["split"] == "train"), "val")
