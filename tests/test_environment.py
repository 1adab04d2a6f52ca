"""What is installed follows from one file, the rooms of `lib` keep apart, and what a first user types works."""

import ast
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import nbformat
import pytest
import yaml
from ipykernel.kernelapp import IPKernelApp
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from traitlets.config.loader import PyFileConfigLoader

from lib import params, runs
from lib.params import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ("3.11", "3.12", "3.13")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODULES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
    for path in sorted((ROOT / "lib").rglob("*.py"))
}


# ---- the environment


def direct_requirements():
    extras = PROJECT["optional-dependencies"]
    return [Requirement(text) for text in PROJECT["dependencies"] + extras["test"] + extras["slurm"]]


def locked():
    """Name -> list of (requirement, number of hashes) of requirements.lock; a name has several where Pythons need
    different versions."""
    text = "\n".join(
        line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.lstrip().startswith("#")
    )
    found = {}
    for entry in text.replace("\\\n", " ").splitlines():
        if entry.strip():
            requirement = Requirement(entry.split("--hash")[0].strip())
            found.setdefault(canonical(requirement.name), []).append(
                (requirement, len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", entry)))
            )
    return found


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("requirement", direct_requirements(), ids=str)
def test_the_lock_pins_every_dependency_within_its_range(requirement):
    pins = locked().get(canonical(requirement.name))
    assert pins, f"{requirement.name} is not in requirements.lock: run make lock"
    for python in PYTHONS:
        version = {"python_version": python, "python_full_version": f"{python}.0"}
        chosen = [pin for pin, _ in pins if pin.marker is None or pin.marker.evaluate(version)]
        assert len(chosen) == 1
        (exact,) = chosen[0].specifier
        assert exact.operator == "==" and Version(exact.version) in requirement.specifier


def test_the_lock_is_exact_hashed_and_names_no_address():
    for pin, hashes in (entry for entries in locked().values() for entry in entries):
        assert pin.url is None and [item.operator for item in pin.specifier] == ["=="] and hashes, pin.name
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"https?://|--(extra-)?index-url|--find-links|--trusted-host| @ ", text)


def test_environment_yml_follows():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == PROJECT["name"] and environment["channels"][0] == "conda-forge"
    python, pip, listed = environment["dependencies"]
    name, _, version = python.partition("=")
    assert name == "python" and Version(version) in SpecifierSet(PROJECT["requires-python"])
    assert Version(version) == min(Version(item.version) for item in SpecifierSet(PROJECT["requires-python"]))
    assert pip == "pip" and listed == {"pip": ["--require-hashes --requirement requirements.lock"]}


def test_every_package_is_found_for_installation():
    """A folder of modules without an __init__.py would not be installed, and work only from the project's folder."""
    include = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert include == ["lib", "lib.*"]
    folders = {path.parent for path in MODULES.values()}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


# ---- the rooms


