"""The names that tables and figures print, and their order. Losses and localization metrics are named where they are
computed."""

import pandas as pd

from lib.analysis import alignment, localization
from lib.losses import LOSSES as _LOSSES

TASKS = {"multilabel": "Multi-label", "binary": "Binary"}
BACKBONES = {"tdensenet": "T-DenseNet", "resnet50": "ResNet50"}
LOSSES = {name: loss.label for name, loss in _LOSSES.items()}
METRICS = {
    **{"auroc": "AUROC", "ap": "AP", "mean_probability": "Mean probability"},
    **{name: metric.label for name, metric in localization.METRICS.items()},
    **{name: score.label for name, score in alignment.scores().items()},
    **{"disjoint": "Disjoint", "unique": "Unique"},
    **{"iou_tuned": "IoU, tuned threshold", "empty": "Empty maps", "ior_zero": "IoR, empty maps as 0"},
    **{f"auprc_{method}": f"Pixel AUPRC of {method.upper()}" for method in ("lrp", "rap")},
    **{f"iou_tuned_{method}": f"IoU of {method.upper()}, tuned threshold" for method in ("lrp", "rap")},
    **{"consistency_gradpp": "Grad++'s correlation with the logit", "auroc_principal": "AUROC, principal features"},
}
# What stands in the place of a loss, or of BCE, where a control or a rival does.
CONTROLS = {
    "untrained": "Untrained",
    "shuffled": "BCE, shuffled labels",
    "other_film": "BCE, boxes of another film",
    "shifted_bce": "BCE and a constant",
    "trunk": "no part of the trunk",
    "head": "no part of the head",
    "cam": "CAM",
    "individual_scale": "scales of their own",
    "all_features": "all features",
}
MISSING = "—"


def display(name: str) -> str:
    """The name to print for a task, backbone, loss, metric or control id; an unknown id is printed as it is."""
    for names in (TASKS, BACKBONES, LOSSES, METRICS, CONTROLS):
        if name in names:
            return names[name]
    return name


def class_name(name: str) -> str:
    """A class as it is printed, without underscores."""
    return str(name).replace("_", " ")


def ordered(known: dict[str, str], present: pd.Series) -> list[str]:
    """The paper's ids in the paper's order, then whatever else is present in order of appearance."""
    return list(known) + [str(name) for name in present.unique() if name not in known]
