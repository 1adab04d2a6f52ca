"""What a notebook loads before its first cell: nothing heavy that it may never use."""

import subprocess
import sys

from lib.params import ROOT

# Each takes from a quarter of a second to one and a half.
HEAVY = ("torch._dynamo", "scipy.stats", "scipy.optimize", "numba", "sklearn", "sympy", "seaborn", "timm")


def said(program):
    options = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
    return subprocess.run([sys.executable, "-c", program], **options).stdout.split()


def test_a_notebook_begins_without_what_it_may_never_use():
    begin = "import sys, lib.runs; from lib import figures, records, tables; from lib.models import build_model; "
    models = "[build_model(name, 15, 'scratch', 0) for name in ('tdensenet', 'resnet50')]; "
    assert said(f"{begin}{models}print(*sys.modules.keys() & {set(HEAVY)})") == []


def test_torchs_compiler_is_there_when_it_is_asked_for():
    """The stand-in is gone: torch loads its own, and torchvision's operators work."""
    compiled = "torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item()"
    kept = "torchvision.ops.nms(torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1]]), torch.tensor([0.5, 0.9]), 0.5).item()"
    program = f"import lib.runs, torch, torchvision; print({compiled}, {kept}, torch._dynamo.utils.__file__ is None)"
    assert said(program) == ["2.0", "1", "False"]


def test_where_the_compiler_is_loaded_already_nothing_is_put_in_its_place():
    program = "import torch._dynamo as loaded, lib.runs, sys; print(sys.modules['torch._dynamo'] is loaded)"
    assert said(program) == ["True"]
