"""Small networks of the kinds that relevance knows, with the description by which `reference_relevance` computes
them."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


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

    def network(self):
        f, c = self.features, self.classifier
        return [
            ("c1", "conv", ["film"], conv(f[0])),
            ("r1", "relu", ["c1"], {}),
            ("p1", "max", ["r1"], {"size": 2, "stride": 2, "padding": 0}),
            ("c2", "conv", ["p1"], conv(f[3])),
            ("r2", "relu", ["c2"], {}),
            ("p2", "average", ["r2"], {"size": 2}),
            ("l1", "linear", ["p2"], conv(c[0])),
            ("r3", "relu", ["l1"], {}),
            ("l2", "linear", ["r3"], conv(c[3])),
        ]


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

    def network(self, name, source):
        n = partial("{}.{}".format, name)
        steps = [
            (n("c1"), "conv", [source], conv(self.conv1, self.bn1)),
            (n("b1"), "norm", [n("c1")], norm(self.bn1)),
            (n("r1"), "relu", [n("b1")], {}),
            (n("c2"), "conv", [n("r1")], conv(self.conv2, self.bn2)),
            (n("b2"), "norm", [n("c2")], norm(self.bn2)),
        ]
        other = source
        if self.downsample is not None:
            steps += [
                (n("cd"), "conv", [source], conv(*self.downsample)),
                (n("bd"), "norm", [n("cd")], norm(self.downsample[1])),
            ]
            other = n("bd")
        return [*steps, (n("add"), "add", [n("b2"), other], {}), (n("out"), "relu", [n("add")], {})]


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

    def network(self):
        return [
            ("c", "conv", ["film"], conv(self.conv1, self.bn1)),
            ("b", "norm", ["c"], norm(self.bn1)),
            ("r", "relu", ["b"], {}),
            ("p", "max", ["r"], {"size": 3, "stride": 2, "padding": 1}),
            *self.layer1.network("1", "p"),
            *self.layer2.network("2", "1.out"),
            ("gap", "average", ["2.out"], {"size": None}),
            ("head", "linear", ["gap"], conv(self.head)),
        ]


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

    def network(self):
        transition = {**conv(self.conv), "pool": 2}
        return [
            ("c0", "conv", ["film"], conv(self.conv0)),
            ("r0", "relu", ["c0"], {}),
            ("n1", "norm", ["r0"], norm(self.norm1)),
            ("r1", "relu", ["n1"], {}),
            ("c1", "conv", ["r1"], conv(self.conv1, self.norm2)),
            ("n2", "norm", ["c1"], norm(self.norm2)),
            ("r2", "relu", ["n2"], {}),
            ("c2", "conv", ["r2"], conv(self.conv2)),
            ("cat", "cat", ["r0", "c2"], {}),
            ("nt", "norm", ["cat"], norm(self.norm)),
            ("rt", "relu", ["nt"], {}),
            ("ct", "conv+pool", ["rt"], transition),
            ("n5", "norm", ["ct"], norm(self.norm5)),
            ("r5", "relu", ["n5"], {}),
            ("gap", "average", ["r5"], {"size": None}),
            ("head", "linear", ["gap"], conv(self.classifier)),
        ]


def conv(layer, following=None):
    out = {name: tensor.detach().numpy() for name, tensor in layer.named_parameters()}
    if isinstance(layer, nn.Conv2d):
        out |= {"stride": layer.stride[0], "padding": layer.padding[0], "groups": layer.groups}
    if following is not None:
        out["merge"] = (following.weight / torch.sqrt(following.running_var + following.eps)).detach().numpy()
    return out


def norm(layer):
    return {
        "weight": layer.weight.detach().numpy(),
        "bias": layer.bias.detach().numpy(),
        "mean": layer.running_mean.numpy(),
        "var": layer.running_var.numpy(),
        "eps": layer.eps,
    }


def network_of(net, merge):
    return [
        (
            name,
            kind,
            inputs,
            {"scale" if key == "merge" else key: value for key, value in parameters.items() if key != "merge" or merge},
        )
        for name, kind, inputs, parameters in net.network()
    ]


def make(build, seed=0, dtype=torch.float64):
    """The network with random weights and BatchNorm statistics, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = build().to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.track_running_stats:
            layer.running_mean.copy_(0.2 * torch.randn(layer.num_features, generator=generator))
            layer.running_var.copy_(0.5 + torch.rand(layer.num_features, generator=generator))
            layer.weight.data.copy_(torch.randn(layer.num_features, generator=generator))
            layer.bias.data.copy_(0.5 + 0.3 * torch.randn(layer.num_features, generator=generator))
    return net


def films(n=3, size=8, channels=3, seed=1, dtype=torch.float64):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
