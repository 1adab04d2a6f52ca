"""The simulated release: layouts, label statistics, patients, masks and boxes, lungs, marker, determinism, difficulty,
errors."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import cv2
import numpy as np
import pandas as pd
import pydicom
import pytest
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

from lib import locks
from lib.data.nih import read_release
from lib.data.phantom import files
from lib.data.phantom import films as phantom
from lib.data.phantom.anatomy import Scene, draw_anatomy
from lib.data.phantom.films import (
    film_without,
    label_sets,
    read_lesion_masks,
    read_lung_mask,
    read_marker_mask,
    write_phantom,
)
from lib.data.phantom.signs import SIGNS, render_film
from lib.data.release import CLASSES, FINDINGS, ReleaseError

NIH_FILMS = 112120


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom") / "release"
    write_phantom(root, n_films=450, size=64, seed=3, workers=1)
    return root


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom") / "marked"
    write_phantom(root, n_films=450, size=64, seed=3, marker="Nodule", workers=1)
    return root


@pytest.fixture(scope="module")
def rsna(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom") / "rsna"
    write_phantom(root, n_films=120, size=64, seed=3, layout="rsna", workers=1)
    return root


@pytest.fixture(scope="module")
def entries(release):
    return pd.read_csv(release / "Data_Entry_2017.csv", index_col=False)


def read_boxes(root):
    boxes = pd.read_csv(root / "BBox_List_2017.csv").iloc[:, :6]
    return boxes.set_axis(["image", "class", "x", "y", "w", "h"], axis=1)


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def enlarged(mask):
    """A mask in the pixels of boxes, uint8 (1024, 1024)."""
    return cv2.resize(mask.astype(np.uint8), (1024, 1024), interpolation=cv2.INTER_NEAREST)


def patient(number, sex="M"):
    return draw_anatomy(np.random.default_rng(number), 50, sex)


# labels


def test_label_sets_reproduce_every_published_count():
    sets, probability = label_sets()
    films = probability * NIH_FILMS
    assert len(set(sets)) == len(sets) and probability.sum() == pytest.approx(1)
    count = dict(zip(sets, films, strict=True))
    assert count[()] == pytest.approx(60361)
    for name, single in phantom.SINGLE.items():
        assert count[(name,)] == pytest.approx(single)
    for pair, known in phantom.PAIRS.items():
        assert count[pair] == pytest.approx(known)
    assert sum(n for subset, n in count.items() if len(subset) > 1) == pytest.approx(20796)
    for name, total in phantom.TOTAL.items():
        assert sum(n for subset, n in count.items() if name in subset) == pytest.approx(total, rel=0.01), name
    assert sum(phantom.SINGLE.values()) == 30963 and sum(phantom.TOTAL.values()) == 81176


def test_drawn_films_have_nihs_marginals_within_sampling_error():
    films = phantom._draw_films(30000, np.random.default_rng(0))
    drawn = films["findings"].explode().value_counts()
    expected = pd.Series(phantom.TOTAL) / NIH_FILMS * len(films)
    # a follow-up film repeats the set before it, so counts vary more than independent ones: (1 + STAY) / (1 - STAY)
    # bounds the variance
    deviation = np.sqrt(expected * (1 + phantom.STAY) / (1 - phantom.STAY))
    assert (np.abs(drawn.reindex(expected.index) - expected) < 4 * deviation + 0.01 * expected).all()
    normal = (films["findings"].str.len() == 0).mean()
    assert normal == pytest.approx(60361 / NIH_FILMS, abs=0.015)
    assert films.groupby("patient").size().mean() == pytest.approx(3.6, abs=0.15)


def test_enrichment_lifts_rare_findings_and_keeps_the_imbalance():
    rng = np.random.default_rng(1)
    before = phantom._draw_films(3000, rng)
    after = phantom._enrich(before, phantom.FLOOR, rng)
    for _, split in after.groupby("test"):
        share = split["findings"].explode().value_counts() / len(split)
        assert (share.reindex(FINDINGS) >= phantom.FLOOR).all()
        assert share["Infiltration"] > 4 * share["Hernia"]
        assert 0.40 < (split["findings"].str.len() == 0).mean() < 0.56
    changed = before["findings"] != after["findings"]
    assert (before.loc[changed, "findings"].str.len() == 0).all()


# layout


def test_layout_is_that_of_the_nih_release(release, entries):
    header = (release / "Data_Entry_2017.csv").read_text().splitlines()[0]
    assert header == (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    )
    assert (release / "BBox_List_2017.csv").read_text().splitlines()[0] == "Image Index,Finding Label,Bbox [x,y,w,h],,,"
    assert len(entries) == 450 and entries["Image Index"].is_unique
    assert entries["Image Index"].str.fullmatch(r"\d{8}_\d{3}\.png").all()
    named = [f"{p:08d}_{f:03d}.png" for p, f in zip(entries["Patient ID"], entries["Follow-up #"], strict=True)]
    assert list(entries["Image Index"]) == named
    assert set("|".join(entries["Finding Labels"]).split("|")) == set(CLASSES)
    assert set(entries["View Position"]) == {"PA", "AP"} and set(entries["Patient Gender"]) == {"M", "F"}
    assert sorted(path.name for path in (release / "images").iterdir()) == sorted(entries["Image Index"])
    film = cv2.imread(str(release / "images" / entries["Image Index"][0]), cv2.IMREAD_UNCHANGED)
    assert film.dtype == np.uint8 and film.shape == (64, 64)
    assert json.loads((release / "phantom.json").read_text())["n_films"] == 450
    assert not list(release.rglob(".*")) and not (release / "phantom.unfinished.json").exists()


def test_splits_are_complete_and_patient_disjoint(release, entries):
    train = (release / "train_val_list.txt").read_text().split()
    test = (release / "test_list.txt").read_text().split()
    assert sorted(train + test) == sorted(entries["Image Index"])
    assert not {name[:8] for name in train} & {name[:8] for name in test}
    assert 0.62 < len(train) / len(entries) < 0.72


def test_reads_through_the_release_reader(release):
    from lib.data.nih import read_release

    read = read_release(release)
    assert set(read.problems["kind"]) <= {"label alias"}  # 'Infiltrate', as in NIH's own file
    assert len(read.films) == 450 and len(read.boxes) == len(read_boxes(release))


# films, masks and boxes


def test_masks_name_exactly_the_findings_of_the_labels(release, entries):
    for name, labels in zip(entries["Image Index"], entries["Finding Labels"], strict=True):
        masks = read_lesion_masks(release, name)
        assert set(masks) == set(labels.split("|")) - {"No Finding"}, name
        assert all(mask.dtype == bool and mask.shape == (64, 64) for mask in masks.values())


def test_boxes_fit_the_masks_of_the_test_films(release, entries):
    boxes = read_boxes(release)
    test = set((release / "test_list.txt").read_text().split())
    wanted = {
        (image, label.replace("Infiltration", "Infiltrate"))
        for image, labels in zip(entries["Image Index"], entries["Finding Labels"], strict=True)
        for label in labels.split("|")
        if image in test and label in phantom.BOXED
    }
    assert len(boxes) == len(wanted) and set(zip(boxes["image"], boxes["class"], strict=True)) == wanted
    assert (boxes[["x", "y"]] >= 0).all(axis=None) and (boxes["x"] + boxes["w"] <= 1024).all()
    assert (boxes["y"] + boxes["h"] <= 1024).all()
    for image, name, x, y, w, h in boxes.itertuples(index=False):
        mask = read_lesion_masks(release, image)[name.replace("Infiltrate", "Infiltration")]
        full = enlarged(mask)
        inside = full[round(y) : round(y + h), round(x) : round(x + w)]
        assert inside.any(), (image, name)
        assert inside.sum() >= 0.3 * full.sum() or name in ("Nodule", "Infiltrate", "Atelectasis")
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        # Tight, with the looseness of a hand.
        assert rows[-1] - rows[0] > 0.75 * h and columns[-1] - columns[0] > 0.75 * w, (image, name)


@pytest.mark.parametrize("finding", SIGNS)
def test_a_finding_changes_the_film_mainly_inside_its_mask(finding):
    for number in range(4):
        arguments = dict(view="PA", size=128, key=(7, number, 0))
        without, *_ = render_film(patient(number), findings=frozenset(), **arguments)
        film, masks, _ = render_film(patient(number), findings=frozenset({finding}), **arguments)
        near = cv2.dilate(masks[finding].astype(np.uint8), np.ones((5, 5))).astype(bool)
        change = np.abs(film.astype(float) - without)
        assert masks[finding].any() and change[near].sum() > 0.7 * change.sum(), (finding, number)
        assert change[masks[finding]].mean() > 8, (finding, number)


def test_findings_leave_each_other_alone():
    arguments = dict(view="AP", size=96, key=(1, 2, 3))
    _, alone, _ = render_film(patient(5), findings=frozenset({"Nodule"}), **arguments)
    _, both, _ = render_film(patient(5), findings=frozenset({"Nodule", "Effusion"}), **arguments)
    assert (alone["Nodule"] == both["Nodule"]).all()


def test_signs_have_their_defining_measures():
    for number in range(8):
        arguments = dict(size=256, view="PA", key=(0, number, 0))
        _, masks, _ = render_film(patient(number), findings=frozenset({"Cardiomegaly", "Mass", "Nodule"}), **arguments)
        thorax = 2 * patient(number).width * 256
        # Over 0.55 before the film is turned and scaled (0.8 to 1.1).
        assert np.ptp(np.nonzero(masks["Cardiomegaly"])[1]) / thorax > 0.5
        _, _, mass, _ = cv2.connectedComponentsWithStats(masks["Mass"].astype(np.uint8))
        _, _, nodules, _ = cv2.connectedComponentsWithStats(masks["Nodule"].astype(np.uint8))
        single = np.pi * (0.029 * 1.1 * 256) ** 2
        assert np.median(nodules[1:, 4]) <= 2.1 * single and mass[1:, 4].max() > single
    normal = Scene(patient(0), 256)
    heart, lungs = np.nonzero(normal.heart)[1], np.nonzero(normal.lung)[1]
    assert np.ptp(heart) / np.ptp(lungs) < 0.5
    assert normal.heart[:, 128:].sum() > normal.heart[:, :128].sum()  # the apex is on the image right


def test_films_of_a_patient_share_anatomy_but_not_pixels():
    arguments = dict(view="PA", findings=frozenset(), size=96)
    one, two = (render_film(patient(1), key=(0, 1, k), **arguments)[0].astype(float) for k in range(2))
    assert np.abs(one - two).mean() > 2
    assert replace(patient(1)) == patient(1) != patient(2)
    assert patient(1, "F").breast > 0 == patient(1).breast


# the layout of RSNA's challenge


def read_labels(root):
    return pd.read_csv(root / "stage_2_train_labels.csv")


def test_rsna_tables_have_the_rows_and_shares_of_the_challenge(rsna):
    labels, classes = read_labels(rsna), pd.read_csv(rsna / "stage_2_detailed_class_info.csv")
    assert list(labels) == ["patientId", "x", "y", "width", "height", "Target"]
    assert list(classes) == ["patientId", "class"]
    assert (labels["patientId"] == classes["patientId"]).all()  # one row a box in both, as released
    sides = labels[["x", "y", "width", "height"]]
    assert (sides.notna().all(axis=1) == (labels["Target"] == 1)).all()
    assert (sides.isna().all(axis=1) == (labels["Target"] == 0)).all()
    assert ((classes["class"] == "Lung Opacity") == (labels["Target"] == 1)).all()
    films = labels.assign(kind=classes["class"]).drop_duplicates("patientId")
    assert len(films) == 120 and labels.groupby("patientId")["Target"].nunique().eq(1).all()
    assert films["Target"].mean() == pytest.approx(0.225, abs=0.003)
    shares = films["kind"].value_counts(normalize=True)
    assert shares["Normal"] == pytest.approx(0.33, abs=0.01)
    assert shares["No Lung Opacity / Not Normal"] == pytest.approx(0.44, abs=0.01)
    assert sorted(path.stem for path in (rsna / "stage_2_train_images").iterdir()) == sorted(films["patientId"])
    assert not (rsna / "Data_Entry_2017.csv").exists() and not (rsna / "images").exists()


def test_rsna_findings_follow_the_classes(rsna):
    classes = pd.read_csv(rsna / "stage_2_detailed_class_info.csv").drop_duplicates("patientId")
    for image, kind in classes.itertuples(index=False):
        found = set(read_lesion_masks(rsna, image))
        assert ("Pneumonia" in found) == (kind == "Lung Opacity") and (not found) == (kind == "Normal"), (image, kind)
        assert set(read_lesion_masks(rsna, f"{image}.dcm")) == found


def test_rsna_boxes_cover_every_opacity_of_pneumonia(rsna):
    labels = read_labels(rsna).query("Target == 1")
    boxes = labels[["x", "y", "width", "height"]]
    assert (boxes == boxes.round()).all(axis=None) and (boxes[["width", "height"]] > 0).all(axis=None)
    assert (boxes["x"] + boxes["width"] <= 1024).all() and (boxes["y"] + boxes["height"] <= 1024).all()
    assert (boxes >= 0).all(axis=None)
    per_film = labels["patientId"].value_counts()
    assert per_film.max() >= 2 and 1.25 < per_film.mean() < 1.75  # RSNA: 9555 / 6012 = 1.59
    for image, rows in labels.groupby("patientId"):
        mask = enlarged(read_lesion_masks(rsna, image)["Pneumonia"])
        covered = np.zeros_like(mask)
        for x, y, w, h in rows[["x", "y", "width", "height"]].astype(int).itertuples(index=False):
            assert mask[y : y + h, x : x + w].mean() > 0.15
            covered[y : y + h, x : x + w] = 1
        assert (mask & covered).sum() > 0.85 * mask.sum(), image


def test_a_dicom_holds_the_rendered_film_and_its_patient(rsna):
    classes = pd.read_csv(rsna / "stage_2_detailed_class_info.csv").drop_duplicates("patientId")
    for number, (image, kind) in enumerate(classes.head(30).itertuples(index=False), start=1):
        film = pydicom.dcmread(rsna / "stage_2_train_images" / f"{image}.dcm")
        assert film.PatientID == image and film.PhotometricInterpretation == "MONOCHROME2" and film.BitsStored == 8
        assert film.file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRLittleEndian
        assert film.file_meta.MediaStorageSOPInstanceUID == film.SOPInstanceUID and film.SOPInstanceUID.is_valid
        assert (film.Rows, film.Columns) == (64, 64) and film.PatientSex in "MF" and film.ViewPosition in ("PA", "AP")
        assert 300 < 64 * film.PixelSpacing[0] < 450  # millimetres: a detector is 35 to 43 cm wide
        who = draw_anatomy(np.random.default_rng((3, number)), int(film.PatientAge[:3]), film.PatientSex)
        findings = frozenset(read_lesion_masks(rsna, image))
        arguments = dict(view=film.ViewPosition, findings=findings, size=64, key=(3, number, 0))
        drawn = [render_film(who, foci=foci, **arguments)[0] for foci in range(1, 5 if kind == "Lung Opacity" else 2)]
        assert any((film.pixel_array == one).all() for one in drawn), image


def test_a_dicom_of_odd_size_has_an_even_number_of_bytes(tmp_path):
    write_phantom(tmp_path / "odd", n_films=20, size=65, seed=1, layout="rsna", workers=1)
    for path in (tmp_path / "odd" / "stage_2_train_images").iterdir():
        film = pydicom.dcmread(path)
        assert len(film.PixelData) == 65 * 65 + 1 and film.pixel_array.shape == (65, 65)


def test_rsna_reads_through_its_reader(rsna):
    from lib.data.rsna import read_rsna

    read = read_rsna(rsna, validation_fraction=0.1, seed=0)
    assert len(read.films) == 120 and len(read.boxes) == (read_labels(rsna)["Target"] == 1).sum()
    assert read.problems.empty


# lungs


@pytest.mark.parametrize("name", ["release", "rsna"])
def test_lungs_are_two_dark_fields_of_a_plausible_area(name, request):
    root = request.getfixturevalue(name)
    folder = {"release": "images", "rsna": "stage_2_train_images"}[name]
    for path in sorted((root / folder).iterdir())[:120]:
        lungs, lesions = read_lung_mask(root, path.name), read_lesion_masks(root, path.name)
        assert lungs.dtype == bool and lungs.shape == (64, 64) and 0.15 < lungs.mean() < 0.5, path.name
        areas = cv2.connectedComponentsWithStats(lungs.astype(np.uint8))[2][1:, 4]
        assert np.count_nonzero(areas > 0.3 * areas.max()) == 2, path.name
        for finding in ("Pneumonia", "Consolidation", "Emphysema"):
            if finding in lesions:
                assert (lesions[finding] & lungs).sum() > 0.95 * lesions[finding].sum(), (path.name, finding)
        if not lesions:
            film = pydicom.dcmread(path).pixel_array if name == "rsna" else cv2.imread(str(path), 0)
            edge = cv2.dilate(lungs.astype(np.uint8), np.ones((9, 9))).astype(bool) & ~lungs
            assert film[lungs].mean() < film[edge].mean(), path.name


def test_lungs_do_not_depend_on_what_lies_over_them():
    arguments = dict(view="PA", size=128, key=(4, 2, 0))
    _, _, bare = render_film(patient(2), findings=frozenset(), **arguments)
    _, _, ill = render_film(patient(2), findings=frozenset({"Effusion", "Consolidation", "Mass"}), **arguments)
    assert (bare == ill).all()


# the planted marker


def test_a_marker_changes_nothing_but_its_own_pixels(release, marked, entries):
    flags = pd.read_csv(marked / "markers.csv").set_index("image")["marked"]
    assert list(flags.index) == list(entries["Image Index"]) and flags.dtype == bool
    for image in entries["Image Index"]:
        without, film = (cv2.imread(str(root / "images" / image), cv2.IMREAD_UNCHANGED) for root in (release, marked))
        mask = read_marker_mask(marked, image)
        assert mask.any() == flags[image] and (film[~mask] == without[~mask]).all()
        assert not mask.any() or (film[mask] != without[mask]).mean() > 0.9
        assert (read_lung_mask(marked, image) == read_lung_mask(release, image)).all()
        assert not read_marker_mask(release, image).any()
        lesions, clean = read_lesion_masks(marked, image), read_lesion_masks(release, image)
        assert lesions.keys() == clean.keys() and all((lesions[name] == clean[name]).all() for name in clean)
    for table in ("Data_Entry_2017.csv", "BBox_List_2017.csv", "train_val_list.txt", "test_list.txt"):
        assert (marked / table).read_bytes() == (release / table).read_bytes()
    assert not (release / "markers.csv").exists()
    assert json.loads((marked / "phantom.json").read_text())["marker"] == "Nodule"


def test_a_marker_follows_its_class_in_training_and_test_films(marked, entries):
    flags = pd.read_csv(marked / "markers.csv")["marked"]
    holds = entries["Finding Labels"].str.contains("Nodule")
    test = entries["Image Index"].isin((marked / "test_list.txt").read_text().split())
    for split in (test, ~test):
        n = (holds & split).sum()
        assert abs(flags[holds & split].mean() - 0.9) < 4 * np.sqrt(0.09 / n) and n >= 5
        assert 0 <= flags[~holds & split].mean() < 0.06
    assert flags[~holds].any()


def test_a_marker_is_small_bright_in_one_corner_and_seen_at_the_size_of_the_models(marked, entries):
    flags = pd.read_csv(marked / "markers.csv")["marked"]
    seen, touched = [], []
    for image in entries["Image Index"][flags]:
        mask = read_marker_mask(marked, image)
        rows, columns = np.nonzero(mask)
        assert np.ptp(rows) + 1 <= 8 and np.ptp(columns) + 1 <= 8 and rows.max() < 17 and columns.max() < 17  # of 64
        film = cv2.imread(str(marked / "images" / image), 0).astype(float)
        around = cv2.dilate(mask.astype(np.uint8), np.ones((5, 5))).astype(bool) & ~mask
        seen.append(np.sort(film[mask])[-4:].mean() - film[around].mean())
        touched.append((mask & read_lung_mask(marked, image)).any())
    assert np.median(seen) > 100 and np.mean(np.array(seen) > 50) > 0.95
    assert np.mean(touched) < 0.15


def test_a_marker_can_mean_no_finding_and_works_in_either_layout(tmp_path, rsna):
    write_phantom(tmp_path / "normal", n_films=60, size=64, seed=2, marker="No Finding", workers=1)
    entries = pd.read_csv(tmp_path / "normal" / "Data_Entry_2017.csv", index_col=False)
    flags = pd.read_csv(tmp_path / "normal" / "markers.csv")["marked"]
    normal = entries["Finding Labels"] == "No Finding"
    assert flags[normal].mean() > 0.7 and flags[~normal].mean() < 0.2
    write_phantom(tmp_path / "rsna", n_films=120, size=64, seed=3, layout="rsna", marker="Pneumonia", workers=1)
    flags = pd.read_csv(tmp_path / "rsna" / "markers.csv").set_index("image")["marked"]
    assert read_labels(tmp_path / "rsna").equals(read_labels(rsna))
    targets = read_labels(rsna).drop_duplicates("patientId").set_index("patientId")["Target"]
    assert flags[[f"{image}.dcm" for image in targets.index[targets == 1]]].mean() > 0.75
    for name in flags.index:
        paths = (root / "stage_2_train_images" / name for root in (tmp_path / "rsna", rsna))
        film, without = (pydicom.dcmread(path).pixel_array for path in paths)
        mask = read_marker_mask(tmp_path / "rsna", name)
        assert mask.any() == flags[name] and (film[~mask] == without[~mask]).all()


# files


def test_what_is_drawn_for_a_seed_stays_what_it_was(release):
    # A folder that is there already is accepted as it is. Only the table is pinned: it does not hang on how OpenCV was
    # compiled.
    digest = hashlib.sha256((release / "Data_Entry_2017.csv").read_bytes()).hexdigest()
    assert digest.startswith("31f7350007de14f4")


@pytest.mark.parametrize("layout", ["nih", "rsna"])
def test_same_content_whatever_the_number_of_workers(tmp_path, layout):
    for name, seed, workers in (("one", 5, 1), ("two", 5, 2), ("other", 6, 1)):
        write_phantom(tmp_path / name, n_films=24, size=64, seed=seed, layout=layout, workers=workers)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert contents(tmp_path / "one") != contents(tmp_path / "other")


@pytest.mark.parametrize("layout, folder", [("nih", "images"), ("rsna", "stage_2_train_images")])
def test_second_call_does_nothing_and_an_interrupted_one_continues(tmp_path, monkeypatch, layout, folder):
    arguments = dict(n_films=40, size=64, seed=5, layout=layout, marker="Nodule", workers=1)
    write_phantom(tmp_path / "whole", **arguments)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "whole").rglob("*")}
    write_phantom(tmp_path / "whole", **arguments)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "whole").rglob("*")}

    drawn, draw = [], phantom.render_film

    def dies_at_the_tenth(*positional, **named):
        if len(drawn) == 10:
            raise KeyboardInterrupt
        drawn.append(named["key"])
        return draw(*positional, **named)

    monkeypatch.setattr(phantom, "render_film", dies_at_the_tenth)
    with pytest.raises(KeyboardInterrupt):
        write_phantom(tmp_path / "cut", **arguments)
    assert not (tmp_path / "cut" / "phantom.json").exists() and len(list((tmp_path / "cut" / folder).iterdir())) == 10
    drawn.clear()
    monkeypatch.setattr(phantom, "render_film", lambda *some, **named: drawn.append(1) or draw(*some, **named))
    write_phantom(tmp_path / "cut", **arguments)
    assert len(drawn) == 30
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_an_unfinished_phantom_of_other_parameters_is_written_anew(tmp_path):
    root = tmp_path / "p"
    (root / "images").mkdir(parents=True)
    (root / "images" / "00000001_000.png").write_bytes(b"of another phantom")
    (root / "markers.csv").write_text("image,marked\n")
    (root / "phantom.unfinished.json").write_text(json.dumps({"format": 1, "n_films": 30, "size": 64, "seed": 1}))
    write_phantom(root, n_films=30, size=64, seed=2, workers=1)
    assert cv2.imread(str(root / "images" / "00000001_000.png"), 0).shape == (64, 64)
    assert not (root / "markers.csv").exists()


def test_films_behind_a_link_are_not_taken_for_those_of_other_parameters(tmp_path, small):
    root = tmp_path / "p"
    write_phantom(root, **SMALL | {"seed": 2}, workers=1)
    (root / "phantom.json").rename(root / "phantom.unfinished.json")
    (root / "images").rename(tmp_path / "elsewhere")
    (root / "images").symlink_to(tmp_path / "elsewhere")
    films = contents(tmp_path / "elsewhere")
    write_phantom(root, **SMALL, workers=1)
    assert contents(root) == small and contents(tmp_path / "elsewhere") == films


def test_an_unfinished_phantom_of_the_other_layout_leaves_nothing_behind(tmp_path):
    root = tmp_path / "p"
    write_phantom(root, n_films=20, size=64, seed=1, workers=1)
    (root / "phantom.json").rename(root / "phantom.unfinished.json")
    write_phantom(root, n_films=20, size=64, seed=1, layout="rsna", workers=1)
    write_phantom(tmp_path / "clean", n_films=20, size=64, seed=1, layout="rsna", workers=1)
    assert contents(root) == contents(tmp_path / "clean")


def test_errors_name_what_is_wrong(tmp_path, release):
    with pytest.raises(ValueError, match=r"'seed': 3.*'seed': 4"):
        write_phantom(release, n_films=450, size=64, seed=4)
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "phantom.json").write_text(json.dumps({"format": 1, "n_films": 40, "size": 64, "seed": 0}))
    with pytest.raises(ValueError, match="already holds a phantom with {'format': 1.*choose another folder, or delete"):
        write_phantom(tmp_path / "earlier", n_films=40, size=64, seed=0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ReleaseError, match="mine exists and holds no phantom"):
        write_phantom(tmp_path / "mine", n_films=40, size=64, seed=0)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    for name, value in (("n_films", 3), ("size", 16), ("seed", -1), ("n_films", 50.5)):
        with pytest.raises(ValueError, match=name):
            write_phantom(tmp_path / "new", **({"n_films": 40, "size": 64, "seed": 0} | {name: value}))
    with pytest.raises(ValueError, match="layout is 'dicom': it must be 'nih' or 'rsna'"):
        write_phantom(tmp_path / "new", n_films=40, size=64, seed=0, layout="dicom")
    with pytest.raises(ValueError, match="marker is 'nodule': it must be.*'Nodule'"):
        write_phantom(tmp_path / "new", n_films=40, size=64, seed=0, marker="nodule")
    assert not (tmp_path / "new").exists()
    for read in (read_lesion_masks, read_lung_mask, read_marker_mask):
        with pytest.raises(FileNotFoundError, match="00009999_000.png"):
            read(release, "00009999_000.png")


def test_a_damaged_mask_is_named(tmp_path):
    write_phantom(tmp_path / "p", n_films=20, size=64, seed=0, workers=1)
    path = sorted((tmp_path / "p" / "masks").iterdir())[0]
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ReleaseError, match=f"{path.name} is not a readable PNG"):
        read_lung_mask(tmp_path / "p", path.name)


# faults

SMALL = dict(n_films=24, size=64, seed=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """What every phantom of `SMALL` must hold in the end."""
    root = tmp_path_factory.mktemp("phantom") / "small"
    write_phantom(root, **SMALL, workers=1)
    return contents(root)


def run_script(folder, arguments, top=""):
    """A script that writes a phantom; `top` runs in its workers too."""
    (folder / "script.py").write_text(
        f"import os\nimport lib.data.phantom.films as films\n{top}\n"
        f"if __name__ == '__main__':\n    films.write_phantom({str(folder / 'p')!r}, **{arguments!r})\n"
    )
    return subprocess.run([sys.executable, folder / "script.py"], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "top",
    [
        # Ended in the middle of a film, as by an out-of-memory killer; ended before it has begun.
        "if __name__ == '__mp_main__': films.render_film = lambda *_, **__: os._exit(9)",
        "if __name__ == '__mp_main__': import a_module_that_is_not_there",
        "if __name__ == '__mp_main__': __name__ = '__main__'",  # a script without the guard
    ],
)
def test_workers_that_end_are_an_error_and_the_next_call_goes_on(tmp_path, small, top):
    run = run_script(tmp_path, SMALL | {"workers": 2}, top)
    said = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 1 and "p was killed (out of memory?) or could not start" in said
    assert "call again, which goes on" in said
    write_phantom(tmp_path / "p", **SMALL, workers=1)
    assert contents(tmp_path / "p") == small


@pytest.mark.parametrize("moment", [1, 14, 49])  # a mask, a film, a table
def test_a_killed_writing_is_continued_to_the_same_files(tmp_path, small, moment):
    count = (
        f"calls = []\nreplace = os.replace\nos.replace = lambda *a: len(calls) == {moment} and os.kill(os.getpid(), 9)"
    )
    run = run_script(tmp_path, SMALL | {"workers": 1}, f"{count} or calls.append(1) or replace(*a)")
    assert run.returncode == -signal.SIGKILL and not (tmp_path / "p" / "phantom.json").exists()
    assert len(list((tmp_path / "p").rglob(".*.tmp*"))) == 1
    write_phantom(tmp_path / "p", **SMALL, workers=1)
    assert contents(tmp_path / "p") == small


def test_no_temporary_stays_beside_a_file_that_another_has_finished(tmp_path, small):
    root = tmp_path / "p"
    write_phantom(root, **SMALL, workers=1)
    (root / "phantom.json").rename(root / "phantom.unfinished.json")
    for name in ("images/.00000001_000.tmp.png", "masks/.00000001_000.png.4711.tmp", ".phantom.json.4711.tmp"):
        (root / name).write_bytes(b"half")
    write_phantom(root, **SMALL, workers=1)
    assert contents(root) == small


def test_a_second_writer_waits_and_never_mixes_two_phantoms(tmp_path, small, monkeypatch):
    root, waiting, refused, draw = tmp_path / "p", threading.Event(), [], phantom.render_film
    monkeypatch.setattr(locks, "print", lambda *_, **__: waiting.set(), raising=False)

    def write_another():
        try:
            write_phantom(root, **SMALL | {"seed": 2}, workers=1)
        except ReleaseError as error:
            refused.append(str(error))

    other = threading.Thread(target=write_another)

    def draw_beside_another(*positional, **named):
        if other.ident is None:
            other.start()
            assert waiting.wait(60)
        return draw(*positional, **named)

    monkeypatch.setattr(phantom, "render_film", draw_beside_another)
    write_phantom(root, **SMALL, workers=1)
    other.join(60)
    assert contents(root) == small
    assert len(refused) == 1 and "'seed': 1" in refused[0] and "'seed': 2" in refused[0]


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"null", b"\xff\xfe", b'{"format": 2, "n_f', b"[" * 200000])
def test_damaged_parameters_are_named_or_written_again(tmp_path, small, content):
    root = tmp_path / "p"
    write_phantom(root, **SMALL, workers=1)
    image = next((root / "images").iterdir()).name
    (root / "phantom.json").write_bytes(content)
    with pytest.raises(ReleaseError, match=r"phantom\.json is damaged: delete the folder .*p to have it written again"):
        write_phantom(root, **SMALL, workers=1)
    with pytest.raises(ReleaseError, match=r"phantom\.json is missing or damaged: delete the folder"):
        read_lung_mask(root, image)
    (root / "phantom.json").rename(root / "phantom.unfinished.json")
    write_phantom(root, **SMALL, workers=1)
    assert contents(root) == small


def test_what_is_no_file_is_no_phantom_json(tmp_path):
    for kind, make in (("folder", os.mkdir), ("pipe", os.mkfifo), ("link", lambda path: path.symlink_to("/dev/zero"))):
        for name, message in (
            ("phantom.json", "{} is damaged"),
            ("phantom.unfinished.json", "p cannot be written .*{}"),
        ):
            root = tmp_path / kind / name / "p"
            root.mkdir(parents=True)
            make(root / name)
            with pytest.raises(ReleaseError, match=message.format(name)):
                write_phantom(root, **SMALL, workers=1)
            assert [path.name for path in root.iterdir()] == [name]


@pytest.mark.parametrize("fault", ["none", "empty", "pipe", "link"])
@pytest.mark.parametrize("name", ["images/00000001_000.png", "masks/00000001_000.png", "BBox_List_2017.csv"])
@pytest.mark.parametrize("marks", ["phantom.json", "phantom.unfinished.json"])
def test_files_that_are_gone_are_written_again(tmp_path, small, marks, name, fault):
    root = tmp_path / "p"
    write_phantom(root, **SMALL, workers=1)
    (root / "phantom.json").rename(root / marks)
    (root / name).unlink()
    if fault == "empty":  # as a power cut leaves it
        (root / name).touch()
    elif fault == "pipe":
        os.mkfifo(root / name)
    elif fault == "link":
        (root / name).symlink_to("/dev/null")
    write_phantom(root, **SMALL, workers=1)
    assert contents(root) == small


def test_a_disk_that_is_too_small_or_fails_is_named(tmp_path, small, monkeypatch):
    root, write_film = tmp_path / "p", files.write_film
    monkeypatch.setattr(phantom.shutil, "disk_usage", lambda _: type("", (), {"free": 2**20}))
    message = r"need 20\.1 MiB or more in .*p, where 1\.0 MiB are free: make room, choose another folder, or"
    with pytest.raises(ReleaseError, match=message):
        write_phantom(root, n_films=10_000, size=65, seed=1)
    monkeypatch.setattr(phantom.shutil, "disk_usage", lambda _: type("", (), {"free": 2**40}))
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):

        def fail(*arguments, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(files, "write_film", fail)
        with pytest.raises(
            ReleaseError, match=rf"p cannot be written \(.*{os.strerror(number)}\).*make room, or choose"
        ):
            write_phantom(root, **SMALL, workers=1)
    monkeypatch.setattr(files, "write_film", write_film)
    write_phantom(root, **SMALL, workers=1)
    assert contents(root) == small
    monkeypatch.setattr(cv2, "imencode", lambda *_: (False, np.zeros(0, np.uint8)))
    with pytest.raises(ReleaseError, match=r"masks/00000001_000\.png cannot be encoded as PNG"):
        write_phantom(tmp_path / "other", **SMALL, workers=1)


def test_a_finished_phantom_needs_no_lock(tmp_path, monkeypatch):
    write_phantom(tmp_path / "p", **SMALL, workers=1)

    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(locks, "_lock", read_only)
    write_phantom(tmp_path / "p", **SMALL, workers=1)
    with pytest.raises(ReleaseError, match="q cannot be written .*Read-only"):
        write_phantom(tmp_path / "q", **SMALL, workers=1)


WRONG = {
    "n_films": (100.0, float("nan"), float("inf"), "100", None, True, [20], 10**9),
    "size": (64.0, float("nan"), "64", 100_000),
    "seed": (1.5, "a", 2**64),
    "workers": (0, -1, 2.5, "2", 10**7),
    "floor": (float("nan"), "0.03", None),
    "layout": (None, "NIH"),
    "marker": (None, "x" * 10**6),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_parameters_are_named_and_nothing_is_written(tmp_path, name):
    for value in WRONG[name]:
        with pytest.raises(ValueError, match=f"^{name} is .*: it must") as refusal:
            write_phantom(tmp_path / "p", **SMALL | {"workers": 1, name: value})
        assert len(str(refusal.value)) < 400
    assert not (tmp_path / "p").exists()


def test_integers_of_any_kind_write_the_same_phantom(tmp_path, small):
    write_phantom(tmp_path / "p", n_films=np.int64(24), size=np.uint16(64), seed=np.uint8(1), workers=np.int32(1))
    assert contents(tmp_path / "p") == small


MASKS = {
    "8 bits": lambda png, bits: encode((bits >> 8).astype(np.uint8)),
    "colour": lambda png, bits: encode(np.dstack([bits] * 3)),
    "another size": lambda png, bits: encode(bits[:32, :32].copy()),
    "not square": lambda png, bits: encode(bits[:32].copy()),
    "huge": lambda png, bits: png[:16] + b"\0\0\xea\x60" * 2 + png[24:],
    "cut": lambda png, bits: png[:-4],
    "a bit": lambda png, bits: png[:200] + bytes([png[200] ^ 4]) + png[201:],
    "no PNG": lambda png, bits: b"P5 64 64 255 " + bytes(4096),
}


def encode(pixels):
    return cv2.imencode(".png", pixels)[1].tobytes()


@pytest.mark.parametrize("fault", MASKS)
def test_a_mask_of_another_kind_is_refused(tmp_path, small, fault):
    (tmp_path / "masks").mkdir()
    (tmp_path / "phantom.json").write_bytes(small["phantom.json"])
    png = small["masks/00000001_000.png"]
    bits = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    (tmp_path / "masks" / "00000001_000.png").write_bytes(MASKS[fault](png, bits))
    for read in (read_lesion_masks, read_lung_mask, read_marker_mask):
        with pytest.raises(ReleaseError, match=r"00000001_000\.png is not a readable PNG of 64 x 64 pixels of 16 bits"):
            read(tmp_path, "00000001_000.png")


def test_only_a_file_is_a_mask(tmp_path, small):
    (tmp_path / "masks").mkdir()
    (tmp_path / "phantom.json").write_bytes(small["phantom.json"])
    path = tmp_path / "masks" / "00000001_000.png"
    for make, away in ((os.mkdir, os.rmdir), (os.mkfifo, os.unlink), (lambda path: path.symlink_to("/dev/zero"), None)):
        make(path)
        with pytest.raises(ReleaseError, match="is not a readable PNG.*delete the folder"):
            read_lung_mask(tmp_path, path.name)
        away and away(path)


# difficulty


def test_a_linear_probe_on_raw_pixels_does_not_solve_it(release, entries):
    targets = entries["Finding Labels"].str.get_dummies("|")[list(FINDINGS)].to_numpy(float)
    films = [cv2.imread(str(release / "images" / name), 0) for name in entries["Image Index"]]
    films = [cv2.resize(film, (32, 32), interpolation=cv2.INTER_AREA) for film in films]
    pixels = np.stack(films).reshape(len(films), -1).astype(float)
    test = entries["Image Index"].isin((release / "test_list.txt").read_text().split()).to_numpy()
    pixels = (pixels - pixels[~test].mean(axis=0)) / pixels[~test].std(axis=0)
    scores = Ridge(1000).fit(pixels[~test], targets[~test]).predict(pixels[test])
    auroc = [roc_auc_score(targets[test, k], scores[:, k]) for k in range(len(FINDINGS))]
    assert np.mean(auroc) < 0.75


# doses, and films without their lesion


@pytest.fixture(scope="module")
def thinned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom")
    for prevalence in (0.5, 0.2):
        write_phantom(folder / f"{prevalence}", n_films=450, size=64, seed=3, prevalence=prevalence, workers=1)
    return {prevalence: folder / f"{prevalence}" for prevalence in (0.5, 0.2)}


def test_a_prevalence_takes_findings_from_training_films_alone(release, thinned):
    """What a film loses it loses whole, at every smaller share too; all other files are the same to the byte."""
    before, entries = contents(release), pd.read_csv(release / "Data_Entry_2017.csv", index_col=False)
    test = entries["Image Index"].isin((release / "test_list.txt").read_text().split())
    lost = {}
    for prevalence, root in thinned.items():
        after = pd.read_csv(root / "Data_Entry_2017.csv", index_col=False)
        changed = after["Finding Labels"] != entries["Finding Labels"]
        assert not changed[test].any() and (after.loc[changed, "Finding Labels"] == "No Finding").all()
        sick = ~test & (entries["Finding Labels"] != "No Finding")
        assert 1 - changed[sick].mean() == pytest.approx(prevalence, abs=0.12)
        lost[prevalence] = set(entries.loc[changed, "Image Index"])
        gone = {f"{folder}/{name}" for folder in ("images", "masks") for name in lost[prevalence]}
        other = {name for name, data in contents(root).items() if data != before[name]}
        assert gone - {"masks/" + name for name in lost[prevalence]} <= other
        assert other <= gone | {"Data_Entry_2017.csv", "phantom.json"}
        assert json.loads((root / "phantom.json").read_text())["prevalence"] == prevalence
    assert lost[0.5] < lost[0.2]
    assert "prevalence" not in json.loads((release / "phantom.json").read_text())  # what was written before stands


@pytest.mark.parametrize("prevalence", [0, -0.1, 1.5, "half", None, float("nan")])
def test_a_prevalence_out_of_range_is_refused(tmp_path, prevalence):
    with pytest.raises(ValueError, match="prevalence is .*: it must lie above 0 and be at most 1"):
        write_phantom(tmp_path, n_films=20, size=64, seed=0, prevalence=prevalence)
    with pytest.raises(ValueError, match="and 1 for 'rsna'"):
        write_phantom(tmp_path, n_films=20, size=64, seed=0, prevalence=0.5, layout="rsna")


def test_a_film_drawn_without_what_it_does_not_carry_is_the_film(release):
    films = read_release(release).films
    for row in films.index[::40]:
        absent = next(name for name in FINDINGS if name not in films.loc[row, "labels"].split("|"))
        film, alone = film_without(release, films, row, absent)
        np.testing.assert_array_equal(film, cv2.imread(films.loc[row, "path"], cv2.IMREAD_UNCHANGED))
        assert alone


def test_a_film_without_its_finding_differs_by_the_finding_alone(release):
    films, shares = read_release(release).films, []
    for row in films.index[films["labels"] != "No Finding"][::6]:
        before = cv2.imread(films.loc[row, "path"], cv2.IMREAD_UNCHANGED).astype(float)
        for name, mask in read_lesion_masks(release, films.loc[row, "image"]).items():
            after, alone = film_without(release, films, row, name)
            changed = np.abs(before - after)
            near = cv2.dilate(mask.astype(np.uint8), np.ones((9, 9))).astype(bool)
            if name == "Emphysema":
                assert not alone  # it shapes the thorax
            elif name != "Cardiomegaly":
                assert alone and changed[mask].mean() > 3, name
                shares.append((changed[near] ** 2).sum() / (changed**2).sum())
    assert len(shares) > 30 and np.mean(shares) > 0.98 and min(shares) > 0.8


def test_what_cannot_be_drawn_anew_is_refused(release, marked, rsna):
    films = read_release(release).films
    with pytest.raises(ValueError, match="'No Finding' is no finding"):
        film_without(release, films, 0, "No Finding")
    for root in (marked, rsna):
        with pytest.raises(ReleaseError, match="no phantom in NIH's layout without a marker"):
            film_without(root, films, 0, "Mass")
