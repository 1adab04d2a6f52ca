import itertools
import warnings

import numpy as np
import pytest
import torch

from lib.losses import LOSSES, LossWeights, imbalance_loss, loss_weights
from tests import reference_losses as reference

# Nearly balanced, rare, one positive film, and the full release's No Finding.
N_POSITIVE, N_NEGATIVE = np.array([480, 30, 1, 60361]), np.array([520, 970, 99999, 51759])
OPTIONS = [
    ("bce", {}),
    ("wbce", {}),
    ("wbce", {"scheme": "pos_weight"}),
    ("focal", {}),
    ("focal", {"alpha": 0.6, "gamma": 0.5}),
    ("focal", {"alpha": 0.0, "gamma": 0.0}),
    ("cb_focal", {"scale": "none"}),
    ("cb_focal", {"scale": "none", "beta": 0.99, "gamma": 1.0}),
    ("cb_focal", {"scale": "none", "beta": 0.0, "gamma": 3.0}),
]


def batch(seed=0, rows=7):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(0, 4, (rows, 4))), torch.from_numpy(
        rng.integers(0, 2, (rows, 4)).astype(np.float64)
    )


def slow(function, logits, targets, loss, options):
    constant_options = {key: value for key, value in options.items() if key in ("alpha", "beta", "scheme")}
    gamma = options.get("gamma", 2.0) if loss in ("focal", "cb_focal") else 0.0
    out = np.zeros(tuple(logits.shape))
    for i, m in itertools.product(*map(range, logits.shape)):
        pair = reference.constants(loss, int(N_POSITIVE[m]), int(N_NEGATIVE[m]), **constant_options)
        out[i, m] = function(float(logits[i, m]), float(targets[i, m]), *pair, gamma)
    return out


@pytest.mark.parametrize(("loss", "options"), OPTIONS)
def test_equals_the_formula_element_by_element(loss, options):
    logits, targets = batch()
    weights = loss_weights(loss, N_POSITIVE, N_NEGATIVE, **options)
    expected = slow(reference.element, logits, targets, loss, options)
    np.testing.assert_allclose(imbalance_loss(logits, targets, weights, "none"), expected, rtol=1e-10, atol=1e-15)
    assert imbalance_loss(logits, targets, weights).item() == pytest.approx(expected.mean(), rel=1e-12)
    assert imbalance_loss(logits, targets, weights, "sum").item() == pytest.approx(expected.sum(), rel=1e-12)
    single = imbalance_loss(logits.float(), targets.float(), weights, "none")
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("loss", "options"), OPTIONS)
def test_gradient_is_the_closed_form(loss, options):
    logits, targets = batch(1)
    weights = loss_weights(loss, N_POSITIVE, N_NEGATIVE, **options)
    logits.requires_grad_()
    imbalance_loss(logits, targets, weights, "sum").backward()
    np.testing.assert_allclose(
        logits.grad, slow(reference.gradient, logits.detach(), targets, loss, options), rtol=1e-9, atol=1e-15
    )
    assert torch.autograd.gradcheck(lambda z: imbalance_loss(z, targets, weights), logits)


@pytest.mark.parametrize(("loss", "options"), OPTIONS)
def test_targets_between_0_and_1(loss, options):
    logits, _ = batch(2)
    targets = torch.from_numpy(np.random.default_rng(3).random(tuple(logits.shape)))
    weights = loss_weights(loss, N_POSITIVE, N_NEGATIVE, **options)
    expected = slow(reference.element, logits, targets, loss, options)
    np.testing.assert_allclose(imbalance_loss(logits, targets, weights, "none"), expected, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("loss", "options"), [*OPTIONS, ("cb_focal", {}), ("cb_focal", {"scale": "pair"}), ("wbce", {"counts": "batch"})]
)
def test_extreme_logits_stay_finite(loss, options, dtype):
    extremes = torch.tensor([-700.0, -90.0, 0.0, 90.0, 700.0], dtype=dtype).repeat_interleave(2)[:, None].expand(-1, 4)
    targets = torch.tensor([0.0, 1.0], dtype=dtype).repeat(5)[:, None].expand(-1, 4)
    logits = extremes.clone().requires_grad_()
    out = imbalance_loss(logits, targets, loss_weights(loss, N_POSITIVE, N_NEGATIVE, **options), "none")
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(logits.grad).all()
    assert (out >= 0).all()


