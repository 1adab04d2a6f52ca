import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from lib import figures
from lib.figures import style

LABEL = "Simulated phantom films, not patients"
METRICS = {"auroc": "AUROC", "survive": "Counts that stand\nwithout the lesion"}
DOSES = [(1.0, False), (0.3, False), (0.1, False), (1.0, True), (0.3, True), (0.1, True)]


def draw(doses=DOSES, losses=("bce", "wbce"), seeds=(0, 1, 2)):
    rows = [(*dose, loss, seed) for dose in doses for loss in losses for seed in seeds]
    return pd.DataFrame(rows, columns=["prevalence", "noise", "loss", "seed"])


def table(**options):
    frames = [draw(**options).assign(metric=metric) for metric in METRICS]
    frame = pd.concat(frames, ignore_index=True)
    return frame.assign(value=np.random.default_rng(0).random(len(frame)))


CONTROL = pd.DataFrame({"metric": ["auroc", "auroc"], "value": [0.4, 0.6], "seed": [0, 1]})


def check(figure):
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    assert min(text.get_fontsize() for text in texts) >= 7 and figure.get_figwidth() <= style.WIDTH
    assert LABEL in {text.get_text() for text in texts}
    return {text.get_text() for text in texts}


@pytest.mark.parametrize("doses", [DOSES, DOSES[:2], DOSES[:1] + DOSES[3:4]], ids=len)
def test_every_seed_stands_at_its_dose_and_the_line_at_their_mean(doses):
    frame = table(doses=doses)
    figure = figures.dose_response(frame, METRICS, CONTROL, data_label=LABEL)
    assert {"AUROC", "BCE", "WBCE", "Untrained", "labels as they are"} <= check(figure)
    levels = sorted({prevalence for prevalence, _ in doses}, reverse=True)
    noises = sorted({noise for _, noise in doses})
    axes = np.reshape(figure.axes, (len(METRICS), len(noises)))
    for (row, metric), (column, noise) in ((r, c) for r in enumerate(METRICS) for c in enumerate(noises)):
        own = frame[(frame["metric"] == metric) & (frame["noise"] == noise)]
        lines = axes[row, column].lines
        marked = [line for line in lines if line.get_marker() in "os" and line.get_linestyle() == "None"]
        assert len(marked) == 2
        for line, loss in zip(marked, ("bce", "wbce"), strict=True):
            mine = own[own["loss"] == loss]
            np.testing.assert_array_equal(line.get_ydata(), mine["value"])
            np.testing.assert_array_equal(np.round(line.get_xdata()), mine["prevalence"].map(levels.index))
        means = [line for line in lines if line.get_label() in ("BCE", "WBCE")]
        for line, loss in zip(means, ("bce", "wbce"), strict=True):
            by_dose = own[own["loss"] == loss].groupby("prevalence")["value"].mean()[levels]
            np.testing.assert_allclose(line.get_ydata(), by_dose)
        base = [line.get_ydata()[0] for line in lines if line.get_label() == "Untrained"]
        assert base == ([0.5] if metric == "auroc" else [])


def test_many_metrics_fit_a_page():
    frame = table(doses=DOSES[:2])
    many = {f"{metric}{k}": label for k in range(7) for metric, label in METRICS.items()}
    frames = [frame.assign(metric=frame["metric"] + str(k)) for k in range(7)]
    figure = figures.dose_response(pd.concat(frames), many, CONTROL, data_label=LABEL)
    check(figure)
    assert len(figure.axes) == 14 and figure.get_figheight() <= 8.9


def test_every_run_has_a_curve_of_its_own():
    frame = draw(DOSES[::-1]).merge(pd.DataFrame({"epoch": [1, 2, 3]}), how="cross")
    rng = np.random.default_rng(0)
    frame = frame.assign(train_loss=rng.random(len(frame)) + 0.1, val_auroc=rng.random(len(frame)))
    figure = figures.convergence(frame, data_label=LABEL)
    assert {"1 left", "0.1 left, noise", "BCE", "WBCE"} <= check(figure)
    assert len(figure.axes) == 12 and all(len(ax.lines) == 6 for ax in figure.axes)
    first = frame[(frame["prevalence"] == 1) & ~frame["noise"] & (frame["loss"] == "bce") & (frame["seed"] == 0)]
    drawn = figure.axes[0].lines[0].get_ydata()
    np.testing.assert_allclose(drawn, first["train_loss"] / first["train_loss"].iloc[0])
    np.testing.assert_array_equal(figure.axes[6].lines[0].get_ydata(), first["val_auroc"])


def test_a_dot_a_channel():
    often, moved = np.array([0.1, 0.5, 0.9]), np.array([0.2, np.nan, 1.4])
    figure = figures.channel_responses(often, moved, data_label=LABEL)
    check(figure)
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_xydata(), np.column_stack([often, moved]))
