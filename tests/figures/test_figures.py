import io
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from lib import figures
from lib.analysis.localization import METRICS, Metric
from lib.figures import style
from lib.losses import Criterion, make_loss
from lib.tables import BACKBONES, LOSSES

LABEL = "Simulated phantom films, not patients"
CLASSES = ["Cardiomegaly", "No Finding", "Pleural_Thickening"]
RNG = np.random.default_rng(0)
FILMS = RNG.integers(0, 256, (3, 32, 32), dtype=np.uint8)
BOXES = [[(2, 3, 10, 12)], [], [(0, 0, 32, 32), (5, 20, 30, 31)]]


def drawn(figure: Figure) -> set[str]:
    """Draw the figure; return every text in it. Type below 7 points, text cut at the edge or a figure without the data
    label fails."""
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    assert min(text.get_fontsize() for text in texts) >= 7
    assert figure.get_figwidth() <= style.WIDTH
    ticks = {
        label for ax in figure.axes for axis in (ax.xaxis, ax.yaxis) for label in axis.get_ticklabels(which="both")
    }
    for text in texts:
        if text not in ticks:
            box, page = text.get_window_extent(), figure.bbox
            inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= page.x1 + 1 and box.y1 <= page.y1 + 1
            assert inside or not (text.axes is None or text.axes.get_visible()), (
                f"{text.get_text()} is cut: {box} on {page}"
            )
    found = {text.get_text() for text in texts}
    assert LABEL in found
    return found


def performance_frame(metrics: tuple[str, ...]) -> pd.DataFrame:
    rows = [
        (task, backbone, loss, name, metric, 0.5, 0.4, 0.6, 0.1)
        for task, names in (("multilabel", [*CLASSES, "Average"]), ("binary", ["Unhealthy", "Average"]))
        for backbone in BACKBONES
        for loss in LOSSES
        for name in names
        for metric in metrics
    ]
    return pd.DataFrame(
        rows, columns=["task", "backbone", "loss", "class", "metric", "value", "ci_low", "ci_high", "prevalence"]
    )


def prediction_frame() -> pd.DataFrame:
    parts = []
    for name in CLASSES:
        target = RNG.integers(0, 2, 60) if name != "No Finding" else np.zeros(60, int)
        parts.append(pd.DataFrame({"class": name, "target": target, "logit": target + RNG.normal(size=60)}))
    return pd.concat(parts, ignore_index=True)


@pytest.mark.parametrize("kind", ["png", "pdf"])
def test_saves(kind):
    file = io.BytesIO()
    figures.film_grid(FILMS, BOXES, CLASSES, data_label=LABEL).savefig(file, format=kind)
    assert file.tell() > 1000


def test_no_pyplot_state():
    import matplotlib.pyplot as plt

    before = matplotlib.rcParams["font.size"]
    figures.training_curves(pd.DataFrame({"epoch": [1], "train_loss": [1.0], "val_auroc": [0.5]}), data_label=LABEL)
    assert plt.get_fignums() == [] and matplotlib.rcParams["font.size"] == before


def test_every_loss_has_one_style_of_its_own():
    styles = figures.loss_styles([*LOSSES, "mine", "yours"])
    assert (
        len({style["color"] for style in styles.values()}) == len({style["marker"] for style in styles.values()}) == 6
    )
    assert figures.loss_styles(["focal"])["focal"] == styles["focal"]


