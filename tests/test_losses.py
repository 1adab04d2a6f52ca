import itertools
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib.losses import LOSSES, Criterion, Loss, make_loss, weighted
from tests import reference_losses as reference

# Nearly balanced, rare, one positive film, and the full release's No Finding.
N_POSITIVE, N_NEGATIVE = np.array([480, 30, 1, 60361]), np.array([520, 970, 99999, 51759])
OPTIONS = [
    ("bce", {}),
    ("wbce", {}),
    ("wbce", {"wbce_scheme": "pos_weight"}),
    ("focal", {}),
    ("focal", {"alpha": 0.6, "gamma": 0.5}),
    ("focal", {"alpha": 0.0, "gamma": 0.0}),
    ("cb_focal", {"cb_scale": "none"}),
    ("cb_focal", {"cb_scale": "none", "beta": 0.99, "gamma": 1.0}),
    ("cb_focal", {"cb_scale": "none", "beta": 0.0, "gamma": 3.0}),
]


def made(loss, n_positive=N_POSITIVE, n_negative=N_NEGATIVE, **options):
    """The loss with the parameters' defaults, but for `options`."""
    defaults = {"alpha": 0.25, "gamma": 2.0, "beta": 0.9999}
    defaults |= {"wbce_scheme": "paper", "wbce_counts": "train", "cb_scale": "global"}
    return make_loss(loss, n_positive, n_negative, SimpleNamespace(**defaults | options))


def constants(*arguments, **options):
    """The record of the loss, with w+ and w- as arrays (M,)."""
    found = made(*arguments, **options).constants
    assert all(type(value) is float for side in ("positive", "negative") for value in found[side])
    return SimpleNamespace(**found | {side: np.array(found[side]) for side in ("positive", "negative")})


def batch(seed=0, rows=7):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(0, 4, (rows, 4))), torch.from_numpy(
        rng.integers(0, 2, (rows, 4)).astype(np.float64)
    )


def slow(function, logits, targets, loss, options):
    constant_options = {
        key.removeprefix("wbce_"): value for key, value in options.items() if key not in ("gamma", "cb_scale")
    }
    gamma = options.get("gamma", 2.0) if loss in ("focal", "cb_focal") else 0.0
    out = np.zeros(tuple(logits.shape))
    for i, m in itertools.product(*map(range, logits.shape)):
        pair = reference.constants(loss, int(N_POSITIVE[m]), int(N_NEGATIVE[m]), **constant_options)
        out[i, m] = function(float(logits[i, m]), float(targets[i, m]), *pair, gamma)
    return out


@pytest.mark.parametrize(("loss", "options"), OPTIONS)
def test_equals_the_formula_element_by_element(loss, options):
    logits, targets = batch()
    criterion = made(loss, **options)
    expected = slow(reference.element, logits, targets, loss, options)
    np.testing.assert_allclose(criterion(logits, targets), expected, rtol=1e-10, atol=1e-15)
    assert criterion(logits, targets).mean().item() == pytest.approx(expected.mean(), rel=1e-12)
    assert criterion(logits, targets).sum().item() == pytest.approx(expected.sum(), rel=1e-12)
    single = criterion(logits.float(), targets.float())
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("loss", "options"), OPTIONS)
def test_gradient_is_the_closed_form(loss, options):
    logits, targets = batch(1)
    criterion = made(loss, **options)
    logits.requires_grad_()
    criterion(logits, targets).sum().backward()
    np.testing.assert_allclose(
        logits.grad, slow(reference.gradient, logits.detach(), targets, loss, options), rtol=1e-9, atol=1e-15
    )
    assert torch.autograd.gradcheck(lambda z: criterion(z, targets).mean(), logits)


@pytest.mark.parametrize(("loss", "options"), OPTIONS)
def test_targets_between_0_and_1(loss, options):
    logits, _ = batch(2)
    targets = torch.from_numpy(np.random.default_rng(3).random(tuple(logits.shape)))
    criterion = made(loss, **options)
    expected = slow(reference.element, logits, targets, loss, options)
    np.testing.assert_allclose(criterion(logits, targets), expected, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("loss", "options"),
    [*OPTIONS, ("cb_focal", {}), ("cb_focal", {"cb_scale": "pair"}), ("wbce", {"wbce_counts": "batch"})],
)
def test_extreme_logits_stay_finite(loss, options, dtype):
    extremes = torch.tensor([-700.0, -90.0, 0.0, 90.0, 700.0], dtype=dtype).repeat_interleave(2)[:, None].expand(-1, 4)
    targets = torch.tensor([0.0, 1.0], dtype=dtype).repeat(5)[:, None].expand(-1, 4)
    logits = extremes.clone().requires_grad_()
    out = made(loss, **options)(logits, targets)
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(logits.grad).all()
    assert (out >= 0).all()


