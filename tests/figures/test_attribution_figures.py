import io

import numpy as np
import pandas as pd
import pytest
from matplotlib import image as plt_image
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from lib import figures
from lib.figures import style
from lib.tables import nam_lee
from tests.figures.test_figures import LABEL, drawn
from tests.tables.test_nam_lee_tables import paper_as_means

RNG = np.random.default_rng(0)
FILMS = RNG.integers(0, 256, (3, 32, 32), dtype=np.uint8)
BOXES = [[(2, 3, 10, 12)], [], [(0, 0, 32, 32), (5, 20, 30, 31)]]
TITLES = ["Cardiomegaly", "normal film", "Pleural_Thickening"]


def maps(rows=3, columns=3):
    found = RNG.normal(size=(rows, columns, 32, 32)) * 10.0 ** RNG.integers(-6, 6, (rows, columns, 1, 1))
    found[:, 0] = np.abs(found[:, 0])
    return found


def relevance_images(figure):
    return [image for ax in figure.axes for image in ax.images if image.get_cmap().name == "relevance"]


def test_grid_shows_every_map_on_one_symmetric_scale():
    given = maps()
    given[1, 1], given[2, 2] = 0, np.nan
    figure = figures.attribution_grid(
        FILMS, BOXES, TITLES, given, ["cam", "lrp", "rap"], np.array([0.875, np.nan, 0.25]), data_label=LABEL
    )
    found = drawn(figure)
    assert {
        "P(Cardiomegaly) =\u00a00.88".replace(" ", "\n"),
        "normal film",
        "Film and boxes",
        "CAM",
        "LRP",
        "RAP",
        "empty",
        "no stable map",
    } <= found
    assert any(text.split() == ["P(Pleural", "Thickening)", "=", "0.25"] for text in found)
    assert len(figure.axes) == 13  # 3 x 4 panels and one colour bar
    assert [ax.texts[-1].get_text() for ax in (figure.axes[6], figure.axes[11])] == ["empty", "no stable map"]
    images = relevance_images(figure)
    assert len(images) == 8 and {image.get_clim() for image in images} == {(-1, 1)}
    shown = [np.asarray(image.get_array()) for image in images]
    np.testing.assert_allclose(shown[0], given[0, 0] / np.abs(given[0, 0]).max())
    assert (
        all(np.abs(array).max() == pytest.approx(1) for k, array in enumerate(shown) if k != 4) and not shown[4].any()
    )
    boxes = [len(ax.patches) for ax in figure.axes[:12]]
    assert boxes == [1] * 4 + [0] * 4 + [2] * 4  # on the film and on every map
    box = figure.axes[2].patches[0]
    assert (*box.get_xy(), box.get_width(), box.get_height()) == (2, 3, 8, 9)
    pale = np.asarray(figure.axes[1].images[0].get_array())
    assert pale.min() > 120 and np.ptp(pale) > 50 and np.asarray(figure.axes[0].images[0].get_array()).min() < 20


def test_red_is_relevant_blue_is_not_and_zero_is_clear():
    figure = figures.attribution_grid(FILMS, BOXES, TITLES, maps(), ["cam", "lrp", "rap"], [0.5] * 3, data_label=LABEL)
    colours = relevance_images(figure)[0].get_cmap()
    red, blue, zero = colours(1.0), colours(0.0), colours(0.5)
    assert red[0] > 2 * red[2] and blue[2] > 2 * blue[0] and red[3] > 0.9 and blue[3] > 0.9 and zero[3] < 0.01
    opacity = colours(np.linspace(0, 1, 101))[:, 3]
    assert (np.diff(opacity[:51]) <= 0).all() and (np.diff(opacity[50:]) >= 0).all()
    np.testing.assert_allclose(opacity, opacity[::-1], atol=0.03)


@pytest.mark.parametrize("count", [1, 3, 6, 8])
def test_grid_of_several_models_stays_within_the_page(count):
    columns = [
        f"{model}, {method}"
        for model in ("VGG-16", "ResNet-50", "DenseNet-121", "CheXNet")
        for method in ("LRP", "RAP")
    ][:count]
    figure = figures.attribution_grid(
        FILMS[:2],
        BOXES[:2],
        ["Pneumonia", "Pneumonia"],
        maps(2, count),
        columns,
        RNG.random((2, count)),
        data_label=LABEL,
    )
    found = {text.replace("-\n", "-").replace("\n", " ") for text in drawn(figure)}
    assert (
        set(columns) <= found
        and sum(ax.get_title().startswith("P(Pneumonia)" if count < 6 else "P =") for ax in figure.axes) == 2 * count
    )
    assert ("P: Pneumonia" in found) == (count >= 6)
    headings = sorted(
        (text.get_window_extent() for ax in figure.axes for text in ax.texts if text.get_weight() == "bold"),
        key=lambda box: box.x0,
    )
    assert all(left.x1 <= right.x0 + 1 for left, right in zip(headings, headings[1:]))  # none over its neighbour
    file = io.BytesIO()
    figure.savefig(file, format="pdf")
    assert file.tell() > 1000


