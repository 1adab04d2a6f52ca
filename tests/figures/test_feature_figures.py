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
RNG = np.random.default_rng(0)
FILMS = RNG.integers(0, 256, (3, 32, 32), dtype=np.uint8)


def drawn(figure: Figure) -> set[str]:
    """Draw the figure; return every text in it. Type below 7 points, text cut at the edge or a figure without the data
    label fails."""
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    assert min(text.get_fontsize() for text in texts) >= 7 - 1e-9
    assert figure.get_figwidth() <= style.WIDTH
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
    return pd.DataFrame(rows, columns=["loss", "class", "n_features80", "participation", "overlap"])


def every_figure(classes: list[str], label: str) -> list:
    """Each function with small realistic arguments, called when asked."""
    n, maps = len(classes), {OWN: RNG.random((3, 7, 7)), COMMON: RNG.uniform(-1, 1, (3, 7, 7))}
    jaccard = {loss: RNG.random((n, n)) for loss in LOSSES}
    return [
        lambda: figures.activation_distribution(
            *distribution(n), tanh_between(*distribution(n)[2:]), classes, data_label=label
        ),
        lambda: figures.scaled_cams(FILMS, maps, ["Mass\nlogit 1.0\np = 0.73"] * 3, RNG.random(3), data_label=label),
        lambda: figures.consistency_scatter(sums_frame(), data_label=label),
        lambda: figures.importance_panels(*importance(32, n), classes, classes[-1], data_label=label),
        lambda: figures.principal_curve(curve_frame(classes, tuple(LOSSES)), data_label=label),
        lambda: figures.class_overlap(jaccard, classes, data_label=label),
        lambda: figures.pruning_curve(pruning_frame(tuple(LOSSES)), data_label=label),
        lambda: figures.confounder_panel(
            FILMS, RNG.random((3, 7, 7)), [[(1, 1, 5, 5)], [], []], classes[:1] * 3, data_label=label
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
    drawn(figure)
    x, y = next(
        line for ax in figure.axes for line in ax.lines if line.get_label().startswith("common scale")
    ).get_data()
    assert y == pytest.approx(2 * x + 0.25)


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
        "data_label": LABEL,
    } | changes
    return figures.scaled_cams(**arguments)


def test_scaled_cams_orders_rows_and_keeps_each_column_on_its_scale():
    maps = {OWN: RNG.random((3, 8, 8)), COMMON: RNG.uniform(-1, 1, (3, 8, 8))}
    maps[COMMON][1] = np.nan
    figure = scaled(maps=maps, boxes=[[], [], [(2, 3, 10, 12)]])
    found = drawn(figure)
    assert [ax.get_ylabel() for ax in figure.axes[0:9:3]] == ["high", "low", "unknown"]
    assert {"Film", "Grad", "S-Grad", "no map", "individual scale of each map", "common scale of all films"} <= found
    overlays = {
        ax.get_title() or i: [image for image in ax.images if image.get_cmap().name in ("heat", "signed")]
        for i, ax in enumerate(figure.axes[:9])
    }
    assert [image.get_clim() for image in overlays["Grad"]] == [(0, 1)] and [
        image.get_clim() for image in overlays["S-Grad"]
    ] == [(-1, 1)]
    assert np.array_equal(overlays["Grad"][0].get_array(), maps[OWN][2]) and overlays[8] == []
    assert all(len(ax.patches) == 1 for ax in figure.axes[:3]) and not any(ax.patches for ax in figure.axes[3:9])
    only = drawn(scaled(maps={COMMON: maps[COMMON]}))
    assert "individual scale of each map" not in only
    assert "common scale of all films" not in drawn(scaled(maps={OWN: maps[OWN]}))
    found = drawn(scaled(maps={("", "hires"): maps[OWN], ("FS-S-", "my_cam"): maps[COMMON]}))
    assert {"Pixel-wise Grad", "FS-S-my_cam"} <= {text.replace("\n", " ") for text in found}


def test_film_titles_name_two_labels_and_the_confidence():
    labels = ["", "Mass", "Mass|Nodule", "Mass|Nodule|Edema"]
    assert figures.film_titles(labels) == ["not normal", "Mass", "Mass, Nodule", "Mass, Nodule, …"]
    assert figures.film_titles(labels[1:2], [0.256]) == ["Mass\np = 0.26"]


def test_class_boxes_are_those_of_each_film():
    columns = ["image", "class", "x1", "y1", "x2", "y2"]
    rows = [
        ("a", "Mass", 1, 2, 3, 4),
        ("b", "Mass", 5, 6, 7, 8),
        ("a", "Nodule", 0, 0, 9, 9),
        ("a", "Mass", 2, 2, 4, 4),
    ]
    found = figures.class_boxes(pd.DataFrame(rows, columns=columns), ["b", "c", "a"], "Mass")
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
    assert f"Pearson {r:.3f}\nSpearman 1.000\nn = 10" in drawn(figures.consistency_scatter(frame, data_label=LABEL))
    frame.loc[3, "activation"] = np.nan
    found = drawn(
        figures.consistency_scatter(
            pd.concat([frame, frame.assign(scale="individual", activation=0.0)]), data_label=LABEL
        )
    )
    assert "Pearson undefined\nSpearman undefined\nn = 10" in found and any("n = 9" in text for text in found)


def test_scatter_panels_follow_methods_scales_and_features():
    figure = figures.consistency_scatter(sums_frame(parts=("all", "principal")), data_label=LABEL)
    found = drawn(figure)
    assert len(figure.axes) == 3 * 5  # no panel for principal features on individual scales
    assert [ax.get_ylabel() for ax in figure.axes[::5]] == ["Grad", "Pixel-wise Grad", "my_cam"]
    assert "Common scale, scaled values, principal features" in {text.replace("\n", " ") for text in found}
    drawn(figures.consistency_scatter(sums_frame().iloc[:0], data_label=LABEL))


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
    assert np.allclose(found["training films"].get_ydata(), train[:, 1] - train[:, 1].mean())
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
        {"focal": jaccard, "mine": np.full((4, 4), np.nan)}, ["a", "b", "c", "d"], data_label=LABEL
    )
    assert {"Focal, mean 0.20", "mine"} <= drawn(figure)
    image = figure.axes[0].images[0]
    assert image.get_array().mask.sum() == 4 + 6 and image.get_clim() == (0, 0.2)
    with pytest.raises(ValueError, match=r"overlap of 'bce' is \(4, 4\): it must be \(3, 3\)"):
        figures.class_overlap({"bce": jaccard}, ["a", "b", "c"], data_label=LABEL)
    drawn(figures.class_overlap({"bce": np.full((1, 1), np.nan)}, ["Unhealthy"], data_label=LABEL))


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
    figure = figures.confounder_panel(FILMS, maps, [mask, [(1, 2, 5, 8)], ()], ["a", "b_1", "c"], data_label=LABEL)
    assert {"planted marker", "b_1"} <= drawn(figure)
    overlays = [image for ax in figure.axes for image in ax.images if image.get_cmap().name == "heat"]
    assert [image.get_clim() for image in overlays] == [(0, 3)] * 3
    contour = figure.axes[0].collections[0].get_paths()[0].vertices
    assert contour[:, 0].max() == pytest.approx(6, abs=0.1) and contour[:, 1].max() == pytest.approx(4, abs=0.1)
    assert (*figure.axes[1].patches[0].get_xy(), figure.axes[1].patches[0].get_width()) == (1, 2, 4)
    signed = figures.confounder_panel(FILMS, maps - 2, [()] * 3, ["a", "b", "c"], data_label=LABEL)
    assert "planted marker" not in drawn(signed)
    assert {image.get_clim() for ax in signed.axes for image in ax.images if image.get_cmap().name == "signed"} == {
        (-1.9, 1.9)
    }
    many = np.concatenate([FILMS] * 3)[:8]
    drawn(
        figures.confounder_panel(
            many, np.zeros((8, 7, 7)), [mask] * 8, ["long name of a film.png"] * 8, data_label=LABEL
        )
    )


def test_confounder_panel_refuses():
    with pytest.raises(ValueError, match="3 films, 2 maps"):
        figures.confounder_panel(FILMS, np.zeros((2, 7, 7)), [()] * 3, ["a"] * 3, data_label=LABEL)
    with pytest.raises(ValueError, match=r"a marker mask is \(7, 7\), its film \(32, 32\)"):
        figures.confounder_panel(FILMS, np.zeros((3, 7, 7)), [np.ones((7, 7), bool)] * 3, ["a"] * 3, data_label=LABEL)


def test_loss_comparison_puts_the_values_where_they_belong():
    frame = loss_frame(("bce", "cb_focal"), ["Mass", "No_Finding"])
    frame.loc[0, "overlap"] = np.nan
    frame = frame.drop(index=3)  # a class that one loss has not
    figure = figures.loss_comparison(frame, data_label=LABEL)
    assert {"BCE", "CB-Focal", "No Finding"} <= drawn(figure)
    bce = next(line for line in figure.axes[0].lines if line.get_label() == "BCE")
    assert np.array_equal(bce.get_xdata(), [20, 21]) and bce.get_color() == figures.loss_styles(["bce"])["bce"]["color"]
    assert np.abs(bce.get_ydata() - [0, 1]).max() < 0.5
