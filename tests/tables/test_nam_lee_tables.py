from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from lib import tables
from lib.tables import nam_lee
from tests.tables.latex import latex_problems

PHANTOM = "Simulated phantom films, not patients"
INTERVAL = "percentile bootstrap over patients, 2000 replicates"
CLASSES = ["Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax"]


def paper_as_means(width=0.02):
    """The paper's Table 2 as if it were ours under both readings; n differs by class."""
    printed = nam_lee.read_published(2).rename(columns={"mean_iou": "value"})
    means = pd.concat([printed.assign(reading=reading) for reading in nam_lee.READINGS], ignore_index=True)
    n = means["class"].map({name: 80 + 10 * k for k, name in enumerate(CLASSES)})
    floor = np.where(means["reading"] == "mean_iou", 0.45, 0.0)
    gain = means["value"] - floor
    return means.assign(
        ci_low=means["value"] - width,
        ci_high=means["value"] + width,
        n=n,
        n_skipped=0,
        n_unstable=0,
        floor=floor,
        gain=gain,
        gain_low=gain - width,
        gain_high=gain + width,
    )


def paper_as_differences(width=np.nan):
    wide = nam_lee.read_published(2).pivot(index=["class", "threshold"], columns="method", values="mean_iou")
    parts = [
        (wide[method] - wide["cam"]).rename("difference").reset_index().assign(method=method, reading=reading)
        for reading in nam_lee.READINGS
        for method in ("lrp", "rap")
    ]
    frame = pd.concat(parts, ignore_index=True)
    return frame.assign(ci_low=frame["difference"] - width, ci_high=frame["difference"] + width, n=100)


def auroc(models=("vgg16", "densenet121"), name="Pneumonia"):
    return pd.DataFrame({"model": models, "class": name, "value": 0.8, "ci_low": 0.75, "ci_high": 0.85, "n": 300})


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


# --- the printed tables


def test_published_tables_are_complete():
    first, second = nam_lee.read_published(1), nam_lee.read_published(2)
    assert first.groupby("dataset").size().to_dict() == {"nih": 8, "rsna": 4}
    assert len(second) == 5 * 3 * 8 and not second.duplicated(["threshold", "method", "class"]).any()
    assert set(second["method"]) == set(nam_lee.METHODS) and set(second["class"]) == set(CLASSES)
    assert second.query("threshold == 0.1 and method == 'rap' and `class` == 'Cardiomegaly'")["mean_iou"].tolist() == [
        0.754
    ]
    assert tables.nam_lee is nam_lee


def test_table2_keeps_the_papers_order_and_values():
    table = nam_lee.table2(paper_as_means().sample(frac=1, random_state=0), data_label=PHANTOM)
    assert list(table.columns) == [
        "data",
        "reading",
        "threshold",
        "method",
        "class",
        "value",
        "ci_low",
        "ci_high",
        "n",
        "n_skipped",
        "n_unstable",
        "floor",
        "paper",
    ]
    assert len(table) == 240 and (table["data"] == PHANTOM).all() and np.array_equal(table["value"], table["paper"])
    expected = [
        (r, t, m, c)
        for r in ("mean_iou", "iou_lesion")
        for t in (0.1, 0.2, 0.3, 0.4, 0.5)
        for m in ("cam", "lrp", "rap")
        for c in CLASSES
    ]
    assert list(table[["reading", "threshold", "method", "class"]].itertuples(index=False, name=None)) == expected


