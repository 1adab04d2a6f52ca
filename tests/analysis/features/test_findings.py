import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from lib.analysis.features import findings
from lib.analysis.features.consistency import activation_sums
from lib.analysis.features.survey import survey
from lib.analysis.statistics import patient_replicates
from tests.analysis.features import reference_integrated
from tests.analysis.features.small_study import CLASSES, ROWS, N, close, planted, view


@pytest.mark.parametrize("size", [1, 3])
def test_a_planted_odd_film_is_the_first_outlier(size):
    case, targets = planted()
    targets[ROWS[2]] = [0, 1]
    targets[ROWS[5]] = [0, 0]  # belongs to no class: no row
    importance = (
        survey(view(case, layer="trunk", targets=targets, classes=CLASSES[:2]), ROWS, ["grad"]).importance["grad"].own
    )
    table = findings.outliers(view(case, size, layer="trunk", targets=targets, classes=CLASSES[:2]), ROWS, importance)
    assert list(table) == ["row", "class", "distance", "logit"] and len(table) == N - 1
    assert (
        table.loc[0, "row"] == ROWS[4]
        and table.loc[0, "class"] == "a"
        and table.loc[0, "distance"] > 3 * table.loc[1, "distance"]
    )
    assert table["distance"].is_monotonic_decreasing and table["row"].dtype == np.int64
    logits = case.model(case.films).detach().numpy()
    for _, line in table.iterrows():
        n = ROWS.tolist().index(line["row"])
        label = CLASSES.index(line["class"])
        terms = (case.model.head.weight[label] * case.films[n].mean((1, 2))).detach().double().numpy()
        column = importance[:, label]
        np.testing.assert_allclose(
            line["distance"], 1 - terms @ column / np.sqrt((terms @ terms) * (column @ column)), atol=1e-6
        )
        np.testing.assert_allclose(line["logit"], logits[n, label], rtol=1e-5)


def test_no_film_of_any_class_gives_no_outlier():
    case, _ = planted()
    table = findings.outliers(
        view(case, layer="trunk", targets=np.zeros((40, 2)), classes=CLASSES[:2]), ROWS, np.ones((5, 2))
    )
    assert list(table) == ["row", "class", "distance", "logit"] and not len(table)


def test_responses_find_the_planted_film_and_place():
    case, _ = planted()
    mask = np.arange(5) == 3
    for size in (1, 3, N):
        rows, maps = findings.responses(view(case, size, layer="trunk"), ROWS, 0, mask, size=12, top=3)
        assert rows[0] == ROWS[4] and maps.shape == (3, 12, 12) and maps.dtype == np.float32
        totals = (0.8 / 36 * case.films[:, 3].sum((1, 2))).numpy()
        np.testing.assert_array_equal(rows, ROWS[np.argsort(-totals)[:3]])
        close(maps[0], reference_integrated.bilinear((0.8 / 36 * case.films[4, 3]).double().numpy(), 12))
        assert np.maximum(maps[0], 0)[0:4, 8:12].sum() > 0.7 * np.maximum(maps[0], 0).sum()
    rows, _ = findings.responses(
        view(case, layer="trunk"), ROWS, 1, mask, size=6, top=50
    )  # its weight for class 1 is negative
    assert len(rows) == N and rows[-1] == ROWS[4]
    dead, _ = findings.responses(view(case, layer="trunk"), ROWS, 1, np.zeros(5), size=6, top=4)
    np.testing.assert_array_equal(dead, ROWS[:4])  # ties: in the order of the films


