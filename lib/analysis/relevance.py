"""Relevance of every pixel for one logit: LRP alpha 1 beta 0 and RAP (Nam & Lee), layer by layer from the logit down to the film.

The rules are zennit hooks, usable in any zennit composite. `heatmaps` does not put them on the user's modules: it follows the model's
forward with torch.fx and rewrites it as a list of steps, one module for each operation, also for those that forward writes as functions
(F.relu, +, torch.cat, mean). So no operation is overlooked, a reused module has one rule for each use, and a model with an operation that
has no rule is refused by name. On top of that every step's sums of relevance are checked at run time.

Biases take no part in any denominator. Relevance that meets the denominator 0 is dropped (LRP), and the check counts it.
"""
import copy
import operator
from collections import Counter
from contextlib import contextmanager
from functools import reduce

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from zennit.core import Composite, Hook

METHODS = ("lrp", "rap")
SUPPORTED = ("Conv2d, Linear, BatchNorm, ReLU, MaxPool2d, AvgPool2d, AdaptiveAvgPool2d, Dropout, Identity, Flatten, and as functions relu, "
             "dropout, the same pools, mean over height and width, flatten(1), + of two equal shapes, and cat of channels")


class RelevanceError(ValueError):
    """The model cannot be explained: an operation without a rule, or relevance that is not conserved."""


# Rules ---------------------------------------------------------------------------------------------------------------------------------

class _Link(torch.autograd.Function):
    """Joins a module's output to its inputs by a rule instead of by the module's own gradient, which is then never computed."""

    @staticmethod
    def forward(ctx, rule, module, output, *inputs):
        ctx.rule, ctx.module, ctx.shapes = rule, module, [x.shape for x in inputs]
        if rule.needs_inputs:
            ctx.save_for_backward(*inputs)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, relevance):
        return None, None, None, *ctx.rule.backward(ctx.module, ctx.saved_tensors or ctx.shapes, relevance)


class Rule(Hook):
    """How one module hands the relevance of its output to its inputs; a zennit hook.

    Unlike zennit's own hooks it leaves the module's gradient out (half of the work) and copies no input. `distribute` returns the
    relevance of each input and, for each film, the relevance that was dropped because its denominator is 0. With a `ledger` (a list),
    each pass appends (label, rule, relevance of the output, of the inputs, dropped, sum of absolute values), float64 (B,) each.
    """

    needs_inputs = True

    def __init__(self):
        super().__init__()
        self.label, self.ledger = "", None

    def copy(self):
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
            out, into, mass = _sums(relevance), sum(map(_sums, shares)), sum(_sums(share.abs()) for share in shares)
            self.ledger.append((self.label, type(self).__name__, out, into, dropped, mass + out.abs()))
        return shares

    def distribute(self, module, inputs, relevance) -> tuple[tuple[Tensor, ...], Tensor]:
        raise NotImplementedError


class PassOn(Rule):
    """ReLU, BatchNorm, Flatten: relevance stays where it is."""

    needs_inputs = False

    def distribute(self, module, inputs, relevance):
        return (relevance.reshape(inputs[0]),), _nothing(relevance)


class Split(Rule):
    """Concatenation: each input takes its own channels."""

    needs_inputs = False

    def distribute(self, module, inputs, relevance):
        return relevance.split([shape[module.dim] for shape in inputs], module.dim), _nothing(relevance)


class Winner(Rule):
    """Max pooling: all relevance of a window to its largest element (the first of equals)."""

    def distribute(self, module, inputs, relevance):
        parts = _leaves(inputs[0])
        return torch.autograd.grad(_total(module.forward, parts), parts, relevance), _nothing(relevance)


class Proportional(Rule):
    """Average pooling, means: R_i = x_i / sum(x) R_j over the window."""

    def distribute(self, module, inputs, relevance):
        parts = _leaves(inputs[0])
        total = _total(module.forward, parts)  # not module(x), which would run this hook again
        quotient, dropped = _divide(relevance, total.detach(), signed=True)
        return (_carry([total], parts, [quotient]),), dropped


