"""Simulated release in the layout of NIH ChestX-ray14 or of RSNA's challenge: small, offline, free of licences, each
pixel's truth known.

Labels follow NIH's own joint distribution (`label_sets`). Known exactly, and embedded: the counts of films without a
finding, with each single finding, and with each of the four most frequent pairs; how many films carry 2, 3, 4 and more
findings (5 and more are pooled as 5 here); and every finding's total. The other multi-finding films are not tabulated:
their sets are those of the right size with probabilities proportional to a product of one weight per finding, the
weights fitted so that every total comes out right.

A few thousand films would leave rare findings without test films. So `write_phantom` enriches, on purpose: in each
split, films without a finding are given a set that holds the rare finding (drawn from the same distribution, given that
finding) until it reaches a floor (`FLOOR`) of the films. The imbalance stays: No Finding is near half, the rarest
findings are a few percent. `prevalence` takes the findings of some training films away again, and nothing else: every
dose of imbalance has the same patients, and the same test films to the pixel.

RSNA's films are drawn from NIH's, one a patient, with other shares: a film counts as positive if it carries Pneumonia,
and label sets are drawn from the distribution above given the film's class.
"""

import os
import shutil
import sys
import uuid
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from itertools import combinations
from numbers import Integral, Real
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

from lib.data.phantom import files
from lib.data.phantom.anatomy import burn_marker, draw_anatomy
from lib.data.phantom.files import NEITHER, NORMAL, OPACITY
from lib.data.phantom.signs import render_film
from lib.data.release import BOX_PIXELS, CLASSES, FINDINGS, NO_FINDING, PNEUMONIA, ReleaseError
from lib.data.writing import read_parameters, write_once
from lib.locks import spawned

# Films of the 112,120 that carry no finding, exactly this finding, exactly this pair, this finding at all, and this
# many findings.
HEALTHY = 60361
SINGLE = {
    "Infiltration": 9547, "Atelectasis": 4215, "Effusion": 3955, "Nodule": 2705, "Pneumothorax": 2194, "Mass": 2139,
    "Consolidation": 1310, "Pleural_Thickening": 1126, "Cardiomegaly": 1093, "Emphysema": 892, "Fibrosis": 727,
    "Edema": 628, "Pneumonia": 322, "Hernia": 110,
}  # fmt: skip
PAIRS = {
    ("Effusion", "Infiltration"): 1603, ("Atelectasis", "Infiltration"): 1350, ("Atelectasis", "Effusion"): 1165,
    ("Infiltration", "Nodule"): 829,
}  # fmt: skip
TOTAL = {
    "Atelectasis": 11559, "Cardiomegaly": 2776, "Consolidation": 4667, "Edema": 2303, "Effusion": 13317,
    "Emphysema": 2516, "Fibrosis": 1686, "Hernia": 227, "Infiltration": 19894, "Mass": 5782, "Nodule": 6331,
    "Pleural_Thickening": 3385, "Pneumonia": 1431, "Pneumothorax": 5302,
}  # fmt: skip
SIZES = {2: 14306, 3: 4856, 4: 1247, 5: 387}

BOXED = {"Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax"}
FILMS_PER_PATIENT = 3.6
STAY = 0.3  # a follow-up film repeats the label set of the film before it
FLOOR = 0.035
TRAIN_SHARE = 0.7
# RSNA: patients of each class (target 1 is Lung Opacity), and positive patients with this many boxes, 9,555 together.
RSNA_CLASSES = {OPACITY: 6012, NORMAL: 8851, NEITHER: 11821}
RSNA_BOXES = {1: 2614, 2: 3266, 3: 119, 4: 13}
BYTES_PER_PIXEL = 0.5  # of a film and its masks on the disk, at the least
MARKED, MARKED_OTHERS = 0.9, 0.02  # shares of films with a marker: of the class it is planted in, of the rest


@lru_cache(maxsize=1)
def label_sets() -> tuple[list[tuple[str, ...]], np.ndarray]:
    """NIH's distribution of label sets.

    Returns
    -------
    sets : list of tuples of findings in alphabetical order; the empty tuple is No Finding
    probability : float64 (len(sets),), sums to 1
    """
    exact = {(): HEALTHY} | {(name,): count for name, count in SINGLE.items()} | PAIRS
    modelled = [subset for k in SIZES for subset in combinations(FINDINGS, k) if subset not in PAIRS]
    member = np.array([[name in subset for name in FINDINGS] for subset in modelled])
    size = member.sum(axis=1)
    films = {k: count - (sum(PAIRS.values()) if k == 2 else 0) for k, count in SIZES.items()}
    paired = {name: sum(count for pair, count in PAIRS.items() if name in pair) for name in FINDINGS}
    total = np.array([TOTAL[name] - SINGLE[name] - paired[name] for name in FINDINGS], np.float64)
    total *= sum(k * n for k, n in films.items()) / total.sum()  # pooling five and more loses 0.3 % of the labels
    weight = total / total.sum()
    for _ in range(200):
        expected = np.exp(member @ np.log(weight))
        for k, count in films.items():
            expected[size == k] *= count / expected[size == k].sum()
        weight *= total / (expected @ member)
    counts = np.concatenate([np.array(list(exact.values()), dtype=np.float64), expected])
    return list(exact) + modelled, counts / counts.sum()


