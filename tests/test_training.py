"""The training loop: the same bits after any interruption, and a clear end where it cannot go on."""

import contextlib
import errno
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lib import devices, records, state, training
from lib.data import open_data
from lib.data.batches import count_batches
from lib.data.store import Store, StoreError
from lib.devices import DeviceError, choose_device, hold_gpus
from lib.locks import exclusive, try_lock
from lib.losses import Criterion
from lib.models import build_model
from lib.params import IDENTITY, ROOT, Run
from lib.records import RecordError
from lib.runs import OpenStudy, Subject
from lib.state import (
    RESULTS,
    WEIGHTS,
    TrainingError,
    digest,
    finished_history,
    is_trained,
    require_trained,
    verify_weights,
)

EPOCHS = 3
# One server imports torch once; its children start in milliseconds, each a process of its own that can be killed.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["lib.training", "torchvision.models"])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums depend on the number of threads; the processes of this file all have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store_folder(small_phantom):
    run = Run.build(parameters(small_phantom, "store"))
    open_data(run)
    return run.folder / "store"


@pytest.fixture
def new_run(small_phantom, store_folder, request):
    """Makes a run of a study of this test's own, on the store of all tests."""

    def make(study="", **changes):
        name = "".join(letter if letter.isalnum() else "_" for letter in request.node.name) + study
        run = Run.build(parameters(small_phantom, name, **changes))
        run.folder.mkdir(parents=True, exist_ok=True)
        if not (run.folder / "store").exists():
            (run.folder / "store").symlink_to(store_folder)
        return run

    return make


def parameters(phantom, study, **changes):
    return {
        "study": study,
        "release": "nih",
        "data_root": str(phantom),
        "image_size": 32,
        "validation_fraction": 0.3,
        "epochs": EPOCHS,
        "batch_size": 16,
        "learning_rate": 1e-3,
        "init": "scratch",
        "checkpoint": "last",
        "device": "cpu",
        "precision": "float32",
    } | changes


@pytest.fixture(scope="module")
def uninterrupted(small_phantom, store_folder):
    """Folder of a run that was never disturbed."""
    run = Run.build(parameters(small_phantom, "uninterrupted"))
    run.folder.mkdir(parents=True)
    (run.folder / "store").symlink_to(store_folder)
    training.fit(run)
    return run.run_folder


def differences(one, other):
    """What differs between two finished runs: weights by their bits, the rows of training.csv but for the clock."""
    found = []
    for name in ("model.safetensors", "model_last.safetensors"):
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys()
        found += [f"{name}: {key}" for key in first if not torch.equal(first[key], second[key])]
    clock = ["seconds", "films_per_second"]
    first, second = (pd.read_csv(folder / "training.csv").drop(columns=clock) for folder in (one, other))
    return found + ([] if first.equals(second) else ["training.csv"])


def child(run, log, crash_at=0):
    """Body of a killable process: trains `run`; before its `crash_at`-th move of a file into place it dies by
    SIGKILL."""
    torch.set_num_threads(1)
    move, calls = os.replace, itertools.count(1)

    def move_or_die(source, target):
        if next(calls) == crash_at:
            os.kill(os.getpid(), signal.SIGKILL)
        move(source, target)

    os.replace = move_or_die
    with open(log, "a", buffering=1) as file, contextlib.redirect_stdout(file):
        training.fit(run)


def start(run, log, **options):
    process = SERVER.Process(target=child, args=(run, log), kwargs=options)
    process.start()
    return process


class Interrupted(Exception):
    pass


def interrupt(run, monkeypatch, after):
    """Train `run` up to the saved state of epoch `after`."""
    write = training.write_state

    def write_and_stop(state, folder):
        write(state, folder)
        if state["epoch"] == after:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(training, "write_state", write_and_stop)
        with pytest.raises(Interrupted):
            training.fit(run)
    return sorted((run.run_folder / "state").glob("epoch-*.pt"))


# ---- interruptions


