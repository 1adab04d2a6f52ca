"""A small study for the page: random weights in finished runs, and the tables that the notebooks would have written."""

import itertools

import pandas as pd
import torch
from safetensors.torch import save_file

from lib import records
from lib.analysis.alignment import align
from lib.analysis.trunk_head import predict_heads
from lib.models import build_model
from lib.params import Study
from lib.runs import OpenStudy
from lib.state import labels_digest

LOSSES = ["bce", "wbce", "focal", "cb_focal"]
EMPTY = "Effusion"  # focal's maps of it hold nothing above zero
RUNS = [*(f"multilabel-tdensenet-{loss}" for loss in LOSSES), "binary-tdensenet-bce", "multilabel-resnet50-bce"]


def open_small(release, name):
    """Of the six runs the first five are finished; the first has gone through notebook 09 with focal."""
    own = {"image_size": 32, "validation_fraction": 0.3, "init": "scratch", "annotated": "all", "device": "cpu"}
    study = Study.build({"study": name, "runs": RUNS, "release": "nih", "data_root": str(release), **own})
    opened = OpenStudy(study)
    for seed, run in enumerate(study.every_run[:-1]):
        model = build_model(run.backbone, run.n_outputs, "scratch", seed)
        if run.loss == "focal":
            model.head.weight.data[opened.release.classes.index(EMPTY)] = -1
        run.run_folder.mkdir(parents=True)
        save_file(model.state_dict(), run.weights_path)
        identity = run.identity | {"labels": labels_digest(opened.films)}
        record = {"status": "finished", "parameters": run.model_dump(), "identity": identity}
        records.write_json(record, run.run_folder / "run.json")
        subject = opened.subject(run)
        outputs = subject.outputs(subject.pairs["row"].unique(), subject.layer)
        table = align(outputs, subject.pairs, subject.model.head, layer=subject.layer, image_size=run.image_size)
        records.write_table(table, subject.path("cam_alignment.parquet"))
    _trunk_and_head(opened)
    return opened


def _trunk_and_head(opened):
    bce, focal = (opened.subject(f"multilabel-tdensenet-{loss}") for loss in ("bce", "focal"))
    aligned = records.read_table(bce.path("cam_alignment.parquet")).assign(hit=0.0, auprc=0.5, iobb_minmax=0.5)
    rows = bce.rows("all")
    drawn = torch.rand((len(rows), bce.model.head.in_features), generator=torch.Generator().manual_seed(0)).numpy()
    heads, tables = {"bce": bce.model.head, "focal": focal.model.head, "trained": bce.model.head}, []
    for trunk, head in itertools.product(("bce", "focal"), heads):
        share = {"bce": 1, "focal": 0.5}[trunk] * {"bce": 1, "focal": 0.8, "trained": 0.9}[head]
        tables.append(aligned.assign(trunk=trunk, head=head, iobb=aligned["iobb"] * share))
    predicted = predict_heads(drawn, opened.films.loc[rows], bce.targets[rows], bce.classes, heads)
    predictions = pd.concat([predicted.assign(trunk=trunk) for trunk in ("bce", "focal")])
    records.write_table(pd.concat(tables), bce.path("trunk_head.parquet"))
    records.write_table(predictions, bce.path("trunk_head_predictions.parquet"))
