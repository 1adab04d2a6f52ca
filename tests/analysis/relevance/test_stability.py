"""RAP's maps are those of float64 up to the rounding of the films' precision, or refused."""

import copy
import warnings

import pytest
import torch
import torchvision
from torch import nn

from lib.analysis.relevance import rules
from lib.analysis.relevance.heatmaps import STABLE, conservation, heatmaps
from lib.analysis.relevance.rules import RelevanceError
from lib.models import build_model
from tests.toys import Residual, VggLike, films, make

NETS = {name: lambda name=name: build_model(name, 4) for name in ("resnet50", "vgg16", "tdensenet", "densenet121")}
NETS["torchvision resnet18"] = lambda: torchvision.models.resnet18(num_classes=4)


def error(found, expected):
    """Largest deviation of each map, as a share of its largest magnitude."""
    return (found - expected).abs().amax((1, 2)) / expected.abs().amax((1, 2))


def correlation(found, expected):
    pairs = zip(found.double().flatten(1), expected.flatten(1), strict=True)
    return torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs])


@pytest.mark.parametrize("name", NETS)
def test_rap_in_float32_is_that_of_float64_whatever_the_memory_layout(name):
    """Residual nets in float32 throughout miss it: RAP's shift leaves relevance where a + b is nearly 0, and what it is
    multiplied by there, a / (a + b), is rounding."""
    net = make(NETS[name], dtype=torch.float32)
    x, classes = films(6, 64, seed=0, dtype=torch.float32)[[0, 4]], torch.tensor([0, 0])
    expected = heatmaps(copy.deepcopy(net).double(), x.double(), classes, "rap")
    for layout in (torch.contiguous_format, torch.channels_last):
        found = heatmaps(net, x.to(memory_format=layout), classes, "rap")
        assert found.dtype == torch.float32
        # Not 1e-5: of two pixels in a pooling window that differ by rounding, either may win.
        assert error(found, expected).max() < 2e-3 and (correlation(found, expected) > 1 - 1e-6).all()


def test_lrp_and_nets_without_residual_sums_stay_in_the_films_precision(monkeypatch):
    seen = []
    rule = rules.ZPlus.distribute
    monkeypatch.setattr(
        rules.ZBox,
        "distribute",
        lambda self, module, inputs, r: seen.append(module.weight.dtype) or rule(self, module, inputs, r),
    )
    for build, method in ((Residual, "lrp"), (VggLike, "rap"), (Residual, "rap")):
        heatmaps(make(build, dtype=torch.float32), films(dtype=torch.float32), torch.tensor([2, 0, 1]), method)
    assert seen == [torch.float32, torch.float32, torch.float64]


class Cancelling(nn.Module):
    """s, and b - s after a convolution, as addends: the larger the film, the less is left of them, which is b."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.Linear(4, 1)
        self.second = nn.Conv2d(4, 4, 1)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.1)
            self.second.weight.copy_(-torch.eye(4)[..., None, None])

    def forward(self, x):
        s = torch.relu(self.first(x))
        return self.head((s + self.second(s)).relu().mean((2, 3)))


def test_a_map_of_rounding_errors_is_refused_and_counted():
    net = Cancelling().eval()
    film = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    x, classes = torch.cat([film * 10.0**k for k in (0, 2, 3, 4, 5, 6, 7, 9, 12)]), torch.zeros(9, dtype=torch.int64)
    with pytest.warns(UserWarning, match="no stable map for 1 of 9 films.*more than 1% of it"):
        exact = heatmaps(copy.deepcopy(net).double(), x.double(), classes, "rap")
    assert exact[8].isnan().all() and error(exact[:8], exact[:1]).max() < 1e-4  # the film's scale does not matter
    with pytest.warns(UserWarning, match="no stable map for 6 of 9 films"):
        found = heatmaps(net, x, classes, "rap")
    refused = found.isnan().flatten(1)
    assert refused.all(1).tolist() == [False] * 3 + [True] * 6 and not refused[:3].any()
    assert error(found[:3], exact[:3]).max() < STABLE
    unchecked = heatmaps(net, x, classes, "rap", check=False)
    assert error(unchecked, exact[:1])[5:].min() > STABLE  # so it is noise that was refused
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # LRP's relevance is in proportion to a + b, by which it is divided
        assert heatmaps(net, x, classes).isfinite().all()


def test_sums_of_one_sign_lose_nothing_and_pooling_of_signed_maps_is_weighed_too():
    """Average pooling behind a convolution of 3 x 3 without ReLU: columns v and 1 - v in turns, so that 2 v - 1 of what
    the window holds cancels."""
    net = nn.Sequential(
        nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.AvgPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)
    ).eval()
    with torch.no_grad():
        net[0].weight.zero_()[0, 0, 1, 1] = 1
        net[4].weight.copy_(torch.rand(2, 16, generator=torch.Generator().manual_seed(0)))
    v = torch.tensor([0.5, 10.0, 1e5, 1e7])
    x = torch.stack([v, 1 - v], 1).repeat(1, 4)[:, None, None, :].expand(4, 1, 8, 8).contiguous()
    classes = torch.zeros(4, dtype=torch.int64)
    with pytest.warns(UserWarning, match="2 of 4 films"):
        found = heatmaps(net, x, classes, "rap", first_layer=(-1e8, 1e8))
    assert found.isnan().flatten(1).all(1).tolist() == [False, False, True, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert heatmaps(net.double(), x.double(), classes, "rap", first_layer=(-1e8, 1e8)).isfinite().all()


def test_a_device_without_float64_is_refused_at_once():
    class OnMps(torch.Tensor):
        device = property(lambda self: torch.device("mps"))

    x = films(dtype=torch.float32).as_subclass(OnMps)
    for method in ("lrp", "rap"):
        with pytest.raises(
            RelevanceError, match="needs float64, which the device mps does not know: set device to cpu"
        ):
            heatmaps(make(Residual, dtype=torch.float32), x, torch.tensor([2, 0, 1]), method)


def test_conservation_weighs_refused_maps_without_a_warning():
    net, x = Cancelling().eval(), 1e6 * films(1, channels=1, dtype=torch.float32).abs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frame = conservation(net, x, torch.tensor([0]), "rap", init="one")
    assert frame["relevance_in"].notna().all() and "Norm" in set(frame["rule"])
