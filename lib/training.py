"""Training of one run: a plain loop that can be killed at any moment and carries on to the same bits.

`fit` trains in this process; `train` calls it, or starts torchrun on this module where a run has several devices. After every epoch
the whole state goes to `state/epoch-<n>-<digest>.pt`; the two latest are kept. Order, augmentation and dropout of an epoch follow from
(seed, epoch) alone, so an epoch that was cut short is run again with the same result.
"""

import hashlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import version

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from lib import records
from lib.analysis.inference import predict
from lib.analysis.metrics import classification_metrics
from lib.data import open_data
from lib.data.batches import evaluation_batches, count_batches, training_batches
from lib.data.nih import task_targets
from lib.losses import imbalance_loss, loss_weights
from lib.models import build_model
from lib.params import ROOT, Run

# What the weights depend on: a finished or interrupted run is carried on only while all of these stand unchanged.
IDENTITY = ("task", "backbone", "loss", "seed", "no_finding_output", "image_size", "validation_fraction", "init", "epochs", "batch_size",
            "learning_rate", "weight_decay", "warmup_steps", "final_learning_rate", "gradient_clip", "jitter", "precision", "gpus",
            "alpha", "gamma", "beta", "wbce_scheme", "cb_scale", "loss_factor")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped, what is kept and what to do."""


def train(run):
    """Train `run`, or carry it on, in this process or, for `run.gpus` > 1, under torchrun; see `fit`.

    Returns
    -------
    DataFrame
        The rows of training.csv.
    """
    if run.gpus == 1:
        return fit(run)
    resolved = run.run_folder / "resolved.json"
    records.write_json(run.model_dump(), resolved)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={run.gpus}", "-m", "lib.training", str(resolved)]
    # A session of its own, so that the workers die with this process however it ends, and a crash of theirs leaves it alive.
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
        if process.wait():
            raise TrainingError(f"torchrun ended with status {process.returncode}; its output is above")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return records.read_table(run.run_folder / "training.csv")


def fit(run):
    """Train one run, or carry on an interrupted one, and write its results.

    Writes, each whole or not at all: `run.json` (resolved parameters, versions, device, times, status), `training.csv` (a row per
    epoch), `model.safetensors` (best validation macro AUROC) and `model_last.safetensors`. A finished run returns at once.

    Parameters
    ----------
    run : lib.params.Run

    Returns
    -------
    DataFrame
        One row per epoch: epoch, learning_rate, train_loss, gradient_norm, val_loss, val_auroc, seconds, films_per_second.

    Raises
    ------
    TrainingError
        A loss that is not finite (the last good epoch's state is kept), or a validation split on which AUROC is undefined.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(run.device, int(os.environ.get("LOCAL_RANK", 0)))
    started = datetime.now(timezone.utc)
    # Weights first: an ImageNet file that cannot be fetched must stop the run before any film is decoded.
    model = build_model(run.backbone, n_outputs(run), run.init, run.seed)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    release, store = open_data(run)
    targets, classes = task_targets(release.targets, run.task, run.no_finding_output)
    rows = {split: store.rows(split) for split in ("train", "val", "test")}
    n_positive = targets[rows["train"]].sum(0, dtype=np.int64)
    weights = loss_weights(run.loss, n_positive, len(rows["train"]) - n_positive, alpha=run.alpha, gamma=run.gamma, beta=run.beta,
                           scheme=run.wbce_scheme, scale=run.cb_scale)
    identity = {**{key: getattr(run, key) for key in IDENTITY}, "films": store.fingerprint}
    record = {"status": "running", "run": run.name, "parameters": run.model_dump(), "identity": identity, "classes": classes,
              "films": {split: len(index) for split, index in rows.items()}, "n_positive_train": n_positive.tolist(),
              "loss_weights": {"positive": weights.positive.tolist(), "negative": weights.negative.tolist(), "gamma": weights.gamma, "scale": weights.scale},
              "device": device_name(device), "world_size": world, "started": started.isoformat(timespec="seconds"), **environment()}

    history = finished_history(run, identity)
    if history is not None:
        _say(rank, f"{run.name} seed {run.seed}: already trained, {len(history)} epochs")
        return history
    _check_validation(targets[rows["val"]], classes)

    low_precision = uses_bfloat16(run.precision, device)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=run.learning_rate, weight_decay=run.weight_decay, fused=device.type in ("cpu", "cuda"))
    state = latest_state(run.run_folder / "state", identity)
    history, best = [], {"val_auroc": -math.inf, "model": None}
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history, best = state["history"], state["best"]
        _say(rank, f"{run.name} seed {run.seed}: carries on after epoch {state['epoch']} of {run.epochs}")
    if rank == 0:
        records.write_json(record, run.run_folder / "run.json")
    replica = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None) if world > 1 else model

    for epoch in range(len(history) + 1, run.epochs + 1):
        clock = time.perf_counter()
        batches = training_batches(store, rows["train"], targets, image_size=run.image_size, batch_size=run.batch_size,
                                   seed=run.seed, epoch=epoch, device=device, rank=rank, world_size=world, jitter=run.jitter)
        row = _train_epoch(replica, optimizer, batches, weights, run, epoch, len(rows["train"]), low_precision, rank, world)
        if rank == 0:
            row |= _validate(model, store, rows["val"], targets, classes, weights, run, device)
            row["seconds"] = round(time.perf_counter() - clock, 2)
            row["films_per_second"] = round(len(rows["train"]) / row["seconds"], 1)
            history = [*history, row]
            if row["val_auroc"] > best["val_auroc"]:
                best = {"val_auroc": row["val_auroc"], "model": {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}}
            _say(rank, f"{run.name} seed {run.seed}: epoch {epoch}/{run.epochs}  loss {row['train_loss']:.4f}  validation loss {row['val_loss']:.4f}  "
                       f"validation AUROC {row['val_auroc']:.3f}  ({row['seconds']:.0f} s)")
            write_state({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, "history": history, "best": best,
                         "identity": identity}, run.run_folder / "state")
            records.write_table(pd.DataFrame(history), run.run_folder / "training.csv")
        if world > 1:
            dist.barrier()

    if rank == 0:
        header = {"run": run.name, "backbone": run.backbone, "task": run.task, "classes": json.dumps(classes)}
        last = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        for name, tensors in (("model_last.safetensors", last), ("model.safetensors", best["model"])):
            with records.atomic(run.run_folder / name) as temporary:
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, metadata=header)
        finished = datetime.now(timezone.utc)
        best_row = max(history, key=lambda row: row["val_auroc"])
        records.write_json({**record, "status": "finished", "finished": finished.isoformat(timespec="seconds"),
                            "train_seconds": round(sum(row["seconds"] for row in history), 1), "best_epoch": best_row["epoch"],
                            "best_val_auroc": best_row["val_auroc"]}, run.run_folder / "run.json")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return pd.DataFrame(history)


