"""The figures of the study: arrays and tidy frames in, a matplotlib Figure out, without pyplot's global state and without touching files.

All are made for the text width of a paper (7 inches, type of 7 points and more). One colour and one marker per loss everywhere (Okabe-Ito,
told apart in grey print by the marker). Every function requires `data_label`, what was measured on, and prints it at the foot.
"""
import textwrap
from collections.abc import Sequence
from itertools import product

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter
from scipy.special import expit

from lib.tables import BACKBONES, LOSSES, display, ordered

WIDTH = 7.0  # inches
LOSS_STYLES = {"bce": {"color": "#4d4d4d", "marker": "o"}, "wbce": {"color": "#0072b2", "marker": "s"},
               "focal": {"color": "#d55e00", "marker": "^"}, "cb_focal": {"color": "#009e73", "marker": "D"}}
_MORE_STYLES = [{"color": colour, "marker": marker} for colour, marker in zip(("#cc79a7", "#e69f00", "#56b4e9", "#806000"), "vPX*")]
_INK, _GREY, _PALE, _NEUTRAL, _YELLOW, _PINK, _BOX = "#222222", "#777777", "#d9d9d9", "#3a6ea5", "#e69f00", "#cc79a7", "#00e5ff"
_DASHED = {"color": _GREY, "linewidth": 0.7, "linestyle": (0, (3, 2)), "zorder": 1}
_DARK_RIM = [patheffects.withStroke(linewidth=2, foreground="black", alpha=0.6)]
_LIGHT_RIM = [patheffects.withStroke(linewidth=2, foreground="white")]
_STYLE = mpl.rc_context({
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "axes.edgecolor": _INK, "axes.axisbelow": True,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.major.size": 2.5, "ytick.major.size": 2.5, "lines.linewidth": 1.2,
    "legend.frameon": False, "figure.dpi": 150, "pdf.fonttype": 42,
})
# transparent where the map is 0, so the film stays visible; the colour bar is drawn over the grey of a film for the same reason
_HEAT = ListedColormap([(*mpl.colormaps["inferno"](0.35 + 0.6 * v)[:3], 0.8 * v**0.8) for v in np.linspace(0, 1, 256)], name="heat")


# ---------------------------------------------------------------- shared

def _figure(height: float, data_label: str, width: float = WIDTH) -> Figure:
    """An empty figure with the data label at its foot, in a strip of its own."""
    if not data_label.strip():
        raise ValueError("data_label is empty: say what the figure was measured on")
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    strip = 0.17 / height
    figure.get_layout_engine().set(rect=(0, strip, 1, 1 - strip))
    figure.text(1 - 0.05 / width, 0.03 / height, data_label, ha="right", va="bottom", fontsize=7, style="italic", color=_GREY)
    return figure


