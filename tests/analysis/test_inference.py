from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from lib.analysis.inference import Output, as_maps, is_pooled, predict, recorded, stream
from lib.data.batches import Batch
from tests.toys import batches, films


def model(inplace=True):
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 6, 3, padding=1),
            norm=nn.BatchNorm2d(6),
            relu=nn.ReLU(inplace=inplace),
            drop=nn.Dropout(0.5),
            block=nn.Sequential(OrderedDict(conv=nn.Conv2d(6, 5, 3, stride=2), act=nn.ReLU(inplace=inplace))),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            head=nn.Linear(5, 4),
        )
    )
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.4)
        network.norm.running_var.fill_(0.7)
    return network


def images(n=11, side=12):
    return films(n, side, dtype=torch.float32)


def test_maps_are_those_before_an_inplace_relu():
    for layer, seen in (("norm", -1), ("block.conv", -1), ("relu", 0), ("block.act", 0)):
        outputs = {inplace: next(stream(model(inplace), batches(images(), 11), [layer])) for inplace in (True, False)}
        assert torch.equal(outputs[True].maps[layer], outputs[False].maps[layer])
        assert torch.equal(outputs[True].logits, outputs[False].logits)
        assert (outputs[True].maps[layer].min() < 0) == (seen < 0)


def test_maps_are_what_a_pass_by_hand_gives():
    network, films = model(), images()
    network.eval()
    with torch.no_grad():
        before = network.norm(network.conv1(films)).clone()
        logits = network(films)
    output = next(stream(network.train(), batches(films, 11), ["norm"]))
    assert torch.equal(output.maps["norm"], before) and torch.equal(output.logits, logits)


def test_evaluation_mode_without_gradients():
    network = model().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    outputs = list(stream(network, batches(images(), 4), ["block"]))
    assert not network.training and not network.drop.training
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items()
    )  # no running statistics moved
    for output in outputs:
        assert isinstance(output, Output) and not output.logits.requires_grad and not output.maps["block"].requires_grad
        assert output.logits.dtype == output.maps["block"].dtype == torch.float32


def test_the_callers_gradients_work_between_batches():
    weight = torch.ones(3, requires_grad=True)
    for _ in stream(model(), batches(images(), 4)):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        (weight * 2).sum().backward()
    assert weight.grad.tolist() == [6, 6, 6]


def test_several_layers_come_from_one_pass():
    network, passes = model(), []
    network.conv1.register_forward_hook(lambda *_: passes.append(1))
    outputs = list(stream(network, batches(images(), 6), ["block", "relu", "block"]))
    assert len(passes) == 2 and all(set(output.maps) == {"block", "relu"} for output in outputs)
    assert outputs[0].maps["relu"].shape == (6, 6, 12, 12) and outputs[0].maps["block"].shape == (6, 5, 5, 5)
    assert next(stream(network, batches(images(), 6))).maps == {}


def test_order_is_that_of_the_batches():
    order = np.random.default_rng(0).permutation(11)
    outputs = list(stream(model(), batches(images(), 4, order), ["block"]))
    assert np.concatenate([output.rows for output in outputs]).tolist() == order.tolist()
    straight = predict(model(), batches(images(), 4))
    np.testing.assert_allclose(predict(model(), batches(images(), 4, order)), straight[order], rtol=1e-5, atol=1e-6)
    assert straight.shape == (11, 4) and straight.dtype == np.float32


@pytest.mark.parametrize("size", [1, 3, 11])
def test_batch_size_does_not_matter(size):
    expected = next(stream(model(), batches(images(), 11), ["block"]))
    outputs = list(stream(model(), batches(images(), size), ["block"]))
    torch.testing.assert_close(torch.cat([output.logits for output in outputs]), expected.logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.cat([output.maps["block"] for output in outputs]), expected.maps["block"], rtol=1e-5, atol=1e-6
    )


def test_an_earlier_batchs_maps_are_not_overwritten():
    kept = list(stream(model(), batches(images(), 4), ["relu"]))
    again = [output.maps["relu"].clone() for output in stream(model(), batches(images(), 4), ["relu"])]
    assert all(torch.equal(output.maps["relu"], maps) for output, maps in zip(kept, again, strict=True))


