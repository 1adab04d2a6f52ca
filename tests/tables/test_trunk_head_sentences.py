"""Whose a change is, in words that follow from the numbers."""

import numpy as np
import pandas as pd
import pytest

from lib.analysis.changes import PARTS
from lib.tables.trunk_head import change_sentences, fit_sentences


def changes(metric="iobb", loss="wbce", reach=0.01, **points):
    frame = pd.DataFrame({"part": PARTS, "point": [points.get(part, 0.001) for part in PARTS]})
    return frame.assign(metric=metric, loss=loss, low=frame["point"] - reach, high=frame["point"] + reach)


@pytest.mark.parametrize(
    "points, whose",
    [
        ({"head": 0.2}, "told apart from 0: the head's;"),
        ({"trunk": -0.2}, "told apart from 0: the trunk's;"),
        ({"head": 0.2, "trunk": -0.2}, "told apart from 0: the head's and the trunk's;"),
        ({}, "neither told apart from 0;"),
    ],
)
def test_whose_the_change_is(points, whose):
    (sentence,) = change_sentences(changes(**points), "iobb")
    assert whose in sentence and sentence.startswith("**WBCE, IoBB**")


def test_what_the_constant_gives_and_what_it_leaves():
    (sentence,) = change_sentences(changes(trained=0.2, constant=0.15, rest=0.05), "iobb")
    assert "change it by +0.150 [0.140, 0.160], 75% of it" in sentence
    assert "by +0.050 [0.040, 0.060] (more than chance leaves)" in sentence
    (sentence,) = change_sentences(changes(constant=0.15), "iobb")  # of a change that may be 0 there is no share
    assert "%" not in sentence and "+0.001 [-0.009, 0.011] (not told apart from 0)" in sentence


@pytest.mark.parametrize(
    "points, parts, said",
    [
        ({"head": 0.2}, ["trunk"], "(told apart from 0: the head's; unknown of the trunk's; interaction"),
        ({}, ["trunk"], "(unknown of the trunk's; interaction"),
        ({}, ["trunk", "head"], "(unknown of the head's and the trunk's; interaction"),
        ({}, ["rest"], "(unknown whether that is chance)"),
    ],
)
def test_a_part_without_an_interval_is_unknown(points, parts, said):
    frame = changes(**points)
    frame.loc[frame["part"].isin(parts), ["low", "high"]] = np.nan
    assert said in change_sentences(frame, "iobb")[0]


def test_of_a_rival_that_is_undefined_there_is_no_share():
    frame = changes(trained=0.2)
    frame.loc[frame["part"] == "constant", ["point", "low", "high"]] = np.nan
    assert "change it by undefined; the trained run" in change_sentences(frame, "iobb")[0]


def test_what_a_head_can_learn_by_heart_is_counted_by_class():
    fits = pd.DataFrame({"gradient": [1e-6, 1e-3], "separated": [0, 2]})
    text = fit_sentences(fits, [30, 400, 5], 505, 100)
    assert "1 of 2 fits stopped" in text and "505 training films and 100 features" in text
    assert "2 of 3 classes have fewer positives (or negatives)" in text and "of up to 2 of them apart" in text
    assert "No head tells" in fit_sentences(fits.head(1), [200], 505, 100)


def test_every_loss_has_a_line_and_what_is_undefined_is_said():
    frame = pd.concat([changes(loss="focal"), changes(loss="wbce"), changes(metric="ior", loss="wbce")])
    frame.loc[frame["loss"] == "focal", ["point", "low", "high"]] = np.nan
    first, second = change_sentences(frame, "iobb")
    assert first.startswith("**Focal") and "the head's part is undefined" in first and second.startswith("**WBCE")
