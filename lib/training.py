"""Training of one run: a plain loop that can be killed at any moment and carries on to the same bits.

`fit` trains in this process; `train` calls it, or starts torchrun on this module where a run has several devices. After
every epoch the whole state is written (`lib.state`), while the next one trains. Order, augmentation and dropout of an
epoch follow from (seed, epoch) alone, so an epoch that was cut short is run again with the same result.
"""

import json
import math
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from safetensors.torch import save
from torch.nn.parallel import DistributedDataParallel

from lib import records
from lib.analysis.inference import predict
from lib.analysis.metrics import classification_metrics
from lib.data import open_data
from lib.data.batches import count_batches, evaluation_batches, training_batches
from lib.data.noise import learnt_targets
from lib.data.release import task_targets
from lib.devices import choose_device, device_name, gpu_names, hold_gpus, uses_bfloat16
from lib.locks import exclusive
from lib.losses import make_loss
from lib.models import build_model, read_weights, weights_digest
from lib.params import PLAN, ROOT, Run
from lib.state import (
    WEIGHTS,
    TrainingError,
    digest,
    discard_rest,
    environment,
    finish,
    finished_history,
    is_trained,
    labels_digest,
    latest_state,
    require_place,
    snapshot,
    verify_weights,
    weights_on_record,
    write_state,
)

# The files that decide what training computes. Their digests go on record; an edited comment must not cost a finished
# run, so a change is only said.
CODE = ("training.py", "models.py", "losses.py", "data/batches.py", "data/augment.py")


def train(run: Run) -> pd.DataFrame:
    """Train `run`, or carry it on, in this process or, for `run.gpus` > 1, under torchrun; see `fit`.

    With `init: phantom` the pretext run is trained first, where that has not been done. It stands in for ImageNet: as
    in the paper all runs of a backbone start from the same features, learnt with plain cross-entropy on other images,
    here simulated films of other patients.

    Returns
    -------
    DataFrame
        The rows of training.csv.
    """
    if run.init == "phantom" and not is_trained(run.pretext):
        start = run.pretext
        print(
            f"{run.name}: init is phantom, so the common start of all {run.backbone} runs is trained first, once: "
            f"{start.epochs} epochs on {start.phantom_films} simulated films of other patients, in {start.folder}. "
            "Without it: init: imagenet, scratch or a weights file",
            flush=True,
        )
        train(start)
    if run.gpus == 1:
        return fit(run)
    resolved = run.run_folder / "resolved.json"
    records.write_json(run.model_dump(), resolved)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={run.gpus}",
        "-m",
        "lib.training",
        str(resolved),
        LIFELINE,
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | _own_gpus(run),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
        if process.wait():
            raise TrainingError(f"torchrun ended with status {process.returncode}; its output is above")
    finally:
        process.stdin.close()
        process.kill()
        process.wait()
    return records.read_table(run.run_folder / "training.csv")


# The workers read a pipe that this process never writes to: when it closes, because this process ended or was killed,
# they end too.
LIFELINE = "--until-stdin-closes"


def _hold_lifeline():
    os.read(0, 1)
    os._exit(1)


def _own_gpus(run):
    """The environment in which torchrun sees `run.gpus` GPUs that no other run holds; nothing to set on other
    devices."""
    if run.device not in ("auto", "cuda") or not torch.cuda.is_available():
        return {}
    names = gpu_names()
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[index] for index in hold_gpus(run.gpus))}


