"""What a release holds: prevalence, co-occurrence, ages, films."""

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from lib.figures.style import (
    GREY,
    INK,
    NEUTRAL,
    PALE,
    PINK,
    STYLE,
    WIDTH,
    YELLOW,
    class_name,
    grid,
    legend,
    new_figure,
    panels,
    show_film,
)
from lib.tables.names import ordered


@STYLE
def prevalence(
    targets: np.ndarray, classes: Sequence[str], *, split: np.ndarray | None = None, data_label: str
) -> Figure:
    """How imbalanced each class is: the share of positive films on a logarithmic axis, with the count and the negatives
    to one positive.

    `targets` : 0/1 (N, C).    `split` : N names such as 'train', 'val', 'test', a marker each; None leaves the bar of
    all films.
    """
    targets = np.asarray(targets)
    counts = targets.sum(0, dtype=np.int64)
    order = np.argsort(-counts, kind="stable")
    share = counts[order] / max(len(targets), 1)
    floor = share[share > 0].min(initial=0.5) / 2
    figure = new_figure(0.2 * len(classes) + 0.9, data_label)
    ax, y = figure.subplots(), np.arange(len(classes))
    bar = {"color": PALE if split is not None else NEUTRAL, "linewidth": 5}
    handles = [ax.hlines(y, floor, np.maximum(share, floor), label=f"all films ({len(targets):,})", **bar)]
    known = dict.fromkeys(("train", "val", "test"))
    names = [] if split is None else [name for name in ordered(known, pd.Series(split)) if name in split]
    for name, marker, colour in zip(names, "osD^", (NEUTRAL, YELLOW, PINK, INK)):
        mask = np.asarray(split) == name
        part = targets[mask].mean(0)[order]
        dots = {"color": colour, "markersize": 4, "markeredgewidth": 0, "label": f"{name} ({mask.sum():,})"}
        handles += ax.plot(np.where(part > 0, part, np.nan), y, marker, **dots)
    ratios = [f"{(len(targets) - n) / n:,.1f} : 1" if n else "none" for n in counts[order]]
    for row, cells in enumerate(zip(["positives", *(f"{n:,}" for n in counts[order])], ["neg. : pos.", *ratios])):
        beside = {"ha": "right", "va": "center", "fontsize": 7, "color": INK if row else GREY}
        for x, text in zip((45, 100), cells):
            ax.annotate(text, (1, row - 1), (x, 0), ("axes fraction", "data"), "offset points", **beside)
    ax.set(xscale="log", xlim=(floor, 1), xlabel="Share of films", ylim=(len(classes) - 0.4, -0.6))
    ax.set_yticks(y, [class_name(classes[c]) for c in order])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    ax.xaxis.set_minor_locator(NullLocator())
    grid(ax)
    legend(figure, handles)
    return figure


@STYLE
def cooccurrence(targets: np.ndarray, classes: Sequence[str], *, data_label: str) -> Figure:
    """Of the films with the row's label, the percentage that also carries the column's. `targets` : 0/1 (N, C). Dash:
    no such film."""
    from seaborn import heatmap  # imported here: it costs a second, and one notebook draws with it

    targets = np.asarray(targets, np.int64)
    joint = targets.T @ targets
    count = np.diag(joint)
    share = joint / np.maximum(count, 1)[:, None]
    np.fill_diagonal(share, 0)
    text = np.where(count[:, None] > 0, np.char.mod("%.0f", 100 * share), "–")
    np.fill_diagonal(text, "")
    figure = new_figure(max(0.28 * len(classes) + 1.3, 3.6), data_label)
    names, label = [class_name(name) for name in classes], "… the share that also has the column's label"
    bar = {"fraction": 0.03, "pad": 0.01, "aspect": 40, "format": PercentFormatter(1, decimals=0), "label": label}
    rows = [f"{name} ({n:,})" for name, n in zip(names, count)]
    look = {"cmap": "Blues", "vmin": 0, "vmax": max(share.max(initial=0), 0.01), "annot_kws": {"fontsize": 7}}
    ax = heatmap(
        share, annot=text, fmt="", xticklabels=names, yticklabels=rows, cbar_kws=bar, ax=figure.subplots(), **look
    )
    ax.set_ylabel("Of the films with this label (number) …")
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.set_xticks(ax.get_xticks(), names, rotation=45, ha="left", rotation_mode="anchor")
    return figure


@STYLE
def ages(films: pd.DataFrame, *, data_label: str) -> Figure:
    """Age in years by sex, a panel per view position. `films` : age, sex, view; ages outside 0 to 100 are counted in
    the title only."""
    from seaborn import histplot

    views = sorted(films["view"].dropna().unique())
    figure = new_figure(2.4, data_label)
    axes = figure.subplots(1, max(len(views), 1), squeeze=False)[0]
    for ax, view in zip(axes, views):
        rows = films[films["view"] == view].reset_index(drop=True)
        sexes = dict(zip(sorted(rows["sex"].dropna().unique()), (PINK, NEUTRAL, YELLOW)))
        histplot(rows, x="age", bins=np.arange(0, 101, 5), hue="sex", palette=sexes, element="step", ax=ax)
        outside = int((~rows["age"].between(0, 100)).sum())
        note = f" ({outside:,} with an age outside 0 to 100)" if outside else ""
        ax.set(title=f"{view}: {len(rows):,} films{note}", xlim=(0, 100), xlabel="Age (years)", ylabel="")
    axes[0].set_ylabel("Films")
    return figure


@STYLE
def film_grid(
    films: np.ndarray,
    boxes: Sequence,
    titles: Sequence[str],
    *,
    box_names: Sequence | None = None,
    columns: int = 4,
    data_label: str,
) -> Figure:
    """Films with their boxes. `films` : uint8 (N, S, S). `boxes` : N sequences of (x1, y1, x2, y2) in pixels of S."""
    side = WIDTH / columns - 0.09
    wrapped = [textwrap.fill(class_name(title), int(side * 72 / 4)) for title in titles]
    lines = max((title.count("\n") + 1 for title in wrapped), default=1)
    figure, axes = panels(len(films), columns, side, 0.06 + 0.11 * lines, data_label)
    figure.set_figheight(figure.get_figheight() - 0.25)  # no legend and no axis labels here
    for i, ax in enumerate(axes):
        show_film(ax, films[i], boxes[i], box_names[i] if box_names is not None else ())
        ax.set_title(wrapped[i], fontsize=7, pad=2)
    return figure
