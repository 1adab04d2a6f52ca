"""Nam & Lee in pictures: signed relevance over films, IoU by threshold, where the positive relevance lies."""

import textwrap
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from lib.analysis.relevance.sanity import OTHER_FILM
from lib.figures.style import (
    GREY,
    INK,
    LIGHT_RIM,
    RELEVANCE,
    STYLE,
    WIDTH,
    class_name,
    grid,
    legend,
    new_figure,
    panels,
    present,
    show_film,
)
from lib.tables.nam_lee import METHODS, MODELS, READINGS, REGIONS
from lib.tables.nam_lee_words import stage_name
from lib.tables.names import ordered

METHOD_STYLES = {
    "cam": {"color": "#4d4d4d", "marker": "o"},
    "lrp": {"color": "#0072b2", "marker": "s"},
    "rap": {"color": "#d55e00", "marker": "^"},
}
_OTHER = {"color": "#009e73", "marker": "D"}
_PALE = 0.45  # how much of a film's contrast is left beneath a map


@STYLE
def attribution_grid(
    films: np.ndarray,
    boxes: Sequence,
    titles: Sequence[str],
    maps: np.ndarray,
    columns: Sequence[str],
    probabilities: np.ndarray,
    *,
    data_label: str,
) -> Figure:
    """Nam & Lee, Figs. 1 and 3 to 6: a row per film, the film with its boxes, then its maps; red is relevant, blue
    irrelevant.

    Every map is divided by its own largest magnitude and shown on one scale from -1 to 1, over the faint film.

    Parameters
    ----------
    films : uint8 (R, S, S).
    boxes : R sequences of (x1, y1, x2, y2) in pixels of S, ends exclusive; may be empty.
    titles : R names, such as the class that is explained.
    maps : float (R, K, h, w), signed, over the whole film; NaN where there is no stable one, which the panel says.
    columns : K methods by their ids or any other heading, such as 'VGG-16, LRP'.
    probabilities : (R,) what the model predicts, printed at the film, or (R, K) printed at each map; NaN: not printed.

    Raises
    ------
    ValueError : the arguments do not agree on R and K.
    """
    probabilities = np.asarray(probabilities, dtype=float)
    rows, count = maps.shape[:2]
    if not (
        len(films) == len(boxes) == len(titles) == rows
        and len(columns) == count
        and probabilities.shape in ((rows,), (rows, count))
    ):
        raise ValueError(
            f"maps are {rows} films x {count} columns; films, boxes, titles, columns or probabilities do not match"
        )
    side = min((WIDTH - 0.65) / (count + 1) - 0.06, 1.75)
    letters = int(side * 72 / 4)
    names = np.full((rows, count + 1), "", dtype=object)
    names[:, 0] = [class_name(title) for title in titles]
    printed = np.full(names.shape, np.nan)
    printed[:, slice(1, None) if probabilities.ndim == 2 else 0] = probabilities
    for at, p in np.ndenumerate(printed):
        names[at] = textwrap.fill(f"{names[at]} p={p:.2f}".strip() if np.isfinite(p) else names[at], letters)
    lines = [max(name.count("\n") + 1 if name else 0 for name in row) for row in names]
    point = 8 if side > 1.2 else 7
    whole = {"width": int(side * 72 / (0.7 * point)), "break_long_words": False, "break_on_hyphens": False}
    texts = ("Film and boxes", *(METHODS.get(name, name) for name in columns))
    headings = [textwrap.fill(text, **whole) for text in texts]
    most = max(text.count("\n") + 1 for text in headings)
    height = rows * (side + 0.03) + 0.12 * sum(lines) + 0.13 * most + 0.25
    figure = new_figure(height, data_label, min((side + 0.06) * (count + 1) + 0.65, WIDTH))
    axes = figure.subplots(rows, count + 1, squeeze=False)
    size = films.shape[-1]
    for (i, j), ax in np.ndenumerate(axes):
        show_film(ax, (255 - _PALE * (255.0 - films[i])).astype(np.uint8) if j else films[i], boxes[i])
        ax.set_title(names[i, j], fontsize=7, pad=2)
        if not j:
            continue
        shown, largest = maps[i, j - 1], np.abs(maps[i, j - 1]).max()  # NaN if any value is
        if np.isfinite(largest):
            over = {"extent": (0, size, size, 0), "zorder": 0.5}
            ax.imshow(shown / (largest or 1), cmap=RELEVANCE, vmin=-1, vmax=1, **over)
        if not largest > 0:
            missing = "no relevance" if largest == 0 else "no stable map"
            ax.text(size / 2, 0.97 * size, missing, ha="center", fontsize=7, path_effects=LIGHT_RIM)
    style = {"ha": "center", "weight": "bold", "fontsize": point, "color": INK}
    for ax, text in zip(axes[0], headings):
        ax.annotate(text, (0.5, 1), (0, 5 + 9 * lines[0]), "axes fraction", "offset points", **style)
    scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(-1, 1), RELEVANCE)
    shape = {"fraction": 0.02, "pad": 0.01, "aspect": 30, "shrink": 0.8 if rows > 1 else 1}
    bar = figure.colorbar(scale, ax=axes, ticks=(-1, -0.5, 0, 0.5, 1), **shape)
    tall = figure.get_figheight() > 4.5
    bar.set_label("relevance, each map divided by its largest magnitude" if tall else "relevance")
    bar.ax.set_facecolor("#dcdcdc")
    return figure


