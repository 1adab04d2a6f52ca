import io

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from lib import figures
from lib.figures import style
from lib.tables import LOSSES

OWN, COMMON = ("", "grad"), ("S-", "grad")
# One class, on whose common scale a raw value of 0 is 0.
SCALES = {method: (np.ones(1), np.zeros(1)) for method in ("grad", "hires", "xgrad", "my_cam")}
LABEL = "Simulated phantom films, not patients"
CLASSES = [
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
    "No Finding",
]
BOXES = ["image", "class", "x1", "y1", "x2", "y2"]
RNG = np.random.default_rng(0)
FILMS = RNG.integers(0, 256, (3, 32, 32), dtype=np.uint8)


def drawn(figure: Figure) -> set[str]:
    """Draw the figure; return every text in it. Type below 7 points, text cut at the edge or a figure without the data
    label fails."""
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    assert min(text.get_fontsize() for text in texts) >= 7 - 1e-9
    assert figure.get_figwidth() <= style.WIDTH and figure.get_figheight() <= 8.9
    ticks = {
        label for ax in figure.axes for axis in (ax.xaxis, ax.yaxis) for label in axis.get_ticklabels(which="both")
    }
    for text in texts:
        if text not in ticks and (text.axes is None or text.axes.get_visible()):
            box, page = text.get_window_extent(), figure.bbox
            inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= page.x1 + 1 and box.y1 <= page.y1 + 1
            assert inside, f"{text.get_text()!r} is cut: {box} on {page}"
    found = {text.get_text() for text in texts}
    assert LABEL in found
    return found