def _panels(count: int, columns: int, side: float, extra: float, data_label: str) -> tuple[Figure, list[Axes]]:
    """`count` square panels of about `side` inches with `extra` inches of text a row; the cells that stay empty are hidden."""
    rows = -(-count // columns)
    figure = _figure(rows * (side + extra) + 0.45, data_label, WIDTH if columns > 1 else side + 1.4)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[count:]:
        ax.set_visible(False)
    return figure, list(axes[:count])


def _class_panels(predictions: pd.DataFrame, x: str, y: str, data_label: str) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    names = list(dict.fromkeys(predictions["class"]))
    columns = min(5, len(names))
    figure, axes = _panels(len(names), columns, 1.0 if columns > 2 else 2.2, 0.38, data_label)
    for i, (ax, name) in enumerate(zip(axes, names)):
        ax.set(title=_class_name(name), box_aspect=1)
        ax.set_xlabel(x if i + columns >= len(names) else "", fontsize=7)
        ax.set_ylabel(y if i % columns == 0 else "", fontsize=7)
    return figure, [(ax, predictions[predictions["class"] == name]) for ax, name in zip(axes, names)]


def loss_styles(losses: Sequence[str]) -> dict[str, dict[str, str]]:
    """Colour and marker of each loss; losses the paper does not have take further ones in the order given."""
    more = [loss for loss in losses if loss not in LOSS_STYLES]
    return {loss: LOSS_STYLES.get(loss) or _MORE_STYLES[more.index(loss) % len(_MORE_STYLES)] for loss in losses}


def _present(known: dict[str, str], column: pd.Series) -> list[str]:
    return [name for name in ordered(known, column) if (column == name).any()]


def _by_loss(frame: pd.DataFrame) -> list[tuple[dict[str, str], str, pd.DataFrame]]:
    """(style, label, rows) per loss; for the frame of one run, without a column loss, one group without a label in the neutral colour."""
    if "loss" not in frame:
        return [({"color": _NEUTRAL, "marker": "o"}, "", frame)]
    return [(style, display(loss), frame[frame["loss"] == loss]) for loss, style in loss_styles(_present(LOSSES, frame["loss"])).items()]


def _legend(figure: Figure, handles: Sequence) -> None:
    labelled = {handle.get_label(): handle for handle in handles if not handle.get_label().startswith("_")}
    if labelled:
        figure.legend(handles=list(labelled.values()), loc="outside upper center", ncols=6, handletextpad=0.4, columnspacing=1.6)


def _class_name(name: str) -> str:
    return str(name).replace("_", " ")


def _grid(ax: Axes, axis: str = "x") -> None:
    ax.grid(axis=axis, color=_PALE, linewidth=0.4)


def _film(ax: Axes, film: np.ndarray, boxes: Sequence = (), names: Sequence[str] = ()) -> None:
    """A film in its own pixels with the corners at (0, 0) and (S, S), so that exclusive box ends land on pixel edges."""
    size = film.shape[-1]
    ax.imshow(film, cmap="gray", vmin=0, vmax=255, extent=(0, size, size, 0))
    ax.set(xticks=[], yticks=[], xlim=(0, size), ylim=(size, 0))
    ax.spines[:].set_visible(False)
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=_BOX, linewidth=1, path_effects=_DARK_RIM))
        if i < len(names):  # names above and below by turns: the boxes of one film often start at the same height
            edge = np.clip(y2, 0, 0.91 * size) if i % 2 else np.clip(y1, 0.09 * size, size)
            ax.text(np.clip(x1, 0, 0.5 * size), edge, _class_name(names[i]), va="top" if i % 2 else "bottom", color=_BOX, fontsize=7,
                    path_effects=_DARK_RIM)


# ---------------------------------------------------------------- Khakzar et al., Fig. 1 and 2