def test_cam_grid_titles_scale_and_missing_run():
    cams = RNG.random((3, 4, 8, 8))
    probabilities = np.full((3, 4), 0.875)
    cams[1, 2], probabilities[1, 2] = np.nan, np.nan
    figure = figures.cam_grid(FILMS, cams, BOXES, CLASSES, probabilities, data_label=LABEL)
    found = drawn(figure)
    assert {"Cardiomegaly", "Pleural Thickening", "P .88", "no run", "Film and boxes", *LOSSES.values()} <= found
    maps = [image for ax in figure.axes[:15] for image in ax.images if image.get_cmap().name == "heat"]
    assert len(maps) == 11 and {image.get_clim() for image in maps} == {(0, 1)}
    assert len(figure.axes) == 16  # 3 x 5 panels and one colour bar
    drawn(
        figures.cam_grid(
            FILMS[:1], cams[:1, :1], BOXES[:1], ["Mass"], probabilities[:1, :1], losses=["focal"], data_label=LABEL
        )
    )
    box = figure.axes[0].patches[0]
    assert (*box.get_xy(), box.get_width(), box.get_height()) == (2, 3, 8, 9)


def many_films(rows: int, losses: list[str], others: bool):
    """A grid of `rows` films, the first map empty; the scores of a map are 0.01 and 0.02 times its place."""
    place = np.arange(rows * len(losses)).reshape(rows, -1)
    cams = RNG.random((rows, len(losses), 8, 8))
    cams[0, 0] = 0
    ior = 0.02 * place
    ior[0, 0] = np.nan
    found = [[("Effusion", (4, 9, 12, 20)), ("Pleural_Thickening", (3, 8, 30, 20))] for _ in range(rows)]
    return figures.cam_grid(
        FILMS[[0] * rows],
        cams,
        BOXES[:1] * rows,
        ["Pleural_Thickening"] * rows,
        np.full((rows, len(losses)), 1.0),
        scores={"iobb": 0.01 * place, "ior": ior},
        names=[f"0000000{i}_000.png" for i in range(rows)],
        others=found if others else (),
        losses=losses,
        data_label=LABEL,
    )


@pytest.mark.parametrize("others", [True, False])
@pytest.mark.parametrize("losses", [["focal"], ["bce", "focal"], list(LOSSES), [*LOSSES, "mine", "yours"]])
def test_cam_grid_fits_a_page_and_says_what_its_numbers_are(losses, others):
    figure = figures.headed(many_films(8, losses, others), "Multi-label, T-DenseNet")
    found = drawn(figure)
    assert figure.get_figheight() < 8.9  # the file has a margin of 0.1 inches above and below
    texts = "\n".join(found)
    flat = " ".join(texts.split())
    assert "P 1.00 IoBB .00 IoR –" in flat and "empty" in found
    last = 8 * len(losses) - 1
    assert f"P 1.00 IoBB {0.01 * last:.2f} IoR".replace(" 0.", " .") in flat
    assert {"Multi-label, T-DenseNet", "00000007_000.png", "Pleural Thickening"} <= {
        *found,
        *(text.replace("\n", " ") for text in found),
    }
    assert ("Effusion" in found) == others
    for said in ("P: probability that the run gives to the class of the row", METRICS["ior"].meaning):
        assert said in flat
    panels = [ax for ax in figure.axes if ax.images and ax.get_visible() and not ax.get_label()]
    boxes = [ax.get_window_extent() for ax in panels]
    sides = [box.width for box in boxes]
    assert len(panels) >= 8 * (len(losses) + 1) and max(sides) - min(sides) < 0.15 * max(sides)
    for one, a in enumerate(boxes):
        assert not any(
            min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1 for b in boxes[:one]
        )


def test_numbers_beneath_maps_do_not_touch():
    figure = many_films(8, list(LOSSES), True)
    drawn(figure)
    texts = [ax.xaxis.label.get_window_extent() for ax in figure.axes if ax.get_xlabel()]
    for one, a in enumerate(texts):
        assert not any(a.overlaps(b) for b in texts[:one])


def test_films_lie_in_blocks_where_few_losses_leave_room():
    figure = many_films(8, ["focal"], False)
    drawn(figure)
    lefts = {round(ax.get_window_extent().x0) for ax in figure.axes if ax.images and ax.get_ylabel()}
    assert len(lefts) > 1 and figure.get_figwidth() > 5


