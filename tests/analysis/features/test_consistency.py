import tracemalloc

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from lib.analysis.cam import class_activation_maps, normalise
from lib.analysis.features import consistency as module
from lib.analysis.features.consistency import class_totals, consistency, henze_zirkler
from lib.analysis.features.masking import increase_and_drop, masked_films, masked_layer, masked_logits
from lib.analysis.features.scale import tanh_scale
from tests.analysis.features import reference_integrated as reference
from tests.analysis.features.test_importance import draw


def pairs(n=60):
    generator = np.random.default_rng(n)
    x = generator.normal(size=n)
    return {
        "normal": (x, 0.8 * x + generator.normal(size=n)),
        "scales": (1e9 * x, 1e-9 * (x + generator.normal(size=n)) + 3),
        "skewed": (np.exp(x), x + generator.normal(size=n)),
        "heavy": (generator.standard_cauchy(n), generator.standard_cauchy(n)),
        "nearly linear": (x, x + 1e-3 * generator.normal(size=n)),
        "ties": (np.round(x), np.round(x + generator.normal(size=n))),
    }


@pytest.mark.parametrize("n", [5, 60])
@pytest.mark.parametrize("name", pairs())
def test_henze_zirkler_equals_its_formula_and_pingouin(name, n):
    pingouin = pytest.importorskip("pingouin")
    x, y = pairs(n)[name]
    statistic, p = henze_zirkler(x, y)
    if name != "scales":  # the direct inverse loses its digits there; the test is the same for x / 1e9
        np.testing.assert_allclose(statistic, reference.henze_zirkler(x, y), rtol=1e-8)
    else:
        x, y = x / 1e9, (y - 3) * 1e9
    peer = pingouin.multivariate_normality(np.stack([x, y], axis=1))
    np.testing.assert_allclose([statistic, p], [peer.hz, peer.pval], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(
        henze_zirkler(y, -3 * x + 2 * y), [statistic, p], rtol=1e-6, atol=1e-12
    )  # invariant to affine maps


def test_henze_zirkler_of_many_films_is_exact_both_ways(monkeypatch):
    generator = np.random.default_rng(0)
    for draws in (
        generator.normal(size=(2, 3000)),
        generator.standard_t(4, size=(2, 3000)),
        np.round(generator.normal(size=(2, 3000)), 1),
    ):
        b2 = (1.25 * 3000) ** (1 / 3) / 2
        direct = sum(np.exp(-b2 / 2 * ((draws - point[:, None]) ** 2).sum(axis=0)).sum() for point in draws.T)
        for block in (2**12, 2**21):  # one pass, and many
            monkeypatch.setattr(module, "_BLOCK", block)
            np.testing.assert_allclose(module._gauss_sum(draws, b2), direct, rtol=1e-12)
    far = np.append(
        generator.normal(size=(2, 500)), [[300.0], [-300.0]], axis=1
    )  # too wide for the transform: pairs in blocks
    direct = sum(np.exp(-2 * ((far - point[:, None]) ** 2).sum(axis=0)).sum() for point in far.T)
    for block in (2**12, 2**21):
        monkeypatch.setattr(module, "_BLOCK", block)
        np.testing.assert_allclose(module._gauss_sum(far, 4.0), direct, rtol=1e-12)


def test_henze_zirkler_keeps_its_level_and_its_memory():
    generator = np.random.default_rng(1)
    rejected = np.mean([henze_zirkler(*generator.normal(size=(2, 40)))[1] < 0.05 for _ in range(400)])
    assert 0.02 < rejected < 0.09
    tracemalloc.start()
    henze_zirkler(*generator.normal(size=(2, 25000)))
    henze_zirkler(*generator.standard_cauchy(size=(2, 4000)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 128 * 2**20  # a matrix of all pairs would take 5 GB


@pytest.mark.parametrize("name", pairs())
def test_consistency_gives_both_coefficients_and_picks_one(name):
    x, y = pairs()[name]
    found = consistency(x, y)
    np.testing.assert_allclose(found.pearson, stats.pearsonr(x, y)[0], rtol=1e-9)
    np.testing.assert_allclose(found.spearman, stats.spearmanr(x, y)[0], rtol=1e-9)
    assert found.normal == (found.p > 0.05) and found.n == 60 and found.note == ""
    assert found.coefficient == (found.pearson if found.normal else found.spearman)
    assert found.used == {"normal": "pearson", "skewed": "spearman", "heavy": "spearman"}.get(name, found.used)


def test_consistency_without_contrast():
    x = np.arange(5.0)
    for totals, logits, note in (
        (np.zeros(5), x, "constant totals"),
        (x, np.full(5, 0.1), "constant logits"),
        (np.full(5, 7.0), np.zeros(5), "constant totals and logits"),
        (x[:2], x[:2], "2 films are too few"),
        (x[:0], x[:0], "0 films are too few"),
    ):
        found = consistency(totals, logits)
        assert found.note == note and found.used == "" and not found.normal
        assert np.isnan([found.coefficient, found.pearson, found.spearman, found.statistic, found.p]).all()
    found = consistency(x, -3 * x + 1)
    assert (found.pearson, found.spearman, found.statistic, found.p, found.normal) == (
        pytest.approx(-1),
        -1,
        20,
        0,
        False,
    ) and "linear" in found.note
    for totals, logits, message in (
        (x, x[:3], "shape"),
        (x, np.where(x == 3, np.nan, x), "logits: NaN or infinite value of film 3"),
    ):
        with pytest.raises(ValueError, match=message):
            consistency(totals, logits)


def test_raw_totals_are_the_logits_for_xgrad_and_hires():
    maps, weights, bias = draw((30, 6, 4, 4), 1).relu(), draw((3, 6), 2), draw((3,), 3)
    logits = maps.mean((2, 3)) @ weights.T + bias
    for method in ("xgrad", "hires"):
        raw = class_activation_maps(maps, weights, method)
        torch.testing.assert_close(raw.sum((2, 3)), logits - bias)
        totals = class_totals(raw, *tanh_scale(raw.quantile(0.1).item(), raw.quantile(0.9).item()), 16)
        np.testing.assert_allclose(
            totals["raw"], 16 * (logits - bias), rtol=1e-9
        )  # enlarged by whole factors, a sum only grows
        for c in range(3):
            found = consistency(totals["raw"][:, c], logits[:, c])
            assert found.pearson == pytest.approx(1, abs=1e-12) and found.coefficient == pytest.approx(1, abs=1e-12)
            # The scale is not linear and the individual scale forgets the level: neither is exact.
            assert consistency(totals["scaled"][:, c], logits[:, c]).pearson < 0.9999
            assert consistency(totals["individual"][:, c], logits[:, c]).pearson < 0.99


def test_totals_equal_their_definitions():
    raw = 3 * draw((3, 2, 3, 4), 4)
    raw[1, 0] = 0.7  # no contrast: the usual CAM is empty
    alpha, beta = tanh_scale([-1.0, -2.0], [2.0, 3.0])
    totals, first = class_totals(raw, alpha, beta, 7), class_totals(raw, alpha, beta, 7, order="scale_first")
    for n in range(3):
        for c in range(2):
            native = raw[n, c].numpy()
            film = reference.bilinear(native, 7)
            positive = np.maximum(native, 0)
            span = positive.max() - positive.min()
            unit = (positive - positive.min()) / span if span > 1e-12 else np.zeros_like(native)
            np.testing.assert_allclose(totals["raw"][n, c], film.sum(), rtol=1e-9)
            np.testing.assert_allclose(totals["scaled"][n, c], np.tanh(alpha[c] * film + beta[c]).sum(), rtol=1e-9)
            np.testing.assert_allclose(
                first["scaled"][n, c], reference.bilinear(np.tanh(alpha[c] * native + beta[c]), 7).sum(), rtol=1e-9
            )
            np.testing.assert_allclose(
                totals["individual"][n, c], reference.bilinear(unit, 7).sum(), rtol=1e-9, atol=1e-12
            )
    np.testing.assert_array_equal(class_totals(raw, 1.0, 0.0, 7)["raw"], totals["raw"])


class Net(nn.Module):
    """A layer in the middle, a rectifier that works in place after it, tokens, and a pooled linear head."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.act = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.ReLU(inplace=True)
        self.tokens, self.head, self.unused = nn.Linear(6, 5), nn.Linear(5, 3), nn.Identity()

    def forward(self, films):
        maps = self.act(self.middle(self.first(films)))
        return self.head(self.tokens(maps.flatten(2).transpose(1, 2)).mean(1))


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return Net().double().eval()


@torch.no_grad()
def test_masked_layer_continues_the_forward_pass(net):
    films = draw((2, 3, 8, 8), 5)
    logits = net(films)
    for layer, n, axis in (("middle", 6, 1), ("act", 6, 1), ("tokens", 5, -1), ("tokens", 5, 2)):
        with masked_layer(net, layer, np.ones(n, dtype=bool), axis):
            torch.testing.assert_close(net(films), logits, rtol=0, atol=0)
    keep = np.array([0, 1, 0, 0, 1, 0])
    other = Net().double().eval()
    other.load_state_dict(net.state_dict())
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