def test_features_per_class_and_curve_equal_loops():
    importance = np.random.default_rng(3).normal(size=(20, 4))
    importance[:, 2] = np.nan  # a class without films
    importance[:, 3] = -1.0  # nothing positive
    names = [*CLASSES, "d"]
    table = findings.features_per_class(importance, names, 0.2)
    curve = findings.importance_curve(importance, names)
    tops = {c: reference_integrated.top(importance[:, c], 0.2) for c in (0, 1, 3)}
    assert table["class"].tolist() == names and list(curve) == ["class", "k", "share"] and len(curve) == 80
    for c in (0, 1, 3):
        others = [len(tops[c] & tops[o]) / len(tops[c] | tops[o]) for o in tops if o != c]
        np.testing.assert_allclose(table.loc[c, "overlap"], sum(others) / 2)
    assert 0 < table["overlap"].max() and np.isnan(table.loc[2, "overlap"])
    for c in (0, 1):
        positive = sorted((v for v in importance[:, c] if v > 0), reverse=True)
        shares = [sum(positive[:k]) / sum(positive) for k in range(1, 21)]
        np.testing.assert_allclose(curve.loc[curve["class"] == names[c], "share"], shares)
        assert curve.loc[curve["class"] == names[c], "k"].tolist() == list(range(1, 21))
        assert table.loc[c, "n_features80"] == next(k for k, share in enumerate(shares, 1) if share >= 0.8)
        np.testing.assert_allclose(table.loc[c, "participation"], sum(positive) ** 2 / sum(v**2 for v in positive))
    assert (
        curve.loc[curve["class"].isin(["c", "d"]), "share"].isna().all()
        and (table.loc[[2, 3], "n_features80"] == 0).all()
    )
    assert np.isnan(findings.features_per_class(importance[:, :1], names[:1], 0.2)["overlap"]).all()


def test_losses_are_compared_by_the_matrices_of_their_models():
    case, targets = planted()
    other = copy.deepcopy(case.model)
    other.head.weight.data *= -1
    seen, patients = view(case, layer="trunk", targets=targets, classes=["a", "b"]), np.arange(N) // 2
    models = {"bce": case.model, "focal": other}
    found, table = findings.features_of_losses(seen, ROWS, models, 0.4, patients, 40)
    own = survey(seen, ROWS, ["grad"]).importance["grad"].all
    np.testing.assert_array_equal(found["bce"], own)
    np.testing.assert_allclose(found["focal"], -own)
    assert table["loss"].tolist() == ["bce", "bce", "focal", "focal"] and table.index.tolist() == [0, 1, 2, 3]
    # Two of five features, twice: none, one or both shared, in 3, 6 and 1 of 10 cases.
    np.testing.assert_allclose(table["overlap_by_chance"], 0.6 * 1 / 3 + 0.1 * 1)
    for loss, part in table.groupby("loss"):
        expected = findings.features_per_class(found[loss], ["a", "b"], 0.4)
        same = part[list(expected)].reset_index(drop=True)
        pd.testing.assert_frame_equal(same, expected)
    columns = ["n_features80", "participation", "overlap"]
    draws = patient_replicates(patients, 40, 0)
    for loss, model in models.items():
        values = [(model.head.weight * film.mean((1, 2))).detach().double().numpy() for film in case.films]
        drawn = []
        for counts in draws.counts:
            films = [n for n in range(N) for _ in range(counts[patients[n]])]
            matrix = sum(values[n] for n in films).T / len(films)
            drawn.append(findings.features_per_class(matrix, ["a", "b"], 0.4)[columns].to_numpy())
        ends = np.percentile(drawn, [2.5, 97.5], axis=0)
        part = table[table["loss"] == loss]
        for side, expected in zip(("low", "high"), ends):
            np.testing.assert_allclose(part[[f"{column}_ci_{side}" for column in columns]], expected, rtol=1e-5)
    assert (table["participation_ci_low"] < table["participation_ci_high"]).sum() > 1
    _, plain = findings.features_of_losses(seen, ROWS, models, 0.4, patients, 0)
    assert plain.filter(like="_ci_").isna().all(axis=None) and plain[columns].equals(table[columns])


# ---- confounders


