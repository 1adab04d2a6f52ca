"""What a trained run is, and what it is made of: the record that it stands by, and generations of training state.

A run stands while the parameters and files that its weights follow from, its identity, stand unchanged.

While a run trains, `state/epoch-<n>-<digest>.pt` of its two latest epochs lie in its folder. When it is finished only
`state/finished.json` is left: workflow engines remove what a job is to make before they run it again, so a run whose
study file was touched would otherwise be trained anew.
"""

import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pandas as pd
import torch

from lib import records
from lib.params import IDENTITY, ROOT, Run
from lib.records import RecordError, damaged

FINISHED = "finished.json"
WEIGHTS = ("model.safetensors", "model_last.safetensors")
RESULTS = ("run.json", "training.csv", *WEIGHTS)


class TrainingError(RuntimeError):
    """A run cannot be trained or is not trained; the message says where it stopped, what is kept and what to do."""


def require_trained(run: Run) -> dict:
    """The record of a finished run with these very parameters.

    Raises
    ------
    TrainingError
        The run is not trained, not finished, or was trained with other parameters than `run` has; they are named.
    RecordError
        Its record is damaged.
    """
    path = run.run_folder / "run.json"
    if not path.is_file() or not run.weights_path.is_file():
        raise TrainingError(
            f"{run.name} seed {run.seed} is not trained: {path.parent} holds no finished run. "
            "Run 01_train with these parameters first"
        )
    record = _sound(records.read_json(path), path)
    changed = differences(recorded_identity(record), run.identity)
    if record["status"] != "finished" or changed:
        fault = f"trained with other parameters ({changed})" if changed else f"its status is {record['status']}"
        raise TrainingError(f"{path}: {fault}. Run 01_train with these parameters first")
    return record


def is_trained(run: Run) -> bool:
    """Whether `run` is finished with these very parameters, as far as its record says."""
    try:
        require_trained(run)
    except (TrainingError, RecordError):
        return False
    return True


def verify_weights(run: Run, *names: str) -> None:
    """Check the weights of a trained run, or those of its files that are named, against the digests on its record.

    A run of the time before there were digests passes, which is said; the next 01_train puts them on record.

    Raises
    ------
    TrainingError
        The run is not trained, or a file of its weights is missing or not the one that training wrote.
    RecordError
        Its record is damaged.
    """
    record = require_trained(run)
    if "weights" not in record:
        print(
            f"{run.name} seed {run.seed}: trained before digests of the weights went on record, so they are not "
            "checked; 01_train adds them",
            flush=True,
        )
        return
    _verify(run, record, names or WEIGHTS)


def _verify(run, record, names):
    for name in names:
        path, expected = run.run_folder / name, record["weights"].get(name)
        found = digest(path) if path.is_file() else "no file"
        if found != expected:
            same = [other for other in WEIGHTS if other != name and record["weights"].get(other) == expected]
            raise TrainingError(
                f"{path} is not the file that training wrote (SHA-256 {found}, on record {expected}): put a copy of "
                f"that in its place{f' ({same[0]} held the same)' if same else ''}, or delete it and run.json and run "
                "01_train, which trains the run again"
            )


def require_place(run: Run) -> None:
    """`TrainingError` where something else than a file bears the name of a file of the run, so that it would be found
    when all has been trained."""
    for path in (run.run_folder / name for name in RESULTS):
        if path.exists() and not path.is_file():
            raise TrainingError(f"{path} is no file, and a file of that name is to be written: move it away")
    for path in (run.run_folder, run.run_folder / "state"):
        if path.exists() and not path.is_dir():
            raise TrainingError(f"{path} is no folder, and a folder of that name is to be written to: move it away")


def _sound(record, path):
    """A record that holds what is asked of it below."""
    for key, kind in {"status": str, "parameters": dict, "identity": dict}.items():
        if not isinstance(record, dict) or not isinstance(record.get(key), kind):
            raise damaged(path, f"it lacks {key}")
    if not isinstance(record.get("weights", {}), dict):
        raise damaged(path, "its weights are no digests by name")
    return record


def recorded_identity(record: Mapping) -> dict:
    """What the weights of a record follow from: its parameters, of which one that is younger has its default, and
    files."""
    known = {key: value for key, value in record["parameters"].items() if value is not None}
    return {key: known.get(key, Run.model_fields[key].default) for key in IDENTITY} | {
        key: value for key, value in record["identity"].items() if key not in IDENTITY
    }


def differences(old: Mapping, new: Mapping) -> str:
    """What differs among the entries of `new`, in words."""
    return ", ".join(f"{key}: {old.get(key)} -> {new[key]}" for key in sorted(new) if old.get(key) != new[key])