class Addends(Rule):
    """Residual addition: R_a = a / (a + b) R, signed."""

    def distribute(self, module, inputs, relevance):
        if inputs[0].shape != inputs[1].shape:
            raise RelevanceError(f"{self.label} adds tensors of shapes {tuple(inputs[0].shape)} and {tuple(inputs[1].shape)}; "
                                 f"only equal shapes have a rule. Supported: {SUPPORTED}")
        quotient, dropped = _divide(relevance, inputs[0] + inputs[1], signed=True)
        return tuple(x * quotient for x in inputs), dropped


class _Weighted(Rule):
    """Rules of a convolution or linear layer; `scale` (channels out) multiplies its weights, for a BatchNorm merged into them."""

    def __init__(self, scale: Tensor | None = None):
        super().__init__()
        self.scale = scale

    def weight(self, module):
        layer = module.layer if isinstance(module, _Pooled) else module
        weight = layer.weight.detach()
        return weight if self.scale is None else weight * self.scale.reshape(-1, *[1] * (weight.ndim - 1))


class PositiveShare(_Weighted):
    """LRP alpha 1, beta 0: R_i = sum_j z+_ij / (sum_i z+_ij) R_j, z+ = x+ w+ + x- w- (Nam & Lee, eq. 2).

    Both signs of the input share one denominator; where no input is negative the second product is not computed.
    """

    def distribute(self, module, inputs, relevance):
        parts = _signs(inputs[0])
        total = _positive(module, parts, self.weight(module))
        quotient, dropped = _divide(relevance, total.detach())
        return (_carry([total], parts, [quotient]),), dropped


class BoxShare(_Weighted):
    """z^B rule of the layer that sees the film: R_i = sum_j (x w - l w+ - h w-)_ij / (sum_i of the same) R_j.

    Written as (x - l) w+ + (x - h) w-: no term is negative and nothing cancels. `bounds` are (low, high), numbers or tensors that
    broadcast to the film; None takes each film's own minimum and maximum over channels and pixels.
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
        return (_carry([total], parts, [quotient]),), dropped


class AbsoluteInfluence(_Weighted):
    """RAP's first step, at the layer that gives the logits (Nam & Lee, eq. 3 and 4): R_i = |c_i| / sum |c_i| R_k, c_i = x_i w_ik.

    The bias, shared out over the c_i of each sign in proportion, multiplies all of them by f(x)_k / sum(c), which cancels here.
    """

    def distribute(self, module, inputs, relevance):
        parts = _leaves(inputs[0])
        total = _total(_linear_map(module), parts, [self.weight(module)])
        influence = _carry([total], parts, [relevance]).abs()  # one logit of a film has relevance: its constant factor cancels
        quotient, dropped = _divide(_sums(relevance)[:, None], _sums(influence)[:, None])
        return (influence * _as_film(quotient, influence),), dropped


class RelativeShare(_Weighted):
    """RAP's later steps (Nam & Lee, eq. 5 and 6), where a and b are the sums of positive and of negative contributions (absolute).

    Eq. 5: Rbar_i = sum_j z+_ij / a_j R_j + |z-_ij| / b_j (R_j b_j / (a_j + b_j)), computed without dividing by b. Eq. 6 takes from every
    neuron with relevance the same amount, (sum_i Rbar_i - sum_j R_j) / (their number in the film), so that the sum is kept exactly.
    With ``authors=True`` negative R_j go through the negative weights twice, as in the authors' convolution: |z-| / b + |z-| / (a + b).
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
        spread = _carry([positive, negative], parts, [_divide(through_a, a)[0], through_b])
        idle = spread == 0
        surplus, count = _sums(spread) - _sums(relevance), spread[0].numel() - idle.flatten(1).sum(1, dtype=torch.int32)
        shift = torch.where(count > 0, surplus / count.clamp(min=1), 0)
        return ((spread - _as_film(shift, spread)).masked_fill_(idle, 0),), torch.where(count > 0, 0, _sums(relevance))


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