def confounded(n=240, shortcut=0, seed=0, lost=0.8):
    """Contributions (2, N, 4) of four classes that gain 1 on their own films, noise 0.3; of the class `shortcut` the
    share `lost` of that hangs on the covered place. Two films a patient; labels."""
    generator = np.random.default_rng(seed)
    targets = (generator.random((n, 4)) < 0.2).astype(int)
    whole = targets + 0.3 * generator.normal(size=(n, 4))
    covered = whole + 0.05 * generator.normal(size=(n, 4)) - 0.2  # the cover itself takes as much from every film
    if shortcut is not None:
        covered[:, shortcut] -= lost * targets[:, shortcut]
    return np.stack([whole, covered]), targets, np.arange(n) // 2


def loss_by_hand(contributions, targets, c, selected, films=None):
    films = range(len(targets)) if films is None else films
    films = [n for n in films if c == selected or not targets[n, selected]]
    contrast = []
    for values in contributions:
        inside = [values[n, c] for n in films if targets[n, c]]
        outside = [values[n, c] for n in films if not targets[n, c]]
        contrast.append(sum(inside) / len(inside) - sum(outside) / len(outside))
    return 1 - contrast[1] / contrast[0]


def test_a_planted_confounder_is_found_and_its_numbers_equal_loops():
    contributions, targets, patients = confounded(shortcut=2)
    names = ["a", "b", "c", "d"]
    found = findings.confounder_test(contributions, targets, names, 2, patients, 200, seed=3)
    losses = [loss_by_hand(contributions, targets, c, 2) for c in range(4)]
    others = {c: losses[c] for c in (0, 1, 3)}
    most = max(others, key=others.get)
    np.testing.assert_allclose(
        [found.share, found.control, found.excess], [losses[2], others[most], losses[2] - others[most]], rtol=1e-9
    )
    assert found.control_class == names[most] and found.found and 0.7 < found.share < 0.9 and found.control < 0.1
    draws, shares, excess = patient_replicates(patients, 200, 3), [], []
    for counts in draws.counts:
        films = np.repeat(np.arange(len(targets)), counts[draws.patient])
        one = [loss_by_hand(contributions, targets, c, 2, films) for c in range(4)]
        shares.append(one[2])
        excess.append(one[2] - max(one[0], one[1], one[3]))
    np.testing.assert_allclose([found.low, found.high], np.percentile(shares, [2.5, 97.5]), rtol=1e-9)
    np.testing.assert_allclose(found.excess_low, np.percentile(excess, 2.5), rtol=1e-9)


def test_no_confounder_is_found_where_none_is_or_in_another_class():
    found = []
    for seed in range(40):
        contributions, targets, patients = confounded(shortcut=None, seed=seed)
        found.append(findings.confounder_test(contributions, targets, list("abcd"), 0, patients, 200).found)
    assert sum(found) <= 2  # at most 2.5 % of the time for each single control
    contributions, targets, patients = confounded(shortcut=3)
    other = findings.confounder_test(contributions, targets, list("abcd"), 0, patients, 200)
    assert not other.found and other.control_class == "d" and other.control > 0.7 and other.excess_low < 0
    weak = findings.confounder_test(*confounded(shortcut=0, lost=0.02)[:2], list("abcd"), 0, patients, 200)
    assert not weak.found


def test_films_of_the_suspected_class_are_no_controls():
    contributions, targets, patients = confounded(shortcut=0)
    both = targets[:, 0] & targets[:, 1]
    assert both.sum() > 3
    contributions[1, both == 1, 1] -= 5  # they carry the marker, so covering costs them class b as well
    found = findings.confounder_test(contributions, targets, list("abcd"), 0, patients, 200)
    assert found.found and found.control < 0.1