@pytest.mark.parametrize(
    ("name", "known"),
    [("block.cnv", "block.conv, block.act"), ("layer4", "conv1, norm, relu"), ("stem.conv", "conv1, norm, relu")],
)
def test_an_unknown_layer_names_those_beside_it(name, known):
    with pytest.raises(ValueError, match=f"no module '{name}'; there are {known}"):
        list(stream(model(), batches(images(), 4), [name]))


def test_a_layer_without_maps_is_named():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.idle, self.head = nn.LSTM(3, 3, batch_first=True), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.pair(x.flatten(2).transpose(1, 2))[0].mean(1))

    for name, message in (
        ("pair", "layer pair gives a tuple, not a tensor of maps"),
        ("idle", "layer idle did not run in the forward pass"),
    ):
        with pytest.raises(ValueError, match=message):
            list(stream(Pair(), batches(images(), 4), [name]))


def test_no_hook_is_left_behind():
    network = model()
    with pytest.raises(ValueError, match="no module"), recorded(network, ["block", "nothing"]):
        pass
    stopped = stream(network, batches(images(), 4), ["block"])
    next(stopped)
    stopped.close()
    with pytest.raises(RuntimeError, match="channels"):
        list(stream(network, [Batch(np.arange(1), torch.zeros(1, 2, 8, 8), None)], ["block"]))
    assert not any(module._forward_hooks for module in network.modules())


# ---- tokens become maps


def test_tokens_lie_row_by_row_and_the_class_token_is_left_out():
    tokens = torch.arange(2 * 7 * 3).reshape(2, 7, 3).float()
    maps = as_maps(tokens, "x", [2, 3])
    assert maps.shape == (2, 3, 2, 3)
    for row in range(2):
        for column in range(3):
            assert torch.equal(maps[:, :, row, column], tokens[:, 1 + 3 * row + column])
    assert torch.equal(as_maps(tokens[:, 1:], "x", (2, 3)), maps)
    for none in ((), [], None):
        assert as_maps(maps, "x", none) is maps


@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        (
            (2, 7, 3),
            (),
            r"layer x gives tokens \(2, 7, 3\): .*token_grid: \[rows, columns\], with rows x columns = 7, or 6 if",
        ),
        ((2, 7, 3), None, "say how they lie on the film"),
        ((2, 7, 3), [7], "say how they lie on the film"),
        ((2, 7, 3), [2, 4], "layer x gives 7 tokens: token_grid 2 x 4 takes 8, or one more"),
        ((2, 7, 3), [1, 5], "token_grid 1 x 5 takes 5"),
        ((2, 3, 2, 3), [2, 3], r"layer x gives maps \(2, 3, 2, 3\): token_grid is for tokens"),
        ((7, 3), (), "neither maps .* nor tokens"),
        ((7, 3), [2, 3], "neither maps"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(shape, grid, message):
    with pytest.raises(ValueError, match=message):
        as_maps(torch.zeros(shape), "x", grid)


def test_a_grid_for_a_layer_of_maps_is_refused_in_the_stream():
    with pytest.raises(ValueError, match="layer block gives maps .*token_grid is for tokens"):
        next(stream(model(), batches(images(), 4), ["block"], [5, 5]))


# ---- what the head pools


@pytest.mark.parametrize("size", [1, 4, 11])
@pytest.mark.parametrize("bias", [True, False])
def test_the_pooled_layer_is_known_in_any_batch(size, bias):
    network = model()
    if not bias:
        network.head.bias = None
    for output in stream(network, batches(images(), size), ["block", "block.conv", "norm"]):
        assert is_pooled(output, "block", network.head)
        assert not is_pooled(output, "block.conv", network.head)  # as wide, before the ReLU
        assert not is_pooled(output, "norm", network.head)  # another width
        assert not is_pooled(output, "block", nn.Linear(5, 3)) and not is_pooled(output, "block", network.conv1)
        assert not is_pooled(output, "block", None)
        assert not is_pooled(Output(output.rows, output.logits + 0.01, output.maps), "block", network.head)


def test_maps_that_are_not_finite_are_left_to_their_reader():
    network = model()
    output = next(stream(network, batches(images(), 4), ["block"]))
    spoilt = {"block": output.maps["block"].clone()}
    spoilt["block"][1, 2, 0, 0] = torch.nan
    assert is_pooled(Output(output.rows, output.logits, spoilt), "block", network.head)
