"""LRP and RAP from the equations, one film at a time in float64: every layer a dense matrix filled by loops, no
gradients, no hooks.

A network is a list of (name, kind, inputs, parameters), written down by hand for each toy network; a value is a flat
vector with a shape. `explain` runs it forward and hands relevance back from the last layer to the film.
"""

from functools import partial

import numpy as np
import torch
from torch import nn

from tests.toys import Dense, Residual, VggLike


def conv_matrix(weight, shape, stride, padding, groups=1):
    """Matrix (outputs, inputs) of a convolution on maps of `shape` (C, H, W), and the output's shape."""
    c_out, c_group, size, _ = weight.shape
    channels, height, width = shape
    h_out, w_out = (height + 2 * padding - size) // stride + 1, (width + 2 * padding - size) // stride + 1
    matrix = np.zeros((c_out, h_out, w_out, channels, height, width))
    for o in range(c_out):
        first = o // (c_out // groups) * c_group
        for y in range(h_out):
            for x in range(w_out):
                for c in range(c_group):
                    for dy in range(size):
                        for dx in range(size):
                            row, column = y * stride + dy - padding, x * stride + dx - padding
                            if 0 <= row < height and 0 <= column < width:
                                matrix[o, y, x, first + c, row, column] += weight[o, c, dy, dx]
    return matrix.reshape(c_out * h_out * w_out, -1), (c_out, h_out, w_out)


