import copy

import numpy as np
import pytest
import torch
from pytorch_grad_cam import GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, XGradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn
from torchcam.methods import ISCAM, SSCAM, ScoreCAM

from lib.analysis.cam import channel_contributions, class_activation_maps
from lib.analysis.model_cams import GRADIENT_METHODS, METHODS, PERTURBATION_METHODS, model_cams, passes_per_film
from tests.analysis import reference_cam
from tests.toys import Tokens, Unpooled, seeded, two_convolutions

GENERAL = [method for method in METHODS if method != "cam"]
SMALL = {"smooth_gradpp": 3, "ss": 3, "is": 4}
CUMULATIVE = [0.25, 0.75, 1.5, 2.5]


def build(kind, *arguments, shape=(3, 3, 12, 12), dtype=torch.float64):
    with seeded(5):
        return kind(*arguments).to(dtype).eval(), torch.randn(shape, dtype=torch.float64).to(dtype)


def noise_of(method, seed, shape=(12, 12), channels=6):
    generator = torch.Generator().manual_seed(seed)
    if method == "smooth_gradpp":
        return 0.3 * torch.randn(3, 3, *shape, generator=generator).double()
    return (
        2
        * torch.stack(
            [torch.stack([torch.randn(shape, generator=generator) for _ in range(channels)]) for _ in range(3)]
        ).double()
    )


def expected_map(net, film, c, method, seed=0, **options):
    if method in ("smooth_gradpp", *PERTURBATION_METHODS):
        if method == "is":
            options.setdefault("coefficients", CUMULATIVE)
        return reference_cam.film_map(film, net.front, net.after, c, method, noise=noise_of(method, seed), **options)
    return reference_cam.raw_map(net.front(film[None])[0], net.after, c, method)


@pytest.mark.parametrize("method", GENERAL)
def test_equals_the_definition_at_any_layer(method):
    net, films = build(Unpooled)
    with torch.no_grad():
        net.front.weight[4], net.front.bias[4] = 0, 0.7  # a constant channel
        net.front.weight[5], net.front.bias[5] = 0, 0  # a dead one
        net.tail[4].weight[3] = 0  # a class that sees nothing
    ours = model_cams(net.train(), films, "front", [2, 0, 3], method, samples=SMALL.get(method), seed=[7, 8, 9])
    assert not net.training and ours.maps.shape == (3, 3, 4, 4) and ours.contributions.shape == (3, 3, 6)
    for film in range(3):
        for position, c in enumerate([2, 0, 3]):
            expected = expected_map(net, films[film], c, method, 7 + film)
            np.testing.assert_allclose(ours.maps[film, position], expected, rtol=1e-9, atol=1e-13)
    if method in GRADIENT_METHODS:
        assert ours.maps[:, 2].abs().max() == 0
    else:
        torch.testing.assert_close(ours.maps[:, 2], net.front(films).detach().mean(1))
    assert (ours.contributions[:, :, 5] == 0).all()
    torch.testing.assert_close(ours.contributions.sum(2), ours.maps.sum((2, 3)))
    torch.testing.assert_close(ours.logits, net(films).detach())


def test_options_of_the_smooth_and_integrated_methods():
    net, films = build(Unpooled)
    riemann = model_cams(net, films, "front", [1], "is", samples=4, cumulative=False).maps[0, 0]
    np.testing.assert_allclose(
        riemann, expected_map(net, films[0], 1, "is", coefficients=[0.25, 0.5, 0.75, 1]), rtol=1e-9
    )
    printed = model_cams(net, films, "front", [1], "smooth_gradpp", samples=3, numerator=1).maps[0, 0]
    np.testing.assert_allclose(printed, expected_map(net, films[0], 1, "smooth_gradpp", numerator=1), rtol=1e-9)
    quiet = model_cams(net, films, "front", None, "smooth_gradpp", samples=2, sigma=0)
    torch.testing.assert_close(quiet.maps, model_cams(net, films, "front", None, "gradpp").maps)
    still = model_cams(net, films, "front", None, "ss", samples=2, sigma=0)
    torch.testing.assert_close(still.maps, model_cams(net, films, "front", None, "score").maps)


