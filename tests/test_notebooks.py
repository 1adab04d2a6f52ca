import ast
import re
import statistics

import nbformat
import pytest

from lib.params import ROOT, Run, Study, load_study

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMED = {"study": "demo", "task": "multilabel", "backbone": "tdensenet", "loss": "focal", "seed": 0}
BASELINE = {**NAMED, "loss": "bce"}  # what 09 takes apart are changes against it
OF_STUDIES = {"00": "demo", "05": "demo", "08": "demo_rsna", "11": "dose"}
pytestmark = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def cells(path, kind=None):
    notebook = nbformat.read(path, as_version=4)
    return [cell for cell in notebook.cells if kind is None or cell.cell_type == kind]


def is_parameters(cell):
    return "parameters" in cell.metadata.get("tags", [])


def code(path):
    """Source of every code cell but the parameters, without magics."""
    sources = [cell.source for cell in cells(path, "code") if not is_parameters(cell)]
    return ["\n".join(line for line in source.splitlines() if not line.startswith("%")) for source in sources]


def trees(path):
    return [node for source in code(path) for node in ast.walk(ast.parse(source))]


def test_is_valid_and_runs_in_any_python_3_kernel(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"


def test_parameters_are_the_run_and_what_this_notebook_reads(path):
    """What names the run has a value; every other key is None, as the study's file says, with its meaning beside it."""
    (cell,) = [cell for cell in cells(path) if is_parameters(cell)]
    lines = cell.source.splitlines()
    of_run = BASELINE if path.stem.startswith("09") else NAMED
    named = {"study": OF_STUDIES[path.stem[:2]]} if path.stem[:2] in OF_STUDIES else of_run
    assert len(lines) <= 15
    for line, node in zip(lines, ast.parse(cell.source).body, strict=True):
        key = node.targets[0].id
        assert ast.literal_eval(node.value) == named.get(key), line
        assert line.split("  # ")[1] == Run.model_fields[key].description and line.count("=") == 1
    keys = [line.split(" = ")[0] for line in lines]
    assert keys[: len(named)] == list(named)
    if "subject = open_run" in code(path)[0] and path.stem[:2] != "01":
        used = "\n".join(code(path) + [(ROOT / "lib" / "runs.py").read_text()])
        assert not [key for key in keys[len(named) :] if not re.search(rf"\b{key}\b", used)], "a key that nothing reads"


def test_a_run_is_opened_through_the_one_door_and_shown(path):
    source = code(path)
    door = "open_study(globals())" if path.stem[:2] in OF_STUDIES else "open_run(globals()"
    assert is_parameters(cells(path, "code")[0]) and door in source[0] and len(source[0].splitlines()) == 4
    opened = source[0].splitlines()[2].split(" = ")[0]
    assert source[0].splitlines()[3] == opened
    assert not [
        node for node in trees(path) if isinstance(node, ast.Compare) and ast.unparse(node.left).endswith(".release")
    ]


def test_no_result_is_called_like_a_parameter(path):
    """In JupyterLab the first cells are run again with other parameters, and results must not pass for them."""
    keys = (Study if path.stem[:2] in OF_STUDIES else Run).model_fields
    nodes = trees(path)
    scoped = {id(name) for node in nodes if isinstance(node, ast.comprehension) for name in ast.walk(node.target)}
    stored = [node for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    assert not {node.id for node in stored if id(node) not in scoped} & keys.keys()


def test_holds_no_results(path):
    for cell in cells(path, "code"):
        assert not cell.outputs and cell.execution_count is None


def test_is_short_and_defines_nothing(path):
    assert 10 <= len(cells(path)) <= 40
    lines = [len(source.splitlines()) for source in code(path)]
    assert statistics.median(lines) <= 8 and max(lines) <= 15
    assert not [node for node in trees(path) if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda))]


def test_opens_with_a_title_and_closes_with_its_finding(path):
    assert cells(path)[0].source.startswith("# ")
    assert any(cell.source.startswith("## Finding") for cell in cells(path, "markdown"))


def test_one_that_stands_alone_is_soon_at_its_films(path):
    if path.stem.startswith("03"):
        lines = 0
        for cell in cells(path):
            lines += len(cell.source.splitlines())
            if "figures." in cell.source:
                break
        assert lines <= 40, "the first figure"
    if path.stem.startswith("07"):
        lines = [len(cell.source.splitlines()) for cell in cells(path, "code")]
        assert sum(lines) <= 120 and max(lines) <= 15 and max(lines[1:]) <= 12


def test_the_studies_of_the_parameters_exist(path):
    assert load_study(OF_STUDIES.get(path.stem[:2], NAMED["study"]))
