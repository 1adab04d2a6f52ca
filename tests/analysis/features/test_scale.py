import numpy as np
import pytest
import torch

from lib.analysis.features.scale import ActivationDistribution, linear_scale, s_cam, scaled, tanh_scale
from tests.analysis.features import reference_integrated as reference
from tests.analysis.features.test_importance import draw


def streamed(raw, size=None, batch=3, classes=None):
    stream = ActivationDistribution(classes or [f"class {c}" for c in range(raw.shape[1])], size)
    for start in range(0, len(raw), batch):
        stream.update(raw[start : start + batch])
    return stream


def nasty():
    """Sets of class activations (8, 1, 5, 5) that break one histogram or another."""
    normal = draw((8, 1, 5, 5), 1, torch.float32)
    outlier = normal.clone()
    outlier[3, 0, 2, 2] = 3e38
    spikes = torch.where(normal > 0.3, 1e-4, -7.0)
    third = torch.zeros(8, 1, 5, 5)
    third.flatten()[::3] = 0.1
    return {
        "normal": normal,
        "constant": torch.full((8, 1, 5, 5), -0.3),
        "zero": torch.zeros(8, 1, 5, 5),
        "outlier": outlier,
        "two spikes": spikes,
        "a third": third,
        "offset": 1000 + 0.01 * normal,
        "tiny": normal * 1e-41,
        "minus zero": -0.0 * normal.abs(),
        "heavy": normal.sign() * normal.abs().mul(20).exp(),
    }


@pytest.mark.parametrize("name", nasty())
def test_percentiles_lie_within_their_error_and_the_second_pass_is_exact(name):
    raw = nasty()[name]
    percents = (0, 10, 50, 66.5, 90, 100)
    expected = np.array([reference.percentile(raw, p) for p in percents])[:, None]
    stream = streamed(raw)
    first = stream.percentiles(percents)
    # Between two neighbours of opposite sign the interpolated value may be smaller than what it is interpolated from.
    neighbours = np.array(
        [[max(abs(reference.percentile(raw, min(max(q, 0), 100))) for q in (p - 0.51, p, p + 0.51))] for p in percents]
    )
    assert (first.error <= 2**-10 * neighbours + 1e-40).all()
    assert (np.abs(first.value - expected) <= first.error + 1e-15 * np.abs(expected)).all()
    again = stream.second_pass(percents)
    for part in raw.split(2):
        again.update(part)
    exact = again.percentiles()
    np.testing.assert_allclose(exact.value, expected, rtol=1e-14, atol=0)
    assert (exact.error == 0).all()
    if name in ("constant", "zero"):
        assert (first.value == expected).all() and (first.error == 0).all()


def test_percentiles_do_not_depend_on_order_or_batches():
    raw = draw((12, 3, 4, 4), 2, torch.float32)
    whole, pieces = (
        streamed(raw, 16, batch=12),
        streamed(raw[torch.randperm(12, generator=torch.Generator().manual_seed(0))], 16, batch=5),
    )
    for ours, other in zip(whole.percentiles((3, 10, 90)), pieces.percentiles((3, 10, 90))):
        np.testing.assert_array_equal(ours, other)
    np.testing.assert_array_equal(whole.image_extremes(), pieces.image_extremes())


def test_pixels_are_counted_after_resizing():
    raw = draw((4, 2, 3, 3), 3)
    films = np.array([[reference.bilinear(raw[n, c].numpy(), 7) for c in range(2)] for n in range(4)])
    stream = streamed(raw, 7)
    again = stream.second_pass()
    again.update(raw)
    expected = [[reference.percentile(films[:, c], p) for c in range(2)] for p in (10, 90)]
    np.testing.assert_allclose(again.percentiles().value, expected, atol=1e-6)
    native = [[reference.percentile(raw[:, c], p) for c in range(2)] for p in (10, 90)]
    assert np.abs(np.array(native) - expected).max() > 0.05
    summary = stream.summary()
    np.testing.assert_allclose(
        summary[["mean", "sd", "low", "high"]],
        [[f(films[:, c]) for f in (np.mean, np.std, np.min, np.max)] for c in range(2)],
        atol=1e-6,
    )
    assert (summary["n_pixels"] == 4 * 49).all()
    extremes = [
        [reference.percentile(raw[:, c].amin((1, 2)), 50) for c in range(2)],
        [reference.percentile(raw[:, c].amax((1, 2)), 90) for c in range(2)],
    ]
    np.testing.assert_allclose(stream.image_extremes(), extremes, rtol=1e-6)


