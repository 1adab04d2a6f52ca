"""Training and metrics of one run, or with a column loss of several."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.special import expit

from lib.figures.style import DASHED, GREY, LIGHT_RIM, STYLE, YELLOW, by_loss, class_panels, grid, legend, new_figure


@STYLE
def training_curves(history: pd.DataFrame, *, kept_epoch: int | None = None, data_label: str) -> Figure:
    """Loss and macro validation AUROC by epoch. `history` : epoch, train_loss, val_auroc; optionally val_loss, or loss
    for several runs."""
    figure = new_figure(2.4, data_label)
    left, right = figure.subplots(1, 2)
    groups, handles = by_loss(history), []
    for style, label, rows in groups:
        handles += left.plot(rows["epoch"], rows["train_loss"], markersize=2.5, label=label or "training", **style)
        right.plot(rows["epoch"], rows["val_auroc"], markersize=2.5, **style)
        if "val_loss" in rows and not label:
            handles += left.plot(
                rows["epoch"], rows["val_loss"], color=YELLOW, marker="s", markersize=2.5, label="validation"
            )
    if kept_epoch is not None:
        right.axvline(kept_epoch, **DASHED)
        right.annotate(
            "  weights kept  ",
            (kept_epoch, 0.03),
            xycoords=("data", "axes fraction"),
            fontsize=7,
            color=GREY,
            ha="right" if kept_epoch > history["epoch"].mean() else "left",
        )
    left.set(xlabel="Epoch", ylabel="Loss")
    if len(groups) > 1:
        left.set(yscale="log", ylabel="Training loss (scales differ)")
    right.set(xlabel="Epoch", ylabel="Macro AUROC, validation")
    for ax in (left, right):
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        grid(ax, "both")
    legend(figure, handles)
    return figure


@STYLE
def class_curves(predictions: pd.DataFrame, kind: str, *, data_label: str) -> Figure:
    """ROC (`kind` 'roc') or precision-recall ('pr') curves, a panel per class with AUROC or AP in it; dashed: no skill.

    `predictions` : class, target (0/1), logit, optionally loss (a curve each). A class with one label only has no curve
    and says so.
    """
    if kind not in ("roc", "pr"):
        raise ValueError(f"kind = {kind!r}: 'roc' or 'pr'")
    x, y = ("False positive rate", "True positive rate") if kind == "roc" else ("Recall", "Precision")
    (figure, axes), handles = class_panels(predictions, x, y, data_label), []
    for ax, rows in axes:
        prevalence = rows["target"].mean()
        ax.plot((0, 1), (0, 1) if kind == "roc" else (prevalence, prevalence), **DASHED)
        ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        if prevalence in (0, 1):
            ax.text(0.5, 0.5, "one label only", transform=ax.transAxes, ha="center", fontsize=7, path_effects=LIGHT_RIM)
            continue
        groups = by_loss(rows)
        for i, (style, label, group) in enumerate(groups):
            x, y, value = _curve(group["target"].to_numpy(), group["logit"].to_numpy(), kind)
            colour, height = style["color"], 0.04 + 0.13 * (len(groups) - 1 - i)
            place = (1, height) if kind == "roc" else (0.02, height + min(prevalence, 0.4))
            handles += ax.plot(
                x,
                y,
                color=colour,
                linewidth=1,
                drawstyle="default" if kind == "roc" else "steps-post",
                label=label or "_",
            )
            ax.text(
                *place,
                f"{value:.2f}",
                ha="right" if kind == "roc" else "left",
                fontsize=7,
                color=colour,
                path_effects=LIGHT_RIM,
            )
    legend(figure, handles)
    return figure


def _curve(target: np.ndarray, logit: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, float]:
    # Imported here: scikit-learn costs half a second, and most notebooks draw no such curve.
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

    if kind == "roc":
        x, y = roc_curve(target, logit)[:2]
        value = roc_auc_score(target, logit)
    else:
        y, x = (
            part[:-1] for part in precision_recall_curve(target, logit)[:2]
        )  # its last point (0, 1) is a convention, not a measurement
        value = average_precision_score(target, logit)
    keep = np.unique(
        np.linspace(0, len(x) - 1, 400).round().astype(int)
    )  # a vector file of 25,000 points a curve serves nobody
    return x[keep], y[keep], value


@STYLE
def reliability(predictions: pd.DataFrame, *, bins: int = 8, data_label: str) -> Figure:
    """Observed share of positives against predicted probability, a panel per class on its own scale; on the dashed line
    they agree.

    `predictions` : class, target (0/1), logit, optionally loss. `bins` of equally many films each, with 95 % (Jeffreys)
    intervals.
    """
    from scipy.stats import beta

    figure, axes = class_panels(predictions, "Mean prediction", "Share positive", data_label)
    handles = []
    for ax, class_rows in axes:
        reach = 0.0
        for style, label, rows in by_loss(class_rows):
            rows = rows.sort_values("logit")
            parts = np.array_split(rows["target"].to_numpy(), min(bins, len(rows)))
            k, n = np.array([part.sum() for part in parts]), np.array([len(part) for part in parts])
            x = np.array(
                [part.mean() for part in np.array_split(expit(rows["logit"].to_numpy(np.float64)), len(parts))]
            )
            low, high = beta.ppf([[0.025], [0.975]], k + 0.5, n - k + 0.5)
            ax.vlines(x, low, high, color=style["color"], linewidth=0.7, alpha=0.6)
            handles += ax.plot(x, k / n, markersize=2.8, linewidth=0.9, markeredgewidth=0, label=label or "_", **style)
            reach = max(reach, x.max(), (k / n).max())
        top = next(limit for limit in (0.05, 0.1, 0.2, 0.5, 1) if reach <= limit)
        ax.plot((0, 1), (0, 1), **DASHED)
        ax.set(xlim=(-0.03 * top, 1.03 * top), ylim=(-0.03 * top, 1.03 * top))
        ax.set_xticks((0, top), ("0", f"{top:g}"))
        ax.set_yticks((0, top), ("0", f"{top:g}"))
    legend(figure, handles)
    return figure
