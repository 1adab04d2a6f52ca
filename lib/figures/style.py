"""What every figure shares: type, colours, the strip with the data label, a film with its boxes."""

import textwrap
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lib.tables.names import LOSSES, class_name, display, ordered

WIDTH = 7.0  # inches
PAGE = 8.6  # of height: with a heading and the margin of the file a figure fits a page of 9
LOSS_STYLES = {
    "bce": {"color": "#4d4d4d", "marker": "o"},
    "wbce": {"color": "#0072b2", "marker": "s"},
    "focal": {"color": "#d55e00", "marker": "^"},
    "cb_focal": {"color": "#009e73", "marker": "D"},
}
_MORE_STYLES = [{"color": c, "marker": m} for c, m in zip(("#cc79a7", "#e69f00", "#56b4e9", "#806000"), "vPX*")]
INK, GREY, PALE, NEUTRAL = "#222222", "#777777", "#d9d9d9", "#3a6ea5"
YELLOW, PINK, BOX = "#e69f00", "#cc79a7", "#00e5ff"
DASHED = {"color": GREY, "linewidth": 0.7, "linestyle": (0, (3, 2)), "zorder": 1}
DARK_RIM = [patheffects.withStroke(linewidth=2, foreground="black", alpha=0.6)]
LIGHT_RIM = [patheffects.withStroke(linewidth=2, foreground="white")]
_TICKS = {"labelsize": 7, "major.width": 0.6, "major.size": 2.5}
_LINES = {"axes.linewidth": 0.6, "axes.edgecolor": INK, "axes.axisbelow": True, "lines.linewidth": 1.2}
STYLE = mpl.rc_context(
    dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize"), 8)
    | {f"{axis}tick.{key}": value for axis in "xy" for key, value in _TICKS.items()}
    | _LINES
    | {"axes.spines.top": False, "axes.spines.right": False, "legend.fontsize": 7.5, "legend.frameon": False}
    | {"figure.dpi": 150, "pdf.fonttype": 42}
)
# transparent where the map is 0, so the film stays visible; the colour bar is drawn over the grey of a film for the
# same reason
_RAMP = np.linspace(0, 1, 256)
HEAT = ListedColormap(
    np.column_stack([mpl.colormaps["inferno"](0.35 + 0.6 * _RAMP)[:, :3], 0.8 * _RAMP**0.8]), name="heat"
)
# The hue does not fade towards 0: pale colours would look like a halo on a dark film.
_BOTH = np.linspace(-1, 1, 257)
SIGNED = ListedColormap(
    np.column_stack([np.where(_BOTH[:, None] > 0, (0.86, 0.12, 0.1), (0.12, 0.45, 0.9)), 0.75 * abs(_BOTH) ** 0.9]),
    name="signed",
)
# Pixel relevance falls off steeply from its maximum: a linear opacity would leave a few specks.
_PALE_TO_FULL = mpl.colormaps["RdBu_r"](0.5 + 0.45 * np.sign(_BOTH) * (0.35 + 0.65 * abs(_BOTH)))[:, :3]
RELEVANCE = ListedColormap(np.column_stack([_PALE_TO_FULL, 0.95 * abs(_BOTH) ** 0.6]), name="relevance")
FILM_GREY = "#6b6b6b"


def new_figure(height: float, data_label: str, width: float = WIDTH) -> Figure:
    """An empty figure with the data label at its foot, in a strip of its own."""
    if not data_label.strip():
        raise ValueError("data_label is empty: say what the figure was measured on")
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    data_label = textwrap.fill(data_label, int(17 * width))
    strip = (0.17 + 0.11 * data_label.count("\n")) / height
    figure.get_layout_engine().set(rect=(0, strip, 1, 1 - strip))
    foot = {"ha": "right", "va": "bottom", "fontsize": 7, "style": "italic", "color": GREY}
    figure.text(1 - 0.05 / width, 0.03 / height, data_label, **foot)
    return figure


def headed(figure: Figure, text: str) -> Figure:
    """The figure with a heading, such as class, backbone and loss: above its legend or in a strip of its own, by which
    it grows at the head."""
    lines, layout = textwrap.wrap(text, int(figure.get_figwidth() * 72 / 5)), figure.get_layout_engine()
    strip = 0.06 + 0.14 * len(lines)
    height = figure.get_figheight() + strip
    figure.set_figheight(height)
    if figure.legends:  # both would want the upper edge
        figure.legends[0].set_title("\n".join(lines), {"size": 8, "weight": "bold"})
        return figure
    left, bottom, width, share = layout.get()["rect"]
    layout.set(rect=(left, bottom, width, share - strip / height))
    look = {"ha": "center", "va": "top", "fontsize": 8, "weight": "bold"}
    figure.text(0.5, 1 - 0.04 / height, "\n".join(lines), **look)
    return figure