def distribution(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    edges, values = np.linspace(-5, 5, 41), RNG.normal(size=(n, 500))
    return edges, np.array([np.histogram(row, edges)[0] for row in values]), *np.percentile(values, [10, 90], axis=1)


def sums_frame(scales=("individual", "common_raw", "common_tanh"), parts=("all",)) -> pd.DataFrame:
    logit = RNG.normal(size=40)
    rows = [
        pd.DataFrame(
            {
                "method": method,
                "scale": scale,
                "features": part,
                "logit": logit,
                "activation": logit * 3 + RNG.normal(size=40),
            }
        )
        for method in ("hires", "grad", "my_cam")
        for scale in scales
        for part in parts
    ]
    return pd.concat(rows, ignore_index=True)


def importance(n_features: int, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    train = RNG.normal(0, 0.1, (n_features, n_classes))
    return train, train + RNG.normal(0, 0.02, train.shape)


def curve_frame(classes: list[str], losses: tuple[str, ...]) -> pd.DataFrame:
    rows = [(name, loss, k, 1 - 0.8**k) for name in classes for loss in losses for k in (1, 2, 4, 8, 16, 32)]
    return pd.DataFrame(rows, columns=["class", "loss", "k", "share"])


def pruning_frame(losses: tuple[str, ...] = ("bce",)) -> pd.DataFrame:
    frame = pd.DataFrame(
        [(loss, n, 0.8 - 0.0005 * n) for loss in losses for n in range(0, 101, 10)],
        columns=["loss", "n_removed", "auroc"],
    )
    return frame.assign(auroc_ci_low=frame["auroc"] - 0.02, auroc_ci_high=frame["auroc"] + 0.02)


def loss_frame(losses: tuple[str, ...], classes: list[str]) -> pd.DataFrame:
    rows = [(loss, name, 20 + i, 10.5, 0.1) for loss in losses for i, name in enumerate(classes)]
    frame = pd.DataFrame(rows, columns=["loss", "class", "n_features80", "participation", "overlap"])
    for column in frame.columns[2:]:
        frame = frame.assign(**{f"{column}_ci_low": 0.9 * frame[column], f"{column}_ci_high": 1.2 * frame[column]})
    return frame.assign(overlap_by_chance=0.05)


def every_figure(classes: list[str], label: str) -> list:
    """Each function with small realistic arguments, called when asked."""
    n, maps = len(classes), {OWN: RNG.random((3, 7, 7)), COMMON: RNG.uniform(-1, 1, (3, 7, 7))}
    jaccard = {loss: RNG.random((n, n)) for loss in LOSSES}
    return [
        lambda: figures.activation_distribution(
            *distribution(n), tanh_between(*distribution(n)[2:]), classes, data_label=label
        ),
        lambda: figures.scaled_cams(
            FILMS, maps, ["Mass\nlogit 1.0\np = 0.73"] * 3, RNG.random(3), scales=SCALES, selected=0, data_label=label
        ),
        lambda: figures.consistency_scatter(sums_frame(), data_label=label),
        lambda: figures.importance_panels(*importance(32, n), classes, classes[-1], data_label=label),
        lambda: figures.principal_curve(curve_frame(classes, tuple(LOSSES)), data_label=label),
        lambda: figures.class_overlap(jaccard, classes, chance=0.03, data_label=label),
        lambda: figures.pruning_curve(pruning_frame(tuple(LOSSES)), data_label=label),
        lambda: figures.confounder_panel(
            FILMS,
            RNG.random((3, 7, 7)),
            [[(1, 1, 5, 5)], [], []],
            classes[:1] * 3,
            name=classes[0],
            features=[7, 2],
            data_label=label,
        ),
        lambda: figures.loss_comparison(loss_frame(tuple(LOSSES), classes), data_label=label),
    ]


@pytest.mark.parametrize("classes", [CLASSES, ["Unhealthy"]], ids=["nih", "binary"])
def test_every_figure_is_drawn_with_its_label(classes):
    for make in every_figure(classes, LABEL):
        drawn(make())


def test_every_figure_refuses_an_empty_label():
    for make in every_figure(["Mass", "Nodule"], " "):
        with pytest.raises(ValueError, match="data_label is empty"):
            make()


def test_saves_as_vectors_and_leaves_no_global_state():
    import matplotlib
    import matplotlib.pyplot as plt

    before, file = matplotlib.rcParams["font.size"], io.BytesIO()
    figures.importance_panels(*importance(64, 3), ["a", "b", "c"], "b", data_label=LABEL).savefig(file, format="pdf")
    assert file.tell() > 1000 and plt.get_fignums() == [] and matplotlib.rcParams["font.size"] == before


def tanh_between(low, high, ends=(0.1, 0.9)):
    """alpha and beta of the tanh that takes `low` and `high` to the ends."""
    with np.errstate(divide="ignore", invalid="ignore"):
        alpha = np.where(high > low, (np.arctanh(ends[1]) - np.arctanh(ends[0])) / (high - low), np.nan)
    return alpha, np.arctanh(ends[0]) - alpha * low


def test_distribution_draws_the_scale_it_is_given():
    edges, counts, low, high = distribution(3)
    low[1] = high[1] = 0.5
    low[2] = high[2] = np.nan
    counts[2] = 0
    figure = figures.activation_distribution(
        edges, counts, low, high, tanh_between(low, high), ["Mass", "Nodule", "Hernia"], data_label=LABEL
    )
    found = drawn(figure)
    assert {"no scale:\nall the same", "no films", "P10 and P90"} <= found
    scale = next(line for ax in figure.axes for line in ax.lines if line.get_label().startswith("common scale"))
    assert np.interp([low[0], high[0]], *scale.get_data()) == pytest.approx([0.1, 0.9], abs=2e-3)
    assert (
        figure.axes[0].get_yscale() == "log"
        and sum(line.get_label().startswith("common") for ax in figure.axes for line in ax.lines) == 1
    )
    figure = figures.activation_distribution(
        np.stack([edges] * 3),
        counts,
        low,
        high,
        (np.full(3, 2.0), np.full(3, 0.25)),
        ["a", "b", "c"],
        kind="linear",
        data_label=LABEL,
    )
    assert {"Common scale", "Class activation", "Pixels", "raw 0"} <= drawn(figure)
    marked = [line for ax in figure.axes for line in ax.lines if line.get_label() == "raw 0"]
    assert len(marked) == 3 and all(set(line.get_xdata()) == {0} for line in marked)
    x, y = next(
        line for ax in figure.axes for line in ax.lines if line.get_label().startswith("common scale")
    ).get_data()
    assert y == pytest.approx(2 * x + 0.25)


def test_small_activations_are_counted_in_a_unit_of_their_own():
    edges, counts, low, high = distribution(3)
    scale = tanh_between(low / 4000, high / 4000)
    figure = figures.activation_distribution(
        edges / 4000, counts, low / 4000, high / 4000, scale, "abc", data_label=LABEL
    )
    assert "Class activation × $10^{3}$" in drawn(figure)
    ticks = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert np.allclose([float(tick) for tick in ticks], 1000 * figure.axes[0].get_xticks()) and max(map(len, ticks)) < 5


def test_a_heading_stands_above_everything():
    """A legend outside the panels takes the upper edge too."""
    plain = figures.importance_panels(*importance(16, 3), ["a", "b", "c"], "b", data_label=LABEL)
    crowded = figures.pruning_curve(pruning_frame(tuple(LOSSES)), data_label=LABEL)
    for figure in (plain, crowded):
        before, text = figure.get_figheight(), "Pleural Thickening: Multi-label, T-DenseNet, Focal, seed 0"
        assert figures.headed(figure, text) is figure and text in drawn(figure)
        [heading] = [one for one in figure.findobj(Text) if one.get_text() == text]
        others = [ax.get_tightbbox() for ax in figure.axes]
        others += [one.get_window_extent() for legend in figure.legends for one in legend.get_texts()]
        assert heading.get_window_extent().y0 >= max(box.y1 for box in others) - 1
        assert 0.15 < figure.get_figheight() - before < 0.25
    narrow = figures.principal_curve(curve_frame(["Mass"], ("bce",)), data_label=LABEL)
    assert "\n" in next(text for text in drawn(figures.headed(narrow, "word " * 20)) if text.startswith("word"))


@pytest.mark.parametrize(
    ("edges", "counts", "bound"), [(41, (2, 40), 3), (40, (3, 40), 3), (41, (3, 40), 2), (41, (40,), 3)]
)
def test_distribution_refuses_shapes(edges, counts, bound):
    with pytest.raises(ValueError, match="must be"):
        figures.activation_distribution(
            np.arange(edges),
            np.ones(counts),
            np.zeros(bound),
            np.ones(bound),
            (np.ones(3), np.ones(3)),
            ["a", "b", "c"],
            data_label=LABEL,
        )


def scaled(**changes) -> Figure:
    arguments = {
        "films": FILMS,
        "maps": {OWN: np.full((3, 8, 8), 0.5), COMMON: np.full((3, 8, 8), -0.5)},
        "titles": ["low", "unknown", "high"],
        "confidence": np.array([0.2, np.nan, 0.9]),
        "scales": SCALES,
        "selected": 0,
        "data_label": LABEL,
    } | changes
    return figures.scaled_cams(**arguments)


def test_scaled_cams_orders_rows_and_keeps_each_column_on_its_scale():
    maps = {OWN: RNG.random((3, 8, 8)), COMMON: RNG.uniform(-1, 1, (3, 8, 8))}
    maps[COMMON][1] = np.nan
    figure = scaled(maps=maps, boxes=[[], [], [(2, 3, 10, 12)]])
    found = drawn(figure)
    assert [ax.get_ylabel() for ax in figure.axes[0:9:3]] == ["high", "low", "unknown"]
    heads = {"Film", "Grad", "S-Grad\nraw 0 at 0.000"}
    assert heads | {"no map", "individual scale of each map", "common scale of all films"} <= found
    overlays = {
        ax.get_title().split("\n")[0] or i: [
            image for image in ax.images if image.get_cmap().name in ("heat", "signed")
        ]
        for i, ax in enumerate(figure.axes[:9])
    }
    assert [image.get_clim() for image in overlays["Grad"]] == [(0, 1)] and [
        image.get_clim() for image in overlays["S-Grad"]
    ] == [(-1, 1)]
    assert np.array_equal(overlays["Grad"][0].get_array(), maps[OWN][2]) and overlays[8] == []
    assert all(len(ax.patches) == 1 for ax in figure.axes[:3]) and not any(ax.patches for ax in figure.axes[3:9])
    boxes = pd.DataFrame([("a", "Mass", 1, 2, 9, 9), ("b", "Edema", 5, 6, 20, 20)], columns=BOXES)
    found = figures.marked(boxes, ["c", "b", "a"], "Mass")
    figure = scaled(maps=maps, **found)  # in the order of the rows a, c, b
    assert {"Edema"} <= drawn(figure) and [len(ax.patches) for ax in figure.axes[:9]] == [1, 1, 1, 0, 0, 0, 1, 0, 0]
    only = drawn(scaled(maps={COMMON: maps[COMMON]}))
    assert "individual scale of each map" not in only
    assert "common scale of all films" not in drawn(scaled(maps={OWN: maps[OWN]}))
    found = drawn(scaled(maps={("", "hires"): maps[OWN], ("FS-S-", "my_cam"): maps[COMMON]}))
    assert {"Pixel-wise Grad", "FS-S-my_cam raw 0 at 0.000"} <= {text.replace("\n", " ") for text in found}


def overlay(figure, row, column, columns):
    [image] = [one for one in figure.axes[row * columns + column].images if one.get_cmap().name in ("heat", "signed")]
    return np.asarray(image.get_array())


@pytest.mark.parametrize(("kind", "alpha", "beta"), [("tanh", 3.0, 1.4), ("linear", 0.5, 0.8), ("tanh", 1.0, -0.3)])
def test_red_is_what_speaks_for_the_class_and_blue_what_speaks_against_it(kind, alpha, beta):
    """A film of which every pixel speaks against the class has no red, though the scale takes most of it above 0."""
    raw = np.stack([RNG.uniform(-0.4, -0.05, (8, 8)), RNG.uniform(-0.4, 0.35, (8, 8)), np.zeros((8, 8))])
    values = np.tanh(alpha * raw + beta) if kind == "tanh" else alpha * raw + beta
    scales = {"grad": (np.array([9.0, alpha]), np.array([9.0, beta]))}
    figure = scaled(maps={COMMON: values}, confidence=np.array([3, 2, 1]), scales=scales, selected=1, kind=kind)
    zero = np.tanh(beta) if kind == "tanh" else beta
    assert f"S-Grad\nraw 0 at {zero:.3f}" in drawn(figure)
    for row in range(3):
        colours = overlay(figure, row, 1, 2)
        expected = [(v - zero) / (1 - zero) if v >= zero else (v - zero) / (1 + zero) for v in values[row].ravel()]
        np.testing.assert_allclose(colours.ravel(), expected, atol=1e-12)
        assert (np.sign(colours) == np.sign(raw[row])).all()


def test_a_raw_zero_beyond_the_end_of_the_scale_leaves_one_colour():
    for beta, sign in ((30.0, -1), (-30.0, 1)):  # tanh of either is an end of the scale, to the last bit
        scales = {"grad": (np.ones(1), np.full(1, beta))}
        values = np.full((3, 8, 8), 0.5)
        values[0, 0, 0] = -sign
        colours = overlay(scaled(maps={COMMON: values}, scales=scales), 2, 1, 2)  # no confidence: the last row
        assert np.isfinite(colours).all() and (np.sign(colours) == sign).all()
        colours = overlay(scaled(maps={COMMON: values}, scales=scales), 1, 1, 2)
        assert colours[0, 0] == 0 and (np.sign(colours.ravel()[1:]) == sign).all()


def test_methods_with_the_same_maps_are_drawn_once_and_an_empty_map_says_so():
    values = {kind: RNG.random((3, 8, 8)) for kind in ("", "S-")}
    maps = {
        (kind, method): values[kind] + 1e-6 * (method == "xgrad") for method in ("grad", "xgrad") for kind in values
    }
    other = maps | {("", "hires"): values[""] * 0.9, ("S-", "hires"): values["S-"]}
    for found, columns in ((maps, 3), (other, 5)):
        figure = scaled(maps={key: np.minimum(one, 1) for key, one in found.items()})
        texts = drawn(figure)
        assert "Grad,\nXGrad" in texts and sum(ax.axison and bool(ax.images) for ax in figure.axes) == 3 * columns
    empty = values[""].copy()
    empty[1] = 0
    figure = scaled(maps={OWN: empty, COMMON: np.zeros((3, 8, 8))})
    assert [text.get_text() for ax in figure.axes for text in ax.texts] == ["empty"]
    assert len(figure.axes[7].images) == 1 and len(figure.axes[8].images) == 2  # zero evidence is no empty map


def test_no_grid_of_maps_is_taller_than_a_page():
    films, confidence = np.concatenate([FILMS] * 5), RNG.random(15)
    maps = {OWN: RNG.random((15, 7, 7)), COMMON: RNG.random((15, 7, 7))}
    options = {"scales": SCALES, "selected": 0, "data_label": LABEL}
    drawn(figures.headed(figures.scaled_cams(films, maps, ["Mass\na\nb"] * 15, confidence, **options), "Mass: Focal"))


def test_film_titles_name_the_film_two_labels_and_the_confidence():
    frame = pd.DataFrame({"image": ["1_0.png", "a.b.png", "2", "3"]})
    frame["labels"] = ["", "Mass", "Mass|Nodule", "Mass|Nodule|Pleural_Thickening"]
    expected = ["not normal\n1_0", "Mass\na.b", "Mass, Nodule\n2", "Mass, Nodule, …\n3"]
    assert figures.film_titles(frame) == expected
    found = figures.film_titles(frame[3:], [0.256], "Pleural_Thickening")
    assert found == ["Pleural_Thickening, Mass, …\n3\nP(Pleural Thickening) = 0.26"]  # the class comes first


def test_films_to_show_are_of_the_class_with_boxes_and_healthy_ones():
    labels = np.array(["Mass", "Nodule", "No Finding"] * 10)
    frame = pd.DataFrame({"image": [f"{i}" for i in range(30)], "labels": labels}, index=np.arange(100, 130))
    order, mass = RNG.permutation(30), labels == "Mass"
    for n_boxed in (10, 4, 3, 0):
        images = frame.loc[mass, "image"][:n_boxed]
        boxes = pd.DataFrame({"image": [*images, "1"], "class": ["Mass"] * n_boxed + ["Nodule"]})
        found = figures.films_to_show(frame, order, mass, boxes, "Mass")
        own = [i for i in order if mass[i] and (n_boxed < 4 or frame["image"].iloc[i] in set(images))]
        healthy = [i for i in order if labels[i] == "No Finding"]
        assert found.tolist() == [own[int(k * (len(own) - 1) / 3)] for k in range(4)] + [healthy[0], healthy[-1]]
    for_two = figures.films_to_show(frame.replace("No Finding", "Edema"), order, mass, boxes, "Mass")[4:]
    others = [i for i in order if not mass[i]]
    assert for_two.tolist() == [others[0], others[-1]]
    assert figures.films_to_show(frame, order, np.ones(30), boxes, "Mass").tolist() == [
        order[k] for k in (0, 9, 19, 29)
    ]


def test_class_boxes_are_those_of_each_film():
    rows = [
        ("a", "Mass", 1, 2, 3, 4),
        ("b", "Mass", 5, 6, 7, 8),
        ("a", "Nodule", 0, 0, 9, 9),
        ("a", "Mass", 2, 2, 4, 4),
    ]
    found = figures.class_boxes(pd.DataFrame(rows, columns=BOXES), ["b", "c", "a"], "Mass")
    assert [boxes.tolist() for boxes in found] == [[[5, 6, 7, 8]], [], [[1, 2, 3, 4], [2, 2, 4, 4]]]
    assert all(boxes.shape[1] == 4 for boxes in found)


def test_signed_colours_are_clear_at_zero():
    colours = style.SIGNED(np.array([0.0, 0.5, 1.0]))
    assert (
        colours[1, 3] == 0
        and colours[0, 2] > colours[0, 0]
        and colours[2, 0] > colours[2, 2]
        and colours[[0, 2], 3].min() > 0.7
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"maps": {("", "grad"): np.zeros((2, 8, 8))}}, "3 films, but .* 2 maps Grad"),
        ({"titles": ["a"]}, "3 films, but 1 titles"),
        ({"confidence": np.zeros(2)}, "2 confidences"),
        ({"maps": {("", "grad"): np.full((3, 8, 8), -0.5)}}, r"'Grad' reach from -0.5 to -0.5: scale them to \[0, 1\]"),
        ({"boxes": [[]]}, "1 boxes"),
        ({"maps": {("S-", "grad"): np.full((3, 8, 8), 1.5)}}, r"'S-Grad' reach .* scale them to \[-1, 1\]"),
    ],
)
def test_scaled_cams_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        scaled(**changes)