@_STYLE
def cam_grid(films: np.ndarray, cams: np.ndarray, boxes: Sequence, classes: Sequence[str], probabilities: np.ndarray, *,
             losses: Sequence[str] = tuple(LOSSES), data_label: str) -> Figure:
    """Khakzar et al., Fig. 1: a row per film, the film with its boxes, then the class activation map of every loss, on one scale.

    Parameters
    ----------
    films : uint8 (R, S, S).
    cams : float (R, L, h, w) in [0, 1] over the whole film; NaN where there is no run.
    boxes : R sequences of (x1, y1, x2, y2) in pixels of S, ends exclusive.
    classes, probabilities : the class of each row, and (R, L) what each run predicts for it (NaN: not printed).
    losses : L ids, the columns.

    Raises
    ------
    ValueError : the arguments do not agree on R and L.
    """
    rows, columns = cams.shape[:2]
    if not (len(films) == len(boxes) == len(classes) == rows and len(losses) == columns and np.shape(probabilities) == (rows, columns)):
        raise ValueError(f"cams are {rows} films x {columns} losses; films, boxes, classes, losses or probabilities do not match")
    title_lines = sum(1 + (len(_class_name(name)) > 14) for name in classes)
    side = min((WIDTH - 0.65) / (columns + 1), 1.8)
    figure = _figure(rows * (side + 0.02) + 0.14 * title_lines + 0.4, data_label, side * (columns + 1) + 0.65)
    axes = figure.subplots(rows, columns + 1, squeeze=False)
    size = films.shape[-1]
    for i, j in product(range(rows), range(columns + 1)):
        ax, title = axes[i, j], _class_name(classes[i])
        _film(ax, films[i], boxes[i])
        if j and np.isfinite(cams[i, j - 1]).all():
            ax.imshow(cams[i, j - 1], cmap=_HEAT, vmin=0, vmax=1, extent=(0, size, size, 0), interpolation="bilinear", zorder=0.5)
        elif j:
            ax.text(size / 2, size / 2, "no run", ha="center", color="white", path_effects=_DARK_RIM)
        if j and np.isfinite(probabilities[i, j - 1]):
            title += ("\n" if len(title) > 14 else " ") + f"p={probabilities[i, j - 1]:.2f}"
        ax.set_title(title, fontsize=7, pad=2)
    headings = [("Film and boxes", _INK), *((display(loss), style["color"]) for loss, style in loss_styles(losses).items())]
    lift = 23 if len(_class_name(classes[0])) > 14 else 13
    for ax, (name, colour) in zip(axes[0], headings):
        ax.annotate(name, (0.5, 1), (0, lift), "axes fraction", "offset points", ha="center", weight="bold", color=colour)
    scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 1), _HEAT)
    bar = figure.colorbar(scale, ax=axes, fraction=0.02, pad=0.01, aspect=30, shrink=0.8 if rows > 1 else 1)
    bar.set_label("class activation" if rows == 1 else "class activation, each map scaled to [0, 1]")
    bar.ax.set_facecolor("#6b6b6b")
    return figure


@_STYLE
def performance(results: pd.DataFrame, *, data_label: str) -> Figure:
    """Khakzar et al., Fig. 2: AUROC, AP and mean predicted probability by loss, class and on average; one row of panels per backbone.

    `results` : a row per task, backbone, loss, class and metric ('auroc', 'ap', 'mean_probability') with value, ci_low, ci_high (NaN: no
    bar) and optionally prevalence. Classes keep their order; 'Average...' (multi-label) and 'Unhealthy' (binary) stand apart below.
    """
    return _dot_panels(results, ["auroc", "ap", "mean_probability"], data_label)


@_STYLE
def class_alignment(results: pd.DataFrame, *, data_label: str) -> Figure:
    """Mean IoBB and IoR by class and loss, one row of panels per backbone. `results` : as for `performance`, metrics 'iobb' and 'ior'."""
    return _dot_panels(results, ["iobb", "ior"], data_label)


def _dot_panels(results: pd.DataFrame, metrics: list[str], data_label: str) -> Figure:
    average, multilabel = results["class"].str.startswith("Average"), results["task"] == "multilabel"
    position, y = {}, 0.0
    for part in (multilabel & ~average, multilabel & average, ~multilabel & ~average):
        names = list(dict.fromkeys(results.loc[part, "class"]))
        position |= {name: y + i for i, name in enumerate(names)}
        y += len(names) + 0.35 * bool(names)
    results = results[multilabel | ~average]
    backbones, losses = _present(BACKBONES, results["backbone"]) or [""], _present(LOSSES, results["loss"])
    figure = _figure(len(backbones) * (0.165 * y + 0.55) + 0.4, data_label)
    axes = figure.subplots(len(backbones), len(metrics), squeeze=False, sharey=True, sharex="col")
    handles = []
    for i, j in product(range(len(backbones)), range(len(metrics))):
        rows = results[(results["backbone"] == backbones[i]) & (results["metric"] == metrics[j])]
        handles += _dots(axes[i, j], rows, position, losses, metrics[j])
        axes[i, j].set_title(f"{display(metrics[j])}, {display(backbones[i])}", pad=3)
    axes[0, 0].set_yticks(list(position.values()), [_class_name(name).replace("Unhealthy", "Unhealthy (binary)") for name in position])
    axes[0, 0].set_ylim(y - 0.75, -0.6)
    _legend(figure, [*handles, Line2D([], [], color=_GREY, linewidth=0.9, label="95 % interval")])
    return figure