@pytest.mark.parametrize("rows, columns", [(1, 1), (8, 3), (15, 3), (8, 8)])
def test_grid_with_its_heading_fits_a_page_and_its_panels_stay_apart(rows, columns):
    films = np.repeat(FILMS[:1], rows, axis=0)
    given = [films, [()] * rows, ["Pleural_Thickening"] * rows, maps(rows, columns), ["lrp"] * columns]
    names = ["0004cfab-14fd-4e49-80ba-63a80b6bddd6\n3 of 3 are right" if rows < 15 else "00000001_000.png"] * rows
    for probabilities in (RNG.random(rows), RNG.random((rows, columns))):
        figure = figures.attribution_grid(*given, probabilities, names=names, data_label=LABEL)
        figure = figures.headed(figure, "Multi-label, T-DenseNet, Focal, seed 0")
        figure.draw_without_rendering()
        assert min(text.get_window_extent().x0 for text in figure.findobj(Text)) > -1  # none is cut at the left
        panels = [ax.get_tightbbox() for ax in figure.axes[: rows * (columns + 1)]]
        shared = [Bbox.intersection(a, b) for i, a in enumerate(panels) for b in panels[:i]]
        assert all(box is None or min(box.size) < 1 for box in shared)
        file = io.BytesIO()
        figure.savefig(file, dpi=50, bbox_inches="tight")
        height, width = plt_image.imread(io.BytesIO(file.getvalue())).shape[:2]
        assert height / 50 <= 9 and width / 50 <= style.WIDTH + 0.25


def test_grid_names_the_film_and_what_else_is_marked_in_it():
    others = [[("Hernia", (1, 1, 5, 6)), ("Mass", (20, 2, 30, 9))], [], []]
    names = ["a.png\n1 of 3 are right", "b.png", "c.png"]
    figure = figures.attribution_grid(
        FILMS, BOXES, TITLES, maps(), ["cam", "lrp", "rap"], [0.5] * 3, names=names, others=others, data_label=LABEL
    )
    found = drawn(figure)
    assert {"P(Cardiomegaly)\n=\u00a00.50\na.png\n1 of 3 are right", "P(normal film)\n=\u00a00.50\nb.png"} <= found
    film, *others = figure.axes[:4]
    assert {"Hernia", "Mass"} <= {text.get_text() for text in film.texts}
    assert not {"Hernia", "Mass"} & {text.get_text() for ax in others for text in ax.texts}  # they would hide the map
    for ax in (film, *others):
        widths = {patch.get_xy(): patch.get_linewidth() for patch in ax.patches}
        assert widths.keys() == {(1, 1), (20, 2), (2, 3)} and max(widths[1, 1], widths[20, 2]) < widths[2, 3]


def test_grid_says_at_each_map_what_its_probability_is_of():
    titles, given = ["pneumonia", "no pneumonia", "no_finding"], RNG.random((3, 3))
    given[2] = np.nan
    figure = figures.attribution_grid(
        FILMS, BOXES, titles, maps(), ["cam", "lrp", "rap"], given, names=["a", "b", "c"], data_label=LABEL
    )
    said = [ax.get_title().replace("\n", " ").replace("\u00a0", " ") for ax in figure.axes[:12]]
    assert said[1:4] == [f"P(pneumonia) = {p:.2f}" for p in given[0]] and said[0] == ""
    assert said[5:8] == [f"P(no pneumonia) = {p:.2f}" for p in given[1]] and said[9:] == ["no finding"] * 3


def test_grid_refuses_what_does_not_match():
    good = {
        "films": FILMS,
        "boxes": BOXES,
        "titles": TITLES,
        "maps": maps(),
        "columns": ["cam", "lrp", "rap"],
        "probabilities": [0.5] * 3,
    }
    for name, wrong in (
        ("films", FILMS[:2]),
        ("boxes", BOXES[:1]),
        ("titles", ["a"]),
        ("columns", ["cam"]),
        ("probabilities", [0.5] * 4),
        ("names", ["a"]),
        ("others", [()]),
    ):
        with pytest.raises(ValueError, match="maps are 3 films x 3 columns"):
            figures.attribution_grid(**{**good, name: wrong}, data_label=LABEL)
    with pytest.raises(ValueError, match="data_label"):
        figures.attribution_grid(**good, data_label=" ")