def pool_matrix(shape, size):
    """Matrix of average pooling with windows of `size` side by side; size None: over everything."""
    channels, height, width = shape
    size_h, size_w = (height, width) if size is None else (size, size)
    weight = np.zeros((channels, height // size_h, width // size_w, channels, height, width))
    for c in range(channels):
        for y in range(height // size_h):
            for x in range(width // size_w):
                weight[c, y, x, c, y * size_h : (y + 1) * size_h, x * size_w : (x + 1) * size_w] = 1 / (size_h * size_w)
    return weight.reshape(channels * (height // size_h) * (width // size_w), -1), (
        channels,
        height // size_h,
        width // size_w,
    )


def share(x, matrix, relevance):
    """Eq. 2 with alpha 1, beta 0."""
    out = np.zeros_like(x)
    for j, row in enumerate(matrix):
        z = np.maximum(x * row, 0)
        if z.sum() != 0:
            out += z / z.sum() * relevance[j]
    return out


def box(x, matrix, relevance, low, high):
    out = np.zeros_like(x)
    for j, row in enumerate(matrix):
        z = x * row - low * np.maximum(row, 0) - high * np.minimum(row, 0)
        if z.sum() > 1e-13:
            out += z / z.sum() * relevance[j]
    return out


def first_step(x, row, bias):
    """Eq. 3 and 4: contributions with the bias in shares of both signs, whose absolute values are scaled to the sum of
    the signed ones."""
    c = x * row
    positive, negative = c[c > 0].sum(), c[c < 0].sum()
    c = (
        c
        + np.where(c > 0, bias * positive / (positive + negative) * c / (positive or 1), 0)
        + np.where(c < 0, bias * negative / (positive + negative) * c / (negative or 1), 0)
    )
    return np.abs(c) * c.sum() / np.abs(c).sum()


def relative(x, matrix, relevance, authors=False):
    """Eq. 5 and 6."""
    out = np.zeros_like(x)
    for j, row in enumerate(matrix):
        z = x * row
        positive, negative, r = np.maximum(z, 0), np.abs(np.minimum(z, 0)), relevance[j]
        a, b = positive.sum(), negative.sum()
        if authors and r < 0:
            out += (negative / b * r + negative / b * (r * b / (a + b))) if b else 0
            continue
        out += positive / a * r if a else 0
        out += negative / b * (r * b / (a + b)) if b else 0
    active = out != 0
    return out - active * (out.sum() - relevance.sum()) / max(active.sum(), 1)


def proportional(x, matrix, relevance):
    out = np.zeros_like(x)
    for j, row in enumerate(matrix):
        total = (x * row).sum()
        if total != 0:
            out += x * row / total * relevance[j]
    return out


def winner(x, shape, size, stride, padding, relevance=None):
    """Maxima of the windows and their shape or, given relevance, what each element wins."""
    channels, height, width = shape
    h_out, w_out = (height + 2 * padding - size) // stride + 1, (width + 2 * padding - size) // stride + 1
    values, out, maps = [], np.zeros_like(x), x.reshape(shape)
    for c in range(channels):
        for y in range(h_out):
            for k in range(w_out):
                window = [
                    (maps[c, row, column], -row, -column)
                    for row in range(y * stride - padding, y * stride - padding + size)
                    for column in range(k * stride - padding, k * stride - padding + size)
                    if 0 <= row < height and 0 <= column < width
                ]
                value, row, column = max(window)
                if relevance is not None:
                    out.reshape(shape)[c, -row, -column] += relevance[len(values)]
                values.append(value)
    return (np.array(values), (channels, h_out, w_out)) if relevance is None else out


def explain(network, film, target, method, init="logit", first_layer="zb", negative="paper"):
    """Relevance of one film (C, H, W), flat, and the logits; a layer whose input is 'film' is the first, the last one
    gives the logits."""
    values, shapes, matrices = {"film": film.ravel()}, {"film": film.shape}, {}
    for name, kind, inputs, parameters in network:
        x, shape = values[inputs[0]], shapes[inputs[0]]
        if kind in ("conv", "conv+pool"):
            matrix, after = conv_matrix(
                parameters["weight"],
                shape,
                parameters.get("stride", 1),
                parameters.get("padding", 0),
                parameters.get("groups", 1),
            )
            bias = np.repeat(parameters.get("bias", np.zeros(after[0])), after[1] * after[2])
            merged = np.repeat(parameters.get("scale", np.ones(after[0])), after[1] * after[2])
            values[name], matrices[name] = matrix @ x + bias, matrix * merged[:, None]
            if kind == "conv+pool":
                pooling, after = pool_matrix(after, parameters["pool"])
                values[name], matrices[name] = pooling @ values[name], pooling @ matrices[name]
            shapes[name] = after
        elif kind == "linear":
            matrices[name], values[name] = parameters["weight"], parameters["weight"] @ x + parameters["bias"]
            shapes[name] = values[name].shape
        elif kind == "average":
            matrices[name], shapes[name] = pool_matrix(shape, parameters["size"])
            values[name] = matrices[name] @ x
        elif kind == "max":
            values[name], shapes[name] = winner(x, shape, **parameters)
        elif kind == "norm":
            area = shape[1] * shape[2]
            scale = np.repeat(parameters["weight"] / np.sqrt(parameters["var"] + parameters["eps"]), area)
            values[name] = (x - np.repeat(parameters["mean"], area)) * scale + np.repeat(parameters["bias"], area)
            shapes[name] = shape
        elif kind == "relu":
            values[name], shapes[name] = np.maximum(x, 0), shape
        elif kind == "add":
            values[name], shapes[name] = x + values[inputs[1]], shape
        elif kind == "cat":
            values[name] = np.concatenate([values[part] for part in inputs])
            shapes[name] = (sum(shapes[part][0] for part in inputs), *shape[1:])
    top = network[-1][0]
    relevance = {name: np.zeros_like(value) for name, value in values.items()}
    relevance[top][target] = 1 if init == "one" else values[top][target]
    for name, kind, inputs, parameters in reversed(network):
        r, x = relevance[name], values[inputs[0]]
        if kind in ("conv", "linear", "conv+pool"):
            if method == "rap" and name == top:
                back = (
                    first_step(x, parameters["weight"][target], parameters["bias"][target])
                    * r[target]
                    / values[top][target]
                )
            elif inputs == ["film"] and first_layer != "alpha1beta0":
                low, high = (x.min(), x.max()) if first_layer == "zb" else first_layer
                back = box(x, matrices[name], r, low, high)
            elif method == "lrp" or inputs == ["film"]:
                back = share(x, matrices[name], r)
            else:
                back = relative(x, matrices[name], r, authors=negative == "authors_conv" and kind != "linear")
            relevance[inputs[0]] += back
        elif kind == "average":
            relevance[inputs[0]] += proportional(x, matrices[name], r)
        elif kind == "max":
            relevance[inputs[0]] += winner(x, shapes[inputs[0]], **parameters, relevance=r)
        elif kind == "add":
            total = values[name]
            for part in inputs:
                relevance[part] += np.divide(values[part] * r, total, out=np.zeros_like(r), where=total != 0)
        elif kind == "cat":
            start = 0
            for part in inputs:
                relevance[part] += r[start : start + len(values[part])]
                start += len(values[part])
        else:
            relevance[inputs[0]] += r
    return relevance["film"], values[top]


def network_of(net, merge):
    """The toy network as a list; with `merge` a convolution knows the scale of the BatchNorm that follows."""
    steps = {VggLike: vgg_like, Residual: residual, Dense: dense}[type(net)](net)
    return [(*step, {key: value for key, value in given.items() if key != "scale" or merge}) for *step, given in steps]


def vgg_like(net):
    f, c = net.features, net.classifier
    return [
        ("c1", "conv", ["film"], weighted(f[0])),
        ("r1", "relu", ["c1"], {}),
        ("p1", "max", ["r1"], {"size": 2, "stride": 2, "padding": 0}),
        ("c2", "conv", ["p1"], weighted(f[3])),
        ("r2", "relu", ["c2"], {}),
        ("p2", "average", ["r2"], {"size": 2}),
        ("l1", "linear", ["p2"], weighted(c[0])),
        ("r3", "relu", ["l1"], {}),
        ("l2", "linear", ["r3"], weighted(c[3])),
    ]


def block(net, name, source):
    n = partial("{}.{}".format, name)
    steps = [
        (n("c1"), "conv", [source], weighted(net.conv1, net.bn1)),
        (n("b1"), "norm", [n("c1")], norm(net.bn1)),
        (n("r1"), "relu", [n("b1")], {}),
        (n("c2"), "conv", [n("r1")], weighted(net.conv2, net.bn2)),
        (n("b2"), "norm", [n("c2")], norm(net.bn2)),
    ]
    other = source
    if net.downsample is not None:
        steps += [
            (n("cd"), "conv", [source], weighted(*net.downsample)),
            (n("bd"), "norm", [n("cd")], norm(net.downsample[1])),
        ]
        other = n("bd")
    return [*steps, (n("add"), "add", [n("b2"), other], {}), (n("out"), "relu", [n("add")], {})]


def residual(net):
    return [
        ("c", "conv", ["film"], weighted(net.conv1, net.bn1)),
        ("b", "norm", ["c"], norm(net.bn1)),
        ("r", "relu", ["b"], {}),
        ("p", "max", ["r"], {"size": 3, "stride": 2, "padding": 1}),
        *block(net.layer1, "1", "p"),
        *block(net.layer2, "2", "1.out"),
        ("gap", "average", ["2.out"], {"size": None}),
        ("head", "linear", ["gap"], weighted(net.head)),
    ]


def dense(net):
    return [
        ("c0", "conv", ["film"], weighted(net.conv0)),
        ("r0", "relu", ["c0"], {}),
        ("n1", "norm", ["r0"], norm(net.norm1)),
        ("r1", "relu", ["n1"], {}),
        ("c1", "conv", ["r1"], weighted(net.conv1, net.norm2)),
        ("n2", "norm", ["c1"], norm(net.norm2)),
        ("r2", "relu", ["n2"], {}),
        ("c2", "conv", ["r2"], weighted(net.conv2)),
        ("cat", "cat", ["r0", "c2"], {}),
        ("nt", "norm", ["cat"], norm(net.norm)),
        ("rt", "relu", ["nt"], {}),
        ("ct", "conv+pool", ["rt"], {**weighted(net.conv), "pool": 2}),
        ("n5", "norm", ["ct"], norm(net.norm5)),
        ("r5", "relu", ["n5"], {}),
        ("gap", "average", ["r5"], {"size": None}),
        ("head", "linear", ["gap"], weighted(net.classifier)),
    ]


def weighted(layer, following=None):
    out = {name: tensor.detach().numpy() for name, tensor in layer.named_parameters()}
    if isinstance(layer, nn.Conv2d):
        out |= {"stride": layer.stride[0], "padding": layer.padding[0], "groups": layer.groups}
    if following is not None:
        out["scale"] = (following.weight / torch.sqrt(following.running_var + following.eps)).detach().numpy()
    return out


def norm(layer):
    return {
        "weight": layer.weight.detach().numpy(),
        "bias": layer.bias.detach().numpy(),
        "mean": layer.running_mean.numpy(),
        "var": layer.running_var.numpy(),
        "eps": layer.eps,
    }
