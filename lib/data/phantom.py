"""A simulated release in the layout of NIH ChestX-ray14: small, offline, free of licences, and with the truth about every pixel.

Labels follow NIH's own joint distribution (`label_sets`). Known exactly, and embedded: the counts of films without a finding, with each
single finding, and with each of the four most frequent pairs; how many films carry 2, 3, 4 and more findings (5 and more are pooled as 5
here); and every finding's total. The other multi-finding films are not tabulated: their sets are those of the right size with
probabilities proportional to a product of one weight per finding, the weights fitted so that every total comes out right.

A few thousand films would leave rare findings without test films. So `write_phantom` enriches, on purpose: in each split, films without
a finding are given a set that holds the rare finding (drawn from the same distribution, given that finding) until it reaches a floor (`FLOOR`) of
the films. The imbalance stays: No Finding is near half, the rarest findings are a few percent.
"""

import json
import multiprocessing
import os
import shutil
from functools import lru_cache, partial
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from lib.data.anatomy import draw_anatomy
from lib.data.nih_files import BOX_PIXELS, NO_FINDING
from lib.data.signs import SIGNS, render_film

FINDINGS = tuple(SIGNS)
# Films of the 112,120 that carry no finding, exactly this finding, exactly this pair, this finding at all, and this many findings.
NORMAL = 60361
SINGLE = {
    "Infiltration": 9547,
    "Atelectasis": 4215,
    "Effusion": 3955,
    "Nodule": 2705,
    "Pneumothorax": 2194,
    "Mass": 2139,
    "Consolidation": 1310,
}
SINGLE |= {
    "Pleural_Thickening": 1126,
    "Cardiomegaly": 1093,
    "Emphysema": 892,
    "Fibrosis": 727,
    "Edema": 628,
    "Pneumonia": 322,
    "Hernia": 110,
}
PAIRS = {
    ("Effusion", "Infiltration"): 1603,
    ("Atelectasis", "Infiltration"): 1350,
    ("Atelectasis", "Effusion"): 1165,
    ("Infiltration", "Nodule"): 829,
}
TOTAL = {
    "Atelectasis": 11559,
    "Cardiomegaly": 2776,
    "Consolidation": 4667,
    "Edema": 2303,
    "Effusion": 13317,
    "Emphysema": 2516,
    "Fibrosis": 1686,
    "Hernia": 227,
}
TOTAL |= {"Infiltration": 19894, "Mass": 5782, "Nodule": 6331, "Pleural_Thickening": 3385, "Pneumonia": 1431, "Pneumothorax": 5302}
SIZES = {2: 14306, 3: 4856, 4: 1247, 5: 387}

BOXED = {"Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax"}
FILMS_PER_PATIENT = 3.6
STAY = 0.3  # a follow-up film repeats the label set of the film before it
FLOOR = 0.035
TRAIN_SHARE = 0.7
COLUMNS = ["Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age", "Patient Gender", "View Position"]
COLUMNS += ["OriginalImage[Width", "Height]", "OriginalImagePixelSpacing[x", "y]"]
DETECTORS = [(2500, 2048, 0.168), (2992, 2991, 0.143), (2021, 2021, 0.194), (3056, 2544, 0.139)]


@lru_cache(maxsize=1)
def label_sets() -> tuple[list[tuple[str, ...]], np.ndarray]:
    """NIH's distribution of label sets.

    Returns
    -------
    sets : list of tuples of findings in alphabetical order; the empty tuple is No Finding
    probability : float64 (len(sets),), sums to 1
    """
    exact = {(): NORMAL} | {(name,): count for name, count in SINGLE.items()} | PAIRS
    modelled = [subset for k in SIZES for subset in combinations(FINDINGS, k) if subset not in PAIRS]
    member = np.array([[name in subset for name in FINDINGS] for subset in modelled])
    size = member.sum(axis=1)
    films = {k: count - (sum(PAIRS.values()) if k == 2 else 0) for k, count in SIZES.items()}
    total = np.array(
        [TOTAL[name] - SINGLE[name] - sum(count for pair, count in PAIRS.items() if name in pair) for name in FINDINGS], dtype=np.float64
    )
    total *= sum(k * count for k, count in films.items()) / total.sum()  # pooling five and more loses 0.3 % of the labels
    weight = total / total.sum()
    for _ in range(200):
        expected = np.exp(member @ np.log(weight))
        for k, count in films.items():
            expected[size == k] *= count / expected[size == k].sum()
        weight *= total / (expected @ member)
    counts = np.concatenate([np.array(list(exact.values()), dtype=np.float64), expected])
    return list(exact) + modelled, counts / counts.sum()