def test_a_sure_mistake_costs_its_logit_and_a_sure_hit_nothing():
    logits = torch.tensor([[700.0], [700.0], [-700.0], [-700.0]], dtype=torch.float64)
    targets = torch.tensor([[0.0], [1.0], [0.0], [1.0]], dtype=torch.float64)
    for loss, mistake in (("bce", (1, 1)), ("wbce", (0.25, 0.75)), ("focal", (0.75, 0.25))):
        out = made(loss, [25], [75])(logits, targets).flatten()
        assert out.tolist() == pytest.approx([700 * mistake[0], 0, 0, 700 * mistake[1]], abs=1e-200)


def test_focusing_is_not_detached():
    logits = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    weighted(np.ones(1), np.ones(1), 2.0)(logits, torch.ones_like(logits)).sum().backward()
    assert logits.grad.item() == pytest.approx(2 * 0.5 * 0.25 * np.log(0.5) - 0.125)  # detached it would be -0.125


@pytest.mark.parametrize("beta", [0.9, 0.999, 0.9999, 0.9999999])
def test_effective_numbers_keep_their_digits(beta):
    counts = np.array([1, 2, 3, 17, 1000, 11559, 100000])
    weights = constants("cb_focal", counts, counts[::-1], beta=beta, cb_scale="none")
    expected = np.array([reference.inverse_effective_number(int(n), beta) for n in counts])
    np.testing.assert_allclose(weights.positive, expected, rtol=1e-8)
    np.testing.assert_array_equal(weights.negative, weights.positive[::-1])
    assert weights.positive[0] == pytest.approx(1, abs=1e-8)  # (1 - beta) / (1 - beta^1); float32 would give 0.9999
    assert (np.diff(weights.positive) <= 0).all() and (weights.positive >= 1 - beta).all()


def test_beta_0_is_plain_focal_without_balance():
    weights = constants("cb_focal", beta=0.0, cb_scale="none")
    assert weights.positive.tolist() == weights.negative.tolist() == [1, 1, 1, 1]


def test_global_scale_is_one_constant_for_all_classes():
    printed = constants("cb_focal", cb_scale="none")
    scaled = constants("cb_focal")
    assert printed.scale == 1
    assert ((scaled.positive + scaled.negative) / 2).mean() == pytest.approx(1, rel=1e-12)
    np.testing.assert_allclose(scaled.positive, scaled.scale * printed.positive, rtol=1e-14)
    np.testing.assert_allclose(scaled.negative, scaled.scale * printed.negative, rtol=1e-14)


def test_pair_scale_makes_each_class_sum_to_1_and_keeps_its_ratio():
    printed = constants("cb_focal", cb_scale="none")
    pair = constants("cb_focal", cb_scale="pair")
    np.testing.assert_allclose(pair.positive + pair.negative, 1, rtol=1e-14)
    np.testing.assert_allclose(pair.positive / pair.negative, printed.positive / printed.negative, rtol=1e-12)


def test_both_wbce_schemes_have_one_ratio():
    paper, other = (constants("wbce", wbce_scheme=scheme) for scheme in ("paper", "pos_weight"))
    np.testing.assert_allclose(paper.positive / paper.negative, other.positive / other.negative)
    np.testing.assert_allclose(paper.positive + paper.negative, 1)
    assert (other.negative == 1).all()


