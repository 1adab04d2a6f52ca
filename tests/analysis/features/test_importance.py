from itertools import combinations

import numpy as np
import pytest
import torch

from lib.analysis.cam import channel_contributions, class_activation_maps
from lib.analysis.features.importance import (
    Importance,
    ImportanceMatrix,
    carriers,
    chance_overlap,
    combined_mask,
    confounder_candidates,
    correct_predictions,
    film_distances,
    overlap,
    participation,
    principal_by_reading,
    redundancy,
    robust_z,
    select_features,
    train_test_difference,
)
from tests.analysis.features import reference_integrated as reference
from tests.toys import draw


@pytest.fixture(scope="module")
def films():
    maps, weights, bias = draw((7, 5, 3, 4), 6), draw((3, 5), 7), draw((3,), 8)
    maps[:, 2] = 0  # a dead feature
    labels = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]])
    return maps, weights, bias, labels


@pytest.mark.parametrize("method", ["cam", "grad", "gradpp", "xgrad", "hires", "layer"])
def test_importance_matrices_equal_the_equations(films, method):
    maps, weights, bias, labels = films
    every, own = reference.importance(maps, weights, bias, labels, method)
    stream = ImportanceMatrix(["a", "b", "c"])
    for start in (0, 3, 6):
        stream.update(channel_contributions(maps[start : start + 3], weights, method), labels[start : start + 3])
    result = stream.result()
    np.testing.assert_allclose(result.all, every, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(result.own, own, rtol=1e-9, atol=1e-12)
    assert np.isnan(result.own[:, 2]).all() and not np.isnan(result.own[:, :2]).any()  # no film has the last class
    assert result.n.tolist() == [7, 7, 7] and result.n_own.tolist() == [4, 4, 0]
    # The sum over features is the mean total of the maps.
    totals = class_activation_maps(maps, weights, method).sum((2, 3)).mean(0)
    np.testing.assert_allclose(result.all.sum(0), totals, rtol=1e-9, atol=1e-12)


def test_importance_of_classes_sd_contrast_and_correct_films(films):
    maps, weights, bias, _ = films
    values = channel_contributions(maps, weights, "hires")
    logits = maps.mean((2, 3)) @ weights.T + bias
    targets = np.array([0, 1, 2, 0, 1, 2, 0])
    one, correct = ImportanceMatrix(["a", "b", "c"]), ImportanceMatrix(["a", "b", "c"])
    one.update(values, targets)
    kept = correct_predictions(logits, targets)
    assert (kept == (logits.argmax(1).numpy() == targets)[:, None]).all() and 0 < kept[:, 0].sum() < 7
    correct.update(values.float(), torch.as_tensor(targets), kept)
    result, right = one.result(), correct.result()
    np.testing.assert_allclose(result.sd, values.numpy().std(axis=0).T, atol=1e-12)
    for c in range(3):
        inside, outside = values[targets == c, c].mean(0), values[targets != c, c].mean(0)
        np.testing.assert_allclose(result.contrast[:, c], inside - outside, atol=1e-12)
        chosen = (targets == c) & kept[:, c]
        if chosen.any():
            np.testing.assert_allclose(right.own[:, c], values[chosen, c].mean(0), rtol=1e-5, atol=1e-6)
        else:
            assert np.isnan(right.own[:, c]).all()
        np.testing.assert_allclose(right.all[:, c], values[kept[:, c], c].mean(0), rtol=1e-5, atol=1e-6)
    assert (correct_predictions(logits, np.eye(3)[targets]) == ((logits.numpy() > 0) == np.eye(3)[targets])).all()


def test_importance_sums_in_float64():
    stream = ImportanceMatrix(["a"])
    stream.update(torch.full((1, 1, 1), 2.0**25), [0])
    for _ in range(7):
        stream.update(torch.ones(1, 1, 1), [0])
    assert stream.result().all[0, 0] == (2**25 + 7) / 8


def test_importance_refuses():
    stream = ImportanceMatrix(["Mass", "Hernia"])
    with pytest.raises(ValueError, match="no film has been seen"):
        stream.result()
    for contributions, targets, message in (
        (torch.zeros(2, 3, 4), [0, 1], r"\(B, 2, F\)"),
        (torch.zeros(2, 2, 4), [0, 2], r"classes 0\.\.1, got 2"),
        (torch.zeros(2, 2, 4), [0, 1, 1], "2 films come with 3 targets"),
        (torch.zeros(1, 2, 4), [[0, 3]], "labels 0 and 1"),
        (torch.tensor([[[0.0], [float("inf")]]]), [0], "'Hernia'.*feature 0"),
    ):
        with pytest.raises(ValueError, match=message):
            stream.update(contributions, targets)


@pytest.mark.parametrize("ratio", [0.001, 0.012, 0.05, 0.07, 0.29, 0.55, 1.0])
def test_top_features_with_ties(ratio):
    importance = np.random.default_rng(0).integers(-3, 4, (100, 3)).astype(float)
    importance[:, 2] = -1.0  # a column of ties, all negative
    mask = select_features(importance, ratio)
    for c in range(3):
        assert set(np.flatnonzero(mask[:, c])) == reference.top(importance[:, c], ratio)
    difference = np.abs(importance - importance.mean(axis=1, keepdims=True))
    other = select_features(importance, ratio, "abs_diff")
    for c in range(3):
        assert set(np.flatnonzero(other[:, c])) == reference.top(difference[:, c], ratio)
    if ratio == 0.012:
        assert (mask.sum(axis=0) == 2).all()  # 1.2 of 100 features: ceil, not round
    if ratio == 0.07:
        assert (mask.sum(axis=0) == 7).all() and np.flatnonzero(mask[:, 2]).tolist() == list(range(7))


def test_masks_of_classes_together():
    importance = np.array([[5, 0, 1.0], [1, 7, 2], [0, 3, 9], [2, 1, 0]])
    masks = select_features(importance, 0.25)
    assert combined_mask(masks).tolist() == [True, True, True, False]
    assert combined_mask(masks[:, :2]).tolist() == [False, True, False, False]  # two classes: the positive one's alone
    assert combined_mask(masks[:, :2], selected=0).tolist() == [True, False, False, False]
    importance[:, 1] = np.nan
    masks = select_features(importance, 0.25)
    assert not masks[:, 1].any() and combined_mask(masks).sum() == 2
    np.testing.assert_array_equal(
        select_features(importance, 0.25, "abs_diff")[:, [0, 2]],
        select_features(importance[:, [0, 2]], 0.25, "abs_diff"),
    )
    with pytest.raises(ValueError, match="selects no feature"):
        combined_mask(masks[:, :2], selected=1)
    with pytest.raises(ValueError, match="at least two with films"):
        select_features(importance[:, :2], 0.5, "abs_diff")
    for bad, ratio, message in (
        (importance, 0, "ratio"),
        (importance, 1.1, "ratio"),
        (np.array([[1.0], [np.nan]]), 0.5, "part of a column"),
        (np.array([[np.inf]]), 0.5, "infinite"),
        (np.zeros(3), 0.5, "importance matrix"),
    ):
        with pytest.raises(ValueError, match=message):
            select_features(bad, ratio)


def matrix_of(values, labels):
    stream = ImportanceMatrix([f"class {c}" for c in range(values.shape[1])])
    stream.update(values, labels)
    return stream.result()


def test_overfitting_shows_and_sampling_alone_does_not():
    generator = np.random.default_rng(1)
    mean = generator.normal(size=(1, 1, 40))
    train, test, memorised = (
        matrix_of(torch.tensor(mean + shift + generator.normal(size=(n, 1, 40))), np.ones((n, 1)))
        for n, shift in ((400, 0), (300, 0), (300, generator.normal(size=(1, 1, 40))))
    )
    same = train_test_difference(train, test, ["a"]).iloc[0]
    np.testing.assert_allclose(same["difference"], np.abs(train.all - test.all).sum() / np.abs(train.all).sum())
    np.testing.assert_allclose(same["correlation"], np.corrcoef(train.all[:, 0], test.all[:, 0])[0, 1])
    assert 0.7 < same["difference"] / same["by_chance"] < 1.4
    other = train_test_difference(train, memorised, ["a"]).iloc[0]
    assert other["difference"] > 5 * other["by_chance"] and other["correlation"] < same["correlation"]
    assert (same["n_train"], same["n_test"]) == (400, 300)
    nothing = Importance(np.zeros((40, 1)), np.zeros((40, 1)), np.zeros((40, 1)), np.array([3]), np.array([1]))
    assert train_test_difference(nothing, test, ["a"])[["difference", "correlation"]].isna().all(axis=None)


def test_a_planted_confounder_is_the_first_candidate():
    generator = np.random.default_rng(2)
    importance = generator.normal(0, 1, (60, 3))
    importance[17, 1], importance[17, [0, 2]] = 25, -0.5
    table = confounder_candidates(importance, ["a", "b", "c"], top=2)
    assert len(table) == 6
    first = table[table["class"] == "b"].iloc[0]
    assert first["feature"] == 17 and first["robust_z"] > 10 and first["selectivity"] == 1
    np.testing.assert_allclose(first["share"], 25 / np.maximum(importance[:, 1], 0).sum())
    assert table.loc[table["class"] != "b", "robust_z"].max() < 6
    importance[:, 0] = np.nan
    assert confounder_candidates(importance, ["a", "b", "c"])["class"].unique().tolist() == ["b", "c"]
    shared = np.array([[4.0, 1], [0, 3], [-1, -1]])
    np.testing.assert_allclose(confounder_candidates(shared, ["a", "b"], 1)["selectivity"], [1 / 1.25, 1])


def test_robust_z():
    values = np.array([1.0, 2, 3, 4, 100])
    np.testing.assert_allclose(robust_z(values), (values - 3) / 1.4826)
    sparse = np.array([0.0, 0, 0, 0, 5])  # MAD is 0
    np.testing.assert_allclose(robust_z(sparse), [0, 0, 0, 0, 5 / 1.2533])
    assert (robust_z(np.ones(4)) == 0).all()
    assert np.isnan(robust_z(np.full((3, 1), np.nan))).all()


def test_outlier_films_lie_far_from_their_class():
    generator = np.random.default_rng(3)
    values = generator.normal([5, 1, 0, 0], 0.1, (20, 2, 4))
    values[4, 0] = [0, 0, 6, 1]
    values[5] = 0
    labels = np.stack([np.ones(20), np.zeros(20)], axis=1)
    importance = matrix_of(torch.tensor(values), labels).own
    scores = film_distances(torch.tensor(values), labels, importance)
    assert np.nanargmax(scores[:, 0]) == 4 and np.isnan(scores[5, 0]) and np.isnan(scores[:, 1]).all()
    column = importance[:, 0]
    for film in (0, 4):
        vector = values[film, 0]
        np.testing.assert_allclose(
            scores[film, 0], 1 - vector @ column / np.sqrt((vector @ vector) * (column @ column)), rtol=1e-9, atol=1e-12
        )


def test_features_that_carry_a_class():
    importance = np.array(
        [[5.0, 1, 0, np.nan], [3, 1, -1, np.nan], [1, 1, -2, np.nan], [1, 1, 0, np.nan], [-9, 0, -1, np.nan]]
    )
    mask = carriers(importance)
    assert mask.sum(axis=0).tolist() == [2, 4, 0, 0] and np.flatnonzero(mask[:, 0]).tolist() == [
        0,
        1,
    ]  # 8 of 10 is 80 % exactly
    assert carriers(importance, 0.5)[:, 1].tolist() == [True, True, False, False, False]
    assert carriers(importance, 1.0).sum(axis=0).tolist() == [4, 4, 0, 0]
    np.testing.assert_allclose(participation(importance), [100 / 36, 4, np.nan, np.nan])
    np.testing.assert_allclose(
        overlap(mask), [[1, 0.5, 0, 0], [0.5, 1, 0, 0], [0, 0, np.nan, np.nan], [0, 0, np.nan, np.nan]]
    )


@pytest.mark.parametrize(("n", "k"), [(6, 2), (5, 3), (4, 4), (7, 1)])
def test_the_overlap_by_chance_is_the_mean_over_all_pairs_of_sets(n, k):
    sets = [set(one) for one in combinations(range(n), k)]
    every = [len(a & b) / len(a | b) for a in sets for b in sets]
    masks = np.arange(n)[:, None] < np.array([k, 0])  # a class without films selects nothing
    assert chance_overlap(masks) == pytest.approx(sum(every) / len(every), rel=1e-12)


def test_redundant_features():
    importance = np.array([[4.0, 0, np.nan], [-2, 1, np.nan], [0, 0, np.nan], [0.02, 0.001, np.nan]])
    np.testing.assert_allclose(redundancy(importance), [1, 1, 0, 0.005])
    assert np.argsort(redundancy(importance), kind="stable").tolist() == [2, 3, 0, 1]
    assert (redundancy(np.zeros((3, 2))) == 0).all()
    with pytest.raises(ValueError, match="no class has films"):
        redundancy(np.full((3, 1), np.nan))


def test_principal_features_by_each_reading():
    matrix = Importance(
        np.array([[9.0, 1], [1, 2], [0, 3], [2, 0]]),
        np.array([[1.0, np.nan], [5, np.nan], [4, np.nan], [2, np.nan]]),
        np.zeros((4, 2)),
        np.array([10, 10]),
        np.array([5, 0]),
    )
    tops = principal_by_reading(matrix, 0.25)
    assert list(tops) == ["eq. 3, all films", "eq. 4, films of the class", "contrast"]
    assert [np.flatnonzero(mask[:, 0]).tolist() for mask in tops.values()] == [[0], [1], [1]]
    assert tops["eq. 3, all films"][:, 1].tolist() == [False, False, True, False]
    assert not tops["contrast"][:, 1].any()  # no film of the class