def panels(count: int, columns: int, side: float, extra: float, data_label: str) -> tuple[Figure, list[Axes]]:
    """`count` square panels of about `side` inches with `extra` inches of text a row; the cells that stay empty are
    hidden."""
    rows = -(-count // columns)
    figure = new_figure(rows * (side + extra) + 0.45, data_label, WIDTH if columns > 1 else side + 1.4)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[count:]:
        ax.set_visible(False)
    return figure, list(axes[:count])


def class_panels(
    predictions: pd.DataFrame, x: str, y: str, data_label: str
) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """A square panel per class with the axis labels `x` and `y` at the edges, and the rows of its class."""
    names = list(dict.fromkeys(predictions["class"]))
    columns = min(5, len(names))
    figure, axes = panels(len(names), columns, 1.0 if columns > 2 else 2.2, 0.5, data_label)
    for i, (ax, name) in enumerate(zip(axes, names)):
        ax.set(title=class_name(name), box_aspect=1)
        ax.set_xlabel(x if i + columns >= len(names) else "", fontsize=7)
        ax.set_ylabel(y if i % columns == 0 else "", fontsize=7)
    return figure, [(ax, predictions[predictions["class"] == name]) for ax, name in zip(axes, names)]


def loss_styles(losses: Sequence[str]) -> dict[str, dict[str, str]]:
    """Colour and marker of each loss; losses the paper does not have take further ones in the order given."""
    more = [loss for loss in losses if loss not in LOSS_STYLES]
    return {loss: LOSS_STYLES.get(loss) or _MORE_STYLES[more.index(loss) % len(_MORE_STYLES)] for loss in losses}


def present(known: dict[str, str], column: pd.Series) -> list[str]:
    """What the column holds, in the order of `known`, then of appearance."""
    return [name for name in ordered(known, column) if (column == name).any()]


def by_loss(frame: pd.DataFrame) -> list[tuple[dict[str, str], str, pd.DataFrame]]:
    """(style, label, rows) per loss; for the frame of one run, without a column loss, one group without a label in the
    neutral colour."""
    if "loss" not in frame:
        return [({"color": NEUTRAL, "marker": "o"}, "", frame)]
    styles = loss_styles(present(LOSSES, frame["loss"]))
    return [(style, display(loss), frame[frame["loss"] == loss]) for loss, style in styles.items()]


def legend(figure: Figure, handles: Sequence, columns: int = 6) -> None:
    """A legend above all panels, of every label once; labels that begin with _ are left out."""
    labelled = {handle.get_label(): handle for handle in handles if not handle.get_label().startswith("_")}
    if labelled:
        space = {"handletextpad": 0.4, "columnspacing": 1.6}
        figure.legend(handles=list(labelled.values()), loc="outside upper center", ncols=columns, **space)


def grid(ax: Axes, axis: str = "x") -> None:
    """Fine lines across the panel at the ticks of `axis` ('x', 'y' or 'both')."""
    ax.grid(axis=axis, color=PALE, linewidth=0.4)


def show_film(
    ax: Axes, film: np.ndarray, boxes: Sequence = (), names: Sequence[str] = (), others: Sequence = ()
) -> None:
    """A film in its own pixels with the corners at (0, 0) and (S, S), so that exclusive box ends land on pixel edges.
    `others` : (name, box) of what else is marked, drawn thin and named, see `other_findings`."""
    size = film.shape[-1]
    ax.imshow(film, cmap="gray", vmin=0, vmax=255, extent=(0, size, size, 0))
    ax.set(xticks=[], yticks=[], xlim=(0, size), ylim=(size, 0))
    ax.spines[:].set_visible(False)
    for width, several in ((0.5, [box for _, box in others]), (1, boxes)):
        frame = {"fill": False, "edgecolor": BOX, "linewidth": width}
        rim = [patheffects.withStroke(linewidth=2 * width, foreground="black", alpha=0.6)]
        for x1, y1, x2, y2 in several:
            ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, path_effects=rim, **frame))
    word, taken = {"color": BOX, "fontsize": 7, "va": "top", "path_effects": DARK_RIM}, []
    # Of a line of type in pixels; the side in inches is not known before the layout is made, but about.
    line, letter = np.array([8.5, 4.3]) / 72 * size / (1.3 * min(ax.get_position().size * ax.figure.get_size_inches()))
    for name, (x1, y1, _, y2) in [*zip(names, boxes), *others]:
        long = letter * len(name)
        x, anywhere = np.clip(x1, 0, max(size - long, 0)), sorted(np.arange(0, size, line), key=lambda y: abs(y - y1))
        near = [y for y in (y1 - line, y2, y1, y2 - line, *anywhere) if 0 <= y <= size - line]
        free = [y for y in near if not any(abs(y - v) < line and x < u + w and u < x + long for u, v, w in taken)]
        taken.append((x, [*free, *near, 0][0], long))
        ax.text(*taken[-1][:2], class_name(name), **word)


def other_findings(boxes: pd.DataFrame, pairs: pd.DataFrame) -> list[list[tuple[str, np.ndarray]]]:
    """For `show_film`, of each of `pairs` (image, class): class and corners of the film's boxes of every other class.
    `boxes` : image, class, x1, y1, x2, y2."""
    by_film, corners = dict(list(boxes.groupby("image"))), ["x1", "y1", "x2", "y2"]
    films = [by_film.get(image, boxes[:0]) for image in pairs["image"]]
    rows = [film[film["class"] != name] for film, name in zip(films, pairs["class"])]
    return [list(zip(found["class"], found[corners].to_numpy(float))) for found in rows]


def correlation_text(x: np.ndarray, y: np.ndarray) -> str:
    """Pearson's correlation with three decimals, or 'undefined' where a side is constant."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return "undefined"
    return f"{np.corrcoef(x, y)[0, 1]:.3f}"
