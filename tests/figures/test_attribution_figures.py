import io

import numpy as np
import pandas as pd
import pytest

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
        "Cardiomegaly p=0.88",
        "normal film",
        "Film and boxes",
        "CAM",
        "LRP",
        "RAP",
        "no relevance",
        "no stable map",
    } <= found
    assert any(text.replace("\n", " ") == "Pleural Thickening p=0.25" for text in found)
    assert len(figure.axes) == 13  # 3 x 4 panels and one colour bar
    assert [ax.texts[-1].get_text() for ax in (figure.axes[6], figure.axes[11])] == ["no relevance", "no stable map"]
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
    found = {text.replace("\n", " ") for text in drawn(figure)}
    assert set(columns) <= found and sum(text.startswith("p=") for text in found) >= 1
    headings = sorted(
        (text.get_window_extent() for ax in figure.axes for text in ax.texts if text.get_weight() == "bold"),
        key=lambda box: box.x0,
    )
    assert all(left.x1 <= right.x0 + 1 for left, right in zip(headings, headings[1:]))  # none over its neighbour
    file = io.BytesIO()
    figure.savefig(file, format="pdf")
    assert file.tell() > 1000


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
    assert {"CAM", "LRP", "RAP", "empty mask", "95 % interval", "Threshold", "Nodule (130)"} <= found
    assert not any("Mass" in text for text in found)  # not measured
    assert ("paper (CheXNet)" in found) == (reading == "mean_iou")
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
    drawn(figures.iou_by_threshold(nam_lee.table2(means, data_label=LABEL), data_label=LABEL))
    other = means.assign(
        **{"class": "Pleural_Thickening"},
        method=means["method"].replace("rap", "gradient"),
        ci_low=np.nan,
        ci_high=np.nan,
    )
    found = drawn(figures.iou_by_threshold(nam_lee.table2(other, data_label=LABEL), data_label=LABEL))
    assert {"Pleural Thickening (120)", "gradient"} <= found and "paper (CheXNet)" not in found
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
            rows.append((model, kind, method, region, *((0.3, 0.25, 0.4, area, 50) if known else (np.nan,) * 4 + (0,))))
    return pd.DataFrame(rows, columns=["model", "kind", "method", "region", "value", "ci_low", "ci_high", "area", "n"])


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
    lines = {line.get_label(): line for line in ranks.lines}
    np.testing.assert_array_equal(lines["CAM"].get_ydata(), rank[1:8:2])
    np.testing.assert_array_equal(lines["LRP"].get_ydata(), rank[0:8:2])
    hollow = [line for line in ranks.lines if line.get_markerfacecolor() == "white"]
    assert [(line.get_ydata()[0], round(line.get_xdata()[0])) for line in hollow] == [(-0.1, 4), (0.1, 4)]
    sizes_of = {line.get_label(): line for line in sizes.lines}
    np.testing.assert_array_equal(sizes_of["CAM"].get_ydata(), np.abs(rank[1:8:2]))
    assert lines["CAM"].get_color() == "#4d4d4d" and ranks.get_ylim()[0] < -0.3 <= 1 < ranks.get_ylim()[1]
    assert np.abs(lines["LRP"].get_xdata() - np.arange(4)).max() < 0.3