def _train_epoch(model, optimizer, batches, weights, run, epoch, n_films, low_precision, rank, world):
    model.train()
    device = next(model.parameters()).device
    steps = count_batches(n_films, run.batch_size, world)
    losses, norms, said = [], [], time.monotonic()
    # Dropout and stochastic depth, where a backbone has them, draw from torch's own generator: inside this context it follows from
    # (seed, epoch, rank), and the caller's state is put back afterwards.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence((run.seed, epoch, rank)).generate_state(1)[0]))
        for step, batch in enumerate(batches):
            rate = run.learning_rate * schedule((epoch - 1) * steps + step, run.epochs * steps, run.warmup_steps, run.final_learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=low_precision):
                logits = model(batch.images)
            loss = run.loss_factor * imbalance_loss(logits.float(), batch.targets, weights)
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), run.gradient_clip or math.inf))
            # On a GPU every look at a value waits for the device: look rarely there. The epoch's state is only written after a look.
            losses.append(loss.detach())
            if device.type == "cpu" or step % 50 == 49 or step == steps - 1:
                _check_finite(torch.stack(losses[-50:]), run, epoch, step)
            optimizer.step()
            if time.monotonic() - said > 20:
                said = time.monotonic()
                _say(rank, f"{run.name} seed {run.seed}: epoch {epoch}/{run.epochs}  step {step + 1}/{steps}  loss {losses[-1].item():.4f}")
    return {"epoch": epoch, "learning_rate": rate, "train_loss": torch.stack(losses).mean().item(), "gradient_norm": torch.stack(norms).mean().item()}


