"""A small study for relevance: made-up relevance, its films in batches, and each pair's map computed alone."""

import numpy as np
import torch

from tests import toys
from tests.analysis import reference_cam, reference_localization

SIZE, CLASSES, N = 24, ["Atelectasis", "Effusion", "Mass"], 9


def made_up(model, films, classes, method="lrp", *, init="one"):
    """Signed maps that depend on the film, the class, the method and nothing else."""
    assert not model.training and len(films) == len(classes) and init in ("one", "logit")
    weight = {"lrp": 1.0, "rap": -0.7}[method] * (1 + classes.double()) * (2 if init == "logit" else 1)
    return (films.double().sum(1) * weight[:, None, None] + films.double()[:, 0].square() - 1).float().requires_grad_()


def batches(study, size=4, order=None):
    _, images, films, *_ = study
    return toys.batches(images, size, order, films.index)


def slow_map(study, pair, method, init="one"):
    """The signed map of one pair, float64, at film size."""
    model, images, films, *_ = study
    film = images[[films.index.get_loc(pair.row)]]
    if method != "cam":
        return made_up(model, film, torch.tensor([pair.output]), method, init=init)[0].detach().double().numpy()
    with torch.no_grad():
        maps = model.trunk(film)[0]
    head = reference_cam.pooled_head(model.head.weight.detach(), model.head.bias.detach())
    return reference_localization.resized(np.maximum(reference_cam.raw_map(maps, head, pair.output, "cam"), 0), SIZE)
