import numpy as np
import pandas as pd
import pytest

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


def differences():
    rows = [
        ("cam", "lrp", "auprc", 0.1, 0.05, 0.15),
        ("cam", "lrp", "hit", 0.1, -0.05, 0.15),
        ("cam", "rap", "auprc", -0.1, -0.15, -0.05),
        ("cam", "rap", "hit", -0.1, np.nan, np.nan),
        ("other_film", "cam", "auprc", 0.2, 0.1, 0.3),
        ("other_film", "lrp", "auprc", 0.0, -0.1, 0.1),
        ("other_film", "rap", "auprc", -0.2, -0.3, -0.1),
        ("other_film", "rap", "hit", 0.9, 0.8, 1.0),
    ]
    return pd.DataFrame(rows, columns=["against", "method", "score", "difference", "ci_low", "ci_high"])


def bar():
    rows = [
        ("cam", 0.2, 0.1, 0.3, 40, "passes", 0.05, "passes", "head", False),
        ("lrp", 0.01, -0.1, 0.1, 40, "fails", 0.72, "fails", "", True),
        ("rap", 0.01, np.nan, np.nan, 40, "unknown", np.nan, "unknown", "", False),
    ]
    columns = "method gain gain_low gain_high n untrained rank random forgotten fails".split()
    return pd.DataFrame(rows, columns=columns)


def test_two_networks_beside_each_other():
    table = nam_lee_words.place_table(means(), means(-0.1))
    assert list(table.columns) == ["Empty maps", "Hit rate", "Pixel AUPRC", "IoU, tuned threshold"]
    assert table.index.tolist() == [
        f"{method}, {network}" for method in ("CAM", "LRP", "RAP") for network in ("this run", "untrained")
    ] + ["chance"]
    np.testing.assert_allclose(table["Pixel AUPRC"], [0.3, 0.2, 0.4, 0.3, 0.2, 0.1, 0.1])
    assert np.isnan(table.loc["chance", "Empty maps"])


def test_relevance_against_cam_in_words():
    lrp, rap = nam_lee_words.place_sentences(means(), differences())
    assert lrp == (
        "**LRP against CAM, by place**: Pixel AUPRC 0.400 against 0.300 (+0.100 [0.050, 0.150]: higher); Hit rate "
        "0.400 against 0.300 (+0.100 [-0.050, 0.150]: not told apart)."
    )
    assert "(-0.100 [-0.150, -0.050]: lower)" in rap and "(-0.100 [—, —]: no interval)" in rap


def test_controls_in_words():
    likeness = pd.DataFrame(
        {"against": ["untrained", "another seed", "another backbone"], "method": "cam", "rank": [0.05, 0.8, 0.6]}
    )
    cam, lrp, rap = nam_lee_words.control_sentences(bar(), differences(), likeness)
    assert cam.startswith(
        "**CAM is not shown to fail.** Pixel AUPRC over the untrained network: +0.200 [0.100, 0.300], on "
    )
    assert (
        "40 pairs: it tells them apart. Over another film's boxes: +0.200 [0.100, 0.300], so it looks at this film."
        in cam
    )
    assert "0.05 with the trained network's (at most 0.5 once head is random): they depend on what was learnt." in cam
    assert cam.endswith("0.80 of another seed and 0.60 of another backbone, 0.05 of the untrained network.")
    assert lrp.startswith("**LRP FAILS.**") and "does not tell what was learnt from nothing learnt" in lrp
    assert "may be anatomy alone" in lrp and "(never below 0.5): they are pictures of the film" in lrp
    assert lrp.endswith("repeatability and reproducibility are unknown.")
    assert rap.startswith("**RAP is not shown to fail.**") and "no interval, so nothing is known" in rap
    assert "[—, —]" in rap and "No stable map of the random network" in rap and "nan" not in rap


@pytest.mark.parametrize(
    ("stage", "name"),
    [("none", "trained"), ("head", "head"), ("trunk.denseblock2", "denseblock2"), ("trunk.28", "trunk.28")],
)
def test_stages_by_name(stage, name):
    assert nam_lee_words.stage_name(stage) == name