def _draw_person(rng: np.random.Generator) -> tuple[int, str]:
    """Age in years and sex."""
    return int(np.clip(rng.normal(47, 17), 5, 94)), "MF"[int(rng.random() < 0.435)]


def _draw_view(rng: np.random.Generator) -> tuple[str, int]:
    """View and detector of a film."""
    return "PA" if rng.random() < 0.6 else "AP", int(rng.integers(len(files.DETECTORS)))


def _draw_films(n_films: int, rng: np.random.Generator) -> pd.DataFrame:
    """Patients, their films, splits and label sets: one row a film, in the order of the release."""
    sets, probability = label_sets()
    cumulative = np.cumsum(probability)
    rows, patient = [], 0
    while len(rows) < n_films:
        patient += 1
        n = int(min(rng.geometric(1 / FILMS_PER_PATIENT), 20, n_films - len(rows)))
        age, sex = _draw_person(rng)
        for follow_up in range(n):
            if not follow_up or rng.random() >= STAY:
                chosen = int(np.searchsorted(cumulative, rng.random() * cumulative[-1]))
            age, image = min(age + int(rng.random() < 0.25), 95), f"{patient:08d}_{follow_up:03d}.png"
            view, detector = _draw_view(rng)
            rows.append((image, sets[chosen], follow_up, patient, age, sex, view, detector))
    films = pd.DataFrame(rows, columns="image findings follow_up patient age sex view detector".split())
    order = rng.permutation(patient) + 1
    held = films["patient"].value_counts().reindex(order).cumsum()
    test = set(held.index[held.to_numpy() > TRAIN_SHARE * n_films]) or {order[-1]}
    films["test"] = films["patient"].isin(test)
    return films


def _enrich(films: pd.DataFrame, floor: float, rng: np.random.Generator) -> pd.DataFrame:
    """Lift every finding to the share `floor` of each split, at the cost of films without a finding; at least a fifth
    of the films stay normal."""
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


def _draw_rsna(n_films: int, seed: int, rng: np.random.Generator) -> pd.DataFrame:
    """One film a patient, in RSNA's shares to the film: `kind` is its class, `foci` the number of segments that
    Pneumonia takes."""
    sets, probability = label_sets()
    opaque, normal = np.array([PNEUMONIA in subset for subset in sets]), np.array([not subset for subset in sets])
    draws = {OPACITY: opaque, NORMAL: normal, NEITHER: ~opaque & ~normal}
    shares = np.cumsum(list(RSNA_CLASSES.values())) / sum(RSNA_CLASSES.values())
    kinds = rng.permutation(np.array(list(RSNA_CLASSES))[np.searchsorted(shares, (np.arange(n_films) + 0.5) / n_films)])
    boxes = np.array(list(RSNA_BOXES.values())) / sum(RSNA_BOXES.values())
    rows = []
    for patient, kind in enumerate(kinds, start=1):
        image, conditional = uuid.uuid5(uuid.NAMESPACE_OID, f"phantom {seed} {patient}"), probability * draws[kind]
        findings = sets[rng.choice(len(sets), p=conditional / conditional.sum())]
        foci = int(rng.choice(list(RSNA_BOXES), p=boxes)) if kind == OPACITY else 1
        rows.append((str(image), findings, str(kind), foci, patient, 0, *_draw_person(rng), *_draw_view(rng)))
    return pd.DataFrame(rows, columns="image findings kind foci patient follow_up age sex view detector".split())


def _film_draws(films: pd.DataFrame, seed: int, stream: int) -> np.ndarray:
    """A uniform number a film from a stream of its own, float64 (N,)."""
    keys = zip(films["patient"], films["follow_up"])
    return np.array([np.random.default_rng((seed, *key, stream)).random() for key in keys])