@pytest.mark.parametrize("reading", list(nam_lee.READINGS))
def test_iou_by_threshold(reading):
    means = paper_as_means()
    means.loc[(means["class"] == "Mass"), ["value", "ci_low", "ci_high"]] = np.nan
    one = (means["class"] == "Nodule") & (means["method"] == "lrp") & (means["threshold"] == 0.3)
    means.loc[one, ["value", "ci_low", "ci_high"]] = 0.9, 0.8, 0.95
    figure = figures.iou_by_threshold(nam_lee.table2(means, data_label=LABEL), reading=reading, data_label=LABEL)
    found = drawn(figure)
    assert {"CAM", "LRP", "RAP", "empty mask", "95 % interval", "Nodule (130)"} <= found
    assert "Threshold, as a share of the map's maximum (in brackets: pairs of film and class)" in found
    assert not any("Mass" in text for text in found)  # not measured
    assert ("hollow: the paper's (CheXNet)" in found) == (reading == "mean_iou")
    panels = [ax for ax in figure.axes if ax.get_visible()]
    assert len(panels) == 7 and len({ax.get_ylim() for ax in panels}) == 1
    ax = next(ax for ax in panels if ax.get_title() == "Nodule (130)")
    line = next(line for line in ax.lines if line.get_label() == "LRP")
    assert (
        line.get_ydata()[2] == 0.9
        and line.get_xdata() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5], abs=0.01)
        and ax.get_ylim()[1] > 0.95
    )
    assert len(ax.lines) == (7 if reading == "mean_iou" else 4)
    floor = next(line for line in ax.lines if len(line.get_xdata()) == 2)
    assert floor.get_ydata()[0] == pytest.approx(0.45 if reading == "mean_iou" else 0)
    with pytest.raises(ValueError, match="reading = 'iou'"):
        figures.iou_by_threshold(nam_lee.table2(means, data_label=LABEL), reading="iou", data_label=LABEL)


def test_iou_of_one_class_and_of_classes_and_methods_the_paper_has_not():
    means = paper_as_means().query("`class` == 'Mass'")
    figure = figures.iou_by_threshold(nam_lee.table2(means, data_label=LABEL), data_label=LABEL)
    drawn(figure)
    assert len(figure.axes) == 1 and figure.axes[0].get_position().width > 0.8  # no half of the page is blank
    other = means.assign(
        **{"class": "Pleural_Thickening"},
        method=means["method"].replace("rap", "gradient"),
        ci_low=np.nan,
        ci_high=np.nan,
    )
    found = drawn(figures.iou_by_threshold(nam_lee.table2(other, data_label=LABEL), data_label=LABEL))
    assert {"Pleural Thickening (120)", "gradient"} <= found and not any("CheXNet" in text for text in found)
    with pytest.raises(ValueError, match="no number of ours"):
        figures.iou_by_threshold(nam_lee.table2(means.head(0), data_label=LABEL), data_label=LABEL)


def share_frame():
    rows = []
    for model in ("resnet50", "vgg16", "densenet121"):
        for kind, method, (region, area) in (
            (k, m, r)
            for k in ("pneumonia", "normal")
            for m in ("rap", "lrp")
            for r in (("boxes", 0.1), ("lungs", 0.4), ("outside", 0.5))
        ):
            known = (kind, region) != ("normal", "boxes")
            rows.append(
                (model, kind, method, region, *((0.3, 0.25, 0.4, area, 50, 0) if known else (np.nan,) * 4 + (0, 50)))
            )
    columns = "model kind method region value ci_low ci_high area n n_skipped".split()
    return pd.DataFrame(rows, columns=columns)


def test_share_dots():
    figure = figures.share_dots(share_frame(), data_label=LABEL)
    found = drawn(figure)
    assert {
        "LRP",
        "RAP",
        "share by area",
        "In the boxes",
        "In the lungs",
        "Outside",
        "pneumonia, DenseNet-121",
        "normal, VGG-16",
    } <= found
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    models = ("DenseNet-121", "ResNet-50", "VGG-16")  # the paper's order
    assert labels == [f"{kind}, {model}" for kind in ("pneumonia", "normal") for model in models]
    counts = [sum(line.get_label() in ("LRP", "RAP") for line in ax.lines) for ax in figure.axes]
    assert counts == [6, 12, 12]  # normal films have no boxes
    ticks = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_label() == "share by area"]
    assert ticks == [pytest.approx(0.1)] * 3


