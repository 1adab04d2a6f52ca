import numpy as np
import pytest

from tests.analysis.features import reference_features as reference
from tests.analysis.features.small_study import METHODS, study


@pytest.fixture(scope="module", params=["pooled", "deep", "tokens"])
def case(request):
    found = study(request.param)
    found.weighted = {
        method: np.array(
            [[reference.weighted_features(maps, found.back, c, method) for c in range(3)] for maps in found.maps]
        )
        for method in METHODS
    }  # (N, C, F, h, w)
    found.kept = {
        method: np.random.default_rng(k).random((3, found.maps.shape[1])) < 0.5 for k, method in enumerate(METHODS)
    }
    found.kept["hires"][:, 0], found.kept["gradpp"][:, 1] = True, True
    return found
