"""The laboratory: its doses, films without their lesions, and what is measured and kept of a run."""

import cv2
import numpy as np
import pandas as pd
import pytest
import yaml

from lib import laboratory, records
from lib.analysis.alignment import align
from lib.analysis.dissection.concepts import dissect
from lib.data.noise import learnt_targets
from lib.data.phantom.films import film_without
from lib.params import ROOT, load_study
from lib.runs import OpenStudy
from lib.training import train
from lib.workflow import jobs_of


@pytest.fixture(scope="module")
def trained():
    """One run of either dose of smoke_dose."""
    studies = laboratory.doses(OpenStudy(load_study("smoke_dose")))
    for one in studies:
        train(one.study.every_run[0])
    return studies


@pytest.fixture(scope="module")
def films(trained):
    return laboratory.lesion_pairs(trained[0].subject("multilabel-small_cnn-bce"))


@pytest.mark.parametrize("name", ["dose", "smoke_dose"])
def test_the_doses_differ_in_the_doses_alone(name):
    """What a flat file cannot share is held together here."""
    files = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "params" / "studies").glob("*.yaml")}
    main = files[name]
    own = {"study", "phantom_prevalence", "label_noise", "laboratory", "companions"}
    doses = {(main["phantom_prevalence"], main["label_noise"])}
    for other in main["companions"]:
        assert {key for key in main.keys() | files[other].keys() if main.get(key) != files[other].get(key)} <= own
        doses.add((files[other]["phantom_prevalence"], files[other]["label_noise"]))
    assert len(doses) == 1 + len(main["companions"])
    if name == "dose":
        assert doses == {(share, noise) for share in (1.0, 0.3, 0.1) for noise in (False, True)}
        assert len(main["seeds"]) >= 3 and len(main["runs"]) == 4 and main["checkpoint"] == "last"


def test_10_is_made_of_the_study_that_asks_for_it_and_trains_nothing_itself():
    assert list(jobs_of(load_study("dose"))) == [("data", "", 0), ("laboratory", "", 0)]
    assert list(jobs_of(load_study("dose_noise"))) == [("data", "", 0)]


def test_other_runs_than_the_files_are_a_laboratory_of_their_own():
    study = load_study("smoke_dose")
    assert [one.study.study for one in laboratory.doses(OpenStudy(study))] == ["smoke_dose", "smoke_dose_noise"]
    assert [one.study.study for one in laboratory.doses(OpenStudy(study, {"runs"}))] == ["smoke_dose"]


def test_a_dose_counts_the_true_labels_of_the_training_films(trained):
    for one in trained:
        labels, dose = one.films.loc[one.rows("train"), "labels"].str.split("|"), laboratory.dose_of(one)
        counts = labels.explode().value_counts().drop("No Finding").reindex(one.release.classes).drop("No Finding")
        counts = counts.fillna(0)
        assert dose["films"] == len(labels) and dose["positives"] == counts.median()
        assert dose["ratio"] == ((len(labels) - counts) / counts.clip(lower=1)).median()
    assert [laboratory.dose_of(one)["noise"] for one in trained] == [False, True]


def test_a_run_learns_from_wrong_labels_and_weighs_by_them(trained):
    for one, wrong in zip(trained, (False, True), strict=True):
        run, rows = one.study.every_run[0], one.rows("train")
        learnt = learnt_targets(one.release.targets, rows, run)[rows]
        record = records.read_json(run.run_folder / "run.json")
        assert record["n_positive_train"] == learnt.sum(0, dtype=int).tolist()
        assert (learnt != one.release.targets[rows]).any() == wrong
        np.testing.assert_array_equal(one.subject(run).targets, one.release.targets)  # what it is judged by


