"""Relevance of every pixel for one logit: LRP alpha 1 beta 0 and RAP (Nam & Lee), layer by layer from the logit down to
the film.

The rules are zennit hooks, usable in any zennit composite. `heatmaps` does not put them on the user's modules: it
follows the model's forward with torch.fx and rewrites it as a list of steps, one module for each operation, also for
those that forward writes as functions (F.relu, +, torch.cat, mean). So no operation is overlooked, a reused module has
one rule for each use, and a model with an operation that has no rule is refused by name. On top of that every step's
sums of relevance are checked at run time.

Biases take no part in any denominator. Relevance that meets the denominator 0 is dropped (LRP), and the check counts
it.

Right sums do not make a right map. RAP's shift (eq. 6) leaves relevance where the activation is nearly 0; at a residual
sum this relevance is divided by a + b, of which a and b leave little but their rounding errors. In float32 a few such
positions can outweigh the whole map, and another memory layout gives another map. So with residual sums RAP runs
forward, and divides by them, in float64, which is enough; what the convolutions hand back stays in float32, since no
term is divided by a difference there. A map of which more than `STABLE` may be rounding error even so is NaN.
"""

import warnings
from contextlib import contextmanager

import pandas as pd
import torch
from torch import Tensor, nn
from zennit.core import Composite

from lib.analysis.relevance.rules import (
    SUPPORTED,
    AbsoluteInfluence,
    Pass,
    Pooled,
    RelativeInfluence,
    RelevanceError,
    ZBox,
    ZPlus,
    sums,
)
from lib.analysis.relevance.steps import MAPS, RULES, Add, Steps, follow

METHODS = ("lrp", "rap")
STABLE = 0.01  # largest share of a RAP map that may be rounding error, by the estimate of `_rounding`


def heatmaps(
    model: nn.Module,
    films: Tensor,
    classes: Tensor,
    method: str = "lrp",
    *,
    init: str = "one",
    first_layer: str | tuple = "zb",
    batchnorm: str = "identity",
    negative: str = "paper",
    check: bool = True,
) -> Tensor:
    """Relevance of every pixel of every film for one logit of each film.

    Parameters
    ----------
    model : nn.Module
        Maps films (B, Cin, H, W) to logits (B, M). It is evaluated with its evaluation-mode behaviour and left as it
        was.
    films : float (B, Cin, H, W)
        float32 or float64 as the model, on its device, which must know float64 (MPS does not). A film that is wanted
        for two logits is given twice.
    classes : integer (B,)
        Index of the logit of each film, 0..M-1.
    method : {'lrp', 'rap'}
        LRP alpha 1, beta 0 (Nam & Lee, eq. 2) or relative attributing propagation (eq. 3 to 6).
    init : {'one', 'logit'}
        Relevance of the logit: 1, so that a negative logit does not turn the signs of the map, or the logit itself.
    first_layer : {'zb', 'alpha1beta0'} or (low, high)
        Rule of the layer that sees the films: z^B with each film's own minimum and maximum, or with these bounds
        (numbers, or tensors such as (1, Cin, 1, 1)); or alpha 1, beta 0.
    batchnorm : {'identity', 'merge'}
        BatchNorm passes relevance on and the convolution keeps its raw weights (as Nam & Lee's code does), or a
        BatchNorm that directly follows a convolution is multiplied into its weights.
    negative : {'paper', 'authors_conv'}
        RAP's negative relevance at hidden convolutions: as eq. 5, or twice through the negative weights, as in the
        authors' code.
    check : bool
        Verify for the first film that the model was followed rightly (its logits agree), for every film and layer that
        relevance is conserved up to rounding, apart from what meets the denominator 0, and that RAP's maps are stable.

    Returns
    -------
    float (B, H, W), signed, summed over the input channels, in the precision of `films`, on their device, detached.
    NaN all over where RAP has no stable map (see the top of this module); a warning counts these films. RAP's shift
    meets a / (a + b) of residual sums near 0: in a deep residual net single shares may be thousands of times the
    logit's relevance.

    Raises
    ------
    RelevanceError
        An operation without a rule, by name; relevance that is not conserved: the first such layer and its ratio; a
        device without float64.
    ValueError
        Unknown option, shapes or classes that do not fit, NaN in the films, films outside of the fixed bounds.
    """
    heatmap, _, ledger = _explain(model, films, classes, method, init, first_layer, batchnorm, negative, check)
    if not torch.isfinite(heatmap).all():
        film = int(torch.nonzero(~torch.isfinite(heatmap))[0, 0])
        raise RelevanceError(f"the relevance of film {film} is not finite; conservation(...) shows the layer")
    if check and method == "rap":
        unstable = _rounding(heatmap, ledger) > STABLE
        if unstable.any():
            warnings.warn(
                f"RAP has no stable map for {int(unstable.sum())} of {len(films)} films: where residual sums or "
                f"relevance cancel, rounding errors may be more than {STABLE:.0%} of it. These maps are NaN; with "
                "model and films in float64 they may be stable",
                stacklevel=2,
            )
            heatmap[unstable] = torch.nan
    return heatmap


