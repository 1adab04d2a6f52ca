"""Speed of relevance maps at 224 px: LRP against zennit film by film, LRP and RAP in forward passes. See analysis for
the columns.

Ours is with its checks. A forward pass is the model's own, in float32 without gradients, on the same batch; the other
side of such a row is not measured: 13 forward passes are zennit's LRP of one film, 27 RAP's by its authors' code. On
ResNet50 RAP runs forward in float64, which takes 3 of its passes and 0.7 GB for 4 films.
"""

import multiprocessing
import re
from pathlib import Path

import torch
import torchvision
from torch import nn
from zennit.attribution import Gradient
from zennit.composites import LayerMapComposite
from zennit.core import Composite
from zennit.layer import Sum
from zennit.rules import AlphaBeta, Norm, Pass, ZBox
from zennit.torchvision import ResNetCanonizer

from lib.analysis.relevance.heatmaps import heatmaps
from lib.models import build_model
from tests.bench.timing import best_times, rates, show

PEERS = {"lrp": (13, "zennit's 13 on ResNet50"), "rap": (27, "the authors' 27 on ResNet50")}


def batch(n_films, seed=0):
    return torch.randn(n_films, 3, 224, 224, generator=torch.Generator().manual_seed(seed)), torch.arange(n_films) % 2


def zennit_lrp(model, films, classes):
    """The same rules by zennit, one film at a time because the bounds of its z^B rule belong to the composite."""
    layers = LayerMapComposite(
        [
            (nn.Conv2d, AlphaBeta(1, 0, zero_params="bias")),
            (nn.Linear, AlphaBeta(1, 0, zero_params="bias")),
            (nn.AdaptiveAvgPool2d, Norm()),
            (Sum, Norm()),
            (nn.ReLU, Pass()),
            (nn.BatchNorm2d, Pass()),
        ]
    )
    maps = []
    for film, k in zip(films, classes, strict=True):
        box = ZBox(float(film.min()), float(film.max()), zero_params="bias")
        composite = Composite(
            lambda context, name, module, box=box: box if name == "conv1" else layers.module_map(context, name, module),
            canonizers=[ResNetCanonizer()],
        )
        with Gradient(model, composite) as attributor:
            _, relevance = attributor(film[None], torch.eye(2)[k][None])
        maps.append(relevance.sum(1))
    return torch.cat(maps)


def lrp_against_zennit(*, n_films=4, repeats=3):
    model = torchvision.models.resnet50(num_classes=2).eval()
    films, classes = batch(n_films)
    ours, peer = best_times(
        [lambda: heatmaps(model, films, classes), lambda: zennit_lrp(model, films, classes)], repeats
    )
    return rates("LRP, ResNet50 (films/s)", "zennit film by film", n_films, ours, peer)


def forwards(backbone, method, *, n_films=4, repeats=3):
    """Cost in forward passes of the same films."""
    model = build_model(backbone, 2).eval()
    films, classes = batch(n_films)
    with torch.no_grad():
        model(films)

    def forward():
        with torch.no_grad():
            model(films)

    ours, once = best_times([lambda: heatmaps(model, films, classes, method), forward], repeats)
    passes, name = PEERS[method]
    return {
        "row": f"{method.upper()}, {backbone} (forward passes)",
        "peer_name": name,
        "ours": ours / once,
        "peer": passes,
        "ratio": passes * once / ours,
    }


def _high_water():
    """Largest resident memory of this process so far, KiB (Linux). Not `ru_maxrss`: a spawned process inherits that of
    its parent."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def _peak(method):
    """Memory in MiB that maps of 4 films take on top of what a forward pass of them has taken; in a process of its
    own."""
    torch.set_num_threads(1)
    model = torchvision.models.resnet50(num_classes=2).eval()
    films, classes = batch(4)
    with torch.no_grad():
        model(films)
    before = _high_water()
    zennit_lrp(model, films, classes) if method == "zennit" else heatmaps(model, films, classes, method)
    return (_high_water() - before) / 1024


def memory():
    """Peak memory of 4 films at once against zennit's film by film: one row a method."""
    peaks = {}
    for method in ("zennit", "lrp", "rap"):
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            peaks[method] = fresh.apply(_peak, (method,))
    for method in ("lrp", "rap"):
        yield {
            "row": f"{method.upper()} of 4 films, ResNet50 (MiB)",
            "peer_name": "zennit, one film",
            "ours": peaks[method],
            "peer": peaks["zennit"],
            "ratio": peaks["zennit"] / peaks[method],
        }


def rows():
    """All rows of this file, a minute or two."""
    yield lrp_against_zennit()
    for backbone in ("resnet50", "tdensenet"):
        for method in PEERS:
            yield forwards(backbone, method)
    yield from memory()


if __name__ == "__main__":
    show(rows())