def test_histogram_of_class_activations():
    raw = draw((40, 2, 16, 16), 4, torch.float32)
    stream = streamed(raw, batch=7)
    edges = np.linspace(-2, 2, 21)
    counts = stream.histogram(edges)
    for c in range(2):
        expected = np.histogram(raw[:, c].numpy(), edges)[0]
        np.testing.assert_allclose(counts[c], expected, atol=0.02 * expected.max())
    assert streamed(torch.full((2, 1, 3, 3), 0.5)).histogram([0, 0.5, 1]).tolist() == [[0, 18]]
    assert streamed(torch.full((2, 1, 3, 3), 0.5)).histogram([0, 0.25, 0.5]).tolist() == [[0, 18]]
    assert stream.histogram([-9, 9]).tolist() == [[40 * 256], [40 * 256]]


def test_distribution_refuses():
    with pytest.raises(ValueError, match="no class activation"):
        ActivationDistribution(["a"]).percentiles()
    stream = ActivationDistribution(["Mass", "Hernia"])
    with pytest.raises(ValueError, match="'Hernia'.*film 1"):
        stream.update(torch.tensor([[[[0.0]], [[1.0]]], [[[0.0]], [[float("nan")]]]]))
    with pytest.raises(ValueError, match="one for each of Mass, Hernia"):
        stream.update(torch.zeros(1, 3, 2, 2))
    stream.update(torch.rand(2, 2, 3, 3, generator=torch.Generator().manual_seed(0)))
    again = stream.second_pass()
    again.update(torch.zeros(2, 2, 3, 3))
    with pytest.raises(ValueError, match="'Mass': the second pass saw other"):
        again.percentiles()


def test_beta_is_not_the_printed_one():
    p10, p90 = -0.7, 2.4
    alpha, beta = tanh_scale(p10, p90)
    np.testing.assert_allclose(np.tanh(alpha * np.array([p10, p90]) + beta), [0.1, 0.9], rtol=1e-12)
    wrong_alpha, wrong_beta = reference.printed_scale(p10, p90)
    np.testing.assert_allclose(np.tanh(wrong_alpha * np.array([p10, p90]) + wrong_beta), [-0.9, -0.1], rtol=1e-12)
    np.testing.assert_allclose(alpha, wrong_alpha)
    alphas, betas = tanh_scale([p10, 1.0], [p90, 5.0], low=0.05, high=0.95)
    np.testing.assert_allclose(np.tanh(alphas * [p10, 1] + betas), [0.05] * 2)
    np.testing.assert_allclose(np.tanh(alphas * [p90, 5] + betas), [0.95] * 2)
    alpha, beta = linear_scale(p10, p90)
    np.testing.assert_allclose([alpha * p10 + beta, alpha * p90 + beta], [0, 1], atol=1e-12)


@pytest.mark.parametrize("p10, p90", [(0.5, 0.5), (1.0, 0.5), (float("nan"), 1.0), (0.0, 1e-320), (-np.inf, 1.0)])
def test_no_scale_without_spread(p10, p90):
    with pytest.raises(ValueError, match="Hernia.*Leave these classes out"):
        tanh_scale([0.0, p10], [1.0, p90], classes=["Mass", "Hernia"])


def test_scaled_maps_keep_negative_evidence_and_order_matters():
    raw = 3 * draw((2, 2, 3, 3), 5)
    alpha, beta = tanh_scale([-1.0, -2.0], [1.0, 3.0])
    ours = s_cam(raw, alpha, beta, 6)
    for n in range(2):
        for c in range(2):
            np.testing.assert_allclose(
                ours[n, c], np.tanh(alpha[c] * reference.bilinear(raw[n, c].numpy(), 6) + beta[c]), rtol=1e-9
            )
            other = reference.bilinear(np.tanh(alpha[c] * raw[n, c].numpy() + beta[c]), 6)
            np.testing.assert_allclose(s_cam(raw, alpha, beta, 6, order="scale_first")[n, c], other, rtol=1e-9)
    assert ours.min() < 0
    assert (ours - s_cam(raw, alpha, beta, 6, order="scale_first")).abs().max() > 0.05
    torch.testing.assert_close(
        s_cam(raw, alpha, beta, 6, kind="linear"), s_cam(raw, alpha, beta, 6, kind="linear", order="scale_first")
    )
    assert scaled(raw[0, 0], 2.0, 1.0, "linear").equal(2 * raw[0, 0] + 1)
    with pytest.raises(ValueError, match="unknown scale"):
        scaled(raw, 1.0, 0.0, "log")
    with pytest.raises(ValueError, match="unknown order"):
        s_cam(raw, 1.0, 0.0, 6, order="both")
