"""Class activation maps from the definitions: gradients by automatic differentiation, sums by loops, one film and class at a time."""
import numpy as np
import torch


def raw_map(features, head, class_index, method, eps=0.0):
    """Map (h, w) of one film, float64; `features` (F, h, w) tensor, `head` a function from (1, F, h, w) to logits (1, C)."""
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
