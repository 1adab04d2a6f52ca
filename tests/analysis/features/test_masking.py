import copy
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from lib.analysis.cam import class_activation_maps, normalise
from lib.analysis.features import masking
from lib.analysis.features.masking import increase_and_drop, masked_films, masked_layer, masked_logits
from lib.analysis.features.survey import GRADIENT
from tests.analysis.features import reference_features
from tests.analysis.features import reference_integrated as reference
from tests.analysis.features.small_study import METHODS, ROWS, N, close, principal, study, view
from tests.toys import MapsThenTokens, bare, draw, make


@pytest.fixture(scope="module")
def net():
    return make(MapsThenTokens)


@torch.no_grad()
def test_masked_layer_continues_the_forward_pass(net):
    films = draw((2, 3, 8, 8), 5)
    logits = net(films)
    for layer, n, axis in (("middle", 6, 1), ("act", 6, 1), ("tokens", 5, -1), ("tokens", 5, 2)):
        with masked_layer(net, layer, np.ones(n, dtype=bool), axis):
            torch.testing.assert_close(net(films), logits, rtol=0, atol=0)
    keep = np.array([0, 1, 0, 0, 1, 0])
    other = copy.deepcopy(net)
    other.middle.weight[keep == 0] = 0
    other.middle.bias[keep == 0] = 0
    with masked_layer(net, "middle", keep):
        torch.testing.assert_close(net(films), other(films))
    with masked_layer(net, "tokens", [False, False, True, False, False], -1):
        pooled = net.tokens(net.act(net.middle(net.first(films))).flatten(2).transpose(1, 2)).mean(1)
        torch.testing.assert_close(net(films), pooled[:, 2:3] @ net.head.weight[:, 2:3].T + net.head.bias)
    assert net(films).equal(logits)  # the hook is gone


def test_masked_layer_refuses(net):
    films = draw((1, 3, 8, 8), 5)
    for layer, mask, message in (
        ("missing", np.ones(6), "no module 'missing'; there are first"),
        ("middle", np.ones(5), r"\(1, 6, 4, 4\).*no 5 features"),
        ("middle", np.full(6, 0.5), "0 and 1"),
        ("middle", np.ones((2, 6)), "one entry a feature"),
        ("unused", np.ones(6), "no forward pass went through layer 'unused'"),
    ):
        with pytest.raises(ValueError, match=message):
            with masked_layer(net, layer, mask):
                net(films)
    with pytest.raises(KeyError):  # an error of the caller is not covered up
        with masked_layer(net, "unused", np.ones(6)):
            raise KeyError
    assert not net.middle._forward_hooks and not net.unused._forward_hooks


def test_masked_logits_of_all_one_and_other_features():
    maps, head = draw((4, 6, 3, 3), 6), nn.Linear(6, 3).double()
    pooled, weights, bias = maps.mean((2, 3)), head.weight.detach(), head.bias.detach()
    torch.testing.assert_close(masked_logits(pooled, weights, bias, np.ones(6)), head(pooled).detach())
    one = np.arange(6) == 4
    torch.testing.assert_close(masked_logits(pooled, weights, bias, one), pooled[:, 4:5] * weights[:, 4] + bias)
    parts = masked_logits(pooled, weights, bias, one) + masked_logits(pooled, weights, bias, ~one) - bias
    torch.testing.assert_close(parts, head(pooled).detach())
    by_class = np.arange(18).reshape(3, 6) % 2 == np.array([[0], [1], [0]])
    mine = masked_logits(pooled, weights, bias, by_class)
    for c in range(3):
        torch.testing.assert_close(mine[:, c], masked_logits(pooled, weights, bias, by_class[c])[:, c])
    # The sum of the selected features' map is what the mask leaves of the logit.
    raw = class_activation_maps(maps, weights, "hires", torch.as_tensor(by_class))
    torch.testing.assert_close(raw.sum((2, 3)), mine - bias)
    for bad in (np.ones(5), np.full(6, 2)):
        with pytest.raises(ValueError, match="mask"):
            masked_logits(pooled, weights, bias, bad)
    with pytest.raises(ValueError, match="pooled features"):
        masked_logits(maps, weights, bias, one)


