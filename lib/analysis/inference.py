"""One forward pass over the films serves every lens: logits and the feature maps of any layers, batch by batch."""

from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn


class LensError(ValueError):
    """A lens cannot look where it is asked to; the message names the layer, class or film and the way out."""


@dataclass(frozen=True)
class Output:
    """Of one batch: `rows` int64 (B,), `logits` float32 (B, M) and `maps`, a dictionary of layer name to float32 (B, F,
    h, w)."""

    rows: np.ndarray
    logits: torch.Tensor
    maps: dict


@contextmanager
def recorded(model, layers):
    """Within the context every forward pass of `model` leaves the outputs of `layers` in the dictionary that is
    yielded.

    Parameters
    ----------
    model : nn.Module
    layers : sequence of str
        Dotted module names, such as 'trunk.layer4.2'.

    Raises
    ------
    ValueError
        A name that is no module of the model; the modules one level up are listed.
    """
    modules = {name: named_module(model, name) for name in layers}
    maps, handles = {}, []

    def record(name, output):
        check_is_tensor(output, name)
        # A clone: a ReLU that follows may work in place and would rewrite the maps after the hook has seen them.
        maps[name] = output.detach().clone()

    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(lambda module, inputs, output, name=name: record(name, output)))
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def named_module(model, name):
    """The module `name` of the model. ValueError where there is none, with the modules one level up."""
    modules = dict(model.named_modules())
    if name not in modules:
        parent = name.rpartition(".")[0]
        known = [other for other in modules if other and other.rpartition(".")[0] == parent] or list(
            dict(model.named_children())
        )
        raise LensError(f"the model has no module {name!r}; there are {', '.join(known)}")
    return modules[name]


def check_is_tensor(output, layer):
    """ValueError where a layer gives something else than one tensor, such as the tuple of an attention layer."""
    if not isinstance(output, torch.Tensor):
        raise LensError(
            f"layer {layer} gives a {type(output).__name__}, not a tensor of maps: name a module inside or after it"
        )


def stream(model, batches, layers=(), token_grid=()):
    """Forward passes of `model` over `batches`, in evaluation mode, float32, without gradients.

    Parameters
    ----------
    model : nn.Module
        Gives logits (B, M); it is put in evaluation mode and left there.
    batches : iterable
        With fields `rows` (B,) and `images` (B, 3, S, S), on the model's device.
    layers : sequence of str
        Modules whose output maps are wanted.
    token_grid : (rows, columns), optional
        How the tokens (B, T, D) of a transformer lie on the film, see `as_maps`; then all `layers` must give tokens.

    Yields
    ------
    Output
        On the model's device. Only one batch of maps is alive at a time, if the caller lets go of it.
    """
    model.eval()
    with recorded(model, layers) as maps:
        for batch in batches:
            # Left before the yield: both would hold for the caller's code between batches too. TF32, cuDNN's default,
            # keeps 10 bits.
            with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                logits = model(batch.images).float()
                unseen = [name for name in layers if name not in maps]
                if unseen:
                    raise LensError(
                        f"layer {unseen[0]} did not run in the forward pass, so it has no maps: name another module"
                    )
                output = Output(
                    batch.rows, logits, {name: as_maps(maps[name], name, token_grid).float() for name in layers}
                )
            yield output


def layer_maps(output: Output, layer: str) -> torch.Tensor:
    """The maps of `layer` in `output`; ValueError where they were not asked for."""
    if layer not in output.maps:
        raise LensError(
            f"the outputs hold no maps of {layer!r}; there are {', '.join(output.maps) or 'none'}: ask `stream` for "
            "this layer"
        )
    return output.maps[layer]


def as_maps(output, layer, token_grid=()):
    """The output of a layer, or a gradient there, as maps (B, F, h, w): unchanged, or tokens laid out on a grid.

    Parameters
    ----------
    output : float (B, F, h, w) or (B, T, D)
    layer : str
        Its name, for the messages.
    token_grid : (rows, columns), optional
        The tokens (B, T, D), row by row, become maps (B, D, rows, columns). Where T is one more than rows x columns the
        first token, the class's, is left out. Empty or None for a layer that gives maps.

    Raises
    ------
    ValueError
        An output that is neither, tokens without a grid or on one that they do not fill, or a grid for what are maps
        already.
    """
    shape = tuple(output.shape)
    if output.ndim not in (3, 4):
        raise LensError(f"layer {layer} gives {shape}, neither maps (B, F, h, w) nor tokens (B, T, D)")
    if output.ndim == 4:
        if token_grid:
            raise LensError(f"layer {layer} gives maps {shape}: token_grid is for tokens (B, T, D)")
        return output
    if not token_grid or len(token_grid) != 2:
        raise LensError(
            f"layer {layer} gives tokens {shape}: say how they lie on the film with token_grid: [rows, columns], "
            "with rows x columns = "
            f"{shape[1]}, or {shape[1] - 1} if the first is a class token"
        )
    rows, columns = token_grid
    extra = shape[1] - rows * columns
    if extra not in (0, 1):
        raise LensError(
            f"layer {layer} gives {shape[1]} tokens: token_grid {rows} x {columns} takes {rows * columns}, or one "
            "more, the class's"
        )
    return output[:, extra:].transpose(1, 2).unflatten(2, (rows, columns))


def is_pooled(output, layer, head):
    """Whether the logits are the spatial means of the layer's maps through the linear `head`, up to rounding.

    Parameters
    ----------
    output : Output
        With the maps of `layer`.
    layer : str
    head : nn.Linear
        The model's; anything else is no such head.

    Returns
    -------
    bool
        Maps that hold NaN or infinite values count as pooled: they decide nothing, and what reads them names them.
    """
    maps = output.maps[layer]
    if (
        not isinstance(head, nn.Linear)
        or maps.shape[1] != head.in_features
        or output.logits.shape[1] != head.out_features
    ):
        return False
    weight = head.weight.detach().to(maps)
    # Bias included: if only the differences between films had to agree, a batch of one film would pass with any layer.
    bias = weight.new_zeros(head.out_features) if head.bias is None else head.bias.detach().to(maps)
    rounding = 1e-5 * (maps.abs().mean((2, 3)) @ weight.abs().T + bias.abs())
    return not ((output.logits - maps.mean((2, 3)) @ weight.T - bias).abs() > rounding).any()


def predict(model, batches):
    """Logits of all films, float32 array (N, M), in the order of `batches`."""
    return np.concatenate([output.logits.cpu().numpy() for output in stream(model, batches)])