def test_scatter_prints_the_correlations_it_shows():
    logit = np.arange(10.0)
    frame = pd.DataFrame({"method": "grad", "scale": "common_raw", "logit": logit, "activation": np.exp(logit)})
    r = np.mean((logit - logit.mean()) * (np.exp(logit) - np.exp(logit).mean())) / logit.std() / np.exp(logit).std()
    assert f"r = {r:.3f}, ρ = 1.000, n = 10" in drawn(figures.consistency_scatter(frame, data_label=LABEL))
    frame.loc[3, "activation"] = np.nan
    found = drawn(
        figures.consistency_scatter(
            pd.concat([frame, frame.assign(scale="individual", activation=0.0)]), data_label=LABEL
        )
    )
    assert "r = undefined, ρ = undefined, n = 10" in found and any("n = 9" in text for text in found)


def test_scatter_panels_follow_methods_scales_and_features():
    figure = figures.consistency_scatter(sums_frame(parts=("all", "principal")), data_label=LABEL)
    found = drawn(figure)
    assert len(figure.axes) == 3 * 5  # no panel for principal features on individual scales
    assert [ax.get_ylabel() for ax in figure.axes[::5]] == ["Grad", "Pixel-wise Grad", "my_cam"]
    assert "Common scale, scaled values, principal features" in {text.replace("\n", " ") for text in found}
    drawn(figures.consistency_scatter(sums_frame().iloc[:0], data_label=LABEL))