def test_a_control_trains_on_labels_dealt_out_anew_and_is_a_run_of_its_own(new_run, monkeypatch):
    """Class counts stay, targets of a film do not; validation keeps the true ones."""
    learnt, validated, seen = [], [], []
    real, validate = training.training_batches, training._validate
    monkeypatch.setattr(training, "training_batches", lambda *a, **k: (learnt.append(a[2]), real(*a, **k))[1])
    monkeypatch.setattr(training, "_validate", lambda *a: (validated.append(a[3]), validate(*a))[1])
    for shuffle in (False, True):
        run = new_run(f"{shuffle}", shuffle_labels=shuffle, epochs=1)
        training.fit(run)
        seen.append((learnt[-1], validated[-1], records.read_json(run.run_folder / "run.json")))
    (true, kept, record), (dealt, still, other) = seen
    rows = (true != dealt).any(axis=1)
    assert rows.any() and record["n_positive_train"] == other["n_positive_train"]
    np.testing.assert_array_equal(dealt.sum(0), true.sum(0))
    np.testing.assert_array_equal(kept, still)
    assert other["parameters"]["shuffle_labels"] and "shuffle_labels" in IDENTITY


def test_a_finished_run_leaves_what_is_promised(uninterrupted):
    record = records.read_json(uninterrupted / "run.json")
    assert record["status"] == "finished" and record["best_epoch"] in range(1, EPOCHS + 1)
    assert {
        "parameters",
        "versions",
        "commit",
        "host",
        "device",
        "started",
        "finished",
        "identity",
        "loss_weights",
    } <= record.keys()
    history = pd.read_csv(uninterrupted / "training.csv")
    assert list(history["epoch"]) == [1, 2, 3] and np.isfinite(history.to_numpy()).all()
    assert record["best_val_auroc"] == history["val_auroc"].max()
    (kept,) = (uninterrupted / "state").iterdir()  # no training state: hundreds of megabytes for a larger backbone
    assert kept.name == "finished.json" and records.read_json(kept)["record"] == record
    with safe_open(uninterrupted / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["run"])["classes"] == record["classes"]


def test_killed_before_each_move_of_a_file_it_ends_with_the_same_bits(new_run, uninterrupted, tmp_path):
    """A run moves: run.json; then of each epoch the state, its name, training.csv; then training.csv, both models, the
    copy of its record, run.json."""
    run = new_run()
    for crash_at in (1, 2, 3, 4, 3, 4, 4, 2, 3, 4, 5):
        process = start(run, tmp_path / "log", crash_at=crash_at)
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
        assert finished_history(run, records.read_json(uninterrupted / "run.json")["identity"]) is None
    process = start(run, tmp_path / "log", crash_at=6)  # everything stands but the last word of run.json
    process.join()
    assert process.exitcode == -signal.SIGKILL and not is_trained(run)
    process = start(run, tmp_path / "log")
    process.join()
    assert process.exitcode == 0 and "already trained" in (tmp_path / "log").read_text() and is_trained(run)
    assert differences(uninterrupted, run.run_folder) == []
    for name in WEIGHTS:  # equal tensors, equal bytes
        assert (run.run_folder / name).read_bytes() == (uninterrupted / name).read_bytes()
    left = {path.name for path in run.run_folder.rglob("*") if path.is_file()}
    assert left == {".lock", "finished.json", *RESULTS}


def test_killed_at_random_moments_it_ends_with_the_same_bits(new_run, uninterrupted, tmp_path):
    run = new_run()
    resolved = tmp_path / "resolved.json"
    records.write_json(run.model_dump(), resolved)
    seconds = pd.read_csv(uninterrupted / "training.csv")["seconds"]
    rng = np.random.default_rng()
    # Once by the entry point, in the middle of the second epoch.
    process = subprocess.Popen(
        [sys.executable, "-m", "lib.training", resolved], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert any("epoch 1/3" in line for line in process.stdout)
        time.sleep(rng.uniform(0.2, 0.8) * seconds.min())
        process.kill()
    assert process.returncode == -signal.SIGKILL
    for delay in rng.uniform(0.1, 1.2, 4) * seconds.mean():
        process = start(run, tmp_path / "log")
        time.sleep(delay)
        process.kill()
        process.join()
        print(f"killed after {delay:.3f} s")
    training.fit(run)
    assert differences(uninterrupted, run.run_folder) == []


def test_a_state_without_its_optimizer_would_be_noticed(new_run, uninterrupted, monkeypatch):
    """The control of the tests above: these can fail."""
    run = new_run()
    path = interrupt(run, monkeypatch, after=1)[-1]
    state = torch.load(path, weights_only=True)
    path.unlink()
    training.write_state({**state, "optimizer": {**state["optimizer"], "state": {}}}, path.parent)
    training.fit(run)
    assert len(differences(uninterrupted, run.run_folder)) > 100


def test_a_state_is_of_its_epoch_though_the_next_one_trains_while_it_is_written(new_run, uninterrupted, monkeypatch):
    run, trained, write, train_epoch = new_run(), threading.Event(), training.write_state, training._train_epoch

    def train_and_tell(*arguments):
        row = train_epoch(*arguments)
        if row["epoch"] == 2:
            trained.set()
            raise Interrupted
        return row

    def wait_and_write(state, folder):
        assert trained.wait(60), "the loop waits for the state to be written"
        write(state, folder)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(training, "_train_epoch", train_and_tell)
        patch.setattr(training, "write_state", wait_and_write)
        training.fit(run)
    assert [path.name[:11] for path in (run.run_folder / "state").glob("epoch-*.pt")] == ["epoch-00001"]
    training.fit(run)
    assert differences(uninterrupted, run.run_folder) == []


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_state_falls_back_to_the_one_before(new_run, uninterrupted, monkeypatch, capsys, damage):
    run = new_run()
    path = interrupt(run, monkeypatch, after=2)[-1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"truncated": content[:-1000], "flipped": content, "empty": b""}[damage])
    capsys.readouterr()
    training.fit(run)
    said = capsys.readouterr().out
    assert f"{path.name} is damaged" in said and "carries on after epoch 1 of 3" in said
    assert differences(uninterrupted, run.run_folder) == []
    assert len(records.read_json(run.run_folder / "run.json")["resumed"]) == 1