def test_pairs_are_those_whose_film_can_be_had_without_the_lesion(trained, films):
    pairs, lesions, without = films
    data = trained[0]
    subject = data.subject("multilabel-small_cnn-bce")
    kept = set(zip(pairs["row"], pairs["class"], strict=True))
    for _, pair in subject.pairs.iterrows():
        row, name = pair["row"], pair["class"]
        (masks,) = data.truth("lesions", [row])
        x1, y1, x2, y2 = (pair["boxes"] * 64 / subject.run.image_size).T
        box = np.s_[int(y1.min()) : int(np.ceil(y2.max())), int(x1.min()) : int(np.ceil(x2.max()))]
        shared = any(mask[box].any() for other, mask in masks.items() if other != name)
        alone = film_without(data.study.release_folder, data.films, row, name)[1]
        assert (alone and not shared) == ((row, name) in kept)
    assert 10 < len(kept) == len(pairs) == len(lesions) == len(without) < len(subject.pairs)
    size = subject.store.size
    for row, lesion, film in zip(pairs["row"], lesions, without, strict=True):
        near = cv2.dilate(lesion.astype(np.uint8), np.ones((11, 11)))
        near = cv2.resize(near, (size, size), interpolation=cv2.INTER_AREA) > 0
        changed = np.abs(subject.store.images[row].astype(int) - film)
        assert changed.any() and (changed[near] ** 2).sum() > 0.8 * (changed**2).sum()


def test_what_is_measured_is_what_the_lenses_measure(trained, films):
    subject = trained[0].subject("multilabel-small_cnn-bce")
    found = laboratory.measure(subject, *films).set_index("metric")["value"]
    pairs, (layer, q), size = subject.pairs, subject.dissection, subject.run.image_size
    options = {"layer": layer, "image_size": size}
    aligned = align(subject.outputs(pairs["row"].unique(), layer), pairs, subject.model.head, **options)
    for name in ("iobb", "hit", "auprc", "empty", "iobb_minmax"):
        assert found[name] == pytest.approx(aligned[name].mean(), nan_ok=True), name
    boxes = dict(zip(subject.regions["row"], subject.regions["boxes"], strict=True))
    counts = dissect(subject.outputs(list(boxes), layer), boxes, q=q, **options).counts
    assert found["unique"] == (counts > 0).sum(1).mean() and found["disjoint"] == counts.sum(1).mean()
    assert 0 <= found["survive"] <= 1 and found["concepts"] > 0 and 0.3 < found["auroc"] < 0.8


def test_a_lesion_that_stays_moves_nothing(trained, films):
    pairs, lesions, without = films
    subject = trained[0].subject("multilabel-small_cnn-bce")
    same = subject.store.images[pairs["row"]]
    _, present, absent = laboratory.dissected(subject, pairs, lesions, same)
    np.testing.assert_allclose(present.activation, absent.activation, atol=1e-6)
    assert (present.counted == absent.counted).mean() > 0.999  # batches of other sizes round otherwise
    _, present, absent = laboratory.dissected(subject, pairs, lesions, without)
    assert (present.counted != absent.counted).any() and np.abs(present.activation - absent.activation).max() > 1e-3


def test_what_was_measured_stands_as_long_as_weights_and_code_do(trained, films, monkeypatch):
    subject, measured = trained[0].subject("multilabel-small_cnn-bce"), []
    monkeypatch.setattr(
        laboratory, "measure", lambda *a: measured.append(a) or pd.DataFrame({"metric": ["x"], "value": [0.1]})
    )
    first = laboratory.measured(subject, *films)
    again = laboratory.measured(subject, *films)
    pd.testing.assert_frame_equal(first, again)
    assert len(measured) == 1
    other = subject.run.model_copy(update={"dissection_quantile": 0.05})
    assert laboratory._code(other) != laboratory._code(subject.run) == laboratory._code(subject.run.model_copy())
    monkeypatch.setattr(laboratory, "_code", lambda run: "other")
    laboratory.measured(subject, *films)
    assert len(measured) == 2
    path = subject.path("laboratory.csv")
    records.write_table(records.read_table(path).assign(of="other weights"), path)
    laboratory.measured(subject, *films)
    assert len(measured) == 3
