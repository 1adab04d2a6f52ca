"""Speed of the integrated feature analysis against the way it is usually done; rows and ratios as in analysis."""

import numpy as np
import torch

from lib.analysis.cam import channel_contributions
from lib.analysis.features.importance import ImportanceMatrix
from lib.analysis.features.scale import ActivationDistribution
from lib.analysis.inference import stream
from lib.data.batches import Batch
from lib.models import build_model, layers
from tests.bench.timing import best_times, rates, show

N_CLASSES = 15
IMAGE_SIZE = 224


def importance(backbone="tdensenet", *, n_films=2, backward_classes=3, repeats=2):
    """Films a second of the importance matrix of all classes, forward pass included.

    Peers: one forward and one backward pass through the model for each class, as a CAM library does it; one forward
    pass and one gradient with respect to the layer for each class, the least that gradients can cost; the forward pass
    and nothing else. The first is timed for
    `backward_classes` classes, and its time scaled to all: every class costs the same.
    """
    model, layer = build_model(backbone, N_CLASSES).eval(), layers(backbone)[0]
    films = torch.randn(n_films, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    targets = np.zeros((n_films, N_CLASSES))
    weights, names = model.head.weight.detach(), [f"class {c}" for c in range(N_CLASSES)]
    batch, found = Batch(np.arange(n_films), films, torch.from_numpy(targets)), {}

    def forward():
        with torch.inference_mode():
            model(films)

    def ours():
        matrix = ImportanceMatrix(names)
        for output in stream(model, [batch], [layer]):
            matrix.update(channel_contributions(output.maps[layer], weights, "hires"), targets)
        found["ours"] = matrix.result().all

    def layer_of(kept):
        return dict(model.named_modules())[layer].register_forward_hook(
            lambda module, inputs, output: kept.append(output)
        )

    def backward_each():
        for c in range(backward_classes):
            kept = []
            hook = layer_of(kept)
            logits = model(films)
            hook.remove()
            kept[0].retain_grad()
            model.zero_grad()
            logits[:, c].sum().backward()
            (kept[0].grad * kept[0].detach()).sum((2, 3)).mean(0)
        model.zero_grad(set_to_none=True)

    def gradient_each():
        kept = []
        hook = layer_of(kept)
        logits = model(films)
        hook.remove()
        columns = [
            torch.autograd.grad(logits[:, c].sum(), kept[0], retain_graph=True)[0]
            .mul(kept[0].detach())
            .sum((2, 3))
            .mean(0)
            for c in range(N_CLASSES)
        ]
        found["peer"] = torch.stack(columns, dim=1).numpy()

    own, backward, gradient, plain = best_times([ours, backward_each, gradient_each, forward], repeats)
    backward *= N_CLASSES / backward_classes
    scale = np.abs(found["peer"]).max()
    for peer_name, peer in (
        (f"forward and backward for each of {N_CLASSES} classes", backward),
        (f"forward, gradient to the layer for each of {N_CLASSES}", gradient),
        ("plain forward", plain),
    ):
        difference = float(np.abs(found["ours"] - found["peer"]).max() / scale)
        row = f"importance matrix, {backbone} (films/s)"
        yield rates(row, peer_name, n_films, own, peer, largest_difference=difference)


def matrix_alone(*, n_films=8, features=512, side=28, repeats=5):
    """Films a second of the importance matrix from feature maps that are there already; peer: the weighted maps of each
    class, summed."""
    maps = torch.randn(n_films, features, side, side, generator=torch.Generator().manual_seed(0)).relu()
    weights = torch.randn(N_CLASSES, features, generator=torch.Generator().manual_seed(1))
    names, targets = [f"class {c}" for c in range(N_CLASSES)], np.zeros((n_films, N_CLASSES))

    def ours():
        matrix = ImportanceMatrix(names)
        matrix.update(channel_contributions(maps, weights), targets)
        matrix.result()

    def peer():
        for row in weights:
            (maps * row[:, None, None]).sum((2, 3)).mean(0)

    own, other = best_times([ours, peer], repeats)
    row = f"importance matrix of {features} x {side} x {side} maps (films/s)"
    return rates(row, "weight and sum the maps, class by class", n_films, own, other)


def distribution(*, n_films=32, batch=8, repeats=2):
    """Films a second of P10 and P90 at the size of the film, one pass; peer: enlarge all maps, keep them,
    numpy.percentile."""
    raw = torch.randn(n_films, N_CLASSES, 28, 28, generator=torch.Generator().manual_seed(0))
    names, found = [f"class {c}" for c in range(N_CLASSES)], {}

    def ours():
        one = ActivationDistribution(names, IMAGE_SIZE)
        for part in raw.split(batch):
            one.update(part)
        found["ours"] = one.percentiles().value

    def peer():
        full = torch.nn.functional.interpolate(
            raw, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False
        ).numpy()
        found["peer"] = np.percentile(full.swapaxes(0, 1).reshape(N_CLASSES, -1), [10, 90], axis=1)

    own, other = best_times([ours, peer], repeats)
    difference = float(np.abs(found["ours"] / found["peer"] - 1).max())
    row = f"P10 and P90 of {N_CLASSES} classes at {IMAGE_SIZE} (films/s)"
    return rates(row, "all pixels in memory, numpy.percentile", n_films, own, other, largest_difference=difference)


def rows():
    """All rows of this file, about a minute."""
    yield from importance()
    yield matrix_alone()
    yield distribution()


if __name__ == "__main__":
    show(rows())