def test_share_dots_say_what_is_missing_and_why():
    frame = share_frame()
    empty = (frame["model"] == "vgg16") & (frame["kind"] == "pneumonia") & (frame["method"] == "lrp")
    frame.loc[empty, ["value", "ci_low", "ci_high", "area", "n", "n_skipped"]] = [*[np.nan] * 4, 0, 50]
    few = (frame["model"] == "resnet50") & (frame["method"] == "rap") & (frame["n"] > 0)
    frame.loc[few, ["n", "n_skipped"]] = 20, 30
    figure = figures.share_dots(frame.astype({"n": int, "n_skipped": int}), data_label=LABEL)
    drawn(figure)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [
        "pneumonia, DenseNet-121",
        "pneumonia, ResNet-50\nRAP: none on 30 of 50",
        "pneumonia, VGG-16\nLRP: none on 50 of 50",
        "normal, DenseNet-121",
        "normal, ResNet-50\nRAP: none on 30 of 50",
        "normal, VGG-16",
    ]
    absent = [[(text.get_text(), text.get_position()[1]) for text in ax.texts] for ax in figure.axes]
    ticks = figure.axes[0].get_yticks()
    assert absent == [[("no boxes", y) for y in ticks[3:]], [], []]


def test_labels_of_neighbouring_share_panels_stay_apart():
    figure = figures.share_dots(share_frame(), data_label=LABEL)
    figure.canvas.draw()
    shown = [[text.get_window_extent() for text in ax.get_xticklabels() if text.get_text()] for ax in figure.axes]
    gaps = [right[0].x0 - left[-1].x1 for left, right in zip(shown, shown[1:])]
    assert all(len(labels) == 3 for labels in shown) and min(gaps) > 3


def test_share_dots_of_parts():
    frame = share_frame()
    drawn(figures.share_dots(frame.query("model == 'vgg16' and method == 'rap'"), data_label=LABEL))
    drawn(figures.share_dots(frame.assign(model="mine", region="heart").head(1), data_label=LABEL))
    assert "In heart" in drawn(figures.share_dots(frame.assign(region="heart").head(1), data_label=LABEL))
    drawn(figures.share_dots(frame.assign(ci_low=np.nan, ci_high=np.nan), data_label=LABEL))
    assert figures.share_dots(frame, data_label=LABEL).get_figwidth() == style.WIDTH


def test_maps_of_a_network_that_is_made_random():
    stages, methods = ["none", "head", "trunk.layer4", "trunk.0", "another film"], ["lrp", "cam"]
    frame = pd.DataFrame([(stage, method) for stage in stages for method in methods], columns=["against", "method"])
    rank = np.array([1, 1, 0.9, 0.2, 0.8, np.nan, 0.7, -0.3, 0.1, -0.1])
    for name, value in (("ssim", rank**2), ("rank", rank), ("abs_rank", np.abs(rank))):
        frame = frame.assign(**{name: value, f"{name}_low": value - 0.05, f"{name}_high": value + 0.05})
    figure = figures.randomisation(frame, data_label=LABEL)
    found = drawn(figure)
    assert {"CAM", "LRP", "95 % interval", "trained", "head", "layer4", "trunk.0"} <= found
    assert "random network's map of another film" in found
    ssim, ranks, sizes = figure.axes
    assert "SSIM" in ssim.get_title() and "Rank correlation" in ranks.get_title()
    assert "Made random from the head down to here" in found and len({ax.get_ylim() for ax in figure.axes}) == 1
    lines = {line.get_label(): line for line in ranks.lines}
    np.testing.assert_array_equal(lines["CAM"].get_ydata(), rank[1:8:2])
    np.testing.assert_array_equal(lines["LRP"].get_ydata(), rank[0:8:2])
    hollow = [line for line in ranks.lines if line.get_markerfacecolor() == "white"]
    assert [(line.get_ydata()[0], round(line.get_xdata()[0])) for line in hollow] == [(-0.1, 4), (0.1, 4)]
    sizes_of = {line.get_label(): line for line in sizes.lines}
    np.testing.assert_array_equal(sizes_of["CAM"].get_ydata(), np.abs(rank[1:8:2]))
    assert lines["CAM"].get_color() == "#4d4d4d" and ranks.get_ylim()[0] < -0.3 <= 1 < ranks.get_ylim()[1]
    assert np.abs(lines["LRP"].get_xdata() - np.arange(4)).max() < 0.3
