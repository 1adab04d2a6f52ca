"""Li et al.: the distribution of class activations, maps on a common scale, the importance of features and what it is used for."""
import textwrap
from collections.abc import Collection, Mapping, Sequence
from itertools import product

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter
from scipy.stats import rankdata

from lib.figures.study import _dots
from lib.figures.style import (
    BOX,
    DARK_RIM,
    DASHED,
    HEAT,
    INK,
    LIGHT_RIM,
    NEUTRAL,
    PALE,
    STYLE,
    WIDTH,
    YELLOW,
    by_loss,
    class_name,
    grid,
    legend,
    loss_styles,
    new_figure,
    panels,
    present,
    show_film,
)
from lib.tables.li import CAMS, SCALES
from lib.tables.names import LOSSES, METRICS, display

TRAIN, TEST = NEUTRAL, YELLOW
_FILM_GREY = "#6b6b6b"
# transparent at 0 as HEAT; the hue does not fade towards 0, pale colours would look like a halo on a dark film
SIGNED = ListedColormap([((0.86, 0.12, 0.1) if v > 0 else (0.12, 0.45, 0.9)) + (0.75 * abs(v) ** 0.9,) for v in np.linspace(-1, 1, 257)],
                        name="signed")


@STYLE
def activation_distribution(edges: np.ndarray, counts: np.ndarray, p10: np.ndarray, p90: np.ndarray, classes: Sequence[str], *,
                            levels: tuple[float, float] = (0.1, 0.9), data_label: str) -> Figure:
    """Raw class activations over a whole data set, a panel per class, with P10, P90 and the common scale they give (Li et al., eq. 1).

    Parameters
    ----------
    edges : (B + 1,) for all classes, or (C, B + 1).
    counts : pixels in each bin, (C, B); drawn on a logarithmic axis.
    p10, p90 : (C,) percentiles of the pixels; where they are equal or NaN there is no scale and the panel says so.
    levels : where tanh takes P10 and P90.

    Raises
    ------
    ValueError : shapes that do not agree.
    """
    counts, p10, p90 = np.asarray(counts, float), np.asarray(p10, float), np.asarray(p90, float)
    n = len(classes)
    if counts.shape[:1] != (n,) or counts.ndim != 2 or np.shape(edges) not in ((counts.shape[1] + 1,), (n, counts.shape[1] + 1)):
        raise ValueError(f"counts are {counts.shape}, edges {np.shape(edges)}: for {n} classes they must be ({n}, B) and (B + 1,) or ({n}, B + 1)")
    if p10.shape != (n,) or p90.shape != (n,):
        raise ValueError(f"p10 and p90 are {p10.shape} and {p90.shape}: they must be ({n},)")
    edges, low, high = np.broadcast_to(edges, (n, counts.shape[1] + 1)), *np.arctanh(levels)
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
        handles.append(ax.stairs(some, edges[i], baseline=0.7, fill=True, color=(NEUTRAL, 0.45), label="pixels (left axis)"))
        scale = ax.twinx()
        scale.set(ylim=(-1.08, 1.08), yticks=(-1, 0, 1))
        scale.tick_params(labelright=(i + 1) % columns == 0 or i == n - 1)
        scale.spines["right"].set_visible(True)
        if p90[i] > p10[i]:
            x = np.linspace(*ax.get_xlim(), 300)
            z = low + (x - p10[i]) / (p90[i] - p10[i]) * (high - low)
            handles += scale.plot(x, np.tanh(z), color=YELLOW, linewidth=1.2, label="common scale (right axis)")
        else:
            text = "no scale:\nP10 = P90" if p10[i] == p90[i] else "no films"
            scale.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", fontsize=7, path_effects=LIGHT_RIM)
        for x in (p10[i], p90[i]):
            if np.isfinite(x):
                handles.append(scale.axvline(x, color=INK, linewidth=0.8, linestyle=(0, (3, 2)), label="P10 and P90"))
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