def test_scatter_writes_beside_the_points_on_one_scale_and_methods_with_the_same_sums_once():
    frame = sums_frame(parts=("all", "principal"))
    frame.loc[frame["features"] == "principal", "activation"] *= 0.1
    same = frame[frame["method"] == "grad"]
    twice = pd.concat(
        [frame, same.assign(method="xgrad"), same.assign(method="cam", activation=7 * same["activation"])]
    )
    figure = figures.consistency_scatter(twice, data_label=LABEL)
    drawn(figure)
    assert [ax.get_ylabel() for ax in figure.axes[::5]] == ["Grad\nXGrad\nCAM", "Pixel-wise Grad", "my_cam"]
    axes = np.reshape(figure.axes, (3, 5))  # individual, raw sums and scaled values of all and of principal features
    limits = [[ax.get_ylim() for ax in row] for row in axes]
    assert len({row[0] for row in limits}) == len({limit for row in limits for limit in row[3:]}) == 1
    assert all(row[1] == row[2] for row in limits) and len({row[1] for row in limits}) == 3
    for ax in axes.flat:  # no text inside a panel, no point outside
        assert all(text.xyann[1] > 0 and text.xy == (0.5, 1) for text in ax.texts)
        values = ax.lines[0].get_ydata()
        assert len(values) == 40 and ax.get_ylim()[0] < values.min() and values.max() < ax.get_ylim()[1]
    methods = ["grad", "hires", "gradpp", "xgrad", "cam", "layer", "smooth_gradpp", "score", "ss", "is"]
    many = pd.concat([sums_frame().query("method == 'grad'").assign(method=name) for name in methods])
    many["activation"] += RNG.normal(size=len(many))
    figure = figures.consistency_scatter(many, data_label=LABEL)
    drawn(figures.headed(figure, "7: digits"))
    assert len(figure.axes) == 30