def test_changed_parameters_start_over_and_can_be_interrupted_too(new_run, uninterrupted, monkeypatch, capsys):
    other = new_run(learning_rate=5e-4, epochs=5)
    interrupt(other, monkeypatch, after=4)
    run = new_run()
    assert run.run_folder == other.run_folder
    assert (
        len(interrupt(run, monkeypatch, after=1)) == 1
    )  # states of the other parameters are gone: they would pass for later ones
    said = capsys.readouterr().out
    assert "epochs: 5 -> 3" in said and "learning_rate: 0.0005 -> 0.001" in said and "starts over" in said
    training.fit(run)
    assert "carries on after epoch 1 of 3" in capsys.readouterr().out
    assert differences(uninterrupted, run.run_folder) == []


def test_changed_labels_start_over(new_run, small_phantom, monkeypatch, tmp_path, capsys):
    interrupt(new_run(), monkeypatch, after=1)
    release = shutil.copytree(small_phantom, tmp_path / "release")  # the films are the same, so the store stands
    table = release / "Data_Entry_2017.csv"
    table.write_text(table.read_text().replace(",No Finding,", ",Edema,", 1))
    run = new_run(data_root=str(release))
    interrupt(run, monkeypatch, after=1)
    assert "labels: " in (said := capsys.readouterr().out) and "starts over" in said


def test_a_finished_run_returns_at_once(new_run, uninterrupted, monkeypatch, capsys):
    run = new_run()
    shutil.copytree(uninterrupted, run.run_folder)
    monkeypatch.setattr(training, "_train_epoch", lambda *_: pytest.fail("nothing is left to train"))
    before = {path: path.stat().st_mtime_ns for path in run.run_folder.rglob("*.*")}
    history = training.fit(run)
    assert "already trained, 3 epochs" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run.run_folder.rglob("*.*")}
    assert history.equals(pd.read_csv(uninterrupted / "training.csv"))
    # Snakemake removes a rule's outputs before it runs again: they are written anew from the copy, to the byte.
    outputs = {name: (run.run_folder / name).read_bytes() for name in ("run.json", "training.csv")}
    for name in outputs:
        (run.run_folder / name).unlink()
    training.fit(run)
    assert outputs == {name: (run.run_folder / name).read_bytes() for name in outputs}
    assert differences(uninterrupted, run.run_folder) == []


def test_a_finished_run_that_is_replaced_says_so(new_run, uninterrupted, capsys):
    run = new_run(epochs=1)
    shutil.copytree(uninterrupted, run.run_folder)
    training.fit(run)
    assert "was finished with other parameters (epochs: 3 -> 1) and is replaced" in capsys.readouterr().out


def test_of_several_processes_one_publishes_what_is_finished(new_run, uninterrupted):
    run = new_run()
    shutil.copytree(uninterrupted, run.run_folder)
    identity = records.read_json(run.run_folder / "run.json")["identity"]
    for name in ("run.json", "training.csv"):
        (run.run_folder / name).unlink()
    history = finished_history(run, identity, publish=False)
    assert list(history["epoch"]) == [1, 2, 3] and not (run.run_folder / "run.json").exists()
    assert finished_history(run, identity).equals(pd.read_csv(run.run_folder / "training.csv"))


