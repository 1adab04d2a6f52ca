"""Toy networks, films and batches of them: small enough for references that loop in float64."""

from collections import OrderedDict
from contextlib import contextmanager

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from lib.data.batches import Batch

# ---- films


def draw(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def films(n=3, size=8, channels=3, seed=1, dtype=torch.float64):
    return draw((n, channels, size, size), seed, dtype)


def film_table(rng, n, n_rows):
    """Names and patients, two films each, of `n` films; the index is their rows of a store of `n_rows`."""
    return pd.DataFrame(
        {"image": [f"{i:08d}_000.png" for i in range(n)], "patient": [str(i // 2) for i in range(n)]},
        index=rng.permutation(n_rows)[:n],
    )


def batches(images, size, order=None, rows=None):
    """Batches of `size` films: all in turn, or those of `order`; film k is row k of the store, or `rows[k]`."""
    order = np.arange(len(images)) if order is None else np.asarray(order)
    rows = np.arange(len(images)) if rows is None else np.asarray(rows)
    parts = [order[k : k + size] for k in range(0, len(order), size)]
    return [Batch(torch.from_numpy(rows[part]), images[part], None) for part in parts]


# ---- weights


@contextmanager
def seeded(seed):
    """Within it torch draws from `seed`, afterwards as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@torch.no_grad()
def make(build, seed=0, dtype=torch.float64):
    """The network with weights as its layers draw them and random BatchNorm statistics, in evaluation mode."""
    with seeded(seed):
        net = build().to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.track_running_stats:
            layer.running_mean.copy_(0.2 * torch.randn(layer.num_features, generator=generator))
            layer.running_var.copy_(0.5 + torch.rand(layer.num_features, generator=generator))
            layer.weight.copy_(torch.randn(layer.num_features, generator=generator))
            layer.bias.copy_(0.5 + 0.3 * torch.randn(layer.num_features, generator=generator))
    return net


@torch.no_grad()
def redrawn(net, seed, sd):
    """The network with every parameter normal, of standard deviation `sd`."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * sd)
    return net


# ---- a linear head that pools the maps


class Pooled(nn.Module):
    """`trunk` gives maps (B, features, h, w), whose means over the film go through a linear `head`."""

    def __init__(self, trunk, features, classes, bias=True):
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(features, classes, bias)

    def forward(self, films):
        return self.head(self.trunk(films).mean((2, 3)))


def two_convolutions(middle=8, features=12, classes=4, *, signed=True):
    """Maps of half the films' size, signed or behind a second ReLU; `trunk.1` gives the `middle` maps before them."""
    trunk = nn.Sequential(
        nn.Conv2d(3, middle, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(middle, features, 3, padding=1),
        nn.Identity() if signed else nn.ReLU(inplace=True),
    )
    return Pooled(trunk, features, classes)


def quartered(features, seed):
    """Three classes from maps of a quarter of the films' size; `trunk.second` gives as many, before the ReLU."""
    trunk = OrderedDict(
        first=nn.Conv2d(3, 4, 5, stride=2, padding=2),
        second=nn.Conv2d(4, features, 3, stride=2, padding=1),
        relu=nn.ReLU(inplace=True),
    )
    return redrawn(Pooled(nn.Sequential(trunk), features, 3), seed, 0.3).eval()


def bare(weights):
    """The films are the maps; `weights` (classes, features) are the head's."""
    net = Pooled(nn.Identity(), weights.shape[1], weights.shape[0], bias=False)
    net.head.weight.data.copy_(weights)
    return net


# ---- other heads, tokens


class Unpooled(nn.Module):
    """`front` gives signed maps (B, 6, 4, 4), over which the next layer writes; the head is not linear in them, and not
    pooled."""

    def __init__(self):
        super().__init__()
        self.front = nn.Conv2d(3, 6, 3, stride=3)
        self.relu = nn.ReLU(inplace=True)
        self.tail = nn.Sequential(
            nn.Conv2d(6, 5, 3, padding=1), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten(), nn.Linear(80, 4)
        )

    def after(self, maps):
        return self.tail(self.relu(maps.clone()))

    def forward(self, films):
        return self.tail(self.relu(self.front(films)))


class Tokens(nn.Module):
    """A class token and 3 x 4 patches; the class token reaches the logits, or with `pooled` the mean of the patches."""

    def __init__(self, pooled=False):
        super().__init__()
        self.pooled = pooled
        self.embed = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.first, self.last = (
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.head = nn.Linear(8, 3)

    def before(self, films):
        patches = self.embed(films).flatten(2).transpose(1, 2)
        return self.first(patches if self.pooled else torch.cat([self.token.expand(len(films), -1, -1), patches], 1))

    def after(self, tokens):
        tokens = self.last(tokens)
        return self.head(tokens.mean(1) if self.pooled else tokens[:, 0])

    def forward(self, films):
        return self.after(self.before(films))


class MapsThenTokens(nn.Module):
    """A layer in the middle, a rectifier that works in place after it, tokens, and a pooled linear head."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.act = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.ReLU(inplace=True)
        self.tokens, self.head, self.unused = nn.Linear(6, 5), nn.Linear(5, 3), nn.Identity()

    def forward(self, films):
        maps = self.act(self.middle(self.first(films)))
        return self.head(self.tokens(maps.flatten(2).transpose(1, 2)).mean(1))


# ---- the architectures that relevance knows


class VggLike(nn.Module):
    def __init__(self, channels=3):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 4, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3, padding=1, groups=2),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(2),
        )
        self.classifier = nn.Sequential(nn.Linear(24, 7), nn.ReLU(True), nn.Dropout(0.5), nn.Linear(7, 3))

    def forward(self, films):
        return self.classifier(torch.flatten(self.features(films), 1))


class Block(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)) if stride > 1 else None
        )

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1, self.layer2 = Block(4, 4, 1), Block(4, 6, 2)
        self.head = nn.Linear(6, 3)

    def forward(self, films):
        x = self.maxpool(F.relu(self.bn1(self.conv1(films))))
        return self.head(self.layer2(self.layer1(x)).mean((2, 3)))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv0 = nn.Conv2d(3, 4, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(5), nn.Conv2d(5, 3, 3, padding=1, bias=False)
        self.norm, self.conv, self.pool = nn.BatchNorm2d(7), nn.Conv2d(7, 12, 1), nn.AvgPool2d(2, 2)
        self.norm5, self.classifier = nn.BatchNorm2d(12), nn.Linear(12, 3)

    def forward(self, films):
        x = F.relu(self.conv0(films))
        new = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x)))), inplace=True))
        x = torch.cat([x, new], 1)
        x = self.pool(self.conv(F.relu(self.norm(x))))
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(F.relu(self.norm5(x), inplace=True), (1, 1)), 1))