@pytest.mark.parametrize("method, eps", [*((method, 0) for method in GRADIENT_METHODS[:-1]), ("gradpp", 1e-6)])
def test_equals_the_closed_form_at_the_pooled_layer(method, eps):
    net, films = build(two_convolutions)
    with torch.no_grad():
        net.trunk[2].weight[3], net.trunk[2].bias[3], net.head.weight[1, 2] = 0, 0, 0
    maps, weights = net.trunk(films).detach(), net.head.weight.detach()
    ours = model_cams(net, films, "trunk", None, method, eps=eps)
    torch.testing.assert_close(ours.maps, class_activation_maps(maps, weights, method, eps=eps), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(
        ours.contributions, channel_contributions(maps, weights, method, eps=eps), rtol=1e-12, atol=1e-14
    )
    if method in ("xgrad", "hires"):
        torch.testing.assert_close(ours.maps.sum((2, 3)), ours.logits - net.head.bias.detach())


@pytest.mark.parametrize(
    "method, peer_class",
    [("grad", GradCAM), ("gradpp", GradCAMPlusPlus), ("xgrad", XGradCAM), ("hires", HiResCAM), ("layer", LayerCAM)],
)
def test_agrees_with_pytorch_grad_cam(method, peer_class):
    net, films = build(Unpooled)
    net.relu.inplace = net.tail[1].inplace = False  # its hooks would see maps that the ReLU has written over
    peer = peer_class(model=net, target_layers=[net.front])
    ours = model_cams(net, films, "front", None, method, eps=1e-6 if method == "gradpp" else 0).maps
    for c in range(4):
        targets = [ClassifierOutputTarget(c)] * len(films)
        peer(films, targets=targets)
        inner = peer.activations_and_grads
        raw = peer.get_cam_image(
            films, net.front, targets, inner.activations[0].numpy(), inner.gradients[0].numpy(), False
        )
        np.testing.assert_allclose(
            ours[:, c], raw, rtol=1e-10, atol=1e-6 if method == "xgrad" else 1e-12
        )  # 1e-7 in its sums


@pytest.mark.parametrize("method, peer_class", [("score", ScoreCAM), ("ss", SSCAM), ("is", ISCAM)])
def test_agrees_with_torch_cam(method, peer_class):
    # It normalises before it resizes. Here both orders agree: each film pixel in the middle of 3 x 3 lies on a native
    # one.
    net, films = build(Unpooled)
    net.relu.inplace = net.tail[1].inplace = False
    with torch.no_grad():
        net.tail[4].weight *= 20  # weights of the channels that differ
    ours = model_cams(net, films[:1], "front", None, method, seed=3).maps
    for c in range(4):
        with torch.random.fork_rng(), peer_class(net, "front", input_shape=(3, 12, 12)) as peer:
            net(films[:1])
            torch.manual_seed(3)  # its noise, in the order in which ours is drawn
            (raw,) = peer(class_idx=c, normalized=False)
        assert raw.max() > 0.1
        torch.testing.assert_close(ours[:, c].relu(), raw, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("method", ["grad", "gradpp", "xgrad", "hires", "layer"])
def test_tokens_become_maps(method, pooled):
    net, films = build(Tokens, pooled, shape=(2, 3, 12, 16))
    ours = model_cams(net, films, "first", None, method, token_grid=(3, 4))
    assert ours.maps.shape == (2, 3, 3, 4) and ours.maps.abs().amax((2, 3)).min() > 0
    for film in range(2):
        tokens = net.before(films[film : film + 1]).detach()
        extra, patches = tokens[:, :-12], tokens[:, -12:]
        maps = torch.stack([patches[0, 4 * y : 4 * y + 4].T for y in range(3)], dim=1)

        def tail(maps, extra=extra):
            return net.after(torch.cat([extra, maps.flatten(2).transpose(1, 2)], 1))

        for c in range(3):
            np.testing.assert_allclose(
                ours.maps[film, c], reference_cam.raw_map(maps, tail, c, method), rtol=1e-8, atol=1e-13
            )


@pytest.mark.parametrize("method", ["smooth_gradpp", *PERTURBATION_METHODS])
def test_tokens_of_perturbed_films(method):
    net, films = build(Tokens, True, shape=(2, 3, 12, 16))
    net.front = lambda film: net.before(film).transpose(1, 2).unflatten(2, (3, 4))
    tail = lambda maps: net.after(maps.flatten(2).transpose(1, 2))  # noqa: E731
    ours = model_cams(net, films, "first", [1], method, token_grid=(3, 4), samples=SMALL.get(method))
    noise = noise_of(method, 0, (12, 16), 8)
    expected = reference_cam.film_map(
        films[1], net.front, tail, 1, method, noise=noise, coefficients=CUMULATIVE if method == "is" else [1]
    )
    np.testing.assert_allclose(ours.maps[1, 0], expected, rtol=1e-8, atol=1e-12)


def test_the_class_token_alone_is_no_map():
    net, films = build(Tokens, shape=(2, 3, 12, 16))
    with pytest.raises(ValueError, match="after layer last only the class token reaches the logits"):
        model_cams(net, films, "last", None, "grad", token_grid=(3, 4))


def test_cam_of_pooled_tokens_has_the_weights_of_the_head():
    net, films = build(Tokens, True, shape=(2, 3, 12, 16))
    ours = model_cams(net, films, "last", None, "cam", token_grid=(3, 4))
    tokens = net.last(net.before(films)).detach()
    torch.testing.assert_close(ours.maps, (net.head.weight.detach() @ tokens.transpose(1, 2)).unflatten(2, (3, 4)))
    with pytest.raises(ValueError, match="'cam' cannot work with layer first"):
        model_cams(net, films, "first", None, "cam", token_grid=(3, 4))


@pytest.mark.parametrize("method", GENERAL)
def test_batch_classes_and_chunks_do_not_matter(method):
    net, films = build(Unpooled)
    options = {"method": method, "samples": SMALL.get(method)}
    whole = model_cams(net, films, "front", seed=[4, 5, 6], **options)
    for film in range(3):
        alone = model_cams(net, films[film : film + 1], "front", seed=4 + film, chunk=5, **options)
        torch.testing.assert_close(alone.maps, whole.maps[film : film + 1], rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(alone.contributions, whole.contributions[film : film + 1], rtol=1e-9, atol=1e-13)
    for c in range(4):
        one = model_cams(net, films, "front", [c], seed=[4, 5, 6], chunk=1, **options)
        torch.testing.assert_close(one.maps[:, 0], whole.maps[:, c], rtol=1e-9, atol=1e-13)
    single = model_cams(copy.deepcopy(net).float(), films.float(), "front", seed=[4, 5, 6], **options)
    assert single.maps.dtype == torch.float32
    scale = whole.maps.abs().max()
    assert (single.maps - whole.maps).abs().max() < (1e-2 if "gradpp" in method else 1e-4) * scale


@pytest.mark.parametrize("method", ["smooth_gradpp", "ss"])
def test_noise_is_seeded(method):
    net, films = build(Unpooled)

    def maps(seed):
        return model_cams(net, films, "front", [0], method, samples=3, seed=seed).maps

    state = torch.random.get_rng_state()
    first = maps(np.int64(1))
    assert torch.equal(first, maps(1)) and torch.equal(first, maps([1, 1, 1]))
    assert not torch.allclose(first, maps(2)) and torch.equal(first[:1], maps(torch.tensor([1, 2, 3]))[:1])
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("method", METHODS)
def test_feature_masks(method):
    net, films, layer, n = (
        (*build(two_convolutions), "trunk", 12) if method == "cam" else (*build(Unpooled), "front", 6)
    )
    options = {"method": method, "samples": SMALL.get(method)}
    whole = model_cams(net, films, layer, [3, 1], **options)
    mask = torch.zeros(2, n)
    mask[0, [0, 3]] = mask[1, 2] = 1
    kept, others = (model_cams(net, films, layer, [3, 1], features=m, **options) for m in (mask, 1 - mask))
    torch.testing.assert_close(kept.maps + others.maps, whole.maps)
    torch.testing.assert_close(kept.contributions, whole.contributions * mask)
    assert kept.maps.abs().amax((2, 3)).min() > 0 or "gradpp" in method
    everything = model_cams(net, films, layer, [3, 1], features=torch.ones(n), **options)
    torch.testing.assert_close(everything.maps, whole.maps, rtol=0, atol=0)


def test_the_model_and_the_caller_are_left_alone():
    net, films = build(Unpooled)
    expected = model_cams(net, films, "front", method="grad").maps
    assert (
        all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
        and not films.requires_grad
    )
    with torch.inference_mode():
        assert torch.equal(model_cams(net, films * 1, "front", method="grad").maps, expected)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    assert torch.equal(model_cams(net, films, "front", method="grad").maps, expected)
    with torch.inference_mode():
        assert torch.equal(model_cams(net, films * 1, "front", method="grad").maps, expected)
    with torch.no_grad():
        assert torch.equal(model_cams(net, films.requires_grad_(True), "front", method="grad").maps, expected)
    ours = model_cams(net, films, "front", method="smooth_gradpp")
    assert not (ours.maps.requires_grad or ours.contributions.requires_grad or ours.logits.requires_grad)
    assert not net.front._forward_hooks
    with pytest.raises(ValueError, match="runs 0 times"):
        net.spare = nn.Identity()
        model_cams(net, films, "spare")
    assert not net.spare._forward_hooks


def test_small_gradients_do_not_underflow():
    net, films = build(Unpooled, dtype=torch.float32)
    for method in ("gradpp", "smooth_gradpp"):
        net, films = build(Unpooled, dtype=torch.float32)
        with torch.no_grad():
            net.tail[4].weight *= 1e-20
        ours = model_cams(net, films, "front", method=method, sigma=0, samples=1).maps
        exact = model_cams(net.double(), films.double(), "front", method=method, sigma=0, samples=1).maps
        assert exact.abs().max() > 0
        torch.testing.assert_close(ours.double() * 1e20, exact * 1e20, rtol=1e-4, atol=1e-5)


def test_passes(monkeypatch):
    net, films = build(Unpooled)
    seen = {"forward": 0, "backward": 0}
    net.front.register_forward_hook(
        lambda module, inputs, output: seen.__setitem__("forward", seen["forward"] + len(output))
    )
    real = torch.autograd.grad

    def grad(outputs, inputs, *arguments, **options):
        seen["backward"] += len(inputs)
        return real(outputs, inputs, *arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    for method in GENERAL:
        for samples in (None, 2):
            seen.update(forward=0, backward=0)
            model_cams(net, films, "front", [0, 1, 3], method, samples=samples)
            assert (seen["forward"] / 3, seen["backward"] / 3) == passes_per_film(method, 6, 3, samples), method
    assert passes_per_film("ss", 2048, 15) == (71681, 0) and passes_per_film("score", 2048, 15) == (2049, 0)
    with pytest.raises(ValueError, match="unknown CAM method"):
        passes_per_film("ablation", 1, 1)


def test_progress_bar_counts_perturbed_films(capsys):
    net, films = build(Unpooled)
    model_cams(net, films, "front", [0], "is", samples=2, progress=True)
    assert "36/36" in capsys.readouterr().err
    model_cams(net, films, "front", [0], "is", samples=2)
    assert capsys.readouterr().err == ""


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair, self.conv, self.relu, self.cut, self.head = (
            Pair(),
            nn.Conv2d(3, 4, 3),
            nn.ReLU(),
            nn.Identity(),
            nn.Linear(4, 2),
        )

    def forward(self, films):
        self.cut(films)
        maps = self.relu(self.conv(self.relu(self.pair(films)[0])))
        return self.head(maps.amax((2, 3)))


class Root(nn.Module):
    """Logits whose gradient is infinite where the pooled maps are 0; it writes over its input."""

    def __init__(self):
        super().__init__()
        self.relu, self.gain = nn.ReLU(inplace=True), 1.0

    def forward(self, films):
        return self.gain * self.relu(films).mean((2, 3)) ** 0.5


def test_overflow_is_named():
    net = Root()
    films = torch.ones(2, 3, 4, 4)
    films[1, 2] = -1
    with pytest.raises(ValueError, match="gradient of class 2 at layer relu holds NaN"):
        model_cams(net, films, "relu", [2])
    assert films.min() == -1
    assert torch.isfinite(model_cams(net, films[:1], "relu").maps).all()
    net.gain = 1e30
    with pytest.raises(ValueError, match="map of class 1 at layer relu overflows"):
        model_cams(net, films[:1] * 1e30, "relu", [1], "hires")


class Skip(nn.Module):
    """The layer `same` hands its input on, and the network then adds to that input in place."""

    def __init__(self):
        super().__init__()
        self.conv, self.same, self.head = nn.Conv2d(3, 4, 3), nn.Identity(), nn.Linear(4, 2)

    def forward(self, films):
        maps = self.conv(films)
        out = self.same(maps)
        maps += 5
        return self.head((out * maps).mean((2, 3)))


def test_maps_are_those_at_the_layer_even_if_written_over():
    net, films = build(Skip, shape=(2, 3, 6, 6))
    maps = net.conv(films).detach()
    ours = model_cams(net, films, "same", None, "hires").maps
    expected = torch.einsum("cf,bfhw,bfhw->bchw", net.head.weight.detach() / 16, maps, maps + 5)
    torch.testing.assert_close(ours, expected)


def test_a_layer_that_runs_without_gradients_is_named():
    net, films = build(two_convolutions)
    maps = torch.no_grad()(lambda films: net.trunk(films))
    net.forward = lambda films: net.head(maps(films).mean((2, 3)))
    with pytest.raises(ValueError, match="have no gradient there"):
        model_cams(net, films, "trunk")
    assert model_cams(net, films, "trunk", [0], "score").maps.abs().max() > 0


class Pair(nn.Module):
    def forward(self, films):
        return films, films


@pytest.mark.parametrize(
    "layer, options, message",
    [
        ("relu", {}, "layer relu runs 2 times"),
        ("pair", {}, "layer pair gives a tuple"),
        ("cut", {}, "the logits do not depend on layer cut"),
        ("head", {}, r"layer head gives \(2, 2\)"),
        ("convolution", {}, "no module 'convolution'; there are pair, conv, relu, cut, head"),
        ("conv", {"method": "cam"}, "'cam' cannot work with layer conv"),
        ("conv", {"token_grid": (2, 2)}, "token_grid is for tokens"),
        ("conv", {"method": "gradcam"}, "unknown CAM method 'gradcam'"),
        ("conv", {"classes": [0, 2]}, r"classes must lie in 0\.\.1, got 2"),
        ("conv", {"classes": []}, "name at least one"),
        ("conv", {"seed": [1]}, "each of the 2 films, got 1"),
        ("conv", {"samples": 0, "method": "ss"}, "samples and chunk must be at least 1"),
        ("conv", {"features": [1, 3]}, r"\(4,\) or \(2, 4\), got shape \(2,\)"),
    ],
)
def test_wrong_input_is_refused(layer, options, message):
    net, films = build(Odd, shape=(2, 3, 6, 6))
    with pytest.raises(ValueError, match=message):
        model_cams(net, films, layer, **options)


@pytest.mark.parametrize("method", METHODS)
def test_no_films_are_named(method):
    net, films = build(two_convolutions)
    with pytest.raises(ValueError, match="there are no films to explain: the batch is empty"):
        model_cams(net, films[:0], "trunk", method=method)


class Films(nn.Module):
    """The films are the maps; their means over the film go through a linear head, or squared through a sum."""

    def __init__(self, squared):
        super().__init__()
        self.same, self.squared, self.head = nn.Identity(), squared, nn.Linear(3, 2, bias=False)
        self.head.weight.data.copy_(torch.tensor([[1.0, 2.0, -1.0], [0.5, -1.0, 3.0]]))

    def forward(self, films):
        maps = self.same(films)
        return self.head((maps**2 if self.squared else maps).mean((2, 3)))


@pytest.mark.parametrize("squared", [False, True])
def test_xgrad_gives_no_weight_to_a_map_whose_sum_is_0(squared):
    net, films = build(Films, squared, shape=(2, 3, 4, 4), dtype=torch.float32)
    films[0, 1] = torch.tensor([2.0, -2.0, 1.0, -1.0]).repeat(4, 1)  # not empty, but its sum is 0
    ours = model_cams(net, films, "same", method="xgrad")
    slope = 2 * films / 16 if squared else torch.full_like(films, 1 / 16)
    for n, film in enumerate(films):
        for c in range(2):
            expected = torch.zeros(4, 4)
            for k in range(3):
                total = film[k].double().sum()
                if total != 0:
                    expected += net.head.weight[c, k].item() * (slope[n, k] * film[k]).sum() / total * film[k]
            torch.testing.assert_close(ours.maps[n, c], expected.float(), rtol=1e-4, atol=1e-6)
    assert (ours.contributions[0, :, 1] == 0).all()
    if not squared:
        closed = class_activation_maps(films, net.head.weight.detach(), "xgrad")
        torch.testing.assert_close(closed, ours.maps, rtol=1e-4, atol=1e-6)


def test_wrong_tokens_and_values_are_refused():
    net, films = build(Tokens, shape=(2, 3, 12, 16))
    with pytest.raises(ValueError, match=r"first gives tokens \(2, 13, 8\).* = 13, or 12 if"):
        model_cams(net, films, "first")
    with pytest.raises(ValueError, match="first gives 13 tokens: token_grid 3 x 3 takes 9"):
        model_cams(net, films, "first", token_grid=(3, 3))
    net, films = build(Unpooled)
    films[1] = float("nan")
    for method in ("grad", "score"):
        with pytest.raises(ValueError, match="maps of layer front hold NaN .* film 1 of the batch, channel 0"):
            model_cams(net, films, "front", method=method)
    with pytest.raises(ValueError, match="film 0"), torch.no_grad():
        films = build(Unpooled)[1]
        net.front.bias[2] = float("inf")
        model_cams(net, films, "front")