def _thinned(films: pd.DataFrame, prevalence: float, seed: int) -> pd.DataFrame:
    """Films of which the share `prevalence` of the training films keep their findings; those that keep them at one
    share do so at every larger one."""
    kept = films["test"] | (_film_draws(films, seed, 96) < prevalence)
    return films.assign(findings=films["findings"].where(kept, pd.Series([()] * len(films), films.index)))


def _marked(films: pd.DataFrame, marker: str, seed: int) -> list[bool]:
    """Which films carry the marker that is planted in the class `marker`."""
    planted = [marker in (found or (NO_FINDING,)) for found in films["findings"]]
    drawn = _film_draws(films, seed, 98)
    return [bool(marker) and one < (MARKED if here else MARKED_OTHERS) for one, here in zip(drawn, planted)]


def _parts(mask: np.ndarray) -> list[np.ndarray]:
    """The parts of a mask, bool, largest first; parts within 3 % of the film count as one."""
    reach = 2 * max(1, round(0.015 * len(mask))) + 1
    near = cv2.dilate(mask.astype(np.uint8), cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach)))
    _, part = cv2.connectedComponents(near, connectivity=8)
    pixels = np.bincount(part[mask])
    return [mask & (part == k) for k in np.argsort(-pixels, kind="stable") if pixels[k]]