def test_a_confounder_cannot_be_found_without_comparison_or_patients():
    contributions, targets, patients = confounded()
    with pytest.raises(ValueError, match="a is the only class"):
        findings.confounder_test(contributions[:, :, :1], targets[:, :1], ["a"], 0, patients)
    for sign in ([-1, 1, 1, 1], [1, -1, -1, -1]):  # the features of the class, or of all others, add nothing
        found = findings.confounder_test(contributions * sign, targets, list("abcd"), 0, patients, 100)
        assert not found.found and np.isnan([found.excess, found.excess_low]).all()
    without = targets.copy()
    without[:, 3] = 0  # a class without films is no control
    found = findings.confounder_test(contributions, without, list("abcd"), 0, patients, 100)
    assert found.found and found.control_class in "bc"
    one = findings.confounder_test(contributions, targets, list("abcd"), 0, np.where(targets[:, 0], -1, patients), 100)
    assert not one.found and np.isnan([one.low, one.high, one.excess_low]).all()  # one patient is no evidence


def test_marked_place_is_the_rectangle_of_all_marks():
    marks = np.zeros((3, 10, 10), bool)
    assert not findings.marked_place(marks, 4).any()
    marks[0, 1, 2], marks[2, 4, 3] = True, True
    place = np.zeros((10, 10), bool)
    place[1:5, 2:4] = True
    np.testing.assert_array_equal(findings.marked_place(marks, 10), place)
    small = np.zeros((5, 5), bool)
    small[0:3, 1:2] = True  # rows 0.5 to 2.5, columns 1 to 2
    np.testing.assert_array_equal(findings.marked_place(marks, 5), small)
    np.testing.assert_array_equal(findings.marked_place(marks, 30), np.kron(place, np.ones((3, 3), bool)))


@pytest.mark.parametrize("size", [1, 3])
def test_contributions_with_a_place_covered_equal_a_loop(size):
    case, _ = planted()
    place = np.zeros((6, 6), bool)
    place[0:2, 3:6] = True
    masks = np.array([[1, 0], [1, 1], [0, 1], [1, 0], [0, 0]], bool)
    found = findings.contributions_with_and_without(view(case, size, layer="trunk"), ROWS, masks, place)
    weights = case.model.head.weight.detach().double().numpy()
    for n, film in enumerate(case.films.double().numpy()):
        covered = film.copy()
        for f in range(5):
            covered[f][place] = film[f].mean()
        for k, shown in enumerate((film, covered)):
            expected = [sum(weights[c, f] * shown[f].mean() for f in range(5) if masks[f, c]) for c in range(2)]
            np.testing.assert_allclose(found[k, n], expected, rtol=1e-4, atol=1e-6)
    assert found[0, 4, 0] - found[1, 4, 0] > 5 * np.abs(found[0, :4] - found[1, :4]).max()


# ---- features that can go


def test_pruning_removes_what_matters_least_first():
    case, _ = planted()
    labels = np.zeros((40, 2), int)
    labels[ROWS] = targets = np.array([[0, 1], [1, 0], [1, 1], [0, 1], [1, 0], [0, 0], [1, 1]])
    importance = np.array([[0.9, 0.1], [0.2, 0.8], [0.05, -0.1], [0.7, np.nan], [0.3, 0.2]])
    importance[:, 1] = [0.1, 0.8, -0.1, 0.4, 0.2]
    table = findings.pruning(view(case, layer="trunk", targets=labels, classes=["a", "b"]), ROWS, importance, steps=5)
    assert table["n_removed"].tolist() == [0, 1, 2, 3, 4]
    order = sorted(range(5), key=lambda f: max(abs(importance[f, 0]) / 0.9, abs(importance[f, 1]) / 0.8))
    weights, pooled = case.model.head.weight.detach(), case.films.mean((2, 3))
    for removed, auroc in table.itertuples(index=False):
        kept = order[removed:]
        logits = (pooled[:, kept] @ weights[:, kept].T).numpy()
        expected = np.mean([roc_auc_score(targets[:, c], logits[:, c]) for c in range(2)])
        np.testing.assert_allclose(auroc, expected)
    some = findings.pruning(view(case, layer="trunk", targets=labels, classes=["a", "b"]), ROWS, importance, steps=3)
    assert some["n_removed"].tolist() == [0, 2, 4]