@pytest.mark.parametrize("reading", list(nam_lee.READINGS))
def test_table2_in_markdown(reading):
    text = nam_lee.to_markdown(nam_lee.table2(paper_as_means(), data_label=PHANTOM), interval=INTERVAL, reading=reading)
    rows = cells(text)
    assert rows[0] == ["T", "Method", *CLASSES] and len(rows) == 2 + 5 * 3 * 3 + 1
    assert len({len(line) for line in text.splitlines() if line.startswith("|")}) == 1
    assert (
        rows[2][:3] == ["0.1", "CAM", "0.243"]
        and rows[3][:3] == ["", "95 % interval", "0.223–0.263"]
        and rows[4][1:3] == ["paper", "0.243"]
    )
    assert rows[-1][:3] == ["any", "empty mask", "0.450" if reading == "mean_iou" else "0.000"]
    for said in (
        PHANTOM,
        INTERVAL,
        "80 to 150 pairs of film and class a class",
        "984 boxes in 880 films",
        "606",
        "does not say which IoU",
        {"mean_iou": "mean of lesion and background, by", "iou_lesion": "lesion alone, by"}[reading],
        {"mean_iou": "(1 - box area) / 2", "iou_lesion": "marks nothing gets, 0."}[reading],
    ):
        assert said in text
    assert "not measured" not in text and "undefined" not in text


def test_missing_further_and_undefined_cells():
    means = paper_as_means().query("method != 'lrp' and `class` in ['Mass', 'Nodule']")
    edema, low = (
        means[means["class"] == "Mass"].assign(**{"class": "Edema"}),
        means[means["threshold"] == 0.1].assign(threshold=0.05),
    )
    means = pd.concat([means, edema, low], ignore_index=True).assign(n_skipped=3)
    means.loc[0, ["ci_low", "ci_high"]] = np.nan
    table = nam_lee.table2(means, data_label=PHANTOM)
    assert len(table) == 2 * 6 * 3 * 9 and table.query("`class` == 'Edema'")["paper"].isna().all()
    assert (
        table.query("method == 'lrp'")["value"].isna().all() and table.query("threshold == 0.05")["paper"].isna().all()
    )
    text = nam_lee.to_markdown(table, interval=INTERVAL)
    rows = cells(text)
    assert (
        rows[0][-1] == "Edema"
        and rows[2][0] == "0.05"
        and all(cell == "—" for cell in next(row for row in rows if row[1] == "LRP")[2:])
    )
    assert "—: not measured." in text and "Up to 3 a cell are undefined and left out." in text
    refused = nam_lee.table2(means.assign(n_unstable=[2] + [1] * (len(means) - 1)), data_label=PHANTOM)
    assert refused["n_unstable"].max() == 2
    assert "Up to 3 a cell are undefined (2 for want of a stable map) and left out." in nam_lee.caption(
        refused, INTERVAL
    )
    empty = nam_lee.table2(paper_as_means().head(0), data_label=PHANTOM)
    assert empty["value"].isna().all() and "Over" not in nam_lee.caption(empty, INTERVAL)


@pytest.mark.parametrize("dataset", ["rsna", "nih"])
def test_table1(dataset):
    table = nam_lee.table1(auroc(("vgg16", "chexnet", "mine")), data_label=PHANTOM, dataset=dataset)
    printed = nam_lee.read_published(1).query("dataset == @dataset")
    assert list(table.columns) == ["data", "dataset", "model", "class", "value", "ci_low", "ci_high", "n", "paper"]
    np.testing.assert_array_equal(table["paper"].iloc[: len(printed)], printed["auroc"])
    rows = cells(nam_lee.to_markdown(table, interval=INTERVAL))
    assert [row[0] for row in rows if row[0][0] != "-"] == ["AUROC", "ours", "95 % interval", "paper"]
    if dataset == "rsna":
        assert rows[0][1:] == ["DenseNet-121", "ResNet-50", "VGG-16", "CheXNet", "mine"]
        assert rows[2][1:] == ["—", "—", "0.800", "0.800", "0.800"] and rows[4][1:] == [
            "0.858",
            "0.845",
            "0.842",
            "0.827",
            "—",
        ]
        assert rows[3][3] == "0.750–0.850" and "also those of another abnormality" in nam_lee.caption(table, INTERVAL)
    else:
        assert (
            table["class"].tolist()[:8] == CLASSES and table["value"].notna().sum() == 3
        )  # two models the paper has not on NIH, appended
        assert "CheXNet Pneumothorax" in rows[0] and "RSNA" not in nam_lee.caption(table, INTERVAL)
    assert "300 films" in nam_lee.caption(table, INTERVAL) and PHANTOM in nam_lee.caption(table, INTERVAL)


