import copy
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from captum.attr import LRP as CaptumLRP
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule
from torch import nn
from zennit.attribution import Gradient
from zennit.composites import LayerMapComposite
from zennit.core import Composite
from zennit.rules import AlphaBeta, Norm, Pass, ZBox

from lib.analysis.relevance import rules as module_under_test
from lib.analysis.relevance.heatmaps import conservation, heatmaps
from lib.analysis.relevance.rules import RelevanceError, ZPlus
from lib.models import build_model
from tests.analysis.relevance import reference_relevance
from tests.toys import Dense, Residual, VggLike, films, make

NETS = [VggLike, partial(VggLike, 1), Residual, Dense]
CLASSES = torch.tensor([2, 0, 1])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batchnorm": "merge"},
        {"first_layer": "alpha1beta0"},
        {"first_layer": (-5.0, 6.0)},
        {"init": "logit"},
        {"negative": "authors_conv"},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["lrp", "rap"])
@pytest.mark.parametrize("build", NETS, ids=["vgg", "vgg1", "residual", "dense"])
def test_equals_the_equations(build, method, options):
    net = make(build)
    x = films(channels=next(net.parameters()).shape[1])
    ours = heatmaps(net, x, CLASSES, method, **options)
    assert ours.shape == (3, 8, 8) and not ours.requires_grad and ours.dtype == torch.float64
    network = reference_relevance.network_of(net, options.get("batchnorm") == "merge")
    known = {key: value for key, value in options.items() if key != "batchnorm"}
    for film in range(3):
        expected, logits = reference_relevance.explain(
            network, x[film].numpy(), int(CLASSES[film]), method, **{"init": "one", **known}
        )
        np.testing.assert_allclose(
            logits, net(x[film : film + 1]).detach()[0], rtol=1e-10
        )  # the two networks are the same one
        expected = expected.reshape(x[film].shape).sum(0)
        assert np.abs(expected).max() > 1e-5
        np.testing.assert_allclose(ours[film], expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max())


def test_options_matter():
    x = films()
    for net, method, option in [
        (make(VggLike), "lrp", {"first_layer": "alpha1beta0"}),
        (make(VggLike), "lrp", {"first_layer": (-5.0, 6.0)}),
        (make(Residual), "lrp", {"batchnorm": "merge"}),
        (make(Dense), "rap", {"batchnorm": "merge"}),
        (make(Residual), "rap", {"negative": "authors_conv"}),
        (make(Residual), "lrp", {"method": "rap"}),
    ]:
        plain, other = heatmaps(net, x, CLASSES, method), heatmaps(net, x, CLASSES, **{"method": method, **option})
        assert (plain - other).abs().max() > 0.01 * plain.abs().max(), option


