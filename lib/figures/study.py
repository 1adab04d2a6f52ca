"""All runs of a study together: Khakzar et al., Figures 1 and 2."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import product

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lib.analysis.localization import METRICS
from lib.figures.style import (
    BOX,
    DARK_RIM,
    DASHED,
    FILM_GREY,
    GREY,
    HEAT,
    INK,
    PAGE,
    STYLE,
    WIDTH,
    class_name,
    grid,
    legend,
    loss_styles,
    new_figure,
    present,
    show_film,
)
from lib.tables.names import BACKBONES, LOSSES, display


@STYLE
def cam_grid(
    films: np.ndarray,
    cams: np.ndarray,
    boxes: Sequence,
    classes: Sequence[str],
    probabilities: np.ndarray,
    *,
    scores: Mapping[str, np.ndarray] | None = None,
    names: Sequence[str] = (),
    others: Sequence = (),
    losses: Sequence[str] = tuple(LOSSES),
    data_label: str,
) -> Figure:
    """Khakzar et al., Fig. 1: a row per film, the film with its boxes, then the class activation map of every loss, on
    one scale, with its numbers beneath. No taller than a page.

    Parameters
    ----------
    films : uint8 (R, S, S).
    cams : float (R, L, h, w) in [0, 1] over the whole film; NaN where there is no run. A map of zeros says it is empty.
    boxes : R sequences of (x1, y1, x2, y2) in pixels of S, ends exclusive.
    classes, probabilities : the class of each row, and (R, L) what each run predicts for it.
    scores : by the id of a localization metric (R, L) values, printed beside the probability; NaN is a dash.
    names : R names of the films.
    others : R sequences of (name, box), see `style.other_findings`.
    losses : L ids, the columns.

    Raises
    ------
    ValueError : the arguments do not agree on R and L.
    """
    rows, columns = cams.shape[:2]
    fit = len(films) == len(boxes) == len(classes) == rows and len(losses) == columns
    numbers = {"P": probabilities} | {display(metric): values for metric, values in (scores or {}).items()}
    if not fit or any(np.shape(values) != (rows, columns) for values in numbers.values()):
        what = "films, boxes, classes, losses, probabilities or scores"
        raise ValueError(f"cams are {rows} films x {columns} losses; {what} do not match")
    names, others, size = names or [""] * rows, others or [()] * rows, films.shape[-1]
    beside = max((0.1 + 0.062 * len(name) for film in others for name, _ in film), default=0)  # for names of boxes
    meaning = ["P: probability that the run gives to the class of the row."]
    meaning += [f"{METRICS[metric].label}: {METRICS[metric].meaning}." for metric in scores or {}]
    meaning += ["Boxes: thick of that class, thin of other findings."] * bool(beside)
    options = []
    for blocks in range(1, rows + 1):  # of rows side by side, where few losses leave room
        pitch, down = (WIDTH / blocks - 0.3 - beside) / (columns + 1), -(-rows // blocks)
        apart = " " if pitch > 0.38 * len(numbers) else "\n"  # else the numbers stand under each other
        below = 0.08 + 0.12 * (len(numbers) if apart == "\n" else 1)
        side = min(pitch - 0.05, 1.8, (PAGE - 1) / down - below)
        pitch = min(pitch, max(side + 0.12, 0.4 * len(numbers) if apart == " " else 0))
        options.append((side - 0.1 * blocks, side, blocks, down, pitch, apart, below))
    _, side, blocks, down, pitch, apart, below = max(options)
    film = max(side + 0.05 + beside, 0.066 * max(map(len, names)))
    width = blocks * (columns * pitch + film + 0.25)
    key = textwrap.fill(" ".join(meaning), int(17.5 * width))
    foot = 0.4 + 0.12 * (key.count("\n") + 1)
    height = down * (side + below) + foot + 0.2
    figure = new_figure(height, data_label, width)
    figure.get_layout_engine().set(rect=(0, foot / height, 1, 1 - foot / height), h_pad=0.02, w_pad=0.02)
    shares = blocks * [film, *columns * [pitch]]
    grid = figure.subplots(down, len(shares), squeeze=False, width_ratios=shares)
    axes = np.concatenate(np.split(grid, blocks, axis=1))
    for ax in axes[rows:].flat:
        ax.set_visible(False)
    shown = {"cmap": HEAT, "vmin": 0, "vmax": 1, "extent": (0, size, size, 0), "interpolation": "bilinear"}
    for i, j in product(range(rows), range(columns + 1)):
        ax = axes[i, j]
        show_film(ax, films[i], boxes[i], others=[("", box) for _, box in others[i]])
        if j == 0:
            title = textwrap.fill(class_name(classes[i]), int(13 * (side + below)), break_long_words=False)
            ax.set_ylabel(title, fontsize=7, weight="bold", labelpad=2)
            ax.set_xlabel(names[i], fontsize=7, labelpad=2, loc="left" if beside else "center")
            ax.set_anchor("W" if beside else "C")
            name_beside(ax, others[i], size / side)
            continue
        known = np.isfinite(cams[i, j - 1]).all()
        if known:
            ax.imshow(cams[i, j - 1], zorder=0.5, **shown)
            printed = ((name, f"{values[i, j - 1]:.2f}".removeprefix("0")) for name, values in numbers.items())
            ax.set_xlabel(
                apart.join(f"{name} {text.replace('nan', '–')}" for name, text in printed), fontsize=7, labelpad=2
            )
        if not known or not cams[i, j - 1].any():
            text = "empty" if known else "no run"
            ax.text(size / 2, size / 2, text, ha="center", color="white", path_effects=DARK_RIM)
    headings = {"Film and boxes": INK} | {display(loss): style["color"] for loss, style in loss_styles(losses).items()}
    for ax, (name, colour) in zip(grid[0], blocks * [*headings.items()]):
        ax.set_title(name, weight="bold", color=colour, pad=3, loc="left" if beside and colour == INK else "center")
    # In the strip at the foot: beside the panels the bar would narrow them.
    place = figure.add_axes((0.12 / width, 0.22 / height, 1.1 / width, 0.07 / height))
    place.set_in_layout(False)
    scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 1), HEAT)
    figure.colorbar(scale, cax=place, orientation="horizontal", ticks=(0, 1))
    place.set_facecolor(FILM_GREY)
    text = "class activation" if rows == 1 else "class activation, each map scaled to [0, 1]"
    figure.text(1.3 / width, 0.255 / height, text, fontsize=7, va="center")
    figure.text(0.05 / width, 0.34 / height, key, fontsize=7, va="bottom", color=GREY)
    return figure


def name_beside(ax: Axes, others: Sequence, inch: float) -> None:
    """The names of boxes at the right of a film of `inch` pixels an inch, each with a line from its box."""
    at = -0.06 * inch
    look = {"color": "#007f8c", "fontsize": 7, "va": "center", "annotation_clip": False, "in_layout": False}
    line = {"arrowstyle": "-", "color": BOX, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0}
    for y, x, name in sorted((y1, x2, name) for name, (_, y1, x2, _) in others):
        at = max(y, at + 0.12 * inch)
        ax.annotate(class_name(name), (x, y), (ax.get_xlim()[1] + 0.06 * inch, at), arrowprops=line, **look)


@STYLE
def performance(results: pd.DataFrame, *, data_label: str) -> Figure:
    """Khakzar et al., Fig. 2: AUROC, AP and mean predicted probability by loss, class and on average; one row of panels
    per backbone.

    `results` : a row per task, backbone, loss, class and metric ('auroc', 'ap', 'mean_probability') with value, ci_low,
    ci_high (NaN: no bar) and optionally prevalence. Classes keep their order; 'Average...' (multi-label) and
    'Unhealthy' (binary) stand apart below.
    """
    metrics = ["auroc", "ap", "mean_probability"]
    average, multilabel = results["class"].str.startswith("Average"), results["task"] == "multilabel"
    position, y = {}, 0.0
    for part in (multilabel & ~average, multilabel & average, ~multilabel & ~average):
        names = list(dict.fromkeys(results.loc[part, "class"]))
        position |= {name: y + i for i, name in enumerate(names)}
        y += len(names) + 0.35 * bool(names)
    results = results[multilabel | ~average]
    backbones, losses = present(BACKBONES, results["backbone"]) or [""], present(LOSSES, results["loss"])
    line = min(0.165, ((PAGE - 0.4) / len(backbones) - 0.55) / max(y, 1))
    figure = new_figure(len(backbones) * (line * y + 0.55) + 0.4, data_label)
    axes = figure.subplots(len(backbones), len(metrics), squeeze=False, sharey=True, sharex="col")
    handles = []
    for i, j in product(range(len(backbones)), range(len(metrics))):
        rows = results[(results["backbone"] == backbones[i]) & (results["metric"] == metrics[j])]
        handles += loss_dots(axes[i, j], rows, position, losses, metrics[j])
        axes[i, j].set_title(f"{display(metrics[j])}, {display(backbones[i])}", pad=3)
    for ax in axes[0, :2]:
        ax.set_xlim(right=1.02)
    names = [class_name(name).replace("Unhealthy", "Unhealthy (binary)") for name in position]
    axes[0, 0].set_yticks(list(position.values()), names)
    axes[0, 0].set_ylim(y - 0.75, -0.6)
    legend(figure, [*handles, Line2D([], [], color=GREY, linewidth=0.9, label="95 % interval")], 8)
    return figure


def loss_dots(ax: Axes, rows: pd.DataFrame, position: dict[str, float], losses: list[str], metric: str) -> list:
    """A line of the panel per class, the losses beside each other in it, a marker and its interval each; dashed or
    black: what chance alone gives."""
    for y in list(position.values())[::2]:
        ax.axhspan(y - 0.5, y + 0.5, color="#f2f2f2", linewidth=0)
    handles, plain = [], {"linestyle": "none", "markersize": 2.7, "markeredgewidth": 0}
    for k, (loss, style) in enumerate(loss_styles(losses).items()):
        mine = rows[rows["loss"] == loss]
        y = mine["class"].map(position).astype(float) + (k - (len(losses) - 1) / 2) * 0.8 / len(losses)
        ax.hlines(y, mine["ci_low"], mine["ci_high"], color=style["color"], linewidth=0.9)
        handles += ax.plot(mine["value"], y, label=display(loss), **plain, **style)
    if metric == "auroc":
        handles.append(ax.axvline(0.5, label="chance", **DASHED))
    if metric in ("ap", "mean_probability") and "prevalence" in rows:
        known = rows.dropna(subset=["prevalence"]).drop_duplicates("class")
        y = known["class"].map(position).astype(float)
        tick = {"markersize": 8, "markeredgewidth": 0.9, "zorder": 1}
        handles += ax.plot(known["prevalence"], y, "|k", label="prevalence", **tick)
    grid(ax)
    ax.tick_params(axis="y", length=0)
    ax.tick_params(axis="x", labelbottom=True)
    ax.xaxis.set_major_locator(MaxNLocator(8, steps=(1, 2.5, 5, 10)))  # multiples of any of these meet 0.5 and 1
    return handles