def test_a_run_without_its_weights_is_trained_again(new_run, uninterrupted, capsys):
    run = new_run()
    shutil.copytree(uninterrupted, run.run_folder)
    (run.run_folder / "model.safetensors").unlink()
    training.fit(run)
    assert "epoch 3/3" in capsys.readouterr().out
    assert differences(uninterrupted, run.run_folder) == []


def test_a_finished_run_says_that_the_code_has_changed_since(new_run, uninterrupted, capsys):
    run = new_run()
    shutil.copytree(uninterrupted, run.run_folder)
    path = run.run_folder / "state" / "finished.json"
    kept = records.read_json(path)
    kept["record"]["code"]["losses.py"] = "another"
    records.write_json(kept, path)
    training.fit(run)
    said = capsys.readouterr().out
    assert "another version of the training code (losses.py)" in said and f"delete {run.run_folder}" in said


def test_what_is_analysed_must_be_what_was_trained(new_run, uninterrupted):
    run = new_run()
    shutil.copytree(uninterrupted, run.run_folder)
    assert not Subject(run, OpenStudy(run)).model.training and is_trained(run)
    for key, value in {"phantom_seed": 5, "release": "phantom", "init": "imagenet", "gamma": 3.0}.items():
        other = run.model_copy(update={key: value})
        with pytest.raises(training.TrainingError, match=f"trained with other parameters \\({key}: .* -> {value}\\)"):
            require_trained(other)
        assert not is_trained(other)


def test_what_is_about_to_be_trained_first_is_said(new_run, monkeypatch, capsys):
    trained = []
    monkeypatch.setattr(training, "fit", trained.append)
    run = new_run(init="phantom")
    training.train(run)
    said = capsys.readouterr().out
    assert [one.study for one in trained] == ["pretext_32px", run.study]
    assert "init is phantom" in said and "2400 simulated films" in said and "init: imagenet, scratch" in said


def test_two_processes_on_one_run_take_turns(new_run, uninterrupted, tmp_path):
    run = new_run()
    logs = [tmp_path / "first", tmp_path / "second"]
    processes = [start(run, log) for log in logs]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    said = sorted(log.read_text() for log in logs)
    assert "another process trains it" in said[0] and "already trained, 3 epochs" in said[0]
    assert "epoch 3/3" in said[1] and "another process" not in said[1]
    assert differences(uninterrupted, run.run_folder) == []


# ---- what cannot go on


def test_nan_loss_stops_and_keeps_the_last_good_state(new_run, uninterrupted, monkeypatch):
    run = new_run()
    make, calls = training.make_loss, itertools.count(1)
    steps = count_batches(records.read_json(uninterrupted / "run.json")["films"]["train"], run.batch_size)

    def broken(*arguments):
        criterion = make(*arguments)
        # After the steps of an epoch and its validation.
        element = lambda *pair: criterion(*pair) * (math.nan if next(calls) == steps + 2 else 1)  # noqa: E731
        return Criterion(element, criterion.constants)

    with monkeypatch.context() as patch:
        patch.setattr(training, "make_loss", broken)
        with pytest.raises(
            training.TrainingError,
            match=r"not finite at epoch 2, step 1\. The state after epoch 1 is kept.*gradient_clip",
        ):
            training.fit(run)
    (path,) = (run.run_folder / "state").iterdir()
    state = torch.load(path, weights_only=True)
    assert state["epoch"] == 1 and all(tensor.isfinite().all() for tensor in state["model"].values())
    training.fit(run)
    assert differences(uninterrupted, run.run_folder) == []


def test_weights_that_run_away_are_not_saved(new_run):
    run = new_run(learning_rate=1e30)
    with pytest.raises(training.TrainingError, match="not finite at epoch 1, .*No epoch was finished"):
        training.fit(run)
    assert not (run.run_folder / "state").exists() and not list(run.run_folder.glob("model*"))


def test_a_gradient_that_is_not_finite_stops_though_the_loss_is(new_run, monkeypatch):
    root = Criterion(lambda logits, _: (0 * logits).sum().sqrt())
    monkeypatch.setattr(training, "make_loss", lambda *_: root)
    with pytest.raises(training.TrainingError, match="epoch 1, step 1"):
        training.fit(new_run())


