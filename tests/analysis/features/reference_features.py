"""The lens of the feature analysis from the formulas: float64, one film, class and feature at a time."""

import math

import numpy as np
import torch

from tests.analysis.features.reference_integrated import bilinear


def weighted_features(features, head, class_index, method):
    """Weighted map of every feature of one film, (F, h, w); `head` a function from (1, F, h, w) to logits (1, C). Their
    sum is the raw map."""
    activations = features.detach().double().clone().requires_grad_(True)
    head(activations[None])[0, class_index].backward()
    out = np.zeros(activations.shape)
    for k, (a, g) in enumerate(zip(activations.detach().numpy(), activations.grad.numpy())):
        total = a.sum()
        if method == "grad":
            out[k] = g.mean() * a
        elif method == "hires":
            out[k] = g * a
        elif method == "xgrad":
            out[k] = (g * a).sum() / total * a if total != 0 else 0
        else:
            weight = 0.0
            for slope in g.ravel():
                denominator = 2 * slope**2 + total * slope**3
                if slope > 0 and denominator != 0:
                    weight += slope**2 / denominator * slope
            out[k] = weight * a
    return out


def own_scale(raw):
    """The usual map: negative values to 0, then min-max."""
    positive = np.maximum(raw, 0)
    low, high = positive.min(), positive.max()
    return (positive - low) / (high - low) if high > low else np.zeros_like(raw)


def totals(raw, alpha, beta, size):
    """Sum of one film's map by scale."""
    film = bilinear(raw, size)
    return {
        "individual": bilinear(own_scale(raw), size).sum(),
        "common_raw": film.sum(),
        "common_tanh": np.tanh(alpha * film + beta).sum(),
    }


def confidence(model, film, selected):
    with torch.no_grad():
        return 1 / (1 + math.exp(-model(film[None])[0].tolist()[selected]))


def masked_film(film, raw):
    return film * torch.from_numpy(bilinear(own_scale(raw), film.shape[-1]))
