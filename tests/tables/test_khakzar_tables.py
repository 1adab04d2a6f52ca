import numpy as np
import pandas as pd
import pytest

from lib import tables
from lib.tables import layout
from tests.tables.latex import latex_problems

PHANTOM = "Simulated phantom films, not patients"
INTERVAL = "percentile bootstrap over patients, 2000 replicates"


def paper_as_results(number: int, width: float = 0.02) -> pd.DataFrame:
    """The paper's table as if it were ours, with intervals of +- width."""
    printed = tables.read_published(number)
    return printed.assign(ci_low=printed["value"] - width, ci_high=printed["value"] + width, n=166)


def differences(metric: str, values: list[float], half_width: float = np.nan) -> pd.DataFrame:
    losses = ("wbce", "focal", "cb_focal")
    runs = [(task, backbone, loss, metric) for task in tables.TASKS for backbone in tables.BACKBONES for loss in losses]
    frame = pd.DataFrame(runs[: len(values)], columns=["task", "backbone", "loss", "metric"]).assign(difference=values)
    return frame.assign(ci_low=frame["difference"] - half_width, ci_high=frame["difference"] + half_width)


def row(checked: pd.DataFrame, metric: str, statement: int | None = None) -> pd.Series:
    return checked[(checked["metric"] == metric) & (checked["statement"] == (statement or checked["statement"]))].iloc[
        0
    ]


@pytest.mark.parametrize(("number", "metrics"), [(1, ("iobb", "ior")), (2, ("disjoint", "unique"))])
def test_published_tables_are_complete(number, metrics):
    printed = tables.read_published(number)
    expected = pd.MultiIndex.from_product([tables.TASKS, tables.BACKBONES, tables.LOSSES, metrics])
    assert len(printed) == 32
    assert set(printed[["task", "backbone", "loss", "metric"]].itertuples(index=False, name=None)) == set(expected)
    assert printed["value"].notna().all() and (printed["value"] > 0).all()


def test_table_keeps_the_papers_order_and_values():
    table = tables.table1(paper_as_results(1).sample(frac=1, random_state=0), data_label=PHANTOM)
    assert list(table.columns) == [
        "data",
        "task",
        "backbone",
        "loss",
        "metric",
        "value",
        "ci_low",
        "ci_high",
        "n",
        "n_skipped",
        "seeds",
        "paper",
    ]
    assert len(table) == 32 and (table["data"] == PHANTOM).all()
    assert np.array_equal(table["value"], table["paper"])
    first = table.iloc[0]
    assert first[["task", "backbone", "loss", "metric", "paper"]].tolist() == [
        "multilabel",
        "tdensenet",
        "bce",
        "iobb",
        0.2105,
    ]
    assert (table["n_skipped"] == 0).all() and (table["seeds"] == 1).all() and (table["n"] == 166).all()


@pytest.mark.parametrize("number", [1, 2])
def test_skipped_records_are_kept_and_said(number):
    make = (tables.table1, tables.table2)[number - 1]
    results = paper_as_results(number).assign(n_skipped=0)
    results.loc[[0, 5, 30], "n_skipped"] = [3, 1, 12]
    results.loc[[0, 5, 30], "n"] = [163, 165, 154]
    shuffled = results.sample(frac=1, random_state=1)
    table = make(shuffled, data_label=PHANTOM)
    key = ["task", "backbone", "loss", "metric"]
    merged = table.merge(results, on=key, suffixes=("", "_given"), validate="1:1")
    assert (
        len(merged) == 32
        and (merged["n_skipped"] == merged["n_skipped_given"]).all()
        and (merged["n"] == merged["n_given"]).all()
    )
    said = "In 3 cells up to 12 are undefined and left out"
    for text in (
        tables.caption(table, INTERVAL),
        tables.to_markdown(table, interval=INTERVAL),
        tables.to_latex(table, interval=INTERVAL),
    ):
        assert said in text and "154 to 166" in text
    assert latex_problems(tables.to_latex(table, interval=INTERVAL)) == []
    for none in (results.assign(n_skipped=0), results.drop(columns="n_skipped")):
        assert "undefined" not in tables.caption(make(none, data_label=PHANTOM), INTERVAL)
    some = make(
        results.drop(index=[30]), data_label=PHANTOM
    )  # a run that is not there skips nothing, and is not counted
    assert some["n_skipped"].isna().sum() == 1 and "In 2 cells up to 3 are undefined" in tables.caption(some, INTERVAL)


