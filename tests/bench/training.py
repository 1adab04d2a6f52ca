"""Training on a GPU: an epoch as `lib.training` trains it, beside the same loop on one batch that lies on the device.

Wall time counts, for a GPU does not spend the processor's. Without one there is nothing to measure: on two cores the
step is all there is.
"""

import time
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

from lib import training
from lib.data.batches import count_batches
from lib.losses import make_loss
from lib.models import build_model
from lib.params import load_study
from tests.bench.timing import rates

N_CLASSES = 15


def epoch_times(backbone, device, *, n_films=8192, repeats=3, **changes):
    """Images a second of an epoch of the recipe of params/studies/nih.yaml, films in memory: data and loop, and loop
    alone."""
    run = load_study("nih", data_root=".").run(f"multilabel-{backbone}-bce", 0).model_copy(update=changes)
    rng = np.random.default_rng(0)
    store = SimpleNamespace(
        size=run.store_size, images=rng.integers(0, 256, (n_films, *2 * (run.store_size,)), np.uint8)
    )
    targets = rng.random((n_films, N_CLASSES)).round().astype(np.float32)
    model = build_model(backbone, N_CLASSES, "scratch", 0).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=run.learning_rate, fused=True)
    criterion = make_loss("bce", targets.sum(0), n_films - targets.sum(0), run)
    low_precision = device.type == "cuda"
    given = (model, optimizer, store, np.arange(n_films), targets, criterion, run, 1, low_precision, 0, 1)
    batches = training.training_batches

    def still(*arguments, **options):
        batch = next(batches(*arguments, **options))
        return (batch for _ in range(count_batches(n_films, run.batch_size)))

    def seconds(of):
        with mock.patch.object(training, "training_batches", of):
            start = time.perf_counter()
            training._train_epoch(*given)  # it ends with a look at the loss, which waits for the device
            return time.perf_counter() - start

    seconds(still)
    ours, peer = (min(times) for times in zip(*((seconds(batches), seconds(still)) for _ in range(repeats))))
    return rates(f"training, {backbone} (images/s)", "same loop, one batch", n_films, ours, peer, note="goal 0.90")


def rows():
    """A row a backbone; without a GPU it is said that there is none."""
    if not torch.cuda.is_available():
        print("not measured: training beside the same loop on one batch, for torch sees no GPU", flush=True)
        return
    for backbone in ("resnet50", "tdensenet"):
        yield epoch_times(backbone, torch.device("cuda"))