@functools.cache
def tree(name):
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def imports(name):
    """Dotted names that a module imports; `from lib import records` counts as lib.records."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            found |= {
                module if (module := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names
            }
    return found


def calls(name):
    return [node for node in ast.walk(tree(name)) if isinstance(node, ast.Call)]


def dotted(node):
    return ast.unparse(node.func)


def room(prefix):
    return [name for name in MODULES if name.startswith(prefix)]


def outside(allowed, names):
    """(module, import) pairs within lib that are not in `allowed`."""
    return {
        (name, other)
        for name in names
        for other in imports(name)
        if other.startswith("lib") and not other.startswith(allowed)
    }


# From the ground up. A room imports only from the floors below it, and within itself: those side by side are strangers.
FLOORS = (
    ("lib.locks", "lib.losses", "lib.models", "lib.flat_yaml", "lib.light_torchvision"),
    ("lib.analysis", "lib.data", "lib.devices"),
    ("lib.params", "lib.tables"),
    ("lib.records", "lib.figures"),
    ("lib.state", "lib.workflow"),
    ("lib.runs", "lib.plan"),
    ("lib.training", "lib.preflight", "lib.laboratory", "lib.evidence", "lib.explorer"),
    ("lib.reference", "lib.report"),
)
WINGS = ("lib.analysis.dissection", "lib.analysis.features", "lib.analysis.relevance")


def within(name, rooms):
    """Those of `rooms` that a module is in: one, or none."""
    return tuple(room for room in rooms if name == room or name.startswith(f"{room}."))


@pytest.mark.parametrize("name", [name for name in MODULES if name != "lib"])
def test_no_import_goes_up_or_across(name):
    floors = [k for k, rooms in enumerate(FLOORS) if within(name, rooms)]
    assert len(floors) == 1, "say in FLOORS where it stands"
    below = tuple(room for rooms in FLOORS[: floors[0]] for room in rooms)
    assert not outside(below + within(name, FLOORS[floors[0]]), [name])


def test_no_wing_knows_another_and_what_they_share_knows_none():
    # One calibrates the instruments, the other sets their readings against controls: they may know each of them.
    above = {"lib.analysis.truth", "lib.analysis.lens_effects"}
    for name in room("lib.analysis"):
        foreign = [other for other in imports(name) if within(other, WINGS) not in ((), within(name, WINGS))]
        assert not foreign or name in above, (name, foreign)
        assert not above & set(imports(name))
    phantom = ("lib.data.phantom", "lib.data.release", "lib.data.writing", "lib.locks")
    assert not outside(phantom, room("lib.data.phantom"))


def test_the_data_room_knows_no_model():
    assert not outside(("lib.data", "lib.locks"), room("lib.data"))


def test_models_and_losses_know_no_data():
    assert not outside((), ["lib.models", "lib.losses"])


def test_only_runs_training_and_preflight_know_both():
    def knows(name, room):
        return any(within(other, (room,)) for other in imports(name))

    assert {name for name in MODULES if knows(name, "lib.data") and knows(name, "lib.models")} == {
        "lib.preflight",
        "lib.runs",
        "lib.training",
    }


def test_the_analysis_room_reads_and_writes_no_file():
    names = room("lib.analysis")
    assert not outside(("lib.analysis",), names)
    files = {"os", "pathlib", "shutil", "io", "glob", "json", "pickle", "csv", "yaml", "requests", "urllib"}
    assert not [(name, other) for name in names for other in imports(name) if other.split(".")[0] in files]
    # What does not fit in memory may spill to a file of `tempfile`, which has no name and goes with the process.
    functions = (
        r"^(open|np\.(save|savez|load|savetxt|loadtxt|memmap)|torch\.(save|load)|pd\.read_\w+|cv2\.im(read|write))$"
    )
    methods = r"\.(to_csv|to_parquet|to_pickle|savefig|write_text|write_bytes|read_text|read_bytes)$"
    assert not [
        (name, dotted(call))
        for name in names
        for call in calls(name)
        if re.search(f"{functions}|{methods}", dotted(call))
    ]


def test_nothing_in_lib_imports_training():
    assert not [name for name in MODULES if "lib.training" in imports(name)]


def test_imports_of_lib_make_no_circle():
    inner = {name: {other for other in imports(name) if other in MODULES and other != name} for name in MODULES}
    while inner:
        free = {name for name, needed in inner.items() if not needed & inner.keys()}
        assert free, f"these import each other: {sorted(inner)}"
        inner = {name: needed for name, needed in inner.items() if name not in free}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_is(name):
    assert ast.get_docstring(tree(name)) or not MODULES[name].read_text().strip()


# ---- what a first user types


README = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
PAPERMILL = re.findall(r"(?:^    |`)(papermill notebooks/[^`\n]+)", README, re.MULTILINE)


def test_every_notebook_has_its_line_in_the_readme():
    assert {shlex.split(line, comments=True)[1] for line in PAPERMILL} == {
        f"notebooks/{path.name}" for path in NOTEBOOKS
    }


@pytest.mark.parametrize("line", PAPERMILL)
def test_a_papermill_line_of_the_readme_opens_what_it_names(line):
    """As papermill would: the parameters cell, and what the options lay over it, go through the notebook's own door."""
    _, notebook, _, *options = shlex.split(line, comments=True)
    cells = nbformat.read(ROOT / notebook, as_version=4).cells
    (cell,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    given = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body}
    while options:
        option = options.pop(0)
        if option == "-f":
            given |= params.load(ROOT / options.pop(0))
        elif option == "-p":
            key, value = options.pop(0), yaml.safe_load(options.pop(0))
            given[key] = value
        else:
            assert option == "--log-output"
    if any("open_study(globals())" in cell.source for cell in cells):
        assert runs.open_study(given).study.study == given["study"]
    else:
        assert runs.open_run(given, trained=False).name == "{task}-{backbone}-{loss}".format(**given)


