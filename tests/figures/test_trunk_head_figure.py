import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from lib import figures
from lib.analysis.changes import PARTS
from lib.figures import style

LABEL = "Simulated phantom films, not patients"
METRICS = ["auroc", "mean_probability", "iobb", "ior"]


def changes(losses=("wbce", "focal", "cb_focal"), metrics=METRICS):
    rows = list(itertools.product(losses, PARTS, metrics))
    frame = pd.DataFrame(rows, columns=["loss", "part", "metric"])
    point = np.random.default_rng(0).normal(size=len(frame))
    return frame.assign(point=point, low=point - 0.5, high=point + 0.5)


@pytest.mark.parametrize("losses", [("wbce", "focal", "cb_focal"), ("focal",)])
def test_every_change_stands_at_its_value_with_its_interval(losses):
    frame = changes(losses)
    frame.loc[3, ["point", "low", "high"]] = np.nan
    figure = figures.change_parts(frame, data_label=LABEL)
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    assert min(text.get_fontsize() for text in texts) >= 7 and figure.get_figwidth() <= style.WIDTH
    found = {text.get_text() for text in texts}
    assert {LABEL, "AUROC", "Mean probability", "IoBB", "IoR", "the trunk's part", "the head's part"} <= found
    assert set(losses) == {"wbce", "focal", "cb_focal"} & set(frame["loss"])
    for ax, metric in zip(figure.axes, METRICS, strict=True):
        drawn = {line.get_label(): line.get_xdata() for line in ax.lines}
        for part, label in (("head", "the head's part"), ("constant", "BCE and a constant a class")):
            own = frame[(frame["metric"] == metric) & (frame["part"] == part)].set_index("loss").loc[list(losses)]
            np.testing.assert_array_equal(drawn[label], own["point"])
        bars = [bar for found in ax.collections if hasattr(found, "get_segments") for bar in found.get_segments()]
        ends = [tuple(bar[:, 0]) for bar in bars if len(bar) and np.isfinite(bar).all()]
        shown = frame[(frame["metric"] == metric) & (frame["part"] != "rest")]
        assert sorted(ends) == sorted(shown[["low", "high"]].dropna().itertuples(index=False, name=None))


def test_parts_of_one_run_have_a_marker_each_and_no_two_share_a_line():
    figure = figures.change_parts(changes(), data_label=LABEL)
    lines = [line for line in figure.axes[0].lines if not line.get_label().startswith("_")]
    assert len({line.get_marker() for line in lines}) == len(lines) == len(PARTS) - 1
    assert not {line.get_color() for line in lines} & {one["color"] for one in style.LOSS_STYLES.values()}
    heights = np.concatenate([line.get_ydata() for line in lines])
    assert len(np.unique(heights.round(6))) == len(heights)


def test_rows_of_several_runs_are_refused():
    with pytest.raises(ValueError, match="one task and backbone"):
        figures.change_parts(pd.concat([changes(), changes()]), data_label=LABEL)
    with pytest.raises(ValueError, match="4 metrics"):
        figures.change_parts(changes(metrics=[*METRICS, "hit"]), data_label=LABEL)
