"""What is installed follows from one file, and the rooms of `lib` keep apart."""

import ast
import functools
import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from lib.params import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ("3.11", "3.12", "3.13")
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


def test_every_package_is_listed_for_installation():
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"} | {"lib"}
    assert set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]) == packages


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


def test_the_data_room_knows_no_model():
    assert not outside(("lib.data", "lib.locks"), room("lib.data"))


def test_models_and_losses_know_no_data():
    assert not outside((), ["lib.models", "lib.losses"])


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


# ---- habits


def sources():
    """Text of everything that runs but the tests."""
    paths = [*(ROOT / "lib").rglob("*.py"), *(ROOT / "notebooks").glob("*.ipynb"), ROOT / "Snakefile"]
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
