"""Trunk and head: the refit against scikit-learn and against its own optimality, heads against networks."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_info
from torch import nn

from lib.analysis.alignment import align
from lib.analysis.inference import LensError, Output, is_pooled
from lib.analysis.trunk_head import (
    align_heads,
    odds_shift,
    on_cpu,
    pooled_features,
    predict_heads,
    prior_shift,
    refit_heads,
    require_losses,
    with_head,
)
from lib.losses import Criterion, make_loss

RUN = SimpleNamespace(alpha=0.25, gamma=2.0, beta=0.999, wbce_scheme="paper", wbce_counts="train", cb_scale="global")


def data(n=400, f=6, m=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, f)) * np.array([3, 1, 1, 0.2, 0.05, 0.01])[:f] + rng.normal(size=f)
    logits = x @ rng.normal(size=(f, m)) - 1.5
    return x, (rng.random((n, m)) < expit(logits)).astype(float)


def criterion(loss, y):
    return make_loss(loss, y.sum(0), len(y) - y.sum(0), RUN)


def refit_head(x, y, criterion, **options):
    return refit_heads(x, y, {"it": criterion}, **options)["it"]


def test_bce_against_scikit_learn():
    """Of n films and m classes, our mean plus decay / 2 |w|^2 is sklearn's sum with C = 1 / (n m decay)."""
    x, y = data()
    decay = 1e-3
    found = refit_head(x, y, criterion("bce", y), weight_decay=decay)
    for column in range(y.shape[1]):
        # sklearn leaves the intercept out of the penalty: as a feature of its own it is in.
        ones = np.hstack([x, np.ones((len(x), 1))])
        options = {"C": 1 / (decay * y.size), "fit_intercept": False, "tol": 1e-12, "max_iter": 20000}
        weight = LogisticRegression(**options).fit(ones, y[:, column]).coef_[0]
        np.testing.assert_allclose(found.head.weight[column].numpy(), weight[:-1], atol=2e-4)
        assert found.head.bias[column].item() == pytest.approx(weight[-1], abs=2e-4)


@pytest.mark.parametrize("loss", ["bce", "wbce", "focal", "cb_focal"])
def test_the_gradient_of_every_objective_vanishes_at_the_end(loss):
    x, y = data(seed=1)
    found = refit_head(x, y, criterion(loss, y), weight_decay=1e-4)
    assert found.gradient < 1e-5
    weight, bias = (part.double().requires_grad_() for part in (found.head.weight, found.head.bias))

    def objective(scale):
        w, b = scale * weight, scale * bias
        value = criterion(loss, y)(torch.from_numpy(x) @ w.T + b, torch.from_numpy(y)).mean()
        return value + 1e-4 / 2 * (w.square().sum() + b.square().sum())

    assert objective(1).item() == pytest.approx(found.objective, rel=1e-6)
    assert objective(1) < min(objective(0), objective(0.9), objective(1.1))
    slopes = torch.autograd.grad(objective(1), (weight, bias))
    assert max(slope.abs().max() for slope in slopes) < 1e-5


def test_a_separable_class_and_a_dead_feature_have_a_solution_all_the_same():
    x, y = data()
    x[:, 2] = 0.7  # constant
    y[:, 0] = x[:, 0] > 0.5
    found = refit_head(x, y, criterion("bce", y), weight_decay=1e-4)
    assert torch.isfinite(found.head.weight).all() and found.gradient < 1e-4
    assert abs(found.head.weight[0, 2]) < abs(found.head.weight[0, 0])