def test_validation_films_with_one_label_only_are_an_error(new_run, monkeypatch):
    run = new_run(task="binary")
    tasks = training.task_targets
    monkeypatch.setattr(
        training, "task_targets", lambda *arguments: (np.zeros_like(tasks(*arguments)[0]), tasks(*arguments)[1])
    )
    with pytest.raises(training.TrainingError, match="Unhealthy.*raise validation_fraction"):
        training.fit(run)
    assert {path.name for path in run.run_folder.iterdir()} == {".lock"}


def test_a_full_disk_is_named_and_leaves_the_state_before(new_run, uninterrupted, monkeypatch):
    run = new_run()
    save = torch.save

    def full_at_two(state, file):
        if state["epoch"] == 2:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_at_two)
        with pytest.raises(
            OSError, match="no space left on the disk while writing .*state.*Free some space and run again"
        ):
            training.fit(run)
    assert [path.name[:11] for path in (run.run_folder / "state").iterdir()] == ["epoch-00001"]
    training.fit(run)
    assert differences(uninterrupted, run.run_folder) == []


# ---- what is on disk is not what training wrote


@pytest.fixture
def finished(new_run, uninterrupted):
    run = new_run()
    shutil.copytree(uninterrupted, run.run_folder)
    return run


def flip_three_bits(path):
    content = bytearray(path.read_bytes())
    for at in (-5000, -6001, -7002):
        content[at] ^= 1
    path.write_bytes(content)


def cut(path):
    os.truncate(path, 1000)


def other_tensors(path):
    save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize("damage", [flip_three_bits, other_tensors, cut])
def test_weights_that_training_did_not_write_are_refused(finished, damage, monkeypatch, capsys):
    monkeypatch.setattr(training, "_train_epoch", lambda *_: pytest.fail("nobody asked for hours of training"))
    verify_weights(finished)
    damage(finished.run_folder / "model_last.safetensors")
    message = "model_last.safetensors is not the file that training wrote .*delete it and run.json and run 01_train"
    for use in (
        lambda: Subject(finished, OpenStudy(finished)).model,
        lambda: verify_weights(finished),
        lambda: training.fit(finished),
    ):
        with pytest.raises(TrainingError, match=message):
            use()
    best = finished.model_copy(update={"checkpoint": "best"})
    assert not Subject(best, OpenStudy(best)).model.training
    (finished.run_folder / "model.safetensors").unlink()
    with pytest.raises(TrainingError, match="model.safetensors is not .*no file"):
        verify_weights(finished)
    assert "digests" not in capsys.readouterr().out


def test_a_pretext_that_is_damaged_starts_no_run(new_run, finished, monkeypatch):
    monkeypatch.setattr(Run, "pretext", property(lambda self: finished))
    monkeypatch.setattr(training, "open_data", lambda run: pytest.fail("the weights are checked before the films"))
    flip_three_bits(finished.weights_path)
    with pytest.raises(TrainingError, match=f"{finished.weights_path} is not the file that training wrote"):
        training.train(new_run("mine", init="phantom"))


def test_a_run_of_the_time_before_digests_gets_them_and_is_not_trained_anew(
    finished, uninterrupted, monkeypatch, capsys
):
    monkeypatch.setattr(training, "_train_epoch", lambda *_: pytest.fail("it is trained"))
    kept = finished.run_folder / "state" / "finished.json"
    known = records.read_json(kept)
    today = json.loads(json.dumps(known["record"]))
    del known["record"]["weights"]
    known["record"]["identity"] |= {"films": "of another time", "initial_weights": "of another file"}
    records.write_json(known, kept)
    records.write_json(known["record"], finished.run_folder / "run.json")
    verify_weights(finished)
    assert "not checked; 01_train adds them" in capsys.readouterr().out
    training.fit(finished)
    assert "went on record; they do now" in capsys.readouterr().out
    assert records.read_json(kept)["record"] == records.read_json(finished.run_folder / "run.json") == today
    training.fit(finished)
    assert "record" not in capsys.readouterr().out