@STYLE
def iou_by_threshold(table: pd.DataFrame, *, reading: str = "mean_iou", data_label: str) -> Figure:
    """Nam & Lee, Table 2 drawn: IoU by threshold, a panel per class; beneath the dotted line a map is worse than one
    that marks nothing.

    `table` : of `tables.nam_lee.table2`. Lines with 95 % intervals are ours; dashed with hollow marks: the paper's
    (reading 'mean_iou' alone, which its numbers fit). Classes without a number of ours are left out.
    """
    if reading not in READINGS:
        raise ValueError(f"reading = {reading!r}: one of {', '.join(READINGS)}")
    table = table[(table["reading"] == reading) & table.groupby("class")["value"].transform("count").gt(0)]
    if not len(table):
        raise ValueError("the table holds no number of ours: nothing to draw beside the paper's")
    names, methods = list(dict.fromkeys(table["class"])), ordered(METHODS, table["method"])
    columns = min(4, max(len(names), 2))  # one panel alone would be narrower than its legend
    figure, axes = panels(len(names), columns, 1.35 if columns > 2 else 2.2, 0.3, data_label)
    told = reading == "mean_iou" and table["paper"].notna().any()  # the paper's numbers fit that reading only
    paper = {"linewidth": 0.7, "linestyle": (0, (4, 2)), "markersize": 3.4, "markerfacecolor": "white"}
    paper["markeredgewidth"] = 0.7
    empty = {"color": INK, "linewidth": 0.9, "linestyle": (0, (1, 1.5))}
    handles, ticks = [], sorted(table["threshold"].unique())
    for k, (ax, name) in enumerate(zip(axes, names)):
        cells = table[table["class"] == name]
        for m, method in enumerate(methods):
            rows, style = cells[cells["method"] == method].sort_values("threshold"), METHOD_STYLES.get(method, _OTHER)
            x, label = rows["threshold"] + 0.008 * (m - (len(methods) - 1) / 2), METHODS.get(method, method)
            ax.vlines(x, rows["ci_low"], rows["ci_high"], color=style["color"], linewidth=0.9)
            handles += ax.plot(x, rows["value"], markersize=3.4, markeredgewidth=0, label=label, **style)
            if told and rows["paper"].notna().any():
                ax.plot(x, rows["paper"], zorder=1.5, **paper, **style)
        ax.axhline(cells["floor"].mean(), zorder=1, **empty)
        count = cells["n"].max()
        ax.set_title(f"{class_name(name)} ({count:.0f})" if np.isfinite(count) else class_name(name), pad=3)
        ax.set(xticks=ticks, xlim=(ticks[0] - 0.04, ticks[-1] + 0.04))
        ax.set_xlabel("Threshold" if k + columns >= len(names) else "")
        axis = "IoU, mean of lesion\nand background" if reading == "mean_iou" else "IoU of the lesion"
        ax.set_ylabel(axis if k % columns == 0 else "")
        grid(ax, "both")
    highest = np.nanmax(table[["value", "ci_high", "floor", *(["paper"] if told else [])]], initial=0)
    for ax in axes:
        ax.set_ylim(-0.01 if reading == "iou_lesion" else 0, min(max(0.05, 1.08 * highest), 1.02))
    handles.append(Line2D([], [], color=GREY, linewidth=0.9, label="95 % interval"))
    if told:
        handles.append(Line2D([], [], color=GREY, marker="o", label="paper (CheXNet)", **paper))
    legend(figure, [*handles, Line2D([], [], label="empty mask", **empty)])
    return figure


