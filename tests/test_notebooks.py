import ast
import statistics

import nbformat
import pytest

from lib.params import ROOT, Run, Study, load, parameters_cell

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
pytestmark = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def cells(path, kind=None):
    notebook = nbformat.read(path, as_version=4)
    return [cell for cell in notebook.cells if kind is None or cell.cell_type == kind]


def is_parameters(cell):
    return "parameters" in cell.metadata.get("tags", [])


def test_is_valid_and_runs_in_any_python_3_kernel(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"


def test_parameters_cell_is_the_one_that_lib_params_prints(path):
    tagged = [cell for cell in cells(path) if is_parameters(cell)]
    assert len(tagged) == 1 and tagged[0].cell_type == "code"
    kind = {"00": "study", "05": "study", "08": "intention"}.get(path.stem[:2], "run")
    values = (
        load(ROOT / "params" / "studies" / "demo_rsna.yaml") if kind == "intention" else None
    )  # 08 runs as it stands, too
    expected = parameters_cell(Run if kind == "run" else Study, values)
    assert tagged[0].source == expected, f"paste the output of: python -m lib.params cell {kind}"


def test_parameters_are_checked_before_anything_else(path):
    code = cells(path, "code")
    model = "Study" if path.stem[:2] in ("00", "05", "08") else "Run"
    assert is_parameters(code[0]) and f"{model}.from_notebook(globals())" in code[1].source
    assert len(code[1].source.splitlines()) <= 4


def test_holds_no_results(path):
    for cell in cells(path, "code"):
        assert not cell.outputs and cell.execution_count is None


def test_is_short_and_defines_nothing(path):
    assert 10 <= len(cells(path)) <= 40
    code = [cell.source for cell in cells(path, "code") if not is_parameters(cell)]
    assert statistics.median(len(source.splitlines()) for source in code) <= 8
    for source in code:
        tree = ast.parse("\n".join(line for line in source.splitlines() if not line.startswith("%")))
        assert not [
            node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))
        ], source


def test_opens_with_a_title_and_closes_with_its_finding(path):
    assert cells(path)[0].source.startswith("# ")
    assert any(cell.source.startswith("## Finding") for cell in cells(path, "markdown"))