def test_boxes_of_other_findings_are_thin_and_named_once():
    figure = many_films(2, ["focal"], True)
    found = [text.get_text() for text in figure.findobj(Text)]
    assert found.count("Effusion") == 2  # one a film, none on the maps
    for ax in figure.axes[:4]:
        thin = [patch for patch in ax.patches if patch.get_linewidth() < 1]
        thick = [patch for patch in ax.patches if patch.get_linewidth() == 1]
        assert [patch.get_xy() for patch in thin] == [(4, 9), (3, 8)] and [patch.get_xy() for patch in thick] == [
            (2, 3)
        ]


def test_other_findings_of_a_film():
    boxes = pd.DataFrame({"image": ["a", "a", "b"], "class": ["Mass", "Nodule", "Mass"]})
    boxes = boxes.assign(x1=[1.0, 2, 3], y1=4.0, x2=[5.0, 6, 7], y2=8.0)
    pairs = pd.DataFrame({"image": ["a", "a", "b", "c"], "class": ["Mass", "Unhealthy", "Mass", "Mass"]})
    found = [[(name, *box) for name, box in film] for film in figures.other_findings(boxes, pairs)]
    mass, nodule = ("Mass", 1, 4, 5, 8), ("Nodule", 2, 4, 6, 8)
    assert found == [[nodule], [mass, nodule], [], []]


def test_names_of_boxes_do_not_lie_on_each_other():
    """Boxes that start at one place, as a release's often do."""
    same = [("Pneumonia", (4, 8, 20, 20)), ("Pneumothorax", (4, 8, 21, 20)), ("Infiltration", (5, 9, 20, 21))]
    figure = figures.film_grid(FILMS, BOXES, CLASSES, others=[same, [], same], names=["a.png"] * 3, data_label=LABEL)
    assert "a.png" in drawn(figure)
    for ax in figure.axes:
        texts = [text.get_window_extent() for text in ax.texts]
        assert not any(a.overlaps(b) for one, a in enumerate(texts) for b in texts[:one])


def test_cam_grid_refuses_what_does_not_match():
    with pytest.raises(ValueError, match="3 films x 4 losses"):
        figures.cam_grid(FILMS, np.zeros((3, 4, 8, 8)), BOXES[:2], CLASSES, np.zeros((3, 4)), data_label=LABEL)
    with pytest.raises(ValueError, match="3 films x 4 losses"):
        scores = {"ior": np.zeros((3, 3))}
        figures.cam_grid(
            FILMS, np.zeros((3, 4, 8, 8)), BOXES, CLASSES, np.zeros((3, 4)), scores=scores, data_label=LABEL
        )


@pytest.mark.parametrize(
    "keep", ["loss != 'none'", "backbone == 'resnet50' and loss != 'bce'", "task == 'binary'", "loss == 'none'"]
)
def test_dot_panels_with_and_without_all_runs(keep):
    metrics = ("auroc", "ap", "mean_probability")
    results = performance_frame(metrics).query(keep)
    results.loc[results.index[:3], ["value", "ci_low", "ci_high"]] = np.nan
    figure = figures.performance(results, data_label=LABEL)
    found = drawn(figure)
    assert len(figure.axes) == len(metrics) * max(results["backbone"].nunique(), 1)
    assert ("Unhealthy (binary)" in found) == (len(results) > 0)
    assert ("Pleural Thickening" in found) == (results["task"] == "multilabel").any()


def test_dot_panels_put_values_and_intervals_where_they_belong():
    results = performance_frame(("auroc", "ap")).query("backbone == 'resnet50'")
    one = (results["class"] == "Unhealthy") & (results["metric"] == "auroc") & (results["loss"] == "focal")
    results.loc[one, ["value", "ci_low", "ci_high"]] = (0.9, 0.8, 0.95)
    axes = figures.performance(results, data_label=LABEL).axes[0]
    focal = next(line for line in axes.lines if line.get_label() == "Focal")
    place = dict(zip((text.get_text() for text in axes.get_yticklabels()), axes.get_yticks()))
    x, y = focal.get_xdata()[-1], focal.get_ydata()[-1]
    assert x == 0.9 and abs(y - place["Unhealthy (binary)"]) < 0.5
    assert list(place)[-2:] == ["Average", "Unhealthy (binary)"]