def test_importance_sorts_both_images_by_the_training_films():
    train = np.array([[0.0, 0.0, -1.0], [0.1, 3.0, 0.0], [2.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 0.0, 0.5]])
    test = train + np.arange(5)[:, None]
    figure = figures.importance_panels(train, test, ["a", "b", "c"], "b", data_label=LABEL)
    drawn(figure)
    left, right = (ax.images[0] for ax in figure.axes[:2])
    assert np.array_equal(left.get_array(), train[[2, 3, 1, 4, 0]]) and np.array_equal(
        right.get_array(), test[[2, 3, 1, 4, 0]]
    )
    assert left.get_clim() == right.get_clim() and left.get_clim()[0] == -left.get_clim()[1] < 0
    line = next(ax for ax in figure.axes if ax.get_title() == "Selected class: b")
    found = {curve.get_label(): curve for curve in line.lines}
    ranked = [3, 1, 0, 2, 4]  # features 0, 2 and 4 are equal: they keep their order
    assert np.allclose(found["training films"].get_ydata(), train[ranked, 1] - train[:, 1].mean())
    assert np.allclose(found["test films"].get_ydata(), test[ranked, 1] - test[:, 1].mean())
    assert found["test films"].get_linestyle() == "None"
    assert found["training films"].get_color() == style.NEUTRAL and found["test films"].get_color() == style.YELLOW