def _dots(ax: Axes, rows: pd.DataFrame, position: dict[str, float], losses: list[str], metric: str) -> list:
    """A line of the panel per class, the losses beside each other in it, a marker and its interval each; dashed or black: no skill."""
    for y in list(position.values())[::2]:
        ax.axhspan(y - 0.5, y + 0.5, color="#f2f2f2", linewidth=0)
    handles = []
    for k, (loss, style) in enumerate(loss_styles(losses).items()):
        mine = rows[rows["loss"] == loss]
        y = mine["class"].map(position).astype(float) + (k - (len(losses) - 1) / 2) * 0.8 / len(losses)
        ax.hlines(y, mine["ci_low"], mine["ci_high"], color=style["color"], linewidth=0.9)
        handles += ax.plot(mine["value"], y, linestyle="none", markersize=2.7, markeredgewidth=0, label=display(loss), **style)
    if metric == "auroc":
        ax.axvline(0.5, **_DASHED)
    if metric in ("ap", "mean_probability") and "prevalence" in rows:
        known = rows.dropna(subset=["prevalence"]).drop_duplicates("class")
        y = known["class"].map(position).astype(float)
        handles += ax.plot(known["prevalence"], y, "|k", markersize=8, markeredgewidth=0.9, label="prevalence", zorder=1)
    _grid(ax)
    ax.tick_params(axis="y", length=0)
    ax.tick_params(axis="x", labelbottom=True)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    return handles


# ---------------------------------------------------------------- the release

@_STYLE
def prevalence(targets: np.ndarray, classes: Sequence[str], *, split: np.ndarray | None = None, data_label: str) -> Figure:
    """How imbalanced each class is: the share of positive films on a logarithmic axis, with the count and the negatives to one positive.

    `targets` : 0/1 (N, C).    `split` : N names such as 'train', 'val', 'test', a marker each; None leaves the bar of all films.
    """
    targets = np.asarray(targets)
    counts = targets.sum(0, dtype=np.int64)
    order = np.argsort(-counts, kind="stable")
    share = counts[order] / max(len(targets), 1)
    floor = share[share > 0].min(initial=0.5) / 2
    figure = _figure(0.2 * len(classes) + 0.9, data_label)
    ax, y = figure.subplots(), np.arange(len(classes))
    bar = {"color": _PALE if split is not None else _NEUTRAL, "linewidth": 5}
    handles = [ax.hlines(y, floor, np.maximum(share, floor), label=f"all films ({len(targets):,})", **bar)]
    names = [] if split is None else [name for name in ordered(dict.fromkeys(("train", "val", "test")), pd.Series(split)) if name in split]
    for name, marker, colour in zip(names, "osD^", (_NEUTRAL, _YELLOW, _PINK, _INK)):
        mask = np.asarray(split) == name
        part = targets[mask].mean(0)[order]
        part = np.where(part > 0, part, np.nan)
        handles += ax.plot(part, y, marker, color=colour, markersize=4, markeredgewidth=0, label=f"{name} ({mask.sum():,})")
    ratios = [f"{(len(targets) - n) / n:,.1f} : 1" if n else "none" for n in counts[order]]
    for row, cells in enumerate(zip(["positives", *(f"{n:,}" for n in counts[order])], ["neg. : pos.", *ratios])):
        for x, text in zip((45, 100), cells):
            ax.annotate(text, (1, row - 1), (x, 0), ("axes fraction", "data"), "offset points", ha="right", va="center", fontsize=7,
                        color=_INK if row else _GREY)
    ax.set(xscale="log", xlim=(floor, 1), xlabel="Share of films", ylim=(len(classes) - 0.4, -0.6))
    ax.set_yticks(y, [_class_name(classes[c]) for c in order])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    ax.xaxis.set_minor_locator(NullLocator())
    _grid(ax)
    _legend(figure, handles)
    return figure