def test_equal_tensors_make_equal_files_and_another_file_of_them_trains_nothing_anew(new_run, tmp_path, capsys):
    state = build_model("tdensenet", 15, seed=3).state_dict()
    torch.save(state, tmp_path / "init.pth")
    first = new_run("first", epochs=1, init=str(tmp_path / "init.pth"))
    training.fit(first)
    second = new_run("second", epochs=1, init=str(tmp_path / "init.pth"))
    torch.save({name: state[name] for name in reversed(state)}, tmp_path / "init.pth")
    training.fit(second)
    ours, theirs = (records.read_json(run.run_folder / "run.json") for run in (first, second))
    assert ours["weights"] == theirs["weights"] and ours["identity"] == theirs["identity"]
    capsys.readouterr()
    training.fit(first)
    assert "already trained, 1 epochs" in capsys.readouterr().out
    state["trunk.conv0.weight"][0, 0, 0, 0] += 1
    torch.save(state, tmp_path / "init.pth")
    assert interrupted_identity(first) and "initial_weights: " in capsys.readouterr().out


def interrupted_identity(run):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(training, "_train_epoch", lambda *_: (_ for _ in ()).throw(Interrupted))
        training.fit(run)
    return True


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"record": 3}', '{"record": {"status": "finished"}}', "{"], ids=list("abcdef")
)
def test_a_damaged_record_is_named_or_written_again(finished, monkeypatch, content):
    monkeypatch.setattr(training, "_train_epoch", lambda *_: pytest.fail("it is trained"))
    record, history, copy = (finished.run_folder / name for name in ("run.json", "training.csv", "state/finished.json"))
    before = [path.read_bytes() for path in (record, history, copy)]
    record.write_text(content)
    with pytest.raises(RecordError, match="run.json is damaged .*: delete it and run 01_train again"):
        require_trained(finished)
    assert not is_trained(finished)
    history.write_bytes(before[1][:-1] + b"7\n")  # another number
    training.fit(finished)
    assert [path.read_bytes() for path in (record, history, copy)] == before
    copy.write_text(content)
    with pytest.raises(RecordError, match="finished.json is damaged .*: delete it and run 01_train again"):
        training.fit(finished)
    copy.unlink()
    training.fit(finished)  # as the sentence says
    assert [path.read_bytes() for path in (record, history, copy)] == before


def test_what_is_in_the_way_of_a_file_is_found_before_anything_is_done(new_run, monkeypatch):
    monkeypatch.setattr(training, "build_model", lambda *_: pytest.fail("too late"))
    for make, name in ((os.mkdir, "model.safetensors"), (os.mkfifo, "run.json"), (Path.touch, "state")):
        run = new_run(name.replace(".", "_"))
        run.run_folder.mkdir(parents=True)
        make(run.run_folder / name)
        with pytest.raises(TrainingError, match=f"{name} is no .*move it away"):
            training.fit(run)
    run = new_run("file")
    run.run_folder.parent.mkdir()
    run.run_folder.touch()
    with pytest.raises(TrainingError, match="seed0 is no folder"):
        training.fit(run)