def test_importance_without_films_of_a_class_and_without_any_contrast():
    train, test = importance(16, 3)
    test[:, 1] = np.nan
    assert "Selected class: b (no test films)" in drawn(
        figures.importance_panels(train, test, ["a", "b", "c"], "b", data_label=LABEL)
    )
    train[:, 1] = np.nan
    assert "Selected class: b (no training or test films)" in drawn(
        figures.importance_panels(train, test, ["a", "b", "c"], "b", data_label=LABEL)
    )
    for value in (0.0, np.nan):
        drawn(
            figures.importance_panels(
                np.full((16, 3), value), np.full((16, 3), value), ["a", "b", "c"], "c", data_label=LABEL
            )
        )
    sparse = np.zeros((400, 1))
    sparse[3] = 1.0  # the 99th percentile of |IM| is 0
    drawn(figures.importance_panels(sparse, sparse, ["a"], "a", data_label=LABEL))


def test_train_test_gap_starts_with_the_class_that_exceeds_chance_most():
    gap = pd.DataFrame(
        {
            "class": ["Mass", "Nodule", "Hernia", "Edema"],
            "difference": [0.2, 0.5, np.nan, 0.4],
            "by_chance": [0.1, 0.45, np.nan, 0.1],
        }
    )
    figure = figures.train_test_gap(gap, "Nodule", data_label=LABEL)
    drawn(figure)
    names = figure.axes[0].get_yticklabels()
    assert [name.get_text() for name in names] == ["Edema", "Mass", "Nodule", "Hernia"]
    assert [name.get_weight() for name in names] == ["normal", "normal", "bold", "normal"]
    values = next(line for line in figure.axes[0].lines if line.get_label().startswith("training"))
    np.testing.assert_array_equal(values.get_xdata(), [0.4, 0.2, 0.5, np.nan])


