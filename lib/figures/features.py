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
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lib.data.release import NO_FINDING
from lib.figures.release import film_grid
from lib.figures.style import (
    BOX,
    DARK_RIM,
    FILM_GREY,
    GREY,
    HEAT,
    INK,
    LIGHT_RIM,
    NEUTRAL,
    PAGE,
    SIGNED,
    STYLE,
    WIDTH,
    YELLOW,
    class_name,
    correlation_text,
    legend,
    new_figure,
    other_findings,
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
    """Raw class activations over a whole data set, a panel per class, with P10, P90, the raw 0 and the common scale (Li
    et al., eq. 1 and 2).

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
    unit = int(np.floor(np.log10(max(np.abs(edges[np.isfinite(edges)]).max(initial=0), 1e-30))))
    unit = unit if not -2 < unit < 4 else 0  # of the ticks: small activations would print as -0.0025 over each other
    times = f" × $10^{{{-unit}}}$" if unit else ""
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
            z = _on_scale(alpha[i] * x + beta[i], kind)
            handles += right.plot(x, z, color=YELLOW, linewidth=1.2, label="common scale (right axis)")
        else:
            text = "no scale:\nall the same" if np.isfinite(p10[i]) else "no films"
            centred = {"ha": "center", "va": "center", "transform": ax.transAxes}
            right.text(0.5, 0.5, text, fontsize=7, path_effects=LIGHT_RIM, **centred)
        for x in (p10[i], p90[i]):
            if np.isfinite(x):
                handles.append(right.axvline(x, color=INK, linewidth=0.8, linestyle=(0, (3, 2)), label="P10 and P90"))
        if ax.get_xlim()[0] < 0 < ax.get_xlim()[1]:
            handles.append(right.axvline(0, color=GREY, linewidth=0.8, label="raw 0"))
        ax.set_xlabel(f"Class activation{times}" if i + columns >= n else "", fontsize=7)
        ax.set_ylabel("Pixels" if i % columns == 0 else "", fontsize=7)
        right.set_ylabel("Common scale" if (i + 1) % columns == 0 or i == n - 1 else "", fontsize=7)
        ax.tick_params(labelleft=i % columns == 0)
        ax.xaxis.set_major_locator(MaxNLocator(3))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x * 10.0**-unit:g}"))
        ax.yaxis.set_major_locator(LogLocator(numticks=5))
        ax.yaxis.set_minor_locator(NullLocator())
    legend(figure, handles)
    return figure


def _on_scale(values: np.ndarray | float, kind: str) -> np.ndarray | float:
    return np.tanh(values) if kind == "tanh" else values


def _span(edges: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    filled = np.flatnonzero(counts)
    return (edges[filled[0]], edges[filled[-1] + 1]) if len(filled) else (edges[0], edges[-1])


def films_to_show(
    films: pd.DataFrame, order: np.ndarray, of_class: np.ndarray, boxes: pd.DataFrame, name: str
) -> np.ndarray:
    """Places of four films of a class, of those with a box where these suffice, and of two others, healthy ones where
    these suffice; either kind evenly spread over `order`.

    `films` : image, labels. `order` : int (N,), places, such as from the surest to the least sure. `of_class` : 0/1
    (N,). `boxes` : image, class.
    """
    carries = np.asarray(of_class, bool)[order]
    boxed = films["image"].isin(boxes.loc[boxes["class"] == name, "image"]).to_numpy()[order]
    healthy = (films["labels"] == NO_FINDING).to_numpy()[order]
    chosen = []
    for kind, best, n in ((carries, boxed, 4), (~carries, healthy, 2)):
        places = order[kind & best] if (kind & best).sum() >= n else order[kind]
        chosen.append(places[np.linspace(0, len(places) - 1, min(n, len(places))).astype(int)])
    return np.concatenate(chosen)


def film_titles(films: pd.DataFrame, confidence: Sequence[float] = (), name: str = "") -> list[str]:
    """Of each film two of its labels, class `name` first, its own name and, where it is given, the confidence in the
    class.

    `films` : image; labels, '|' between them.
    """
    found = [sorted((text or "not normal").split("|"), key=lambda one: one != name) for text in films["labels"]]
    titles = [", ".join(labels[:2]) + ", …" * (len(labels) > 2) for labels in found]
    titles = [f"{title}\n{image.rsplit('.', 1)[0]}" for title, image in zip(titles, films["image"])]
    said = [f"\nP({class_name(name)}) = {p:.2f}" for p in confidence] or [""] * len(titles)
    return [title + text for title, text in zip(titles, said, strict=True)]


def class_boxes(boxes: pd.DataFrame, images: Sequence[str], name: str) -> list[np.ndarray]:
    """Of each film its boxes (K, 4) of one class, K = 0 where it has none. `boxes` : image, class, x1, y1, x2, y2."""
    corners = boxes[boxes["class"] == name].set_index("image")[["x1", "y1", "x2", "y2"]]
    return [corners[corners.index == image].to_numpy(float) for image in images]


def marked(boxes: pd.DataFrame, images: Sequence[str], name: str) -> dict[str, list]:
    """`boxes` and `others` of `scaled_cams`: those of one class, and those of every other finding of these films."""
    pairs = pd.DataFrame({"image": list(images), "class": name})
    return {"boxes": class_boxes(boxes, images, name), "others": other_findings(boxes, pairs)}


@STYLE
def scaled_cams(
    films: np.ndarray,
    maps: Mapping[tuple[str, str], np.ndarray],
    titles: Sequence[str],
    confidence: np.ndarray,
    *,
    scales: Mapping[str, tuple[np.ndarray, np.ndarray]],
    selected: int,
    kind: str = "tanh",
    boxes: Sequence | None = None,
    others: Sequence | None = None,
    data_label: str,
) -> Figure:
    """Li et al., Figs. 6 to 8: a row per film, the most confident first; the film, then its maps on individual and on
    common scales. No taller than a page; methods whose maps are the same to 0.001 share their columns.

    The colours of a common scale are centred where it puts a raw value of 0: what speaks for the class is red, what
    speaks against it blue, each from clear at 0 to full at its own end of the scale. The scale's own zero would not do:
    it lies below P10, and where most pixels of the data set speak against a class, P90 does too.

    Parameters
    ----------
    films : uint8 (N, S, S).
    maps : by kind and method, float (N, h, w) over the whole film, as of `features.scale.pictures`: kind '' on its own
    scale in [0, 1], any other ('S-', 'FS-S-') on the common one in [-1, 1]. A map of NaN is left out, one of zeros says
    that it is empty.
    titles : N, such as of `film_titles`; names of files keep their underscores.
    confidence : (N,) of the selected class; orders the rows, NaN last.
    scales, selected, kind : as those maps were made with.
    boxes, others : N sequences of (x1, y1, x2, y2) in pixels of S, and of what `style.other_findings` gives, which are
    drawn on the film alone; see `marked`.

    Raises
    ------
    ValueError : lengths that do not agree, values outside the scale of their column.
    """
    boxes, drawn = [()] * len(films) if boxes is None else boxes, {}
    for (prefix, method), values in maps.items():
        drawn[prefix, method] = np.asarray(values, float), -1 if prefix else 0
    lengths = {"titles": len(titles), "confidences": len(confidence), "boxes": len(boxes)}
    lengths |= {f"maps {_column(*key)}": len(values) for key, (values, _) in drawn.items()}
    if set(lengths.values()) != {len(films)}:
        found = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise ValueError(f"{len(films)} films, but {found}")
    for key, (values, low) in drawn.items():
        known = values[np.isfinite(values)]
        if known.size and (known.min() < low - 1e-6 or known.max() > 1 + 1e-6):
            reach = f"reach from {known.min():.3g} to {known.max():.3g}"
            raise ValueError(f"maps {_column(*key)!r} {reach}: scale them to [{low}, 1] first")
    zeros = {method: np.clip(_on_scale(beta[selected], kind), -1, 1) for method, (_, beta) in scales.items()}
    own = {method: [values.ravel() for (_, one), (values, _) in drawn.items() if one == method] for _, method in drawn}
    alike = _alike({method: np.concatenate(found) for method, found in own.items()}, 1e-3)
    drawn = {key: found for key, found in drawn.items() if key[1] in alike}
    columns, label = len(drawn) + 1, max((0.056 * len(line) for line in "\n".join(titles).split("\n")), default=0) + 0.1
    side = min((WIDTH - label - 0.1) / columns, 1.6, (PAGE - 1.3) / max(len(films), 1) - 0.04)
    names = ["Film"]
    for prefix, method in drawn:
        same = "".join(f",\n{CAMS.get(other, other)}" for other in alike[method][1:])
        zero = f"\nraw 0 at {zeros[method]:.3f}" if prefix and np.isfinite(zeros[method]) else ""
        names.append(textwrap.fill(_column(prefix, method), max(int(side * 72 / 4.6), 8)) + same + zero)
    head = 0.12 * max(name.count("\n") + 1 for name in names)
    height, width = len(films) * (side + 0.04) + head + 0.7, max(side * columns + label + 0.1, 4.6)
    figure = new_figure(height, data_label, width)
    # Below: the colour bars, which must not narrow single columns.
    figure.get_layout_engine().set(rect=(0, 0.6 / height, 1, 1 - 0.6 / height), h_pad=0.02, w_pad=0.02)
    axes = figure.subplots(len(films), columns, squeeze=False) if len(films) else np.empty((0, columns))
    for row, i in enumerate(np.argsort(-np.asarray(confidence, float), kind="stable")):
        for ax in axes[row]:
            show_film(ax, films[i], boxes[i], others=others[i] if others is not None and ax is axes[row, 0] else ())
        axes[row, 0].set_ylabel(titles[i], rotation=0, ha="right", va="center", fontsize=7)
        for ax, ((_, method), (values, low)) in zip(axes[row, 1:], drawn.items()):
            if not np.isfinite(values[i]).all() or not (low or values[i].any()):
                text = "no map" if np.isnan(values[i]).any() else "empty"
                ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", color="white", path_effects=DARK_RIM)
            elif low:
                _lay(ax, _from_zero(values[i], zeros[method]), films.shape[-1], SIGNED, -1, 1)
            else:
                _lay(ax, values[i], films.shape[-1], HEAT, 0, 1)
    for ax, name in zip(axes[0], names) if len(films) else ():
        ax.set_title(name, fontsize=7, weight="bold", pad=3)
    bars = {
        0: (HEAT, "individual scale of each map", "01"),
        -1: (SIGNED, "common scale of all films", ("−1", "raw 0", "1")),
    }
    lows = {low for _, low in drawn.values()}
    for k, (low, (cmap, text, ticks)) in enumerate(bar for bar in bars.items() if bar[0] in lows):
        left = (label + 0.15 + k * (width - label) / 2) / width
        place = figure.add_axes((left, 0.5 / height, 1.4 / width, 0.07 / height))
        place.set_in_layout(False)
        scale = mpl.cm.ScalarMappable(Normalize(low, 1), cmap)
        bar = figure.colorbar(scale, cax=place, orientation="horizontal")
        bar.set_ticks(range(low, 2), labels=ticks)
        bar.set_label(text, fontsize=7, labelpad=1)
        place.set_facecolor(FILM_GREY)
    return figure


def _column(prefix: str, method: str) -> str:
    return f"{prefix}{CAMS.get(method, method)}"


def _from_zero(values: np.ndarray, zero: float) -> np.ndarray:
    """Values of [-1, 1] as the share of the way from `zero` to the end on their side, negative below it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(values >= zero, (values - zero) / (1 - zero), (values - zero) / (1 + zero))
    return np.nan_to_num(share, nan=0.0)  # a zero at an end: nothing lies beyond it


def _alike(arrays: Mapping[str, np.ndarray], tolerance: float) -> dict[str, list[str]]:
    """The methods that have the same array, by the first of them."""
    groups: dict[str, list[str]] = {}
    for name, own in arrays.items():
        near = {"rtol": 0, "atol": tolerance, "equal_nan": True}
        like = (
            first for first in groups if arrays[first].shape == own.shape and np.allclose(arrays[first], own, **near)
        )
        groups.setdefault(next(like, name), []).append(name)
    return groups


def _lay(ax: Axes, values: np.ndarray, size: int, cmap: ListedColormap, low: float, high: float) -> None:
    ax.imshow(values, cmap=cmap, vmin=low, vmax=high, extent=(0, size, size, 0), interpolation="bilinear", zorder=0.5)


@STYLE
def consistency_scatter(sums: pd.DataFrame, *, data_label: str) -> Figure:
    """Li et al., Figs. 9 and 10: the sum of class activations against the logit, a row of panels per method and a
    column per scale. No taller than a page; methods with the same sums, up to a unit, share a row.

    Panels whose sums can be compared have one vertical axis: all of individual scales, all of scaled values, and of raw
    sums, which have a unit of their own in every method, those of a row.

    `sums` : a row per film, method, scale and optionally features ('all', 'principal'): logit, activation. Scales as in
    `lib.tables.li`. Rows with NaN are not drawn and not counted, nor are principal features on individual scales, which
    the paper has no use for.
    """
    sums = sums if "features" in sums else sums.assign(features="all")
    sums = sums[(sums["features"] == "all") | (sums["scale"] != "individual")].dropna(subset=["logit", "activation"])
    shown = set(sums[["scale", "features"]].itertuples(index=False, name=None))
    every = product(dict.fromkeys([*SCALES, *sums["scale"]]), dict.fromkeys(["all", *sums["features"]]))
    columns = [pair for pair in every if pair in shown]
    groups = sums.groupby(["method", "scale", "features"])[["logit", "activation"]]
    points = {key: rows.to_numpy(float) for key, rows in groups}
    unitless = {key: values / np.maximum(np.abs(values).max(axis=0), 1e-300) for key, values in points.items()}
    methods = present(CAMS, sums["method"])
    own = {method: [values for (one, *_), values in unitless.items() if one == method] for method in methods}
    rows_of = _alike({method: np.concatenate(found) for method, found in own.items()}, 1e-4)
    n, wide = max(len(rows_of), 1), len(columns) > 3
    comma = "\n" if wide else ", "
    figure = new_figure(min(n * (1.45 if wide else 1.3) + 0.9, PAGE), data_label, WIDTH if len(columns) > 1 else 3.6)
    axes = figure.subplots(n, max(len(columns), 1), squeeze=False, sharex=True)
    spans: dict[tuple, list[Axes]] = {}
    for (i, method), (j, pair) in product(enumerate(rows_of), enumerate(columns)):
        ax, (scale, features) = axes[i, j], pair
        x, y = points.get((method, *pair), np.empty((0, 2))).T
        size = 3 if len(x) > 50 else 5
        ax.plot(x, y, ".", color=NEUTRAL, alpha=0.5, markersize=size, markeredgewidth=0, rasterized=True)
        ranks = pd.Series(x).rank(), pd.Series(y).rank()
        text = f"r = {correlation_text(x, y)}{comma}ρ = {correlation_text(*ranks)}, n = {len(x):,}"
        ax.set_title(text, fontsize=7, pad=2)
        spans.setdefault((scale, i if scale == "common_raw" else -1), []).append(ax)
        ax.xaxis.set_major_locator(MaxNLocator(3 if wide else 5))
        ax.yaxis.set_major_locator(MaxNLocator(4))
        ax.ticklabel_format(axis="y", scilimits=(-3, 5))
        if i == 0:
            title = SCALES.get(scale, scale) + ("" if features == "all" else f", {features} features")
            above = (0.5, 1), (0, 24 if wide else 14), "axes fraction", "offset points"
            letters = int((WIDTH - 1) / len(columns) * 72 / 4.9)
            ax.annotate(textwrap.fill(title, letters), *above, ha="center", weight="bold", fontsize=7)
        if j == 0:
            ax.set_ylabel("\n".join(CAMS.get(name, name) for name in rows_of[method]), weight="bold", fontsize=7)
    for together in spans.values():
        values = np.concatenate([ax.lines[0].get_ydata() for ax in together])
        low, high = (values.min(), values.max()) if values.size else (0, 1)
        for ax in together:
            ax.set_ylim(low - 0.06 * (high - low or 1), high + 0.06 * (high - low or 1))
    for ax in axes[-1]:
        ax.set_xlabel(f"Logit of the class\nr: Pearson{comma}ρ: Spearman", fontsize=7)
    figure.supylabel("Sum of class activations", fontsize=8)
    return figure


@STYLE
def confounder_panel(
    films: np.ndarray,
    maps: np.ndarray,
    markers: Sequence,
    titles: Sequence[str],
    *,
    name: str,
    features: Sequence[int],
    data_label: str,
) -> Figure:
    """What suspicious features respond to: films above, the same films with the weighted features below, all on one
    scale.

    Parameters
    ----------
    films : uint8 (K, S, S).
    maps : float (K, h, w), the features times their weights, signed, over the whole film.
    markers : K, what might be the confounder: a boolean mask (S, S), or a sequence of boxes (x1, y1, x2, y2) in pixels
    of S; empty: none.
    titles : K, printed as they are: file names keep their underscores.
    name : the class of the boxes.
    features : their numbers, the most important first, of which three are named.

    Raises
    ------
    ValueError : lengths that do not agree, or a mask of another size.
    """
    if not (len(films) == len(maps) == len(markers) == len(titles)):
        found = f"{len(films)} films, {len(maps)} maps, {len(markers)} markers, {len(titles)} titles"
        raise ValueError(f"{found}: give as many of each")
    columns = min(max(len(films), 1), 6)
    side, size = min((WIDTH - 0.6) / columns, 1.6), films.shape[-1]
    letters = max(int(side * 72 / 4), 8)
    wrapped = ["\n".join(textwrap.fill(line, letters) for line in title.split("\n")) for title in titles]
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
    said = ", ".join(map(str, features[:3])) + (f" and {len(features) - 3} more" if len(features) > 3 else "")
    scale = mpl.cm.ScalarMappable(Normalize(low, reach), cmap)
    bar = figure.colorbar(
        scale, ax=axes, fraction=0.02, pad=0.01, aspect=30, label=f"features {said}\ntimes their weights"
    )
    bar.ax.set_facecolor(FILM_GREY)
    if any(map(np.any, markers)):
        label = "planted marker" if planted else f"annotated box of {class_name(name)}"
        legend(figure, [Line2D([], [], color="#00a5b8", linewidth=1, label=label)])
    return figure


def outlier_films(films: np.ndarray, found: pd.DataFrame, boxes: pd.DataFrame, *, data_label: str) -> Figure:
    """Films that are unlike those of their class, with the boxes of every finding, named.

    `films` : uint8 (N, S, S). `found` : of `analysis.features.findings.outliers`, with image and labels, a row a film.
    `boxes` : image, class, x1, y1, x2, y2 in pixels of S.
    """
    labels, names = zip(*(title.split("\n") for title in film_titles(found)))
    pairs = list(zip(found["image"], found["class"], found["distance"], labels))
    titles = [f"{name}, distance {distance:.2f} ({text})" for _, name, distance, text in pairs]
    corners = [class_boxes(boxes, [image], name)[0] for image, name, *_ in pairs]
    others = other_findings(boxes, found)
    return film_grid(films, corners, titles, names=names, others=others, data_label=data_label)


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