def _box(part: np.ndarray, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """(x, y, w, h) in `BOX_PIXELS` around a part of a mask, loose as a hand draws."""
    size = len(part)
    rows, columns = np.nonzero(part)
    low = np.array([columns.min(), rows.min()], dtype=np.float64)
    high = np.array([columns.max(), rows.max()], dtype=np.float64) + 1
    slack = rng.normal(0.02, 0.02, (2, 2)) * (high - low)
    low, high = np.clip(low - slack[0], 0, size), np.clip(high + slack[1], 0, size)
    low, high = low * BOX_PIXELS / size, high * BOX_PIXELS / size
    return (*low, *(high - low))


def _write_patient(films: pd.DataFrame, root: Path, size: int, seed: int, layout: str) -> list[tuple]:
    """Write the films of one patient that are not there yet, each mask before its film; return their boxes: film,
    finding, x, y, w, h."""
    cv2.setNumThreads(1)
    first, boxes = films.iloc[0], []
    anatomy = draw_anatomy(np.random.default_rng((seed, first.patient)), first.age, first.sex)
    for film in films.itertuples():
        key = (seed, film.patient, film.follow_up)
        if not files.is_written(root, layout, film.image):
            shown = {"view": film.view, "findings": frozenset(film.findings), "foci": film.foci}
            pixels, lesions, lungs = render_film(anatomy, size=size, key=key, **shown)
            pixels, marker = burn_marker(pixels, np.random.default_rng((*key, 97))) if film.marked else (pixels, None)
            files.write_masks(root, film.image, lesions, lungs, marker)
            files.write_film(root, layout, film, pixels)
        rng = np.random.default_rng((*key, 99))
        if layout == "rsna" and film.kind == OPACITY:
            parts = _parts(_lesions(files.read_masks(root, film.image, size))[PNEUMONIA])
            # No reader boxes a speck beside an opacity.
            marked = [(PNEUMONIA, part) for part in parts if part.sum() >= 0.2 * parts[0].sum()]
        elif layout == "nih" and film.test:
            lesions = _lesions(files.read_masks(root, film.image, size))
            marked = [(name, _parts(mask)[0]) for name, mask in lesions.items() if name in BOXED]
        else:
            continue
        boxes += [(film.image, name, *_box(part, rng)) for name, part in marked]
    return boxes


def _write_patients(films: pd.DataFrame, **arguments) -> list[tuple]:
    """`_write_patient` for several of them."""
    return [box for _, group in films.groupby("patient") for box in _write_patient(group, **arguments)]


def _write(
    anew: bool,
    *,
    root: Path,
    n_films: int,
    size: int,
    seed: int,
    floor: float,
    layout: str,
    marker: str,
    prevalence: float,
    workers: int,
) -> None:
    """Write everything but phantom.json; with `anew` what is there is of another phantom. See `write_phantom`."""
    if anew:
        for folder in filter(os.path.lexists, (root / name for name in ("masks", *files.FOLDERS.values()))):
            folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
        for table in (*sum(files.TABLES.values(), ()), files.MARKERS):
            (root / table).unlink(missing_ok=True)
    for folder in ("masks", files.FOLDERS[layout]):
        (root / folder).mkdir(exist_ok=True)
    missing = n_films - files.count_films(root / files.FOLDERS[layout])
    needed, free = missing * size**2 * BYTES_PER_PIXEL, shutil.disk_usage(root).free
    if needed > free:
        raise ReleaseError(
            f"the phantom's films need {needed / 2**20:.1f} MiB or more in {root}, where {free / 2**20:.1f} MiB are "
            "free: make room, choose another folder, or ask for fewer films"
        )
    rng = np.random.default_rng((seed, 0))
    if layout == "rsna":
        films = _draw_rsna(n_films, seed, rng)
    else:
        films = _thinned(_enrich(_draw_films(n_films, rng), floor, rng), prevalence, seed).assign(foci=1)
    films["marked"] = _marked(films, marker, seed)
    chunks = [group for _, group in films.groupby(films["patient"] // 8)]
    task = partial(_write_patients, root=root, size=size, seed=seed, layout=layout)
    bar = {"desc": "drawing films", "total": len(chunks), "unit": "part", "delay": 5, "mininterval": 5, "ascii": True}
    shown = partial(tqdm, file=sys.stdout, **bar)
    if workers == 1:
        boxes = [box for found in shown(map(task, chunks)) for box in found]
    else:
        try:
            with spawned(min(workers, len(chunks))) as pool:
                boxes = [box for found in shown(pool.map(task, chunks)) for box in found]
        except BrokenProcessPool as error:
            raise ReleaseError(
                f"a process that draws the films of {root} was killed (out of memory?) or could not start (then its "
                "own error stands above; a script must call this below `if __name__ == '__main__':`): call again, "
                "which goes on with what is there, or with workers=1"
            ) from error
    (files.write_rsna_tables if layout == "rsna" else files.write_nih_tables)(root, films, boxes)
    if marker:
        files.write_markers(root, layout, films)


def write_phantom(
    root: str | Path,
    *,
    n_films: int,
    size: int,
    seed: int,
    floor: float = FLOOR,
    layout: str = "nih",
    marker: str = "",
    prevalence: float = 1.0,
    workers: int | None = None,
) -> None:
    """Write a simulated release, with exact masks of lesions, lungs and marker.

    Layout 'nih': Data_Entry_2017.csv, BBox_List_2017.csv (test films only, as in NIH), train_val_list.txt,
    test_list.txt, images/*.png (8-bit). Layout 'rsna': stage_2_train_images/<patientId>.dcm (8-bit, not compressed),
    stage_2_train_labels.csv, stage_2_detailed_class_info.csv; one film a patient, no split, boxes in pixels of a 1024 x
    1024 film whatever `size` is, and nearly as many a patient as in RSNA. Both: masks/*.png (16-bit, see
    `phantom.files`), markers.csv (image, marked) where there is a marker and, last, phantom.json with the
    parameters. The content depends on the parameters only, not on the number of workers. An interrupted call is
    continued by the next; a call for what is already there returns at once.

    Parameters
    ----------
    root : folder, new or empty or an earlier phantom
    n_films : number of films, 20 to 1,000,000
    size : film side in pixels, 64 to 4096
    seed : 0 to 2^64 - 1
    floor : layout 'nih': least share of each split's films that carry a finding, in [0, 0.1]; 0 leaves NIH's own
    distribution
    layout : 'nih' or 'rsna'
    marker : a finding or 'No Finding': a planted confounder. A technician's letter is burnt into 90 % of the films of
    this class and 2 % of the others, beside the shoulder; the rest of each film is as without it. Empty: none
    prevalence : layout 'nih': share of the training films with findings that keep them, in (0, 1]; the others are drawn
    without, and all else of the release, test films and masks included, is as at 1
    workers : processes; default one per core, one for fewer than 200 films

    Raises
    ------
    ValueError : a parameter out of range
    lib.data.release.ReleaseError : `root` holds a phantom with other parameters, a damaged one, or something else; too
    little disk space, a folder that cannot be written, a worker that was killed
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers is None:
        workers = 1 if isinstance(n_films, Integral) and n_films < 200 else cpus
    limits = {"n_films": (n_films, 20, 10**6), "size": (size, 64, 4096), "seed": (seed, 0, 2**64 - 1)}
    for name, (value, least, most) in (limits | {"workers": (workers, 1, 1024)}).items():
        if isinstance(value, bool) or not isinstance(value, Integral) or not least <= value <= most:
            raise ValueError(f"{name} is {value!r:.80}: it must be a whole number from {least} to {most}")
    if not isinstance(floor, Real) or not 0 <= floor <= 0.1:
        raise ValueError(f"floor is {floor!r:.80}: it must lie between 0 and 0.1")
    if not isinstance(prevalence, Real) or not 0 < prevalence <= 1 or (prevalence < 1 and layout != "nih"):
        raise ValueError(f"prevalence is {prevalence!r:.80}: it must lie above 0 and be at most 1, and 1 for 'rsna'")
    for name, value, known in (("layout", layout, tuple(files.FOLDERS)), ("marker", marker, ("", *CLASSES))):
        if value not in known:
            raise ValueError(f"{name} is {value!r:.80}: it must be {' or '.join(map(repr, known))}")
    root, n_films, size, seed = Path(root), int(n_films), int(size), int(seed)
    parameters = {"format": 2, "n_films": n_films, "size": size, "seed": seed}
    parameters |= {"layout": layout, "marker": marker} | ({"floor": float(floor)} if layout == "nih" else {})
    parameters |= {"prevalence": float(prevalence)} if prevalence < 1 else {}  # one written before it was known stands
    arguments = {"root": root, "layout": layout, "n_films": n_films, "marker": marker}
    drawn = {"size": size, "seed": seed, "floor": float(floor), "prevalence": float(prevalence)}
    write = partial(_write, **arguments, **drawn, workers=workers)
    write_once(root, "a phantom", parameters, partial(files.is_complete, **arguments), write)


def film_without(root: str | Path, films: pd.DataFrame, row: int, finding: str) -> tuple[np.ndarray, bool]:
    """A film of the release as it would be without one of its findings, drawn anew: the same patient, exposure and
    noise, all other findings kept.

    Parameters
    ----------
    root : folder of `write_phantom`, layout 'nih', without a marker
    films : `Release.films` of all its films
    row : of the film, in `films`
    finding : a finding; one that the film does not carry leaves it as it is

    Returns
    -------
    film : uint8 (size, size)
    alone : bool, whether no other lesion and no lung changed by a pixel, so that the two films differ by the finding
    alone; where the finding shapes the anatomy others may have moved with it

    Raises
    ------
    ValueError : a finding or film that does not exist
    lib.data.release.ReleaseError : a file of the phantom is missing or damaged
    """
    root, film = Path(root), films.loc[row]
    if finding not in FINDINGS:
        raise ValueError(f"{finding!r} is no finding: choose from {', '.join(FINDINGS)}")
    drawn = read_parameters(root / "phantom.json") or {}
    if drawn.get("layout") != "nih" or drawn.get("marker"):
        raise ReleaseError(f"{root} holds no phantom in NIH's layout without a marker: write one there")
    first = films[films["patient"] == film["patient"]].sort_values("follow_up").iloc[0]
    patient = int(film["patient"])
    anatomy = draw_anatomy(np.random.default_rng((drawn["seed"], patient)), first["age"], first["sex"])
    findings = frozenset(film["labels"].split("|")) - {finding, NO_FINDING}
    key = (drawn["seed"], patient, int(film["follow_up"]))
    shown = {"view": film["view"], "findings": findings, "size": drawn["size"], "key": key}
    pixels, lesions, lungs = render_film(anatomy, **shown)
    before = read_lesion_masks(root, film["image"])
    same = [np.array_equal(mask, before.get(name, ~mask)) for name, mask in lesions.items() if mask.any()]
    return pixels, all(same) and np.array_equal(lungs, read_lung_mask(root, film["image"]))


def read_lesion_masks(root: str | Path, image: str) -> dict[str, np.ndarray]:
    """The pixels that each finding of a film occupies.

    Parameters
    ----------
    root : folder of `write_phantom`
    image : film, 'xxx.png' or, in RSNA's layout, its patientId

    Returns
    -------
    dict of finding to bool (size, size); empty for a film without a finding

    Raises
    ------
    FileNotFoundError : no film of that name is there
    lib.data.release.ReleaseError : the mask file is damaged, or not of this phantom's size
    """
    return _lesions(files.read_masks(Path(root), image))


def _lesions(bits: np.ndarray) -> dict[str, np.ndarray]:
    masks = {name: (bits >> index) & 1 == 1 for index, name in enumerate(FINDINGS)}
    return {name: mask for name, mask in masks.items() if mask.any()}


def read_lung_mask(root: str | Path, image: str) -> np.ndarray:
    """The two lung fields of a film as its patient has them, behind heart and findings too, bool (size, size).
    Arguments and errors are those of `read_lesion_masks`."""
    return (files.read_masks(Path(root), image) >> files.LUNGS) & 1 == 1


def read_marker_mask(root: str | Path, image: str) -> np.ndarray:
    """The pixels that a planted marker changed, bool (size, size), all False for a film without one. As
    `read_lesion_masks` otherwise."""
    return (files.read_masks(Path(root), image) >> files.MARKER) & 1 == 1
