"""What a release holds: prevalence, co-occurrence, ages, films."""

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lib.figures.style import (
    GREY,
    INK,
    NEUTRAL,
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

    `targets` : 0/1 (N, C).    `split` : N names such as 'train', 'val', 'test', a marker each, hollow at the axis where
    it has none of the class; None leaves the share of all films.
    """
    targets = np.asarray(targets)
    counts = targets.sum(0, dtype=np.int64)
    order = np.argsort(-counts, kind="stable")
    known = dict.fromkeys(("train", "val", "test"))
    names = [] if split is None else [name for name in ordered(known, pd.Series(split)) if name in split]
    parts = {name: targets[np.asarray(split) == name] for name in names}
    share = {name: part.mean(0)[order] for name, part in parts.items()}
    all_films = counts[order] / max(len(targets), 1)
    every = np.concatenate([all_films, *share.values()])
    marks = np.outer(10.0 ** np.arange(-6, 1), (1, 2, 5)).ravel()
    floor = marks[marks < every[every > 0].min(initial=0.5)].max()
    top = min(marks[marks >= every.max(initial=0.1)].min(), 1)
    figure = new_figure(0.2 * len(classes) + 0.9, data_label)
    ax, y = figure.subplots(), np.arange(len(classes))
    line = {"color": INK, "markersize": 11, "markeredgewidth": 1}
    handles = ax.plot(np.where(all_films > 0, all_films, np.nan), y, "|", label=f"all films ({len(targets):,})", **line)
    for k, (name, marker, colour) in enumerate(zip(names, "osD^", (NEUTRAL, YELLOW, PINK, GREY))):
        at = y + 0.2 * (k - (len(names) - 1) / 2)
        dots = {"linestyle": "none", "marker": marker, "markersize": 3.5, "color": colour}
        some = np.where(share[name] > 0, share[name], np.nan)
        none = at[(share[name] == 0) & (all_films > 0)]
        label = f"{name} ({len(parts[name]):,}{'; hollow: none' if len(none) else ''})"
        handles += ax.plot(some, at, markeredgewidth=0, label=label, **dots)
        for row in none:
            ax.plot(floor, row, markerfacecolor="white", clip_on=False, **dots)
    ratios = [f"{(len(targets) - n) / n:,.1f} : 1" if n else "none" for n in counts[order]]
    for row, cells in enumerate(zip(["positives", *(f"{n:,}" for n in counts[order])], ["neg. : pos.", *ratios])):
        beside = {"ha": "right", "va": "center", "fontsize": 7, "color": INK if row else GREY}
        for x, text in zip((45, 100), cells):
            ax.annotate(text, (1, row - 1), (x, 0), ("axes fraction", "data"), "offset points", **beside)
    ax.set(xscale="log", xlim=(floor, top), xlabel="Share of films", ylim=(len(classes) - 0.4, -0.6))
    ax.set_yticks(y, [class_name(classes[c]) for c in order])
    shown = marks[(marks >= floor) & (marks <= top)]
    ax.set_xticks(shown, [f"{100 * mark:g} %" for mark in shown])
    ax.xaxis.set_minor_locator(NullLocator())
    grid(ax, "both")
    legend(figure, handles)
    return figure


@STYLE
def cooccurrence(targets: np.ndarray, classes: Sequence[str], *, data_label: str) -> Figure:
    """Of the films with the row's label, the percentage that also carries the column's. `targets` : 0/1 (N, C). Dash:
    no such film. Darker where it is more."""
    from seaborn import heatmap  # imported here: it costs a second, and one notebook draws with it

    targets = np.asarray(targets, np.int64)
    joint = targets.T @ targets
    count = np.diag(joint)
    share = joint / np.maximum(count, 1)[:, None]
    np.fill_diagonal(share, 0)
    text = np.where(count[:, None] > 0, np.char.mod("%.0f", 100 * share), "–")
    np.fill_diagonal(text, "")
    figure = new_figure(max(0.24 * len(classes) + 1.3, 3), data_label)
    names = [class_name(name) for name in classes]
    rows = [f"{name} ({n:,})" for name, n in zip(names, count)]
    look = {"cmap": "Blues", "vmin": 0, "vmax": max(share.max(initial=0), 0.01), "annot_kws": {"fontsize": 7}}
    ax = heatmap(
        share, annot=text, fmt="", xticklabels=names, yticklabels=rows, cbar=False, ax=figure.subplots(), **look
    )
    ax.set(ylabel="Of the films with this label (number) …", xlabel="… the percentage that also has this label")
    ax.xaxis.tick_top()
    ax.xaxis.set_label_position("top")
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
    names: Sequence[str] | None = None,
    others: Sequence = (),
    columns: int = 4,
    data_label: str,
) -> Figure:
    """Films with their boxes. `films` : uint8 (N, S, S). `boxes` : N sequences of (x1, y1, x2, y2) in pixels of S.
    `names` : N of the films, beneath them. `others` : N sequences of (name, box), see `style.other_findings`."""
    side = WIDTH / columns - 0.09
    wrapped = [textwrap.fill(class_name(title), int(side * 72 / 4)) for title in titles]
    lines = max((title.count("\n") + 1 for title in wrapped), default=1)
    figure, axes = panels(len(films), columns, side, 0.06 + 0.11 * (lines + bool(names)), data_label)
    figure.set_figheight(figure.get_figheight() - 0.25)  # no legend and no axis labels here
    for i, ax in enumerate(axes):
        named = box_names[i] if box_names is not None else ()
        show_film(ax, films[i], boxes[i], named, others[i] if others else ())
        ax.set_xlabel(names[i] if names else "", fontsize=7, labelpad=2)
        ax.set_title(wrapped[i], fontsize=7, pad=2)
    return figure
