"""Class activation maps from the definitions: gradients by automatic differentiation, sums by loops, one film and class
at a time."""

import numpy as np
import torch


def raw_map(features, head, class_index, method, eps=0.0):
    """Map (h, w) of one film, float64; `features` (F, h, w) tensor, `head` a function from (1, F, h, w) to logits (1,
    C)."""
    activations = features.detach().double().clone().requires_grad_(True)
    head(activations[None])[0, class_index].backward()
    gradient, activation = activations.grad.numpy(), activations.detach().numpy()
    channels, height, width = activation.shape
    out = np.zeros((height, width))
    for k in range(channels):
        a, g = activation[k], gradient[k]
        if method == "cam":
            out += g[0, 0] * height * width * a
        elif method == "grad":
            out += g.mean() * a
        elif method == "hires":
            out += g * a
        elif method == "layer":
            out += np.maximum(g, 0) * a
        elif method == "xgrad":
            out += ((g * a).sum() / a.sum() if a.sum() != 0 else 0.0) * a
        elif method == "gradpp":
            weight = 0.0
            for y in range(height):
                for x in range(width):
                    denominator = 2 * g[y, x] ** 2 + a.sum() * g[y, x] ** 3 + eps
                    if g[y, x] != 0 and denominator != 0:
                        weight += g[y, x] ** 2 / denominator * max(g[y, x], 0.0)
            out += weight * a
    return out


def pooled_head(weights, bias):
    """The head as a function of feature maps: global average pooling, then a linear layer, in float64."""
    return lambda maps: torch.nn.functional.linear(maps.mean((2, 3)), weights.double(), bias.double())


def film_map(film, front, tail, class_index, method, *, noise=None, coefficients=(1.0,), numerator=2):
    """Map (h, w) of one film for the methods that change it: 'smooth_gradpp', 'score', 'ss', 'is'; float64.

    `front` makes maps of films and `tail` logits of maps. `noise` is added to the film (n, 3, H, W), or to the masks
    (n, F, H, W).
    """
    activations = front(film[None])[0].detach()
    out = np.zeros(activations.shape[1:])
    if method == "smooth_gradpp":
        gradients = []
        for one in noise:
            maps = front((film + one)[None]).detach().requires_grad_(True)
            tail(maps)[0, class_index].backward()
            gradients.append(maps.grad[0].numpy())
        d1, d2, d3 = (np.mean([g**p for g in gradients], axis=0) for p in (1, 2, 3))
        for k, a in enumerate(activations.numpy()):
            weight = 0.0
            for place in np.ndindex(a.shape):
                denominator = 2 * d2[k][place] + a.sum() * d3[k][place]
                if denominator != 0:
                    weight += (d2 if numerator == 2 else d1)[k][place] / denominator * max(d1[k][place], 0)
            out += weight * a
        return out
    scores = []
    for k, a in enumerate(activations.numpy()):
        mask = bilinear(a, film.shape[1:])
        span = mask.max() - mask.min()
        mask = (mask - mask.min()) / span if span > 1e-12 else np.zeros_like(mask)
        copies = [mask + one[k].numpy() for one in noise] if method == "ss" else [mask * c for c in coefficients]
        scores.append(
            np.mean([tail(front((film * torch.from_numpy(copy))[None]))[0, class_index].item() for copy in copies])
        )
    powers = [np.exp(s - max(scores)) for s in scores]
    for k, a in enumerate(activations.numpy()):
        out += powers[k] / sum(powers) * a
    return out


def bilinear(a, size):
    """Resampling of one map by its definition: pixel centres at halves, the edge repeated."""
    out = np.zeros(tuple(size))
    for y, x in np.ndindex(out.shape):
        value = 0.0
        rows = max((y + 0.5) * a.shape[0] / size[0] - 0.5, 0)
        columns = max((x + 0.5) * a.shape[1] / size[1] - 0.5, 0)
        for i, j in np.ndindex(a.shape):
            i_share = max(0.0, 1 - abs(min(rows, a.shape[0] - 1) - i))
            j_share = max(0.0, 1 - abs(min(columns, a.shape[1] - 1) - j))
            value += i_share * j_share * a[i, j]
        out[y, x] = value
    return out
