"""What the lenses of Khakzar et al. see in one run: overlap with boxes, concepts, single channels."""

import textwrap
from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lib.analysis.localization import METRICS
from lib.figures.style import (
    DASHED,
    GREY,
    INK,
    NEUTRAL,
    PAGE,
    STYLE,
    WIDTH,
    YELLOW,
    class_name,
    grid,
    legend,
    new_figure,
    show_film,
)
from lib.losses import Criterion
from lib.tables.names import display


@STYLE
def alignment_distributions(alignment: pd.DataFrame, *, data_label: str) -> Figure:
    """The localization metrics of one run: a dot per pair of film and class, quartiles, the mean, and what the same map
    laid anywhere would get.

    `alignment` : of `alignment.align`, with the metrics of `localization.METRICS` that have a chance.
    """
    medians = alignment.groupby("class")["iobb"].median().sort_values(ascending=False)
    counts, rng, handles = alignment["class"].value_counts(), np.random.default_rng(0), []
    figure = new_figure(0.3 * len(medians) + 0.95, data_label)
    metrics = {name: metric for name, metric in METRICS.items() if metric.chance}
    axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    dots = {"color": NEUTRAL, "alpha": 0.5, "markersize": 2.2, "markeredgewidth": 0, "rasterized": True}
    white = {"color": "white", "markeredgecolor": INK, "markersize": 4.5}
    yellow = {"color": YELLOW, "markeredgecolor": "black", "markeredgewidth": 0.4, "markersize": 5}
    for ax, (name, metric) in zip(axes, metrics.items()):
        for y, group in enumerate(medians.index):
            rows = alignment[alignment["class"] == group].dropna(subset=[name])
            low, high = rows[name].quantile([0.25, 0.75])
            if rows.empty:
                ax.text(0, y, "every map is empty", va="center", fontsize=7, color=GREY)
            handles += ax.plot(
                rows[name], y + rng.uniform(-0.28, 0.28, len(rows)), "o", label="a pair of film and class", **dots
            )
            handles += ax.plot((low, high), (y, y), color=INK, linewidth=2.5, solid_capstyle="butt", label="quartiles")
            handles += ax.plot(rows[name].mean(), y, "o", label="mean", **white)
            handles += ax.plot(rows[metric.chance].mean(), y + 0.3, "d", label="mean expected by chance", **yellow)
        text = f"{metric.label}: {metric.meaning}"
        ax.set(xlim=(-0.02, 1.02), xlabel=textwrap.fill(text, 96 // len(metrics)))
        grid(ax)
    axes[0].set_yticks(range(len(medians)), [f"{class_name(name)} ({counts[name]:,})" for name in medians.index])
    axes[0].set_ylim(len(medians) - 0.4, -0.6)
    legend(figure, handles)
    return figure


@STYLE
def concept_distributions(concepts: pd.DataFrame, *, data_label: str) -> Figure:
    """Disjoint and Unique concepts per annotated film of one run, with the means of Table 2. `concepts` : disjoint,
    unique."""
    figure = new_figure(2.6, data_label)
    axes = figure.subplots(1, 2, sharey=True)
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2, "handlelength": 1.4}
    for ax, metric in zip(axes, ("disjoint", "unique")):
        values, mean = concepts[metric], concepts[metric].mean()
        bins = np.histogram_bin_edges(values.dropna(), bins=20)
        fill = {"edgecolor": NEUTRAL, "facecolor": (NEUTRAL, 0.3)}
        ax.hist(values, bins=bins, histtype="stepfilled", linewidth=1.2, **fill)
        line = ax.axvline(mean, color=NEUTRAL, linewidth=1, linestyle=(0, (4, 2)), label=f"mean {mean:.1f}")
        ax.set(xlabel=f"{display(metric)} concepts per film")
        ax.legend(handles=[line], **place)
    axes[0].set_ylabel("Films")
    return figure


@STYLE
def channel_panel(
    films: np.ndarray,
    maps: np.ndarray,
    thresholds: np.ndarray,
    boxes: Sequence,
    row_titles: Sequence[str],
    *,
    names: Sequence | None = None,
    data_label: str,
) -> Figure:
    """What single channels respond to: a row per channel, its films in columns, marked where the map reaches the
    threshold, with the boxes.

    `films` : uint8 (R, K, S, S).   `maps` : float (R, K, S, S), resized to the film.   `thresholds` : (R,).   `boxes` :
    [R][K] sequences of (name, box), see `style.other_findings`.   `row_titles` : R, such as 'channel 17'.   `names` :
    [R][K] of the films.   ValueError where maps and films differ in shape.
    """
    if maps.shape != films.shape:
        raise ValueError(f"maps are {maps.shape}, films {films.shape}: resize the maps to the films")
    rows, columns, size = films.shape[:3]
    figure = new_figure(min(rows * ((WIDTH - 0.2) / columns + 0.12) + 0.5, PAGE), data_label)
    axes = figure.subplots(rows, columns, squeeze=False)
    for i, j in product(range(rows), range(columns)):
        ax, above = axes[i, j], maps[i, j] >= thresholds[i]
        show_film(ax, films[i, j], others=boxes[i][j])
        ax.set_xlabel("" if names is None else names[i][j], fontsize=7, labelpad=2)
        ax.imshow(np.where(above, 1.0, np.nan), cmap=ListedColormap([YELLOW]), alpha=0.4, extent=(0, size, size, 0))
        if above.any() and not above.all():
            centres = np.arange(size) + 0.5
            ax.contour(centres, centres, maps[i, j], levels=[thresholds[i]], colors=[YELLOW], linewidths=0.9)
        if j == 0:
            ax.set_ylabel(row_titles[i], fontsize=7)
    above = Rectangle((0, 0), 1, 1, facecolor=YELLOW, alpha=0.6, label="map at or above the channel's threshold")
    legend(figure, [above, Rectangle((0, 0), 1, 1, fill=False, edgecolor="#00a5b8", label="annotated box")])
    return figure


@STYLE
def loss_weights(criterion: Criterion, classes: Sequence[str], *, data_label: str) -> Figure:
    """The loss of a film by the probability the model gives it, beside plain cross-entropy, for the two classes whose
    undecided positives weigh most and least against undecided negatives: the rarest and the commonest, where the loss
    asks for counts. One curve where it treats all classes alike.

    `criterion` : of `losses.make_loss`, any loss.    `classes` : the outputs it was made for.
    """
    p = np.linspace(0.005, 0.995, 199)
    logits = torch.from_numpy(np.log(np.append(p, 0.5) / np.append(1 - p, 0.5)))[:, None].expand(-1, len(classes))
    sides = [criterion(logits, torch.full_like(logits, label)).numpy() for label in (1, 0)]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(sides[1][-1] > 0, sides[0][-1] / sides[1][-1], np.nan)
    chosen = dict.fromkeys([np.nanargmax(ratio), np.nanargmin(ratio)])
    figure = new_figure(2.4, data_label)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, side, probability, loss in zip(axes, ("with", "without"), (p, 1 - p), sides):
        ax.plot(p, -np.log(probability), label="BCE", **DASHED)
        for output, colour in zip(chosen, (NEUTRAL, YELLOW)):
            label = class_name(classes[output]) if len(chosen) > 1 else "every class"
            ax.plot(p, loss[:-1, output], color=colour, label=label)
        ax.set(title=f"Film {side} the finding", xlabel="Predicted probability", xlim=(0, 1), ylim=(0, 3))
        grid(ax, "both")
    axes[0].set_ylabel("Loss of the film")
    legend(figure, axes[0].get_lines())
    return figure