@pytest.mark.parametrize("method", ["lrp", "rap"])
def test_a_transition_is_one_convolution_of_stride_two(method):
    net = make(Dense)
    fused = copy.deepcopy(net)
    fused.conv, fused.pool = nn.Conv2d(7, 12, 2, 2, dtype=torch.float64), nn.Identity()
    fused.conv.weight.data.copy_(net.conv.weight.data.expand(12, 7, 2, 2) / 4)
    fused.conv.bias.data.copy_(net.conv.bias.data)
    torch.testing.assert_close(
        heatmaps(net, films(), CLASSES, method), heatmaps(fused, films(), CLASSES, method), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("method", ["lrp", "rap"])
@pytest.mark.parametrize("build", NETS, ids=["vgg", "vgg1", "residual", "dense"])
def test_a_negative_logit(build, method):
    """The map from the logit is the map from 1 times the logit: all of it turns sign, and its sum is the logit."""
    net = make(build)
    x = films(8, channels=next(net.parameters()).shape[1])
    worst = torch.ones(8, dtype=torch.int64)
    [layer for layer in net.modules() if isinstance(layer, nn.Linear)][-1].bias.data[1] = -9
    values = net(x).detach()[:, 1]
    assert (values < 0).all()
    one, logit = heatmaps(net, x, worst, method), heatmaps(net, x, worst, method, init="logit")
    torch.testing.assert_close(logit, one * values[:, None, None], rtol=1e-8, atol=1e-10)
    if method == "lrp" and build not in (Residual,):  # a residual sum may hand out negative shares
        assert (one >= 0).all() and (one.sum((1, 2)) > 0.5).all()
    frame = conservation(net, x, worst, method)
    whole = frame[frame.layer == "(whole model)"]
    np.testing.assert_allclose(whole.relevance_out, values, rtol=1e-12)
    np.testing.assert_allclose(whole.relevance_in + whole.dropped, whole.relevance_out, rtol=1e-7)
    np.testing.assert_allclose(whole.relevance_in, logit.sum((1, 2)), rtol=1e-10)


def torchvision_net(name, **options):
    return lambda: getattr(torchvision.models, name)(num_classes=4, **options)


def vgg11():
    """With fewer hidden units, which take most of its time and show nothing more."""
    net = torchvision_net("vgg11", init_weights=False)()
    net.classifier[0], net.classifier[3], net.classifier[6] = (
        nn.Linear(*sizes) for sizes in ((512 * 49, 256), (256, 256), (256, 4))
    )
    return net


# Float32, as in use. DenseNet and the project's own models write parts of forward as functions; timm's residual sum is
# one, too.
REAL = {
    "vgg11": vgg11,
    "resnet18": torchvision_net("resnet18"),
    "densenet121": torchvision_net("densenet121"),
    "timm resnet10t": lambda: timm.create_model("resnet10t", num_classes=4),
    "our resnet50": lambda: build_model("resnet50", 4),
    "our tdensenet": lambda: build_model("tdensenet", 4),
    "our vgg16": lambda: build_model("vgg16", 4),
    "our densenet121": lambda: build_model("densenet121", 4),
}


@pytest.mark.parametrize("name", REAL)
def test_sums_in_real_architectures(name):
    net = make(REAL[name], dtype=torch.float32)
    x, classes = films(2, 64, dtype=torch.float32), torch.tensor([3, 1])
    torch.testing.assert_close(heatmaps(net, x, classes).sum((1, 2)), torch.ones(2), rtol=1e-5, atol=0)
    frame = conservation(net, x, classes, "rap", init="one")
    mass = frame.relevance_out.abs() + frame.relevance_in.abs()
    # RAP's signed relevance grows large in a random residual net, and float32 knows its sums less well.
    assert ((frame.relevance_in + frame.dropped - frame.relevance_out).abs() <= 1e-2 * mass).all()
    np.testing.assert_allclose(frame.relevance_in[frame.layer == "(whole model)"], 1, rtol=1e-2)
    assert len(frame) == 2 * frame.layer.nunique() and (frame.dropped == 0).mean() > 0.9
    weighted = frame[frame.film == 0].rule.isin(["ZBox", "RelativeInfluence", "AbsoluteInfluence"])
    assert weighted.sum() == sum(isinstance(layer, nn.Conv2d | nn.Linear) for layer in net.modules())


def test_timm_and_torchvision_resnets_agree():
    ours, theirs = (
        make(lambda: torchvision.models.resnet18(num_classes=3)),
        make(lambda: timm.create_model("resnet18", num_classes=3)),
    )
    theirs.load_state_dict(ours.state_dict())
    x = films(2, 64)
    for method in ("lrp", "rap"):
        torch.testing.assert_close(
            heatmaps(ours, x, CLASSES[:2], method), heatmaps(theirs, x, CLASSES[:2], method), rtol=1e-6, atol=1e-9
        )


def test_agrees_with_zennit():
    net, x = make(VggLike), films()
    for film in range(3):
        composite = LayerMapComposite(
            [
                (nn.Conv2d, AlphaBeta(1, 0, stabilizer=1e-14, zero_params="bias")),
                (nn.Linear, AlphaBeta(1, 0, stabilizer=1e-14, zero_params="bias")),
                (nn.AvgPool2d, Norm(stabilizer=1e-14)),
                (nn.ReLU, Pass()),
            ]
        )
        box = ZBox(float(x[film].min()), float(x[film].max()), stabilizer=1e-14, zero_params="bias")
        mapped = composite.module_map

        def first_is_boxed(context, name, module, mapped=mapped, box=box):
            return box if name == "features.0" else mapped(context, name, module)

        with Gradient(net, Composite(first_is_boxed)) as attributor:
            _, peer = attributor(x[film : film + 1], torch.eye(3, dtype=torch.float64)[CLASSES[film : film + 1]])
        torch.testing.assert_close(
            heatmaps(net, x[film : film + 1], CLASSES[film : film + 1])[0], peer[0].sum(0), rtol=1e-6, atol=1e-9
        )


def test_the_rules_are_zennit_hooks():
    net, x = make(VggLike), films()
    net.features[1] = net.features[4] = net.classifier[1] = nn.ReLU()
    rules = {
        nn.Conv2d: ZPlus(),
        nn.Linear: ZPlus(),
        nn.AvgPool2d: module_under_test.Norm(),
        nn.MaxPool2d: module_under_test.WinnerTakeAll(),
        nn.ReLU: module_under_test.Pass(),
    }
    composite = Composite(
        lambda context, name, module: module_under_test.ZBox() if name == "features.0" else rules.get(type(module))
    )
    with Gradient(net, composite) as attributor:
        _, peer = attributor(x, torch.eye(3, dtype=torch.float64)[CLASSES])
    torch.testing.assert_close(peer.sum(1), heatmaps(net, x, CLASSES), rtol=1e-12, atol=1e-14)


def test_agrees_with_captum():
    net, x = make(VggLike), films().abs()  # captum's rule is for inputs that are not negative
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.bias.data.zero_()
            layer.rule = Alpha1_Beta0_Rule()
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    ours = heatmaps(net, x, CLASSES, init="logit", first_layer="alpha1beta0")
    peer = CaptumLRP(net).attribute(x, target=CLASSES)
    torch.testing.assert_close(ours, peer.detach().sum(1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["lrp", "rap"])
@pytest.mark.parametrize("build", [VggLike, Residual, Dense])
def test_batch_precision_and_memory_layout_do_not_matter(build, method):
    net, x = make(build), films(5)
    x[3] = 0.7  # a film without contrast among the others
    classes = torch.tensor([0, 1, 2, 0, 1])
    whole = heatmaps(net, x, classes, method)
    alone = torch.cat([heatmaps(net, x[i : i + 1], classes[i : i + 1], method) for i in range(5)])
    torch.testing.assert_close(whole, alone, rtol=1e-9, atol=1e-12)
    repeated = heatmaps(net, x[[2, 2]], torch.tensor([2, 0]), method)
    torch.testing.assert_close(repeated[0], whole[2], rtol=1e-9, atol=1e-12)
    assert (repeated[1] - whole[2]).abs().max() > 1e-4
    torch.testing.assert_close(
        heatmaps(net, x.to(memory_format=torch.channels_last), classes, method), whole, rtol=1e-9, atol=1e-12
    )
    single = heatmaps(net.float(), x.float(), classes, method)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))