def test_a_sure_mistake_costs_its_logit_and_a_sure_hit_nothing():
    logits = torch.tensor([[700.0], [700.0], [-700.0], [-700.0]], dtype=torch.float64)
    targets = torch.tensor([[0.0], [1.0], [0.0], [1.0]], dtype=torch.float64)
    for loss, mistake in (("bce", (1, 1)), ("wbce", (0.25, 0.75)), ("focal", (0.75, 0.25))):
        out = imbalance_loss(logits, targets, loss_weights(loss, [25], [75]), "none").flatten()
        assert out.tolist() == pytest.approx([700 * mistake[0], 0, 0, 700 * mistake[1]], abs=1e-200)


def test_focusing_is_not_detached():
    logits = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    imbalance_loss(logits, torch.ones_like(logits), LossWeights(np.ones(1), np.ones(1), 2.0), "sum").backward()
    assert logits.grad.item() == pytest.approx(2 * 0.5 * 0.25 * np.log(0.5) - 0.125)  # detached it would be -0.125


@pytest.mark.parametrize("beta", [0.9, 0.999, 0.9999, 0.9999999])
def test_effective_numbers_keep_their_digits(beta):
    counts = np.array([1, 2, 3, 17, 1000, 11559, 100000])
    weights = loss_weights("cb_focal", counts, counts[::-1], beta=beta, scale="none")
    expected = np.array([reference.inverse_effective_number(int(n), beta) for n in counts])
    assert weights.positive.dtype == np.float64
    np.testing.assert_allclose(weights.positive, expected, rtol=1e-8)
    np.testing.assert_array_equal(weights.negative, weights.positive[::-1])
    assert weights.positive[0] == pytest.approx(1, abs=1e-8)  # (1 - beta) / (1 - beta^1); float32 would give 0.9999
    assert (np.diff(weights.positive) <= 0).all() and (weights.positive >= 1 - beta).all()


def test_beta_0_is_plain_focal_without_balance():
    weights = loss_weights("cb_focal", N_POSITIVE, N_NEGATIVE, beta=0.0, scale="none")
    assert weights.positive.tolist() == weights.negative.tolist() == [1, 1, 1, 1]


def test_global_scale_is_one_constant_for_all_classes():
    printed = loss_weights("cb_focal", N_POSITIVE, N_NEGATIVE, scale="none")
    scaled = loss_weights("cb_focal", N_POSITIVE, N_NEGATIVE)
    assert printed.scale == 1
    assert ((scaled.positive + scaled.negative) / 2).mean() == pytest.approx(1, rel=1e-12)
    np.testing.assert_allclose(scaled.positive, scaled.scale * printed.positive, rtol=1e-14)
    np.testing.assert_allclose(scaled.negative, scaled.scale * printed.negative, rtol=1e-14)


def test_pair_scale_makes_each_class_sum_to_1_and_keeps_its_ratio():
    printed = loss_weights("cb_focal", N_POSITIVE, N_NEGATIVE, scale="none")
    pair = loss_weights("cb_focal", N_POSITIVE, N_NEGATIVE, scale="pair")
    np.testing.assert_allclose(pair.positive + pair.negative, 1, rtol=1e-14)
    np.testing.assert_allclose(pair.positive / pair.negative, printed.positive / printed.negative, rtol=1e-12)


def test_both_wbce_schemes_have_one_ratio():
    paper, other = (loss_weights("wbce", N_POSITIVE, N_NEGATIVE, scheme=scheme) for scheme in ("paper", "pos_weight"))
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
        weights = loss_weights("wbce", n_positive, n_negative, scheme=scheme, counts="batch")
    pairs = [reference.batch_constants(targets[:, m].tolist(), n_positive, n_negative, scheme) for m in range(4)]
    expected = [
        [reference.element(logits[i, m].item(), targets[i, m].item(), *pairs[m], 0.0) for m in range(4)]
        for i in range(rows)
    ]
    np.testing.assert_allclose(imbalance_loss(logits, targets, weights, "none"), expected, rtol=1e-10)
    np.testing.assert_allclose(imbalance_loss(logits.float(), targets.float(), weights, "none"), expected, rtol=1e-5)
    logits.requires_grad_()
    imbalance_loss(logits, targets, weights, "sum").backward()
    slopes = [
        [reference.gradient(logits[i, m].item(), targets[i, m].item(), *pairs[m], 0.0) for m in range(4)]
        for i in range(rows)
    ]
    np.testing.assert_allclose(logits.grad, slopes, rtol=1e-9)


@pytest.mark.parametrize("scheme", ["paper", "pos_weight"])
def test_a_batch_that_is_the_training_set_has_its_weights(scheme):
    logits, targets = batch(7, rows=40)
    counts = targets.sum(0).numpy(), 40 - targets.sum(0).numpy()
    by_batch, by_train = (loss_weights("wbce", *counts, scheme=scheme, counts=which) for which in ("batch", "train"))
    torch.testing.assert_close(
        imbalance_loss(logits, targets, by_batch, "none"), imbalance_loss(logits, targets, by_train, "none")
    )
    assert imbalance_loss(logits[:5], targets[:5], by_batch) != imbalance_loss(logits[:5], targets[:5], by_train)