def _carry(totals, parts, quotients):
    """Quotients of the outputs back to the input: sum over the parts x of x times the transposed maps of the quotients."""
    gradients = torch.autograd.grad(totals, parts, quotients)
    return reduce(torch.add, (x.detach() * gradient for x, gradient in zip(parts, gradients, strict=True)))


def _divide(relevance, denominator, signed=False):
    """Quotient, 0 where the denominator is 0, and for each film the relevance lost there; subnormal counts as 0, it would overflow."""
    quotient, size, tiny = relevance / denominator, denominator.abs() if signed else denominator, torch.finfo(denominator.dtype).tiny
    if size.amin() >= tiny:
        return quotient, _nothing(relevance)
    dead = size < tiny
    return quotient.masked_fill_(dead, 0), _sums(relevance * dead)


def _linear_map(module):
    """The module as a function of input and weight, without its bias."""
    if isinstance(module, _Pooled):
        inner = _linear_map(module.layer)
        return lambda x, weight: module.pool(inner(x, weight))
    if isinstance(module, nn.Linear):
        return F.linear
    return lambda x, weight: F.conv2d(x, weight, None, module.stride, module.padding, module.dilation, module.groups)


def _sums(values):
    return values.flatten(1).sum(1).double()


def _nothing(relevance):
    return relevance.new_zeros(len(relevance), dtype=torch.float64)


def _as_film(numbers, like):
    return numbers.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


# The model as a list of steps ------------------------------------------------------------------------------------------------------------

class _Add(nn.Module):
    def forward(self, a, b):
        return a + b


class _Cat(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, *tensors):
        return torch.cat(tensors, self.dim)


class _Mean(nn.Module):
    def __init__(self, dim, keepdim):
        super().__init__()
        self.dim, self.keepdim = dim, keepdim

    def forward(self, x):
        return x.mean(self.dim, self.keepdim)


class _Pooled(nn.Module):
    """A 1 x 1 convolution and the average pooling behind it as one linear map (DenseNet's transitions).

    Apart, the pooling would divide by sums of signed values near 0. Every input reaches an output by one path only, so the positive part
    of the joint weights is the pooling of the positive part of the convolution's.
    """

    def __init__(self, layer, pool):
        super().__init__()
        self.layer, self.pool = layer, pool

    def forward(self, x):
        return self.pool(self.layer(x))


class _Steps(nn.Module):
    """Modules in order; step k reads the values `sources[k]`, of which 0 is the films and k + 1 the output of step k."""

    def __init__(self, labels, modules, sources):
        super().__init__()
        self.labels, self.sources = labels, sources
        self.steps = nn.ModuleList(modules)

    def readers(self, value):
        return [k for k, sources in enumerate(self.sources) if value in sources]

    def forward(self, films):
        values, left = {0: films}, Counter(source for sources in self.sources for source in sources)
        for k, module in enumerate(self.steps):
            values[k + 1] = module(*(values[source] for source in self.sources[k]))
            for source in self.sources[k]:
                left[source] -= 1
                if not left[source]:
                    del values[source]
        return values[len(self.steps)]


MAPS, POOLS, NORMS = (nn.Conv2d, nn.Linear), (nn.AvgPool2d, nn.AdaptiveAvgPool2d), (nn.BatchNorm1d, nn.BatchNorm2d)
SKIPPED = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)
RULES = {**dict.fromkeys((nn.ReLU, nn.Flatten, *NORMS), PassOn), **dict.fromkeys((_Mean, *POOLS), Proportional), nn.MaxPool2d: Winner,
         _Add: Addends, _Cat: Split}


# Each returns the module that does the same and the values it reads; None: no module is needed, or no rule exists.
def _relu(x, inplace=False):
    return nn.ReLU(), [x]


def _dropout(x, p=0.5, training=False, inplace=False):
    return None, [x]


def _flatten(x, start_dim=0, end_dim=-1):
    return (nn.Flatten(1), [x]) if (start_dim, end_dim) == (1, -1) else None


