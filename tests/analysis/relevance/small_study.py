"""A small study for relevance: a classifier, made-up relevance, batches, and each pair's map computed alone."""

from collections import OrderedDict

import numpy as np
import torch
from torch import nn

from lib.data.batches import Batch
from tests.analysis import reference_cam, reference_localization

SIZE, CLASSES, N = 24, ["Atelectasis", "Effusion", "Mass"], 9


class Small(nn.Module):
    """A classifier of 24 px films with 4 maps of 6 x 6."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            OrderedDict(
                first=nn.Conv2d(3, 4, 5, stride=2, padding=2),
                second=nn.Conv2d(4, 4, 3, stride=2, padding=1),
                relu=nn.ReLU(),
            )
        )
        self.head = nn.Linear(4, len(CLASSES))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, films):
        return self.head(self.trunk(films).mean((2, 3)))


def made_up(model, films, classes, method="lrp", *, init="one"):
    """Signed maps that depend on the film, the class, the method and nothing else."""
    assert not model.training and len(films) == len(classes) and init in ("one", "logit")
    weight = {"lrp": 1.0, "rap": -0.7}[method] * (1 + classes.double()) * (2 if init == "logit" else 1)
    return (films.double().sum(1) * weight[:, None, None] + films.double()[:, 0].square() - 1).float().requires_grad_()


def batches(study, size=4, order=None):
    _, images, films, *_ = study
    order = np.arange(N) if order is None else order
    for k in range(0, N, size):
        yield Batch(torch.from_numpy(films.index.to_numpy()[order[k : k + size]]), images[order[k : k + size]], None)


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
