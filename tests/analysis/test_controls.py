"""Controls: the cascade touches what it says and nothing else; likeness against loops and known cases."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from lib.analysis.controls import cascade, likeness
from lib.models import build_model


def test_a_cascade_makes_one_more_stage_random_each_time():
    model, fresh = (build_model("small_cnn", 3, seed=seed) for seed in (0, 1))
    for tensor in model.state_dict().values():
        tensor.add_(1)  # trained: nothing in it is as it was drawn
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn, seen = fresh.state_dict(), []
    stages = ["none", "head", *(f"trunk.{k}" for k in (7, 6, 4, 3, 1, 0))]  # ReLUs have no weights
    for (stage, changed), expected in zip(cascade(model, fresh), stages, strict=True):
        assert stage == expected and not changed.training
        seen += [stage]
        for name, tensor in changed.state_dict().items():
            random = any(name.startswith(f"{one}.") for one in seen)
            assert torch.equal(tensor, (drawn if random else before)[name]), (stage, name)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def maps(n=3, size=20, seed=0):
    return torch.randn(n, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_ssim(a, b):
    """Window by window, from the formula."""
    a, b = (np.maximum(one, 0) / np.maximum(one, 0).max() for one in (a.numpy(), b.numpy()))
    weights = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = np.outer(weights, weights) / np.outer(weights, weights).sum()
    values = []
    for y in range(len(a) - 10):
        for x in range(len(a) - 10):
            one, other = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            m, n = (weights * one).sum(), (weights * other).sum()
            v, w = (weights * (one - m) ** 2).sum(), (weights * (other - n) ** 2).sum()
            c = (weights * (one - m) * (other - n)).sum()
            values.append((2 * m * n + 1e-4) * (2 * c + 9e-4) / ((m * m + n * n + 1e-4) * (v + w + 9e-4)))
    return np.mean(values)


def test_likeness_against_slow_references():
    a, b = maps(seed=1), maps(seed=2) + 0.5 * maps(seed=1)
    found = likeness(a, b)
    for row in range(3):
        assert found["ssim"][row] == pytest.approx(slow_ssim(a[row], b[row]), abs=1e-10)
        assert found["rank"][row] == pytest.approx(spearmanr(a[row].ravel(), b[row].ravel())[0], abs=1e-12)


def test_likeness_of_the_same_map_and_of_its_opposite():
    found = likeness(torch.cat([maps(1), maps(1)]), torch.cat([5 * maps(1), -maps(1)]))
    np.testing.assert_allclose(found["ssim"][0], 1)
    np.testing.assert_allclose(found["rank"], [1, -1])
    assert found["ssim"][1] < 0.1


def test_a_constant_map_has_no_rank_and_an_empty_one_is_like_an_empty_one():
    empty = torch.zeros(1, 20, 20)
    found = likeness(torch.cat([empty, empty]), torch.cat([empty, maps(1).float()]))
    assert found["rank"].isna().all() and found["ssim"][0] == pytest.approx(1) and found["ssim"][1] < 0.5


@pytest.mark.parametrize("other", [maps(2), maps(3, 19)])
def test_maps_of_other_shapes_are_refused(other):
    with pytest.raises(ValueError, match="two arrays of maps"):
        likeness(maps(), other)


def test_small_or_broken_maps_are_refused():
    with pytest.raises(ValueError, match="at least 11 pixels"):
        likeness(maps(size=10), maps(size=10))
    with pytest.raises(ValueError, match="NaN or infinite"):
        likeness(maps(), maps() * torch.nan)
