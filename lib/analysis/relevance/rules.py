"""Rules of LRP (alpha 1, beta 0) and RAP (Nam & Lee, eq. 2 to 6) as zennit hooks, usable in any zennit composite.

Those that zennit has too carry its names. Biases take no part in any denominator. Relevance that meets the denominator
0 is dropped (LRP), and counted.
"""

import copy
from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zennit.core import Hook

SUPPORTED = (
    "Conv2d, Linear, BatchNorm, ReLU, MaxPool2d, AvgPool2d, AdaptiveAvgPool2d, Dropout, Identity, Flatten, and as "
    "functions relu, dropout, the same pools, mean over height and width, flatten(1), + of two equal shapes, and cat "
    "of channels"
)


class RelevanceError(ValueError):
    """The model cannot be explained: an operation without a rule, or relevance that is not conserved."""


class Pooled(nn.Module):
    """A 1 x 1 convolution and the average pooling behind it as one linear map (DenseNet's transitions).

    Apart, the pooling would divide by sums of signed values near 0. Every input reaches an output by one path only, so
    the positive part of the joint weights is the pooling of the positive part of the convolution's.
    """

    def __init__(self, layer: nn.Module, pool: nn.Module):
        super().__init__()
        self.layer, self.pool = layer, pool

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.layer(x))


class _Link(torch.autograd.Function):
    """Joins a module's output to its inputs by a rule instead of by the module's own gradient, which is then never
    computed."""

    @staticmethod
    def forward(ctx, rule, module, output, *inputs):
        ctx.rule, ctx.module, ctx.shapes = rule, module, [x.shape for x in inputs]
        if rule.needs_inputs:
            ctx.save_for_backward(*inputs)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, relevance):
        dtype = ctx.rule.dtype or relevance.dtype
        inputs = [x.to(dtype) for x in ctx.saved_tensors]
        return None, None, None, *ctx.rule.backward(ctx.module, inputs or ctx.shapes, relevance.to(dtype))


