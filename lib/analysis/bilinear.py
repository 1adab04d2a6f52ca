"""Bilinear enlargement within compiled loops, to the very float32 numbers of `cam.resize`, so that a loop may ask for
those pixels alone that it needs."""

from collections.abc import Callable

import numpy as np
from numba import njit, types
from numba.extending import intrinsic


def compiled(function: Callable) -> Callable:
    """Compile to machine code without the interpreter lock, cached on disk where some cache folder can be written."""
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba found no writable cache folder
        return njit(nogil=True)(function)


def taps(n: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Float32 weights of the lower and upper native cell of each output pixel, as torch rounds them, and where each
    cell's pixels start."""
    half = np.float32(0.5)
    source = (np.arange(size, dtype=np.float32) + half) * (np.float32(n) / np.float32(size)) - half
    source = np.maximum(source, np.float32(0)) if n != size else np.arange(size, dtype=np.float32)
    low = np.minimum(np.floor(source).astype(np.int64), n - 1)
    upper = np.clip(source - low.astype(np.float32), np.float32(0), np.float32(1))
    return (np.float32(1) - upper).astype(np.float32), upper, np.searchsorted(low, np.arange(n + 1))


@intrinsic
def fma(typing_context, a, b, c):
    """``a b + c`` rounded once, which is how torch's kernel is compiled."""

    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate
