"""Tables 1 and 2 of Nam & Lee in the paper's arrangement, ours beside theirs, and in words in how many cells the
methods beat CAM.

Tidy frames in: `attribution.iou_means` and `iou_differences` make those of Table 2, `regions.share_means` and
`box_gaps` those of the sentences on intention. What is not there becomes a dash; models, classes and methods the paper
does not have are appended after the paper's.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lib.tables.layout import (
    PUBLISHED,
    bounds_text,
    check_frame,
    check_label,
    latex,
    markdown,
    number_text,
    of_cells,
    range_text,
    tex_row,
)
from lib.tables.names import MISSING, class_name, ordered

METHODS = {"cam": "CAM", "lrp": "LRP", "rap": "RAP"}
MODELS = {"densenet121": "DenseNet-121", "resnet50": "ResNet-50", "vgg16": "VGG-16", "chexnet": "CheXNet"}
READINGS = {"mean_iou": "mean of lesion and background", "iou_lesion": "lesion alone"}
REGIONS = {"boxes": "in the boxes", "lungs": "in the lungs", "outside": "outside"}
DATASETS = {"rsna": "RSNA Pneumonia", "nih": "NIH ChestX-ray14"}

_FILES = {1: "nam_lee_table1_auroc.csv", 2: "nam_lee_table2_iou.csv"}
_CLASSES = ("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax")
_CELL = ["reading", "threshold", "method", "class"]
_FILMS = (
    "What the paper calls 984 images are 984 boxes in 880 films; 606 of these films were in the training list of the "
    "checkpoint it explains (86 in its validation list, 188 in its test list)."
)
_UNSAID = (
    "The paper does not say which IoU it prints; its values fit the mean of lesion and background and stand beside "
    "both readings."
)
_NO_LUNG_VERDICT = " So it is not shown that the model judges normal films by their lungs."
_LUNG_VERDICTS = {
    "more than area gives": " So the model judges normal films by their lungs, as the paper reads its pictures.",
    "less than area gives": " So the model judges normal films by something else than their lungs, not as the paper "
    "reads its pictures.",
}


def read_published(number: int) -> pd.DataFrame:
    """Table 1 (dataset, model, class, auroc) or 2 (threshold, method, class, mean_iou; methods by our ids) as Nam & Lee
    print it."""
    table = pd.read_csv(PUBLISHED / _FILES[number])
    return table.assign(method=table["method"].str.lower()) if number == 2 else table


def table1(auroc: pd.DataFrame, *, data_label: str, dataset: str = "rsna") -> pd.DataFrame:
    """Table 1, the AUROC of each model beside the paper's.

    Parameters
    ----------
    auroc : DataFrame
        model ('densenet121', 'resnet50', 'vgg16', 'chexnet', any other), class, value, ci_low, ci_high (NaN: none), n
        (films).
    data_label : str
        What the numbers were measured on.
    dataset : {'rsna', 'nih'}
        Which of the paper's two rows stands beside them.

    Returns
    -------
    DataFrame
        data, dataset, model, class, value, ci_low, ci_high, n, paper; the paper's models first, in its order, NaN where
        there is none.

    Raises
    ------
    ValueError
        Empty data_label, another dataset, missing columns, or a model and class given twice.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset = {dataset!r}: one of {', '.join(DATASETS)}")
    key = ["model", "class"]
    ours = _checked(auroc, key, ["value", "ci_low", "ci_high", "n"], data_label)
    printed = read_published(1).query("dataset == @dataset").set_index(key)["auroc"]
    cells = printed.index.append(ours.index.difference(printed.index, sort=False))
    table = ours.reindex(cells).assign(paper=printed.reindex(cells)).reset_index()
    table.insert(0, "dataset", dataset)
    table.insert(0, "data", data_label)
    return table


def table2(means: pd.DataFrame, *, data_label: str) -> pd.DataFrame:
    """Table 2, the IoU by threshold, method and class beside the paper's, under both readings of "IoU".

    Parameters
    ----------
    means : DataFrame
        Of `attribution.iou_means`: reading, class, method, threshold, value, ci_low, ci_high, n, n_skipped, n_unstable,
        floor.
    data_label : str
        What the numbers were measured on.

    Returns
    -------
    DataFrame
        data, reading, threshold, method, class, value, ci_low, ci_high, n, n_skipped, n_unstable, floor (of an empty
        mask), paper: every cell in the paper's order, NaN where there is no number of ours or of the paper. The paper's
        number stands beside both readings.

    Raises
    ------
    ValueError
        Empty data_label, missing columns, or a cell given twice.
    """
    ours = _checked(means, _CELL, "value ci_low ci_high n n_skipped n_unstable floor".split(), data_label)
    printed = read_published(2).set_index(_CELL[1:])["mean_iou"]
    given = ours.index.to_frame()
    thresholds = sorted({*printed.index.get_level_values("threshold"), *given["threshold"]})
    methods, classes = ordered(METHODS, given["method"]), ordered(dict.fromkeys(_CLASSES), given["class"])
    cells = pd.MultiIndex.from_product([READINGS, thresholds, methods, classes], names=_CELL)
    table = ours.reindex(cells).reset_index()
    table["paper"] = printed.reindex(pd.MultiIndex.from_frame(table[_CELL[1:]])).to_numpy()
    table.insert(0, "data", data_label)
    return table


