"""What a release of films is: its films, labels, boxes and splits, and what a task makes of them."""

import math
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
    """A release that cannot be used as it is; the message names the file, the rows and what to do."""


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
            raise ReleaseError(
                f"{self.root}: without the {len(notes)} films left out ({reason}) the {empty[0]} split is empty; "
                "repair those films"
            )
        return replace(
            self, films=films, boxes=boxes, problems=pd.concat([self.problems, problem_frame(notes)], ignore_index=True)
        )


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
    (uint8 (N, M), list of M class names)

    Raises
    ------
    ValueError
        Unknown task, or targets of a release that does not have its classes.
    """
    _require_task(task)
    classes = DIGITS if task == "digits" else CLASSES
    if targets.shape[1:] != (len(classes),):
        raise ValueError(
            f"targets are {targets.shape}, but task {task!r} needs a release of {len(classes)} classes: choose the "
            "task of this release"
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


def task_boxes(boxes: pd.DataFrame, task: str) -> pd.DataFrame:
    """Boxes with the classes of the task, rows kept and not merged.

    'multilabel' and 'digits': unchanged; 'binary': every class is 'Unhealthy'; 'pneumonia': those of Pneumonia only,
    renumbered.
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