def conservation(
    model: nn.Module, films: Tensor, classes: Tensor, method: str = "lrp", *, init: str = "logit", **options
) -> pd.DataFrame:
    """Sums of relevance at every layer, in the order in which relevance passes, without refusing anything but
    operations without a rule.

    Parameters
    ----------
    model, films, classes, method, init, **options
        As for `heatmaps`.

    Returns
    -------
    DataFrame
        One row for each film and layer: `film` (position in the batch), `layer`, `rule`, `relevance_out` (of the
        layer's output), `relevance_in` (of its inputs), `dropped` (met the denominator 0), `ratio` relevance_in /
        relevance_out (NaN for 0). ReLU, BatchNorm and Flatten hand relevance over unchanged and have no row. The last
        layer, '(whole model)', has the logit's relevance as output and the heatmap's sum as input.
    """
    heatmap, start, ledger = _explain(model, films, classes, method, init, check=False, keep=True, **options)
    total = ("(whole model)", "", start, sums(heatmap), sum(entry[4] for entry in ledger))
    columns = "layer rule relevance_out relevance_in dropped".split()
    parts = []
    for label, rule, *values in (*(entry[:5] for entry in ledger), total):
        row = dict(zip(columns, (label, rule, *(value.cpu().numpy() for value in values)), strict=True))
        parts.append(pd.DataFrame({"film": range(len(films)), **row}))
    frame = pd.concat(parts, ignore_index=True)
    return frame.assign(ratio=(frame.relevance_in / frame.relevance_out).where(frame.relevance_out != 0))


def _explain(
    model,
    films,
    classes,
    method,
    init="one",
    first_layer="zb",
    batchnorm="identity",
    negative="paper",
    check=True,
    keep=False,
):
    """Heatmaps, the relevance of each film's logit, and the ledger of the rules."""
    classes = torch.as_tensor(classes)
    _check_arguments(films, classes, method, init, first_layer, batchnorm, negative)
    classes = classes.to(films.device)
    if isinstance(first_layer, tuple):
        first_layer = tuple(torch.as_tensor(bound, dtype=films.dtype, device=films.device) for bound in first_layer)
        if (films < first_layer[0]).any() or (films > first_layer[1]).any():
            raise ValueError("first_layer: the films reach beyond the bounds (low, high)")
    # Whatever mode the caller is in. TF32, cuDNN's default, keeps 10 bits, too few for sums to be conserved.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(films.device.type, enabled=False),
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
    ):
        inputs = films.detach().clone()
        with _evaluating(model):
            steps = follow(model)
            if any(weight.dtype != films.dtype for weight in steps.parameters()):
                raise ValueError(
                    f"films are {films.dtype}, but the model's weights are {next(steps.parameters()).dtype}"
                )
            with torch.no_grad():
                expected = model(inputs[:1]) if check else None
        if method == "rap" and any(type(step) is Add for step in steps.steps):
            steps, inputs = steps.double(), inputs.double()
        rules, ledger = _rules(steps, method, first_layer, batchnorm, negative, films.dtype), []
        for rule in rules:  # Pass hands over what it gets: nothing to check
            rule.ledger = ledger if (check or keep) and not isinstance(rule, Pass) else None
        by_name = {f"steps.{k}": rule for k, rule in enumerate(rules)}
        with Composite(module_map=lambda context, name, module: by_name.get(name)).context(steps):
            logits = steps(inputs.requires_grad_())
            low, high = int(classes.min()), int(classes.max())
            if logits.ndim != 2 or not (0 <= low and high < logits.shape[1]):
                raise ValueError(f"classes {low}..{high} do not fit logits of shape {tuple(logits.shape)}")
            start = torch.zeros_like(logits).scatter_(1, classes.long()[:, None], 1.0)
            if init == "logit":
                start = start * logits.detach()
            (relevance,) = torch.autograd.grad(logits, inputs, start)
    if check:
        _check_conservation(model, logits, expected, start, relevance, ledger)
    return relevance.sum(1).to(films.dtype), sums(start), ledger


