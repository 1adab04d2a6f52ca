"""What a trained run is, and what it is made of: the record that it stands by, and generations of training state.

A run stands while the parameters and files that its weights follow from, its identity, stand unchanged.

While a run trains, `state/epoch-<n>-<digest>.pt` of its two latest epochs lie in its folder. When it is finished only
`state/finished.json` is left: workflow engines remove what a job is to make before they run it again, so a run whose
study file was touched would otherwise be trained anew.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch

from lib import records
from lib.params import IDENTITY, Run

FINISHED = "finished.json"
RESULTS = ("run.json", "training.csv", "model.safetensors", "model_last.safetensors")


class TrainingError(RuntimeError):
    """A run cannot be trained or is not trained; the message says where it stopped, what is kept and what to do."""


def require_trained(run: Run) -> dict:
    """The record of a finished run with these very parameters.

    Raises
    ------
    TrainingError
        The run is not trained, not finished, or was trained with other parameters than `run` has; they are named.
    """
    path = run.run_folder / "run.json"
    if not path.is_file() or not run.weights_path.is_file():
        raise TrainingError(
            f"{run.name} seed {run.seed} is not trained: {path.parent} holds no finished run. "
            "Run 01_train with these parameters first"
        )
    record = records.read_json(path)
    changed = differences(recorded_identity(record), run.identity)
    if record["status"] != "finished" or changed:
        fault = f"trained with other parameters ({changed})" if changed else f"its status is {record['status']}"
        raise TrainingError(f"{path}: {fault}. Run 01_train with these parameters first")
    return record


def is_trained(run: Run) -> bool:
    """Whether `run` is finished with these very parameters."""
    try:
        require_trained(run)
    except TrainingError:
        return False
    return True


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
        state = torch.load(path, map_location="cpu", weights_only=True)
        changed = differences(recorded_identity(state["record"]), identity)
        if not changed:
            return state
        print(f"the saved state was trained with other parameters ({changed}): training starts over", flush=True)
        return None
    return None


def discard_rest(run_folder: Path, state: dict | None) -> None:
    """Remove what a killed process left half-written, and the saved states that cannot follow on `state`: the damaged,
    and those of other parameters. Left in place they would count among the two latest."""
    whole = [path for path in _generations(run_folder / "state") if state is not None and _whole(path)]
    for path in [*(run_folder / "state").glob("*"), *_half_written(run_folder)]:
        if path not in whole:
            path.unlink()


def finish(run: Run, record: dict, history: list[dict]) -> pd.DataFrame:
    """Keep a copy of a finished run's record and history, write both, and drop the states it was trained with.

    The copy comes first: whatever comes after can be done again from it, see `finished_history`.
    """
    records.write_json({"record": record, "history": history}, run.run_folder / "state" / FINISHED)
    return _publish(run, record, history)


def finished_history(run: Run, identity: Mapping, *, publish: bool = True) -> pd.DataFrame | None:
    """The rows of training.csv if `run` is finished with this very identity, else None.

    What has been removed since, or was not reached by a process that was killed while it finished, is done again; of
    several processes only one may `publish` that.
    """
    record, history, *weights = (run.run_folder / name for name in RESULTS)
    kept = run.run_folder / "state" / FINISHED
    if not all(path.is_file() for path in weights):
        return None
    if kept.is_file():
        known = records.read_json(kept)
    elif record.is_file() and history.is_file():  # a run of the time before there were copies
        known = {"record": records.read_json(record), "history": records.read_table(history).to_dict("records")}
    else:
        return None
    changed = differences(recorded_identity(known["record"]), identity)
    if known["record"]["status"] == "finished" and changed and publish:
        print(f"{run.name} seed {run.seed}: was finished with other parameters ({changed}) and is replaced", flush=True)
    if known["record"]["status"] != "finished" or changed:
        return None
    return _publish(run, **known) if publish else pd.DataFrame(known["history"])


def _publish(run, record, history):
    table, paths = pd.DataFrame(history), [run.run_folder / name for name in RESULTS[:2]]
    if not paths[0].is_file() or records.read_json(paths[0]) != record:
        records.write_json(record, paths[0])
    if not paths[1].is_file() or len(records.read_table(paths[1])) != len(table):
        records.write_table(table, paths[1])
    for path in [*_generations(run.run_folder / "state"), *_half_written(run.run_folder)]:
        path.unlink()
    return records.read_table(paths[1])


def labels_digest(films: pd.DataFrame) -> str:
    """Of which films there are, whose they are, on which side of the split and with which labels."""
    text = films[["image", "patient", "split", "labels"]].to_csv(index=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest(path: Path) -> str:
    """The first 16 digits of a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _generations(folder):
    return sorted(folder.glob("epoch-*.pt"))


def _half_written(run_folder):
    return [left for name in RESULTS for left in run_folder.glob(f".{name}.*")]


def _whole(path):
    return path.stem.rpartition("-")[2] == digest(path)
