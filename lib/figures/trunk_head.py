"""Where the change lives: trunk, head, or a constant."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lib.figures.style import DASHED, GREY, INK, PINK, STYLE, YELLOW, grid, loss_styles, new_figure, present
from lib.tables.names import LOSSES, display

# Every part has a marker of its own, so that a print in grey can be read too, and the colour of no loss.
PARTS = {
    "trained": ("as trained", INK, "D"),
    "whole": ("heads refitted = trunk + head", INK, "o"),
    "trunk": ("the trunk's part", "#56b4e9", "s"),
    "head": ("the head's part", PINK, "^"),
    "interaction": ("interaction of both", GREY, "x"),
    "constant": ("BCE and a constant a class", YELLOW, "P"),
}


@STYLE
def change_parts(changes: pd.DataFrame, *, data_label: str) -> Figure:
    """Change of each metric against BCE and its parts, with intervals; a panel a metric, a block a loss.

    `changes` : a row a loss, part and metric with point, low and high (NaN: no bar), see `analysis.changes`. Parts
    that are not in `PARTS` are left out. Metrics keep their order, at most four.

    Raises
    ------
    ValueError : more than four metrics, or a loss with two rows of one part and metric.
    """
    metrics, losses = list(dict.fromkeys(changes["metric"])), present(LOSSES, changes["loss"])
    if len(metrics) > 4 or changes.duplicated(["loss", "part", "metric"]).any():
        raise ValueError(f"{len(changes)} rows: need one a loss, part and metric, of one task and backbone, 4 metrics")
    figure = new_figure(len(losses) * 0.85 + 1.3, data_label)
    axes, handles = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0], []
    step = 0.8 / (len(PARTS) - 1)
    for ax, metric in zip(axes, metrics):
        for block in range(0, len(losses), 2):
            ax.axhspan(block - 0.5, block + 0.5, color="#f2f2f2", linewidth=0)
        ax.axvline(0, **DASHED)
        for k, (part, (label, colour, marker)) in enumerate(PARTS.items()):
            rows = changes[(changes["metric"] == metric) & (changes["part"] == part)].set_index("loss").reindex(losses)
            y = np.arange(len(losses)) + k * step - 0.4
            ax.hlines(y, rows["low"], rows["high"], color=colour, linewidth=1)
            filled = {"markerfacecolor": "white"} if part == "trained" else {}
            plain = {"linestyle": "none", "markersize": 4.2, "markeredgewidth": 0.9}
            handles += ax.plot(rows["point"], y, marker, color=colour, label=label, **plain, **filled)
        ax.set_title(display(metric), pad=3)
        ax.set_xlabel("difference to BCE", fontsize=7)
        ax.tick_params(axis="y", length=0)
        ax.locator_params(axis="x", nbins=4)
        grid(ax)
    axes[0].set_yticks(range(len(losses)), [display(loss) for loss in losses])
    axes[0].set_ylim(len(losses) - 0.45, -0.55)
    for text, style in zip(axes[0].get_yticklabels(), loss_styles(losses).values()):
        text.set(color=style["color"], weight="bold")
    interval = Line2D([], [], color=GREY, linewidth=1, label="95 % interval")
    figure.legend(handles=[*handles[: len(PARTS)], interval], loc="outside upper center", ncols=4, columnspacing=1.2)
    return figure