@STYLE
def share_dots(means: pd.DataFrame, *, data_label: str) -> Figure:
    """Where the positive relevance lies: its share in each region, a panel per region, a line per kind of film and
    model.

    `means` : of `attribution.share_means` by model, kind, method and region. The black tick is what area alone would
    give; a region that the films of a kind do not have is left empty.
    """
    kinds, regions = (list(dict.fromkeys(means[column])) for column in ("kind", "region"))
    models, methods = present(MODELS, means["model"]), present(METHODS, means["method"])
    place, y = {}, 0.0
    for kind in kinds:
        for model in models:
            if ((means["kind"] == kind) & (means["model"] == model)).any():
                place[kind, model] = y
                y += 1
        y += 0.4
    figure = new_figure(0.26 * y + 0.95, data_label)
    axes, handles = figure.subplots(1, max(len(regions), 1), squeeze=False, sharey=True)[0], []
    area = {"markersize": 11, "markeredgewidth": 1.1, "label": "share by area", "zorder": 1.5}
    for ax, region in zip(axes, regions):
        known = means[(means["region"] == region) & (means["n"] > 0)]
        for k, ((kind, model), height) in enumerate(place.items()):
            rows = known[(known["kind"] == kind) & (known["model"] == model)]
            if k % 2 == 0:
                ax.axhspan(height - 0.5, height + 0.5, color="#f2f2f2", linewidth=0)
            for row in rows.itertuples():
                style, name = METHOD_STYLES.get(row.method, _OTHER), METHODS.get(row.method, row.method)
                at = height + (methods.index(row.method) - (len(methods) - 1) / 2) * 0.7 / len(methods)
                ax.hlines(at, row.ci_low, row.ci_high, color=style["color"], linewidth=1)
                dot = {"linestyle": "none", "markersize": 3.8, "markeredgewidth": 0, "label": name}
                handles += ax.plot(row.value, at, **dot, **style)
            if len(rows):
                handles += ax.plot(rows["area"].mean(), height, "|k", **area)
        ax.set_title(REGIONS.get(region, f"in {region}").capitalize(), pad=3)
        ax.set_xlabel("Share of positive relevance", fontsize=7.5)
        ax.set_xlim(-0.02, 1.02)
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.tick_params(axis="y", length=0)
        grid(ax)
    axes[0].set_yticks(list(place.values()), [f"{kind}, {MODELS.get(model, model)}" for kind, model in place])
    axes[0].set_ylim(y - 0.8, -0.6)
    order = {METHODS.get(name, name): k for k, name in enumerate(methods)}
    handles.sort(key=lambda handle: order.get(handle.get_label(), len(order)))
    legend(figure, [*handles, Line2D([], [], color=GREY, linewidth=1, label="95 % interval")])
    return figure


@STYLE
def randomisation(means: pd.DataFrame, *, data_label: str) -> Figure:
    """Maps while the network is made random from the head down, held against the trained network's: SSIM, rank
    correlation and its size, a panel each, by stage; with 95 % intervals.

    `means` : of `relevance.sanity.likeness_means`, in the order of the stages, the last of which is the wholly random
    network's map of another film: a method whose line stays far above that draws the film, not what was learnt.
    """
    stages, methods = list(dict.fromkeys(means["against"])), present(METHODS, means["method"])
    figure, handles = new_figure(2.75, data_label), []
    titles = {"ssim": "SSIM", "rank": "Rank correlation", "abs_rank": "Size of the rank correlation"}
    axes = figure.subplots(1, 3)
    axes[0].set_ylabel("Likeness to the trained\nnetwork's map")
    for ax, (name, title) in zip(axes, titles.items()):
        for m, method in enumerate(methods):
            rows, style = means[means["method"] == method], METHOD_STYLES.get(method, _OTHER)
            x = rows["against"].map(stages.index) + 0.12 * (m - (len(methods) - 1) / 2)
            ax.vlines(x, rows[f"{name}_low"], rows[f"{name}_high"], color=style["color"], linewidth=0.9)
            label, cascade = METHODS.get(method, method), rows["against"] != OTHER_FILM
            handles += ax.plot(x[cascade], rows[name][cascade], markersize=3.8, markeredgewidth=0, label=label, **style)
            ax.plot(x[~cascade], rows[name][~cascade], markersize=3.8, markerfacecolor="white", **style)
        ax.axhline(0, color=INK, linewidth=0.6, zorder=1)
        ax.set_xticks(range(len(stages)), [stage_name(stage) for stage in stages], rotation=60, ha="right")
        ax.set(title=title, ylim=(min(0, *ax.get_ylim()), 1.03))
        ax.set_xlabel("made random down to here", fontsize=7.5)
        grid(ax, "y")
    hollow = {"marker": "o", "markerfacecolor": "white", "linestyle": "none", "color": GREY, "markersize": 3.8}
    handles.append(Line2D([], [], label="random network's map of another film", **hollow))
    legend(figure, [*handles, Line2D([], [], color=GREY, linewidth=0.9, label="95 % interval")])
    return figure