def test_importance_refuses():
    train, test = importance(16, 3)
    with pytest.raises(ValueError, match=r"\(16, 3\) and \(15, 3\): both must be \(features, 3\)"):
        figures.importance_panels(train, test[1:], ["a", "b", "c"], "a", data_label=LABEL)
    with pytest.raises(ValueError, match=r"both must be \(features, 2\)"):
        figures.importance_panels(train, test, ["a", "b"], "a", data_label=LABEL)
    with pytest.raises(ValueError, match="class 'd' is not among a, b, c"):
        figures.importance_panels(train, test, ["a", "b", "c"], "d", data_label=LABEL)


def test_principal_curve():
    frame = curve_frame(["Mass", "Nodule"], ("bce", "focal"))
    figure = figures.principal_curve(frame.sample(frac=1, random_state=0), data_label=LABEL)
    assert {"BCE", "Focal", "Mass", "Nodule"} <= drawn(figure)
    line = figure.axes[0].lines[0]
    assert np.array_equal(line.get_xdata(), [1, 2, 4, 8, 16, 32]) and np.all(np.diff(line.get_ydata()) > 0)
    one = curve_frame(["Mass"], ("bce",)).drop(columns=["class", "loss"]).rename(columns={"share": "auroc"})
    one.loc[2, "auroc"] = np.nan
    assert "AUROC" in drawn(figures.principal_curve(one, "auroc", data_label=LABEL))
    with pytest.raises(ValueError, match="'share', 'auroc' or 'accuracy'"):
        figures.principal_curve(one, "k", data_label=LABEL)


def test_class_overlap_leaves_the_diagonal_and_empty_classes_out():
    jaccard = np.full((4, 4), 0.2)
    np.fill_diagonal(jaccard, 1.0)
    jaccard[3] = jaccard[:, 3] = np.nan
    figure = figures.class_overlap(
        {"focal": jaccard, "mine": np.full((4, 4), np.nan)}, ["a", "b", "c", "d"], chance=0.1, data_label=LABEL
    )
    found = drawn(figure)
    assert {"Focal, mean 0.200", "mine"} <= found and any("by chance, 0.100" in text for text in found)
    image = figure.axes[0].images[0]
    assert image.get_array().mask.sum() == 4 + 6 and image.get_clim() == (0, 0.2)
    assert image.cmap(image.norm(0.1))[:3] == pytest.approx([0.96] * 3, abs=0.01)  # neither colour at chance
    assert min(figure.axes[-1].get_ylim()) == 0
    with pytest.raises(ValueError, match=r"overlap of 'bce' is \(4, 4\): it must be \(3, 3\)"):
        figures.class_overlap({"bce": jaccard}, ["a", "b", "c"], chance=0.1, data_label=LABEL)
    drawn(figures.class_overlap({"bce": np.full((1, 1), np.nan)}, ["Unhealthy"], chance=0.1, data_label=LABEL))


def test_pruning_counts_what_is_free():
    """0.0005 a feature: 20 cost 0.01, and only steps of 10 were measured."""
    assert {"BCE: 20 removed cost at most 0.011"} <= drawn(
        figures.pruning_curve(pruning_frame(), tolerance=0.011, data_label=LABEL)
    )
    one = pruning_frame().drop(columns="loss")
    assert "100 removed cost at most 1" in drawn(figures.pruning_curve(one, tolerance=1.0, data_label=LABEL))
    back = one.assign(
        auroc=np.where(one["n_removed"].isin([50, 60]), 0.1, 0.8)
    )  # what follows a costly step is not free
    assert "40 removed cost at most 0.01" in drawn(figures.pruning_curve(back, data_label=LABEL))
    back.loc[2, "auroc"] = np.nan
    assert "10 removed cost at most 0.01" in drawn(figures.pruning_curve(back, data_label=LABEL))
    assert "0 removed cost at most 0.01" in drawn(figures.pruning_curve(back.assign(auroc=np.nan), data_label=LABEL))
    with pytest.raises(ValueError, match="no row n_removed = 0 for Focal"):
        figures.pruning_curve(pruning_frame(("bce", "focal")).query("loss == 'bce' or n_removed > 0"), data_label=LABEL)