def test_make_has_every_target_of_the_readme():
    (targets,) = re.findall(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = set(re.findall(r"(?:^    |`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test", "lab", "study"} <= named <= set(targets.split())


def test_the_snakefile_only_says_which_notebook_makes_which_file():
    text = (ROOT / "Snakefile").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200 and max(map(len, text.splitlines())) <= 120
    assert not re.search(r"(?<!RELEASES\[study)\.release\b", text), "what follows from a release stands in RELEASES"


def test_kernels_say_what_is_wrong_and_nothing_else(capsys):
    """The noise of every kernel (its loopback, the interrupt that its end begins with) is left out; an error is not."""
    configured = PyFileConfigLoader(str(ROOT / "params" / "profiles" / "ipython_kernel_config.py")).load_config()
    log = IPKernelApp(config=configured).log
    log.warning("Kernel is running over TCP without encryption.")
    log.error("KeyboardInterrupt caught in kernel.")
    log.error("Exception in message handler")
    assert capsys.readouterr().err.strip() == "[IPKernelApp] ERROR | Exception in message handler"


@pytest.mark.skipif(not (shutil.which("git") and shutil.which("make")), reason="git or make is not installed")
def test_what_a_notebook_printed_stays_out_of_git(tmp_path):
    """`make setup` makes git compare notebooks without results; a changed source is a change."""
    for name in ("Makefile", ".gitattributes", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns(".*"))
    (tmp_path / ".venv").symlink_to(sys.prefix)
    variables = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def output(*command):
        return subprocess.run(
            command, cwd=tmp_path, env=variables, check=True, capture_output=True, text=True
        ).stdout.splitlines()

    (config,) = [step for step in output("make", "--always-make", "--dry-run", "setup") if "git config" in step]
    output("sh", "-c", config)  # not a clone: nothing to set, and no fault
    output("git", "init", "--quiet")
    output("sh", "-c", config)
    output("git", "add", "notebooks", ".gitattributes")
    for path in sorted((tmp_path / "notebooks").glob("*.ipynb")):  # as JupyterLab saves what it has run
        notebook = nbformat.read(path, as_version=4)
        notebook.metadata.kernelspec = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
        notebook.metadata.language_info = {
            "codemirror_mode": {"name": "ipython", "version": 3},
            "file_extension": ".py",
            "mimetype": "text/x-python",
            "name": "python",
            "nbconvert_exporter": "python",
            "pygments_lexer": "ipython3",
            "version": "3.12.1",
        }
        for count, cell in enumerate(cell for cell in notebook.cells if cell.cell_type == "code"):
            cell.execution_count = count
            cell.outputs = [nbformat.v4.new_output("stream", text="a result\n")]
        nbformat.write(notebook, path)
    assert not output("git", "diff", "--no-ext-diff")
    saved = path.read_text()
    path.write_text(saved.replace("# Finding", "# Findings", 1))
    changed = [line for line in output("git", "diff", "--no-ext-diff", "--", path) if re.match("[+-] ", line)]
    assert "a result" in saved and len(changed) == 2 and "# Findings" in changed[1]


# ---- habits


def sources():
    """Text of everything that runs but the tests."""
    paths = [*(ROOT / "lib").rglob("*.py"), *NOTEBOOKS, ROOT / "Snakefile"]
    return {path: path.read_text(encoding="utf-8") for path in paths}


def test_no_file_is_loaded_as_a_program():
    programs = r"weights_only\s*=\s*False|\bpickle\.loads?\(|allow_pickle\s*=\s*True"
    assert not [path for path, text in sources().items() if re.search(programs, text)]


def test_no_exception_is_swallowed_unseen():
    assert not [
        name
        for name in MODULES
        for node in ast.walk(tree(name))
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]


def test_random_numbers_come_from_generators():
    """torch's own generator is seeded only inside `fork_rng`, which puts the caller's state back; numpy's and Python's
    never."""
    for name in MODULES:
        contexts = [
            node
            for node in ast.walk(tree(name))
            if isinstance(node, ast.With) and "fork_rng" in ast.unparse(node.items[0])
        ]
        forked = [inner for node in contexts for inner in ast.walk(node)]
        assert "random" not in imports(name), name
        for call in calls(name):
            text = dotted(call)
            assert not re.match(r"(np|numpy)\.random\.(?!default_rng|SeedSequence|Generator|PCG64)", text), (
                f"{name}: {text}"
            )
            if re.search(r"manual_seed(_all)?$|set_rng_state", text):
                assert call in forked or "Generator(" in text, f"{name}: {text} outside fork_rng"


def test_no_path_of_a_machine_is_written_down():
    assert not [path for path, text in sources().items() if re.search(r"/(home|Users|root|work)/\w", text)]
