"""From the records of a study's runs to the effects of the claims: which file answers which claim."""

import numpy as np
import pandas as pd
import pytest

from lib import evidence, records, tables
from lib.analysis.alignment import scores
from lib.params import Study
from lib.plan import decide, judge, load_plan

CLASSES = ("Mass", "Nodule")
RUNS = ("multilabel-tdensenet-bce", "multilabel-tdensenet-wbce")
FILMS = pd.DataFrame({"image": [f"{k:02d}.png" for k in range(24)], "patient": [f"{k // 2}" for k in range(24)]})
PAIRS = FILMS.merge(pd.DataFrame({"class": CLASSES}), how="cross")


def aligned(rng, level):
    table = PAIRS.assign(**{name: rng.normal(level, 0.01, len(PAIRS)) for name in (*scores(), "iou_tuned", "empty")})
    return table.assign(**{f"{name}_other": rng.normal(0.1, 0.01, len(PAIRS)) for name in scores()})


def predicted(rng, shift):
    target = np.tile([0, 1, 1, 0], len(PAIRS) // 4)
    return PAIRS.assign(target=target, logit=target + shift + rng.normal(0, 0.3, len(PAIRS)))


def counted(rng, level):
    return FILMS.assign(disjoint=rng.normal(level, 0.1, 24), unique=rng.normal(level, 0.1, 24))


def write(study, name, seed, tables):
    for file, table in tables.items():
        records.write_table(table, study.run(name, seed).run_folder / f"{file}.parquet")


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study named as the plan's with made-up records: WBCE fills more of the box, untrained networks none."""
    monkeypatch.setenv("OUTPUTS", str(tmp_path))
    study, rng = Study(study="nih_part", runs=list(RUNS), seeds=[0, 1], n_replicates=20), np.random.default_rng(0)
    for seed in study.seeds:
        for name, level in zip(RUNS, (0.4, 0.8), strict=True):
            own = {"predictions": predicted(rng, level), "cam_alignment": aligned(rng, level)}
            write(study, name, seed, own | {"concepts": counted(rng, 10 * level)})
        blank = {"cam_alignment_untrained": aligned(rng, 0), "concepts_untrained": counted(rng, 0)}
        write(study, RUNS[0], seed, blank | {"concepts_other_film": counted(rng, 2)})
    return study


def gathered(study):
    plan = load_plan()
    found = evidence.gather(plan, study, n_replicates=20)
    return plan, found.set_index(["claim", "loss"])


def test_runs_are_set_against_bce_and_bce_against_its_controls(study):
    plan, found = gathered(study)
    points = found["point"]
    assert points["iobb_up", "wbce"] == pytest.approx(0.4, abs=0.02)
    assert points["disjoint_up", "wbce"] == pytest.approx(4, abs=0.3)
    assert points["probability_up", "wbce"] > 0.05
    assert points["cam_not_untrained", "bce"] == pytest.approx(0.4, abs=0.02)
    assert points["cam_not_anatomy", "bce"] == pytest.approx(0.3, abs=0.02)
    assert points["concepts_not_anatomy", "bce"] == pytest.approx(2, abs=0.3)
    assert set(found.index.get_level_values("loss")) == {"bce", "wbce"}
    # What no notebook has looked at is not judged, and said to be so.
    judged = judge(plan, study.study, found.reset_index())
    decided = decide(plan, judged, ["bce", "wbce"])
    assert decided["trunk_iobb"] == decided["cam_not_shuffled"] == decided["lrp_sharper"] == "not judged"
    assert decided["iobb_up"] == decided["cam_not_anatomy"] == "holds"


def test_shuffled_labels_are_a_control_where_that_study_has_been_made(study, monkeypatch):
    asked = study.model_copy(update={"shuffled_study": "nih_part_shuffled"})
    rng = np.random.default_rng(1)
    other = Study(study="nih_part_shuffled", runs=[RUNS[0]], n_replicates=20, shuffle_labels=True)
    monkeypatch.setattr(evidence, "load_study", lambda name, **given: other)
    assert "cam_not_shuffled" not in gathered(asked)[1].index
    write(other, RUNS[0], 0, {"cam_alignment": aligned(rng, 0.15), "concepts": counted(rng, 3)})
    _, found = gathered(asked)
    assert found["point"]["cam_not_shuffled", "bce"] == pytest.approx(0.25, abs=0.02)
    other = other.model_copy(update={"epochs": 99})
    with pytest.raises(records.RecordError, match="nih_part_shuffled is no control of nih_part: epochs differ"):
        gathered(asked)
    assert not found["seeds"]["cam_not_shuffled", "bce"] and found["seeds"]["cam_not_untrained", "bce"]


def test_the_parts_of_a_change_come_from_09(study):
    rng, asked = np.random.default_rng(2), study.model_copy(update={"trunk_and_head": [RUNS[0]]})
    level = {("bce", "bce"): 0.4, ("wbce", "bce"): 0.5, ("bce", "wbce"): 0.7, ("wbce", "wbce"): 0.8}
    level |= {("bce", "trained"): 0.4, ("wbce", "trained"): 0.8}
    for seed in asked.seeds:
        keys = [{"trunk": trunk, "head": head} for trunk, head in level]
        tables = {
            "trunk_head": [aligned(rng, value).assign(**key) for key, value in zip(keys, level.values())],
            "trunk_head_predictions": [predicted(rng, value).assign(**key) for key, value in zip(keys, level.values())],
            "prior_shift": [aligned(rng, 0.75).assign(shifted_to="wbce")],
            "prior_shift_predictions": [predicted(rng, 0.75).assign(shifted_to="wbce")],
        }
        write(asked, RUNS[0], seed, {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()})
    _, found = gathered(asked)
    points = found["point"]
    assert points["trunk_iobb", "wbce"] == pytest.approx(0.1, abs=0.02)
    assert points["head_iobb", "wbce"] == pytest.approx(0.3, abs=0.02)
    assert points["shift_gives_iobb", "wbce"] == pytest.approx(0.05, abs=0.02)
    assert {"trunk_probability", "trunk_auroc", "shift_gives_ior"} <= set(found.index.get_level_values("claim"))


def test_claims_about_lenses_come_from_06_and_07(study):
    rng = np.random.default_rng(3)
    asked = study.model_copy(update={"attribution": list(RUNS), "features": [RUNS[0]]})
    level = {"cam": 0.3, "lrp": 0.5, "rap": 0.1}
    for name, seed in [(name, seed) for name in RUNS for seed in asked.seeds]:
        placed = [aligned(rng, value).assign(method=method) for method, value in level.items()]
        bare = [aligned(rng, 0.2).assign(method=method) for method in level]
        write(asked, name, seed, {"place": pd.concat(placed), "place_untrained": pd.concat(bare)})
    for seed in asked.seeds:
        target, noise = np.arange(24) % 3 // 2, rng.normal(0, 0.1, 24)
        logit = target + noise
        films = FILMS.assign(target=target, logit=logit, logit_principal=-logit, individual_scale=-logit, raw_sum=logit)
        write(asked, RUNS[0], seed, {"feature_scores": films.assign(common_scale=logit, **{"class": "Mass"})})
    _, found = gathered(asked)
    points = found["point"]
    assert points["lrp_not_untrained", "bce"] == pytest.approx(0.3, abs=0.02)
    assert points["rap_not_anatomy", "bce"] == pytest.approx(0, abs=0.02)
    assert points["lrp_sharper", "wbce"] == pytest.approx(0.2, abs=0.02)
    assert points["common_scale", "bce"] == pytest.approx(2, abs=1e-6)
    assert points["principal_suffice", "bce"] == pytest.approx(-1, abs=1e-6)
    # Claims about a lens are about BCE's runs; and CAM's own maps are judged once, by 03's records.
    assert ("lrp_not_untrained", "wbce") not in found.index and not found.index.duplicated().any()


def test_a_run_that_was_not_looked_at_is_named(study):
    (study.run(RUNS[1], 1).run_folder / "concepts.parquet").unlink()
    with pytest.raises(records.RecordError, match="concepts.parquet is missing in multilabel-tdensenet-wbce/seed1"):
        evidence.gather(load_plan(), study, n_replicates=20)


def test_a_study_without_bce_has_no_controls_and_no_claims(study):
    alone = study.model_copy(update={"runs": [RUNS[1]]})
    alignment = records.read_runs(alone, "cam_alignment.parquet")
    assert evidence.controls(alone, alignment) == {}
    judged = judge(load_plan(), alone.study, evidence.gather(load_plan(), alone, n_replicates=20))
    assert judged.empty and tables.claim_table(judged).empty and tables.claim_sentences(judged) == []
