"""The widgets of notebook 10: one film at a time, all losses, by hand. Where no kernel runs, such as in an executed
notebook, each shows the picture that it was made with."""

import base64
import html
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import cv2
import ipywidgets as widgets
import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from IPython import get_ipython
from PIL import Image, ImageColor, ImageDraw, ImageFont

from lib.analysis import cam
from lib.analysis.inference import LensError
from lib.analysis.model_cams import passes_per_film
from lib.analysis.relevance.heatmaps import METHODS as RELEVANCE_METHODS
from lib.analysis.relevance.rules import RelevanceError
from lib.explorer import films
from lib.explorer.films import SIDE, Film, Lightbox
from lib.figures.style import BOX, GREY, HEAT, INK, RELEVANCE, loss_styles
from lib.tables import li, nam_lee
from lib.tables.names import MISSING, class_name, display

ORDERS = {
    "iobb apart": "disagreement of the maps (IoBB)",
    "iobb": "mean IoBB",
    "p apart": "disagreement of the probabilities (rank)",
    "p": "mean probability",
}
KINDS = {"missed": "Missed", "false alarm": "False alarms", "wrong place": "Right for the wrong place"}
METHOD_NAMES = li.CAMS | nam_lee.METHODS
READINGS = [("films of the class beyond all films", "contrast"), ("all films: principal, eq. 3", "all")]
TOP_FILMS = 5
NOT_FOR_DIAGNOSIS = "NOT FOR DIAGNOSIS: networks of a study of losses, tested on no patient"
_TICKED = ("cam", "gradpp", "lrp", "rap")
_GAP, _TITLE, _LINE, _RED = 8, 23, 19, "#c00000"
_HEAT, _RELEVANCE = (cmap(np.linspace(0, 1, 256)).astype(np.float32) for cmap in (HEAT, RELEVANCE))


# ---- drawing


class Panel(NamedTuple):
    """One film as it is drawn: under a map `cover`, float32 (S, S, 4) in [0, 1], the outline of `region`, bool (S, S),
    and `boxes`, see `_frames`; with a title above it, lines below, and what is said across it."""

    film: np.ndarray
    title: str
    lines: Sequence[str] = ()
    colour: str = INK
    cover: np.ndarray | None = None
    region: np.ndarray | None = None
    boxes: Sequence = ()
    said: str = ""