def _mean(x, dim=None, keepdim=False):
    return (_Mean(tuple(dim), keepdim), [x]) if isinstance(dim, tuple | list) and tuple(dim) in ((2, 3), (-2, -1)) else None


def _add(a, b, alpha=1):
    return (_Add(), [a, b]) if isinstance(a, fx.Node) and isinstance(b, fx.Node) and alpha == 1 else None


def _cat(tensors, dim=0):
    return (_Cat(dim), list(tensors)) if dim in (1, -3) and isinstance(tensors, tuple | list) else None


def _max_pool(x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    return None if return_indices else (nn.MaxPool2d(kernel_size, stride, padding, dilation, ceil_mode=ceil_mode), [x])


FUNCTIONS = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), _relu),
    **dict.fromkeys((F.dropout, F.dropout2d), _dropout),
    **dict.fromkeys((torch.flatten, "flatten"), _flatten),
    **dict.fromkeys((torch.mean, "mean"), _mean),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), _add),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _cat),
    F.max_pool2d: _max_pool,
    F.avg_pool2d: lambda x, *args, **kwargs: (nn.AvgPool2d(*args, **kwargs), [x]),
    F.adaptive_avg_pool2d: lambda x, output_size: (nn.AdaptiveAvgPool2d(output_size), [x]),
}


def _follow(model):
    """The model's forward as `_Steps`, which share its weights and nothing else; its operations without a rule are refused by name."""
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # forward may do anything with the placeholder it is traced with
        raise RelevanceError(f"the forward of {type(model).__name__} cannot be followed, because it depends on the films' values or shapes "
                             f"or calls what torch.fx does not know ({type(error).__name__}: {error}). Supported: {SUPPORTED}") from error
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    value_of, labels, modules, sources, refused = {}, [], [], [], []
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.users:
                value_of[node] = 0
            continue
        if node.op == "output":
            break
        label, found = _translate(model, node)
        if found is None or set(found[1]) != set(node.all_input_nodes):
            refused.append(label)
            value_of[node] = -1
            continue
        module, read = found
        read = [value_of[source] for source in read]
        if module is None:
            value_of[node] = read[0]
            continue
        labels.append(label)
        modules.append(module)
        sources.append(read)
        value_of[node] = len(modules)
    if refused:
        shown = list(dict.fromkeys(refused))
        raise RelevanceError(f"no relevance rule for {'; '.join(shown[:5])}{f' and {len(shown) - 5} more' if len(shown) > 5 else ''}. "
                             f"Supported: {SUPPORTED}. A sigmoid or softmax at the end must go: relevance starts at the logit")
    result = node.args[0]
    films = [value for source, value in value_of.items() if source.op == "placeholder"]
    if not isinstance(result, fx.Node) or value_of[result] != len(modules) or len(films) != 1 or not modules:
        raise RelevanceError(f"{type(model).__name__} must map one tensor of films to one tensor of logits")
    for name, times in Counter(labels).items():
        if times > 1:
            for use, k in enumerate([k for k, label in enumerate(labels) if label == name], 1):
                labels[k] = f"{name} (use {use})"
    return _fuse_pools(_Steps(labels, modules, sources))


def _translate(model, node):
    """Name of a traced operation, and (module, values it reads), or None where it has no rule."""
    if node.op == "call_module":
        module = model.get_submodule(node.target)
        label, kind = node.target, type(module)  # exact: a subclass may compute something else
        if len(node.args) == 1 and not node.kwargs:
            if kind in SKIPPED:
                return label, (None, list(node.args))
            plain = ((kind not in NORMS or module.running_mean is not None)
                     and (kind is not nn.Conv2d or module.padding_mode == "zeros")
                     and (kind is not nn.MaxPool2d or not module.return_indices)
                     and (kind is not nn.Flatten or (module.start_dim, module.end_dim) == (1, -1)))
            if plain and (kind in MAPS or kind in RULES):
                return label, (_twin(module), list(node.args))
        return f"{kind.__name__} ({label})", None
    within = list(node.meta.get("nn_module_stack", {}))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    where = f"{within[-1]}.{node.name}" if within else node.name
    if node.op in ("call_function", "call_method") and node.target in FUNCTIONS:
        try:
            return where, FUNCTIONS[node.target](*node.args, **node.kwargs)
        except TypeError:
            pass  # an argument that the rule does not know: refused below
    return f"{name} ({where})", None