@pytest.mark.parametrize("value", [0.5, 0.55, 0.9])
def test_performance_has_ticks_at_chance_and_at_the_best(value):
    metrics = ("auroc", "ap", "mean_probability")
    results = performance_frame(metrics).assign(value=value, ci_low=value - 0.1, ci_high=value + 0.08)
    figure = figures.performance(results, data_label=LABEL)
    assert {"chance", "prevalence", "95 % interval"} <= drawn(figure)
    for ax in (figure.axes[0], figure.axes[1]):
        ticks = ax.get_xticks()
        shown = ticks[(ticks >= ax.get_xlim()[0]) & (ticks <= ax.get_xlim()[1])]
        assert np.isclose(shown, 0.5).any() and np.isclose(shown, 1).any() and len(shown) <= 8


def test_performance_of_three_backbones_fits_a_page():
    results = performance_frame(("auroc", "ap"))
    more = results[results["backbone"] == "resnet50"].assign(backbone="vgg16")
    names = [results["class"].where(results["class"] != "Cardiomegaly", f"Mass {k}") for k in range(13)]
    results = pd.concat([results, more, *(pd.concat([results, more]).assign(**{"class": name}) for name in names)])
    figure = figures.performance(results, data_label=LABEL)
    drawn(figure)
    assert figure.get_figheight() <= style.PAGE + 0.01


def test_release_figures():
    targets = RNG.integers(0, 2, (40, 3))
    targets[:, 2] = 0
    split = np.repeat(["train", "test"], 20)
    found = drawn(figures.prevalence(targets, CLASSES, split=split, data_label=LABEL))
    assert {"0", "none", "train (20)", "test (20)", f"{targets[:, 0].sum()}"} <= found
    targets[split == "test", 1] = 0
    assert "test (20; hollow: none)" in drawn(figures.prevalence(targets, CLASSES, split=split, data_label=LABEL))
    drawn(figures.prevalence(np.zeros((4, 3), np.uint8), CLASSES, data_label=LABEL))
    found = drawn(figures.cooccurrence(targets, CLASSES, data_label=LABEL))
    assert f"{100 * (targets[:, 0] & targets[:, 1]).sum() / targets[:, 0].sum():.0f}" in found and "–" in found
    films = pd.DataFrame(
        {"age": [50.0, 412.0, np.nan, 20.0], "sex": ["M", "F", "M", "F"], "view": ["PA", "PA", "PA", "AP"]}
    )
    assert "PA: 3 films (2 with an age outside 0 to 100)" in drawn(figures.ages(films, data_label=LABEL))
    found = drawn(
        figures.film_grid(
            FILMS, BOXES, CLASSES, box_names=[["Mass"], [], ["Nodule", "Mass"]], columns=2, data_label=LABEL
        )
    )
    assert {"Mass", "Nodule", "Pleural Thickening"} <= found


def test_prediction_figures():
    predictions = prediction_frame()
    for figure in (
        figures.class_curves(predictions, "roc", data_label=LABEL),
        figures.class_curves(predictions, "pr", data_label=LABEL),
        figures.reliability(predictions, data_label=LABEL),
    ):
        found = drawn(figure)
        assert ("one label only" in found) == (figure.axes[0].get_ylabel() != "Share positive")
        assert figure.axes[0].get_title().split()[0] == "Cardiomegaly"
    drawn(figures.class_curves(predictions[predictions["class"] == "Cardiomegaly"], "pr", data_label=LABEL))
    with pytest.raises(ValueError, match="'roc' or 'pr'"):
        figures.class_curves(predictions, "det", data_label=LABEL)


