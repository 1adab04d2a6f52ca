"""Nam & Lee in pictures: signed relevance over films, IoU by threshold, where the positive relevance lies."""

import textwrap
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lib.analysis.controls import OTHER_FILM
from lib.figures.style import (
    DASHED,
    GREY,
    INK,
    LIGHT_RIM,
    PAGE,
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
    names: Sequence[str] = (),
    others: Sequence = (),
    data_label: str,
) -> Figure:
    """Nam & Lee, Figs. 1 and 3 to 6: a row per film, the film with its boxes, then its maps; red is relevant, blue
    irrelevant. No taller than a page.

    Every map is divided by its own largest magnitude and shown on one scale from -1 to 1, over the faint film.

    Parameters
    ----------
    films : uint8 (R, S, S).
    boxes : R sequences of (x1, y1, x2, y2) in pixels of S, ends exclusive; may be empty.
    titles : R names of what is explained: the class.
    maps : float (R, K, h, w), signed, over the whole film; NaN where there is no stable one, which the panel says.
    columns : K methods by their ids or any other heading, such as 'VGG-16, LRP'.
    probabilities : (R,) what the model predicts for the title, printed beside the film, or (R, K) printed at each map;
        where it is NaN the title alone.
    names : R texts of the films themselves, beneath the titles.
    others : R sequences of (name, (x1, y1, x2, y2)), what else is marked, see `other_findings`: drawn thin and, in the
        film itself, named.

    Raises
    ------
    ValueError : the arguments do not agree on R and K.
    """
    probabilities = np.asarray(probabilities, dtype=float)
    rows, count = maps.shape[:2]
    names, others = list(names) or [""] * rows, others or [()] * rows
    if not (
        len(films) == len(boxes) == len(titles) == len(names) == len(others) == rows
        and len(columns) == count
        and probabilities.shape in ((rows,), (rows, count))
    ):
        raise ValueError(
            f"maps are {rows} films x {count} columns; films, boxes, titles, columns, probabilities, names or others "
            "do not match"
        )
    size, margin, at_maps = films.shape[-1], 1.85, probabilities.ndim == 2  # inches: beside the films, and the bar
    tall = (PAGE - 0.6) / rows - 0.04
    wide = min((WIDTH - margin) / (count + 1) - 0.06, 1.75, tall - 0.24 * at_maps)
    narrow = wide < 0.8  # no room at a map for what its probability is of: that stands beside the film
    said = np.full((rows, count + 1), "", dtype=object)
    for (i, j), p in np.ndenumerate(probabilities.reshape(rows, -1)):
        title = class_name(titles[i])
        said[i, 0] = f"P: {title}" if at_maps and narrow else ""
        of = "P" if said[i, 0] else f"P({title})"
        text = f"{of} =\u00a0{p:.2f}" if np.isfinite(p) else title  # '=' stays with its number
        said[i, j + at_maps] = textwrap.fill(text, int(wide * 18)) if at_maps else text
    for i, name in enumerate(names):
        said[i, 0] = "\n".join(textwrap.fill(line, 17) for line in (said[i, 0], *name.split("\n")) if line)
    above, beside = (max(text.count("\n") + 1 for text in part.flat) for part in (said[:, 1:], said[:, 0]))
    head = 0.12 * above * at_maps
    side = min(wide, tall - head)
    point = 8 if side > 1.2 else 7
    whole = {"width": max(int(side * 72 / (0.7 * point)), 9), "break_long_words": narrow, "break_on_hyphens": narrow}
    texts = ("Film and boxes", *(METHODS.get(name, name) for name in columns))
    headings = [textwrap.fill(text, **whole) for text in texts]
    top = 0.13 * max(text.count("\n") + 1 for text in headings) + 0.3
    height = rows * (max(side + head, 0.12 * beside) + 0.04) + top
    figure = new_figure(height, data_label, min((side + 0.06) * (count + 1) + margin, WIDTH))
    figure.get_layout_engine().set(h_pad=0.03, w_pad=0.03)
    axes = figure.subplots(rows, count + 1, squeeze=False)
    for (i, j), ax in np.ndenumerate(axes):
        film = (255 - _PALE * (255.0 - films[i])).astype(np.uint8) if j else films[i]
        show_film(ax, film, boxes[i], others=[("" if j else name, box) for name, box in others[i]])
        if not j:
            place = (0, 0.5), (-80, 0), "axes fraction", "offset points"
            ax.annotate(said[i, 0], *place, va="center", fontsize=7)
            ax.set_anchor("W")  # else the layout takes what is beside the film for narrower than it is
            continue
        ax.set_title(said[i, j], fontsize=7, pad=2)
        shown, largest = maps[i, j - 1], np.abs(maps[i, j - 1]).max()  # NaN if any value is
        if np.isfinite(largest):
            over = {"extent": (0, size, size, 0), "zorder": 0.5}
            ax.imshow(shown / (largest or 1), cmap=RELEVANCE, vmin=-1, vmax=1, **over)
        if not largest > 0:
            missing = "empty" if largest == 0 else "no stable map"
            ax.text(size / 2, 0.97 * size, missing, ha="center", fontsize=7, path_effects=LIGHT_RIM)
    style = {"ha": "center", "weight": "bold", "fontsize": point, "color": INK}
    for ax, text in zip(axes[0], headings):
        ax.annotate(text, (0.5, 1), (0, 5 + 75 * head), "axes fraction", "offset points", **style)
    scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(-1, 1), RELEVANCE)
    shape = {"fraction": 0.02, "pad": 0.01, "aspect": 30, "shrink": 0.8 if rows > 1 else 1, "panchor": False}
    bar = figure.colorbar(scale, ax=axes, ticks=(-1, -0.5, 0, 0.5, 1), **shape)
    bar.set_label("relevance of each map /\nits largest magnitude", fontsize=7)
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
    columns = min(4, len(names))
    if columns == 1:  # as a square it would be narrower than its legend
        figure = new_figure(2.7, data_label)
        axes = [figure.subplots()]
    else:
        figure, axes = panels(len(names), columns, 1.35 if columns > 2 else 2.2, 0.32, data_label)
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
        axis = "IoU, mean of lesion\nand background" if reading == "mean_iou" else "IoU of the lesion"
        ax.set_ylabel(axis if k % columns == 0 else "")
        grid(ax, "both")
    _beneath(figure, "Threshold, as a share of the map's maximum (in brackets: pairs of film and class)")
    highest = np.nanmax(table[["value", "ci_high", "floor", *(["paper"] if told else [])]], initial=0)
    for ax in axes:
        top = min(max(0.05, 1.08 * highest), 1.02)
        ax.set_ylim(-0.02 * top if reading == "iou_lesion" else 0, top)
    handles.append(Line2D([], [], color=GREY, linewidth=0.9, label="95 % interval"))
    if told:
        handles.append(Line2D([], [], color=GREY, marker="o", label="hollow: the paper's (CheXNet)", **paper))
    legend(figure, [*handles, Line2D([], [], label="empty mask", **empty)])
    return figure