def test_one_label_everywhere_counts_as_even():
    for scheme, pair in (("paper", (0.5, 0.5)), ("pos_weight", (1, 1))):
        weights = loss_weights("wbce", [0, 10], [10, 0], scheme=scheme, counts="batch")
        assert [weights.positive.tolist(), weights.negative.tolist()] == [[value] * 2 for value in pair]


@pytest.mark.parametrize(
    ("loss", "options", "positive", "negative"),
    [
        ("wbce", {}, [1, 0], [0, 1]),
        ("wbce", {"scheme": "pos_weight"}, [0, 0], [1, 1]),
        ("cb_focal", {"scale": "none"}, [0, None], [None, 0]),
        ("cb_focal", {"scale": "global"}, [0, None], [None, 0]),
        ("cb_focal", {"scale": "pair"}, [0, 1], [1, 0]),
    ],
)
def test_classes_with_one_label_warn_and_stay_finite(loss, options, positive, negative):
    with pytest.warns(UserWarning, match=rf"{loss}: outputs \[0, 1\].* one label only"):
        weights = loss_weights(loss, [0, 1000], [1000, 0], **options)
    for found, expected in ((weights.positive, positive), (weights.negative, negative)):
        assert np.isfinite(found).all() and (found >= 0).all()
        assert all(want is None and value > 0 or value == want for value, want in zip(found, expected, strict=True))
    logits = torch.tensor([[3.0, -3.0]], requires_grad=True)
    imbalance_loss(logits, torch.tensor([[0.0, 1.0]]), weights).backward()
    assert torch.isfinite(logits.grad).all()
    assert loss == "wbce" or (logits.grad != 0).all()  # the label that is there is still learned


@pytest.mark.parametrize("loss", ["bce", "focal"])
def test_losses_without_counts_do_not_warn(loss):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_weights(loss, [0], [10])


@pytest.mark.parametrize("loss", LOSSES)
def test_an_element_does_not_depend_on_its_batch(loss):
    logits, targets = batch(4, rows=12)
    weights = loss_weights(loss, N_POSITIVE, N_NEGATIVE)
    together = imbalance_loss(logits, targets, weights, "none")
    alone = torch.cat([imbalance_loss(logits[i : i + 1], targets[i : i + 1], weights, "none") for i in range(12)])
    torch.testing.assert_close(together, alone, rtol=1e-14, atol=0)
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        imbalance_loss(logits[shuffled], targets[shuffled], weights, "none"), together[shuffled], rtol=1e-14, atol=0
    )


def test_bce_is_torchs():
    logits, targets = batch(5)
    ours = imbalance_loss(logits, targets, loss_weights("bce", N_POSITIVE, N_NEGATIVE))
    torch.testing.assert_close(ours, torch.nn.functional.binary_cross_entropy_with_logits(logits, targets))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("hinge", [1], [1]), {}, "unknown loss 'hinge'.*cb_focal"),
        (("bce", [1, 2], [1]), {}, "equal shape"),
        (("wbce", [-1], [5]), {}, "not negative"),
        (("wbce", [0], [0]), {}, "a film"),
        (("wbce", [np.nan], [5]), {}, "counts"),
        (("wbce", [1], [1]), {"scheme": "batch"}, "scheme.*'batch'"),
        (("wbce", [1], [1]), {"scheme": "ratio", "counts": "batch"}, "scheme.*'ratio'"),
        (("wbce", [1], [1]), {"counts": "epoch"}, "counts.*'train' or 'batch', not 'epoch'"),
        (("cb_focal", [1], [1]), {"scale": "max"}, "scale.*'max'"),
        (("cb_focal", [1], [1]), {"beta": 1.0}, "beta"),
        (("focal", [1], [1]), {"gamma": -1}, "gamma"),
        (("focal", [1], [1]), {"alpha": 1.2}, "alpha"),
        (("focal", [1], [1]), {"alpha": np.nan}, "alpha"),
    ],
)
def test_bad_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        loss_weights(*arguments, **options)


def test_bad_reduction_and_shapes():
    logits, targets = batch()
    weights = loss_weights("bce", N_POSITIVE, N_NEGATIVE)
    with pytest.raises(ValueError, match="'mean', 'sum' or 'none', not 'median'"):
        imbalance_loss(logits, targets, weights, "median")
    with pytest.raises(ValueError, match=r"\(7, 4\).*\(7, 3\)"):
        imbalance_loss(logits, targets[:, :3], weights)
