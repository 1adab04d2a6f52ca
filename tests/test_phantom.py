"""The simulated release: layout, label statistics, patients, masks and boxes, determinism, resumption, difficulty, errors."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

from lib.data import phantom
from lib.data.anatomy import Scene, draw_anatomy
from lib.data.nih import CLASSES, FINDINGS
from lib.data.phantom import label_sets, read_lesion_masks, write_phantom
from lib.data.signs import SIGNS, render_film

NIH_FILMS = 112120


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom") / "release"
    write_phantom(root, n_films=450, size=64, seed=3, workers=1)
    return root


@pytest.fixture(scope="module")
def entries(release):
    return pd.read_csv(release / "Data_Entry_2017.csv", index_col=False)


def read_boxes(root):
    boxes = pd.read_csv(root / "BBox_List_2017.csv").iloc[:, :6]
    return boxes.set_axis(["image", "class", "x", "y", "w", "h"], axis=1)


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


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
    # a follow-up film repeats the set before it, so counts vary more than independent ones: (1 + STAY) / (1 - STAY) bounds the variance
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
    assert (
        entries["Image Index"] == [f"{p:08d}_{f:03d}.png" for p, f in zip(entries["Patient ID"], entries["Follow-up #"], strict=True)]
    ).all()
    assert set("|".join(entries["Finding Labels"]).split("|")) == set(CLASSES)
    assert set(entries["View Position"]) == {"PA", "AP"} and set(entries["Patient Gender"]) == {"M", "F"}
    assert sorted(path.name for path in (release / "images").iterdir()) == sorted(entries["Image Index"])
    film = cv2.imread(str(release / "images" / entries["Image Index"][0]), cv2.IMREAD_UNCHANGED)
    assert film.dtype == np.uint8 and film.shape == (64, 64)
    assert json.loads((release / "phantom.json").read_text())["n_films"] == 450
    assert not list(release.rglob("*.tmp")) and not (release / "phantom.unfinished.json").exists()


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
    assert (boxes[["x", "y"]] >= 0).all(axis=None) and (boxes["x"] + boxes["w"] <= 1024).all() and (boxes["y"] + boxes["h"] <= 1024).all()
    for image, name, x, y, w, h in boxes.itertuples(index=False):
        mask = read_lesion_masks(release, image)[name.replace("Infiltrate", "Infiltration")]
        full = cv2.resize(mask.astype(np.uint8), (1024, 1024), interpolation=cv2.INTER_NEAREST)
        inside = full[round(y) : round(y + h), round(x) : round(x + w)]
        assert inside.any(), (image, name)
        assert inside.sum() >= 0.3 * full.sum() or name in ("Nodule", "Infiltrate", "Atelectasis")
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        assert rows[-1] - rows[0] > 0.75 * h and columns[-1] - columns[0] > 0.75 * w, (image, name)  # tight, with the looseness of a hand


@pytest.mark.parametrize("finding", SIGNS)
def test_a_finding_changes_the_film_mainly_inside_its_mask(finding):
    for number in range(4):
        arguments = dict(view="PA", size=128, key=(7, number, 0))
        without, _ = render_film(patient(number), findings=frozenset(), **arguments)
        film, masks = render_film(patient(number), findings=frozenset({finding}), **arguments)
        near = cv2.dilate(masks[finding].astype(np.uint8), np.ones((5, 5))).astype(bool)
        change = np.abs(film.astype(float) - without)
        assert masks[finding].any() and change[near].sum() > 0.7 * change.sum(), (finding, number)
        assert change[masks[finding]].mean() > 8, (finding, number)


def test_findings_leave_each_other_alone():
    arguments = dict(view="AP", size=96, key=(1, 2, 3))
    _, alone = render_film(patient(5), findings=frozenset({"Nodule"}), **arguments)
    _, both = render_film(patient(5), findings=frozenset({"Nodule", "Effusion"}), **arguments)
    assert (alone["Nodule"] == both["Nodule"]).all()


def test_signs_have_their_defining_measures():
    for number in range(8):
        arguments = dict(size=256, view="PA", key=(0, number, 0))
        _, masks = render_film(patient(number), findings=frozenset({"Cardiomegaly", "Mass", "Nodule"}), **arguments)
        thorax = 2 * patient(number).width * 256
        assert np.ptp(np.nonzero(masks["Cardiomegaly"])[1]) / thorax > 0.5  # over 0.55 before the film is turned and scaled (0.8 to 1.1)
        _, _, mass, _ = cv2.connectedComponentsWithStats(masks["Mass"].astype(np.uint8))
        _, _, nodules, _ = cv2.connectedComponentsWithStats(masks["Nodule"].astype(np.uint8))
        single = np.pi * (0.029 * 1.1 * 256) ** 2
        assert np.median(nodules[1:, 4]) <= 2.1 * single and mass[1:, 4].max() > single
    normal = Scene(patient(0), 256)
    heart, lungs = np.nonzero(normal.heart)[1], np.nonzero(normal.lung)[1]
    assert np.ptp(heart) / np.ptp(lungs) < 0.5
    assert normal.heart[:, 128:].sum() > normal.heart[:, :128].sum()  # the apex is on the image right


def test_films_of_a_patient_share_anatomy_but_not_pixels():
    films = [render_film(patient(1), view="PA", findings=frozenset(), size=96, key=(0, 1, k))[0].astype(float) for k in range(3)]
    assert np.abs(films[0] - films[1]).mean() > 2
    assert replace(patient(1)) == patient(1) != patient(2)
    assert patient(1, "F").breast > 0 == patient(1).breast


# files


def test_same_content_whatever_the_number_of_workers(tmp_path):
    for name, workers in (("one", 1), ("two", 2)):
        write_phantom(tmp_path / name, n_films=40, size=64, seed=5, workers=workers)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    write_phantom(tmp_path / "other", n_films=40, size=64, seed=6, workers=1)
    assert contents(tmp_path / "one") != contents(tmp_path / "other")


def test_second_call_does_nothing_and_an_interrupted_one_continues(tmp_path, monkeypatch):
    arguments = dict(n_films=40, size=64, seed=5, workers=1)
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
    assert not (tmp_path / "cut" / "phantom.json").exists() and len(list((tmp_path / "cut" / "images").iterdir())) == 10
    drawn.clear()
    monkeypatch.setattr(phantom, "render_film", lambda *positional, **named: drawn.append(1) or draw(*positional, **named))
    write_phantom(tmp_path / "cut", **arguments)
    assert len(drawn) == 30
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_an_unfinished_phantom_of_other_parameters_is_written_anew(tmp_path):
    root = tmp_path / "p"
    (root / "images").mkdir(parents=True)
    (root / "images" / "00000001_000.png").write_bytes(b"of another phantom")
    (root / "phantom.unfinished.json").write_text(json.dumps({"format": 1, "n_films": 30, "size": 64, "seed": 1}))
    write_phantom(root, n_films=30, size=64, seed=2, workers=1)
    assert cv2.imread(str(root / "images" / "00000001_000.png"), 0).shape == (64, 64)


def test_errors_name_what_is_wrong(tmp_path, release):
    with pytest.raises(ValueError, match=r"'seed': 3.*'seed': 4"):
        write_phantom(release, n_films=450, size=64, seed=4)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="mine"):
        write_phantom(tmp_path / "mine", n_films=40, size=64, seed=0)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    for name, value in (("n_films", 3), ("size", 16), ("seed", -1), ("n_films", 50.5)):
        with pytest.raises(ValueError, match=name):
            write_phantom(tmp_path / "new", **({"n_films": 40, "size": 64, "seed": 0} | {name: value}))
    assert not (tmp_path / "new").exists()
    with pytest.raises(FileNotFoundError, match="00009999_000.png"):
        read_lesion_masks(release, "00009999_000.png")


# difficulty


def test_a_linear_probe_on_raw_pixels_does_not_solve_it(tmp_path):
    root = tmp_path / "probe"
    write_phantom(root, n_films=600, size=64, seed=0, workers=1)
    entries = pd.read_csv(root / "Data_Entry_2017.csv", index_col=False)
    targets = entries["Finding Labels"].str.get_dummies("|")[list(FINDINGS)].to_numpy(float)
    films = [cv2.imread(str(root / "images" / name), 0) for name in entries["Image Index"]]
    pixels = np.stack([cv2.resize(film, (32, 32), interpolation=cv2.INTER_AREA).ravel() for film in films]).astype(float)
    test = entries["Image Index"].isin((root / "test_list.txt").read_text().split()).to_numpy()
    pixels = (pixels - pixels[~test].mean(axis=0)) / pixels[~test].std(axis=0)
    scores = Ridge(1000).fit(pixels[~test], targets[~test]).predict(pixels[test])
    auroc = [roc_auc_score(targets[test, k], scores[:, k]) for k in range(len(FINDINGS))]
    assert np.mean(auroc) < 0.75
