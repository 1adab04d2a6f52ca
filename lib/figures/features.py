"""Li et al.: the distribution of class activations, maps on individual and common scales, and what they follow or
respond to."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import product

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from lib.figures.style import (
    BOX,
    DARK_RIM,
    FILM_GREY,
    HEAT,
    INK,
    LIGHT_RIM,
    NEUTRAL,
    SIGNED,
    STYLE,
    WIDTH,
    YELLOW,
    class_name,
    correlation_text,
    legend,
    new_figure,
    panels,
    present,
    show_film,
)
from lib.tables.li import CAMS, SCALES


@STYLE
def activation_distribution(
    edges: np.ndarray,
    counts: np.ndarray,
    p10: np.ndarray,
    p90: np.ndarray,
    scale: tuple[np.ndarray, np.ndarray],
    classes: Sequence[str],
    *,
    kind: str = "tanh",
    data_label: str,
) -> Figure:
    """Raw class activations over a whole data set, a panel per class, with P10, P90 and the common scale (Li et al.,
    eq. 1 and 2).

    Parameters
    ----------
    edges : (B + 1,) for all classes, or (C, B + 1).
    counts : pixels in each bin, (C, B); drawn on a logarithmic axis.
    p10, p90 : (C,) percentiles of the pixels.
    scale : alpha and beta, (C,) each; where they are NaN there is no scale and the panel says so.
    kind : 'tanh', drawn as tanh(alpha x + beta), or 'linear', alpha x + beta.

    Raises
    ------
    ValueError : shapes that do not agree.
    """
    counts, p10, p90 = np.asarray(counts, float), np.asarray(p10, float), np.asarray(p90, float)
    n = len(classes)
    ends = (counts.shape[-1] + 1,)
    if counts.ndim != 2 or len(counts) != n or np.shape(edges) not in (ends, (n, *ends)):
        wanted = f"for {n} classes they must be ({n}, B) and (B + 1,) or ({n}, B + 1)"
        raise ValueError(f"counts are {counts.shape}, edges {np.shape(edges)}: {wanted}")
    alpha, beta = (np.asarray(values, float) for values in scale)
    shapes = [values.shape for values in (p10, p90, alpha, beta)]
    if set(shapes) != {(n,)}:
        raise ValueError(f"p10, p90, alpha and beta are {', '.join(map(str, shapes))}: they must be ({n},)")
    edges = np.broadcast_to(edges, (n, counts.shape[1] + 1))
    columns = min(5, n)
    if n == 1:
        figure = new_figure(2.5, data_label, 5.0)
        axes = [figure.subplots()]
    else:
        figure, axes = panels(n, columns, 0.95 if columns > 3 else 1.8, 0.42, data_label)
    top, handles = 3 * max(np.nanmax(counts, initial=1), 1), []
    for i, ax in enumerate(axes):
        some = np.nan_to_num(counts[i])
        ax.set(title=class_name(classes[i]), yscale="log", ylim=(0.7, top), xlim=_span(edges[i], some))
        bars = {"baseline": 0.7, "fill": True, "color": (NEUTRAL, 0.45), "label": "pixels (left axis)"}
        handles.append(ax.stairs(some, edges[i], **bars))
        right = ax.twinx()
        right.set(ylim=(-1.08, 1.08), yticks=(-1, 0, 1))
        right.tick_params(labelright=(i + 1) % columns == 0 or i == n - 1)
        right.spines["right"].set_visible(True)
        if np.isfinite(alpha[i]):
            x = np.linspace(*ax.get_xlim(), 300)
            z = alpha[i] * x + beta[i]
            z = np.tanh(z) if kind == "tanh" else z
            handles += right.plot(x, z, color=YELLOW, linewidth=1.2, label="common scale (right axis)")
        else:
            text = "no scale:\nall the same" if np.isfinite(p10[i]) else "no films"
            centred = {"ha": "center", "va": "center", "transform": ax.transAxes}
            right.text(0.5, 0.5, text, fontsize=7, path_effects=LIGHT_RIM, **centred)
        for x in (p10[i], p90[i]):
            if np.isfinite(x):
                handles.append(right.axvline(x, color=INK, linewidth=0.8, linestyle=(0, (3, 2)), label="P10 and P90"))
        ax.set_xlabel("Class activation" if i + columns >= n else "", fontsize=7)
        ax.set_ylabel("Pixels" if i % columns == 0 else "", fontsize=7)
        ax.tick_params(labelleft=i % columns == 0)
        ax.xaxis.set_major_locator(MaxNLocator(3))
        ax.yaxis.set_major_locator(LogLocator(numticks=5))
        ax.yaxis.set_minor_locator(NullLocator())
    legend(figure, handles)
    return figure


def _span(edges: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    filled = np.flatnonzero(counts)
    return (edges[filled[0]], edges[filled[-1] + 1]) if len(filled) else (edges[0], edges[-1])


def film_titles(labels: Sequence[str], confidence: Sequence[float] | None = None) -> list[str]:
    """Of each film its first two labels, '|' between them in `labels`, and the confidence where there is one."""
    names = [(text or "not normal").split("|") for text in labels]
    titles = [", ".join(found[:2]) + ", …" * (len(found) > 2) for found in names]
    return titles if confidence is None else [f"{title}\np = {p:.2f}" for title, p in zip(titles, confidence)]


def class_boxes(boxes: pd.DataFrame, images: Sequence[str], name: str) -> list[np.ndarray]:
    """Of each film its boxes (K, 4) of one class, K = 0 where it has none. `boxes` : image, class, x1, y1, x2, y2."""
    corners = boxes[boxes["class"] == name].set_index("image")[["x1", "y1", "x2", "y2"]]
    return [corners[corners.index == image].to_numpy(float) for image in images]


@STYLE
def scaled_cams(
    films: np.ndarray,
    maps: Mapping[tuple[str, str], np.ndarray],
    titles: Sequence[str],
    confidence: np.ndarray,
    *,
    boxes: Sequence | None = None,
    data_label: str,
) -> Figure:
    """Li et al., Figs. 6 to 8: a row per film, the most confident first; the film, then its maps on individual and on
    common scales.

    Parameters
    ----------
    films : uint8 (N, S, S).
    maps : by kind and method, float (N, h, w) over the whole film, as of `features.scale.pictures`: kind '' on its own
    scale in [0, 1], any other ('S-', 'FS-S-') on the common one in [-1, 1]. A map of NaN is left out. The zero of the
    common scale lies below P10, which is 0.1: blue marks what almost no pixel of the data set falls below.
    titles : N, such as of `film_titles`.
    confidence : (N,) of the selected class; orders the rows, NaN last.
    boxes : N sequences of (x1, y1, x2, y2) in pixels of S.

    Raises
    ------
    ValueError : lengths that do not agree, values outside the scale of their column.
    """
    boxes, drawn = [()] * len(films) if boxes is None else boxes, {}
    for (kind, method), values in maps.items():
        drawn[f"{kind}{CAMS.get(method, method)}"] = values, -1 if kind else 0
    lengths = {"titles": len(titles), "confidences": len(confidence), "boxes": len(boxes)}
    lengths |= {f"maps {name}": len(values) for name, (values, _) in drawn.items()}
    if set(lengths.values()) != {len(films)}:
        found = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise ValueError(f"{len(films)} films, but {found}")
    for name, (values, low) in drawn.items():
        known = np.asarray(values)[np.isfinite(values)]
        if known.size and (known.min() < low - 1e-6 or known.max() > 1 + 1e-6):
            reach = f"reach from {known.min():.3g} to {known.max():.3g}"
            raise ValueError(f"maps {name!r} {reach}: scale them to [{low}, 1] first")
    columns, label = len(drawn) + 1, 0.85
    side = min((WIDTH - label - 0.1) / columns, 1.6)
    names = ["Film", *(textwrap.fill(name, max(int(side * 72 / 4.6), 8)) for name in drawn)]
    head = 0.13 * max(name.count("\n") + 1 for name in names)
    height, width = len(films) * (side + 0.02) + head + 0.75, max(side * columns + label + 0.1, 4.6)
    figure = new_figure(height, data_label, width)
    # Below: the colour bars, which must not narrow single columns.
    figure.get_layout_engine().set(rect=(0, 0.6 / height, 1, 1 - 0.6 / height))
    axes = figure.subplots(len(films), columns, squeeze=False) if len(films) else np.empty((0, columns))
    for row, i in enumerate(np.argsort(-np.asarray(confidence, float), kind="stable")):
        for ax in axes[row]:
            show_film(ax, films[i], boxes[i])
        axes[row, 0].set_ylabel(class_name(titles[i]), rotation=0, ha="right", va="center", fontsize=7)
        for ax, (values, low) in zip(axes[row, 1:], drawn.values()):
            if np.isfinite(values[i]).all():
                _lay(ax, values[i], films.shape[-1], SIGNED if low else HEAT, low, 1)
            else:
                ax.text(0.5, 0.5, "no map", transform=ax.transAxes, ha="center", color="white", path_effects=DARK_RIM)
    for ax, name in zip(axes[0], names) if len(films) else ():
        ax.set_title(name, fontsize=7, weight="bold", pad=3)
    bars = {0: (HEAT, "individual scale of each map"), -1: (SIGNED, "common scale of all films")}
    lows = {low for _, low in drawn.values()}
    for k, (low, (cmap, text)) in enumerate(bar for bar in bars.items() if bar[0] in lows):
        left = (label + 0.15 + k * (width - label) / 2) / width
        place = figure.add_axes((left, 0.5 / height, 1.4 / width, 0.07 / height))
        place.set_in_layout(False)
        scale = mpl.cm.ScalarMappable(Normalize(low, 1), cmap)
        bar = figure.colorbar(scale, cax=place, orientation="horizontal", ticks=range(low, 2))
        bar.set_label(text, fontsize=7, labelpad=1)
        place.set_facecolor(FILM_GREY)
    return figure


def _lay(ax: Axes, values: np.ndarray, size: int, cmap: ListedColormap, low: float, high: float) -> None:
    ax.imshow(values, cmap=cmap, vmin=low, vmax=high, extent=(0, size, size, 0), interpolation="bilinear", zorder=0.5)


@STYLE
def consistency_scatter(sums: pd.DataFrame, *, data_label: str) -> Figure:
    """Li et al., Figs. 9 and 10: the sum of class activations against the logit, a row of panels per method and a
    column per scale.

    `sums` : a row per film, method, scale and optionally features ('all', 'principal'): logit, activation. Scales as in
    `lib.tables.li`. Rows with NaN are not drawn and not counted, nor are principal features on individual scales, which
    the paper has no use for.
    """
    sums = sums if "features" in sums else sums.assign(features="all")
    sums = sums[(sums["features"] == "all") | (sums["scale"] != "individual")]
    methods = present(CAMS, sums["method"])
    shown = set(sums[["scale", "features"]].itertuples(index=False, name=None))
    every = product(dict.fromkeys([*SCALES, *sums["scale"]]), dict.fromkeys(["all", *sums["features"]]))
    columns = [pair for pair in every if pair in shown]
    figure = new_figure(max(len(methods), 1) * 1.25 + 0.7, data_label, WIDTH if len(columns) > 1 else 3.6)
    axes = figure.subplots(max(len(methods), 1), max(len(columns), 1), squeeze=False, sharex=True)
    for (i, method), (j, (scale, features)) in product(enumerate(methods), enumerate(columns)):
        ax = axes[i, j]
        rows = sums[(sums["method"] == method) & (sums["scale"] == scale) & (sums["features"] == features)]
        rows = rows.dropna(subset=["logit", "activation"])
        x, y = rows["logit"].to_numpy(float), rows["activation"].to_numpy(float)
        ax.plot(x, y, ".", color=NEUTRAL, alpha=0.35, markersize=3, markeredgewidth=0, rasterized=True)
        ranks = rows["logit"].rank(), rows["activation"].rank()
        text = f"Pearson {correlation_text(x, y)}\nSpearman {correlation_text(*ranks)}\nn = {len(x):,}"
        ax.annotate(text, (0.03, 0.97), xycoords="axes fraction", va="top", fontsize=7, path_effects=LIGHT_RIM)
        ax.margins(y=0.12)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.yaxis.set_major_locator(MaxNLocator(4))
        ax.ticklabel_format(axis="y", scilimits=(-3, 4))
        if i == 0:
            title = SCALES.get(scale, scale) + ("" if features == "all" else f", {features} features")
            ax.set_title(textwrap.fill(title, 85 // len(columns)))
        if j == 0:
            ax.set_ylabel(CAMS.get(method, method), weight="bold")
    figure.supxlabel("Logit of the selected class", fontsize=8)
    figure.supylabel("Sum of class activations", fontsize=8)
    return figure


@STYLE
def confounder_panel(
    films: np.ndarray, maps: np.ndarray, markers: Sequence, titles: Sequence[str], *, data_label: str
) -> Figure:
    """What one suspicious feature responds to: films above, the same films with the weighted feature below, all on one
    scale.

    Parameters
    ----------
    films : uint8 (K, S, S).
    maps : float (K, h, w), the feature times its weight, signed, over the whole film.
    markers : K, what might be the confounder: a boolean mask (S, S), or a sequence of boxes (x1, y1, x2, y2) in pixels
    of S; empty: none.
    titles : K, printed as they are: file names keep their underscores.

    Raises
    ------
    ValueError : lengths that do not agree, or a mask of another size.
    """
    if not (len(films) == len(maps) == len(markers) == len(titles)):
        found = f"{len(films)} films, {len(maps)} maps, {len(markers)} markers, {len(titles)} titles"
        raise ValueError(f"{found}: give as many of each")
    columns = min(max(len(films), 1), 6)
    side, size = min((WIDTH - 0.6) / columns, 1.6), films.shape[-1]
    wrapped = [textwrap.fill(title, max(int(side * 72 / 4), 8)) for title in titles]
    planted = any(np.asarray(marker).dtype == bool for marker in markers)
    rows, lines = -(-len(films) // columns), max((title.count("\n") + 1 for title in wrapped), default=1)
    figure = new_figure(rows * (2 * side + 0.08 + 0.11 * lines) + 0.45, data_label, max(side * columns + 0.6, 3.2))
    axes = figure.subplots(max(2 * rows, 2), columns, squeeze=False)
    reach = float(np.nanmax(np.abs(maps), initial=0)) or 1.0
    low, cmap = (-reach, SIGNED) if np.nanmin(maps, initial=0) < 0 else (0.0, HEAT)
    for ax in axes.flat:
        ax.set_axis_off()
    for i, (film, title) in enumerate(zip(films, wrapped)):
        above, below = axes[2 * (i // columns) : 2 * (i // columns) + 2, i % columns]
        for ax in (above, below):
            ax.set_axis_on()
            _mark(ax, film, markers[i])
        _lay(below, maps[i], size, cmap, low, reach)
        above.set_title(title, fontsize=7, pad=2)
    scale = mpl.cm.ScalarMappable(Normalize(low, reach), cmap)
    bar = figure.colorbar(scale, ax=axes, fraction=0.02, pad=0.01, aspect=30, label="feature times its weight")
    bar.ax.set_facecolor(FILM_GREY)
    if any(map(np.any, markers)):
        label = "planted marker" if planted else "annotated box"
        legend(figure, [Line2D([], [], color="#00a5b8", linewidth=1, label=label)])
    return figure


def _mark(ax: Axes, film: np.ndarray, marker: np.ndarray | Sequence) -> None:
    marker, size = np.asarray(marker), film.shape[-1]
    if marker.dtype != bool:
        show_film(ax, film, marker)
        return
    if marker.shape != film.shape:
        raise ValueError(f"a marker mask is {marker.shape}, its film {film.shape}")
    show_film(ax, film)
    if marker.any() and not marker.all():
        fine = max(256 // size, 1)  # else the contour cuts the corners of a few large pixels
        centres = (np.arange(size * fine) + 0.5) / fine
        ax.contour(centres, centres, np.kron(marker, np.ones((fine, fine))), levels=[0.5], colors=[BOX], linewidths=1)
