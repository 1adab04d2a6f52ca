"""Models of the feature wing's tests, small enough for loops in float64, and films for them."""

import copy
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from lib.analysis.features.survey import View
from lib.data.batches import Batch
from lib.models import build_model

CLASSES, N = ["a", "b", "c"], 7
ROWS = np.random.default_rng(5).permutation(40)[:N]
TARGETS = np.random.default_rng(6).integers(0, 2, (40, 3))
METHODS = ("hires", "gradpp")


def draw(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Pooled(nn.Module):
    """`trunk` gives signed maps (B, 6, 5, 5), which the head pools."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.Conv2d(5, 6, 3, padding=1)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, films):
        return self.head(self.trunk(films).mean((2, 3)))


class Deep(nn.Module):
    """`front` gives as many maps as the head pools, but it is not what the head pools."""

    def __init__(self):
        super().__init__()
        self.front = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(inplace=True))
        self.back = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(inplace=True))
        self.head = nn.Linear(6, 3)

    def forward(self, films):
        return self.head(self.back(self.front(films)).mean((2, 3)))


class Bare(nn.Module):
    """The films are the maps."""

    def __init__(self, weights):
        super().__init__()
        self.trunk = nn.Identity()
        self.head = nn.Linear(weights.shape[1], weights.shape[0], bias=False)
        self.head.weight.data.copy_(weights)

    def forward(self, films):
        return self.head(self.trunk(films).mean((2, 3)))


def tokens_of(maps):
    return maps.flatten(2).transpose(1, 2)


def study(name):
    """Model, layer, token_grid, films; in float64 the model and its two halves; the films' maps."""
    side = 32 if name == "tokens" else 10
    films = torch.randn(N, 3, side, side, generator=torch.Generator().manual_seed(2))
    if name == "tokens":
        model = build_model("small_transformer", 3, seed=1)
    else:
        model, generator = {"pooled": Pooled, "deep": Deep}[name](), torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    double = copy.deepcopy(model).double().eval()
    if name == "pooled":
        layer, grid, front, back = "trunk", (), double.trunk, lambda maps: double.head(maps.mean((2, 3)))
    elif name == "deep":
        layer, grid, front, back = "front", (), double.front, lambda maps: double.head(double.back(maps).mean((2, 3)))
    else:
        trunk, layer, grid = double.trunk, "trunk.blocks.0", (8, 8)

        def front(films):
            tokens = trunk.blocks[0](tokens_of(trunk.patches(films)) + trunk.positions)
            return tokens.transpose(1, 2).unflatten(2, grid)

        def back(maps):
            return double.head(trunk.norm(trunk.blocks[1](tokens_of(maps))).mean(1))

    with torch.no_grad():
        maps = front(films.double())
    return SimpleNamespace(
        model=model, layer=layer, grid=grid, films=films, double=double, back=back, maps=maps, selected=1
    )


def view(case, size=3, *, layer=None, targets=TARGETS, classes=CLASSES):
    """The films of a case, in batches of `size`; the k-th is the film ROWS[k]."""
    places = {row: k for k, row in enumerate(ROWS.tolist())}

    def batches(rows):
        at = [places[row] for row in np.asarray(rows).tolist()]
        parts = [at[k : k + size] for k in range(0, len(at), size)]
        return [Batch(torch.from_numpy(ROWS[part]), case.films[part], None) for part in parts]

    return View(case.model, layer or case.layer, batches, targets, classes, getattr(case, "grid", ()))


def close(ours, expected, scale=1e-5):
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(ours), expected, rtol=1e-4, atol=scale * np.nanmax(np.abs(expected)))


def principal(case):
    return {method: mask[case.selected] for method, mask in case.kept.items()}


def planted():
    """Bare films of 5 features: all alike but for film 4, which shows feature 3 in one corner instead of feature 0."""
    films = torch.rand(N, 5, 6, 6, generator=torch.Generator().manual_seed(0)) * 0.1
    films[:, 0] += 1
    films[4, 0] -= 1
    films[4, 3, 0:2, 4:6] += 9
    weights = torch.tensor([[1.0, 0.1, 0.1, 0.8, 0.1], [0.2, 1.0, 0.1, -0.1, 0.3]])
    return SimpleNamespace(model=Bare(weights), films=films), np.column_stack([np.ones(40), np.zeros(40)]).astype(int)
