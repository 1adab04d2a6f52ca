"""Label noise: as often wrong as NIH's, in the training films alone."""

from types import SimpleNamespace

import numpy as np
import pytest

from lib.data.noise import MEASURED, learnt_targets, measured_noise, noisy_targets
from lib.data.release import CLASSES, FINDINGS, NO_FINDING, shuffled_targets, task_targets
from lib.flat_yaml import ParameterError
from lib.params import IDENTITY, Study

MEMBERS = {name: [CLASSES.index(member) for member in members] for name, members in MEASURED.items()}
COLUMN = CLASSES.index(NO_FINDING)


def draw(n, share=0.06, seed=0):
    targets = (np.random.default_rng(seed).random((n, len(CLASSES))) < share).astype(np.uint8)
    targets[:, COLUMN] = ~np.delete(targets, COLUMN, axis=1).any(axis=1)
    return targets


def test_rates_are_those_of_the_adjudicated_films():
    noise = measured_noise()
    expected = {"Pneumothorax": (109 / 238, 4009 / 4138), "Nodule or mass": (256 / 605, 3572 / 3771)}
    expected |= {"Airspace opacity": (1102 / 2166, 1782 / 2210)}
    assert list(noise.index) == list(expected) == list(MEASURED) and (noise["n_films"] == 4376).all()
    for name, (sensitivity, specificity) in expected.items():
        assert noise.loc[name, "sensitivity"] == pytest.approx(sensitivity)
        assert noise.loc[name, "specificity"] == pytest.approx(specificity)


def test_labels_are_as_often_wrong_as_measured_and_no_others_are():
    targets, rows = draw(60000), np.arange(100, 59900)
    noisy = noisy_targets(targets, rows, seed=3)
    untouched = [CLASSES.index(name) for name in FINDINGS if not any(name in group for group in MEASURED.values())]
    assert len(untouched) == 6 and noisy.dtype == np.uint8
    np.testing.assert_array_equal(noisy[:, untouched], targets[:, untouched])
    np.testing.assert_array_equal(np.delete(noisy, rows, 0), np.delete(targets, rows, 0))
    for name, columns in MEMBERS.items():
        true, given = targets[rows][:, columns].any(1), noisy[rows][:, columns].any(1)
        rate, spread = measured_noise().loc[name], 4 / np.sqrt(true.sum())
        assert given[true].mean() == pytest.approx(rate["sensitivity"], abs=0.5 * spread)
        assert 1 - given[~true].mean() == pytest.approx(rate["specificity"], abs=0.01)
        kept = true & given
        np.testing.assert_array_equal(noisy[rows][kept][:, columns], targets[rows][kept][:, columns])
        assert (noisy[rows][~true][:, columns].sum(1) <= 1).all()  # one of a group is invented
    findings = np.delete(noisy[rows], COLUMN, axis=1)
    np.testing.assert_array_equal(noisy[rows][:, COLUMN], ~findings.any(axis=1))


def test_the_frequent_member_of_a_group_is_invented_as_often_as_it_is_frequent():
    targets = draw(40000, share=0.02)
    targets[np.random.default_rng(1).random(len(targets)) < 0.06, CLASSES.index("Infiltration")] = 1
    columns, rows = MEMBERS["Airspace opacity"], np.arange(len(targets))
    invented = noisy_targets(targets, rows, seed=0)[~targets[:, columns].any(1)][:, columns].sum(0)
    expected = targets[:, columns].sum(0) / targets[:, columns].sum()
    np.testing.assert_allclose(invented / invented.sum(), expected, atol=0.02)


def test_a_group_without_a_film_and_the_seed():
    targets = draw(400)
    targets[:, MEMBERS["Nodule or mass"]] = 0
    first, again, other = (noisy_targets(targets, np.arange(400), seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and first[:, MEMBERS["Nodule or mass"]].any()


@pytest.mark.parametrize("task", ["multilabel", "binary"])
@pytest.mark.parametrize("noise, shuffled", [(False, False), (True, False), (False, True), (True, True)])
def test_what_a_run_learns_is_noise_then_task_then_dealing_out(task, noise, shuffled):
    targets, rows = draw(300), np.arange(40, 240)
    run = SimpleNamespace(label_noise=noise, shuffle_labels=shuffled, seed=5, task=task, no_finding_output=True)
    expected, _ = task_targets(noisy_targets(targets, rows, 5) if noise else targets, task)
    expected = shuffled_targets(expected, rows, 5) if shuffled else expected
    learnt = learnt_targets(targets, rows, run)
    np.testing.assert_array_equal(learnt, expected)
    true, _ = task_targets(targets, task)
    np.testing.assert_array_equal(np.delete(learnt, rows, 0), np.delete(true, rows, 0))
    assert (learnt != true).any() == (noise or shuffled)


def test_noise_is_of_nihs_findings_and_makes_another_run():
    with pytest.raises(ValueError, match="label noise is known of NIH's 15 classes"):
        noisy_targets(np.zeros((5, 10), np.uint8), np.arange(5), 0)
    with pytest.raises(ParameterError, match="label_noise is known of NIH's findings.*digits"):
        Study.build({"release": "digits", "label_noise": True})
    assert {"label_noise", "phantom_prevalence"} <= set(IDENTITY)
    assert Study.build({}).label_noise is False and Study.build({}).phantom_prevalence == 1