def snapshot(state: object) -> object:
    """A copy, in the memory of the host, of all tensors in nested dicts and lists, so that training may go on while
    they are written."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    return [snapshot(value) for value in state] if isinstance(state, list) else state


def write_state(state: dict, folder: Path) -> None:
    """Write a generation of the training state and drop all but the two latest.

    The digest of the bytes is part of the name, so a file that was cut short or changed is never taken for a state.

    Raises
    ------
    OSError
        The disk is full; the generations before are untouched.
    """
    with records.atomic(folder / "writing.pt") as temporary:
        with open(temporary, "wb") as file:  # given a path, torch.save reports a full disk as an error of its own
            torch.save(state, file)
        name = f"epoch-{state['epoch']:05d}-{digest(temporary)}.pt"
    os.replace(folder / "writing.pt", folder / name)
    for old in _generations(folder)[:-2]:
        old.unlink()


def latest_state(folder: Path, identity: Mapping) -> dict | None:
    """The latest whole state in `folder` that belongs to `identity`, or None; what is passed over is said."""
    for path in reversed(_generations(folder)):
        if not _whole(path):
            print(f"{path.name} is damaged and is passed over", flush=True)
            continue
        state = _read_state(path)
        changed = differences(recorded_identity(state["record"]), identity)
        if not changed:
            return state
        print(f"the saved state was trained with other parameters ({changed}): training starts over", flush=True)
        return None
    return None


def _read_state(path):
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        _sound(state["record"], path)
        _ = [state[key] for key in ("model", "optimizer", "epoch", "history", "best")]
    except Exception as error:  # torch and pickle raise types of their own; torch's own text advises to trust the file
        raise TrainingError(
            f"{path} bears the digest of its bytes, and yet is no state of training that can be read "
            f"({type(error).__name__}): if memory is not short, delete it, and training goes on from the state before"
        ) from None
    return state


def discard_rest(run_folder: Path, state: dict | None) -> None:
    """Remove what a killed process left half-written, and the saved states that cannot follow on `state`: the damaged,
    and those of other parameters. Left in place they would count among the two latest."""
    whole = [path for path in _generations(run_folder / "state") if state is not None and _whole(path)]
    for path in (run_folder / "state").glob("*"):
        if path not in whole and not path.is_dir():
            path.unlink()


def finish(run: Run, record: dict, history: list[dict]) -> pd.DataFrame:
    """Keep a copy of a finished run's record and history, write both, and drop the states it was trained with.

    The copy comes first: whatever comes after can be done again from it, see `finished_history`. What stands already is
    not written.

    Returns
    -------
    DataFrame
        training.csv.
    """
    texts = {
        f"state/{FINISHED}": records.json_text({"record": record, "history": history}),
        "run.json": records.json_text(record),
        "training.csv": pd.DataFrame(history).to_csv(index=False),
    }
    for path, text in ((run.run_folder / name, text) for name, text in texts.items()):
        if not path.is_file() or path.read_bytes() != text.encode():
            records.write_text(text, path)
    for path in _generations(run.run_folder / "state"):
        path.unlink()
    return records.read_table(run.run_folder / "training.csv")


def finished_history(run: Run, identity: Mapping, *, publish: bool = True) -> pd.DataFrame | None:
    """The rows of training.csv if `run` is finished with this very identity, else None.

    What has been removed since, or was not reached by a process that was killed while it finished, is done again; of
    several processes only one may `publish` that. A record of the time before there were digests of films and weights
    is taken as it is, and gets them.

    Raises
    ------
    TrainingError
        It is finished, and its weights are not those that training wrote.
    RecordError
        What is on record is damaged.
    """
    known = _kept(run) if all((run.run_folder / name).is_file() for name in WEIGHTS) else None
    if known is None:
        return None
    record, checked = known["record"], "weights" in known["record"]
    since = set() if checked else {"films", "initial_weights"}
    changed = differences(recorded_identity(record), {key: identity[key] for key in identity.keys() - since})
    if record["status"] == "finished" and changed and publish:
        print(f"{run.name} seed {run.seed}: was finished with other parameters ({changed}) and is replaced", flush=True)
    if record["status"] != "finished" or changed:
        return None
    if checked:
        _verify(run, record, WEIGHTS)
    else:
        record |= {"identity": dict(identity), "weights": weights_on_record(run)}
        if publish:
            print(
                f"{run.name} seed {run.seed}: trained before digests of films and weights went on record; they do now, "
                "as both are",
                flush=True,
            )
    return finish(run, **known) if publish else pd.DataFrame(known["history"])


def weights_on_record(run: Run) -> dict[str, str]:
    """The digests of a run's weights files, by name."""
    return {name: digest(run.run_folder / name) for name in WEIGHTS}


def _kept(run):
    """Record and history of a run: the copy, or the results where there is none, or None."""
    copy, *results = (run.run_folder / name for name in (f"state/{FINISHED}", *RESULTS[:2]))
    if copy.is_file():
        known = records.read_json(copy)
        _sound(known.get("record"), copy)
        if not isinstance(known.get("history"), list):
            raise damaged(copy, "it lacks history")
        return {key: known[key] for key in ("record", "history")}
    if not all(path.is_file() for path in results):
        return None
    # a run of the time before there were copies, or one that is not finished
    record = _sound(records.read_json(results[0]), results[0])
    finished = record["status"] == "finished"
    return {"record": record, "history": records.read_table(results[1]).to_dict("records") if finished else []}


def labels_digest(films: pd.DataFrame) -> str:
    """Of which films there are, whose they are, on which side of the split and with which labels."""
    text = films[["image", "patient", "split", "labels"]].to_csv(index=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest(path: Path) -> str:
    """The first 16 digits of a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def environment() -> dict:
    """Host, git commit, versions and the number of threads that a result depends on, for the record."""
    # Without the ceiling, a copy without .git within another repository would bear that one's commit.
    options = {"cwd": ROOT, "env": os.environ | {"GIT_CEILING_DIRECTORIES": str(ROOT.parent)}, "check": False}
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, **options)
        commit = git.stdout.decode(errors="replace").strip()
    except OSError:  # there is no git
        commit = ""
    packages = ("torch", "torchvision", "timm", "numpy", "scikit-learn", "pandas", "opencv-python-headless", "numba")
    return {
        "commit": commit or "unknown",
        "host": platform.node(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
    }


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _generations(folder):
    return sorted(path for path in folder.glob("epoch-*.pt") if path.is_file())


def _whole(path):
    return path.stem.rpartition("-")[2] == digest(path)