def picture(
    panels: Sequence[Panel | None],
    columns: int,
    heading: str,
    foot: str,
    *,
    opacity: float,
    side: int = SIDE,
    colour: str = INK,
) -> bytes:
    """Panels of `side` pixels in rows, None being an empty place, under a heading in `colour`: the bytes of a PNG."""
    height = _TITLE + side + max(len(panel.lines) for panel in panels if panel) * _LINE + _GAP
    width, rows = columns * (side + _GAP) + _GAP, -(-len(panels) // columns)
    width = max(width, int(max(_font(14, True).getlength(heading), _font(12).getlength(foot))) + 2 * _GAP)
    canvas = np.full((_TITLE + rows * height + _LINE, width, 3), 255, np.uint8)
    corners = [(_GAP + k % columns * (side + _GAP), _TITLE + k // columns * height) for k in range(len(panels))]
    placed = [(panel, x, y + _TITLE) for panel, (x, y) in zip(panels, corners) if panel]
    for panel, x, y in placed:
        canvas[y:, x:][:side, :side] = _film(panel, opacity, side)
    image = Image.fromarray(canvas)
    draw, rim = ImageDraw.Draw(image), {"stroke_width": 2, "stroke_fill": "black"}
    draw.text((_GAP, 4), heading, colour, _font(14, True))
    draw.text((_GAP, len(canvas) - _LINE), foot, GREY, _font(12))
    for panel, x, y in placed:
        draw.text((x, y - 18), _fitted(panel.title, _font(14, True), side), panel.colour, _font(14, True))
        draw.text((x + side / 2, y + side / 2), panel.said, "white", _font(14, True), anchor="mm", **rim)
        for k, line in enumerate(panel.lines):
            draw.text((x, y + side + 2 + k * _LINE), _fitted(line, _font(13), side), INK, _font(13))
        for asked, box, name in panel.boxes if panel.cover is None else ():  # over a map names would hide it
            x1, y1, _, y2 = np.multiply(box, side)
            # Those asked for above, the others below: boxes of one film often start at the same height.
            top = y1 - 18 if y1 > 18 and (asked or y2 > side - 18) else min(y2 + 1, side - 18)
            draw.text((x + np.clip(x1, 1, side - 8 * len(name)), y + top), class_name(name), BOX, _font(13), **rim)
    # Least compression: the picture goes no further than the browser, and to compress it takes longest of all.
    return cv2.imencode(".png", np.asarray(image)[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


@lru_cache(None)
def _font(size, bold=False):
    folder = f"{mpl.get_data_path()}/fonts/ttf"
    return ImageFont.truetype(f"{folder}/DejaVuSans{'-Bold' if bold else ''}.ttf", size)


def _fitted(text, font, width):
    """The text, or its beginning where it is too long."""
    while font.getlength(text) > width:
        text = text.removesuffix("…")[:-1] + "…"
    return text


def _film(panel, opacity, side):
    """The film in colour, uint8 (side, side, 3), under its map and boxes."""
    seen = cv2.cvtColor(cv2.resize(panel.film, (side, side), interpolation=cv2.INTER_AREA), cv2.COLOR_GRAY2RGB)
    if panel.cover is not None:
        cover = cv2.resize(panel.cover, (side, side))
        alpha = cover[..., 3:] * opacity
        seen = (seen * (1 - alpha) + 255 * cover[..., :3] * alpha).round().astype(np.uint8)
    if panel.region is not None:
        outlines, _ = cv2.findContours(panel.region.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        for colour, width in (((0, 0, 0), 3), ((255, 255, 255), 1)):
            cv2.drawContours(seen, outlines, -1, colour, width)
    for asked, box, _ in panel.boxes:
        x1, y1, x2, y2 = np.rint(np.multiply(box, side)).astype(int).tolist()
        for colour, width in (((0, 0, 0), 4), (ImageColor.getrgb(BOX), 2)) if asked else ((ImageColor.getrgb(BOX), 1),):
            cv2.rectangle(seen, (x1, y1), (x2 - 1, y2 - 1), colour, width)
    return seen


def _frames(film, name, size):
    """The boxes of a film, those of class `name` last, on top of the others: whether it is one of them, its corners as
    shares of the film's side, and its name."""
    corners = film.boxes[["x1", "y1", "x2", "y2"]].to_numpy(float) / size
    return sorted(zip(film.asked(name), corners.tolist(), film.boxes["class"]))


def _cover(values, colours):
    """Colours of a map (S, S) in [0, 1], the strongest opaque."""
    table = colours / np.float32([1, 1, 1, colours[:, 3].max()])
    return table[np.rint(255 * np.asarray(values)).astype(np.uint8)]


def _placed(scores):
    ior = MISSING if np.isnan(scores["ior"]) else f"{scores['ior']:.3f}"
    return f"IoBB {scores['iobb']:.3f}   IoR {ior}"


def _empty(unit):
    return "" if unit.any() else "empty map"


def _heading(lightbox, name):
    run = lightbox.subject.run
    return f"{class_name(name)} · {display(run.task)}, {display(run.backbone)}, seed {run.seed} · study {run.study}"


def _film_by_losses(lightbox, film, name, sliders, first, **options):
    """The picture of one film by all losses, `first` below the film itself; in words what differs from the usual, one
    scale, or tables of other weights than the maps are of; and the numbers below the maps, by loss."""
    run, styles = lightbox.subject.run, loss_styles(list(lightbox.subjects))
    output = lightbox.subject.classes.index(name)
    threshold, common, opacity = (sliders[key].value for key in ("threshold", "scale", "opacity"))
    signed = torch.stack([film.signed(loss, output, run.cam_method) for loss in styles])
    own, units = (films.unit_maps(signed, run.cam_method, one_scale) for one_scale in (False, common))
    boxes, drawn = film.corners(name), _frames(film, name, run.image_size)
    table = films.overlap(own, boxes, run)[["iobb", "ior"]].assign(p=[film.p(loss, output) for loss in styles])
    table = table.assign(iou=films.overlap(units, boxes, run, threshold)["iou"], loss=list(styles)).set_index("loss")
    panels, stale = [Panel(film.picture, film.name, first, boxes=drawn)], []
    for (loss, row), unit, heat in zip(table.iterrows(), own, cam.resize(units, SIDE).numpy()):
        iou = f"IoU {row['iou']:.3f} at threshold {threshold:.2f}"
        lines = [f"p {row['p']:.3f}", *([_placed(row), iou] if len(boxes) else [])]
        over = {"cover": _cover(heat, _HEAT), "region": heat >= threshold, "boxes": drawn, "said": _empty(unit)}
        panels.append(Panel(film.picture, display(loss), lines, styles[loss]["color"], **over))
        known = lightbox.scores.p[loss].get((film.name, name), row["p"])
        stale += [display(loss)] if abs(known - row["p"]) > 1e-3 else []
    made = picture(panels, min(len(panels), 5), foot=lightbox.subject.label, opacity=opacity, **options)
    note = f"<br>The tables of {', '.join(stale)} are of other weights: run 02 and 03 again." if stale else ""
    largest = f"<br>One scale: 1 is {signed.max().item():.3g}, the largest value of any loss's map."
    return made, note + largest * common, table


# ---- a widget


class Hand(widgets.VBox):
    """Controls, a picture below them and a few words below that; whatever control is moved, all is made again.

    Parameters
    ----------
    controls : mapping of str to widget
        Their `value` is what is watched.
    rows : sequence of widgets
        How they are laid out.
    draw : function of the control that was moved, or None
        Gives the bytes of a PNG file, HTML, and a DataFrame. It may set other controls, which does not call it again.
        A `LensError` of its takes the place of the words.

    Attributes
    ----------
    controls, picture (Image), words (HTML)
    still : bytes
        What the picture shows, a PNG file; where nobody looks the picture is empty, and a notebook holds it once.
    table : DataFrame
        The numbers that are shown.
    """

    def __init__(self, controls: Mapping[str, widgets.Widget], rows: Sequence[widgets.Widget], draw: Callable):
        self.controls, self._draw, self._busy, self.still = controls, draw, False, b""
        self.picture = widgets.Image(format="png", layout={"max_width": "100%", "object_fit": "contain"})
        self.words = widgets.HTML()
        super().__init__([*rows, self.picture, self.words])
        for control in controls.values():
            control.observe(self._moved, "value")
        self._moved({"owner": None})

    def _moved(self, change):
        if not self._busy:
            self._busy = True
            try:
                self.still, self.words.value, self.table = self._draw(change["owner"])
                self.picture.value = self.still if _attended() else b""
            except LensError as error:
                self.words.value = warning(str(error))
            finally:
                self._busy = False

    def _repr_mimebundle_(self, **kwargs):
        still = {"image/png": base64.b64encode(self.still).decode()} if self.still else {}
        plain = {"text/plain": " ".join(html.unescape(re.sub("<[^>]*>", " ", self.words.value)).split())}
        return (super()._repr_mimebundle_(**kwargs) if _attended() else plain) | still


def _attended():
    """Whether a person runs the cell: papermill and nbconvert say that nobody would answer what it asks. What they make
    is looked at without a kernel, where a widget, in the picture's place, would be empty."""
    kernel = getattr(get_ipython(), "kernel", None)
    return kernel is None or kernel.get_parent().get("content", {}).get("allow_stdin", True)


def warning(text: str) -> str:
    """A sentence in red, as HTML."""
    return f'<b role="alert" style="color:{_RED}">{html.escape(text)}</b>'


def _slider(text, value, low=0.0):
    return widgets.FloatSlider(value, min=low, max=1, step=0.01, description=text)


def _sliders():
    scales = [("each map its own scale", False), ("one scale for all losses", True)]
    controls = {"threshold": _slider("Threshold", 0.5, 0.01), "opacity": _slider("Opacity", 0.8)}
    controls["scale"] = widgets.Dropdown(options=scales, description="Scale")
    return controls, _wrapped(controls.values())


def _wrapped(row):
    return widgets.HBox(list(row), layout={"flex_flow": "row wrap"})


def _class_and_loss(lightbox):
    """Controls that choose among the classes that some film has, the one with most boxes or films first; and a loss."""
    boxed = lightbox.pairs["class"].value_counts()
    counts = pd.Series({name: lightbox.has(name).sum() for name in lightbox.subject.classes})
    options = [(f"{class_name(name)} ({count} films)", name) for name, count in counts.items() if count]
    most = boxed.idxmax() if len(boxed) else counts.idxmax()
    losses = [(display(loss), loss) for loss in lightbox.subjects]
    own = lightbox.subject.run.loss
    return (
        widgets.Dropdown(options=options, value=most, description="Class"),
        widgets.Dropdown(options=losses, value=own, description="Loss"),
    )


def _chooser(lightbox):
    """Controls that choose a class and a film of it, their rows, and what follows from one that was moved: the film,
    and in words which it is."""
    classes, _ = _class_and_loss(lightbox)
    by = widgets.Dropdown(description="Order by", layout={"width": "440px"})
    slider = widgets.IntSlider(1, 1, 1, description="Film", layout={"width": "380px"})
    back, on = widgets.Button(description="◀ previous"), widgets.Button(description="next ▶")

    def step(button):
        slider.value = np.clip(slider.value + (1 if button is on else -1), 1, slider.max)

    def film(moved):
        if moved in (None, classes):
            known, before = films.orders(lightbox.scores, classes.value), by.value
            by.options = [(f"{ORDERS[one]}, highest first", one) for one in known]
            by.value = before if before in known else known[0]
        listed = films.order(lightbox.scores, classes.value, by.value)
        slider.max = len(listed)
        slider.value = 1 if moved in (None, classes, by) else slider.value
        image, value = listed.index[slider.value - 1], listed.iloc[slider.value - 1]
        return lightbox.film(image), f"{image}, film {slider.value} of {len(listed)}, {ORDERS[by.value]} {value:.3f}."

    for button in (back, on):
        button.on_click(step)
    return {"class": classes, "by": by, "film": slider}, [_wrapped([classes, by]), _wrapped([back, slider, on])], film


# ---- the hands


def by_losses(lightbox: Lightbox) -> Hand:
    """One film by all losses: their maps side by side, p, IoBB and IoR as in the tables, and the IoU of what reaches
    the threshold. The slider of films moves by the arrow keys, too."""
    controls, rows, chosen = _chooser(lightbox)
    sliders, row = _sliders()

    def draw(moved):
        (film, which), name = chosen(moved), controls["class"].value
        first = [f"labels: {class_name(film.labels.replace('|', ', ')) or 'none'}"]
        if len(lightbox.pairs) and not len(film.corners(name)):
            first.append(f"no box of {class_name(name)}")
        made, note, table = _film_by_losses(lightbox, film, name, sliders, first, heading=_heading(lightbox, name))
        return made, html.escape(which) + note, table

    return Hand(controls | sliders, [*rows, row], draw)


def by_methods(lightbox: Lightbox) -> Hand:
    """One film by several methods, a row each, and all losses, a column each: each map on a scale of its own,
    relevance in red where it speaks for the class and in blue where against it."""
    run, styles = lightbox.subject.run, loss_styles(list(lightbox.subjects))
    (controls, rows, chosen), opacity, ticks = _chooser(lightbox), _slider("Opacity", 0.8), {}
    for method in films.METHODS:
        features = lightbox.subject.model.head.in_features
        passes = 1 if method in RELEVANCE_METHODS else passes_per_film(method, features, 1)[0]
        text = METHOD_NAMES[method] + (f" ({passes:,} passes)" if passes > 1 else "")
        options = {"description": text, "indent": False, "layout": {"width": "auto"}}
        ticks[method] = widgets.Checkbox(method in _TICKED, **options)

    def panel(film, name, method, loss):
        output, boxes = lightbox.subject.classes.index(name), film.corners(name)
        signed = film.signed(loss, output, method)
        unit = films.unit_maps(signed[None], method)
        row = films.overlap(unit, boxes, run).iloc[0][["iobb", "ior"]].to_dict() | {"p": film.p(loss, output)}
        lines = [f"p {row['p']:.3f}", *([_placed(row)] if len(boxes) else [])]
        said = "no stable map" if signed.isnan().any() else _empty(unit)
        shares = signed.nan_to_num(0) / signed.nan_to_num(0).abs().max().clamp(min=1e-30)
        values, colours = ((1 + shares[None]) / 2, _RELEVANCE) if method in RELEVANCE_METHODS else (unit, _HEAT)
        over = {"cover": _cover(cam.resize(values, SIDE)[0], colours), "said": said}
        title, drawn = f"{METHOD_NAMES[method]}, {display(loss)}", _frames(film, name, run.image_size)
        row = {"method": method, "loss": loss} | row
        return Panel(film.picture, title, lines, styles[loss]["color"], boxes=drawn, **over), row

    def draw(moved):
        (film, which), name, refused = chosen(moved), controls["class"].value, []
        alone = Panel(film.picture, film.name, boxes=_frames(film, name, run.image_size))
        found, numbers = [], []
        for method in (method for method, tick in ticks.items() if tick.value):
            try:
                drawn, row = zip(*(panel(film, name, method, loss) for loss in styles))
                found.append(list(drawn))
                numbers.extend(row)
            except RelevanceError as error:
                refused.append(f"<br>{METHOD_NAMES[method]}: {html.escape(str(error))}")
        rows = found if len(styles) > 1 else [[one for row in found for one in row]]
        panels = [one for k, row in enumerate(rows) for one in ([None] if k else [alone]) + row] or [alone]
        options = {"heading": _heading(lightbox, name), "foot": lightbox.subject.label, "opacity": opacity.value}
        made = picture(panels, max(1 + len(row) for row in rows or [[]]), side=200, **options)
        table = pd.DataFrame(numbers, columns=["method", "loss", "p", "iobb", "ior"]).set_index(["method", "loss"])
        return made, html.escape(which) + "".join(refused), table

    return Hand(controls | ticks | {"opacity": opacity}, [*rows, _wrapped(ticks.values()), opacity], draw)


def failures(lightbox: Lightbox) -> Hand:
    """Lists of where one loss is wrong, or right for the wrong place, see `films.failures`; the film that is chosen
    there is shown by all losses."""
    classes, losses = _class_and_loss(lightbox)
    lists = {kind: widgets.Select(rows=7, layout={"width": "360px"}) for kind in KINDS}
    titles = {kind: widgets.HTML() for kind in KINDS}
    sliders, row = _sliders()

    def fill(name, loss):
        p, iobb, _ = (part[loss].xs(name, level="class") for part in lightbox.scores)
        for kind, images in films.failures(lightbox.scores, lightbox.has(name), name, loss).items():
            boxed = [f", IoBB {iobb[image]:.2f}" if np.isfinite(iobb[image]) else "" for image in images]
            lists[kind].options = [(f"{image}  p {p[image]:.2f}{said}", image) for image, said in zip(images, boxed)]
            lists[kind].value, titles[kind].value = None, f"<b>{KINDS[kind]}</b>: {len(images)}"
        for listed in [listed for listed in lists.values() if listed.options][-1:]:
            listed.value = listed.options[0][1]

    def draw(moved):
        name, loss = classes.value, losses.value
        if moved in (None, classes, losses):
            fill(name, loss)
        for listed in lists.values():
            listed.value = None if moved in lists.values() and listed is not moved else listed.value
        chosen = [(kind, listed.value) for kind, listed in lists.items() if listed.value]
        if not chosen:
            raise LensError(f"{display(loss)} fails on no film of {class_name(name)}: choose another class or loss")
        [(kind, image)] = chosen
        first, has = [f"{KINDS[kind]}, by {display(loss)}"], "has" if lightbox.has(name)[image] else "does not have"
        options = {"heading": _heading(lightbox, name)}
        made, note, table = _film_by_losses(lightbox, lightbox.film(image), name, sliders, first, **options)
        return made, f"{html.escape(image)} {has} {class_name(name)} by the release's labels.{note}", table

    columns = [widgets.VBox([titles[kind], lists[kind]]) for kind in KINDS]
    rows = [_wrapped([classes, losses]), _wrapped(columns), row]
    return Hand({"class": classes, "loss": losses} | lists | sliders, rows, draw)


def channels(lightbox: Lightbox) -> Hand:
    """A class's principal channels: the films on which one is strongest, with the outline of what reaches its
    threshold, and what the probability is without it."""
    classes, losses = _class_and_loss(lightbox)
    readings = widgets.Dropdown(options=READINGS, description="Adds on", layout={"width": "380px"})
    channel = widgets.Dropdown(description="Channel", layout={"width": "260px"})
    opacity = _slider("Opacity", 0.6)

    def panel(film, values, removed, tau, name, run):
        lines = [f"p {removed['before']:.3f} → {removed['after']:.3f} without it"]
        lines.append(f"{'has' if removed['has'] else 'no'} {class_name(name)}")
        over = {"cover": _cover(values.clip(0, 1), _HEAT), "region": values >= tau}
        return Panel(film.picture, film.name, lines, boxes=_frames(film, name, run.image_size), **over)

    def draw(moved):
        name, loss = classes.value, losses.value
        one, seen, (_, source) = lightbox.subjects[loss], lightbox.survey(loss), lightbox.importance(loss, name)
        added = lightbox.principal(loss, name, readings.value)
        if moved in (None, classes, losses, readings):
            channel.options = [(f"{k} (adds {value:+.3f})", k) for k, value in added.items()]
            channel.value = added.index[0]
        k = channel.value
        removed, listed = (lightbox.without(loss, name, those) for those in ([k], added.index))
        top = [lightbox.film(image) for image in removed.index[np.argsort(-seen.pooled[:, k].numpy())[:TOP_FILMS]]]
        maps = torch.stack([film.outputs[loss].maps[one.layer][0, k].cpu() for film in top])
        largest = maps.max().clamp(min=1e-30).item()
        shown = zip(top, cam.resize(maps, SIDE).numpy() / largest)
        panels = [
            panel(film, values, removed.loc[film.name], seen.tau[k] / largest, name, one.run) for film, values in shown
        ]
        heading = f"{display(loss)}, channel {k} · {_heading(lightbox, name)}"
        words = [removal_words(removed, name, f"channel {k}")]
        words.append(removal_words(listed, name, f"all {len(added)} that are listed"))
        words.append(f"What they add: {source}. The outline holds the largest {one.dissection[1]:.0%} of the values.")
        made = picture(panels, TOP_FILMS, heading, one.label, opacity=opacity.value)
        return made, "<br>".join(words), removed.loc[[film.name for film in top]]

    controls = {"class": classes, "loss": losses, "reading": readings, "channel": channel, "opacity": opacity}
    return Hand(controls, [_wrapped([classes, losses, readings]), _wrapped([channel, opacity])], draw)


def removal_words(removed: pd.DataFrame, name: str, what: str) -> str:
    """What `Lightbox.without` says on average, in a sentence; `what` was removed."""
    parts = []
    for has, rows in removed.groupby("has"):
        before, after = rows["before"].mean(), rows["after"].mean()
        parts.append(f"from {before:.3f} to {after:.3f} on the {len(rows)} films with{'' if has else 'out'} it")
    return f"Without {what} the mean p of {class_name(name)} goes {' and '.join(parts[::-1])}."


def own_film(lightbox: Lightbox) -> Hand:
    """A film of one's own, by upload or by its path, by all losses: not for diagnosis. Until there is one, a film of
    the study, read in the same way."""
    one = lightbox.subject
    state = {"film": lightbox.own_film(one.films.loc[one.rows("test")[0], "path"]), "fault": ""}
    upload = widgets.FileUpload(accept=".png,.jpg,.jpeg,.dcm", description="Your film", layout={"width": "140px"})
    path = widgets.Text(description="or its path", continuous_update=False, placeholder="on the kernel's machine")
    options = [(class_name(name), name) for name in one.classes]
    classes = widgets.Dropdown(options=options, description="Class", value=_likeliest(state["film"], one.classes))
    sliders, row = _sliders()

    def draw(moved):
        try:
            if moved is upload and upload.value:
                given = upload.value[-1]
                state["film"], state["fault"] = lightbox.own_film(given["name"], bytes(given["content"])), ""
            elif moved is path and path.value:
                state["film"], state["fault"] = lightbox.own_film(path.value), ""
            if moved in (upload, path):
                classes.value = _likeliest(state["film"], one.classes)
        except LensError as error:
            state["fault"] = warning(f"{error}. The picture is still that of {state['film'].name}.") + "<br>"
        film, heading = state["film"], f"{NOT_FOR_DIAGNOSIS} · {_heading(lightbox, classes.value)}"
        loud = {"heading": heading, "colour": _RED}
        made, note, _ = _film_by_losses(lightbox, film, classes.value, sliders, [], **loud)
        values = {loss: [film.p(loss, k) for k in range(len(one.classes))] for loss in lightbox.subjects}
        p = pd.DataFrame(values, index=one.classes)
        p = p.loc[p.mean(axis=1).sort_values(ascending=False).index]
        said = p.rename(index=class_name, columns=display).to_html(float_format="{:.3f}".format, border=0)
        return made, f"{state['fault']}{html.escape(film.name)}, probabilities:{note}{said}", p

    rows = [widgets.HTML(warning(NOT_FOR_DIAGNOSIS)), _wrapped([upload, path, classes]), row]
    return Hand({"file": upload, "path": path, "class": classes} | sliders, rows, draw)


def _likeliest(film: Film, classes: Sequence[str]) -> str:
    return max(classes, key=lambda name: sum(film.p(loss, classes.index(name)) for loss in film.subjects))