def test_latex_is_well_formed():
    label = r"100 % of my_data & {more} #1 $x$ ~^ \ "
    for reading in nam_lee.READINGS:
        text = nam_lee.to_latex(
            nam_lee.table2(paper_as_means(), data_label=label), interval="95 % by_patient", reading=reading
        )
        assert latex_problems(text) == []
        assert r"100\,\% of my\_data \& \{more\} \#1" in text and r"\begin{tabular}{llcccccccc}" in text
        assert text.count(r"\addlinespace") == 5 and rf"\label{{tab:attribution-{reading.replace('_', '-')}}}" in text
    text = nam_lee.to_latex(nam_lee.table1(auroc(), data_label=label), interval="b")
    assert latex_problems(text) == [] and r"\label{tab:model-auroc}" in text and "DenseNet-121 & ResNet-50" in text


def test_bad_frames_are_named():
    means = paper_as_means()
    with pytest.raises(ValueError, match="mean_iou 0.1 cam Atelectasis is in the frame more than once"):
        nam_lee.table2(pd.concat([means, means]), data_label=PHANTOM)
    with pytest.raises(ValueError, match="no column floor; it has"):
        nam_lee.table2(means.drop(columns="floor"), data_label=PHANTOM)
    for make, frame in ((nam_lee.table2, means), (nam_lee.table1, auroc())):
        with pytest.raises(ValueError, match="data_label is empty"):
            make(frame, data_label="")
    with pytest.raises(ValueError, match="dataset = 'mimic': one of rsna, nih"):
        nam_lee.table1(auroc(), data_label=PHANTOM, dataset="mimic")
    with pytest.raises(ValueError, match="reading = 'iou': one of mean_iou, iou_lesion"):
        nam_lee.to_markdown(nam_lee.table2(means, data_label=PHANTOM), interval=INTERVAL, reading="iou")
    with pytest.raises(ValueError, match="not a frame of table1 or table2: its columns are reading"):
        nam_lee.to_latex(means[["reading", "class"]], interval=INTERVAL)


# --- in words


def test_verdicts_on_the_papers_own_table():
    """By a loop over the printed cells: LRP is above CAM in 36 of 40, RAP in 38 (not for Cardiomegaly at the higher
    thresholds)."""
    by_hand = {"lrp": 0, "rap": 0}
    rows = {(r.threshold, r.method, r[3]): r.mean_iou for r in nam_lee.read_published(2).itertuples()}
    for (threshold, method, name), value in rows.items():
        if method != "cam":
            by_hand[method] += value > rows[threshold, "cam", name]
    checked = nam_lee.verdicts(paper_as_differences())
    assert len(checked) == 4 and (checked["against"] == "CAM").all()
    for row in checked.itertuples():
        told = row.reading == "mean_iou"  # the paper's numbers fit that reading only
        assert row.cells == 40 and row.higher == by_hand[row.method] and row.intervals == 0
        assert (row.paper_cells, row.paper_higher) == ((40, by_hand[row.method]) if told else (0, 0))
    assert by_hand == {"lrp": 36, "rap": 38}
    for text, reading in zip(nam_lee.sentences(checked), checked["reading"], strict=True):
        assert "(no intervals)" in text and ("In the paper's Table 2: 3" in text) == (reading == "mean_iou")


def test_verdicts_direction_and_intervals():
    frame = pd.DataFrame(
        {"difference": [0.1, 0.02, -0.1, -0.02, 0.0, np.nan, 0.3], "threshold": 0.1, "class": list("abcdefg")}
    )
    frame = frame.assign(
        reading="iou_lesion", method="lrp", ci_low=frame["difference"] - 0.05, ci_high=frame["difference"] + 0.05
    )
    frame.loc[6, ["ci_low", "ci_high"]] = np.nan
    checked = nam_lee.verdicts(frame)
    assert checked.loc[0, ["cells", "higher", "intervals", "supported", "contradicted"]].tolist() == [6, 3, 5, 1, 1]
    [text] = nam_lee.sentences(checked)
    assert text.startswith("**LRP against CAM, lesion alone**: higher in 3 of 6 cells")
    assert "wholly above zero in 1 (of 5 with one), wholly below in 1." in text
    other = nam_lee.verdicts(frame.assign(method="mine"))
    assert (
        other.loc[0, ["paper_cells", "paper_higher"]].tolist() == [0, 0] and "paper" not in nam_lee.sentences(other)[0]
    )
    assert nam_lee.sentences(nam_lee.verdicts(frame.iloc[[5]])) == [
        "**LRP against CAM, lesion alone**: no cell to compare."
    ]
    assert len(nam_lee.verdicts(frame.head(0))) == 0


def test_verdicts_against_an_empty_mask():
    means = paper_as_means()
    checked = nam_lee.verdicts(paper_as_differences(0.01), means)
    found = checked[checked["against"] == "an empty mask"].set_index("method")
    assert (
        list(found.index) == ["cam", "lrp", "rap"]
        and (found["reading"] == "mean_iou").all()
        and (found["cells"] == 40).all()
    )
    values = means[(means["reading"] == "mean_iou") & (means["method"] == "cam")]["value"]
    assert (
        found.loc["cam", "supported"] == (values - 0.02 > 0.45).sum()
        and found.loc["cam", "contradicted"] == (values + 0.02 < 0.45).sum()
    )
    text = next(text for text in nam_lee.sentences(checked) if "CAM against an empty mask" in text)
    assert f"higher in {(values > 0.45).sum()} of 40 cells" in text and "paper" not in text


def test_intention_in_words():
    rows = [
        ("vgg16", "lrp", "pneumonia", "boxes", 0.3, 0.25, 0.35, 0.1, 0.2, 0.15, 0.25, 60),
        ("vgg16", "lrp", "pneumonia", "lungs", 0.5, 0.45, 0.55, 0.6, -0.1, -0.15, -0.05, 60),
        ("vgg16", "rap", "pneumonia", "boxes", 0.05, 0.02, 0.08, 0.1, -0.05, -0.08, -0.02, 60),
        ("resnet50", "lrp", "pneumonia", "boxes", 0.12, 0.08, 0.16, 0.1, 0.02, -0.02, 0.06, 60),
        ("mine", "lrp", "pneumonia", "boxes", 0.9, np.nan, np.nan, 0.1, 0.8, np.nan, np.nan, 1),
        ("vgg16", "lrp", "normal", "boxes", *[np.nan] * 7, 0),
        ("vgg16", "lrp", "normal", "lungs", 0.6, 0.5, 0.7, 0.6, 0.0, -0.1, 0.1, 41),
        ("mine", "lrp", "normal", "boxes", *[np.nan] * 7, 0),
    ]
    columns = "model method kind region value ci_low ci_high area gain gain_low gain_high n".split()
    means = pd.DataFrame(rows, columns=columns).assign(n_unstable=0)
    gaps = pd.DataFrame(
        [("vgg16", "lrp", "pneumonia", 0.5, 0.2, 0.8, 60)],
        columns=["model", "method", "kind", "gap", "gap_low", "gap_high", "n"],
    )
    first, away, unsure, alone, normal, none = nam_lee.intention_sentences(means, gaps)
    assert first == (
        "**VGG-16, LRP, pneumonia**: over 60 films, of the positive relevance 30.0 % [25.0, 35.0] in the boxes, "
        "more than area gives (10.0 %); 50.0 % [45.0, 55.0] in the lungs, less than area gives (60.0 %). "
        "It is denser there than in the lungs as a whole, so the model looks where the lesions are, as intended."
    )
    lungs = nam_lee.intention_sentences(means, gaps.assign(gap_low=-0.8, gap_high=-0.2))[0]
    assert lungs.endswith("the model looks at lungs, not at lesions, not as intended.")
    assert nam_lee.intention_sentences(means, gaps.assign(gap_low=-0.1))[0].endswith(
        "it is not shown that it looks at lesions."
    )
    assert nam_lee.intention_sentences(means)[0].endswith("without lung masks the two cannot be told apart.")
    assert away.endswith("So the model looks elsewhere than at the lesions, not as intended.")
    assert "not told apart" in unsure and unsure.endswith(
        "So it is not shown that the model looks where the lesions are."
    )
    assert (
        alone.startswith("**mine, LRP, pneumonia**: over 1 film,")
        and "90.0 % in the boxes, on too few films to tell" in alone
        and "not shown" in alone
    )
    assert "60.0 % [50.0, 70.0] in the lungs" in normal and "boxes" not in normal and "41 films" in normal
    assert normal.endswith("So it is not shown that the model judges normal films by their lungs.")
    calm = means[(means["kind"] == "normal") & (means["region"] == "lungs")]
    [by_lungs] = nam_lee.intention_sentences(calm.assign(gain_low=0.1, gain_high=0.2))
    assert by_lungs.endswith("judges normal films by their lungs, as the paper reads its pictures.")
    [elsewhere] = nam_lee.intention_sentences(calm.assign(gain_low=-0.2, gain_high=-0.1))
    assert elsewhere.endswith("by something else than their lungs, not as the paper reads its pictures.")
    assert none == "**mine, LRP, normal**: no positive relevance, or no region but the whole film to look at."
    [few] = nam_lee.intention_sentences(means.iloc[[0]].assign(n=9))  # a bootstrap over so few patients says little
    assert "in the boxes, on too few films to tell it from what area gives (10.0 %)" in few and "not shown" in few
    whole = means.iloc[[0]].assign(region="outside", area=1.0, value=1.0)
    assert nam_lee.intention_sentences(whole) == [
        "**VGG-16, LRP, pneumonia**: no positive relevance, or no region but the whole film to look at."
    ]
    refused = nam_lee.intention_sentences(means.iloc[[2]].assign(n_unstable=4))
    assert "over 60 films (4 more without a stable map), of the positive relevance 5.0 %" in refused[0]
    [nothing] = nam_lee.intention_sentences(means.iloc[[2]].assign(n=0, n_unstable=64, value=np.nan))
    assert "no positive relevance (64 without a stable map), or" in nothing


def test_networks_are_named_by_what_tells_them_apart():
    def run(task, backbone, loss, seed):
        return SimpleNamespace(task=task, backbone=backbone, loss=loss, seed=seed)

    runs = [
        run("binary", "vgg16", "bce", 3),
        run("pneumonia", "vgg16", "bce", 3),
        run("pneumonia", "vgg16", "bce", 0),
        run("pneumonia", "resnet50", "cb_focal", 3),
        run("pneumonia", "resnet50", "cb_focal", 30),
    ]
    found = nam_lee.pneumonia_networks(runs)
    assert list(found) == ["vgg16", "vgg16-seed0", "resnet50-cb_focal", "resnet50-cb_focal-seed30"]
    assert list(found.values()) == runs[1:]
    for none in (runs[:1], []):
        with pytest.raises(ValueError, match="no run of this study has the task pneumonia"):
            nam_lee.pneumonia_networks(none)
    assert nam_lee.map_headings(["vgg16", "mine"], "rap") == ["VGG-16, RAP", "mine, RAP"]


def test_note_where_training_films_are_not_known():
    assert "`chexnet_train_list`" in nam_lee.training_note(pd.Series(["chosen on", "unknown"]))
    assert nam_lee.training_note(pd.Series(["chosen on", "not seen"])) == ""