def test_masked_films():
    films, raw = draw((3, 2, 6, 6), 7), draw((3, 3, 3), 8)
    raw[2] = 1.0
    masked = masked_films(films, raw)
    for n in range(3):
        native = np.maximum(raw[n].numpy(), 0)
        unit = (native - native.min()) / (np.ptp(native) or 1)
        mask = reference.bilinear(unit, 6)
        np.testing.assert_allclose(masked[n], films[n].numpy() * mask, atol=1e-12)
        np.testing.assert_allclose(
            masked_films(films, raw, threshold=0.4)[n], films[n].numpy() * mask * (mask >= 0.4), atol=1e-12
        )
    assert not masked[2].any()
    signed = masked_films(torch.ones(1, 1, 3, 3), raw[:1].float(), rectify=False)
    torch.testing.assert_close(signed[0], normalise(raw[:1].float(), rectify=False))
    with pytest.raises(ValueError, match="one map"):
        masked_films(films, raw[:2])


def test_increase_and_drop():
    generator = np.random.default_rng(0)
    y, o = generator.uniform(size=(2, 200))
    y[:4], o[:4] = [0, 0, 0.5, 1], [0.3, 0, 0.5, 0]
    found = increase_and_drop(y, o)
    np.testing.assert_allclose(found[:2], reference.increase_and_drop(y, o))
    assert found.n == 200 and found.n_zero == 2
    assert increase_and_drop([0.5, 0.8], [0.25, 1.0]) == (50, 25, 2, 0)
    nothing = increase_and_drop([0.0], [0.1])
    assert nothing.increase == 100 and np.isnan(nothing.drop)
    for bad, message in (
        ([1.5, 0.1], "original: film 0 has 1.5"),
        ([0.2, np.nan], "film 1"),
        ([0.2], "two confidences"),
        ([], "two confidences"),
    ):
        with pytest.raises(ValueError, match=message):
            increase_and_drop(bad, [0.1, 0.1] if len(bad) else [])


def test_masking_effect_equals_a_loop(case):
    table = masking.masking_effect(view(case), ROWS, 1, METHODS, features=principal(case))
    assert list(table) == ["method", "features", "metric", "value", "n", "n_zero"] and len(table) == 8
    found = table.set_index(["method", "features", "metric"])
    for method in METHODS:
        for label, mask in (("all", 1.0), ("principal", principal(case)[method].astype(float)[:, None, None])):
            before, after = [], []
            for film, weighted in zip(case.films.double(), case.weighted[method][:, 1]):
                before.append(reference_features.confidence(case.double, film, 1))
                masked = reference_features.masked_film(film, (weighted * mask).sum(0))
                after.append(reference_features.confidence(case.double, masked, 1))
            increase, drop = reference.increase_and_drop(before, after)
            np.testing.assert_allclose(found.loc[(method, label, "average_increase"), "value"], increase)
            np.testing.assert_allclose(found.loc[(method, label, "average_drop"), "value"], drop, rtol=1e-3, atol=1e-3)
    assert (table["n"] == N).all() and (table["n_zero"] == 0).all()


def test_equal_maps_are_asked_once_and_the_answer_stands():
    case, seen = study("pooled"), []
    alone = pd.concat(
        [masking.masking_effect(view(case, layer="trunk"), ROWS, 2, [method]) for method in GRADIENT], ignore_index=True
    )
    case.model.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    together = masking.masking_effect(view(case, layer="trunk"), ROWS, 2, GRADIENT)
    pd.testing.assert_frame_equal(together, alone)
    assert sum(seen) == 3 * N  # the films, those under Grad, pixel-wise Grad and XGrad, those under Grad++
    assert together.groupby("metric")["value"].nunique().max() > 1