@STYLE
def scaled_cams(films: np.ndarray, maps: Mapping[str, np.ndarray], titles: Sequence[str], confidence: np.ndarray, *, common: Collection[str],
                boxes: Sequence | None = None, data_label: str) -> Figure:
    """Li et al., Figs. 6 to 8: a row per film, the most confident first; the film, then its maps on individual and on common scales.

    Parameters
    ----------
    films : uint8 (N, S, S).
    maps : by column name, float (N, h, w) over the whole film; [0, 1], or [-1, 1] for the names in `common`. A map of NaN is left out.
    titles : N, such as 'Mass\\nlogit 1.2\\np = 0.77'.
    confidence : (N,) of the selected class; orders the rows, NaN last.
    common : the columns on the common scale. Its 0 lies below P10, which is 0.1: blue marks what almost no pixel of the data set falls below.
    boxes : N sequences of (x1, y1, x2, y2) in pixels of S.

    Raises
    ------
    ValueError : lengths that do not agree, unknown names in `common`, values outside the scale of their column.
    """
    boxes = [()] * len(films) if boxes is None else boxes
    if not (len(films) == len(titles) == len(confidence) == len(boxes)) or any(len(map_) != len(films) for map_ in maps.values()):
        raise ValueError(f"{len(films)} films, but {len(titles)} titles, {len(confidence)} confidences, {len(boxes)} boxes, "
                         f"maps {', '.join(f'{name}: {len(map_)}' for name, map_ in maps.items())}")
    if set(common) - set(maps):
        raise ValueError(f"common names {', '.join(set(common) - set(maps))}, which is not among the maps {', '.join(maps)}")
    for name, values in maps.items():
        low, known = -1.0 if name in common else 0.0, np.asarray(values)[np.isfinite(values)]
        if known.size and (known.min() < low - 1e-6 or known.max() > 1 + 1e-6):
            raise ValueError(f"maps {name!r} reach from {known.min():.3g} to {known.max():.3g}: scale them to [{low:g}, 1] first")
    columns, label = len(maps) + 1, 0.85
    side = min((WIDTH - label - 0.1) / columns, 1.6)
    names = ["Film", *(textwrap.fill(name, max(int(side * 72 / 4.6), 8)) for name in maps)]
    head = 0.13 * max(name.count("\n") + 1 for name in names)
    height, width = len(films) * (side + 0.02) + head + 0.75, max(side * columns + label + 0.1, 4.6)
    figure = new_figure(height, data_label, width)
    figure.get_layout_engine().set(rect=(0, 0.6 / height, 1, 1 - 0.6 / height))  # below: the colour bars, which must not narrow single columns
    axes = figure.subplots(len(films), columns, squeeze=False) if len(films) else np.empty((0, columns))
    for row, i in enumerate(np.argsort(-np.asarray(confidence, float), kind="stable")):
        for ax, name in zip(axes[row], [None, *maps]):
            show_film(ax, films[i], boxes[i])
            if name is None:
                ax.set_ylabel(class_name(titles[i]), rotation=0, ha="right", va="center", fontsize=7)
            elif np.isfinite(maps[name][i]).all():
                _lay(ax, maps[name][i], films.shape[-1], SIGNED if name in common else HEAT, -1 if name in common else 0, 1)
            else:
                ax.text(0.5, 0.5, "no map", transform=ax.transAxes, ha="center", color="white", path_effects=DARK_RIM)
    for ax, name in zip(axes[0], names) if len(films) else ():
        ax.set_title(name, fontsize=7, weight="bold", pad=3)
    bars = [(HEAT, 0, "individual scale of each map", set(maps) - set(common)), (SIGNED, -1, "common scale, P10 at 0.1, P90 at 0.9", common)]
    for k, (cmap, low, text, _) in enumerate(bar for bar in bars if bar[3]):
        place = figure.add_axes(((label + 0.15 + k * (width - label) / 2) / width, 0.5 / height, 1.4 / width, 0.07 / height))
        place.set_in_layout(False)
        bar = figure.colorbar(mpl.cm.ScalarMappable(Normalize(low, 1), cmap), cax=place, orientation="horizontal", ticks=range(low, 2))
        bar.set_label(text, fontsize=7, labelpad=1)
        place.set_facecolor(_FILM_GREY)
    return figure


