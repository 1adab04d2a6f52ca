"""Class activation maps of any layer of any classifier: the gradient methods by automatic differentiation, the others
by perturbed films.

Where the layer is pooled and followed by one linear layer, the closed forms of `cam` give the same maps without a
backward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from numbers import Integral

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lib.analysis.cam import feature_mask, gradpp_terms, normalise, resize
from lib.analysis.inference import as_maps, check_is_tensor, named_module

GRADIENT_METHODS = ("cam", "grad", "gradpp", "xgrad", "hires", "layer", "smooth_gradpp")
PERTURBATION_METHODS = ("score", "ss", "is")
METHODS = GRADIENT_METHODS + PERTURBATION_METHODS
SAMPLES = {"smooth_gradpp": 4, "ss": 35, "is": 10}
SIGMA = {"smooth_gradpp": 0.3, "ss": 2.0}


@dataclass(frozen=True)
class Cams:
    """Of B films and C classes: raw signed `maps` (B, C, h, w); `contributions` (B, C, F), what each channel adds to
    the sum of the map (``sum_xy w A``, as `cam.channel_contributions`); `logits` (B, M) of all the model's classes."""

    maps: Tensor
    contributions: Tensor
    logits: Tensor


def model_cams(
    model: nn.Module,
    films: Tensor,
    layer: str,
    classes: Sequence[int] | None = None,
    method: str = "grad",
    features: Tensor | None = None,
    *,
    token_grid: Sequence[int] = (),
    eps: float = 0.0,
    samples: int | None = None,
    sigma: float | None = None,
    seed: int | Sequence[int] = 0,
    cumulative: bool = True,
    numerator: int = 2,
    chunk: int = 64,
    progress: bool = False,
) -> Cams:
    """Raw maps ``L_c = sum_k w_k A_k`` of the maps A that `layer` gives, for several films and classes at once.

    With the gradient ``g`` of the logit of class c with respect to A and ``S_k = sum_xy A_k``, the weights are

    - 'grad': mean of g over the map; 'cam': its sum, for a layer that is pooled and followed by one linear layer (then
      it is the head's weight); 'xgrad': ``sum(g A) / S``, 0 where S is 0; 'hires' (pixel-wise Grad): g element by
      element; 'layer': relu(g) likewise;
    - 'gradpp': ``sum(a relu(g))`` with ``a = g^2 / (2 g^2 + S g^3)``, 0 where the denominator or g is 0;
    - 'smooth_gradpp': ``sum(a relu(D1))`` with ``a = D2 / (2 D2 + S D3)`` and ``Dp`` the mean of ``g^p`` over films
      with normal noise;
    - 'score', 'ss', 'is': softmax over the channels of the logit of the film that is multiplied by a mask, ``H_k``: A_k
      resized to the film, then min-max, a constant channel zero. 'ss': its mean over masks with normal noise; 'is':
      over masks times ``c_i``.

    One forward pass; the gradient methods add one backward pass a class, down to `layer` only; see `passes_per_film`
    for the others.

    Parameters
    ----------
    model : nn.Module
        Gives logits (B, M). It is put in evaluation mode and left there; its parameters and their gradients are not
        touched.
    films : float (B, channels, H, W)
    layer : str
        Dotted name of a module that runs once in a forward pass and gives maps (B, F, h, w), or tokens (B, T, D) with
        `token_grid`.
    classes : sequence of int, optional
        Outputs of the model; all of them by default.
    method : str
        One of `METHODS`.
    features : 0 or 1, (F,) or (C, F), optional
        Channels whose weighted maps are summed (FS-CAM: Li et al., eq. 5). The weights are those of all channels
        together.
    token_grid : (rows, columns), optional
        See `inference.as_maps`.
    eps : float
        Of 'gradpp', see `cam.class_activation_maps`.
    samples, sigma : int, float, optional
        Noisy or scaled copies, and the standard deviation of the noise: of 'smooth_gradpp' 4 and 0.3 (on the film, in
        its units), of 'ss' 35 and 2 (on the mask), of 'is' 10 copies.
    seed : int, or one int per film
        Of the noise, which is drawn film by film on the CPU and so does not depend on the batch or `chunk`. Films of
        one seed share noise.
    cumulative : bool
        'is': ``c_i = sum_{j <= i} j / N``, as published, which ends at (N + 1) / 2; False: the Riemann sum's ``c_i = i
        / N``.
    numerator : {2, 1}
        'smooth_gradpp': D2, the form of Grad++; 1: D1, as printed in its paper.
    chunk : int
        Perturbed films in one forward pass; bounds the memory of 'score', 'ss' and 'is', not their result.
    progress : bool
        Show a progress bar over the perturbed films.

    Returns
    -------
    Cams
        In the precision of the layer's output, on its device. 'smooth_gradpp' needs the memory of `samples` times the
        films.

    Raises
    ------
    ValueError
        No films; a layer that is not there, runs more than once, or gives neither maps nor tokens; a method that cannot
        work with it; a class out of range; values that are not finite.
    """
    samples = _samples(method, samples)
    if not len(films):
        raise ValueError("there are no films to explain: the batch is empty")
    sigma = SIGMA.get(method, 0.0) if sigma is None else sigma
    seeds = [int(seed)] * len(films) if isinstance(seed, Integral) else [int(one) for one in seed]
    if len(seeds) != len(films):
        raise ValueError(f"need one seed, or one for each of the {len(films)} films, got {len(seeds)}")
    if samples < 1 or sigma < 0 or eps < 0 or chunk < 1 or numerator not in (1, 2):
        raise ValueError(
            "samples and chunk must be at least 1, sigma and eps not negative, numerator 1 or 2; "
            f"got {samples}, {chunk}, {sigma}, {eps}, {numerator}"
        )
    model.eval()
    # As `inference.stream`: TF32, cuDNN's default, keeps 10 bits. Tensors of inference mode cannot take part in a
    # backward pass: cloned.
    with torch.inference_mode(False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        films = films.detach().clone()
        generators = [torch.Generator().manual_seed(one) for one in seeds]
        with torch.set_grad_enabled(method in GRADIENT_METHODS and method != "smooth_gradpp"):
            logits, output = _forward(model, films, layer)
        classes = _classes(classes, logits.shape[1])
        maps = as_maps(output.detach(), layer, token_grid)
        if not torch.isfinite(maps).all():
            film, channel = torch.nonzero(~torch.isfinite(maps))[0, :2].tolist()
            where = f"film {film} of the batch, channel {channel}"
            raise ValueError(f"the maps of layer {layer} hold NaN or infinite values, first in {where}")
        mask = None if features is None else feature_mask(features, len(classes), maps.shape[1]).to(maps)
        if method in PERTURBATION_METHODS:
            noise = samples, sigma, generators, cumulative
            weights = _scores(model, films, maps, classes, method, *noise, chunk, progress).unbind(1)
        else:
            smooth = method == "smooth_gradpp"
            start = _noisy_forward(model, films, layer, samples, sigma, generators) if smooth else (logits, output)
            grads = (grad.unflatten(0, (-1, len(films))) for grad in _gradients(*start, classes, layer, token_grid))
            weights = (_gradient_weights(grad, maps, method, eps, numerator, layer) for grad in grads)
        return Cams(*_sums(maps, weights, mask, layer, classes), logits.detach())


def passes_per_film(method: str, n_features: int, n_classes: int, samples: int | None = None) -> tuple[int, int]:
    """Forward and backward passes that `model_cams` needs for each film, all `n_classes` together; a backward pass ends
    at the layer.

    For example 'score' on 2,048 channels takes 2,049 forward passes a film, and 'ss' 71,681. The closed forms of `cam`
    take 1 and 0.
    """
    samples = _samples(method, samples)
    if method in PERTURBATION_METHODS:
        return 1 + samples * n_features, 0
    return (1 + samples, samples * n_classes) if method == "smooth_gradpp" else (1, n_classes)


def _samples(method: str, samples: int | None) -> int:
    if method not in METHODS:
        raise ValueError(f"unknown CAM method {method!r}; choose one of {', '.join(METHODS)}")
    return SAMPLES.get(method, 1) if samples is None else samples


def _forward(model, films, layer):
    """Logits, and the output of `layer`: with gradients enabled a leaf on which the logits depend."""
    module, seen = named_module(model, layer), []

    def hook(module, inputs, output):
        check_is_tensor(output, layer)
        seen.append(output.detach().clone().requires_grad_(torch.is_grad_enabled()))
        return seen[-1].clone()  # a ReLU that follows may work in place

    handle = module.register_forward_hook(hook)
    try:
        logits = model(films)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise ValueError(f"layer {layer} runs {len(seen)} times in a forward pass: name a module that runs once")
    if logits.ndim != 2 or len(logits) != len(films):
        found = f"{tuple(logits.shape)} for {len(films)} films"
        raise ValueError(f"the model must give logits (B, M), one row a film; it gives {found}")
    return logits, seen[0]


def _noisy_forward(model, films, layer, samples, sigma, generators):
    noise = torch.stack([torch.randn(samples, *films.shape[1:], generator=one) for one in generators], dim=1)
    with torch.enable_grad():
        return _forward(model, (films + sigma * noise.to(films)).flatten(0, 1), layer)


def _classes(classes, n_outputs):
    classes = list(range(n_outputs)) if classes is None else [int(c) for c in classes]
    if not classes:
        raise ValueError("classes is empty: name at least one")
    for c in classes:
        if not 0 <= c < n_outputs:
            raise ValueError(f"classes must lie in 0..{n_outputs - 1}, got {c}")
    return classes


def _gradients(logits, output, classes, layer, token_grid):
    """Of each class in turn, the gradient of its logit with respect to the layer's maps; only one is alive at a
    time."""
    reached = class_token = False
    for position, c in enumerate(classes):
        grad = None
        if logits.requires_grad and output.requires_grad:
            chosen = torch.zeros_like(logits)
            chosen[:, c] = 1
            more = position + 1 < len(classes)
            (grad,) = torch.autograd.grad(logits, output, chosen, retain_graph=more, allow_unused=True)
        if grad is None:
            raise ValueError(
                f"the logits do not depend on layer {layer}, or have no gradient there: name a layer on their way"
            )
        of_maps = as_maps(grad, layer, token_grid)
        if not torch.isfinite(of_maps).all():
            raise ValueError(f"the gradient of class {c} at layer {layer} holds NaN or infinite values")
        if grad.ndim == 3 and not reached:
            reached, class_token = bool(of_maps.any()), class_token or bool(grad.any())
        yield of_maps
    if class_token and not reached:
        raise ValueError(
            f"after layer {layer} only the class token reaches the logits, so the tokens of the map have no gradient: "
            "name an earlier layer, such as the norm before the last attention"
        )


def _gradient_weights(grads, maps, method, eps, numerator, layer):
    """(B, F), or (B, F, h, w) of 'hires' and 'layer', from gradients (samples, B, F, h, w) of one class."""
    if method == "smooth_gradpp":
        # Powers of gradients near 1e-15 would underflow: u = g / m, with m the largest |g| of the film, and D_p = m^p
        # U_p.
        largest = grads.abs().amax(dim=(0, 2, 3, 4))[:, None, None, None]
        unit = grads / torch.where(largest == 0, 1, largest)
        first, second, third = (unit.pow(p).mean(0) for p in (1, 2, 3))
        denominator = 2 * second + maps.sum(dim=(2, 3), keepdim=True) * largest * third
        alpha = torch.where(denominator == 0, 0, (second * largest if numerator == 2 else first) / denominator)
        return (alpha * first.clamp(min=0)).sum(dim=(2, 3))
    (grad,) = grads
    if method == "cam":
        weights = grad.sum(dim=(2, 3))
        spread = (grad - grad[:1, :, :1, :1]).abs().max()
        if spread > 1e-4 * grad.abs().max():
            raise ValueError(
                f"'cam' cannot work with layer {layer}: it is not pooled and followed by one linear layer, for the "
                "gradient differs between places or films; choose 'grad' or another method"
            )
        return weights
    if method == "grad":
        return grad.mean(dim=(2, 3))
    if method == "hires":
        return grad
    if method == "layer":
        return grad.clamp(min=0)
    if method == "gradpp":
        return gradpp_terms(grad, maps.sum(dim=(2, 3), keepdim=True), eps).sum(dim=(2, 3))
    sums = maps.sum(dim=(2, 3))
    return torch.where(sums == 0, 0, (grad * maps).sum(dim=(2, 3)) / sums)


@torch.no_grad()
def _scores(model, films, maps, classes, method, samples, sigma, generators, cumulative, chunk, progress):
    """Softmax over the channels of the masked films' logits, (B, C, F): one forward pass of a masked film serves all
    classes."""
    batch, channels = maps.shape[:2]
    size, flat = films.shape[2:], maps.flatten(0, 1)
    total = maps.new_zeros(batch * channels, len(classes))
    with tqdm(total=samples * len(flat), desc=method, unit="film", disable=not progress) as bar:
        # Copies outside, channels inside: the order in which a film's noise is drawn must not depend on the chunks.
        for copy, start in product(range(1, samples + 1), range(0, len(flat), chunk)):
            piece = slice(start, min(start + chunk, len(flat)))
            owners = [pair // channels for pair in range(piece.start, piece.stop)]
            masks = normalise(resize(flat[piece], tuple(size)), rectify=False)
            if method == "ss":  # mask by mask, for the same reason
                noise = torch.stack([torch.randn(size, generator=generators[owner]) for owner in owners])
                masks = masks + sigma * noise.to(masks)
            elif method == "is":
                masks = masks * ((copy + 1) * copy / 2 if cumulative else copy) / samples
            total[piece] += model(films[owners] * masks[:, None].to(films))[:, classes].to(total)
            bar.update(piece.stop - piece.start)
    return (total / samples).unflatten(0, (batch, channels)).softmax(dim=1).transpose(1, 2)


@torch.no_grad()
def _sums(maps, weights, mask, layer, classes):
    """Maps (B, C, h, w) and contributions (B, C, F), class by class: weights (B, F, h, w) of all classes would not
    fit."""
    raw, contributions = [], []
    for position, weight in enumerate(weights):
        chosen = None if mask is None else mask if mask.ndim == 1 else mask[position]
        if weight.ndim == 2:
            weight = weight if chosen is None else weight * chosen
            contributions.append(weight * maps.sum(dim=(2, 3)))
            raw.append((weight[:, None] @ maps.flatten(2)).unflatten(2, maps.shape[2:])[:, 0])
        else:
            weighted = weight * maps if chosen is None else weight * maps * chosen[:, None, None]
            contributions.append(weighted.sum(dim=(2, 3)))
            raw.append(weighted.sum(dim=1))
        if not torch.isfinite(raw[-1]).all():
            raise ValueError(
                f"the map of class {classes[position]} at layer {layer} overflows, for 'gradpp' and 'smooth_gradpp' "
                "where a denominator is nearly 0, or the scores of the perturbed films are not finite"
            )
    return torch.stack(raw, dim=1), torch.stack(contributions, dim=1)
