"""Li et al.: the importance matrix, and what it says about overfitting, principal and redundant features, and the
losses."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from lib.figures.study import loss_dots
from lib.figures.style import (
    DASHED,
    GREY,
    INK,
    NEUTRAL,
    PALE,
    STYLE,
    WIDTH,
    YELLOW,
    by_loss,
    class_name,
    correlation_text,
    grid,
    legend,
    loss_styles,
    new_figure,
    panels,
    present,
)
from lib.tables.names import LOSSES, METRICS, display

TRAIN, TEST = NEUTRAL, YELLOW


@STYLE
def importance_panels(
    train: np.ndarray,
    test: np.ndarray,
    classes: Sequence[str],
    selected: str,
    *,
    reading: str = "eq. 3",
    data_label: str,
) -> Figure:
    """Li et al., Fig. 11: the importance matrix on training and on test films, and the column of one class minus its
    mean.

    `train`, `test` : float (F, C), NaN where a class has no films (grey). The rows of both images are the features by
    the class for which they matter most on training films, then by how much, those that raise none last; one symmetric
    scale, which leaves 1 % of the values beyond its ends. The graph of the column ranks them by training films: their
    own order means nothing.
    `reading` : which films were averaged over, part of the titles. ValueError: shapes that do not agree, or an unknown
    selected class.
    """
    train, test = np.asarray(train, float), np.asarray(test, float)
    if train.ndim != 2 or train.shape != test.shape or train.shape[1] != len(classes):
        raise ValueError(
            f"importance matrices are {train.shape} and {test.shape}: both must be (features, {len(classes)})"
        )
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
        shown = ax.imshow(
            np.ma.masked_invalid(matrix[order]),
            cmap=cmap,
            vmin=-reach,
            vmax=reach,
            aspect="auto",
            interpolation="nearest",
        )
        ax.set_title(f"{name}, {reading}")
        ax.set_xticks(range(len(classes)), [class_name(c) for c in classes], rotation=_turn(classes))
        ax.tick_params(axis="x", length=0)
        if len(classes) > 1:
            ax.get_xticklabels()[list(classes).index(selected)].set_weight("bold")
    images[0].set_ylabel("Features, sorted")
    images[1].tick_params(labelleft=False)
    beyond = known.size and known.max() > reach
    figure.colorbar(
        shown, ax=images, fraction=0.03, pad=0.01, aspect=30, extend="both" if beyond else "neither", label="Importance"
    )
    c = list(classes).index(selected)
    below = grid_spec[1, :].subgridspec(1, 2, width_ratios=(3, 1))
    line, scatter = figure.add_subplot(below[0]), figure.add_subplot(below[1])
    ranked = np.argsort(-train[:, c], kind="stable")
    x, a, b = np.arange(len(train)), *(matrix[ranked, c] - matrix[:, c].mean() for matrix in (train, test))
    handles = line.plot(x, a, color=TRAIN, linewidth=1.5, label="training films")
    handles += line.plot(x, b, ".", color=TEST, markersize=3, markeredgewidth=0, label="test films", zorder=1.9)
    line.set(
        xlabel="Features, ranked by training films",
        ylabel="Importance minus mean",
        xlim=(-0.5, len(x) - 0.5),
        title=f"Selected class: {class_name(selected)}",
    )
    grid(line, "y")
    if np.isfinite(a).all() and np.isfinite(b).all():
        ends = np.array([min(a.min(), b.min()), max(a.max(), b.max())])
        scatter.plot(ends, ends, **DASHED)
        scatter.plot(a, b, ".", color=INK, alpha=0.5, markersize=3.5, markeredgewidth=0)
        scatter.set(title=f"r = {correlation_text(a, b)}", xlabel="Training", ylabel="Test", box_aspect=1)
        for axis in (scatter.xaxis, scatter.yaxis):
            axis.set_major_locator(MaxNLocator(3))
    else:
        scatter.remove()
        without = " or ".join(name for name, values in (("training", a), ("test", b)) if not np.isfinite(values).all())
        line.set_title(f"Selected class: {class_name(selected)} (no {without} films)")
    line.legend(handles=handles, loc="upper right")
    return figure


@STYLE
def train_test_gap(gap: pd.DataFrame, selected: str, *, data_label: str) -> Figure:
    """Overfitting (Li et al., sec. VI-A): how far the columns of the importance matrix differ between training and test
    films.

    `gap` : a row per class: difference (as a share of the column's size), by_chance (what another choice of films
    makes); NaN is not drawn. Classes from the one that exceeds chance most; `selected` is printed bold.
    """
    gap = gap.iloc[np.argsort(-(gap["difference"] - gap["by_chance"]).to_numpy(), kind="stable")]
    figure = new_figure(0.19 * len(gap) + 0.95, data_label, 5.6)
    ax, y = figure.subplots(), np.arange(len(gap))
    ax.hlines(y, gap["by_chance"], gap["difference"], color=PALE, linewidth=2.5)
    handles = ax.plot(gap["by_chance"], y, "|", color=GREY, markersize=8, markeredgewidth=1.2, label="by chance")
    handles += ax.plot(
        gap["difference"], y, "o", color=NEUTRAL, markersize=4, markeredgewidth=0, label="training against test films"
    )
    ax.set_yticks(y, [class_name(name) for name in gap["class"]])
    for text, name in zip(ax.get_yticklabels(), gap["class"]):
        text.set_weight("bold" if name == selected and len(gap) > 1 else "normal")
    ax.set(ylim=(len(gap) - 0.4, -0.6), xlabel="Difference of the columns, as a share of their size")
    ax.set_xlim(left=0)
    ax.tick_params(axis="y", length=0)
    grid(ax)
    legend(figure, handles)
    return figure


def _turn(names: Sequence[str]) -> int:
    return 90 if len(names) > 3 and max(map(len, names)) > 2 else 0


@STYLE
def principal_curve(curves: pd.DataFrame, y: str = "share", *, data_label: str) -> Figure:
    """How few features carry a class: a quantity by the number k of its most important features, a panel per class, a
    line per loss.

    `curves` : k, and optionally class and loss, and the column `y`: 'share' (of the class's positive importance, 0 to
    1; dashed: 80 %) or 'auroc' or 'accuracy' with only these features.
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
            handles.append(ax.axhline(0.8, label="80 %", **DASHED))
            ax.set(ylim=(0, 1.03), yticks=(0, 0.5, 1))
            ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set(title=class_name(name), xscale="log", xlim=(1, last), box_aspect=1)
        ax.set_xlabel("Features" if i + columns >= len(classes) else "", fontsize=7)
        ax.set_ylabel(
            ({"share": "Share of importance"} | METRICS).get(y, y.capitalize()) if i % columns == 0 else "", fontsize=7
        )
        ticks = [k for k in (1, 10, 100, 1000, 10000) if k <= last]
        ax.set_xticks(ticks, [f"{k:g}" for k in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
        grid(ax, "both")
    legend(figure, handles)
    return figure


@STYLE
def class_overlap(
    overlap: Mapping[str, np.ndarray], classes: Sequence[str], *, chance: float, data_label: str
) -> Figure:
    """How far the classes share their principal features: the Jaccard index of every two, a panel per loss. `overlap` :
    loss id to (C, C).

    `chance` : that of features drawn at random, in (0, 1): white; brown is less, green more. NaN: a class without
    principal features. ValueError where a matrix is not (C, C).
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
    reach = max(top - chance, chance)
    look = {"cmap": mpl.colormaps["BrBG"].with_extremes(bad=PALE), "vmin": chance - reach, "vmax": chance + reach}
    for ax in axes.flat[len(overlap) :]:
        ax.set_visible(False)
    for ax, (loss, matrix) in zip(axes.flat, overlap.items()):
        shown = np.ma.masked_invalid(np.where(np.eye(n, dtype=bool), np.nan, matrix))
        image = ax.imshow(shown, **look)
        mean = f", mean {shown.mean():.3f}" if shown.count() else ""
        ax.set_title(f"{display(loss)}{mean}", color=styles[loss]["color"], weight="bold")
        ax.set_xticks(range(n), names, rotation=_turn(classes))
        ax.set_yticks(range(n), names)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    if overlap:
        bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01, aspect=30)
        bar.ax.set_ylim(0, chance + reach)
        bar.set_label(f"Shared principal features (Jaccard index)\nwhite: by chance, {chance:.3f}")
    return figure


@STYLE
def pruning_curve(pruned: pd.DataFrame, metric: str = "auroc", *, tolerance: float = 0.01, data_label: str) -> Figure:
    """What it costs to remove the features that matter least, and the largest number that costs at most `tolerance`
    (the vertical line).

    `pruned` : n_removed and the column `metric`, optionally loss, and <metric>_ci_low, <metric>_ci_high. Every loss
    needs its row n_removed = 0, the reference; ValueError names the one without.
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
def loss_comparison(features: pd.DataFrame, *, data_label: str) -> Figure:
    """What the losses change in the importance matrix: how many features carry a class, and how far it shares them with
    other classes.

    `features` : a row per loss and class, of `analysis.features.findings.features_of_losses`: n_features80 (features
    that hold 80 % of the positive importance), participation (their effective number) and overlap (mean Jaccard index
    with the other classes), each with <column>_ci_low and <column>_ci_high (NaN: no bar), and overlap_by_chance, of
    features drawn at random: the dashed line. A column without any number has no panel.
    """
    names = {
        "n_features80": "Features with 80 %\nof the importance",
        "participation": "Effective number\nof features",
        "overlap": "Overlap with other\nclasses (Jaccard)",
    }
    names = {column: name for column, name in names.items() if features[column].notna().any()}
    losses, classes = present(LOSSES, features["loss"]), list(dict.fromkeys(features["class"]))
    position = {name: float(i) for i, name in enumerate(classes)}
    figure = new_figure(max(0.2 * len(classes), 0.45) + 1.0, data_label)
    axes, handles = figure.subplots(1, len(names), sharey=True, squeeze=False)[0], []
    for ax, (column, name) in zip(axes, names.items()):
        values = {"value": features[column]} | {end: features[f"{column}_{end}"] for end in ("ci_low", "ci_high")}
        handles += loss_dots(ax, features[["loss", "class"]].assign(**values), position, losses, column)
        if column == "overlap":
            handles.append(ax.axvline(features["overlap_by_chance"].mean(), label="by chance", **DASHED))
        ax.set_xlabel(name)
    axes[0].set_yticks(list(position.values()), [class_name(name) for name in position])
    axes[0].set_ylim(len(classes) - 0.4, -0.6)
    legend(figure, [*handles, Line2D([], [], color=GREY, linewidth=0.9, label="95 % interval")])
    return figure