def _twin(module):
    """A module of its own in evaluation mode, on the same weights: without the user's hooks, in-place flag and gradients."""
    twin = type(module).__new__(type(module))
    nn.Module.__init__(twin)
    for name, value in vars(module).items():
        if not name.startswith("_"):
            setattr(twin, name, value)
    for name, tensor in module._parameters.items():
        twin.register_parameter(name, None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False))
    for name, tensor in module._buffers.items():
        twin.register_buffer(name, tensor)
    if hasattr(twin, "inplace"):
        twin.inplace = False
    return twin.eval()


def _fuse_pools(steps):
    labels, modules, sources, now_at = [], [], [], {0: 0}
    for k, module in enumerate(steps.steps):
        before = steps.sources[k][0] - 1
        if type(module) in (_Mean, *POOLS) and before >= 0 and _is_pointwise(steps.steps[before]) and steps.readers(before + 1) == [k]:
            at = now_at[before + 1] - 1
            labels[at], modules[at] = f"{labels[at]} + {steps.labels[k]}", _Pooled(modules[at], module)
            now_at[k + 1] = at + 1
            continue
        labels.append(steps.labels[k])
        modules.append(module)
        sources.append([now_at[source] for source in steps.sources[k]])
        now_at[k + 1] = len(modules)
    return _Steps(labels, modules, sources)


def _is_pointwise(module):
    return (type(module) is nn.Conv2d and set(module.kernel_size) == set(module.stride) == {1}
            and (module.padding in ("same", "valid") or set(module.padding) == {0}))


def _rules(steps, method, first_layer, batchnorm, negative):
    """The rule of every step."""
    top = len(steps.steps) - 1
    while RULES.get(type(steps.steps[top])) is PassOn and steps.sources[top] != [0]:
        top = steps.sources[top][0] - 1
    if method == "rap" and type(steps.steps[top]) not in (*MAPS, _Pooled):
        raise RelevanceError(f"RAP starts at the linear layer that gives the logits, but {steps.labels[top]} gives them")
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
            rules.append(BoxShare(None if first_layer == "zb" else first_layer, scale))
        elif steps.sources[k] == [0] or method == "lrp":
            rules.append(PositiveShare(scale))
        else:
            rules.append(RelativeShare(negative == "authors_conv" and kind is not nn.Linear, scale))
    for label, rule in zip(steps.labels, rules, strict=True):
        rule.label = label
    return rules


# The two public functions ----------------------------------------------------------------------------------------------------------------