@_STYLE
def cooccurrence(targets: np.ndarray, classes: Sequence[str], *, data_label: str) -> Figure:
    """Of the films with the row's label, the percentage that also carries the column's. `targets` : 0/1 (N, C). Dash: no such film."""
    targets = np.asarray(targets, np.int64)
    joint = targets.T @ targets
    count = np.diag(joint)
    share = np.divide(joint, count[:, None], out=np.full(joint.shape, np.nan), where=count[:, None] > 0)
    np.fill_diagonal(share, np.nan)
    figure = _figure(max(0.28 * len(classes) + 1.3, 3.6), data_label)
    ax = figure.subplots()
    top = max(np.nanmax(share, initial=0), 0.01)
    image = ax.imshow(share, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    for i, j in np.ndindex(share.shape):
        text = "" if i == j else "–" if not count[i] else f"{100 * share[i, j]:.0f}"
        ax.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if share[i, j] > 0.55 * top else _INK)
    names = [_class_name(name) for name in classes]
    ax.set_xticks(range(len(classes)), names, rotation=45, ha="left", rotation_mode="anchor")
    ax.set_yticks(range(len(classes)), [f"{name} ({n:,})" for name, n in zip(names, count)])
    ax.set_ylabel("Of the films with this label (number) …")
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    percent = PercentFormatter(1, decimals=0)
    figure.colorbar(image, ax=ax, fraction=0.03, pad=0.01, aspect=40, format=percent, label="… the share that also has the column's label")
    return figure


@_STYLE
def ages(films: pd.DataFrame, *, data_label: str) -> Figure:
    """Age in years by sex, a panel per view position. `films` : age, sex, view; ages outside 0 to 100 are counted in the title only."""
    views = sorted(films["view"].dropna().unique())
    figure = _figure(2.4, data_label)
    axes = figure.subplots(1, max(len(views), 1), squeeze=False)[0]
    for ax, view in zip(axes, views):
        rows = films[films["view"] == view]
        for sex, colour in zip(sorted(rows["sex"].dropna().unique()), (_PINK, _NEUTRAL, _YELLOW)):
            ax.hist(rows.loc[rows["sex"] == sex, "age"], bins=np.arange(0, 101, 5), histtype="stepfilled", edgecolor=colour,
                    facecolor=(colour, 0.3), linewidth=1.2, label=str(sex))
        outside = int((~rows["age"].between(0, 100)).sum())
        ax.set_title(f"{view}: {len(rows):,} films" + (f" ({outside:,} with an age outside 0 to 100)" if outside else ""))
        ax.set(xlim=(0, 100), xlabel="Age (years)")
        ax.legend(handlelength=1)
    axes[0].set_ylabel("Films")
    return figure


@_STYLE
def film_grid(films: np.ndarray, boxes: Sequence, titles: Sequence[str], *, box_names: Sequence | None = None, columns: int = 4,
              data_label: str) -> Figure:
    """Films with their boxes. `films` : uint8 (N, S, S). `boxes` : N sequences of (x1, y1, x2, y2) in pixels of S."""
    side = WIDTH / columns - 0.09
    wrapped = [textwrap.fill(_class_name(title), int(side * 72 / 4)) for title in titles]
    lines = max((title.count("\n") + 1 for title in wrapped), default=1)
    figure, axes = _panels(len(films), columns, side, 0.06 + 0.11 * lines, data_label)
    figure.set_figheight(figure.get_figheight() - 0.25)  # no legend and no axis labels here
    for i, ax in enumerate(axes):
        _film(ax, films[i], boxes[i], box_names[i] if box_names is not None else ())
        ax.set_title(wrapped[i], fontsize=7, pad=2)
    return figure


# ---------------------------------------------------------------- training and metrics; one run, or with a column loss several