def _lay(ax: Axes, values: np.ndarray, size: int, cmap: ListedColormap, low: float, high: float) -> None:
    ax.imshow(values, cmap=cmap, vmin=low, vmax=high, extent=(0, size, size, 0), interpolation="bilinear", zorder=0.5)


@STYLE
def consistency_scatter(sums: pd.DataFrame, *, data_label: str) -> Figure:
    """Li et al., Figs. 9 and 10: the sum of class activations against the logit, a row of panels per method and a column per scale.

    `sums` : a row per film, method, scale and optionally features ('all', 'principal'): logit, activation. Scales as in `lib.tables.li`.
    Rows with NaN are not drawn and not counted, nor are principal features on individual scales, which the paper has no use for.
    """
    sums = sums.assign(features="all") if "features" not in sums else sums[(sums["features"] == "all") | (sums["scale"] != "individual")]
    methods = present(CAMS, sums["method"])
    shown = set(sums[["scale", "features"]].itertuples(index=False, name=None))
    columns = [pair for pair in product(dict.fromkeys([*SCALES, *sums["scale"]]), dict.fromkeys(["all", *sums["features"]])) if pair in shown]
    figure = new_figure(max(len(methods), 1) * 1.25 + 0.7, data_label, WIDTH if len(columns) > 1 else 3.6)
    axes = figure.subplots(max(len(methods), 1), max(len(columns), 1), squeeze=False, sharex=True)
    for (i, method), (j, (scale, features)) in product(enumerate(methods), enumerate(columns)):
        ax = axes[i, j]
        rows = sums[(sums["method"] == method) & (sums["scale"] == scale) & (sums["features"] == features)].dropna(subset=["logit", "activation"])
        x, y = rows["logit"].to_numpy(float), rows["activation"].to_numpy(float)
        ax.plot(x, y, ".", color=NEUTRAL, alpha=0.35, markersize=3, markeredgewidth=0, rasterized=True)
        text = f"Pearson {_correlation(x, y)}\nSpearman {_correlation(rankdata(x), rankdata(y))}\nn = {len(x):,}"
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


def _correlation(x: np.ndarray, y: np.ndarray) -> str:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return "undefined"
    return f"{np.corrcoef(x, y)[0, 1]:.3f}"


