"""Training and metrics of one run."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.special import expit

from lib.figures.style import DASHED, GREY, LIGHT_RIM, NEUTRAL, STYLE, YELLOW, class_panels, grid, legend, new_figure


@STYLE
def training_curves(history: pd.DataFrame, *, kept_epoch: int | None = None, data_label: str) -> Figure:
    """Loss and macro validation AUROC by epoch. `history` : epoch, train_loss, val_auroc, optionally val_loss."""
    figure = new_figure(2.4, data_label)
    left, right = figure.subplots(1, 2)
    dots = {"color": NEUTRAL, "marker": "o", "markersize": 2.5}
    handles = left.plot(history["epoch"], history["train_loss"], label="training", **dots)
    right.plot(history["epoch"], history["val_auroc"], **dots)
    if "val_loss" in history:
        squares = dots | {"color": YELLOW, "marker": "s"}
        handles += left.plot(history["epoch"], history["val_loss"], label="validation", **squares)
    if kept_epoch is not None:
        right.axvline(kept_epoch, **DASHED)
        text = {"fontsize": 7, "color": GREY, "ha": "right" if kept_epoch > history["epoch"].mean() else "left"}
        right.annotate("  weights kept  ", (kept_epoch, 0.03), xycoords=("data", "axes fraction"), **text)
    left.set(xlabel="Epoch", ylabel="Loss")
    right.set(xlabel="Epoch", ylabel="Macro AUROC, validation")
    for ax in (left, right):
        ax.set_xlim(history["epoch"].min() - 0.5, history["epoch"].max() + 0.5)
        ax.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10), integer=True, min_n_ticks=1))
        grid(ax, "both")
    legend(figure, handles)
    return figure


@STYLE
def class_curves(predictions: pd.DataFrame, kind: str, *, data_label: str) -> Figure:
    """ROC (`kind` 'roc') or precision-recall ('pr') curves, a panel per class under its AUROC or AP; dashed: chance.

    `predictions` : class, target (0/1), logit. A class with one label only has no curve and says so.
    """
    if kind not in ("roc", "pr"):
        raise ValueError(f"kind = {kind!r}: 'roc' or 'pr'")
    x, y = ("False positive rate", "True positive rate") if kind == "roc" else ("Recall", "Precision")
    figure, axes = class_panels(predictions, x, y, data_label)
    steps = {"roc": "default", "pr": "steps-post"}[kind]
    for ax, rows in axes:
        prevalence = rows["target"].mean()
        ax.plot((0, 1), (0, 1) if kind == "roc" else (prevalence, prevalence), **DASHED)
        ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        if prevalence in (0, 1):
            ax.text(0.5, 0.5, "one label only", transform=ax.transAxes, ha="center", fontsize=7, path_effects=LIGHT_RIM)
            continue
        x, y, value = _curve(rows["target"].to_numpy(), rows["logit"].to_numpy(), kind)
        ax.plot(x, y, color=NEUTRAL, linewidth=1, drawstyle=steps)
        name = {"roc": "AUROC", "pr": "AP"}[kind]
        ax.set_title(f"{ax.get_title()}\n{name} {value:.2f}")
    return figure


def _curve(target: np.ndarray, logit: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, float]:
    # Imported here: scikit-learn costs half a second, and most notebooks draw no such curve.
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

    if kind == "roc":
        x, y = roc_curve(target, logit)[:2]
        value = roc_auc_score(target, logit)
    else:
        # The last point (0, 1) is a convention, not a measurement.
        y, x = (part[:-1] for part in precision_recall_curve(target, logit)[:2])
        value = average_precision_score(target, logit)
    # A vector file of 25,000 points a curve serves nobody.
    keep = np.unique(np.linspace(0, len(x) - 1, 400).round().astype(int))
    return x[keep], y[keep], value


@STYLE
def reliability(predictions: pd.DataFrame, *, bins: int = 8, data_label: str) -> Figure:
    """Observed share of positives against predicted probability, a panel per class on its own scale; on the dashed line
    they agree.

    `predictions` : class, target (0/1), logit. `bins` of equally many films each, with 95 % (Jeffreys)
    intervals.
    """
    from scipy.stats import beta

    figure, axes = class_panels(predictions, "Mean prediction", "Share positive", data_label)
    dots = {"color": NEUTRAL, "marker": "o", "markersize": 2.8, "linewidth": 0.9, "markeredgewidth": 0}
    for ax, rows in axes:
        rows = rows.sort_values("logit")
        parts = np.array_split(rows["target"].to_numpy(), min(bins, len(rows)))
        k, n = np.array([part.sum() for part in parts]), np.array([len(part) for part in parts])
        x = [part.mean() for part in np.array_split(expit(rows["logit"].to_numpy(np.float64)), len(parts))]
        low, high = beta.ppf([[0.025], [0.975]], k + 0.5, n - k + 0.5)
        ax.vlines(x, low, high, color=NEUTRAL, linewidth=0.7, alpha=0.6)
        ax.plot(x, k / n, **dots)
        reach = max(*x, *high)
        top = next(limit for limit in (0.05, 0.1, 0.2, 0.5, 1) if reach <= limit)
        ax.plot((0, 1), (0, 1), **DASHED)
        ax.set(xlim=(-0.03 * top, 1.03 * top), ylim=(-0.03 * top, 1.03 * top))
        ax.set_xticks((0, top), ("0", f"{top:g}"))
        ax.set_yticks((0, top), ("0", f"{top:g}"))
    return figure