def fit(run: Run) -> pd.DataFrame:
    """Train one run, or carry on an interrupted one, and write its results.

    Writes, each whole or not at all: `run.json` (resolved parameters, versions, device, times, status), `training.csv`
    (a row per epoch), `model.safetensors` (best validation macro AUROC) and `model_last.safetensors`. A finished run
    returns at once.

    Parameters
    ----------
    run : lib.params.Run

    Returns
    -------
    DataFrame
        One row per epoch: epoch, learning_rate, train_loss, gradient_norm, val_loss, val_auroc, seconds,
        films_per_second.

    Raises
    ------
    TrainingError
        A loss that is not finite (the last good epoch's state is kept), or a validation split on which AUROC is
        undefined.
    """
    # Another launcher's variables are not ours: with them a run of one process would wait for peers for ever.
    rank, world = (int(os.environ.get(key, n)) if run.gpus > 1 else n for key, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    require_place(run)
    device = choose_device(run.device, int(os.environ["LOCAL_RANK"]) if world > 1 else None)
    # Weights first: an ImageNet file that cannot be fetched must stop the run before any film is decoded.
    if run.init == "phantom":
        verify_weights(run.pretext, run.init_path.name)
    init = str(run.init_path) if run.init_path else run.init
    model = build_model(run.backbone, run.n_outputs, init, run.seed)
    with ExitStack() as held:
        if rank == 0:
            try:
                run.run_folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(
                    exclusive(
                        run.run_folder / ".lock",
                        f"{run.name} seed {run.seed}: another process trains it; waiting for its result",
                    )
                )
            except OSError as error:
                fault = f"{run.run_folder} cannot be written ({error.strerror}: {error.filename})"
                if not is_trained(run):
                    raise TrainingError(f"{fault}: name another folder by the environment variable OUTPUTS") from error
                verify_weights(run)
                _say(rank, f"{run.name} seed {run.seed}: already trained; {fault}, so its films are not looked at")
                return records.read_table(run.run_folder / "training.csv")
        if world > 1:
            # The other ranks wait here for the one that waits for the lock, and at the end of each epoch for the one
            # that validates.
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=7))
        beside = held.enter_context(ThreadPoolExecutor(1))
        history = _fit(run, model, init, device, rank, world, beside)
        if world > 1:
            dist.destroy_process_group()
    return history