@_STYLE
def training_curves(history: pd.DataFrame, *, kept_epoch: int | None = None, data_label: str) -> Figure:
    """Loss and macro validation AUROC by epoch. `history` : epoch, train_loss, val_auroc; optionally val_loss, or loss for several runs."""
    figure = _figure(2.4, data_label)
    left, right = figure.subplots(1, 2)
    groups, handles = _by_loss(history), []
    for style, label, rows in groups:
        handles += left.plot(rows["epoch"], rows["train_loss"], markersize=2.5, label=label or "training", **style)
        right.plot(rows["epoch"], rows["val_auroc"], markersize=2.5, **style)
        if "val_loss" in rows and not label:
            handles += left.plot(rows["epoch"], rows["val_loss"], color=_YELLOW, marker="s", markersize=2.5, label="validation")
    if kept_epoch is not None:
        right.axvline(kept_epoch, **_DASHED)
        right.annotate("  weights kept  ", (kept_epoch, 0.03), xycoords=("data", "axes fraction"), fontsize=7, color=_GREY,
                       ha="right" if kept_epoch > history["epoch"].mean() else "left")
    left.set(xlabel="Epoch", ylabel="Loss")
    if len(groups) > 1:
        left.set(yscale="log", ylabel="Training loss (scales differ)")
    right.set(xlabel="Epoch", ylabel="Macro AUROC, validation")
    for ax in (left, right):
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _grid(ax, "both")
    _legend(figure, handles)
    return figure


@_STYLE
def class_curves(predictions: pd.DataFrame, kind: str, *, data_label: str) -> Figure:
    """ROC (`kind` 'roc') or precision-recall ('pr') curves, a panel per class with AUROC or AP in it; dashed: no skill.

    `predictions` : class, target (0/1), logit, optionally loss (a curve each). A class with one label only has no curve and says so.
    """
    if kind not in ("roc", "pr"):
        raise ValueError(f"kind = {kind!r}: 'roc' or 'pr'")
    x, y = ("False positive rate", "True positive rate") if kind == "roc" else ("Recall", "Precision")
    (figure, panels), handles = _class_panels(predictions, x, y, data_label), []
    for ax, rows in panels:
        prevalence = rows["target"].mean()
        ax.plot((0, 1), (0, 1) if kind == "roc" else (prevalence, prevalence), **_DASHED)
        ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        if prevalence in (0, 1):
            ax.text(0.5, 0.5, "one label only", transform=ax.transAxes, ha="center", fontsize=7, path_effects=_LIGHT_RIM)
            continue
        groups = _by_loss(rows)
        for i, (style, label, group) in enumerate(groups):
            x, y, value = _curve(group["target"].to_numpy(), group["logit"].to_numpy(), kind)
            colour, height = style["color"], 0.04 + 0.13 * (len(groups) - 1 - i)
            place = (1, height) if kind == "roc" else (0.02, height + min(prevalence, 0.4))
            handles += ax.plot(x, y, color=colour, linewidth=1, drawstyle="default" if kind == "roc" else "steps-post", label=label or "_")
            ax.text(*place, f"{value:.2f}", ha="right" if kind == "roc" else "left", fontsize=7, color=colour, path_effects=_LIGHT_RIM)
    _legend(figure, handles)
    return figure


def _curve(target: np.ndarray, logit: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, float]:
    # Imported here: scikit-learn costs half a second, and most notebooks draw no such curve.
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

    if kind == "roc":
        x, y = roc_curve(target, logit)[:2]
        value = roc_auc_score(target, logit)
    else:
        y, x = (part[:-1] for part in precision_recall_curve(target, logit)[:2])  # its last point (0, 1) is a convention, not a measurement
        value = average_precision_score(target, logit)
    keep = np.unique(np.linspace(0, len(x) - 1, 400).round().astype(int))  # a vector file of 25,000 points a curve serves nobody
    return x[keep], y[keep], value


