import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam
from pytorch_grad_cam import GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, XGradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from lib.analysis.cam import (
    METHODS,
    channel_contributions,
    class_activation_maps,
    film_maps,
    normalise,
    pair_maps,
    resize,
)
from tests.analysis import reference_cam
from tests.toys import draw, seeded, two_convolutions


@pytest.fixture
def net():
    with seeded(3):
        net = two_convolutions(signed=False).double().eval()
        films = torch.randn(3, 3, 20, 16, dtype=torch.float64)
    return net, films, net.trunk(films).detach()


def features(shape=(3, 6, 4, 5), seed=0, signed=False, dtype=torch.float64):
    maps = draw(shape, seed, dtype)
    return maps if signed else maps.relu()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("method, eps", [*((m, 0.0) for m in METHODS), ("gradpp", 1e-6)])
def test_closed_forms_equal_the_definitions(method, eps, signed):
    maps, weights, bias = features(signed=signed), features((4, 6), 1, signed=True), features((4,), 2, signed=True)
    weights[2, 3] = 0
    ours = class_activation_maps(maps, weights, method, eps=eps)
    assert ours.shape == (3, 4, 4, 5)
    head = reference_cam.pooled_head(weights, bias)
    for film in range(3):
        for c in range(4):
            expected = reference_cam.raw_map(maps[film], head, c, method, eps)
            np.testing.assert_allclose(ours[film, c], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_pairs_equal_all_classes(method):
    maps, weights = features(), features((4, 6), 1, signed=True)
    rows, classes = torch.tensor([2, 0, 0, 1, 2, 0]), torch.tensor([3, 1, 0, 2, 3, 1])
    everything = class_activation_maps(maps, weights, method)
    torch.testing.assert_close(
        pair_maps(maps, weights, rows, classes, method), everything[rows, classes], rtol=1e-12, atol=1e-14
    )
    assert pair_maps(maps, weights, rows[:0], classes[:0], method).shape == (0, 4, 5)


def test_known_identities():
    maps, weights, bias = features(signed=True), features((4, 6), 1, signed=True), features((4,), 2)
    cam, grad, hires, xgrad = (class_activation_maps(maps, weights, m) for m in ("cam", "grad", "hires", "xgrad"))
    torch.testing.assert_close(grad * 20, cam)
    logits = reference_cam.pooled_head(weights, bias)(maps)
    torch.testing.assert_close(hires.sum((2, 3)), logits - bias)
    torch.testing.assert_close(xgrad.sum((2, 3)), logits - bias)
    torch.testing.assert_close(normalise(grad), normalise(cam))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("method, eps", [*((m, 0.0) for m in METHODS), ("gradpp", 1e-6)])
def test_contributions_are_the_maps_of_single_features(method, eps, signed):
    maps, weights, bias = features(signed=signed), features((4, 6), 1, signed=True), features((4,), 2)
    maps[1, 2] = 0
    ours = channel_contributions(maps, weights, method, eps=eps)
    assert ours.shape == (3, 4, 6)
    torch.testing.assert_close(ours.sum(2), class_activation_maps(maps, weights, method, eps=eps).sum((2, 3)))
    head = reference_cam.pooled_head(weights, bias)
    for k in range(6):
        only = torch.zeros(6)
        only[k] = 1
        raw = class_activation_maps(maps, weights, method, only, eps=eps)
        torch.testing.assert_close(raw.sum((2, 3)), ours[:, :, k], rtol=1e-10, atol=1e-13)
        # A pooled linear head treats each channel by itself, so the map of one channel is that of a film with no other.
        alone = maps[1] * only[:, None, None]
        np.testing.assert_allclose(
            raw[1, 2], reference_cam.raw_map(alone, head, 2, method, eps), rtol=1e-10, atol=1e-13
        )


@pytest.mark.parametrize("method", METHODS)
def test_feature_masks(method):
    maps, weights = features(signed=True), features((4, 6), 1, signed=True)
    whole = class_activation_maps(maps, weights, method)
    torch.testing.assert_close(class_activation_maps(maps, weights, method, torch.ones(6)), whole, rtol=0, atol=0)
    assert class_activation_maps(maps, weights, method, torch.zeros(6, dtype=torch.bool)).abs().max() == 0
    principal = torch.tensor([[1, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0], [0] * 6, [1] * 6])
    kept, others = (class_activation_maps(maps, weights, method, mask) for mask in (principal, 1 - principal))
    torch.testing.assert_close(kept + others, whole)
    for c in range(4):
        torch.testing.assert_close(
            kept[:, c], class_activation_maps(maps, weights, method, principal[c])[:, c], rtol=1e-12, atol=1e-14
        )
    with pytest.raises(ValueError, match=r"mask \(6,\) or \(4, 6\), got shape \(4,\)"):
        class_activation_maps(maps, weights, method, torch.ones(4))
    with pytest.raises(ValueError, match="other values"):
        class_activation_maps(maps, weights, method, torch.arange(6))


def test_film_maps():
    raw = features((2, 3, 4, 5), 4, signed=True)
    native, late = film_maps(raw, 14), film_maps(raw, (14, 14), "resize_first")
    torch.testing.assert_close(native, resize(normalise(raw), 14))
    torch.testing.assert_close(late, normalise(resize(raw, 14)))
    # The even factor leaves no pixel centre on the native peak, so a map that is normalised first stays below 1.
    peak = torch.zeros(1, 5, 5)
    peak[0, 2, 2] = 3
    assert film_maps(peak, 10).max() == 0.75**2 and film_maps(peak, 10, "resize_first").max() == 1
    assert (
        film_maps(-raw.abs() - 1, 7, rectify=False).amax((2, 3)).min() > 0.5 and film_maps(-raw.abs() - 1, 7).max() == 0
    )
    ramp = torch.tensor([[0.0, 0.25, 0.999, 1.0]]).expand(4, 4)
    torch.testing.assert_close(film_maps(ramp, 4, quantise=True)[0], torch.tensor([0, 63, 254, 255]) / 255)
    torch.testing.assert_close(film_maps(ramp, 8, quantise=True), resize((ramp * 255).floor() / 255, 8))
    levels = film_maps(raw, 14, "resize_first", quantise=True) * 255
    torch.testing.assert_close(levels, levels.round())
    with pytest.raises(ValueError, match="resize_first"):
        film_maps(raw, 14, "last")


def test_agrees_with_captum(net):
    model, films, maps = net
    peer = LayerGradCam(model, model.trunk)
    ours = class_activation_maps(maps, model.head.weight, "grad")
    for c in range(4):
        torch.testing.assert_close(ours[:, c : c + 1], peer.attribute(films, target=c).detach(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    "method, peer_class, eps",
    [
        ("grad", GradCAM, 0.0),
        ("gradpp", GradCAMPlusPlus, 1e-6),
        ("xgrad", XGradCAM, 0.0),
        ("hires", HiResCAM, 0.0),
        ("layer", LayerCAM, 0.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_agrees_with_pytorch_grad_cam(net, method, peer_class, eps, dtype):
    model, films, maps = net
    model, films, maps = model.to(dtype), films.to(dtype), maps.to(dtype)
    peer = peer_class(model=model, target_layers=[model.trunk])
    for c in range(4):
        targets = [ClassifierOutputTarget(c)] * len(films)
        final = peer(films, targets=targets)
        activations = peer.activations_and_grads.activations[0].numpy()
        gradients = peer.activations_and_grads.gradients[0].numpy()
        raw = peer.get_cam_image(films, model.trunk, targets, activations, gradients, False)
        ours = class_activation_maps(maps, model.head.weight, method, eps=eps)[:, c]
        # XGradCAM adds 1e-7 to the sum of a map, so it is not exact.
        np.testing.assert_allclose(
            ours, raw, rtol=1e-5 if dtype == torch.float32 or method == "xgrad" else 1e-10, atol=1e-7
        )
        # Its final maps: rectified, min-max (with 1e-7 in the denominator), resized with cv2, min-max once more.
        np.testing.assert_allclose(normalise(resize(normalise(ours), films.shape[2:])), final, atol=1e-4)


def test_precision_and_batch_do_not_matter():
    maps, weights = (
        features((5, 32, 7, 7), dtype=torch.float32),
        features((15, 32), 1, signed=True, dtype=torch.float32),
    )
    for method in METHODS:
        whole = class_activation_maps(maps, weights, method)
        assert whole.dtype == torch.float32
        parts = torch.cat([class_activation_maps(maps[i : i + 1], weights, method) for i in range(5)])
        torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)
        strided = class_activation_maps(maps.to(memory_format=torch.channels_last), weights, method)
        torch.testing.assert_close(whole, strided, rtol=1e-5, atol=1e-6)
        exact = class_activation_maps(maps.double(), weights.double(), method)
        torch.testing.assert_close(whole.double(), exact, rtol=1e-4, atol=1e-5)


def test_extreme_values_stay_finite():
    weights = torch.tensor([[1e-30, -1e-30], [1e15, 1e-15]], dtype=torch.float32)
    maps = torch.full((1, 2, 3, 3), 1e15)
    maps[:, 1] = 0
    for method in METHODS:
        assert torch.isfinite(class_activation_maps(maps, weights, method)).all(), method
    # g^2 would underflow in float32: the weight must still be relu(g) / 2 where the map sums to 0.
    zero_sum = torch.tensor([1.0, -1.0]).reshape(1, 1, 1, 2)
    raw = class_activation_maps(zero_sum, torch.tensor([[1e-25]]), "gradpp")
    torch.testing.assert_close(raw.flatten(), torch.tensor([1e-25, -1e-25]) / 2, rtol=1e-6, atol=0)


def test_gradpp_without_a_denominator_is_zero():
    maps = torch.tensor([[[[-5.0, 3.0]], [[2.0, 1.0]]]])  # S = -2 with g = 1: 2 g^2 + S g^3 = 0
    raw = class_activation_maps(maps, torch.tensor([[2.0, 2.0]]), "gradpp")
    torch.testing.assert_close(raw.flatten(), 2 / 5 * maps[0, 1].flatten())
    assert channel_contributions(maps, torch.tensor([[2.0, 2.0]]), "gradpp")[0, 0, 0] == 0


def test_xgrad_drops_a_channel_whose_map_sums_to_zero():
    maps = torch.tensor([[[[-5.0, 5.0]], [[2.0, 1.0]]]])  # sum(g A) / S is 0/0 in the first, which is dropped
    raw = class_activation_maps(maps, torch.tensor([[4.0, 2.0]]), "xgrad")
    torch.testing.assert_close(raw.flatten(), maps[0, 1].flatten())
    rows = torch.tensor([0])
    torch.testing.assert_close(pair_maps(maps, torch.tensor([[4.0, 2.0]]), rows, rows, "xgrad"), raw[0])
    whole = class_activation_maps(maps, torch.tensor([[4.0, 2.0]]), "hires")
    assert not torch.equal(whole, raw)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_not_finite_is_named(method, value):
    maps, weights = features(), features((4, 6), 1, signed=True)
    weights[:, 3] = 0
    maps[1, 3, 2, 2] = value
    with pytest.raises(ValueError, match="film 1 of the batch, channel 3"):
        class_activation_maps(maps, weights, method)
    with pytest.raises(ValueError, match="class 2, channel 5"):
        broken = weights.clone()
        broken[2, 5] = value
        class_activation_maps(features(), broken, "cam")


def test_wrong_input_is_refused():
    maps, weights = features(), features((4, 6))
    with pytest.raises(ValueError, match="unknown CAM method 'gradcam'"):
        class_activation_maps(maps, weights, "gradcam")
    with pytest.raises(ValueError, match=r"got \(3, 6, 4, 5\) and \(4, 5\)"):
        class_activation_maps(maps, weights[:, :5])
    with pytest.raises(ValueError, match=r"classes must lie in 0..3, got 0..4"):
        pair_maps(maps, weights, torch.tensor([0, 1]), torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"rows must lie in 0..2, got -1..1"):
        pair_maps(maps, weights, torch.tensor([-1, 1]), torch.tensor([0, 0]))


def test_normalise():
    raw = torch.tensor(
        [
            [[-3.0, 1.0], [2.0, 5.0]],
            [[1.0, 2.0], [3.0, 5.0]],
            [[0.0, 0.0], [0.0, 0.0]],
            [[-1.0, -2.0], [-3.0, -4.0]],
            [[7.0, 7.0], [7.0, 7.0]],
        ]
    )
    torch.testing.assert_close(normalise(raw)[0], torch.tensor([[0, 0.2], [0.4, 1]]))
    torch.testing.assert_close(
        normalise(raw)[1], torch.tensor([[0, 0.25], [0.5, 1]])
    )  # min-max takes a positive floor away
    assert normalise(raw)[2:].abs().max() == 0
    torch.testing.assert_close(normalise(raw, rectify=False)[0], torch.tensor([[0, 0.5], [0.625, 1]]))
    torch.testing.assert_close(normalise(raw, rectify=False)[3], torch.tensor([[1, 2 / 3], [1 / 3, 0]]))
    speckle = torch.full((4, 4), 3.0) * (1 + 2e-7 * features((4, 4), signed=True, dtype=torch.float32))
    assert normalise(speckle).abs().max() == 0
    deep = torch.tensor([[-3e6, 0, 1, 2]])  # flat beside its negative part, but that is cut off first
    assert normalise(deep).tolist() == [[0, 0, 0.5, 1]]
    assert normalise(torch.tensor([[-1e30, -1e23]])).abs().max() == 0
    assert normalise(torch.tensor([[-3e38, 3e38]]), rectify=False).tolist() == [[0, 1]]
    torch.testing.assert_close(normalise(torch.tensor([[0, 1e-37, 2e-37]])), torch.tensor([[0, 0.5, 1]]))
    with pytest.raises(ValueError, match=r"map \[1\]"):
        normalise(torch.stack([torch.ones(2, 2), torch.full((2, 2), float("nan"))]))


def test_resize_is_half_pixel_bilinear():
    ramp = torch.arange(4.0).reshape(1, 1, 4).expand(2, 4, 4)
    out = resize(ramp, 8)
    assert out.shape == (2, 8, 8)
    torch.testing.assert_close(out[0, 0], torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]))
    assert resize(ramp[0], (3, 5)).shape == (3, 5)