@STYLE
def importance_panels(train: np.ndarray, test: np.ndarray, classes: Sequence[str], selected: str, *, data_label: str) -> Figure:
    """Li et al., Fig. 11: the importance matrix on training and on test films, and the column of one class minus its mean.

    `train`, `test` : float (F, C), NaN where a class has no films (grey). The rows of both images are the features by the class for which
    they matter most on training films, then by how much, those that raise none last; one symmetric scale, which leaves 1 % of the values
    beyond its ends. The line graph keeps the features' own order. ValueError: shapes that do not agree, or an unknown selected class.
    """
    train, test = np.asarray(train, float), np.asarray(test, float)
    if train.ndim != 2 or train.shape != test.shape or train.shape[1] != len(classes):
        raise ValueError(f"importance matrices are {train.shape} and {test.shape}: both must be (features, {len(classes)})")
    if selected not in classes:
        raise ValueError(f"class {selected!r} is not among {', '.join(classes)}")
    filled = np.where(np.isfinite(train), train, -np.inf)
    order = np.lexsort((-filled.max(1), np.where(filled.max(1) > 0, filled.argmax(1), len(classes))))
    known = np.abs(np.concatenate([train[np.isfinite(train)], test[np.isfinite(test)]]))
    reach = float(np.quantile(known, 0.99)) if known.size and known.max() > 0 else 1.0
    reach = reach or float(known.max())
    figure = new_figure(5.8, data_label)
    grid_spec = figure.add_gridspec(2, 2, height_ratios=(1.6, 1))
    images = [figure.add_subplot(grid_spec[0, i]) for i in range(2)]
    cmap = mpl.colormaps["RdBu_r"].with_extremes(bad=PALE)
    for ax, matrix, name in zip(images, (train, test), ("Training films", "Test films")):
        shown = ax.imshow(np.ma.masked_invalid(matrix[order]), cmap=cmap, vmin=-reach, vmax=reach, aspect="auto", interpolation="nearest")
        ax.set_title(name)
        ax.set_xticks(range(len(classes)), [class_name(c) for c in classes], rotation=_turn(classes))
        ax.tick_params(axis="x", length=0)
        if len(classes) > 1:
            ax.get_xticklabels()[list(classes).index(selected)].set_weight("bold")
    images[0].set_ylabel("Features, sorted")
    images[1].tick_params(labelleft=False)
    beyond = known.size and known.max() > reach
    figure.colorbar(shown, ax=images, fraction=0.03, pad=0.01, aspect=30, extend="both" if beyond else "neither", label="Importance")
    c = list(classes).index(selected)
    below = grid_spec[1, :].subgridspec(1, 2, width_ratios=(3, 1))
    line, scatter = figure.add_subplot(below[0]), figure.add_subplot(below[1])
    x, a, b = np.arange(len(train)), train[:, c] - train[:, c].mean(), test[:, c] - test[:, c].mean()
    handles = line.plot(x, b, color=TEST, linewidth=0.7, label="test films")
    handles = line.plot(x, a, color=TRAIN, linewidth=1.5, label="training films", zorder=1.9) + handles
    line.set(xlabel="Feature", ylabel="Importance minus mean", xlim=(-0.5, len(x) - 0.5), title=f"Selected class: {class_name(selected)}")
    grid(line, "y")
    if np.isfinite(a).all() and np.isfinite(b).all():
        ends = np.array([min(a.min(), b.min()), max(a.max(), b.max())])
        scatter.plot(ends, ends, **DASHED)
        scatter.plot(a, b, ".", color=INK, alpha=0.5, markersize=3.5, markeredgewidth=0)
        scatter.set(title=f"r = {_correlation(a, b)}", xlabel="Training", ylabel="Test", box_aspect=1)
        for axis in (scatter.xaxis, scatter.yaxis):
            axis.set_major_locator(MaxNLocator(3))
    else:
        scatter.remove()
        without = " or ".join(name for name, values in (("training", a), ("test", b)) if not np.isfinite(values).all())
        line.set_title(f"Selected class: {class_name(selected)} (no {without} films)")
    legend(figure, handles)
    return figure


def _turn(names: Sequence[str]) -> int:
    return 90 if len(names) > 3 and max(map(len, names)) > 2 else 0