@pytest.mark.parametrize("method", ["lrp", "rap"])
def test_a_film_without_contrast_has_an_empty_map(method):
    """Between its own minimum and maximum there is no room: everything is dropped, which is a loss by definition and no
    error."""
    net, x = make(VggLike), films()
    x[1] = 0.7
    maps = heatmaps(net, x, CLASSES, method)
    assert (maps[1] == 0).all() and (maps[0] != 0).any()
    frame = conservation(net, x, CLASSES, method, init="one").set_index(["film", "layer"])
    assert frame.loc[(1, "features.0"), "dropped"] == pytest.approx(frame.loc[(1, "features.0"), "relevance_out"])
    assert frame.loc[(0, "features.0"), "dropped"] == 0


def test_neurons_driven_by_their_bias_alone():
    """LRP drops what reaches them; RAP's shift restores the sum. Without any input at all RAP has nobody to give it
    to."""
    net = nn.Sequential(
        nn.Conv2d(1, 2, 1),
        nn.ReLU(),
        nn.Conv2d(2, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2, 1),
    ).double()
    with torch.no_grad():
        for layer, weight, bias in ((0, [[1.0], [1.0]], [0.0, 0.0]), (2, [[1.0, 1.0], [-1.0, -1.0]], [0.0, 50.0])):
            net[layer].weight.copy_(torch.tensor(weight)[..., None, None])
            net[layer].bias.copy_(torch.tensor(bias))
        net[6].weight.fill_(1)
        net[6].bias.fill_(0)
    x = torch.rand(1, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    zero = torch.tensor([0])
    share = float(
        (net[:5](x)[0, 1] / net[:5](x).sum()).detach()
    )  # of the neuron whose weights are all negative: its z+ is 0 everywhere
    assert share > 0.5
    options = {"init": "one", "first_layer": "alpha1beta0"}  # z^B has nothing for the darkest pixel
    frame = conservation(net, x, zero, "lrp", **options).set_index("layer")
    assert frame.dropped["2"] == pytest.approx(share) and frame.relevance_in["(whole model)"] == pytest.approx(
        1 - share
    )
    assert heatmaps(net, x, zero, "rap", **options).sum() == pytest.approx(1)
    assert (heatmaps(net, -x, zero, "rap", **options) == 0).all()
    assert conservation(net, -x, zero, "rap", **options).set_index("layer").dropped["2"] == pytest.approx(1)


def flags(net):
    """What an explanation sets or hangs on a layer, of every layer."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [
        (layer.training, getattr(layer, "inplace", None), *(len(getattr(layer, name)) for name in hooks))
        for layer in net.modules()
    ]


def test_the_model_is_left_as_it_was():
    net = make(Residual)
    expected = heatmaps(net, films(), CLASSES, "rap")
    net.train()
    net.layer2.eval()
    seen = []
    net.layer1.bn2.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    net.conv1.weight.requires_grad_(False)
    before = flags(net)
    state = copy.deepcopy(net.state_dict())
    x = films()
    copied = x.clone()
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            inside = films() if mode is torch.inference_mode else x
            torch.testing.assert_close(heatmaps(net, inside, CLASSES, "rap"), expected, rtol=0, atol=0)
    assert flags(net) == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters()) and not net.conv1.weight.requires_grad
    assert torch.equal(x, copied) and x.grad is None
    net.lstm = nn.LSTM(2, 2)  # unused: no obstacle
    heatmaps(net, x, CLASSES)
    net.layer1.relu = nn.GELU()
    with pytest.raises(RelevanceError, match="GELU"):
        heatmaps(net, x, CLASSES)
    assert net.training and not net.layer2.training


class Head(nn.Module):
    """A convolution, then whatever `middle` does, then the logits."""

    def __init__(self, middle, **layers):
        super().__init__()
        self.conv, self.head, self.middle = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3), middle
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, films):
        return self.head(self.middle(self, self.conv(films)).mean((2, 3)))


def gives_positive(net, x):
    return x if x.sum() > 0 else -x


def read_after_in_place(net, x):
    F.relu(x, inplace=True)
    return x


class OddConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) ** 2


@pytest.mark.parametrize(
    "middle, layers, named",
    [
        (lambda net, x: net.layer(x), {"layer": nn.GELU()}, r"GELU \(layer\)"),
        (lambda net, x: F.gelu(x), {}, "gelu"),
        (lambda net, x: net.layer(x), {"layer": nn.LayerNorm([4, 8, 8])}, r"LayerNorm \(layer\)"),
        (lambda net, x: net.layer(x.flatten(2))[0][..., None], {"layer": nn.LSTM(64, 5)}, "LSTM"),
        (lambda net, x: net.layer(x), {"layer": nn.GroupNorm(2, 4)}, "GroupNorm"),
        (lambda net, x: net.layer(x), {"layer": nn.BatchNorm2d(4, track_running_stats=False)}, "BatchNorm2d"),
        (lambda net, x: net.layer(x), {"layer": OddConv(4, 4, 1)}, "pow"),
        (lambda net, x: net.layer(x), {"layer": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")}, "Conv2d"),
        (lambda net, x: x * x, {}, "mul"),
        (lambda net, x: x + 1, {}, "add"),
        (lambda net, x: 1 - x, {}, "sub"),
        (lambda net, x: torch.add(x, x, alpha=2), {}, "add"),
        (lambda net, x: torch.cat([x, x], 0), {}, "cat"),
        (lambda net, x: x.mean(1, keepdim=True).expand(-1, 4, -1, -1), {}, "mean"),
        (lambda net, x: x.relu().detach(), {}, "detach"),
        (lambda net, x: F.conv2d(x, net.layer.weight), {"layer": nn.Conv2d(4, 4, 1)}, "conv2d"),
        (lambda net, x: x + x.mean((2, 3), keepdim=True), {}, "adds tensors of shapes"),
        (gives_positive, {}, "cannot be followed"),
        (read_after_in_place, {}, "other logits"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_operations_without_a_rule_are_refused_by_name(middle, layers, named):
    net = make(lambda: Head(middle, **layers))
    with pytest.raises(RelevanceError, match=named) as caught:
        heatmaps(net, films(), CLASSES)
    assert "Supported: Conv2d" in str(caught.value)


def test_more_models_that_are_refused():
    x = films(1, 32, dtype=torch.float32)
    with pytest.raises(RelevanceError, match="batch_norm"):
        heatmaps(make(lambda: timm.create_model("densenet121", num_classes=2), dtype=torch.float32), x, CLASSES[1:2])
    sigmoid = nn.Sequential(make(VggLike), nn.Sigmoid())
    with pytest.raises(RelevanceError, match=r"Sigmoid \(1\).*the logit"):
        heatmaps(sigmoid, films(), CLASSES)
    with pytest.raises(RelevanceError, match="one tensor of logits"):
        heatmaps(Pair(), films(), CLASSES)
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    with pytest.raises(RelevanceError, match="RAP starts at the linear layer.* but 2 gives"):
        heatmaps(pooled, films(), CLASSES, "rap")
    hooked = make(Residual)
    hooked.layer1.conv2.register_forward_hook(lambda layer, inputs, output: 2 * output)
    with pytest.raises(RelevanceError, match="other logits"):
        heatmaps(hooked, films(), CLASSES)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1, dtype=torch.float64)

    def forward(self, films):
        return self.conv(films), films


@pytest.mark.parametrize("method", ["lrp", "rap"])
def test_relevance_that_is_not_conserved_is_never_returned(monkeypatch, method):
    """Twice the relevance at every residual sum, as libraries give that overlook it."""
    rule = module_under_test.Norm.distribute

    def twice(self, module, inputs, relevance):
        dropped = relevance.new_zeros(len(relevance), dtype=torch.float64)
        return ((relevance, relevance), dropped) if len(inputs) == 2 else rule(self, module, inputs, relevance)

    monkeypatch.setattr(module_under_test.Norm, "distribute", twice)
    net = make(Residual)
    with pytest.raises(RelevanceError, match=r"not conserved at layer2\.add.*ratio 2\. .*Supported"):
        heatmaps(net, films(), CLASSES, method)
    frame = conservation(net, films(), CLASSES, method)
    np.testing.assert_allclose(frame.ratio[frame.layer == "layer2.add"], 2)
    monkeypatch.undo()
    # A loss between the layers, which no single layer sees.
    monkeypatch.setattr(
        module_under_test.Pass,
        "distribute",
        lambda self, module, inputs, relevance: (
            (0.9 * relevance.reshape(inputs[0]),),
            relevance.new_zeros(len(relevance), dtype=torch.float64),
        ),
    )
    with pytest.raises(RelevanceError, match="not conserved at the whole model"):
        heatmaps(net, films(), CLASSES, method)


def test_broken_weights_are_found_where_they_are():
    net = make(Residual)
    net.layer1.conv2.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(RelevanceError, match="film 0 has a logit that is not finite"):
        heatmaps(net, films(), CLASSES)
    with pytest.raises(RelevanceError, match="film 0 is not finite"):
        heatmaps(net, films(), CLASSES, check=False)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "cam"}, "unknown method 'cam'; choose one of lrp, rap"),
        ({"init": "f"}, "unknown init"),
        ({"batchnorm": "x"}, "unknown batchnorm"),
        ({"negative": "x"}, "unknown negative"),
        ({"first_layer": "w2"}, "first_layer must be"),
        ({"first_layer": (1, 2, 3)}, "first_layer must be"),
        ({"first_layer": (-1.0, 1.0)}, "beyond the bounds"),
        ({"classes": torch.tensor([0, 1, 3])}, r"classes 0\.\.3 do not fit logits of shape \(3, 3\)"),
        ({"classes": torch.tensor([0, -1, 2])}, r"classes -1\.\.2 do not fit"),
        ({"classes": torch.tensor([0, 1])}, "one integer for each of the 3"),
        ({"classes": torch.tensor([0.0, 1, 2])}, "one integer"),
        ({"films": films().half()}, "must be float32 or float64"),
        ({"films": films()[0]}, "must be float32 or float64"),
        ({"films": films()[:0]}, "must be float32"),
        ({"films": films().float()}, "films are torch.float32, but the model's weights are torch.float64"),
        ({"films": films() / torch.tensor([1.0, 0, 1]).reshape(3, 1, 1, 1)}, "film 1 holds NaN or infinite"),
    ],
)
def test_bad_arguments(changes, message):
    arguments = {"films": films(), "classes": CLASSES, **changes}
    with pytest.raises(ValueError, match=message):
        heatmaps(make(VggLike), **arguments)
