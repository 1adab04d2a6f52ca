"""Which device a process computes on."""

import functools
import itertools
import os
import platform
import tempfile
from pathlib import Path

import torch

from lib.locks import try_lock


class DeviceError(RuntimeError):
    """A device that was asked for and is not there; the message says what to set."""


def choose_device(name: str = "auto", local_rank: int | None = None) -> torch.device:
    """The torch device that a parameter names.

    Parameters
    ----------
    name : str
        'auto' (a GPU where there is one, else the CPU), 'cpu', 'mps', 'cuda' or, for a certain GPU, 'cuda:1'. Of
        several GPUs, 'auto' and 'cuda' take the one that the fewest other processes hold: see `hold_gpus`.
    local_rank : int, optional
        Of a process that torchrun started: it takes the GPU of this number.

    Raises
    ------
    DeviceError
        No GPU where one is named.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise DeviceError(f"device {name!r} was asked for, and torch sees no GPU: set device to auto or cpu")
    if name == "cuda":
        name = f"cuda:{hold_gpus(1)[0] if local_rank is None else local_rank}"
    if name == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device 'mps' was asked for, and torch sees no such GPU: set device to auto or cpu")
    device = torch.device(name)
    if device.type == "cuda":
        n = torch.cuda.device_count()
        if device.index >= n:
            raise DeviceError(
                f"device {name!r} was asked for, and torch sees {n} GPUs: set device to auto, cuda, or one of these, "
                "and gpus to at most their number"
            )
        torch.cuda.set_device(device)
    return device


@functools.cache
def hold_gpus(n: int) -> list[int]:
    """Take the `n` GPUs that the fewest processes of this user hold, and hold them until this process ends.

    A GPU has a lock for its first holder, one for its second, and so on: processes spread evenly, and share only where
    all are taken.

    Returns
    -------
    list of int
        Their numbers, as torch counts them.

    Raises
    ------
    DeviceError
        There are fewer than `n`, or the locks cannot be written.
    """
    names = gpu_names()
    if n > len(names):
        raise DeviceError(f"gpus is {n}, and torch sees {len(names)}: set gpus to at most that")
    try:
        folder = Path(tempfile.gettempdir()) / f"chest-xray-imbalance-{os.getuid()}"
        folder.mkdir(exist_ok=True)
        held = []
        for holder in itertools.count():
            for index, name in enumerate(names):
                lock = folder / f"gpu-{name.replace('/', '_')}-{holder}.lock"  # a part of a GPU may be MIG-GPU-…/1/0
                if index not in held and try_lock(lock) is not None:
                    held.append(index)
                    if len(held) == n:
                        return held
    except OSError as error:
        raise DeviceError(
            f"processes share GPUs out by locks, and {error.filename or 'their folder'} cannot be written "
            f"({error.strerror}): make way for it, or name another folder by the environment variable TMPDIR"
        ) from error


def gpu_names() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that torch sees, in torch's order."""
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    n = torch.cuda.device_count()
    return names[:n] if names else [str(index) for index in range(n)]


def device_name(device: torch.device) -> str:
    """What the device is, for the record."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return str(device)


def uses_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether training runs under bfloat16 autocast, where `precision` is 'bfloat16', 'float32' or 'auto': yes only
    where the hardware has units for it."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("amx_bf16", False))