def test_curves_end_where_they_should_and_print_the_value():
    predictions = pd.DataFrame({"class": "Mass", "target": [0, 0, 1, 1], "logit": [-1.0, 0.5, 0.0, 2.0]})
    figure = figures.class_curves(predictions, "roc", data_label=LABEL)
    curve = figure.axes[0].lines[1]
    assert (curve.get_xdata()[0], curve.get_ydata()[0], curve.get_xdata()[-1], curve.get_ydata()[-1]) == (0, 0, 1, 1)
    assert "Mass\nAUROC 0.75" in drawn(figure)
    assert "Mass\nAP 0.83" in drawn(figures.class_curves(predictions, "pr", data_label=LABEL))


def test_reliability_bins():
    predictions = pd.DataFrame({"class": "Mass", "target": [0, 0, 1, 1], "logit": [-700.0, -700.0, 0.0, 700.0]})
    line = figures.reliability(predictions, bins=2, data_label=LABEL).axes[0].lines[0]
    assert np.allclose(line.get_xdata(), [0, 0.75]) and np.allclose(line.get_ydata(), [0, 1])


def test_reliability_shows_its_intervals_whole():
    """One film of 40 in each half at about 2 %: the points would fit a panel to 5 %, their intervals reach 11 %."""
    target, logit = np.zeros(80, int), np.repeat([-4.0, -3.5], 40)
    target[[0, 40]] = 1
    ax = figures.reliability(
        pd.DataFrame({"class": "Mass", "target": target, "logit": logit}), bins=2, data_label=LABEL
    ).axes[0]
    reach = max(path.vertices[:, 1].max() for path in ax.collections[0].get_paths())
    assert 0.1 < reach <= ax.get_ylim()[1]


def test_training_curves():
    one = pd.DataFrame({"epoch": [1, 2], "train_loss": [1.0, 0.5], "val_loss": [1.1, 0.7], "val_auroc": [0.5, np.nan]})
    assert {"training", "validation", "  weights kept  "} <= drawn(
        figures.training_curves(one, kept_epoch=2, data_label=LABEL)
    )
    drawn(figures.training_curves(one.drop(columns="val_loss"), data_label=LABEL))
    figure = figures.training_curves(one[:1], kept_epoch=1, data_label=LABEL)
    drawn(figure)
    for ax in figure.axes:
        low, high = ax.get_xlim()
        assert [tick for tick in ax.get_xticks() if low <= tick <= high] == [1]


PARAMETERS = SimpleNamespace(
    alpha=0.25, gamma=2.0, beta=0.9999, wbce_scheme="paper", wbce_counts="train", cb_scale="global"
)


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_by_probability_of_the_four(loss):
    """The curves of eq. 2 from the constants on record, for the classes of the largest and smallest w+/w-."""
    names = ["Mass", "Lung_Nodule", "Hernia"]
    criterion = make_loss(loss, [100, 400, 10], [900, 600, 990], PARAMETERS)
    figure, record = figures.loss_weights(criterion, names, data_label=LABEL), criterion.constants
    curves = [line for line in figure.axes[1].lines if line.get_label() != "BCE"]
    rare, common = ([2], [1]) if loss in ("wbce", "cb_focal") else ([0], [])  # alike: one curve for all
    assert {"BCE", *(line.get_label() for line in curves)} <= drawn(figure)
    told = [names[m].replace("_", " ") for m in rare + common] if common else ["every class"]
    assert [line.get_label() for line in curves] == told
    for line, m in zip(curves, rare + common, strict=True):
        p = line.get_xdata()
        np.testing.assert_allclose(line.get_ydata(), -record["negative"][m] * p ** record["gamma"] * np.log(1 - p))
    with_finding = figure.axes[0].lines[1]
    p, m = with_finding.get_xdata(), rare[0]
    np.testing.assert_allclose(
        with_finding.get_ydata(), -record["positive"][m] * (1 - p) ** record["gamma"] * np.log(p), rtol=1e-6
    )