@_STYLE
def reliability(predictions: pd.DataFrame, *, bins: int = 8, data_label: str) -> Figure:
    """Observed share of positives against predicted probability, a panel per class on its own scale; on the dashed line they agree.

    `predictions` : class, target (0/1), logit, optionally loss. `bins` of equally many films each, with 95 % (Jeffreys) intervals.
    """
    from scipy.stats import beta

    figure, panels = _class_panels(predictions, "Mean prediction", "Share positive", data_label)
    handles = []
    for ax, class_rows in panels:
        reach = 0.0
        for style, label, rows in _by_loss(class_rows):
            rows = rows.sort_values("logit")
            parts = np.array_split(rows["target"].to_numpy(), min(bins, len(rows)))
            k, n = np.array([part.sum() for part in parts]), np.array([len(part) for part in parts])
            x = np.array([part.mean() for part in np.array_split(expit(rows["logit"].to_numpy(np.float64)), len(parts))])
            low, high = beta.ppf([[0.025], [0.975]], k + 0.5, n - k + 0.5)
            ax.vlines(x, low, high, color=style["color"], linewidth=0.7, alpha=0.6)
            handles += ax.plot(x, k / n, markersize=2.8, linewidth=0.9, markeredgewidth=0, label=label or "_", **style)
            reach = max(reach, x.max(), (k / n).max())
        top = next(limit for limit in (0.05, 0.1, 0.2, 0.5, 1) if reach <= limit)
        ax.plot((0, 1), (0, 1), **_DASHED)
        ax.set(xlim=(-0.03 * top, 1.03 * top), ylim=(-0.03 * top, 1.03 * top))
        ax.set_xticks((0, top), ("0", f"{top:g}"))
        ax.set_yticks((0, top), ("0", f"{top:g}"))
    _legend(figure, handles)
    return figure


# ---------------------------------------------------------------- the lenses

@_STYLE
def alignment_distributions(alignment: pd.DataFrame, *, data_label: str) -> Figure:
    """Soft IoBB and IoR of one run: a dot per pair of film and class, quartiles, the mean, and what the same map laid anywhere would get.

    `alignment` : class, iobb, ior, box_area, cam_mass (shares of the film). Chance is cam_mass for IoBB and box_area for IoR.
    """
    medians = alignment.groupby("class")["iobb"].median().sort_values(ascending=False)
    counts, rng, handles = alignment["class"].value_counts(), np.random.default_rng(0), []
    figure = _figure(0.3 * len(medians) + 0.95, data_label)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (metric, chance) in zip(axes, (("iobb", "cam_mass"), ("ior", "box_area"))):
        for y, name in enumerate(medians.index):
            rows = alignment[alignment["class"] == name].dropna(subset=[metric])
            low, high = rows[metric].quantile([0.25, 0.75])
            jitter = rng.uniform(-0.28, 0.28, len(rows))
            ax.plot(rows[metric], y + jitter, ".", color=_NEUTRAL, alpha=0.4, markersize=3, markeredgewidth=0, rasterized=True)
            handles += ax.plot((low, high), (y, y), color=_INK, linewidth=2.5, solid_capstyle="butt", label="quartiles")
            handles += ax.plot(rows[metric].mean(), y, "o", color="white", markeredgecolor=_INK, markersize=4.5, label="mean")
            handles += ax.plot(rows[chance].mean(), y, "d", color=_YELLOW, markeredgecolor="black", markeredgewidth=0.4, markersize=5,
                               label="mean expected by chance")
        ax.set(xlim=(-0.02, 1.02), xlabel=f"{display(metric)} per pair of film and class")
        _grid(ax)
    axes[0].set_yticks(range(len(medians)), [f"{_class_name(name)} ({counts[name]:,})" for name in medians.index])
    axes[0].set_ylim(len(medians) - 0.4, -0.6)
    _legend(figure, handles)
    return figure