def test_missing_runs_are_dashes_in_every_form():
    some = paper_as_results(2).query("task == 'binary' and loss != 'focal'")
    table = tables.table2(some, data_label=PHANTOM)
    assert table["value"].notna().sum() == 12 and table["paper"].notna().all()
    markdown, latex = tables.to_markdown(table, interval=INTERVAL), tables.to_latex(table, interval=INTERVAL)
    focal = next(line for line in markdown.splitlines() if line.startswith("| **Focal**"))
    assert focal.count("—") == 8
    assert next(line for line in latex.splitlines() if line.startswith("Focal &")).count("---") == 8
    assert "no such run" in markdown and "no such run" in latex


def test_no_run_at_all():
    empty = paper_as_results(1).iloc[:0]
    table = tables.table1(empty, data_label=PHANTOM)
    assert table["value"].isna().all() and len(table) == 32
    assert PHANTOM in tables.to_markdown(table, interval=INTERVAL)
    assert r"\end{table*}" in tables.to_latex(table, interval=INTERVAL)


def test_nan_interval_is_a_dash_and_the_mean_stays():
    results = paper_as_results(1)
    results.loc[0, ["ci_low", "ci_high"]] = np.nan
    lines = tables.to_markdown(tables.table1(results, data_label=PHANTOM), interval=INTERVAL).splitlines()
    bce = next(i for i, line in enumerate(lines) if line.startswith("| **BCE**"))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[bce : bce + 3]]
    assert [line[1] for line in cells] == ["0.210", "—", "0.2105"]
    assert [line[2] for line in cells] == ["0.295", "0.275–0.315", "0.2951"]


def test_cells_have_the_decimals_of_their_table():
    table = tables.table2(paper_as_results(2, width=3.25), data_label=PHANTOM)
    text = tables.to_markdown(table, interval=INTERVAL)
    assert " 217.0 |" in text and "213.8–220.2" in text and " 217 |" in text


def test_markdown_is_rectangular_and_labelled():
    text = tables.to_markdown(tables.table1(paper_as_results(1), data_label=PHANTOM), interval=INTERVAL)
    body = [line for line in text.splitlines() if line.startswith("|")]
    assert (
        len(body) == 4 + 3 * 4 and {line.count("|") for line in body} == {10} and len({len(line) for line in body}) == 1
    )
    assert PHANTOM in text and INTERVAL in text and "166 pairs of film and class" in text and "1 seed a run" in text


def test_other_losses_and_backbones_are_appended():
    extra = paper_as_results(1).iloc[:2].assign(backbone="convnext_tiny", loss="my_loss", seeds=3)
    table = tables.table1(pd.concat([paper_as_results(1).assign(seeds=3), extra]), data_label=PHANTOM)
    assert len(table) == 2 * 3 * 5 * 2
    assert table.query("backbone == 'convnext_tiny'")["paper"].isna().all()
    text = tables.to_latex(table, interval=INTERVAL)
    assert (
        r"my\_loss &" in text
        and r"\multicolumn{2}{c}{convnext\_tiny}" in text
        and r"\begin{tabular}{lcccccccccccc}" in text
    )
    assert "3 seeds a run" in text


def test_the_paper_has_no_line_beside_what_it_does_not_have():
    results = paper_as_results(1)
    control = results[results["loss"] == "bce"].assign(loss="untrained")
    table = tables.table1(pd.concat([results, control]), data_label=PHANTOM)
    lines = [line for line in tables.to_markdown(table, interval=INTERVAL).splitlines() if line.startswith("|")]
    labels = [line.split("|")[1].strip() for line in lines]
    assert labels[-5:] == ["**CB-Focal**", "95 % interval", "paper", "**Untrained**", "95 % interval"]
    assert tables.to_latex(table, interval=INTERVAL).count("paper &") == 4