@STYLE
def principal_curve(curves: pd.DataFrame, y: str = "share", *, data_label: str) -> Figure:
    """How few features carry a class: a quantity by the number k of its most important features, a panel per class, a line per loss.

    `curves` : k, and optionally class and loss, and the column `y`: 'share' (of the class's positive importance, 0 to 1; dashed: 80 %) or
    'auroc' or 'accuracy' with only these features.
    """
    if y not in ("share", "auroc", "accuracy"):
        raise ValueError(f"y = {y!r}: 'share', 'auroc' or 'accuracy'")
    classes = list(dict.fromkeys(curves["class"])) if "class" in curves else [""]
    columns = min(5, len(classes))
    figure, axes = panels(len(classes), columns, 1.0 if columns > 2 else 2.2, 0.38, data_label)
    handles, last = [], max(curves["k"].max(), 2) if len(curves) else 2
    for i, (ax, name) in enumerate(zip(axes, classes)):
        mine = curves[curves["class"] == name] if name else curves
        for style, label, rows in by_loss(mine):
            rows = rows.sort_values("k")
            handles += ax.plot(rows["k"], rows[y], color=style["color"], linewidth=1.1, label=label or "_")
        if y == "share":
            ax.axhline(0.8, **DASHED)
            ax.set(ylim=(0, 1.03), yticks=(0, 0.5, 1))
            ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set(title=class_name(name), xscale="log", xlim=(1, last), box_aspect=1)
        ax.set_xlabel("Features" if i + columns >= len(classes) else "", fontsize=7)
        ax.set_ylabel(({"share": "Share of importance"} | METRICS).get(y, y.capitalize()) if i % columns == 0 else "", fontsize=7)
        ticks = [k for k in (1, 10, 100, 1000, 10000) if k <= last]
        ax.set_xticks(ticks, [f"{k:g}" for k in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
        grid(ax, "both")
    legend(figure, handles)
    return figure


@STYLE
def class_overlap(overlap: Mapping[str, np.ndarray], classes: Sequence[str], *, data_label: str) -> Figure:
    """How far the classes share their principal features: the Jaccard index of every two, a panel per loss. `overlap` : loss id to (C, C).

    NaN: a class without principal features. ValueError where a matrix is not (C, C).
    """
    n = len(classes)
    for loss, matrix in overlap.items():
        if np.shape(matrix) != (n, n):
            raise ValueError(f"the overlap of {loss!r} is {np.shape(matrix)}: it must be ({n}, {n})")
    columns = 2 if len(overlap) > 1 else 1
    rows = max(-(-len(overlap) // columns), 1)
    side = max(WIDTH / 2 - 1.4 if columns == 2 else 0.24 * n, 1.6)
    figure = new_figure(rows * (side + 0.3) + 1.5, data_label, WIDTH if columns == 2 else min(side + 2.4, WIDTH))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    off = [np.asarray(matrix, float)[~np.eye(n, dtype=bool)] for matrix in overlap.values()]
    top = max(np.nanmax(np.concatenate(off), initial=0) if off else 0, 0.05)
    names, styles = [class_name(name) for name in classes], loss_styles(list(overlap))
    for ax in axes.flat[len(overlap):]:
        ax.set_visible(False)
    for ax, (loss, matrix) in zip(axes.flat, overlap.items()):
        shown = np.ma.masked_invalid(np.where(np.eye(n, dtype=bool), np.nan, matrix))
        image = ax.imshow(shown, cmap=mpl.colormaps["Blues"].with_extremes(bad=PALE), vmin=0, vmax=top)
        mean = f", mean {shown.mean():.2f}" if shown.count() else ""
        ax.set_title(f"{display(loss)}{mean}", color=styles[loss]["color"], weight="bold")
        ax.set_xticks(range(n), names, rotation=_turn(classes))
        ax.set_yticks(range(n), names)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    if overlap:
        figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01, aspect=30, label="Shared principal features (Jaccard index)")
    return figure


@STYLE
def pruning_curve(pruned: pd.DataFrame, metric: str = "auroc", *, tolerance: float = 0.01, data_label: str) -> Figure:
    """What it costs to remove the features that matter least, and the largest number that costs at most `tolerance` (the vertical line).

    `pruned` : n_removed and the column `metric`, optionally loss, and <metric>_ci_low, <metric>_ci_high. Every loss needs its row
    n_removed = 0, the reference; ValueError names the one without.
    """
    figure = new_figure(2.7, data_label, 5.6)
    ax, handles = figure.subplots(), []
    for style, label, rows in by_loss(pruned):
        rows = rows.sort_values("n_removed")
        x, y = rows["n_removed"].to_numpy(), rows[metric].to_numpy(float)
        if not len(x) or x[0] != 0:
            raise ValueError(f"no row n_removed = 0 for {label or 'the run'}: it is what the others are compared with")
        if {f"{metric}_ci_low", f"{metric}_ci_high"} <= set(rows):
            low, high = (rows[f"{metric}_ci_{side}"] for side in ("low", "high"))
            ax.fill_between(x, low, high, color=style["color"], alpha=0.07 if label else 0.15, linewidth=0)
        costly = ~(y >= y[0] - tolerance)  # NaN counts as costly
        free = x[int(costly.argmax()) - 1] if costly.any() else x[-1]
        if np.isnan(y[0]):
            free = 0
        name = f"{label + ': ' if label else ''}{free:,.0f} removed cost at most {tolerance:g}"
        handles += ax.plot(x, y, markersize=2.5, markeredgewidth=0, label=name, **style)
        ax.axhline(y[0], color=style["color"], linewidth=0.7, linestyle=(0, (3, 2)), alpha=0.7)
        ax.axvline(free, color=style["color"], linewidth=0.7, linestyle=":")
    ax.set(xlabel="Features removed, the least important first", ylabel=METRICS.get(metric, metric.capitalize()))
    ax.margins(x=0.01)
    grid(ax, "both")
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


@STYLE
def confounder_panel(films: np.ndarray, maps: np.ndarray, markers: Sequence, titles: Sequence[str], *, data_label: str) -> Figure:
    """What one suspicious feature responds to: films above, the same films with the weighted feature below, all on one scale.

    Parameters
    ----------
    films : uint8 (K, S, S).
    maps : float (K, h, w), the feature times its weight, signed, over the whole film.
    markers : K, what might be the confounder: a boolean mask (S, S), or a sequence of boxes (x1, y1, x2, y2) in pixels of S; empty: none.
    titles : K, printed as they are: file names keep their underscores.

    Raises
    ------
    ValueError : lengths that do not agree, or a mask of another size.
    """
    if not (len(films) == len(maps) == len(markers) == len(titles)):
        raise ValueError(f"{len(films)} films, {len(maps)} maps, {len(markers)} markers, {len(titles)} titles: give as many of each")
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
        above, below = axes[2 * (i // columns):2 * (i // columns) + 2, i % columns]
        for ax in (above, below):
            ax.set_axis_on()
            _mark(ax, film, markers[i])
        _lay(below, maps[i], size, cmap, low, reach)
        above.set_title(title, fontsize=7, pad=2)
    scale = mpl.cm.ScalarMappable(Normalize(low, reach), cmap)
    bar = figure.colorbar(scale, ax=axes, fraction=0.02, pad=0.01, aspect=30, label="feature times its weight")
    bar.ax.set_facecolor(_FILM_GREY)
    legend(figure, [Line2D([], [], color="#00a5b8", linewidth=1, label="planted marker" if planted else "annotated box")] if any(map(np.any, markers)) else [])
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


@STYLE
def loss_comparison(features: pd.DataFrame, *, data_label: str) -> Figure:
    """What the losses change in the importance matrix: how many features carry a class, and how far it shares them with other classes.

    `features` : a row per loss and class: n_features80 (features that hold 80 % of the positive importance), participation (their effective
    number) and overlap (mean Jaccard index with the other classes).
    """
    names = {"n_features80": "Features with 80 %\nof the importance", "participation": "Effective number\nof features",
             "overlap": "Overlap with other\nclasses (Jaccard)"}
    losses, classes = present(LOSSES, features["loss"]), list(dict.fromkeys(features["class"]))
    position = {name: float(i) for i, name in enumerate(classes)}
    figure = new_figure(0.2 * len(classes) + 1.0, data_label)
    axes, handles = figure.subplots(1, 3, sharey=True), []
    for ax, (column, name) in zip(axes, names.items()):
        rows = features[["loss", "class"]].assign(value=features[column], ci_low=np.nan, ci_high=np.nan)
        handles += _dots(ax, rows, position, losses, column)
        ax.set_xlabel(name)
        ax.set_xlim(left=-0.03 * ax.get_xlim()[1])
    axes[0].set_yticks(list(position.values()), [class_name(name) for name in position])
    axes[0].set_ylim(len(classes) - 0.4, -0.6)
    legend(figure, handles)
    return figure