def test_loss_by_probability_of_a_loss_without_constants():
    """Hinge: not w+ log p + w- log(1 - p); the second class counts twice."""
    weight = torch.tensor([1.0, 2.0], dtype=torch.float64)
    hinge = Criterion(lambda logits, targets: weight**targets * (1 - (2 * targets - 1) * logits).clamp(min=0))
    figure = figures.loss_weights(hinge, ["Mass", "Edema"], data_label=LABEL)
    assert {"Mass", "Edema", "BCE"} <= drawn(figure)
    line = next(line for line in figure.axes[0].lines if line.get_label() == "Edema")
    p = line.get_xdata()
    np.testing.assert_allclose(line.get_ydata(), 2 * np.clip(1 - np.log(p / (1 - p)), 0, None), atol=1e-12)


def test_alignment_and_concepts(monkeypatch):
    alignment = pd.DataFrame(
        {
            "class": ["Mass"] * 4 + ["Nodule"],
            "iobb": [0.1, 0.2, 0.3, 0.4, np.nan],
            "box_area": 0.1,
            "ior": [0.5, np.nan, 0.2, 0.1, np.nan],
            "cam_mass": 0.2,
        }
    )
    found = drawn(figures.alignment_distributions(alignment, data_label=LABEL))
    assert {"Mass (4)", "Nodule (1)", "mean", "mean expected by chance", "a pair of film and class"} <= found
    assert "every map is empty" in found  # the one of a nodule
    metric = Metric("Hit rate", "the peak lies in the box", None, chance="box_area")
    monkeypatch.setitem(METRICS, "hit", metric)
    figure = figures.alignment_distributions(alignment.assign(hit=[0, 1, 1, 0, 1]), data_label=LABEL)
    assert [ax.get_xlabel().split(": ")[0] for ax in figure.axes] == ["IoBB", "IoR", "Hit rate"]
    drawn(figure)
    concepts = pd.DataFrame({"disjoint": [3, 5, 10], "unique": [1, 2, 2]})
    assert {"mean 6.0", "mean 1.7"} <= drawn(figures.concept_distributions(concepts, data_label=LABEL))
    drawn(figures.concept_distributions(concepts * 0, data_label=LABEL))


def test_channel_panel():
    films = np.stack([FILMS, FILMS])
    maps, named = RNG.random((2, 3, 32, 32)), [[("Lung_Nodule", box) for box in film] for film in BOXES]
    titles, names = ["channel 1", "channel 2"], [["a.png", "b.png", "c.png"]] * 2
    found = drawn(
        figures.channel_panel(films, maps, np.array([0.9, 2.0]), [named, named], titles, names=names, data_label=LABEL)
    )
    assert {"channel 1", "channel 2", "annotated box", "Lung Nodule", "a.png", "c.png"} <= found
    with pytest.raises(ValueError, match="resize the maps"):
        figures.channel_panel(films, maps[..., :8, :8], np.zeros(2), [named, named], ["a", "b"], data_label=LABEL)


def test_a_long_data_label_is_not_cut():
    long = "NIH ChestX-ray14 films, study nih_of_the_hospital, 112,120 of them, as they were released in 2017"
    one = prediction_frame().query("`class` == 'Cardiomegaly'")
    figure = figures.class_curves(one, "roc", data_label=long)
    figure.draw_without_rendering()
    (foot,) = [text for text in figure.texts if text.get_text().split() == long.split()]
    assert foot.get_window_extent().x0 >= 0


def test_a_figure_without_a_data_label_is_refused():
    with pytest.raises(ValueError, match="data_label"):
        figures.film_grid(FILMS, BOXES, CLASSES, data_label="")