@_STYLE
def concept_distributions(concepts: pd.DataFrame, *, data_label: str) -> Figure:
    """Disjoint and Unique concepts per annotated film, with the means of Table 2. `concepts` : disjoint, unique, optionally loss."""
    figure = _figure(2.6, data_label)
    axes, groups = figure.subplots(1, 2, sharey=True), _by_loss(concepts)
    for ax, metric in zip(axes, ("disjoint", "unique")):
        bins = np.histogram_bin_edges(concepts[metric].dropna(), bins=20)
        handles = []
        for style, label, rows in groups:
            colour, mean = style["color"], rows[metric].mean()
            fill = (colour, 0 if label else 0.3)
            ax.hist(rows[metric], bins=bins, histtype="stepfilled", linewidth=1.2, edgecolor=colour, facecolor=fill)
            name = f"{label}, mean {mean:.1f}" if label else f"mean {mean:.1f}"
            handles.append(ax.axvline(mean, color=colour, linewidth=1, linestyle=(0, (4, 2)), label=name))
        ax.set(xlabel=f"{display(metric)} concepts per film")
        ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, handlelength=1.4, columnspacing=1.2)
    axes[0].set_ylabel("Films")
    return figure


@_STYLE
def channel_panel(films: np.ndarray, maps: np.ndarray, thresholds: np.ndarray, boxes: Sequence, row_titles: Sequence[str], *,
                  data_label: str) -> Figure:
    """What single channels respond to: a row per channel, its films in columns, marked where the map reaches the threshold, with the boxes.

    `films` : uint8 (R, K, S, S).   `maps` : float (R, K, S, S), resized to the film.   `thresholds` : (R,).   `boxes` : [R][K] sequences of
    (x1, y1, x2, y2) in pixels of S.   `row_titles` : R, such as 'channel 17'.   ValueError where maps and films differ in shape.
    """
    if maps.shape != films.shape:
        raise ValueError(f"maps are {maps.shape}, films {films.shape}: resize the maps to the films")
    rows, columns, size = films.shape[:3]
    figure = _figure(rows * ((WIDTH - 0.2) / columns) + 0.5, data_label)
    axes = figure.subplots(rows, columns, squeeze=False)
    for i, j in product(range(rows), range(columns)):
        ax, above = axes[i, j], maps[i, j] >= thresholds[i]
        _film(ax, films[i, j], boxes[i][j])
        ax.imshow(np.where(above, 1.0, np.nan), cmap=ListedColormap([_YELLOW]), alpha=0.4, extent=(0, size, size, 0))
        if above.any() and not above.all():
            ax.contour(np.arange(size) + 0.5, np.arange(size) + 0.5, maps[i, j], levels=[thresholds[i]], colors=[_YELLOW], linewidths=0.9)
        if j == 0:
            ax.set_ylabel(row_titles[i], fontsize=7)
    _legend(figure, [Rectangle((0, 0), 1, 1, facecolor=_YELLOW, alpha=0.6, label="map at or above the channel's threshold"),
                     Rectangle((0, 0), 1, 1, fill=False, edgecolor="#00a5b8", label="annotated box")])
    return figure


@_STYLE
def loss_weights(positive: pd.Series, negative: pd.Series, gamma: float, *, data_label: str) -> Figure:
    """The loss of a film by the probability the model gives it, for the rarest and the commonest class, beside plain cross-entropy.

    `positive`, `negative` : constants w+ and w- of each class, indexed by class.    `gamma` : the focusing exponent of eq. 2.
    """
    ratio = positive / negative.where(negative > 0)
    names = list(dict.fromkeys([ratio.idxmax(), ratio.idxmin()]))
    p = np.linspace(0.005, 0.995, 199)
    figure = _figure(2.4, data_label)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, side, probability, constant in ((axes[0], "with", p, positive), (axes[1], "without", 1 - p, negative)):
        ax.plot(p, -np.log(probability), label="BCE", **_DASHED)
        for name, colour in zip(names, (_NEUTRAL, _YELLOW)):
            ax.plot(p, -constant[name] * (1 - probability) ** gamma * np.log(probability), color=colour, label=f"{_class_name(name)}")
        ax.set(title=f"Film {side} the finding", xlabel="Predicted probability", xlim=(0, 1), ylim=(0, 3))
        _grid(ax, "both")
    axes[0].set_ylabel("Loss of the film")
    _legend(figure, axes[0].get_lines())
    return figure