def _draw_films(n_films: int, rng: np.random.Generator) -> pd.DataFrame:
    """Patients, their films, splits and label sets: one row a film, in the order of the release."""
    sets, probability = label_sets()
    cumulative = np.cumsum(probability)
    rows, patient = [], 0
    while len(rows) < n_films:
        patient += 1
        n = int(min(rng.geometric(1 / FILMS_PER_PATIENT), 20, n_films - len(rows)))
        age, sex, chosen = int(np.clip(rng.normal(47, 17), 5, 94)), "MF"[int(rng.random() < 0.435)], -1
        for follow_up in range(n):
            chosen = chosen if follow_up and rng.random() < STAY else int(np.searchsorted(cumulative, rng.random() * cumulative[-1]))
            age = min(age + int(rng.random() < 0.25), 95)
            rows.append(
                (
                    f"{patient:08d}_{follow_up:03d}.png",
                    sets[chosen],
                    follow_up,
                    patient,
                    age,
                    sex,
                    "PA" if rng.random() < 0.6 else "AP",
                    int(rng.integers(len(DETECTORS))),
                )
            )
    films = pd.DataFrame(rows, columns=["image", "findings", "follow_up", "patient", "age", "sex", "view", "detector"])
    order = rng.permutation(patient) + 1
    held = films["patient"].value_counts().reindex(order).cumsum()
    test = set(held.index[held.to_numpy() > TRAIN_SHARE * n_films]) or {order[-1]}
    films["test"] = films["patient"].isin(test)
    return films


def _enrich(films: pd.DataFrame, floor: float, rng: np.random.Generator) -> pd.DataFrame:
    """Lift every finding to the share `floor` of each split, at the cost of films without a finding; at least a fifth of the films stay normal."""
    sets, probability = label_sets()
    findings = list(films["findings"])
    for test in (False, True):
        rows = np.flatnonzero(films["test"].to_numpy() == test)
        normal = list(rng.permutation([row for row in rows if not findings[row]]))
        for name in sorted(FINDINGS, key=TOTAL.get):
            holds = np.array([name in subset for subset in sets])
            conditional = np.where(holds, probability, 0) / probability[holds].sum()
            missing = int(np.ceil(floor * len(rows))) - sum(name in findings[row] for row in rows)
            for _ in range(min(missing, len(normal) - len(rows) // 5)):
                findings[normal.pop()] = sets[rng.choice(len(sets), p=conditional)]
    return films.assign(findings=findings)


def _box(mask: np.ndarray, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """(x, y, w, h) in `BOX_PIXELS` around the largest part of a mask, loose as a hand draws; parts within 3 % of the film count as one."""
    size = len(mask)
    reach = 2 * max(1, round(0.015 * size)) + 1
    near = cv2.dilate(mask.astype(np.uint8), cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach)))
    _, part = cv2.connectedComponents(near, connectivity=8)
    largest = np.bincount(part[mask]).argmax()
    rows, columns = np.nonzero(mask & (part == largest))
    low = np.array([columns.min(), rows.min()], dtype=np.float64)
    high = np.array([columns.max(), rows.max()], dtype=np.float64) + 1
    slack = rng.normal(0.02, 0.02, (2, 2)) * (high - low)
    low, high = np.clip(low - slack[0], 0, size) * BOX_PIXELS / size, np.clip(high + slack[1], 0, size) * BOX_PIXELS / size
    return (*low, *(high - low))


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _write_png(path: Path, image: np.ndarray) -> None:
    _write(path, cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 4])[1].tobytes())


def _write_patient(films: pd.DataFrame, root: Path, size: int, seed: int) -> list[tuple[str, str, float, float, float, float]]:
    """Write the films of one patient that are not there yet, each mask before its film; return the boxes of the test films."""
    cv2.setNumThreads(1)
    first = films.iloc[0]
    anatomy = draw_anatomy(np.random.default_rng((seed, first.patient)), first.age, first.sex)
    boxes = []
    for film in films.itertuples():
        key = (seed, film.patient, film.follow_up)
        path = root / "images" / film.image
        if not path.exists():
            image, masks = render_film(anatomy, view=film.view, findings=frozenset(film.findings), size=size, key=key)
            if masks:
                bits = sum(
                    (mask.astype(np.uint16) << FINDINGS.index(name) for name, mask in masks.items()), np.zeros((size, size), np.uint16)
                )
                _write_png(root / "masks" / film.image, bits)
            _write_png(path, image)
        if film.test:
            rng = np.random.default_rng((*key, 99))
            for name, mask in read_lesion_masks(root, film.image).items():
                if name in BOXED:
                    boxes.append((film.image, "Infiltrate" if name == "Infiltration" else name, *_box(mask, rng)))
    return boxes


def _prepare(root: Path, parameters: dict) -> bool:
    """Make `root` ready to be written; True if the release is there already. Raises where it holds anything else."""
    finished, unfinished = root / "phantom.json", root / "phantom.unfinished.json"
    if finished.exists():
        found = json.loads(finished.read_text())
        if found != parameters:
            raise ValueError(
                f"{root} already holds a phantom with {found}, not the {parameters} asked for: choose another folder, or delete it"
            )
        return True
    if unfinished.exists():
        if json.loads(unfinished.read_text()) != parameters:
            for folder in ("images", "masks"):
                shutil.rmtree(root / folder, ignore_errors=True)
    elif root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root} exists and is no phantom (it has no phantom.json): choose an empty or new folder")
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    _write(unfinished, json.dumps(parameters).encode())
    return False