def test_logits_of_some_features(case):
    n_features = case.maps.shape[1]
    one, each = principal(case)["hires"], case.kept["hires"]
    masks = {
        "all": np.ones(n_features),
        "every": np.ones((3, n_features), dtype=bool),
        "one": one,
        "rest": ~one,
        ("each", 1): each,
        "tensor": torch.from_numpy(each[0]),
        "none": np.zeros(n_features),
    }
    found = masking.logits_with(view(case), ROWS, masks)
    full = case.double(case.films.double()).detach().numpy()
    close(found["all"], full)
    close(found["every"], full)
    for name, mask in masks.items():
        expected = np.zeros((N, 3))
        for c in range(3):
            row = torch.as_tensor(np.asarray(mask) if np.ndim(mask) == 1 else mask[c]).double()
            expected[:, c] = case.back(case.maps * row[:, None, None])[:, c].detach()
        close(found[name], expected)
        assert found[name].dtype == np.float32
    assert np.abs(found["one"] - full).max() > 1e-3 and np.abs(found["one"] - found["rest"]).max() > 1e-3
    for bad in (np.ones(n_features + 1), np.ones((2, n_features)), np.full(n_features, 0.5)):
        with pytest.raises(ValueError, match="mask"):
            masking.logits_with(view(case), ROWS, {"bad": bad})


def test_logits_cost_one_pass_or_one_for_each_choice():
    for name, passes in (("pooled", 1), ("deep", 1 + 1 + 2)):
        case, seen = study(name), []
        case.model.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(len(inputs[0])))
        choice = np.array([[1, 0, 1, 0, 1, 0], [0, 1, 1, 1, 0, 0], [1, 0, 1, 0, 1, 0]])
        masking.logits_with(view(case, N), ROWS, {"one": choice[1], "each": choice})
        assert len(seen) == passes


def test_principal_and_all_other_features_for_each_output_or_for_all():
    masks = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]], bool)
    own = masking.principal_and_others(masks, exclusive=False)
    assert list(own) == ["all", "principal", "non_principal"] and own["all"].all() and own["all"].shape == (3, 4)
    np.testing.assert_array_equal(own["principal"], masks.T)
    np.testing.assert_array_equal(own["non_principal"], ~masks.T)
    union = masking.principal_and_others(masks, exclusive=True)
    assert union["principal"].tolist() == [True, True, True, False] and union["all"].tolist() == [True] * 4
    assert union["non_principal"].tolist() == [False, False, False, True]


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("n_classes", [1, 3])
def test_masked_performance_is_that_of_the_logits(n_classes, exclusive):
    generator = np.random.default_rng(n_classes)
    targets = np.zeros((40, n_classes), int)
    targets[ROWS] = np.eye(3, dtype=int)[[0, 1, 2, 0, 2, 1, 2]][:, :n_classes]
    films = torch.randn(N, 8, 3, 3, generator=torch.Generator().manual_seed(n_classes))
    case = SimpleNamespace(model=bare(torch.tensor(generator.normal(size=(n_classes, 8)))), films=films)
    choices = {"all": np.ones((n_classes, 8)), "principal": np.arange(8) < 3}
    names, patients, selected = ["a", "b", "c"][:n_classes], np.arange(N) // 2, n_classes - 1
    seen = view(case, layer="trunk", targets=targets, classes=names)
    logits = masking.logits_with(seen, ROWS, choices)
    table = masking.masked_performance(seen, ROWS, logits, choices, selected, patients, exclusive, 50)
    targets = targets[ROWS]
    assert table["features"].tolist() == ["all", "principal"] and table["n_features"].tolist() == [8, 3]
    assert (table["n"] == N).all() and (table["class"] == names[selected]).all()
    for _, line in table.iterrows():
        mine = logits[line["features"]]
        np.testing.assert_allclose(line["auroc"], roc_auc_score(targets[:, selected], mine[:, selected]))
        assert line["auroc_ci_low"] <= line["auroc"] <= line["auroc_ci_high"]
        if exclusive:
            assert line["accuracy"] == np.mean([row.argmax() == truth.argmax() for row, truth in zip(mine, targets)])
        elif n_classes == 1:
            assert line["accuracy"] == np.mean([(row[0] > 0) == truth[0] for row, truth in zip(mine, targets)])
    assert ("accuracy" in table) == (exclusive or n_classes == 1)