# ---- a control


@pytest.mark.parametrize("exclusive", [False, True])
def test_the_control_is_the_other_network_in_the_place_of_the_views_own(exclusive):
    case, _ = planted()
    case.model.head.weight.data[:] = torch.tensor([[1.0, -2, 0.5, 3, 1], [2.0, 1, -1, 0.5, -3]])
    other = copy.deepcopy(case.model)
    other.head.weight.data[:] = torch.tensor([[0.3, 2, -1, 0.1, 1], [1.0, -2, 2, 3, 0.2]])
    labels = np.zeros((40, 2), int)
    labels[ROWS] = [[0, 1], [1, 0], [1, 0], [0, 1], [1, 0], [0, 1], [1, 0]]
    seen = view(case, layer="trunk", targets=labels, classes=["a", "b"])
    patients = pd.Series([f"p{row // 3}" for row in range(40)])
    train, test = ROWS[:4], ROWS[2:]
    options = {"share": 0.4, "size": 6, "kind": "tanh", "bounds": "pixels", "exclusive": exclusive}
    sums, scores = findings.control(seen, other, train, test, 1, patients, 20, n_films=3, **options)
    pooled, weights = case.films.mean((2, 3)).double().numpy(), other.head.weight.detach().double().numpy()
    fewer = [0, 1, 3]  # three of four training films, spread evenly
    importance = (36 * pooled[fewer, :, None] * weights.T).mean(0)
    kept = sorted(reference_integrated.top(importance[:, 1], 0.4))  # of two exclusive classes the last one's, too
    logit = pooled[2:][:, kept] @ weights[1, kept]
    scores = scores.set_index("features")
    assert scores.loc["principal", "auroc"] == pytest.approx(roc_auc_score(labels[test][:, 1], logit))
    assert scores.loc["principal", "n_features"] == len(kept) and (scores["n"] == 5).all()
    assert ("accuracy" in scores) == exclusive
    whole = pooled[2:] @ weights[1]
    assert scores.loc["all", "auroc"] == pytest.approx(roc_auc_score(labels[test][:, 1], whole))
    assert set(sums["method"]) == {"grad", "gradpp"} and (sums["features"] == "all").all() and (sums["n"] == 5).all()
    raw = sums.set_index(["method", "scale"]).loc[("grad", "common_raw")]
    assert raw["pearson"] == pytest.approx(1, abs=1e-6)  # of its own logit
    own = survey(replace(seen, model=other), ROWS[fewer], ["grad"], size=6).scales()["grad"]
    expected = activation_sums(replace(seen, model=other), test, 1, {"grad": own}, 6)
    scaled = expected[expected["scale"] == "common_tanh"]
    tanh = sums.set_index(["method", "scale"]).loc[("grad", "common_tanh")]
    assert tanh["pearson"] == pytest.approx(np.corrcoef(scaled["activation"], scaled["logit"])[0, 1], abs=1e-9)


def test_a_confounder_in_its_place_equals_the_three_steps():
    case, _ = planted()
    labels = np.zeros((40, 2), int)
    labels[ROWS] = [[0, 1], [1, 0], [1, 0], [0, 1], [1, 0], [0, 1], [1, 0]]
    seen, patients = view(case, layer="trunk", targets=labels, classes=["a", "b"]), pd.Series(np.arange(40) // 2)
    marks = np.zeros((N, 6, 6), bool)
    marks[4, 0:2, 4:6] = True
    masks = np.array([[1, 0], [1, 1], [0, 1], [1, 0], [0, 0]], bool)
    found, area = findings.confounder_in_place(seen, ROWS, marks, masks, 0, patients, 6)
    place = findings.marked_place(marks, 6)
    sums = findings.contributions_with_and_without(seen, ROWS, masks, place)
    expected = findings.confounder_test(sums, labels[ROWS], ["a", "b"], 0, patients[ROWS])
    assert area == 4 / 36 and repr(found) == repr(expected)
