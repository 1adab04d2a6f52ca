"""All runs of a study together: Khakzar et al., Figures 1 and 2."""

from collections.abc import Sequence
from itertools import product

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lib.figures.style import (
    DARK_RIM,
    DASHED,
    FILM_GREY,
    GREY,
    HEAT,
    INK,
    STYLE,
    WIDTH,
    class_name,
    grid,
    legend,
    loss_styles,
    new_figure,
    present,
    show_film,
)
from lib.tables.names import BACKBONES, LOSSES, display


@STYLE
def cam_grid(
    films: np.ndarray,
    cams: np.ndarray,
    boxes: Sequence,
    classes: Sequence[str],
    probabilities: np.ndarray,
    *,
    losses: Sequence[str] = tuple(LOSSES),
    data_label: str,
) -> Figure:
    """Khakzar et al., Fig. 1: a row per film, the film with its boxes, then the class activation map of every loss, on
    one scale.

    Parameters
    ----------
    films : uint8 (R, S, S).
    cams : float (R, L, h, w) in [0, 1] over the whole film; NaN where there is no run.
    boxes : R sequences of (x1, y1, x2, y2) in pixels of S, ends exclusive.
    classes, probabilities : the class of each row, and (R, L) what each run predicts for it (NaN: not printed).
    losses : L ids, the columns.

    Raises
    ------
    ValueError : the arguments do not agree on R and L.
    """
    rows, columns = cams.shape[:2]
    fit = len(films) == len(boxes) == len(classes) == rows and len(losses) == columns
    if not fit or np.shape(probabilities) != (rows, columns):
        what = "films, boxes, classes, losses or probabilities"
        raise ValueError(f"cams are {rows} films x {columns} losses; {what} do not match")
    title_lines = sum(1 + (len(class_name(name)) > 14) for name in classes)
    side = min((WIDTH - 0.65) / (columns + 1), 1.8)
    figure = new_figure(rows * (side + 0.02) + 0.14 * title_lines + 0.4, data_label, side * (columns + 1) + 0.65)
    axes = figure.subplots(rows, columns + 1, squeeze=False)
    size = films.shape[-1]
    shown = {"cmap": HEAT, "vmin": 0, "vmax": 1, "extent": (0, size, size, 0), "interpolation": "bilinear"}
    for i, j in product(range(rows), range(columns + 1)):
        ax, title = axes[i, j], class_name(classes[i])
        show_film(ax, films[i], boxes[i])
        if j and np.isfinite(cams[i, j - 1]).all():
            ax.imshow(cams[i, j - 1], zorder=0.5, **shown)
        elif j:
            ax.text(size / 2, size / 2, "no run", ha="center", color="white", path_effects=DARK_RIM)
        if j and np.isfinite(probabilities[i, j - 1]):
            title += ("\n" if len(title) > 14 else " ") + f"p={probabilities[i, j - 1]:.2f}"
        ax.set_title(title, fontsize=7, pad=2)
    headings = {"Film and boxes": INK} | {display(loss): style["color"] for loss, style in loss_styles(losses).items()}
    above = (0, 23 if len(class_name(classes[0])) > 14 else 13), "axes fraction", "offset points"
    for ax, (name, colour) in zip(axes[0], headings.items()):
        ax.annotate(name, (0.5, 1), *above, ha="center", weight="bold", color=colour)
    scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 1), HEAT)
    bar = figure.colorbar(scale, ax=axes, fraction=0.02, pad=0.01, aspect=30, shrink=0.8 if rows > 1 else 1)
    bar.set_label("class activation" if rows == 1 else "class activation, each map scaled to [0, 1]")
    bar.ax.set_facecolor(FILM_GREY)
    return figure


@STYLE
def performance(results: pd.DataFrame, *, data_label: str) -> Figure:
    """Khakzar et al., Fig. 2: AUROC, AP and mean predicted probability by loss, class and on average; one row of panels
    per backbone.

    `results` : a row per task, backbone, loss, class and metric ('auroc', 'ap', 'mean_probability') with value, ci_low,
    ci_high (NaN: no bar) and optionally prevalence. Classes keep their order; 'Average...' (multi-label) and
    'Unhealthy' (binary) stand apart below.
    """
    metrics = ["auroc", "ap", "mean_probability"]
    average, multilabel = results["class"].str.startswith("Average"), results["task"] == "multilabel"
    position, y = {}, 0.0
    for part in (multilabel & ~average, multilabel & average, ~multilabel & ~average):
        names = list(dict.fromkeys(results.loc[part, "class"]))
        position |= {name: y + i for i, name in enumerate(names)}
        y += len(names) + 0.35 * bool(names)
    results = results[multilabel | ~average]
    backbones, losses = present(BACKBONES, results["backbone"]) or [""], present(LOSSES, results["loss"])
    figure = new_figure(len(backbones) * (0.165 * y + 0.55) + 0.4, data_label)
    axes = figure.subplots(len(backbones), len(metrics), squeeze=False, sharey=True, sharex="col")
    handles = []
    for i, j in product(range(len(backbones)), range(len(metrics))):
        rows = results[(results["backbone"] == backbones[i]) & (results["metric"] == metrics[j])]
        handles += loss_dots(axes[i, j], rows, position, losses, metrics[j])
        axes[i, j].set_title(f"{display(metrics[j])}, {display(backbones[i])}", pad=3)
    names = [class_name(name).replace("Unhealthy", "Unhealthy (binary)") for name in position]
    axes[0, 0].set_yticks(list(position.values()), names)
    axes[0, 0].set_ylim(y - 0.75, -0.6)
    legend(figure, [*handles, Line2D([], [], color=GREY, linewidth=0.9, label="95 % interval")])
    return figure


def loss_dots(ax: Axes, rows: pd.DataFrame, position: dict[str, float], losses: list[str], metric: str) -> list:
    """A line of the panel per class, the losses beside each other in it, a marker and its interval each; dashed or
    black: no skill."""
    for y in list(position.values())[::2]:
        ax.axhspan(y - 0.5, y + 0.5, color="#f2f2f2", linewidth=0)
    handles, plain = [], {"linestyle": "none", "markersize": 2.7, "markeredgewidth": 0}
    for k, (loss, style) in enumerate(loss_styles(losses).items()):
        mine = rows[rows["loss"] == loss]
        y = mine["class"].map(position).astype(float) + (k - (len(losses) - 1) / 2) * 0.8 / len(losses)
        ax.hlines(y, mine["ci_low"], mine["ci_high"], color=style["color"], linewidth=0.9)
        handles += ax.plot(mine["value"], y, label=display(loss), **plain, **style)
    if metric == "auroc":
        ax.axvline(0.5, **DASHED)
    if metric in ("ap", "mean_probability") and "prevalence" in rows:
        known = rows.dropna(subset=["prevalence"]).drop_duplicates("class")
        y = known["class"].map(position).astype(float)
        tick = {"markersize": 8, "markeredgewidth": 0.9, "zorder": 1}
        handles += ax.plot(known["prevalence"], y, "|k", label="prevalence", **tick)
    grid(ax)
    ax.tick_params(axis="y", length=0)
    ax.tick_params(axis="x", labelbottom=True)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    return handles
