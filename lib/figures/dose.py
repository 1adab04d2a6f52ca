"""Dose and response in the laboratory: imbalance and label noise, whatever is measured, loss by loss."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.figures.style import DASHED, GREY, PAGE, STYLE, by_loss, grid, legend, new_figure

NOISE = {False: "labels as they are", True: "labels as often wrong as NIH's"}


@STYLE
def dose_response(table: pd.DataFrame, metrics: Mapping[str, str], control: pd.DataFrame, *, data_label: str) -> Figure:
    """Each metric by imbalance: a row of panels a metric, a column with and without label noise, a line a loss through
    the means over seeds, a point a seed.

    Parameters
    ----------
    table : DataFrame
        prevalence (share of the findings that is left), noise (bool), loss, seed, metric, value.
    metrics : mapping of metric to what is printed
    control : DataFrame
        metric, value of untrained networks; their mean is the dashed line. A metric without a row has none.
    """
    noises = sorted(table["noise"].unique())
    figure = new_figure(min(0.86 * len(metrics) + 0.75, PAGE), data_label)
    axes, handles = figure.subplots(len(metrics), len(noises), sharex=True, sharey="row", squeeze=False), []
    doses = sorted(table["prevalence"].unique(), reverse=True)
    for line, (metric, label) in zip(axes, metrics.items(), strict=True):
        base = control.loc[control["metric"] == metric, "value"].mean()
        for ax, noise in zip(line, noises, strict=True):
            rows = table[(table["metric"] == metric) & (table["noise"] == noise)]
            groups = by_loss(rows)
            for k, (style, name, own) in enumerate(groups):
                x = own["prevalence"].map(doses.index) + 0.07 * (k - (len(groups) - 1) / 2)
                plain = {"linestyle": "none", "markersize": 3, "markeredgewidth": 0, "alpha": 0.55}
                ax.plot(x, own["value"], **plain, **style)
                means = own.assign(x=x).groupby("x")["value"].mean()
                handles += ax.plot(means.index, means, color=style["color"], label=name)
            if np.isfinite(base):
                handles.append(ax.axhline(base, label="Untrained", **DASHED))
            _level(ax)
        line[0].set_ylabel(label, fontsize=7)
    for ax, noise in zip(axes[0], noises, strict=True):
        ax.set_title(NOISE[bool(noise)], pad=3)
    for ax in axes[-1]:
        ax.set_xticks(range(len(doses)), [f"{dose:g}" for dose in doses])
        ax.set_xlabel("share of the training films' findings that is left", fontsize=7)
    legend(figure, handles)
    return figure


@STYLE
def convergence(histories: pd.DataFrame, *, data_label: str) -> Figure:
    """Training loss, as a share of that of the first epoch, and macro validation AUROC by epoch, a column a dose; a
    line a run.

    `histories` : prevalence, noise, loss, seed, epoch, train_loss, val_auroc.
    """
    doses = sorted(set(zip(histories["noise"], -histories["prevalence"], strict=True)))
    figure = new_figure(2.9, data_label)
    axes, handles = figure.subplots(2, len(doses), sharex=True, sharey="row", squeeze=False), []
    for column, (noise, prevalence) in zip(axes.T, doses, strict=True):
        of_dose = histories[(histories["noise"] == noise) & (histories["prevalence"] == -prevalence)]
        for style, name, own in by_loss(of_dose):
            for _, run in own.groupby("seed"):
                thin = {"color": style["color"], "linewidth": 0.6}
                handles += column[0].plot(
                    run["epoch"], run["train_loss"] / run["train_loss"].iloc[0], label=name, **thin
                )
                column[1].plot(run["epoch"], run["val_auroc"], **thin)
        for ax in column:
            _level(ax)
        column[0].set_title(f"{-prevalence:g} left{', noise' if noise else ''}", fontsize=7, pad=2)
        column[1].set_xlabel("epoch", fontsize=7)
    axes[0, 0].set_ylabel("training loss,\nshare of the first", fontsize=7)
    axes[1, 0].set_ylabel("macro AUROC,\nvalidation", fontsize=7)
    legend(figure, handles)
    return figure


@STYLE
def channel_responses(often: np.ndarray, moved: np.ndarray, *, data_label: str) -> Figure:
    """How often dissection counts each channel against how far the lesion moves it; a dot a channel.

    `often` : share of the pairs on which it is counted, (F,). `moved` : mean absolute response, standard deviations,
    (F,); NaN: no dot.
    """
    figure = new_figure(2.4, data_label, 3.6)
    ax = figure.subplots()
    ax.plot(often, moved, "o", color=GREY, markersize=3.5, markeredgewidth=0, alpha=0.7)
    ax.set_xlabel("share of the boxes on which it is counted", fontsize=7)
    ax.set_ylabel("mean response to the lesion,\nstandard deviations", fontsize=7)
    ax.set_ylim(bottom=0)
    grid(ax, "both")
    return figure


def _level(ax: Axes) -> None:
    ax.locator_params(axis="y", nbins=4)
    grid(ax, "y")
