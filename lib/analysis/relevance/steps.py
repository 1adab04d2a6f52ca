"""A model as a list of steps, one module for each operation, on which relevance rules can sit.

The forward is traced with torch.fx; what it writes as functions (F.relu, +, torch.cat, mean) becomes modules too. An
operation that has no rule is refused by name. The steps share the model's weights, not its hooks or in-place flags: the
model is left as it was.
"""

import operator
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lib.analysis.relevance.rules import SUPPORTED, Concat, Norm, Pass, Pooled, RelevanceError, WinnerTakeAll


class Add(nn.Module):
    """A residual sum."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
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


class Steps(nn.Module):
    """Modules in order; step k reads the values `sources[k]`, of which 0 is the films and k + 1 the output of step
    k."""

    def __init__(self, labels: list[str], modules: list[nn.Module], sources: list[list[int]]):
        super().__init__()
        self.labels, self.sources = labels, sources
        self.steps = nn.ModuleList(modules)

    def readers(self, value: int) -> list[int]:
        """The steps that read a value."""
        return [k for k, sources in enumerate(self.sources) if value in sources]

    def forward(self, films: Tensor) -> Tensor:
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
RULES = {
    **dict.fromkeys((nn.ReLU, nn.Flatten, *NORMS), Pass),
    **dict.fromkeys((Add, _Mean, *POOLS), Norm),
    nn.MaxPool2d: WinnerTakeAll,
    _Cat: Concat,
}


# Each returns the module that does the same and the values it reads; None: no module is needed, or no rule exists.
def _relu(x, inplace=False):
    return nn.ReLU(), [x]


def _dropout(x, p=0.5, training=False, inplace=False):
    return None, [x]


def _flatten(x, start_dim=0, end_dim=-1):
    return (nn.Flatten(1), [x]) if (start_dim, end_dim) == (1, -1) else None


def _mean(x, dim=None, keepdim=False):
    dim = tuple(dim) if isinstance(dim, tuple | list) else dim
    return (_Mean(dim, keepdim), [x]) if dim in ((2, 3), (-2, -1)) else None


def _add(a, b, alpha=1):
    return (Add(), [a, b]) if isinstance(a, fx.Node) and isinstance(b, fx.Node) and alpha == 1 else None


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


def follow(model: nn.Module) -> Steps:
    """The model's forward as `Steps`, which share its weights and nothing else.

    Raises
    ------
    RelevanceError
        Operations without a rule, by name, or a forward that torch.fx cannot follow.
    """
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # forward may do anything with the placeholder it is traced with
        raise RelevanceError(
            f"the forward of {type(model).__name__} cannot be followed, because it depends on the films' values or "
            f"shapes or calls what torch.fx does not know ({type(error).__name__}: {error}). Supported: {SUPPORTED}"
        ) from error
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    *nodes, output = graph.nodes
    value_of, steps, refused = {}, [], []
    for node in nodes:
        if node.op == "placeholder":
            value_of |= {node: 0} if node.users else {}
            continue
        label, found = _translate(model, node)
        if found is None or set(found[1]) != set(node.all_input_nodes):
            refused.append(label)
            value_of[node] = -1
            continue
        module, read = found[0], [value_of[source] for source in found[1]]
        if module is not None:
            steps.append((label, module, read))
        value_of[node] = read[0] if module is None else len(steps)
    if refused:
        shown = list(dict.fromkeys(refused))
        more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
        raise RelevanceError(
            f"no relevance rule for {'; '.join(shown[:5])}{more}. Supported: {SUPPORTED}. A sigmoid or softmax at the "
            "end must go: relevance starts at the logit"
        )
    result = output.args[0]
    films = [value for source, value in value_of.items() if source.op == "placeholder"]
    if not isinstance(result, fx.Node) or value_of[result] != len(steps) or len(films) != 1 or not steps:
        raise RelevanceError(f"{type(model).__name__} must map one tensor of films to one tensor of logits")
    labels, modules, sources = map(list, zip(*steps, strict=True))
    uses = [(label, labels[: k + 1].count(label), labels.count(label)) for k, label in enumerate(labels)]
    labels = [f"{label} (use {use})" if times > 1 else label for label, use, times in uses]
    return _fuse_pools(Steps(labels, modules, sources))


def _translate(model, node):
    """Name of a traced operation, and (module, values it reads), or None where it has no rule."""
    if node.op == "call_module":
        module = model.get_submodule(node.target)
        label, kind = node.target, type(module)  # exact: a subclass may compute something else
        if len(node.args) == 1 and not node.kwargs:
            if kind in SKIPPED:
                return label, (None, list(node.args))
            plain = (
                (kind not in NORMS or module.running_mean is not None)
                and (kind is not nn.Conv2d or module.padding_mode == "zeros")
                and (kind is not nn.MaxPool2d or not module.return_indices)
                and (kind is not nn.Flatten or (module.start_dim, module.end_dim) == (1, -1))
            )
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
    """A module of its own in evaluation mode, on the same weights: without the user's hooks, in-place flag and
    gradients."""
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
        alone = before >= 0 and steps.readers(before + 1) == [k]
        if type(module) in (_Mean, *POOLS) and alone and _is_pointwise(steps.steps[before]):
            at = now_at[before + 1] - 1
            labels[at], modules[at] = f"{labels[at]} + {steps.labels[k]}", Pooled(modules[at], module)
            now_at[k + 1] = at + 1
            continue
        labels.append(steps.labels[k])
        modules.append(module)
        sources.append([now_at[source] for source in steps.sources[k]])
        now_at[k + 1] = len(modules)
    return Steps(labels, modules, sources)


def _is_pointwise(module):
    if type(module) is not nn.Conv2d or not set(module.kernel_size) == set(module.stride) == {1}:
        return False
    return module.padding in ("same", "valid") or set(module.padding) == {0}