def _check_finite(losses, run, epoch, step):
    if not torch.isfinite(losses).all():
        raise TrainingError(f"{run.name} seed {run.seed}: the loss is not finite at epoch {epoch}, step {step + 1}. The state after epoch {epoch - 1} is "
                            "kept. Lower learning_rate, set gradient_clip (for example 1.0), or set precision: float32, then run again")


def _validate(model, store, rows, targets, classes, weights, run, device):
    logits = predict(model, evaluation_batches(store, rows, targets, image_size=run.image_size, batch_size=run.batch_size, device=device))
    targets = targets[rows]
    loss = run.loss_factor * imbalance_loss(torch.from_numpy(logits).double(), torch.from_numpy(targets).double(), weights)
    patients = store.films["patient"].to_numpy()[rows]
    metrics = classification_metrics(logits, targets, classes, patients, n_replicates=0).set_index("class")
    return {"val_loss": loss.item(), "val_auroc": float(metrics.loc["Average", "auroc"])}


def _check_validation(targets, classes):
    positives = targets.sum(0)
    if not ((positives > 0) & (positives < len(targets))).any():
        raise TrainingError(f"no class of {classes} has both labels among the {len(targets)} validation films, so AUROC is undefined: raise validation_fraction")


def schedule(step, total, warmup, final):
    """Share of the learning rate at `step` of `total`: a cosine from 1 to `final`, times a linear warm-up over the first `warmup` steps."""
    cosine = final + (1 - final) * (1 + math.cos(math.pi * step / total)) / 2
    return cosine * min(1.0, (step + 1) / warmup if warmup else 1.0)


def write_state(state, folder):
    """Write a generation of the training state and drop all but the two latest.

    The digest of the bytes is part of the name, so a file that was cut short or changed is never taken for a state.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with records.atomic(folder / "writing.pt") as temporary:
        torch.save(state, temporary)
        name = f"epoch-{state['epoch']:05d}-{_digest(temporary)}.pt"
    os.replace(folder / "writing.pt", folder / name)
    for old in sorted(folder.glob("epoch-*.pt"))[:-2]:
        old.unlink()


def latest_state(folder, identity):
    """The latest whole state in `folder` that belongs to `identity`, or None; what is passed over is said."""
    for path in sorted(folder.glob("epoch-*.pt"), reverse=True):
        if path.stem.rpartition("-")[2] != _digest(path):
            print(f"{path.name} is damaged and is passed over", flush=True)
            continue
        state = torch.load(path, map_location="cpu", weights_only=True)
        changed = _changed(state["identity"], identity)
        if not changed:
            return state
        print(f"the saved state was trained with other parameters ({changed}): training starts over", flush=True)
        return None
    return None


def finished_history(run, identity):
    """The rows of training.csv if `run` is finished with this very identity, else None."""
    paths = [run.run_folder / name for name in ("run.json", "training.csv", "model.safetensors", "model_last.safetensors")]
    if not all(path.is_file() for path in paths):
        return None
    record = records.read_json(paths[0])
    if record["status"] != "finished" or _changed(record["identity"], identity):
        return None
    return records.read_table(paths[1])


def _changed(old, new):
    return ", ".join(f"{key}: {old.get(key)} -> {new.get(key)}" for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key))


def _digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def n_outputs(run):
    """Logits of a run: 1 for the binary task, else 15, or 14 without 'No Finding'."""
    return 1 if run.task == "binary" else 14 + run.no_finding_output


def choose_device(name="auto", local_rank=0):
    """The torch device that a parameter names; 'auto' takes a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise TrainingError(f"device {name!r} was asked for, and torch sees no GPU: set device to auto or cpu")
    device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def device_name(device):
    """What the device is, for the record."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)


def uses_bfloat16(precision, device):
    """Whether training runs under bfloat16 autocast: 'auto' says yes only where the hardware has units for it."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def environment():
    """Host, git commit and the versions that a result depends on, for the record."""
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True, check=False)
    packages = ("torch", "torchvision", "timm", "numpy", "scikit-learn", "pandas", "opencv-python-headless", "numba")
    return {"commit": git.stdout.strip() or "unknown", "host": platform.node(), "python": platform.python_version(),
            "versions": {name: version(name) for name in packages}, "cuda": torch.version.cuda if torch.cuda.is_available() else None}


def _say(rank, text):
    if rank == 0:
        print(text, flush=True)


if __name__ == "__main__":
    fit(Run.build(json.loads(open(sys.argv[1], encoding="utf-8").read()), sys.argv[1]))