@STYLE
def share_dots(means: pd.DataFrame, *, data_label: str) -> Figure:
    """Where the positive relevance lies: its share in each region, a panel per region, a line per kind of film and
    model.

    `means` : of `attribution.share_means` by model, kind, method and region. The black tick is what area alone would
    give; the panel says where the films of a kind have no such region, and the line on how many films a method has no
    positive relevance.
    """
    kinds, regions = (list(dict.fromkeys(means[column])) for column in ("kind", "region"))
    methods, place, labels, y = present(METHODS, means["method"]), {}, [], 0.0
    counts = means.groupby(["kind", "model", "method"])["n"].max()  # over regions: a kind may lack one
    films = (means["n"] + means["n_skipped"]).groupby(means["kind"]).max()
    for kind in kinds:
        for model in present(MODELS, means.loc[means["kind"] == kind, "model"]):
            none = films[kind] - counts[kind, model].reindex(methods)
            parts = (
                f"{METHODS.get(name, name)}: none on {none[name]:.0f} of {films[kind]}" for name in none[none > 0].index
            )
            place[kind, model] = y
            labels.append("\n".join((f"{kind}, {MODELS.get(model, model)}", *parts)))
            y += 1
        y += 0.4
    figure = new_figure(0.3 * y + 0.95, data_label)
    axes, handles = figure.subplots(1, max(len(regions), 1), squeeze=False, sharey=True)[0], []
    area = {"markersize": 11, "markeredgewidth": 1.1, "label": "share by area", "zorder": 1.5}
    for ax, region in zip(axes, regions):
        known = means[(means["region"] == region) & (means["n"] > 0)]
        for k, ((kind, model), height) in enumerate(place.items()):
            rows = known[(known["kind"] == kind) & (known["model"] == model)]
            if k % 2 == 0:
                ax.axhspan(height - 0.5, height + 0.5, color="#f2f2f2", linewidth=0)
            if counts[kind].any() and not (known["kind"] == kind).any():
                ax.text(0.5, height, f"no {region}", ha="center", va="center", color=GREY, fontsize=7)
            for row in rows.itertuples():
                style, name = METHOD_STYLES.get(row.method, _OTHER), METHODS.get(row.method, row.method)
                at = height + (methods.index(row.method) - (len(methods) - 1) / 2) * 0.7 / len(methods)
                ax.hlines(at, row.ci_low, row.ci_high, color=style["color"], linewidth=1)
                dot = {"linestyle": "none", "markersize": 3.8, "markeredgewidth": 0, "label": name}
                handles += ax.plot(row.value, at, **dot, **style)
            if len(rows):
                handles += ax.plot(rows["area"].mean(), height, "|k", **area)
        ax.set_title(REGIONS.get(region, f"in {region}").capitalize(), pad=3)
        ax.set_xlim(-0.02, 1.02)
        ax.set_xticks((0, 0.5, 1), ("0", "50", "100 %"))
        ax.tick_params(axis="y", length=0)
        grid(ax)
    _beneath(figure, "Share of the positive relevance")
    axes[0].set_yticks(list(place.values()), labels)
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
    titles = {"ssim": "SSIM", "rank": "Rank correlation", "abs_rank": "Rank correlation, its size"}
    axes = figure.subplots(1, 3, sharey=True)
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
        ax.axvline(len(stages) - 1.5, **DASHED)  # what stands behind it is no stage
        ax.set_xticks(range(len(stages)), [stage_name(stage) for stage in stages], rotation=60, ha="right")
        ax.set_title(title)
        grid(ax, "y")
    axes[0].set_ylim(min(0, *axes[0].get_ylim()), 1.03)
    _beneath(figure, "Made random from the head down to here")
    hollow = {"marker": "o", "markerfacecolor": "white", "linestyle": "none", "color": GREY, "markersize": 3.8}
    handles.append(Line2D([], [], label="random network's map of another film", **hollow))
    legend(figure, [*handles, Line2D([], [], color=GREY, linewidth=0.9, label="95 % interval")])
    return figure


def _beneath(figure, text):
    """One label for the horizontal axes of all panels, above the strip of the data label."""
    layout, line = figure.get_layout_engine(), 0.17 / figure.get_figheight()
    left, bottom, width, height = layout.get()["rect"]
    figure.text(0.5, bottom, text, ha="center", va="bottom", fontsize=8)
    layout.set(rect=(left, bottom + line, width, height - line))
