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
        margin=np.nan,
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
        "**Losses fill more of the box** (Khakzar et al.): 2 cells: holds in 1, contradicted in 1; differences -0.100 "
        "to +0.200, median +0.050; 0.100 could have been shown."
    )
    assert "no margin is fixed" in alike and "the chance of training is not in it" in alike
    assert "1 cell: undecided in 1; difference +0.001" in alike


def test_every_cell_is_a_line_with_its_way():
    lines = tables.cells_markdown(judged(), ["task", "backbone", "loss"]).splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 2 + 3
    assert "IoBB against BCE" in lines[2] and "higher" in lines[2] and "0.100–0.300" in lines[2] and "holds" in lines[2]
    assert " lower " in lines[3] and "contradicted" in lines[3] and lines[4].count("undecided") == 2


def test_readings_have_a_row_a_run_and_a_column_a_score():
    means = pd.DataFrame(
        [("multilabel", "tdensenet", loss, metric, value) for loss, metric, value in
         [("bce", "empty", 0.5), ("bce", "hit", 0.25), ("untrained", "empty", 0.0), ("untrained", "hit", np.nan)]],
        columns=["task", "backbone", "loss", "metric", "value"],
    )  # fmt: skip
    lines = tables.readings_markdown(means, "Below.").splitlines()
    assert lines[0].split("|")[4].strip() == "Empty maps" and "Hit rate" in lines[0]
    assert "0.500" in lines[2] and "0.250" in lines[2] and "Untrained" in lines[3] and "—" in lines[3]
    assert "Below." in lines