@pytest.mark.parametrize("loss", ["bce", "wbce", "focal", "cb_focal"])
def test_fewer_films_than_features_converge_too(loss):
    """Every class can be told apart then, and the weight decay alone bounds the weights."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(60, 90)) * np.logspace(0.5, -2.5, 90)
    y = (x @ rng.normal(size=(90, 3)) > 1).astype(float)
    found = refit_head(x, y, criterion(loss, y), weight_decay=1e-6, max_iterations=500)
    assert found.gradient < 2e-6
    logits = x @ found.head.weight.double().numpy().T + found.head.bias.double().numpy()
    assert ((logits > 0) == y).all()


def test_classes_learnt_by_heart_are_counted():
    x, y = data(seed=6)
    y[:, 1] = x[:, 0] > 1
    y[:, 2] = 0  # nothing to tell apart
    criteria = {loss: criterion("bce", y) for loss in ("bce", "again")}
    assert [found.separated for found in refit_heads(x, y, criteria, weight_decay=1e-8).values()] == [1, 1]
    wide = np.random.default_rng(0).normal(size=(50, 60))
    assert refit_head(wide, y[:50, :1], criterion("bce", y[:50, :1]), weight_decay=1e-6).separated == 1


def test_small_fits_run_in_one_thread_and_the_caller_keeps_its_own():
    """BLAS and OpenMP alike: eigh of 512 features waits eight seconds for its threads where others have the cores."""
    (x, y), before, seen = data(), torch.get_num_threads(), []

    def watched(logits, targets):
        seen.append(max(torch.get_num_threads(), *(pool["num_threads"] for pool in threadpool_info())))
        if len(seen) > 3:
            raise RuntimeError("stop")
        return criterion("bce", y)(logits, targets)

    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="stop"):
            refit_head(x, y, watched, weight_decay=1e-4)
        assert seen == [1] * 4 and torch.get_num_threads() == 2
        refit_head(x, y, criterion("bce", y), weight_decay=1e-4, max_iterations=3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_features_that_are_all_dead_leave_the_bias():
    x, y = np.zeros((40, 4)), np.repeat([[1, 0], [0, 0], [0, 1], [0, 0]], 10, axis=0)
    found = refit_head(x, y, criterion("bce", y), weight_decay=1e-9)
    assert not found.head.weight.any()
    np.testing.assert_allclose(found.head.bias.numpy(), np.log([1 / 3, 1 / 3]), atol=1e-5)


def test_heads_do_not_depend_on_those_beside_them():
    x, y = data(seed=5)
    criteria = {loss: criterion(loss, y) for loss in ("bce", "focal")}
    for name, found in refit_heads(x, y, criteria, weight_decay=1e-4).items():
        alone = refit_head(x, y, criteria[name], weight_decay=1e-4)
        torch.testing.assert_close(found.head.weight, alone.head.weight, rtol=0, atol=0)
        assert found[1:] == alone[1:]


def test_arrays_that_do_not_fit_are_refused():
    x, y = data()
    with pytest.raises(ValueError, match=r"features \(N, F\)"):
        refit_head(x[:-1], y, criterion("bce", y), weight_decay=1e-4)
    x[3, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        refit_head(x, y, criterion("bce", y), weight_decay=1e-4)


def output(seed=0):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(5, 6, 4, 4, generator=generator)
    head = nn.Linear(6, 3)
    return Output(np.arange(5), head(maps.mean((2, 3))), {"trunk": maps}), head


def test_an_output_with_another_head_has_that_heads_logits_and_the_same_maps():
    old, _ = output()
    head = nn.Linear(6, 3)
    new = with_head(old, "trunk", head)
    assert new.maps is old.maps and is_pooled(new, "trunk", head)
    np.testing.assert_allclose(pooled_features([old], "trunk"), old.maps["trunk"].double().mean((2, 3)).numpy())


def pairs(n=5):
    corners = [np.array([[2.0 * i, 3, 2 * i + 9, 14]]) for i in range(n)]
    given = {"row": range(n), "image": [f"{i}.png" for i in range(n)], "patient": range(n), "class": "Mass"}
    return pd.DataFrame(given | {"output": [i % 3 for i in range(n)], "n_boxes": 1, "boxes": corners})


def test_maps_of_heads_are_read_with_their_bias():
    """Their mean over the positions is then the logit, and a bias that empties a map empties it."""
    trunk, _ = output(1)
    heads = {name: nn.Linear(6, 3).requires_grad_(False) for name in ("one", "far below")}
    heads["one"].bias += 0.7
    heads["far below"].bias -= 100
    before = {name: head.bias.clone() for name, head in heads.items()}
    found = align_heads(on_cpu([trunk]), pairs(), heads, layer="trunk", image_size=32)
    assert list(found["head"]) == ["one"] * 5 + ["far below"] * 5
    for name, head in heads.items():
        mine = found[found["head"] == name]
        logits = head(trunk.maps["trunk"].mean((2, 3))).detach().numpy()
        np.testing.assert_allclose(mine["logit"], logits[range(5), np.arange(5) % 3], rtol=1e-5)
        maps = torch.einsum("mk,nkhw->nmhw", head.weight, trunk.maps["trunk"]) + head.bias[:, None, None]
        empty = (maps[range(5), np.arange(5) % 3].flatten(1) <= 0).all(1)
        np.testing.assert_array_equal(mine["empty"], empty.float().numpy())
        torch.testing.assert_close(head.bias, before[name], rtol=0, atol=0)  # the caller's head is left alone
    # Without the bias the maps are other maps, but in the same order.
    own = align([with_head(trunk, "trunk", heads["one"])], pairs(), heads["one"], layer="trunk", image_size=32)
    signed = ["iobb_minmax", "ior_minmax", "hit", "auprc", "iou_tuned"]
    np.testing.assert_allclose(own[signed], found[signed][:5], atol=1e-5)
    assert not np.allclose(own["iobb"], found["iobb"][:5], atol=1e-3)


def test_predictions_of_heads_are_records():
    trunk, head = output(2)
    features, classes = pooled_features([trunk], "trunk"), ["Mass", "Edema", "Hernia"]
    films = pd.DataFrame({"image": list("abcde"), "patient": [3, 3, 1, 2, 2], "path": "x"}, index=[7, 2, 9, 4, 5])
    targets = np.arange(15).reshape(5, 3) % 2
    found = predict_heads(features, films, targets, classes, {"its own": head, "other": nn.Linear(6, 3)})
    assert list(found) == ["image", "patient", "class", "target", "logit", "head"] and len(found) == 30
    own = found[found["head"] == "its own"]
    assert own["logit"].dtype == np.float32
    for i, j in np.ndindex(5, 3):
        (row,) = own[(own["image"] == films["image"].iloc[i]) & (own["class"] == classes[j])].itertuples()
        assert row.logit == pytest.approx(trunk.logits[i, j].item(), abs=1e-5)
        assert (row.target, row.patient) == (targets[i, j], films["patient"].iloc[i])


def test_the_closed_shift_moves_the_optimum_as_the_weights_do():
    """The head of the weighted loss on features that say nothing: log-odds of the weighted counts, BCE's plus the
    shift."""
    y = np.repeat([[1, 0], [1, 1], [0, 1], [0, 0], [0, 0], [0, 0], [1, 0]], 10, axis=0)
    weighted, plain = (
        refit_head(np.zeros((70, 2)), y, criterion(loss, y), weight_decay=1e-9) for loss in ("wbce", "bce")
    )
    shift = odds_shift(criterion("wbce", y).constants)
    np.testing.assert_allclose(shift, np.log((70 - y.sum(0)) / y.sum(0)))
    np.testing.assert_allclose(weighted.head.bias.numpy() - plain.head.bias.numpy(), shift, atol=1e-4)
    np.testing.assert_array_equal(odds_shift(criterion("bce", y).constants), 0)


def test_losses_without_a_closed_shift():
    y = data()[1]
    batch = SimpleNamespace(**{**vars(RUN), "wbce_counts": "batch"})
    assert all(odds_shift(criterion(loss, y).constants) is None for loss in ("focal", "cb_focal"))
    assert odds_shift(make_loss("wbce", y.sum(0), len(y) - y.sum(0), batch).constants) is None
    assert odds_shift(Criterion(lambda logits, targets: logits).constants) is None
    with pytest.warns(UserWarning, match="one label"):
        assert odds_shift(make_loss("wbce", [5, 0], [5, 10], RUN).constants) is None


def test_a_run_with_nothing_to_compare_is_refused_in_one_sentence():
    require_losses(["bce", "focal"], "binary-tdensenet-bce")
    for losses, run, way in (
        (["bce"], "binary-tdensenet-bce", "train binary-tdensenet-wbce"),
        (["bce", "focal"], "multilabel-resnet50-focal", "-p loss bce"),
    ):
        with pytest.raises(LensError, match=way) as refused:
            require_losses(losses, run)
        assert str(refused.value).startswith(run) or run in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_prior_shift_gives_the_other_runs_mean_probability():
    rng = np.random.default_rng(2)
    logits, other = rng.normal(-4, 2, (300, 3)), expit(rng.normal(1, 3, (300, 3)))
    shift = prior_shift(logits, other)
    np.testing.assert_allclose(expit(logits + shift).mean(0), other.mean(0), atol=1e-9)
    # A run whose logits are the same but for a constant gives that constant, whatever the targets.
    np.testing.assert_allclose(prior_shift(logits, expit(logits + [0.3, -5, 7])), [0.3, -5, 7], atol=1e-7)


def test_a_prior_shift_that_no_constant_gives_is_refused():
    with pytest.raises(ValueError, match="class 1 has a mean probability"):
        prior_shift(np.zeros((4, 2)), np.array([[0.5, 0.0]] * 4))
    with pytest.raises(ValueError, match="two arrays"):
        prior_shift(np.zeros((4, 2)), np.zeros((4, 3)))
