import numpy as np
import pandas as pd
import pytest
import torch

from lib.analysis.pairs import box_pairs
from lib.analysis.relevance import attribution
from tests.analysis.relevance.small_study import CLASSES, SIZE, N, made_up
from tests.toys import film_table, quartered


@pytest.fixture
def study(monkeypatch):
    """Model, images, films, pairs. Films 0 and 1 have no box; film 2 has several classes and one of two boxes."""
    monkeypatch.setattr(attribution, "heatmaps", made_up)
    rng = np.random.default_rng(3)
    films = film_table(rng, N, 50)
    named = [(2, "Mass"), (2, "Mass"), (2, "Effusion"), (2, "Atelectasis")] + [(k, CLASSES[k % 3]) for k in range(3, N)]
    corner, extent = rng.uniform(-2, 14, (len(named), 2)), rng.uniform(4, 12, (len(named), 2))
    boxes = pd.DataFrame(
        [(films["image"].iloc[k], name, *a, *(a + b)) for (k, name), a, b in zip(named, corner, extent)],
        columns=["image", "class", "x1", "y1", "x2", "y2"],
    )
    images = torch.from_numpy(rng.normal(size=(N, 3, SIZE, SIZE)).astype(np.float32))
    return quartered(4, seed=1), images, films, box_pairs(films, boxes, CLASSES), boxes