def test_a_hostile_state_is_refused_in_a_sentence_of_our_own(new_run, uninterrupted, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    run = new_run()
    folder = run.run_folder / "state"
    folder.mkdir(parents=True)
    for k, content in enumerate([{"record": Evil()}, {"record": {}}, [1], torch.zeros(3), {"epoch": 1}]):
        torch.save(content, folder / "x")
        path = (folder / "x").rename(folder / f"epoch-0000{k}-{digest(folder / 'x')}.pt")
        with pytest.raises(TrainingError, match=f"{path} bears the digest .*delete it") as error:
            training.fit(run)
        assert "weights_only" not in str(error.value) and not (tmp_path / "ran").exists()
        path.unlink()
    (folder / "epoch-00009-x.pt").mkdir()  # no state, and none of ours to remove
    training.fit(run)
    assert differences(uninterrupted, run.run_folder) == []


def test_a_damaged_store_is_refused_before_training_and_not_read_after(new_run, finished, monkeypatch):
    verify = Store.verify

    def damaged(store, rows=None):
        if rows is None:
            raise StoreError("damaged")
        verify(store, rows)

    monkeypatch.setattr(Store, "verify", damaged)
    assert len(training.fit(finished)) == EPOCHS
    run = new_run("mine")
    with pytest.raises(StoreError, match="damaged"):
        training.fit(run)
    assert {path.name for path in run.run_folder.iterdir()} == {".lock"}


def test_a_folder_that_cannot_be_written_is_read(new_run, finished, uninterrupted, monkeypatch, capsys):
    def refuse(path, waiting):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(training, "exclusive", refuse)
    assert training.fit(finished).equals(pd.read_csv(uninterrupted / "training.csv"))
    assert "already trained; " in (said := capsys.readouterr().out) and "Read-only file system" in said
    with pytest.raises(TrainingError, match="cannot be written .Read-only file system: .*lock.: .*OUTPUTS"):
        training.fit(new_run("mine"))
    flip_three_bits(finished.weights_path)
    with pytest.raises(TrainingError, match="not the file that training wrote"):
        training.fit(finished)


def test_variables_of_another_launcher_do_not_make_a_run_wait_for_peers(finished, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "x")
    monkeypatch.setattr(training.dist, "init_process_group", lambda *_, **__: pytest.fail("there are no peers"))
    assert len(training.fit(finished)) == EPOCHS


def test_the_record_does_without_git_and_metadata(monkeypatch, tmp_path):
    assert state.environment()["versions"]["torch"] == state.version("torch")

    def absent(package):
        raise state.PackageNotFoundError(package)

    monkeypatch.setattr(state, "version", absent)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    who = ["-c", "user.name=x", "-c", "user.email=x"]
    subprocess.run(["git", "-C", tmp_path, *who, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    (tmp_path / "copy").mkdir()
    monkeypatch.setattr(state, "ROOT", tmp_path)
    assert state.environment()["commit"] != "unknown"
    monkeypatch.setattr(state, "ROOT", tmp_path / "copy")  # without .git: of no commit, least of all another's
    found = state.environment()
    assert found["commit"] == "unknown" and set(found["versions"].values()) == {"unknown"}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert state.environment()["commit"] == "unknown"


# ---- steps


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_schedule(warmup, final):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=final)
    for step in range(50):
        expected = final + (1 - final) * math.cos(math.pi / 2 * step / 50) ** 2  # (1 + cos 2a) / 2 = cos^2 a
        expected *= 0.01 + 0.99 * step / warmup if step < warmup else 1
        assert training.schedule(step, 50, warmup, final) == pytest.approx(expected, abs=1e-12)
        assert training.schedule(step, 50, 0, final) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        cosine.step()


def test_the_rate_follows_the_schedule_at_every_step(new_run, monkeypatch):
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self, *rest: rates.append(self.param_groups[0]["lr"]) or step(self, *rest)
    )
    run = new_run(epochs=2, warmup_steps=3, final_learning_rate=0.1)
    history = training.fit(run)
    expected = [run.learning_rate * training.schedule(k, len(rates), 3, 0.1) for k in range(len(rates))]
    assert rates == pytest.approx(expected, rel=1e-12) and len(set(rates)) == len(rates) > 4
    assert list(history["learning_rate"]) == [rates[len(rates) // 2 - 1], rates[-1]]


def test_gradients_are_clipped_and_their_norm_is_recorded_before(new_run, monkeypatch):
    norms, step = [], torch.optim.Adam.step

    def measured(self, *arguments):
        norms.append(
            math.sqrt(
                sum(p.grad.double().square().sum().item() for group in self.param_groups for p in group["params"])
            )
        )
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", measured)
    history = training.fit(new_run(epochs=1, gradient_clip=1e-3))
    assert history["gradient_norm"][0] > 0.01
    assert max(norms) <= 1e-3 * (1 + 1e-4) and min(norms) > 0.99e-3


def test_the_callers_random_state_is_left_alone(new_run):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    training.fit(new_run(epochs=1))
    assert torch.equal(torch.rand(3), expected)


# ---- several processes


def test_two_processes_train_as_one_and_die_with_their_parent(new_run, capsys):
    """ConvNeXt, because batch normalisation sees each process's own films only; slowly, because Adam blows up
    differences of rounding."""
    n_films = len(open_data(new_run("films"))[1].rows("train"))
    whole = min(
        (size for size in range(4, n_films + 1, 2) if n_films % size < 2), key=lambda size: abs(size - 16)
    )  # no last batch to be cut
    changes = {"backbone": "convnext_atto", "loss": "cb_focal", "learning_rate": 1e-5, "batch_size": whole}
    single, double = new_run("single", **changes), new_run("double", gpus=2, **changes)
    parent = SERVER.Process(target=training.train, args=(double,))
    parent.start()
    while not list(double.run_folder.glob("state/epoch-*.pt")):
        assert parent.is_alive()
        time.sleep(0.05)
    assert len(processes_of(str(double.run_folder))) == 3  # torchrun and two ranks
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 20
    while processes_of(str(double.run_folder)):
        assert time.monotonic() < deadline, "the workers outlive their parent"
        time.sleep(0.1)

    several = training.train(double)
    assert "carries on after epoch" in capsys.readouterr().out
    alone = training.train(single)
    ours, theirs = (records.read_json(run.run_folder / "run.json") for run in (single, double))
    assert (ours["world_size"], theirs["world_size"], theirs["status"]) == (1, 2, "finished")
    assert ours["loss_weights"] == theirs["loss_weights"] and ours["n_positive_train"] == theirs["n_positive_train"]
    for column in ("learning_rate", "train_loss", "gradient_norm", "val_loss"):
        np.testing.assert_allclose(several[column], alone[column], rtol=1e-3, err_msg=column)
    initial = build_model("convnext_atto", 15, "scratch", single.seed).state_dict()
    first, second = (
        torch.cat([(tensor - initial[key]).double().flatten() for key, tensor in load_file(run.weights_path).items()])
        for run in (single, double)
    )
    assert torch.nn.functional.cosine_similarity(first, second, dim=0) > 0.99 and first.norm() > 0


def processes_of(argument):
    """Numbers of the living processes that have `argument` within their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if "lib.training" in command and any(argument in part for part in command):
                found.append(int(folder.name))
    return found


def test_a_worker_that_fails_is_an_error_of_the_parent(new_run, monkeypatch):
    command, popen = [], subprocess.Popen

    def stub(arguments, **options):
        command.extend(arguments)
        return popen([sys.executable, "-c", "import sys; print('no films'); sys.exit(3)"], **options)

    monkeypatch.setattr(training.subprocess, "Popen", stub)
    with pytest.raises(training.TrainingError, match="torchrun ended with status 3"):
        training.train(new_run(gpus=2))
    assert "--nproc-per-node=2" in command and "lib.training" in command


def test_a_lock_goes_with_its_holder(tmp_path, capsys):
    path = tmp_path / "lock"
    code = f"from lib.locks import try_lock; print(try_lock({str(path)!r}), flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert int(holder.stdout.readline()) > 2
        assert try_lock(path) is None
        holder.kill()
        with exclusive(path, "waiting"):
            assert try_lock(path) is None
    os.close(try_lock(path))


# ---- devices


@pytest.fixture
def two_gpus(monkeypatch, tmp_path):
    """Torch that sees two GPUs, and a computer on which nobody holds one."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(devices.tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    hold_gpus.cache_clear()
    yield chosen
    hold_gpus.cache_clear()


def another_process():
    """A lock is a property of the open file, so what was taken before stays taken when this process forgets it."""
    hold_gpus.cache_clear()


def test_each_process_takes_a_gpu_of_its_own(two_gpus):
    taken = []
    for _ in range(5):
        taken.append(choose_device("auto").index)
        assert choose_device("cuda").index == taken[-1]  # a process keeps its own
        another_process()
    assert taken == [0, 1, 0, 1, 0]
    assert two_gpus[-1] == torch.device("cuda:0")


def test_a_run_of_several_gpus_gets_free_ones(two_gpus, monkeypatch, new_run):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert training._own_gpus(new_run(device="auto", gpus=2)) == {"CUDA_VISIBLE_DEVICES": "4,7"}
    another_process()
    assert choose_device("cuda", local_rank=1).index == 1
    with pytest.raises(DeviceError, match="gpus is 3, and torch sees 2"):
        hold_gpus(3)
    assert training._own_gpus(new_run(device="cpu", gpus=2)) == {}


def test_a_device_that_is_not_there_is_named(two_gpus, monkeypatch):
    assert choose_device("cuda:1").index == 1
    with pytest.raises(DeviceError, match="'cuda:2' was asked for, and torch sees 2"):
        choose_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(DeviceError, match="sees no GPU: set device to auto or cpu"):
        choose_device("cuda")
    with pytest.raises(DeviceError, match="'mps' was asked for"):
        choose_device("mps")


def test_locks_of_gpus_that_cannot_be_written_are_named(two_gpus, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-GPU-a/1/0,../../MIG-GPU-b/1/0")
    assert hold_gpus(2) == [0, 1] and all(path.parent.parent == tmp_path for path in tmp_path.rglob("*.lock"))
    another_process()
    folder = next(tmp_path.iterdir())
    shutil.rmtree(folder)
    folder.touch()
    with pytest.raises(DeviceError, match=f"{folder} cannot be written .File exists.: .*TMPDIR"):
        choose_device("auto")