class Rule(Hook):
    """How one module hands the relevance of its output to its inputs; a zennit hook.

    Unlike zennit's own hooks it leaves the module's gradient out (half of the work) and copies no input.

    Attributes
    ----------
    label : str
        Name of the layer, for messages.
    ledger : list, optional
        Each pass appends (label, rule, relevance of the output, of the inputs, dropped, sum of absolute values,
        `rounding`), the last five float64 (B,).
    dtype : torch.dtype, optional
        Precision in which relevance is handed on; by default that of the forward pass.
    """

    needs_inputs = True

    def __init__(self):
        super().__init__()
        self.label, self.ledger, self.dtype = "", None, None

    def copy(self) -> "Rule":
        new = copy.copy(self)
        Hook.__init__(new)
        return new

    def pre_forward(self, module, input):
        self.stored_tensors["inputs"] = input
        return tuple(x.detach() for x in input)

    def post_forward(self, module, input, output):
        return _Link.apply(self, module, output.detach(), *self.stored_tensors.pop("inputs"))

    def backward(self, module, inputs, relevance):
        shares, dropped = self.distribute(module, inputs, relevance)
        if self.ledger is not None:
            out, into, mass = sums(relevance), sum(map(sums, shares)), sum(sums(share.abs()) for share in shares)
            rounding = self.rounding(module, inputs, relevance)
            self.ledger.append((self.label, type(self).__name__, out, into, dropped, mass + out.abs(), rounding))
        return shares

    def distribute(
        self, module: nn.Module, inputs: Sequence[Tensor], relevance: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The relevance of each input, and of each film what is dropped because its denominator is 0, float64 (B,)."""
        raise NotImplementedError

    def rounding(self, module: nn.Module, inputs: Sequence[Tensor], relevance: Tensor) -> Tensor:
        """Share of the relevance handed on that may be rounding error of a denominator, float64 (B,); 0 where all terms
        of the denominators have one sign."""
        return _nothing(relevance)


class Pass(Rule):
    """ReLU, BatchNorm, Flatten: relevance stays where it is."""

    needs_inputs = False

    def distribute(self, module, inputs, relevance):
        return (relevance.reshape(inputs[0]),), _nothing(relevance)


class Concat(Rule):
    """Concatenation: each input takes its own channels."""

    needs_inputs = False

    def distribute(self, module, inputs, relevance):
        return relevance.split([shape[module.dim] for shape in inputs], module.dim), _nothing(relevance)


class WinnerTakeAll(Rule):
    """Max pooling: all relevance of a window to its largest element (the first of equals)."""

    def distribute(self, module, inputs, relevance):
        parts = _leaves(inputs[0])
        return torch.autograd.grad(_total(module.forward, parts), parts, relevance), _nothing(relevance)


class Norm(Rule):
    """Average pooling, means and residual sums: R_i = x_i / sum(x) R_j, signed, over the window or the two addends."""

    def distribute(self, module, inputs, relevance):
        if len({x.shape for x in inputs}) > 1:
            raise RelevanceError(
                f"{self.label} adds tensors of shapes {' and '.join(str(tuple(x.shape)) for x in inputs)}; only equal "
                f"shapes have a rule. Supported: {SUPPORTED}"
            )
        parts = _leaves(*inputs)
        with torch.enable_grad():
            total = module.forward(*parts)  # not module(x), which would run this hook again
        quotient, dropped = _divide(relevance, total.detach(), signed=True)
        return _shares([total], parts, [quotient]), dropped

    def rounding(self, module, inputs, relevance):
        cancelled = _divide(module.forward(*(x.abs() for x in inputs)), module.forward(*inputs).abs_())[0]
        handed = (relevance * cancelled).abs_()
        return torch.finfo(handed.dtype).eps * sums(handed * cancelled) / sums(handed)


class _Weighted(Rule):
    """Rules of a convolution or linear layer; `scale` (channels out) multiplies its weights, for a BatchNorm merged
    into them."""

    def __init__(self, scale: Tensor | None = None):
        super().__init__()
        self.scale = scale

    def weight(self, module: nn.Module) -> Tensor:
        layer = module.layer if isinstance(module, Pooled) else module
        weight = layer.weight.detach()
        if self.scale is not None:
            weight = weight * self.scale.reshape(-1, *[1] * (weight.ndim - 1))
        return weight.to(self.dtype or weight.dtype)


class ZPlus(_Weighted):
    """LRP alpha 1, beta 0: R_i = sum_j z+_ij / (sum_i z+_ij) R_j, z+ = x+ w+ + x- w- (Nam & Lee, eq. 2).

    Both signs of the input share one denominator; where no input is negative the second product is not computed.
    """

    def distribute(self, module, inputs, relevance):
        parts = _signs(inputs[0])
        total = _positive(module, parts, self.weight(module))
        quotient, dropped = _divide(relevance, total.detach())
        return (_redistributed([total], parts, [quotient]),), dropped


class ZBox(_Weighted):
    """z^B rule of the layer that sees the film: R_i = sum_j (x w - l w+ - h w-)_ij / (sum_i of the same) R_j.

    Written as (x - l) w+ + (x - h) w-: no term is negative and nothing cancels. `bounds` are (low, high), numbers or
    tensors that broadcast to the film; None takes each film's own minimum and maximum over channels and pixels.
    """

    def __init__(self, bounds: tuple | None = None, scale: Tensor | None = None):
        super().__init__(scale)
        self.bounds = bounds

    def distribute(self, module, inputs, relevance):
        x, every = inputs[0], tuple(range(1, inputs[0].ndim))
        low, high = self.bounds or (x.amin(every, keepdim=True), x.amax(every, keepdim=True))
        parts = _leaves(x - low, x - high)
        total = _positive(module, parts, self.weight(module))
        quotient, dropped = _divide(relevance, total.detach())
        return (_redistributed([total], parts, [quotient]),), dropped


class AbsoluteInfluence(_Weighted):
    """RAP's first step, at the layer that gives the logits (Nam & Lee, eq. 3 and 4): R_i = |c_i| / sum |c_i| R_k, c_i =
    x_i w_ik.

    The bias, shared out over the c_i of each sign in proportion, multiplies all of them by f(x)_k / sum(c), which
    cancels here.
    """

    def distribute(self, module, inputs, relevance):
        parts = _leaves(inputs[0])
        total = _total(_linear_map(module), parts, [self.weight(module)])
        # One logit of a film has relevance: its constant factor cancels.
        influence = _redistributed([total], parts, [relevance]).abs()
        quotient, dropped = _divide(sums(relevance)[:, None], sums(influence)[:, None])
        return (influence * _as_film(quotient, influence),), dropped


class RelativeInfluence(_Weighted):
    """RAP's later steps (Nam & Lee, eq. 5 and 6), where a and b are the sums of positive and of negative contributions
    (absolute).

    Eq. 5: Rbar_i = sum_j z+_ij / a_j R_j + |z-_ij| / b_j (R_j b_j / (a_j + b_j)), computed without dividing by b. Eq. 6
    takes from every neuron with relevance the same amount, (sum_i Rbar_i - sum_j R_j) / (their number in the film), so
    that the sum is kept exactly. With ``authors=True`` negative R_j go through the negative weights twice, as in the
    authors' convolution: |z-| / b + |z-| / (a + b).
    """

    def __init__(self, authors: bool = False, scale: Tensor | None = None):
        super().__init__(scale)
        self.authors = authors

    def distribute(self, module, inputs, relevance):
        parts, weight = _signs(inputs[0]), self.weight(module)
        positive, negative = _positive(module, parts, weight), _positive(module, parts, -weight)
        a, b = positive.detach(), negative.detach()
        through_a, through_b = relevance, _divide(relevance, a + b)[0]
        if self.authors:
            through_a = relevance.clamp(min=0)
            through_b = through_b + _divide(relevance.clamp(max=0), b)[0]
        spread = _redistributed([positive, negative], parts, [_divide(through_a, a)[0], through_b])
        idle = spread == 0
        surplus, count = sums(spread) - sums(relevance), spread[0].numel() - idle.flatten(1).sum(1, dtype=torch.int32)
        shift = torch.where(count > 0, surplus / count.clamp(min=1), 0)
        return ((spread - _as_film(shift, spread)).masked_fill_(idle, 0),), torch.where(count > 0, 0, sums(relevance))


def _leaves(*tensors):
    return [x.detach().requires_grad_() for x in tensors]


def _signs(x):
    """The input as one part, or x+ and x- where it has negatives."""
    return _leaves(x.clamp(min=0), x.clamp(max=0)) if x.amin() < 0 else _leaves(x)


def _positive(module, parts, weight):
    """Sum of positive contributions per output: the first part with w+ and the second, if any, with w-."""
    return _total(_linear_map(module), parts, [weight.clamp(min=0), *([weight.clamp(max=0)] if len(parts) > 1 else [])])


def _total(apply, parts, weights=None):
    with torch.enable_grad():
        return reduce(torch.add, map(apply, parts, *([weights] if weights else [])))


def _shares(totals, parts, quotients):
    """What each part x of the input takes: x times the transposed maps of the quotients."""
    gradients = torch.autograd.grad(totals, parts, quotients)
    return tuple(x.detach() * gradient for x, gradient in zip(parts, gradients, strict=True))


def _redistributed(totals, parts, quotients):
    return reduce(torch.add, _shares(totals, parts, quotients))


def _divide(relevance, denominator, signed=False):
    """Quotient, 0 where the denominator is 0, and for each film the relevance lost there; subnormal counts as 0, it
    would overflow."""
    quotient, size = relevance / denominator, denominator.abs() if signed else denominator
    tiny = torch.finfo(denominator.dtype).tiny
    if size.amin() >= tiny:
        return quotient, _nothing(relevance)
    dead = size < tiny
    return quotient.masked_fill_(dead, 0), sums(relevance * dead)


def _linear_map(module):
    """The module as a function of input and weight, without its bias."""
    if isinstance(module, Pooled):
        inner = _linear_map(module.layer)
        return lambda x, weight: module.pool(inner(x, weight))
    if isinstance(module, nn.Linear):
        return F.linear
    return lambda x, weight: F.conv2d(x, weight, None, module.stride, module.padding, module.dilation, module.groups)


def sums(values: Tensor) -> Tensor:
    """Sum of each film's values, float64 (B,)."""
    return values.flatten(1).sum(1).double()


def _nothing(relevance):
    return relevance.new_zeros(len(relevance), dtype=torch.float64)


def _as_film(numbers, like):
    return numbers.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))