@pytest.mark.parametrize("drop", [0, 5, 31])
def test_latex_is_well_formed(drop):
    results = paper_as_results(1).iloc[drop:]
    text = tables.to_latex(
        tables.table1(results, data_label=r"100 % of my_data & {more} #1 $x$ ~^ \ "), interval="95 % by_patient"
    )
    assert latex_problems(text) == []
    assert r"100\,\% of my\_data \& \{more\} \#1 \$x\$ \textasciitilde{}\textasciicircum{} \textbackslash{}" in text
    assert all(
        rule in text for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\caption{", r"\label{tab:alignment}")
    )


def test_headings_span_neighbours_that_agree_so_far():
    """Two tasks with a backbone each of one name: the backbones must not be joined across the tasks."""
    head = [["Task", "A", "A", "A", "B"], ["Model", "x_1", "x_1", "y", "y"], ["Metric", "a", "b", "a", "a"]]
    text = layout.latex(
        head,
        layout.tex_body([("**one**", list("1234")), ("sub", list("5678")), ("**two**", ["**9**", "—", "–", "0"])]),
        caption="of 5 %",
        label="x",
        gap=4,
    )
    assert latex_problems(text) == []
    assert [line for line in text.splitlines() if "&" in line or "rule(lr)" in line or "space" in line] == [
        r"Task & \multicolumn{3}{c}{A} & \multicolumn{1}{c}{B} \\",
        r"\cmidrule(lr){2-4}\cmidrule(lr){5-5}",
        r"Model & \multicolumn{2}{c}{x\_1} & \multicolumn{1}{c}{y} & \multicolumn{1}{c}{y} \\",
        r"\cmidrule(lr){2-3}\cmidrule(lr){4-4}\cmidrule(lr){5-5}",
        r"Metric & a & b & a & a \\",
        r"\textbf{one} & 1 & 2 & 3 & 4 \\",
        r"\quad sub & 5 & 6 & 7 & 8 \\",
        r"\addlinespace",
        r"\textbf{two} & \textbf{9} & --- & -- & 0 \\",
    ]
    assert (
        r"\setlength{\tabcolsep}{4pt}" in text and r"\caption{of 5\,\%}" in text and r"\begin{tabular}{lcccc}" in text
    )


def test_text_of_cells():
    assert [layout.number_text(value, 2) for value in (0.126, -3, np.nan, np.inf)] == ["0.13", "-3.00", "—", "—"]
    assert (
        layout.bounds_text(-0.5, 1, 1, " to ") == "-0.5 to 1.0"
        and layout.bounds_text(np.nan, 1, 1) == layout.bounds_text(0, np.nan, 1) == "—"
    )
    for values, expected in (
        ([1], "1 film"),
        ([0, 0], "0 films"),
        ([8, 1306], "8 to 1,306 films"),
        ([0, 1], "0 to 1 films"),
        ([], "an unknown number of films"),
    ):
        assert layout.range_text(pd.Series(values, dtype=float), "film", "films") == expected
    assert [layout.of_cells(*pair) for pair in ((1, 1), (0, 1), (3, 3), (0, 3), (2, 3))] == [
        "the only cell",
        "none of 1 cell",
        "all 3 cells",
        "none of 3 cells",
        "2 of 3 cells",
    ]


def test_bad_frames_are_named():
    results = paper_as_results(1)
    with pytest.raises(ValueError, match="binary tdensenet bce iobb .*more than once"):
        tables.table1(pd.concat([results, results.query("task == 'binary'")]), data_label=PHANTOM)
    with pytest.raises(ValueError, match="no column ci_low"):
        tables.table1(results.drop(columns="ci_low"), data_label=PHANTOM)
    with pytest.raises(ValueError, match="data_label"):
        tables.table1(results, data_label=" ")
    with pytest.raises(ValueError, match="its metrics are iobb"):
        tables.to_markdown(tables.table1(results, data_label=PHANTOM).query("metric == 'iobb'"), interval=INTERVAL)
    with pytest.raises(ValueError, match="margin"):
        tables.statements(tables.differences_to_bce(results), margin=0)


def test_long_metrics():
    wide = pd.DataFrame(
        {
            "loss": ["bce", "focal"],
            "class": "Mass",
            "prevalence": 0.1,
            "auroc": [0.7, 0.8],
            "auroc_ci_low": [0.6, 0.7],
            "auroc_ci_high": [0.8, 0.9],
            "ap": [0.2, np.nan],
        }
    )
    long = tables.long_metrics(wide, ("auroc", "ap"))
    assert list(long.columns) == ["loss", "class", "prevalence", "metric", "value", "ci_low", "ci_high"]
    assert long["metric"].tolist() == ["auroc", "auroc", "ap", "ap"] and long["value"].tolist()[:3] == [0.7, 0.8, 0.2]
    assert long["ci_high"].tolist()[:2] == [0.8, 0.9] and long["ci_low"].iloc[2:].isna().all()


def test_differences_to_bce():
    found = tables.differences_to_bce(tables.read_published(2)).set_index(["task", "backbone", "loss", "metric"])
    assert len(found) == 24
    assert found.loc[("multilabel", "resnet50", "focal", "unique"), "difference"] == 570 - 328
    without = tables.read_published(2).query("not (task == 'binary' and backbone == 'resnet50' and loss == 'bce')")
    assert len(tables.differences_to_bce(without)) == 18


def test_statements_of_the_papers_own_tables():
    """Counted by hand in Tables 1 and 2: IoBB up in 8, IoR down in 10, both in 7; Disjoint up in 11, Unique in 12."""
    ours = tables.differences_to_bce(pd.concat([tables.read_published(1), tables.read_published(2)]))
    checked = tables.statements(ours)
    counted = {metric: (8, 10, 11, 12)[i] for i, metric in enumerate(("iobb", "ior", "disjoint", "unique"))}
    for metric, count in counted.items():
        assert (row(checked, metric)["paper_holds"], row(checked, metric)["holds"], row(checked, metric)["cells"]) == (
            count,
            count,
            12,
        )
        assert row(checked, metric)["intervals"] == 0
    assert row(checked, "both", 3)["paper_holds"] == 7 and row(checked, "both", 4)["paper_holds"] == 11
    assert row(checked, "mean_probability")["paper_cells"] == 0 and row(checked, "auroc")["paper_cells"] == 0


def test_statements_direction_and_intervals():
    up = [0.05, 0.01, -0.05, 0.0, 0.02, np.nan]
    checked = tables.statements(
        pd.concat([differences("iobb", up, 0.015), differences("ior", [-x for x in up], 0.015)])
    )
    for metric in ("iobb", "ior"):
        found = row(checked, metric)
        assert found[["cells", "holds", "intervals", "supported", "contradicted", "excludes_zero"]].tolist() == [
            5,
            3,
            5,
            2,
            1,
            3,
        ]
    assert row(checked, "both", 3)[["cells", "holds", "supported", "contradicted"]].tolist() == [5, 3, 2, 1]


def test_statement_of_equivalence_uses_the_margin():
    frame = differences("auroc", [0.0, 0.015, -0.02, 0.03, 0.05, -0.05], 0.01)
    found = row(tables.statements(frame, margin=0.02), "auroc")
    assert found[["cells", "holds", "intervals", "supported", "contradicted", "excludes_zero"]].tolist() == [
        6,
        3,
        6,
        1,
        2,
        5,
    ]
    assert row(tables.statements(frame, margin=0.1), "auroc")["supported"] == 6


def test_some_intervals_missing():
    frame = differences("unique", [1.0, 2.0, 3.0], 0.5)
    frame.loc[0, ["ci_low", "ci_high"]] = np.nan
    found = row(tables.statements(frame), "unique")
    assert found[["cells", "holds", "intervals", "supported"]].tolist() == [3, 3, 2, 2]
    assert "(of 2 with one)" in tables.statement_sentences(tables.statements(frame))[3]


def test_bce_rows_and_other_metrics_are_left_out():
    frame = pd.concat(
        [differences("unique", [1.0]), differences("brier", [1.0]), differences("unique", [1.0]).assign(loss="bce")]
    )
    assert row(tables.statements(frame), "unique")["cells"] == 1


def test_sentences_follow_the_numbers():
    frame = pd.concat(
        [
            differences("auroc", [0.0] * 12, 0.01),
            differences("ap", [0.0] * 11 + [0.5], 0.01),
            differences("mean_probability", [0.2]),
            differences("disjoint", [-1.0] * 12),
            differences("unique", [1.0] * 12),
        ]
    )
    first, second, third, fourth = tables.statement_sentences(tables.statements(frame, margin=0.03))
    assert "holds in 11 of 12 cells" in first and "AUROC is within 0.03 of BCE's in all 12 cells" in first
    assert "lies within that margin in 12, wholly outside it in none." in first and "wholly outside it in 1." in first
    assert "Fig. 2 only" in first and "Fig. 2 only" in second
    assert "holds in the only cell" in second and "higher than BCE's in the only cell (no intervals)" in second
    assert (
        "cannot be checked" in third and "IoBB in 8 of 12 cells, IoR in 10 of 12 cells, both in 7 of 12 cells" in third
    )
    assert "holds in none of 12 cells" in fourth and "Unique in all 12 cells" in fourth


def test_sentences_without_any_run():
    empty = differences("auroc", [])
    assert len(tables.statement_sentences(tables.statements(empty))) == 4
