import numpy as np
import pandas as pd
import pytest

from lib.plan import judge, load_plan
from lib.tables import nam_lee_words

SCORES = ("empty", "hit", "auprc", "iou_tuned")


def means(shift=0.0):
    value = {"cam": 0.3, "lrp": 0.4, "rap": 0.2}
    rows = [
        (method, score, value[method] + shift, 0.1 if score in ("hit", "auprc") else np.nan)
        for score in SCORES
        for method in value
    ]
    return pd.DataFrame(rows, columns=["method", "score", "value", "chance"])


def effects():
    rows = [
        (f"{score}_{method}", sign * 0.1, *(sign * x for x in bounds))
        for method, sign, bounds in (("lrp", 1, (0.05, 0.15)), ("rap", -1, (np.nan, np.nan)))
        for score in SCORES
    ]
    return pd.DataFrame(rows, columns=["metric", "point", "low", "high"])


def judged(*rows):
    """Claims on pixel AUPRC by their effects: what `plan.judge` says of them, with the plan's own margin."""
    frame = pd.DataFrame(rows, columns=["claim", "point", "se"]).assign(task="multilabel", backbone="x", loss="bce")
    frame = frame.assign(df=40.0, seeds=False, n_patients=40, low=frame["point"] - 0.1, high=frame["point"] + 0.1)
    return judge(load_plan(), "smoke", frame)


def test_two_networks_beside_each_other():
    table = nam_lee_words.place_table(means(), means(-0.1))
    assert list(table.columns) == ["Empty maps", "Hit rate", "Pixel AUPRC", "IoU, tuned threshold"]
    assert table.index.tolist() == [
        f"{method}, {network}" for method in ("CAM", "LRP", "RAP") for network in ("chance", "this run", "untrained")
    ]
    np.testing.assert_allclose(table["Pixel AUPRC"], [0.1, 0.3, 0.2, 0.1, 0.4, 0.3, 0.1, 0.2, 0.1])
    assert np.isnan(table.loc["CAM, chance", "Empty maps"])


def test_relevance_against_cam_in_words():
    lrp, rap = nam_lee_words.place_sentences(means(), effects())
    assert lrp == (
        "**LRP against CAM, by place**: Empty maps 0.400 against 0.300 (+0.100 [0.050, 0.150]); Hit rate 0.400 against "
        "0.300 (+0.100 [0.050, 0.150]); Pixel AUPRC 0.400 against 0.300 (+0.100 [0.050, 0.150]); IoU, tuned threshold "
        "0.400 against 0.300 (+0.100 [0.050, 0.150])."
    )
    assert "Pixel AUPRC 0.200 against 0.300 (-0.100 [—, —])" in rap


def alike(*kinds):
    names = ["untrained", "another film", *kinds]
    rows = [(name, method, 0.1 * k, 0.2 * k) for k, name in enumerate(names) for method in ("cam", "lrp", "rap")]
    return pd.DataFrame(rows, columns=["against", "method", "rank", "abs_rank"])


def test_three_outcomes_of_a_lens():
    """Nothing is called a failure for an interval that holds 0, and another film's boxes have their say."""
    cells = [("cam_not_untrained", 0.2, 0.01), ("cam_not_anatomy", 0.1, 0.01)]
    cells += [("lrp_not_untrained", 0.2, 0.01), ("lrp_not_anatomy", 0.001, 0.005)]
    cells += [("rap_not_untrained", 0.02, 0.05), ("rap_not_anatomy", 0.2, 0.01)]
    cam, lrp, rap = nam_lee_words.lens_sentences(judged(*cells), alike("another seed", "another backbone"))
    assert cam.startswith(
        "**CAM sees what was learnt.** Pixel AUPRC over the untrained network +0.200 [0.100, 0.300], higher, on 40 "
        "patients; over another film's boxes +0.100 [0.000, 0.200], higher, on 40 patients. "
    )
    assert cam.endswith(
        "Rank correlation of its maps with those of the same network with every weight random (one draw) 0.00 (size "
        "0.00); that for another film 0.10 (size 0.20); another seed 0.20 (size 0.40); another backbone 0.30 (size "
        "0.60)."
    )
    assert (
        lrp.startswith("**LRP would FAIL by this run.**")
        and "another film's boxes +0.001 [-0.099, 0.101], equivalent (within 0.03)" in lrp
    )
    assert rap.startswith("**RAP is neither shown to see what was learnt nor to fail.**")
    bare = judged(*cells).set_index("claim").loc["rap_not_untrained"]
    assert f"+0.020 [-0.080, 0.120], undecided ({bare['detectable']:.3f} could have been shown)" in rap


def test_a_lens_that_is_worse_than_its_control_fails_and_one_alone_says_so():
    lower = judged(("rap_not_untrained", -0.2, 0.01), ("rap_not_anatomy", 0.0, 0.5))
    [rap] = nam_lee_words.lens_sentences(lower, alike().assign(rank=np.nan))
    assert (
        rap.startswith("**RAP would FAIL by this run.**")
        and "-0.200 [-0.300, -0.100], lower" in rap
        and "nan" not in rap
    )
    assert rap.endswith("repeatability and reproducibility are unknown.")


@pytest.mark.parametrize(
    ("stage", "name"),
    [("none", "trained"), ("head", "head"), ("trunk.denseblock2", "denseblock2"), ("trunk.28", "trunk.28")],
)
def test_stages_by_name(stage, name):
    assert nam_lee_words.stage_name(stage) == name