def _fit(run, model, init, device, rank, world, beside):
    started = datetime.now(UTC)
    release, store = open_data(run)
    targets, classes = task_targets(release.targets, run.task, run.no_finding_output)
    rows = {split: store.rows(split) for split in ("train", "val", "test")}
    learnt = learnt_targets(release.targets, rows["train"], run)
    n_positive = learnt[rows["train"]].sum(0, dtype=np.int64)
    criterion = make_loss(run.loss, n_positive, len(rows["train"]) - n_positive, run)
    identity = run.identity | {
        "films": store.digest,
        "labels": labels_digest(release.films),
        "initial_weights": weights_digest(read_weights(init)) if run.init_path else init,
    }
    code = {name: digest(Path(__file__).parent / name) for name in CODE}
    record = {
        "status": "running",
        "run": run.name,
        "code": code,
        "parameters": run.model_dump(),
        "identity": identity,
        "classes": classes,
        "films": {split: len(index) for split, index in rows.items()},
        "n_positive_train": n_positive.tolist(),
        "loss_weights": criterion.constants,
        "device": device_name(device),
        "world_size": world,
        "started": started.isoformat(timespec="seconds"),
        "plan": digest(PLAN) if PLAN.is_file() else "none",
        **environment(),
    }

    history = finished_history(run, identity, publish=rank == 0)
    if history is not None:
        _say(rank, f"{run.name} seed {run.seed}: already trained, {len(history)} epochs")
        _say_of_code(records.read_json(run.run_folder / "run.json").get("code", code), code, run, run.run_folder, rank)
        return history
    if rank == 0:
        store.verify()
    _check_validation(targets[rows["val"]], classes)

    low_precision = uses_bfloat16(run.precision, device)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=run.learning_rate, weight_decay=run.weight_decay, fused=device.type in ("cpu", "cuda")
    )
    state = latest_state(run.run_folder / "state", identity)
    if world > 1:
        dist.barrier()
    if rank == 0:
        discard_rest(run.run_folder, state)
    history, best = [], {"val_auroc": -math.inf, "model": None}
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history, best = state["history"], state["best"]
        # What trained the epochs so far stays on record: commit, versions, host, device.
        record = {
            **state["record"],
            "resumed": [
                *state["record"].get("resumed", []),
                {**environment(), "at": started.isoformat(timespec="seconds")},
            ],
        }
        _say(rank, f"{run.name} seed {run.seed}: carries on after epoch {state['epoch']} of {run.epochs}")
        _say_of_code(record["code"], code, run, run.run_folder / "state", rank)
    if rank == 0:
        records.write_json(record, run.run_folder / "run.json")
    replica = model
    if world > 1:
        replica = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    written = beside.submit(bool)  # nothing yet
    every = [(one.name, one.seed) for one in run.every_run]
    if (run.name, run.seed) in every:
        place = f"run {every.index((run.name, run.seed)) + 1} of {len(every)} of study {run.study}"
        _say(rank, f"{run.name} seed {run.seed}: {place}, {run.epochs} epochs on {device_name(device)}")

    for epoch in range(len(history) + 1, run.epochs + 1):
        clock = time.perf_counter()
        row = _train_epoch(
            replica, optimizer, store, rows["train"], learnt, criterion, run, epoch, low_precision, rank, world
        )
        if rank == 0:
            row |= _validate(model, store, rows["val"], targets, classes, criterion, run, epoch, device)
            row["seconds"] = round(time.perf_counter() - clock, 2)
            row["films_per_second"] = round(len(rows["train"]) / row["seconds"], 1)
            history = [*history, row]
            if row["val_auroc"] > best["val_auroc"]:
                weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
                best = {"val_auroc": row["val_auroc"], "model": weights}
            _say(
                rank,
                f"{run.name} seed {run.seed}: epoch {epoch}/{run.epochs}  loss {row['train_loss']:.4f}  validation "
                f"loss {row['val_loss']:.4f}  "
                f"validation AUROC {row['val_auroc']:.3f}  ({row['seconds']:.0f} s)",
            )
            state = snapshot({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
            state |= {"epoch": epoch, "history": history, "best": best, "identity": identity, "record": record}
            written.result()
            written = beside.submit(_write_epoch, state, run.run_folder)
        if world > 1:
            dist.barrier()

    if rank == 0:
        written.result()
        records.write_table(pd.DataFrame(history), run.run_folder / "training.csv")
        said = {"run": run.name, "backbone": run.backbone, "task": run.task, "classes": classes}
        header = {"run": json.dumps(said)}  # one key: safetensors writes several in an order of chance
        last = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        for name, tensors in zip(WEIGHTS, (best["model"], last), strict=True):
            tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
            with records.atomic(run.run_folder / name) as temporary:
                temporary.write_bytes(save(tensors, metadata=header))
        best_row = max(history, key=lambda row: row["val_auroc"])
        record |= {
            "status": "finished",
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "train_seconds": round(sum(row["seconds"] for row in history), 1),
            "best_epoch": best_row["epoch"],
            "best_val_auroc": best_row["val_auroc"],
            "weights": weights_on_record(run),
        }
        finish(run, record, history)
    if world > 1:
        dist.barrier()
    return pd.DataFrame(history)


def _write_epoch(state, run_folder):
    write_state(state, run_folder / "state")
    records.write_table(pd.DataFrame(state["history"]), run_folder / "training.csv")


def _train_epoch(model, optimizer, store, rows, targets, criterion, run, epoch, low_precision, rank, world):
    model.train()
    device = next(model.parameters()).device
    steps = count_batches(len(rows), run.batch_size, world)
    keys = ("image_size", "batch_size", "seed", "jitter", "flip", "augmentation")
    options = {key: getattr(run, key) for key in keys} | {"epoch": epoch, "device": device, "rank": rank}
    batches = training_batches(store, rows, targets, world_size=world, **options)
    losses, norms, said = [], [], time.monotonic()
    # Dropout and stochastic depth, where a backbone has them, draw from torch's own generator: inside this context it
    # follows from (seed, epoch, rank), and the caller's state is put back afterwards.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence((run.seed, epoch, rank)).generate_state(1)[0]))
        for step, batch in enumerate(batches):
            rate = run.learning_rate * schedule(
                (epoch - 1) * steps + step, run.epochs * steps, run.warmup_steps, run.final_learning_rate
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=low_precision):
                logits = model(batch.images)
            loss = run.loss_factor * criterion(logits.float(), batch.targets).mean()
            loss.backward()
            norm = torch.nn.utils.get_total_norm(
                [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            )
            if run.gradient_clip:
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), run.gradient_clip, norm)
            norms.append(norm)
            # On a GPU every look at a value waits for the device: look rarely there. The epoch's state is only written
            # after a look.
            losses.append(loss.detach())
            if device.type == "cpu" or step % 50 == 49 or step == steps - 1:
                _check_finite(torch.stack(losses[-50:] + norms[-50:]), run, epoch, f"step {step + 1}")
            optimizer.step()
            if time.monotonic() - said > 20:
                said = time.monotonic()
                _say(
                    rank,
                    f"{run.name} seed {run.seed}: epoch {epoch}/{run.epochs}  step {step + 1}/{steps}  loss "
                    f"{losses[-1].item():.4f}",
                )
    mean_loss = torch.stack(losses).mean()
    if world > 1:
        dist.all_reduce(mean_loss)
    return {
        "epoch": epoch,
        "learning_rate": rate,
        "train_loss": mean_loss.item() / world,
        "gradient_norm": torch.stack(norms).mean().item(),
    }


def _check_finite(values, run, epoch, where):
    if not torch.isfinite(values).all():
        kept = f"The state after epoch {epoch - 1} is kept" if epoch > 1 else "No epoch was finished"
        raise TrainingError(
            f"{run.name} seed {run.seed}: the loss or its gradient is not finite at epoch {epoch}, {where}. {kept}. "
            "Lower learning_rate, set gradient_clip (for example 1.0), or set precision: float32, then run again"
        )


def _validate(model, store, rows, targets, classes, criterion, run, epoch, device):
    options = {"image_size": run.image_size, "batch_size": run.batch_size, "device": device}
    logits, targets = predict(model, evaluation_batches(store, rows, targets, **options)), targets[rows]
    loss = run.loss_factor * criterion(torch.from_numpy(logits).double(), torch.from_numpy(targets).double()).mean()
    _check_finite(loss, run, epoch, "on the validation films")
    patients = store.films["patient"].to_numpy()[rows]
    metrics = classification_metrics(logits, targets, classes, patients, n_replicates=0).set_index("class")
    return {"val_loss": loss.item(), "val_auroc": float(metrics.loc["Average", "auroc"])}


def _check_validation(targets, classes):
    positives = targets.sum(0)
    if not ((positives > 0) & (positives < len(targets))).any():
        raise TrainingError(
            f"no class of {classes} has both labels among the {len(targets)} validation films, so AUROC is undefined: "
            "raise validation_fraction"
        )


def schedule(step: int, total: int, warmup: int, final: float) -> float:
    """Share of the learning rate at `step` of `total`: a cosine from 1 to `final`; over the first `warmup` steps times
    a line from 0.01 to 1, as the authors' code warms up."""
    cosine = final + (1 - final) * (1 + math.cos(math.pi * step / total)) / 2
    return cosine * (1 - 0.99 * max(0.0, 1 - step / warmup) if warmup else 1.0)


def _say_of_code(old, new, run, folder, rank):
    if old != new:
        changed = ", ".join(sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name)))
        text = f"trained by another version of the training code ({changed}), and kept. To train anew, delete {folder}"
        _say(rank, f"{run.name} seed {run.seed}: {text}")


def _say(rank, text):
    if rank == 0:
        print(text, flush=True)


if __name__ == "__main__":
    if LIFELINE in sys.argv:
        threading.Thread(target=_hold_lifeline, daemon=True).start()
    fit(Run.build(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), sys.argv[1]))
