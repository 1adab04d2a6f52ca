"""What the lenses of Khakzar et al. see in one run: overlap with boxes, concepts, single channels."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lib.figures.style import (
    DASHED,
    INK,
    NEUTRAL,
    STYLE,
    WIDTH,
    YELLOW,
    by_loss,
    class_name,
    grid,
    legend,
    new_figure,
    show_film,
)
from lib.tables.names import display


@STYLE
def alignment_distributions(alignment: pd.DataFrame, *, data_label: str) -> Figure:
    """Soft IoBB and IoR of one run: a dot per pair of film and class, quartiles, the mean, and what the same map laid
    anywhere would get.

    `alignment` : class, iobb, ior, box_area, cam_mass (shares of the film). Chance is cam_mass for IoBB and box_area
    for IoR.
    """
    medians = alignment.groupby("class")["iobb"].median().sort_values(ascending=False)
    counts, rng, handles = alignment["class"].value_counts(), np.random.default_rng(0), []
    figure = new_figure(0.3 * len(medians) + 0.95, data_label)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (metric, chance) in zip(axes, (("iobb", "cam_mass"), ("ior", "box_area"))):
        for y, name in enumerate(medians.index):
            rows = alignment[alignment["class"] == name].dropna(subset=[metric])
            low, high = rows[metric].quantile([0.25, 0.75])
            jitter = rng.uniform(-0.28, 0.28, len(rows))
            ax.plot(
                rows[metric],
                y + jitter,
                ".",
                color=NEUTRAL,
                alpha=0.4,
                markersize=3,
                markeredgewidth=0,
                rasterized=True,
            )
            handles += ax.plot((low, high), (y, y), color=INK, linewidth=2.5, solid_capstyle="butt", label="quartiles")
            handles += ax.plot(
                rows[metric].mean(), y, "o", color="white", markeredgecolor=INK, markersize=4.5, label="mean"
            )
            handles += ax.plot(
                rows[chance].mean(),
                y,
                "d",
                color=YELLOW,
                markeredgecolor="black",
                markeredgewidth=0.4,
                markersize=5,
                label="mean expected by chance",
            )
        ax.set(xlim=(-0.02, 1.02), xlabel=f"{display(metric)} per pair of film and class")
        grid(ax)
    axes[0].set_yticks(range(len(medians)), [f"{class_name(name)} ({counts[name]:,})" for name in medians.index])
    axes[0].set_ylim(len(medians) - 0.4, -0.6)
    legend(figure, handles)
    return figure


@STYLE
def concept_distributions(concepts: pd.DataFrame, *, data_label: str) -> Figure:
    """Disjoint and Unique concepts per annotated film, with the means of Table 2. `concepts` : disjoint, unique,
    optionally loss."""
    figure = new_figure(2.6, data_label)
    axes, groups = figure.subplots(1, 2, sharey=True), by_loss(concepts)
    for ax, metric in zip(axes, ("disjoint", "unique")):
        bins = np.histogram_bin_edges(concepts[metric].dropna(), bins=20)
        handles = []
        for style, label, rows in groups:
            colour, mean = style["color"], rows[metric].mean()
            fill = (colour, 0 if label else 0.3)
            ax.hist(rows[metric], bins=bins, histtype="stepfilled", linewidth=1.2, edgecolor=colour, facecolor=fill)
            name = f"{label}, mean {mean:.1f}" if label else f"mean {mean:.1f}"
            handles.append(ax.axvline(mean, color=colour, linewidth=1, linestyle=(0, (4, 2)), label=name))
        ax.set(xlabel=f"{display(metric)} concepts per film")
        ax.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=2,
            borderaxespad=0.2,
            handlelength=1.4,
            columnspacing=1.2,
        )
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
    data_label: str,
) -> Figure:
    """What single channels respond to: a row per channel, its films in columns, marked where the map reaches the
    threshold, with the boxes.

    `films` : uint8 (R, K, S, S).   `maps` : float (R, K, S, S), resized to the film.   `thresholds` : (R,).   `boxes` :
    [R][K] sequences of (x1, y1, x2, y2) in pixels of S.   `row_titles` : R, such as 'channel 17'.   ValueError where
    maps and films differ in shape.
    """
    if maps.shape != films.shape:
        raise ValueError(f"maps are {maps.shape}, films {films.shape}: resize the maps to the films")
    rows, columns, size = films.shape[:3]
    figure = new_figure(rows * ((WIDTH - 0.2) / columns) + 0.5, data_label)
    axes = figure.subplots(rows, columns, squeeze=False)
    for i, j in product(range(rows), range(columns)):
        ax, above = axes[i, j], maps[i, j] >= thresholds[i]
        show_film(ax, films[i, j], boxes[i][j])
        ax.imshow(np.where(above, 1.0, np.nan), cmap=ListedColormap([YELLOW]), alpha=0.4, extent=(0, size, size, 0))
        if above.any() and not above.all():
            ax.contour(
                np.arange(size) + 0.5,
                np.arange(size) + 0.5,
                maps[i, j],
                levels=[thresholds[i]],
                colors=[YELLOW],
                linewidths=0.9,
            )
        if j == 0:
            ax.set_ylabel(row_titles[i], fontsize=7)
    legend(
        figure,
        [
            Rectangle((0, 0), 1, 1, facecolor=YELLOW, alpha=0.6, label="map at or above the channel's threshold"),
            Rectangle((0, 0), 1, 1, fill=False, edgecolor="#00a5b8", label="annotated box"),
        ],
    )
    return figure


@STYLE
def loss_weights(positive: pd.Series, negative: pd.Series, gamma: float, *, data_label: str) -> Figure:
    """The loss of a film by the probability the model gives it, for the rarest and the commonest class, beside plain
    cross-entropy.

    `positive`, `negative` : constants w+ and w- of each class, indexed by class.    `gamma` : the focusing exponent of
    eq. 2.
    """
    ratio = positive / negative.where(negative > 0)
    names = list(dict.fromkeys([ratio.idxmax(), ratio.idxmin()]))
    p = np.linspace(0.005, 0.995, 199)
    figure = new_figure(2.4, data_label)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, side, probability, constant in ((axes[0], "with", p, positive), (axes[1], "without", 1 - p, negative)):
        ax.plot(p, -np.log(probability), label="BCE", **DASHED)
        for name, colour in zip(names, (NEUTRAL, YELLOW)):
            ax.plot(
                p,
                -constant[name] * (1 - probability) ** gamma * np.log(probability),
                color=colour,
                label=f"{class_name(name)}",
            )
        ax.set(title=f"Film {side} the finding", xlabel="Predicted probability", xlim=(0, 1), ylim=(0, 3))
        grid(ax, "both")
    axes[0].set_ylabel("Loss of the film")
    legend(figure, axes[0].get_lines())
    return figure