def caption(table: pd.DataFrame, interval: str, reading: str = "mean_iou") -> str:
    """One paragraph under a table of `table1` or `table2`; `interval` names the method, `reading` which half of Table 2
    is meant."""
    label = f"Data: {table['data'].iloc[0]}."
    if _number(table) == 1:
        dataset = table["dataset"].iloc[0]
        parts = [
            f"AUROC of each model. {label}",
            *_counted(table, "film", "films"),
            f"Under each its 95 % interval ({interval}), then the value of Nam & Lee, Table 1 ({DATASETS[dataset]}).",
        ]
        if dataset == "rsna":
            parts.append(
                "Negatives are all films without the label, also those of another abnormality. CheXNet was trained on "
                "films of the NIH release, from which RSNA's are drawn."
            )
    else:
        table = table[table["reading"] == reading]
        title = {
            "mean_iou": "Mean IoU of the thresholded maps with the boxes, mean of lesion and background",
            "iou_lesion": "IoU of the thresholded maps with the boxes, lesion alone",
        }[reading]
        floor = "(1 - box area) / 2" if reading == "mean_iou" else "0"
        parts = [
            f"{title}, by threshold T, method and class. {label}",
            *_counted(table, "pair of film and class", "pairs of film and class", " a class"),
            f"Under each mean its 95 % interval ({interval}), then the value of Nam & Lee, Table 2 (CheXNet on NIH "
            "ChestX-ray14).",
            f"Empty mask: what a map that marks nothing gets, {floor}.",
            _UNSAID,
            _FILMS,
        ]
        skipped, unstable = table["n_skipped"].max(), table["n_unstable"].max()
        if skipped > 0:
            because = f" ({unstable:.0f} for want of a stable map)" if unstable > 0 else ""
            parts.insert(2, f"Up to {skipped:.0f} a cell are undefined{because} and left out.")
    if table["value"].isna().any():
        parts.append(f"{MISSING}: not measured.")
    return " ".join(parts)


def pneumonia_networks(runs: Sequence) -> dict[str, Any]:
    """The runs that learn pneumonia, by the names of their networks: the backbone's, with another loss than BCE, and
    another seed than the first run's, added.

    `runs` : with task, backbone, loss and seed. ValueError where none has the task pneumonia.
    """
    found = {
        run.backbone + f"-{run.loss}" * (run.loss != "bce") + f"-seed{run.seed}" * (run.seed != runs[0].seed): run
        for run in runs
        if run.task == "pneumonia"
    }
    if not found:
        raise ValueError("no run of this study has the task pneumonia: name some in `runs`")
    return found


def map_headings(models: Iterable[str], method: str) -> list[str]:
    """What stands above the maps of each model: 'VGG-16, LRP'."""
    return [f"{MODELS.get(model, model)}, {METHODS.get(method, method)}" for model in models]


def training_note(status: pd.Series) -> str:
    """What to do where it is not known which films a checkpoint was trained on, else nothing; of
    `attribution.training_status`."""
    unknown = status.eq("unknown").any()
    return "Name the list of its training films in `chexnet_train_list` to tell them apart." if unknown else ""


def to_markdown(table: pd.DataFrame, *, interval: str, reading: str = "mean_iou") -> str:
    """A frame of `table1` or `table2` (one reading of it) as a Markdown table, its caption below; `interval` as in
    `caption`."""
    labels, columns, lines = _lines(table, reading)
    below = f"**Table {_number(table)}.** {caption(table, interval, reading)}"
    return markdown([labels + columns, *lines], below, n_labels=len(labels))


def to_latex(table: pd.DataFrame, *, interval: str, reading: str = "mean_iou") -> str:
    """A frame of `table1` or `table2` (one reading of it) as a LaTeX table over the text width (packages: booktabs)."""
    labels, columns, lines = _lines(table, reading)
    name = "model-auroc" if _number(table) == 1 else f"attribution-{reading.replace('_', '-')}"
    body = []
    for i, line in enumerate(lines):
        if i and line[0]:
            body.append(r"\addlinespace")
        body.append(tex_row(line))
    return latex([labels + columns], body, caption=caption(table, interval, reading), label=name, n_labels=len(labels))


def verdicts(differences: pd.DataFrame, means: pd.DataFrame | None = None) -> pd.DataFrame:
    """In how many cells of class and threshold a method is better than CAM, and than a mask that marks nothing.

    Parameters
    ----------
    differences : DataFrame
        Of `attribution.iou_differences` to 'cam': reading, class, method, threshold, difference, ci_low, ci_high.
    means : DataFrame, optional
        Of `attribution.iou_means`, for the empty mask; under the mean of lesion and background alone, since the
        lesion's IoU of it is 0.

    Returns
    -------
    DataFrame
        A row per opponent ('CAM', 'an empty mask'), reading and method: cells (with a difference), higher (the
        difference is positive), intervals (cells with one), supported (the whole 95 % interval lies above zero),
        contradicted (below), paper_cells and paper_higher (the same count in the paper's Table 2; 0 where its numbers
        do not tell).
    """
    printed = read_published(2).pivot(index=["threshold", "class"], columns="method", values="mean_iou")
    rows = []
    for (reading, method), cells in differences.groupby(["reading", "method"], sort=False):
        told = reading == "mean_iou" and method in printed  # its numbers fit that reading only
        paper = printed[method] - printed["cam"] if told else printed["cam"].iloc[:0]
        counts = _counts(cells[["difference", "ci_low", "ci_high"]])
        rows.append(("CAM", reading, method, *counts, len(paper), int((paper > 0).sum())))
    if means is not None:
        for method, cells in means[means["reading"] == "mean_iou"].groupby("method", sort=False):
            counts = _counts(cells[["gain", "gain_low", "gain_high"]])
            rows.append(("an empty mask", "mean_iou", method, *counts, 0, 0))
    columns = "against reading method cells higher intervals supported contradicted paper_cells paper_higher".split()
    return pd.DataFrame(rows, columns=columns)


def sentences(checked: pd.DataFrame) -> list[str]:
    """The frame of `verdicts` in words: a Markdown paragraph per row, every number taken from the frame."""
    return [_sentence(row) for row in checked.itertuples(index=False)]


def intention_sentences(means: pd.DataFrame, gaps: pd.DataFrame | None = None) -> list[str]:
    """Where the positive relevance lies, in words: a Markdown paragraph per model, method and kind of film.

    `means` : of `regions.share_means` by model, kind, method and region ('boxes', 'lungs', 'outside' or any other).
    `gaps` : of `regions.box_gaps` by model, method and kind. For films with boxes the text says whether the model looks
    where the lesions are: denser there than area gives and, where lungs are known, denser than in the lungs; for films
    of the kind 'normal', whether it looks at lungs. Films without a stable map are counted.
    """
    out = []
    for (model, method, kind), rows in means.groupby(["model", "method", "kind"], sort=False):
        known = rows[(rows["n"] > 0) & (rows["area"] < 0.999)]  # a region that is the whole film says nothing
        parts = [
            f"{100 * row.value:.1f} %{_between(row.ci_low, row.ci_high)} "
            f"{REGIONS.get(row.region, f'in {row.region}')}, {_against_area(row)} ({100 * row.area:.1f} %)"
            for row in known.itertuples()
        ]
        unstable = rows["n_unstable"].max()
        more = f" ({unstable:.0f} {'more ' if parts else ''}without a stable map)" if unstable else ""
        text = f"**{MODELS.get(model, model)}, {METHODS.get(method, method)}, {kind}**: "
        text += (
            f"over {range_text(known['n'], 'film', 'films')}{more}, of the positive relevance {'; '.join(parts)}."
            if parts
            else f"no positive relevance{more}, or no region but the whole film to look at."
        )
        for row in known[known["region"] == "boxes"].itertuples():
            text += _box_verdict(_against_area(row), gaps, model, method, kind)
        for row in known[known["region"] == "lungs"].itertuples() if kind == "normal" else ():
            text += _LUNG_VERDICTS.get(_against_area(row), _NO_LUNG_VERDICT)
        out.append(text)
    return out


def _box_verdict(against: str, gaps: pd.DataFrame | None, model: str, method: str, kind: str) -> str:
    if against == "less than area gives":
        return " So the model looks elsewhere than at the lesions, not as intended."
    if against != "more than area gives":
        return " So it is not shown that the model looks where the lesions are."
    gap = [] if gaps is None else gaps.query("model == @model and method == @method and kind == @kind")
    if not len(gap):
        return (
            " So the model looks where the lesions are, or at the lungs as a whole: without lung masks the two "
            "cannot be told apart."
        )
    if gap["gap_low"].iloc[0] > 0:
        return (
            " It is denser there than in the lungs as a whole, so the model looks where the lesions are, as intended."
        )
    if gap["gap_high"].iloc[0] < 0:
        return (
            " It is less dense there than in the lungs as a whole: the model looks at lungs, not at lesions, not as "
            "intended."
        )
    return (
        " But it is not told apart from the lungs as a whole: the model looks at lungs, and it is not shown that it "
        "looks at lesions."
    )