def test_confounder_panel_one_scale_and_both_kinds_of_markers():
    mask = np.zeros((32, 32), bool)
    mask[:4, :6] = True
    maps = np.stack([np.full((7, 7), value) for value in (0.1, 3.0, 0.5)])
    said = {"name": "Pleural_Thickening", "features": [5, 17, 2, 9], "data_label": LABEL}
    figure = figures.confounder_panel(FILMS, maps, [mask, [(1, 2, 5, 8)], ()], ["a", "Mass\nb_1", "c"], **said)
    assert {"planted marker", "Mass\nb_1", "features 5, 17, 2 and 1 more\ntimes their weights"} <= drawn(figure)
    boxed = figures.confounder_panel(FILMS, maps, [[], [(1, 2, 5, 8)], ()], ["a", "b", "c"], **said)
    assert "annotated box of Pleural Thickening" in drawn(boxed)
    overlays = [image for ax in figure.axes for image in ax.images if image.get_cmap().name == "heat"]
    assert [image.get_clim() for image in overlays] == [(0, 3)] * 3
    contour = figure.axes[0].collections[0].get_paths()[0].vertices
    assert contour[:, 0].max() == pytest.approx(6, abs=0.1) and contour[:, 1].max() == pytest.approx(4, abs=0.1)
    assert (*figure.axes[1].patches[0].get_xy(), figure.axes[1].patches[0].get_width()) == (1, 2, 4)
    signed = figures.confounder_panel(FILMS, maps - 2, [()] * 3, ["a", "b", "c"], **said)
    assert "planted marker" not in drawn(signed)
    assert {image.get_clim() for ax in signed.axes for image in ax.images if image.get_cmap().name == "signed"} == {
        (-1.9, 1.9)
    }
    many = np.concatenate([FILMS] * 3)[:8]
    drawn(figures.confounder_panel(many, np.zeros((8, 7, 7)), [mask] * 8, ["long name of a film.png"] * 8, **said))


def test_confounder_panel_refuses():
    said = {"name": "Mass", "features": [1], "data_label": LABEL}
    with pytest.raises(ValueError, match="3 films, 2 maps"):
        figures.confounder_panel(FILMS, np.zeros((2, 7, 7)), [()] * 3, ["a"] * 3, **said)
    with pytest.raises(ValueError, match=r"a marker mask is \(7, 7\), its film \(32, 32\)"):
        figures.confounder_panel(FILMS, np.zeros((3, 7, 7)), [np.ones((7, 7), bool)] * 3, ["a"] * 3, **said)


def test_outlier_films_name_their_boxes_and_themselves():
    boxes = pd.DataFrame(
        [("f_1.png", "Mass", 1, 2, 5, 6), ("f_1.png", "Edema", 8, 8, 20, 20), ("g.png", "Mass", 0, 0, 9, 9)],
        columns=BOXES,
    )
    found = pd.DataFrame({"image": ["f_1.png", "g.png"], "class": ["Mass", "Nodule"], "distance": [0.5, 0.25]})
    found["labels"] = ["Mass|Edema", "Mass|Nodule"]
    figure = figures.outlier_films(FILMS[:2], found, boxes, data_label=LABEL)
    texts = {text.replace("\n", " ") for text in drawn(figure)}
    assert {"Mass, distance 0.50 (Mass, Edema)", "Nodule, distance 0.25 (Mass, Nodule)", "f_1", "g"} <= texts
    assert {"Edema", "Mass"} <= texts
    widths = [[round(patch.get_linewidth(), 1) for patch in ax.patches] for ax in figure.axes[:2]]
    assert [sorted(each) for each in widths] == [[0.5, 1.0], [0.5]]  # the class's own box is the thick one


def test_loss_comparison_puts_the_values_where_they_belong():
    frame = loss_frame(("bce", "cb_focal"), ["Mass", "No_Finding"])
    frame.loc[0, "overlap"] = np.nan
    frame = frame.drop(index=3)  # a class that one loss has not
    figure = figures.loss_comparison(frame, data_label=LABEL)
    assert {"BCE", "CB-Focal", "No Finding"} <= drawn(figure)
    bce = next(line for line in figure.axes[0].lines if line.get_label() == "BCE")
    bars = [bar[:, 0].tolist() for found in figure.axes[0].collections for bar in found.get_segments() if len(bar)]
    assert sorted(bars) == [[18, 24], [18, 24], [pytest.approx(18.9), pytest.approx(25.2)]]
    for ax in figure.axes:  # nothing is cut
        ends = [
            value for line in ax.lines for value in line.get_xdata() if np.isfinite(value) and len(line.get_xdata())
        ]
        assert ax.get_xlim()[0] < min(ends) and max(ends) < ax.get_xlim()[1]
    chance = next(line for line in figure.axes[2].lines if line.get_label() == "by chance")
    assert chance.get_xdata() == pytest.approx([0.05, 0.05])
    assert len(figures.loss_comparison(frame.assign(overlap=np.nan), data_label=LABEL).axes) == 2  # no empty panel
    assert np.array_equal(bce.get_xdata(), [20, 21]) and bce.get_color() == figures.loss_styles(["bce"])["bce"]["color"]
    assert np.abs(bce.get_ydata() - [0, 1]).max() < 0.5
