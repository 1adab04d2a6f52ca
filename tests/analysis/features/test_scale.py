from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib.analysis import cam
from lib.analysis.features import scale
from lib.analysis.features.scale import ActivationDistribution, linear_scale, s_cam, scaled, tanh_scale
from lib.analysis.features.survey import survey
from tests.analysis.features import reference_integrated as reference
from tests.analysis.features.small_study import CLASSES, ROWS, view
from tests.toys import bare, draw


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
    ends = [[f(films[:, c]) for c in range(2)] for f in (np.min, np.max)]
    np.testing.assert_allclose([stream.low, stream.high], ends, atol=1e-6)
    assert stream.n_pixels == 4 * 49
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
    edges, counts = stream.bars(8)
    assert (
        edges.tolist() == np.linspace(raw.min().item(), raw.max().item(), 9).tolist() and counts.sum() == 2 * 40 * 256
    )
    np.testing.assert_array_equal(counts, stream.histogram(edges))


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


def test_a_second_pass_that_rounds_otherwise_gives_its_own_percentiles():
    raw = draw((40, 1, 5, 5), 6, torch.float32)
    ulp = torch.from_numpy(np.nextafter(raw.numpy(), np.float32(np.inf)))
    other = torch.where(draw(raw.shape, 7) > 0, ulp, raw)
    again = streamed(raw).second_pass()
    again.update(other)
    np.testing.assert_allclose(again.percentiles().value[:, 0], np.percentile(other.double(), [10, 90]), rtol=1e-14)
    fewer = streamed(torch.ones(40, 1, 5, 5)).second_pass()
    fewer.update(torch.ones(39, 1, 5, 5))
    with pytest.raises(ValueError, match="the second pass saw other"):
        fewer.percentiles()


@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-3, 5e-4, 1e-5])
@pytest.mark.parametrize("again", [False, True])
def test_a_small_spread_on_a_large_offset_has_its_exact_scale(spread, again, monkeypatch):
    monkeypatch.setattr("lib.analysis.features.survey.KEPT_BYTES", 0 if again else 2**30)
    films = 1 + spread * draw((7, 2, 8, 8), 8, torch.float32)
    films[:, 1] = -0.7
    case = SimpleNamespace(model=bare(torch.eye(2)), films=films)
    targets = np.ones((40, 2))
    found = survey(view(case, 4, layer="trunk", targets=targets, classes=CLASSES[:2]), ROWS, ["cam"], size=11)
    pixels = [reference.bilinear(film.numpy().astype(float), 11) for film in films[:, 0]]
    for kind, low, high in (("tanh", np.arctanh(0.1), np.arctanh(0.9)), ("linear", 0, 1)):
        alpha, beta = found.scales(kind)["cam"]
        p10, p90 = np.percentile(pixels, [10, 90])
        rounding = 3e-7 / spread  # of the float32 values
        np.testing.assert_allclose(alpha[0], (high - low) / (p90 - p10), rtol=rounding)
        ends = [alpha[0] * p10 + beta[0], alpha[0] * p90 + beta[0]]
        np.testing.assert_allclose(ends, [low, high], atol=rounding)
        assert np.isnan([alpha[1], beta[1]]).all()  # this class does not vary


@pytest.mark.parametrize("size", [None, (7, 9), 16, 112])
@pytest.mark.parametrize("name", nasty())
def test_the_compiled_pass_counts_what_torch_enlarges(name, size):
    """Bit by bit where the maps grow; at other sizes torch rounds the place of a pixel otherwise, so a unit of the last
    digit apart."""
    raw = nasty()[name]
    pixels = (raw if size is None else cam.resize(raw, size)).numpy().ravel()
    stream = streamed(raw, size)
    again = stream.second_pass((0, 10, 50, 90, 100))
    again.update(raw)
    expected = np.percentile(pixels.astype(np.float64), (0, 10, 50, 90, 100))
    rounding = 0 if size in (None, 112) else np.float64(np.spacing(np.abs(pixels).max()))
    np.testing.assert_allclose(again.percentiles().value[:, 0], expected, rtol=1e-12, atol=2 * rounding)
    assert stream.n_pixels == again.n_pixels == pixels.size
    np.testing.assert_allclose([stream.low[0], stream.high[0]], [pixels.min(), pixels.max()], atol=rounding)


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


def test_a_class_without_variation_has_no_scale_and_the_others_have():
    maps = draw((7, 3, 4, 4), 0, torch.float32)
    maps[:, 1] = -0.3
    case = SimpleNamespace(model=bare(torch.eye(3)), films=maps)
    found = survey(view(case, layer="trunk", targets=np.ones((40, 3))), ROWS, ["cam"], size=4)
    for kind, curve, ends in (("tanh", np.tanh, (0.1, 0.9)), ("linear", lambda values: values, (0, 1))):
        for bounds in ("pixels", "image_extremes"):
            alpha, beta = found.scales(kind, bounds)["cam"]
            assert np.isnan([alpha[1], beta[1]]).all() and np.isfinite([*alpha[[0, 2]], *beta[[0, 2]]]).all()
            if bounds == "pixels":
                low, high = (np.percentile(maps.transpose(0, 1).flatten(1), p, axis=1) for p in (10, 90))
            else:
                low, high = np.percentile(maps.amin((2, 3)), 50, axis=0), np.percentile(maps.amax((2, 3)), 90, axis=0)
            for values, end in ((low, ends[0]), (high, ends[1])):
                np.testing.assert_allclose(curve(alpha * values + beta)[[0, 2]], end, atol=1e-6)
    rounded = np.nextafter(np.float32(-0.7), np.float32(0))  # a constant map that was resampled
    alpha, beta = scale.common_scale(np.array([-0.7, -0.7]), np.array([float(rounded), -0.6999]))
    assert np.isnan([alpha[0], beta[0]]).all() and np.isfinite([alpha[1], beta[1]]).all()
