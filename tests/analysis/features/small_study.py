"""Small studies for the feature wing: a model, seven films, and what float64 makes of them."""

import copy
from types import SimpleNamespace

import numpy as np
import torch

from lib.analysis.features.survey import View
from lib.models import build_model
from tests import toys

CLASSES, N = ["a", "b", "c"], 7
ROWS = np.random.default_rng(5).permutation(40)[:N]
TARGETS = np.random.default_rng(6).integers(0, 2, (40, 3))
METHODS = ("hires", "gradpp")


def tokens_of(maps):
    return maps.flatten(2).transpose(1, 2)


def study(name):
    """Model, layer, token_grid, films; in float64 the model and its two halves; the films' maps.

    'pooled': the layer that the head pools; 'deep': one before it that gives as many maps; 'tokens': a transformer's.
    """
    films = toys.films(N, 32 if name == "tokens" else 10, seed=2, dtype=torch.float32)
    if name == "tokens":
        model, layer, grid = build_model("small_transformer", 3, seed=1), "trunk.blocks.0", (8, 8)
    else:
        middle, layer, grid = (5, "trunk", ()) if name == "pooled" else (6, "trunk.1", ())
        model = toys.redrawn(toys.two_convolutions(middle, 6, 3, signed=name == "pooled"), 3, 0.4)
    double = copy.deepcopy(model).double().eval()
    trunk, head = double.trunk, double.head

    def front(films):
        if name != "tokens":
            return trunk[: 4 if name == "pooled" else 2](films)
        tokens = trunk.blocks[0](tokens_of(trunk.patches(films)) + trunk.positions)
        return tokens.transpose(1, 2).unflatten(2, grid)

    def back(maps):
        if name == "tokens":
            return head(trunk.norm(trunk.blocks[1](tokens_of(maps))).mean(1))
        return head((maps if name == "pooled" else trunk[2:](maps)).mean((2, 3)))

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
        return toys.batches(case.films, size, at, ROWS)

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
    targets = np.column_stack([np.ones(40), np.zeros(40)]).astype(int)
    return SimpleNamespace(model=toys.bare(weights), films=films), targets
