"""torchvision as it is needed here: without torch's compiler, a quarter of what a notebook loads before its first cell.

As it is imported, `torchvision.ops` asks `torch._dynamo`, which is that compiler, whether it can serve certain
detection operators. No model here has them, so the answer is no; torch loads the compiler where something needs it (its
optimizers do).
"""

import sys
from contextlib import suppress
from types import ModuleType

import torch  # noqa: F401  else the stand-in would be what torch finds

COMPILER = ("torch._dynamo", "torch._dynamo.utils")

if not sys.modules.keys() & {"torchvision", *COMPILER}:
    for name in COMPILER:
        sys.modules[name] = ModuleType(name)
    sys.modules["torch._dynamo.utils"].is_compile_supported = lambda device: False
    try:
        with suppress(ImportError):  # a torchvision that asks more is imported as ever, by whoever needs it
            import torchvision  # noqa: F401
    finally:
        for name in COMPILER:
            del sys.modules[name]