def _rules(steps: Steps, method, first_layer, batchnorm, negative, dtype):
    """The rule of every step; those that have weights hand on in `dtype`."""
    top = len(steps.steps) - 1
    while RULES.get(type(steps.steps[top])) is Pass and steps.sources[top] != [0]:
        top = steps.sources[top][0] - 1
    if method == "rap" and type(steps.steps[top]) not in (*MAPS, Pooled):
        raise RelevanceError(
            f"RAP starts at the linear layer that gives the logits, but {steps.labels[top]} gives them"
        )
    rules = []
    for k, module in enumerate(steps.steps):
        kind = type(module)
        if kind in RULES:
            rules.append(RULES[kind]())
            continue
        follower = [steps.steps[reader] for reader in steps.readers(k + 1)]
        scale = None
        if batchnorm == "merge" and kind is nn.Conv2d and len(follower) == 1 and type(follower[0]) is nn.BatchNorm2d:
            norm = follower[0]
            scale = torch.rsqrt(norm.running_var + norm.eps) * (1 if norm.weight is None else norm.weight)
        if method == "rap" and k == top:
            rules.append(AbsoluteInfluence(scale))
        elif steps.sources[k] == [0] and first_layer != "alpha1beta0":
            rules.append(ZBox(None if first_layer == "zb" else first_layer, scale))
        elif steps.sources[k] == [0] or method == "lrp":
            rules.append(ZPlus(scale))
        else:
            rules.append(RelativeInfluence(negative == "authors_conv" and kind is not nn.Linear, scale))
        rules[-1].dtype = dtype
    for label, rule in zip(steps.labels, rules, strict=True):
        rule.label = label
    return rules


def _check_arguments(films, classes, method, init, first_layer, batchnorm, negative):
    for name, value, known in (
        ("method", method, METHODS),
        ("init", init, ("one", "logit")),
        ("batchnorm", batchnorm, ("identity", "merge")),
        ("negative", negative, ("paper", "authors_conv")),
    ):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(known)}")
    if not (
        first_layer in ("zb", "alpha1beta0")
        if isinstance(first_layer, str)
        else isinstance(first_layer, tuple) and len(first_layer) == 2
    ):
        raise ValueError(f"first_layer must be 'zb', 'alpha1beta0' or a pair (low, high), got {first_layer!r}")
    if films.device.type == "mps":
        raise RelevanceError("relevance needs float64, which the device mps does not know: set device to cpu")
    if films.ndim != 4 or films.dtype not in (torch.float32, torch.float64) or not len(films):
        raise ValueError(f"films must be float32 or float64 (B, Cin, H, W), got {films.dtype} {tuple(films.shape)}")
    if classes.shape != films.shape[:1] or classes.is_floating_point() or classes.dtype == torch.bool:
        given = f"{classes.dtype} {tuple(classes.shape)}"
        raise ValueError(f"classes must be one integer for each of the {len(films)} films, got {given}")
    if not torch.isfinite(films).all():
        raise ValueError(f"film {int(torch.nonzero(~torch.isfinite(films))[0, 0])} holds NaN or infinite values")


@contextmanager
def _evaluating(model):
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def _check_conservation(model, logits, expected, start, relevance, ledger):
    """Sums may differ by rounding only, which is judged against the sum of absolute relevance, not against the sum
    itself."""
    if not torch.isfinite(logits).all():
        raise RelevanceError(f"film {int(torch.nonzero(~torch.isfinite(logits))[0, 0])} has a logit that is not finite")
    # Not relative alone: a logit near 0 is the rounded sum of larger terms.
    if (logits[:1] - expected).abs().max() > 1e-4 * expected.abs().max() + 1e-5:
        raise RelevanceError(
            f"{type(model).__name__} followed step by step gives other logits than the model (an in-place change that "
            f"is read later, or a hook that changes values?). Supported: {SUPPORTED}"
        )
    tolerance = 1e-5 if expected.dtype == torch.float32 else 1e-10
    out, into, dropped, mass = (torch.stack(column) for column in list(zip(*ledger))[2:6])
    whole = (sums(start), sums(relevance), dropped.sum(0), mass.max(0).values)
    out, into, dropped, mass = (
        torch.cat([layers, last[None]]) for layers, last in zip((out, into, dropped, mass), whole, strict=True)
    )
    broken = ~((out - into - dropped).abs() <= tolerance * mass)  # NaN is broken too
    if broken.any():
        layer, film = torch.nonzero(broken)[0].tolist()
        label = [*(entry[0] for entry in ledger), "the whole model"][layer]
        raise RelevanceError(
            f"relevance is not conserved at {label}: film {film} has {float(out[layer, film]):.6g} at its output, "
            f"{float(into[layer, film]):.6g} at its input and {float(dropped[layer, film]):.6g} dropped, ratio "
            f"{float(into[layer, film] / out[layer, film]):.6g}. Nothing is returned. Supported: {SUPPORTED}"
        )


def _rounding(heatmap, ledger):
    """Share of each map that may be rounding error, float64 (B,): of the denominators, at the worst layer; and of the
    relevance itself, where more of it is handed on than the map keeps because it cancels."""
    mass, denominators = (torch.stack(column) for column in list(zip(*ledger))[5:])
    kept = sums(heatmap.abs())
    cancelled = torch.where(kept > 0, torch.finfo(heatmap.dtype).eps * mass.amax(0) / kept, 0)
    # The terms of a denominator carry errors of the layers before: up to 500 epsilons of a map were found for each one
    # here. NaN: no relevance was divided.
    return torch.maximum(1000 * denominators.nan_to_num(0).amax(0), cancelled)
