"""What is said of verdicts: every count and number from the frame."""

import numpy as np
import pandas as pd

from lib import tables


def judged():
    cells = [
        ("iobb_up", "wbce", 0.2, 0.1, 0.3, "different", "holds"),
        ("iobb_up", "focal", -0.1, -0.2, -0.05, "different", "contradicted"),
        ("auroc_alike", "wbce", 0.001, -0.01, 0.012, "undecided", "undecided"),
    ]
    frame = pd.DataFrame(cells, columns=["claim", "loss", "point", "low", "high", "verdict", "outcome"])
    up = frame["claim"] == "iobb_up"
    return frame.assign(
        source="Khakzar et al.",
        says=np.where(up, "losses fill more of the box", "AUROC is alike"),
        metric=np.where(up, "iobb", "auroc"),
        against="bce",
        expected=np.where(up, "higher", "equivalent"),
        margin=np.where(up, np.nan, 0.02),
        confirmatory=[True, True, False],
        df=[4.0, 3.2, np.inf],
        n_seeds=3,
        n_baseline=2,
        n_patients=11,
        detectable=[0.1, 0.05, 0.02],
        seeds=[True, True, False],
        task="multilabel",
        backbone="tdensenet",
    )


def test_a_claim_counts_its_cells():
    table = tables.claim_table(judged()).set_index("claim")
    counts = table.loc["iobb_up", ["cells", "holds", "contradicted", "undecided"]]
    assert counts.tolist() == [2, 1, 1, 0]
    assert table.loc["iobb_up", ["least", "largest"]].tolist() == [-0.1, 0.2]
    assert (
        table.loc["iobb_up", "detectable"] == 0.1
        and table.loc["iobb_up", "seeds"]
        and not table.loc["auroc_alike", "seeds"]
    )


def test_sentences_say_what_is_missing():
    up, alike = tables.claim_sentences(judged())
    assert up == (
        "**Losses fill more of the box** (Khakzar et al.): 2 deciding cells: holds in 1, contradicted in 1; "
        "differences -0.100 to +0.200, median +0.050; 0.100 could have been shown."
    )
    assert "within 0.02 is called equivalent" in alike and "the chance of training is not in it" in alike
    assert "1 explored cell: undecided in 1; difference +0.001" in alike
    alone = judged().iloc[2:].assign(margin=np.nan)
    assert "no margin is fixed" in tables.claim_sentences(alone)[0]


def test_cells_that_decide_and_those_explored_are_counted_apart():
    one = judged().assign(confirmatory=[False, True, False])
    table = tables.claim_table(one)
    assert table[["claim", "confirmatory", "cells", "holds", "contradicted"]].values.tolist() == [
        ["iobb_up", True, 1, 0, 1], ["iobb_up", False, 1, 1, 0], ["auroc_alike", False, 1, 0, 0]
    ]  # fmt: skip


def test_every_cell_is_a_line_with_its_way():
    lines = tables.cells_markdown(judged(), ["task", "backbone", "loss"]).splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 2 + 3
    assert "IoBB against BCE" in lines[2] and "higher" in lines[2] and "0.100–0.300" in lines[2] and "holds" in lines[2]
    head, first, last = ([part.strip() for part in lines[k].split("|")] for k in (0, 2, 4))
    found = dict(zip(head, first))
    wanted = {
        "Seeds": "3 + 2",
        "Patients": "11",
        "df": "4.0",
        "Could be shown": "0.100",
        "Margin": "—",
        "Decides": "yes",
    }
    assert {name: found[name] for name in wanted} == wanted
    assert dict(zip(head, last))["df"] == "—" and dict(zip(head, last))["Decides"] == "no" and len(set(head)) == 16
    assert " lower " in lines[3] and "contradicted" in lines[3] and lines[4].count("undecided") == 2


def test_readings_have_a_row_a_run_and_a_column_a_score():
    means = pd.DataFrame(
        [("multilabel", "tdensenet", loss, metric, value) for loss, metric, value in
         [("bce", "empty", 0.5), ("bce", "hit", 0.25), ("untrained", "empty", 0.0), ("untrained", "hit", np.nan)]],
        columns=["task", "backbone", "loss", "metric", "value"],
    ).assign(n=1230, n_skipped=0)  # fmt: skip
    lines = tables.readings_markdown(means, "Below.").splitlines()
    assert lines[0].split("|")[4].strip() == "Empty maps" and "Hit rate" in lines[0]
    assert "0.500" in lines[2] and "0.250" in lines[2] and "Untrained" in lines[3] and "—" in lines[3]
    assert "Below." in lines
    means.loc[1, "n_skipped"], means["metric"] = 5, means["metric"].replace({"empty": "ior_zero", "hit": "ior"})
    text = tables.readings_markdown(means, "Below.")
    assert "IoR, empty maps as 0" in text and "0.250 (1,230)" in text and text.count("(1,230)") == 1
    assert "Below. In brackets: of so many pairs" in text