@pytest.mark.parametrize("scheme", ["paper", "pos_weight"])
@pytest.mark.parametrize("rows", [9, 2, 1])
def test_wbce_by_the_counts_of_the_batch(scheme, rows):
    """Also where a class has no positive film in the batch, or nothing else, and where the training set has one label
    only."""
    logits, targets = batch(6, rows)
    targets[:, 1], targets[:, 3] = 0, 1
    n_positive, n_negative = [480, 30, 0, 60361], [520, 970, 1000, 51759]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion = made("wbce", n_positive, n_negative, wbce_scheme=scheme, wbce_counts="batch")
    pairs = [reference.batch_constants(targets[:, m].tolist(), n_positive, n_negative, scheme) for m in range(4)]
    expected = [
        [reference.element(logits[i, m].item(), targets[i, m].item(), *pairs[m], 0.0) for m in range(4)]
        for i in range(rows)
    ]
    np.testing.assert_allclose(criterion(logits, targets), expected, rtol=1e-10)
    np.testing.assert_allclose(criterion(logits.float(), targets.float()), expected, rtol=1e-5)
    logits.requires_grad_()
    criterion(logits, targets).sum().backward()
    slopes = [
        [reference.gradient(logits[i, m].item(), targets[i, m].item(), *pairs[m], 0.0) for m in range(4)]
        for i in range(rows)
    ]
    np.testing.assert_allclose(logits.grad, slopes, rtol=1e-9)


@pytest.mark.parametrize("scheme", ["paper", "pos_weight"])
def test_a_batch_that_is_the_training_set_has_its_weights(scheme):
    logits, targets = batch(7, rows=40)
    counts = targets.sum(0).numpy(), 40 - targets.sum(0).numpy()
    by_batch, by_train = (made("wbce", *counts, wbce_scheme=scheme, wbce_counts=which) for which in ("batch", "train"))
    torch.testing.assert_close(by_batch(logits, targets), by_train(logits, targets))
    assert by_batch(logits[:5], targets[:5]).mean() != by_train(logits[:5], targets[:5]).mean()


def test_one_label_everywhere_counts_as_even():
    for scheme, pair in (("paper", (0.5, 0.5)), ("pos_weight", (1, 1))):
        weights = constants("wbce", [0, 10], [10, 0], wbce_scheme=scheme, wbce_counts="batch")
        assert [weights.positive.tolist(), weights.negative.tolist()] == [[value] * 2 for value in pair]


@pytest.mark.parametrize(
    ("loss", "options", "positive", "negative"),
    [
        ("wbce", {}, [1, 0], [0, 1]),
        ("wbce", {"wbce_scheme": "pos_weight"}, [0, 0], [1, 1]),
        ("cb_focal", {"cb_scale": "none"}, [0, None], [None, 0]),
        ("cb_focal", {"cb_scale": "global"}, [0, None], [None, 0]),
        ("cb_focal", {"cb_scale": "pair"}, [0, 1], [1, 0]),
    ],
)
def test_classes_with_one_label_warn_and_stay_finite(loss, options, positive, negative):
    with pytest.warns(UserWarning, match=rf"{loss}: outputs \[0, 1\].* one label only"):
        weights = constants(loss, [0, 1000], [1000, 0], **options)
    for found, expected in ((weights.positive, positive), (weights.negative, negative)):
        assert np.isfinite(found).all() and (found >= 0).all()
        assert all(want is None and value > 0 or value == want for value, want in zip(found, expected, strict=True))
    logits = torch.tensor([[3.0, -3.0]], requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        criterion = made(loss, [0, 1000], [1000, 0], **options)
    criterion(logits, torch.tensor([[0.0, 1.0]])).mean().backward()
    assert torch.isfinite(logits.grad).all()
    assert loss == "wbce" or (logits.grad != 0).all()  # the label that is there is still learned


@pytest.mark.parametrize("loss", ["bce", "focal"])
def test_losses_without_counts_do_not_warn(loss):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(loss, [0], [10])


@pytest.mark.parametrize("loss", LOSSES)
def test_an_element_does_not_depend_on_its_batch(loss):
    logits, targets = batch(4, rows=12)
    criterion = made(loss)
    together = criterion(logits, targets)
    alone = torch.cat([criterion(logits[i : i + 1], targets[i : i + 1]) for i in range(12)])
    torch.testing.assert_close(together, alone, rtol=1e-14, atol=0)
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(criterion(logits[shuffled], targets[shuffled]), together[shuffled], rtol=1e-14, atol=0)


def test_bce_is_torchs():
    logits, targets = batch(5)
    ours = made("bce")(logits, targets).mean()
    torch.testing.assert_close(ours, torch.nn.functional.binary_cross_entropy_with_logits(logits, targets))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("hinge", [1], [1]), {}, "unknown loss 'hinge'.*cb_focal"),
        (("bce", [1, 2], [1]), {}, "equal shape"),
        (("wbce", [-1], [5]), {}, "not negative"),
        (("wbce", [0], [0]), {}, "a film"),
        (("wbce", [np.nan], [5]), {}, "counts"),
        (("wbce", [1], [1]), {"wbce_scheme": "batch"}, "scheme.*'batch'"),
        (("wbce", [1], [1]), {"wbce_scheme": "ratio", "wbce_counts": "batch"}, "scheme.*'ratio'"),
        (("wbce", [1], [1]), {"wbce_counts": "epoch"}, "counts.*'train' or 'batch', not 'epoch'"),
        (("cb_focal", [1], [1]), {"cb_scale": "max"}, "scale.*'max'"),
        (("cb_focal", [1], [1]), {"beta": 1.0}, "beta"),
        (("focal", [1], [1]), {"gamma": -1}, "gamma"),
        (("focal", [1], [1]), {"alpha": 1.2}, "alpha"),
        (("focal", [1], [1]), {"alpha": np.nan}, "alpha"),
    ],
)
def test_bad_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        made(*arguments, **options)