def _sentence(row) -> str:
    text = f"**{METHODS.get(row.method, row.method)} against {row.against}, {READINGS[row.reading]}**: "
    if not row.cells:
        return text + "no cell to compare."
    text += f"higher in {of_cells(row.higher, row.cells)} of class and threshold"
    if row.intervals:
        of = "" if row.intervals == row.cells else f" (of {row.intervals} with one)"
        text += (
            f"; the 95 % interval of the paired difference lies wholly above zero in {row.supported or 'none'}{of}, "
            f"wholly below in {row.contradicted or 'none'}."
        )
    else:
        text += " (no intervals)."
    paper = f" In the paper's Table 2: {of_cells(row.paper_higher, row.paper_cells)}."
    return text + (paper if row.paper_cells else "")


def _counts(cells: pd.DataFrame) -> tuple[int, ...]:
    """Of cells with a difference, its lower and its upper bound: how many have one, are higher, have an interval, lie
    wholly above zero, wholly below."""
    difference, low, high = (cells[name] for name in cells)
    known = (difference.notna(), difference > 0, low.notna() & high.notna(), low > 0, high < 0)
    return tuple(int(which.sum()) for which in known)


def _against_area(row) -> str:
    if row.n < 10:
        return "on too few films to tell it from what area gives"
    if not (np.isfinite(row.gain_low) and np.isfinite(row.gain_high)):
        return "with no interval to tell it from what area gives"
    if row.gain_low > 0:
        return "more than area gives"
    return "less than area gives" if row.gain_high < 0 else "not told apart from what area gives"


def _between(low: float, high: float) -> str:
    return f" [{100 * low:.1f}, {100 * high:.1f}]" if np.isfinite(low) and np.isfinite(high) else ""


def _lines(table: pd.DataFrame, reading: str) -> tuple[list[str], list[str], list[list[str]]]:
    """Headings of the label columns, those of the others, and the printed lines: mean, interval and paper one below the
    other."""
    if _number(table) == 1:
        columns = [MODELS.get(model, model) for model in table["model"]]
        if table["class"].nunique() > 1:
            columns = [f"{model} {class_name(name)}" for model, name in zip(columns, table["class"])]
        labels = ("ours", "95 % interval", "paper")
        return ["AUROC"], columns, [[label, *cells] for label, cells in zip(labels, _triple(table))]
    if reading not in READINGS:
        raise ValueError(f"reading = {reading!r}: one of {', '.join(READINGS)}")
    table, lines = table[table["reading"] == reading], []
    classes = list(dict.fromkeys(table["class"]))
    for threshold, rows in table.groupby("threshold"):
        for k, (method, cells) in enumerate(rows.groupby("method", sort=False)):
            ours, interval, paper = _triple(cells.set_index("class").loc[classes])
            lines.append([f"{threshold:g}" if k == 0 else "", METHODS.get(method, method), *ours])
            lines += [["", "95 % interval", *interval], ["", "paper", *paper]]
    floor = table.groupby("class")["floor"].mean()
    lines.append(["any", "empty mask", *(number_text(floor[name], 3) for name in classes)])
    return ["T", "Method"], [class_name(name) for name in classes], lines


def _triple(rows: pd.DataFrame) -> list[list[str]]:
    value, paper = ([number_text(number, 3) for number in rows[name]] for name in ("value", "paper"))
    return [value, [bounds_text(low, high, 3) for low, high in zip(rows["ci_low"], rows["ci_high"])], paper]


def _number(table: pd.DataFrame) -> int:
    if "paper" not in table or not ({"dataset", "model"} <= set(table) or {"reading", "threshold"} <= set(table)):
        raise ValueError(f"not a frame of table1 or table2: its columns are {', '.join(map(str, table.columns))}")
    return 2 if "reading" in table else 1


def _counted(table: pd.DataFrame, one: str, many: str, suffix: str = "") -> list[str]:
    return [f"Over {range_text(table['n'], one, many)}{suffix}."] if table["n"].notna().any() else []


def _checked(frame: pd.DataFrame, key: list[str], values: list[str], data_label: str) -> pd.DataFrame:
    """`frame` with only `values`, indexed by `key`."""
    check_label(data_label)
    check_frame(frame, key, values)
    return frame.set_index(key)[values]
