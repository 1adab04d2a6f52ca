"""What a release of films is: its films, labels, boxes and splits, and what a task makes of them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

CLASSES: tuple[str, ...] = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis", "Hernia",
    "Infiltration", "Mass", "No Finding", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax",
)  # fmt: skip
NO_FINDING = "No Finding"
FINDINGS: tuple[str, ...] = tuple(name for name in CLASSES if name != NO_FINDING)
BOX_PIXELS = 1024
BOX_COLUMNS = ("image", "class", "x1", "y1", "x2", "y2")
UNHEALTHY = "Unhealthy"
PNEUMONIA = "Pneumonia"
DIGITS: tuple[str, ...] = tuple("0123456789")
TASKS = ("multilabel", "binary", "pneumonia", "digits")
FILM_COLUMNS = ("image", "patient", "age", "sex", "view", "follow_up", "labels", "split", "path")


class ReleaseError(ValueError):
    """A release that cannot be used as it is; the message names the file, the rows and what to do, on one line: see
    `printable`."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Text with every character that cannot be shown as an escape: names and cells of a release may hold line ends,
    terminal sequences or bytes that are no text."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def problem_frame(problems: list[tuple[str, str, str]]) -> pd.DataFrame:
    """The table `Release.problems` of (kind, item, detail), each `printable`."""
    rows = [tuple(map(printable, problem)) for problem in problems]
    return pd.DataFrame(rows, columns=["kind", "item", "detail"], dtype="str")


@dataclass(frozen=True)
class Release:
    """A checked release, of NIH ChestX-ray14 or in the same shape.

    Attributes
    ----------
    root : Path
        The folder it was read from.
    films : DataFrame
        One row a film, RangeIndex: image (str, bare file name), patient (str), age (float, years, NaN when impossible),
        sex, view (str), follow_up (int), labels ('A|B', or '' where no class holds), split ('train', 'val' or 'test'),
        path (str, absolute).
    boxes : DataFrame
        image, class (str), x1, y1, x2, y2 (float, pixels of the 1024 x 1024 release, x2 and y2 exclusive, 0 <= x1 < x2
        <= 1024).
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

    def without(self, images: Iterable[str], reason: str = "left out by the caller") -> "Release":
        """The release without the named films and their boxes, each of them noted in `problems`.

        Rows are renumbered. Raises ReleaseError when a split would be left empty.
        """
        names = set(images)
        films, boxes = (frame[~frame["image"].isin(names)].reset_index(drop=True) for frame in (self.films, self.boxes))
        notes = [("film left out", name, reason) for name in self.films["image"] if name in names]
        empty = [split for split in ("train", "val", "test") if split not in set(films["split"])]
        if empty:
            raise ReleaseError(
                f"{self.root}: without the {len(notes)} films left out ({reason}) the {empty[0]} split is empty; "
                "repair those films"
            )
        problems = pd.concat([self.problems, problem_frame(notes)], ignore_index=True)
        return replace(self, films=films, boxes=boxes, problems=problems)


def task_targets(targets: np.ndarray, task: str, no_finding: bool = True) -> tuple[np.ndarray, list[str]]:
    """Targets and class names of a task.

    Parameters
    ----------
    targets : uint8 (N, 15), or (N, 10) for 'digits'
        `Release.targets`.
    task : 'multilabel', 'binary', 'pneumonia' or 'digits'
        'multilabel': all 15 outputs, or the 14 findings where `no_finding` is False. 'binary': one output, Unhealthy =
        1 iff the film is not labelled 'No Finding' (Khakzar et al., section 4). 'pneumonia': one output, against all
        other films, healthy or not (Nam & Lee, section 3). 'digits': the ten digits.

    Returns
    -------
    targets : uint8 (N, M)
    classes : list of M str

    Raises
    ------
    ValueError
        Unknown task, or targets of a release that does not have its classes.
    """
    _require_task(task)
    classes = DIGITS if task == "digits" else CLASSES
    if targets.shape[1:] != (len(classes),):
        raise ValueError(
            f"targets are {targets.shape}, but task {task!r} needs a release of {len(classes)} classes: "
            "choose the task of this release"
        )
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


def shuffled_targets(targets: np.ndarray, rows: np.ndarray, seed: int) -> np.ndarray:
    """Targets in which the label sets of the films in `rows` are dealt out anew among them.

    Every set stays as often as it was, so class counts and labels that occur together are kept, and whatever a network
    learns from these films says nothing about others. Other rows are as they were.

    Parameters
    ----------
    targets : uint8 (N, M)
    rows : int (n,)
        Such as those of the training films.
    seed : int
    """
    dealt = targets.copy()
    dealt[rows] = targets[np.random.default_rng((seed, 0)).permutation(rows)]
    return dealt


def task_boxes(boxes: pd.DataFrame, task: str) -> pd.DataFrame:
    """Boxes with the classes of the task, rows kept and not merged.

    'multilabel' and 'digits': unchanged; 'binary': every class is 'Unhealthy'; 'pneumonia': those of Pneumonia only,
    renumbered. Raises ValueError where there is no such task.
    """
    _require_task(task)
    if task == "pneumonia":
        return boxes[boxes["class"] == PNEUMONIA].reset_index(drop=True)
    return boxes.assign(**{"class": UNHEALTHY}) if task == "binary" else boxes.copy()


def film_boxes(boxes: pd.DataFrame, image_size: int) -> pd.DataFrame:
    """Boxes scaled from the 1024 x 1024 release to films of image_size x image_size pixels, unrounded."""
    return boxes.assign(**{corner: boxes[corner] * (image_size / BOX_PIXELS) for corner in BOX_COLUMNS[2:]})


def _require_task(task: str) -> None:
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; it must be {', '.join(map(repr, TASKS[:-1]))} or {TASKS[-1]!r}")