def test_bad_shapes():
    logits, targets = batch()
    with pytest.raises(ValueError, match=r"\(7, 4\).*\(7, 3\)"):
        made("bce")(logits, targets[:, :3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("loss", "options"), [("wbce", {"wbce_scheme": "pos_weight"}), ("cb_focal", {})])
def test_half_precision_is_computed_in_float32(loss, options, dtype):
    """A weight of 99999 is infinite in float16, and infinity times 0 is no loss."""
    criterion, (logits, targets) = made(loss, **options), batch(8)
    half = logits.to(dtype).requires_grad_()
    out = criterion(half, targets.to(dtype))
    assert out.dtype == torch.float32 and torch.isfinite(out).all()
    torch.testing.assert_close(out, criterion(half.detach().float(), targets.float()), rtol=0, atol=0)
    out.mean().backward()
    assert half.grad.dtype == dtype and torch.isfinite(half.grad).all()


@pytest.mark.parametrize("scheme", ["paper", "pos_weight"])
def test_counts_of_a_half_precision_batch_are_exact(scheme):
    criterion = made("wbce", [5], [5], wbce_scheme=scheme, wbce_counts="batch")
    targets = torch.zeros(5001, 1)
    targets[:2501] = 1  # float16 has no 2501
    logits = torch.zeros(5001, 1)
    torch.testing.assert_close(criterion(logits, targets.half()), criterion(logits, targets), rtol=0, atol=0)


# --- a loss of another form


def asl(n_positive, n_negative, run):
    """Asymmetric loss (Ridnik et al., 2021): negatives have an exponent of their own, and cost nothing within a margin
    of 0."""

    def element(logits, targets):
        p, shifted = torch.sigmoid(logits), (torch.sigmoid(logits) - 0.05).clamp(min=0)
        positive = (1 - p) ** run.gamma * torch.nn.functional.logsigmoid(logits)
        return -(targets * positive + (1 - targets) * shifted**4 * torch.log1p(-shifted))

    return Criterion(element)


def test_a_loss_of_your_own_is_one_function_and_one_line(monkeypatch):
    monkeypatch.setitem(LOSSES, "asl", Loss("ASL", asl))
    criterion, (logits, targets) = made("asl", gamma=1.0), batch(9)
    assert criterion.constants == {}
    for z, y, found in zip(logits.flatten().tolist(), targets.flatten().tolist(), criterion(logits, targets).flatten()):
        p = 1 / (1 + np.exp(-z))
        shifted = max(p - 0.05, 0)
        expected = -(1 - p) * np.log(p) if y else -(shifted**4) * np.log(1 - shifted)
        assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-15)
    model = torch.nn.Linear(6, 4)
    with torch.no_grad():
        model.weight.zero_(), model.bias.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    films, labels = torch.from_numpy(np.random.default_rng(0).normal(size=(7, 6))).float(), targets.float()
    before = criterion(model(films), labels).mean()
    before.backward()
    optimizer.step()
    assert 0 < criterion(model(films), labels).mean() < before
    with pytest.raises(ValueError, match="choose from bce, wbce, focal, cb_focal, asl"):
        made("hinge")