def heatmaps(model: nn.Module, films: Tensor, classes: Tensor, method: str = "lrp", *, init: str = "one", first_layer: str | tuple = "zb",
             batchnorm: str = "identity", negative: str = "paper", check: bool = True) -> Tensor:
    """Relevance of every pixel of every film for one logit of each film.

    Parameters
    ----------
    model : nn.Module
        Maps films (B, Cin, H, W) to logits (B, M). It is evaluated with its evaluation-mode behaviour and left as it was.
    films : float (B, Cin, H, W)
        float32 or float64 as the model, on its device. A film that is wanted for two logits is given twice.
    classes : integer (B,)
        Index of the logit of each film, 0..M-1.
    method : {'lrp', 'rap'}
        LRP alpha 1, beta 0 (Nam & Lee, eq. 2) or relative attributing propagation (eq. 3 to 6).
    init : {'one', 'logit'}
        Relevance of the logit: 1, so that a negative logit does not turn the signs of the map, or the logit itself.
    first_layer : {'zb', 'alpha1beta0'} or (low, high)
        Rule of the layer that sees the films: z^B with each film's own minimum and maximum, or with these bounds (numbers, or tensors
        such as (1, Cin, 1, 1)); or alpha 1, beta 0.
    batchnorm : {'identity', 'merge'}
        BatchNorm passes relevance on and the convolution keeps its raw weights (as Nam & Lee's code does), or a BatchNorm that directly
        follows a convolution is multiplied into its weights.
    negative : {'paper', 'authors_conv'}
        RAP's negative relevance at hidden convolutions: as eq. 5, or twice through the negative weights, as in the authors' code.
    check : bool
        Verify for the first film that the model was followed rightly (its logits agree), and for every film and layer that relevance is
        conserved up to rounding, apart from what meets the denominator 0.

    Returns
    -------
    float (B, H, W), signed, summed over the input channels, in the precision of `films`, on their device, detached.

    Raises
    ------
    RelevanceError
        An operation without a rule, by name; or relevance that is not conserved: the first such layer and its ratio.
    ValueError
        Unknown option, shapes or classes that do not fit, NaN in the films, films outside of the fixed bounds.
    """
    return _explain(model, films, classes, method, init, first_layer, batchnorm, negative, check)[0]


def conservation(model: nn.Module, films: Tensor, classes: Tensor, method: str = "lrp", *, init: str = "logit", **options) -> pd.DataFrame:
    """Sums of relevance at every layer, in the order in which relevance passes, without refusing anything but operations without a rule.

    Parameters
    ----------
    model, films, classes, method, init, **options
        As for `heatmaps`.

    Returns
    -------
    DataFrame
        One row for each film and layer: `film` (position in the batch), `layer`, `rule`, `relevance_out` (of the layer's output),
        `relevance_in` (of its inputs), `dropped` (met the denominator 0), `ratio` relevance_in / relevance_out (NaN for 0). ReLU, BatchNorm and Flatten
        hand relevance over unchanged and have no row. The last layer, '(whole model)', has the logit's relevance as output and the heatmap's sum as input.
    """
    relevance, start, ledger = _explain(model, films, classes, method, init, check=False, keep=True, **options)
    total = ("(whole model)", "", start, _sums(relevance), sum(entry[4] for entry in ledger), None)
    parts = []
    for label, rule, out, into, dropped, _ in [*ledger, total]:
        parts.append(pd.DataFrame({"film": range(len(films)), "layer": label, "rule": rule, "relevance_out": out.cpu().numpy(),
                                   "relevance_in": into.cpu().numpy(), "dropped": dropped.cpu().numpy()}))
    frame = pd.concat(parts, ignore_index=True)
    return frame.assign(ratio=(frame.relevance_in / frame.relevance_out).where(frame.relevance_out != 0))


def _explain(model, films, classes, method, init="one", first_layer="zb", batchnorm="identity", negative="paper", check=True, keep=False):
    classes = torch.as_tensor(classes, device=films.device)
    _check_arguments(films, classes, method, init, first_layer, batchnorm, negative)
    if isinstance(first_layer, tuple):
        first_layer = tuple(torch.as_tensor(bound, dtype=films.dtype, device=films.device) for bound in first_layer)
        if (films < first_layer[0]).any() or (films > first_layer[1]).any():
            raise ValueError("first_layer: the films reach beyond the bounds (low, high)")
    # Whatever mode the caller is in. TF32, cuDNN's default, keeps 10 bits, too few for sums to be conserved.
    with (torch.inference_mode(False), torch.enable_grad(), torch.autocast(films.device.type, enabled=False),
          torch.backends.cudnn.flags(enabled=True, allow_tf32=False)):
        inputs = films.detach().clone().requires_grad_()
        with _evaluating(model):
            steps = _follow(model)
            if any(weight.dtype != films.dtype for weight in steps.parameters()):
                raise ValueError(f"films are {films.dtype}, but the model's weights are {next(steps.parameters()).dtype}")
            with torch.no_grad():
                expected = model(inputs[:1]) if check else None
        rules, ledger = _rules(steps, method, first_layer, batchnorm, negative), []
        for rule in rules:  # PassOn hands over what it gets: nothing to check
            rule.ledger = ledger if (check or keep) and not isinstance(rule, PassOn) else None
        by_name = {f"steps.{k}": rule for k, rule in enumerate(rules)}
        with Composite(module_map=lambda context, name, module: by_name.get(name)).context(steps):
            logits = steps(inputs)
            if logits.ndim != 2 or not (0 <= int(classes.min()) and int(classes.max()) < logits.shape[1]):
                raise ValueError(f"classes {int(classes.min())}..{int(classes.max())} do not fit logits of shape {tuple(logits.shape)}")
            start = torch.zeros_like(logits).scatter_(1, classes.long()[:, None], 1.0)
            if init == "logit":
                start = start * logits.detach()
            relevance, = torch.autograd.grad(logits, inputs, start)
    if check:
        _check_conservation(model, logits, expected, start, relevance, ledger)
    heatmap = relevance.sum(1)
    if not keep and not torch.isfinite(heatmap).all():
        film = int(torch.nonzero(~torch.isfinite(heatmap))[0, 0])
        raise RelevanceError(f"the relevance of film {film} is not finite; conservation(...) shows the layer")
    return heatmap, _sums(start), ledger