def write_phantom(root: str | Path, *, n_films: int, size: int, seed: int, floor: float = FLOOR, workers: int | None = None) -> None:
    """Write a simulated release in NIH layout, with exact lesion masks.

    The files are Data_Entry_2017.csv, BBox_List_2017.csv (test films only, as in NIH), train_val_list.txt, test_list.txt,
    images/*.png (8-bit), masks/*.png (16-bit, one bit a finding) and, last, phantom.json with the parameters. The content depends on the
    parameters only, not on the number of workers. An interrupted call is continued by the next; a call for what is already there returns
    at once.

    Parameters
    ----------
    root : folder, new or empty or an earlier phantom
    n_films : number of films, at least 20
    size : film side in pixels, at least 64
    seed : not negative
    floor : least share of each split's films that carry a finding, in [0, 0.1]; 0 leaves NIH's own distribution
    workers : processes; default one per core, one for fewer than 200 films

    Raises
    ------
    ValueError : a parameter out of range, or a finished phantom with other parameters in `root`
    FileExistsError : `root` holds something else
    """
    for name, value, least in (("n_films", n_films, 20), ("size", size, 64), ("seed", seed, 0)):
        if isinstance(value, bool) or value != int(value) or value < least:
            raise ValueError(f"{name} is {value!r}: it must be a whole number of at least {least}")
    if not 0 <= floor <= 0.1:
        raise ValueError(f"floor is {floor!r}: it must lie between 0 and 0.1")
    root = Path(root)
    parameters = {"format": 1, "n_films": int(n_films), "size": int(size), "seed": int(seed), "floor": float(floor)}
    if _prepare(root, parameters):
        return
    rng = np.random.default_rng((seed, 0))
    films = _enrich(_draw_films(n_films, rng), floor, rng)
    patients = [group for _, group in films.groupby("patient")]
    task = partial(_write_patient, root=root, size=size, seed=seed)
    workers = workers or (1 if n_films < 200 else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    if workers == 1:
        boxes = [box for group in patients for box in task(group)]
    else:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            boxes = [box for found in pool.imap(task, patients, chunksize=8) for box in found]
    _write_tables(root, films, boxes)
    _write(root / "phantom.json", json.dumps(parameters).encode())
    (root / "phantom.unfinished.json").unlink(missing_ok=True)  # another process may have written the same phantom


def _write_tables(root: Path, films: pd.DataFrame, boxes: list[tuple]) -> None:
    width, height, spacing = zip(*(DETECTORS[d] for d in films["detector"]), strict=True)
    labels = ["|".join(findings) or NO_FINDING for findings in films["findings"]]
    values = [
        films["image"],
        labels,
        films["follow_up"],
        films["patient"],
        films["age"],
        films["sex"],
        films["view"],
        width,
        height,
        spacing,
        spacing,
    ]
    table = pd.DataFrame(dict(zip(COLUMNS, values, strict=True)))
    # NIH's header splits two names at a comma, so joined by commas it reads as released.
    rows = "\n".join([",".join(COLUMNS)] + table.to_csv(index=False, header=False, lineterminator="\n").splitlines()) + "\n"
    _write(root / "Data_Entry_2017.csv", rows.encode())
    lines = ["Image Index,Finding Label,Bbox [x,y,w,h],,,"] + [
        ",".join([image, name, *(f"{v:.6f}" for v in box)]) for image, name, *box in boxes
    ]
    _write(root / "BBox_List_2017.csv", ("\n".join(lines) + "\n").encode())
    for name, rows in (("train_val_list.txt", ~films["test"]), ("test_list.txt", films["test"])):
        _write(root / name, ("\n".join(films.loc[rows, "image"]) + "\n").encode())


def read_lesion_masks(root: str | Path, image: str) -> dict[str, np.ndarray]:
    """The pixels that each finding of a film occupies.

    Parameters
    ----------
    root : folder of `write_phantom`
    image : film name, 'xxx.png'

    Returns
    -------
    dict of finding to bool (size, size); empty for a film without a finding

    Raises
    ------
    FileNotFoundError : neither a mask nor a film of that name is there
    """
    path = Path(root) / "masks" / image
    if not path.exists():
        if not (Path(root) / "images" / image).exists():
            raise FileNotFoundError(f"{path}: no film {image!r} in the phantom {root}")
        return {}
    bits = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    masks = {name: (bits >> index) & 1 == 1 for index, name in enumerate(FINDINGS)}
    return {name: mask for name, mask in masks.items() if mask.any()}