def _check_arguments(films, classes, method, init, first_layer, batchnorm, negative):
    for name, value, known in (("method", method, METHODS), ("init", init, ("one", "logit")),
                               ("batchnorm", batchnorm, ("identity", "merge")), ("negative", negative, ("paper", "authors_conv"))):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(known)}")
    if first_layer not in ("zb", "alpha1beta0") if isinstance(first_layer, str) else not (isinstance(first_layer, tuple) and len(first_layer) == 2):
        raise ValueError(f"first_layer must be 'zb', 'alpha1beta0' or a pair (low, high), got {first_layer!r}")
    if films.ndim != 4 or films.dtype not in (torch.float32, torch.float64) or not len(films):
        raise ValueError(f"films must be float32 or float64 (B, Cin, H, W), got {films.dtype} {tuple(films.shape)}")
    if classes.shape != films.shape[:1] or classes.is_floating_point() or classes.dtype == torch.bool:
        raise ValueError(f"classes must be one integer for each of the {len(films)} films, got {classes.dtype} {tuple(classes.shape)}")
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
    """Sums may differ by rounding only, which is judged against the sum of absolute relevance, not against the sum itself."""
    if not torch.isfinite(logits).all():
        raise RelevanceError(f"film {int(torch.nonzero(~torch.isfinite(logits))[0, 0])} has a logit that is not finite")
    if (logits[:1] - expected).abs().max() > 1e-4 * expected.abs().max():
        raise RelevanceError(f"{type(model).__name__} followed step by step gives other logits than the model (an in-place change that is read "
                             f"later, or a hook that changes values?). Supported: {SUPPORTED}")
    tolerance = 1e-5 if relevance.dtype == torch.float32 else 1e-10
    out, into, dropped, mass = (torch.stack([entry[column] for entry in ledger]) for column in (2, 3, 4, 5))
    whole = (_sums(start), _sums(relevance), dropped.sum(0), mass.max(0).values)
    out, into, dropped, mass = (torch.cat([layers, last[None]]) for layers, last in zip((out, into, dropped, mass), whole, strict=True))
    broken = ~((out - into - dropped).abs() <= tolerance * mass)  # NaN is broken too
    if broken.any():
        layer, film = torch.nonzero(broken)[0].tolist()
        label = [*(entry[0] for entry in ledger), "the whole model"][layer]
        raise RelevanceError(
            f"relevance is not conserved at {label}: film {film} has {float(out[layer, film]):.6g} at its output, "
            f"{float(into[layer, film]):.6g} at its input and {float(dropped[layer, film]):.6g} dropped, ratio "
            f"{float(into[layer, film] / out[layer, film]):.6g}. Nothing is returned. Supported: {SUPPORTED}")
