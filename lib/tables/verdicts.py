"""The verdicts on the claims of the plan, as a table and in words; every number from the frame of `plan.judge`."""

import pandas as pd

from lib.tables.layout import bounds_text, markdown, number_text
from lib.tables.names import display


def claim_table(judged: pd.DataFrame) -> pd.DataFrame:
    """How often each claim holds and how large the differences are, the deciding cells apart from the explored ones.

    Parameters
    ----------
    judged : DataFrame
        Of `plan.judge`.

    Returns
    -------
    DataFrame
        claim, confirmatory, source, says, metric, against, expected, margin, cells, holds, contradicted, undecided,
        median, least and largest (of the differences), detectable (the largest over the cells, see
        `verdicts.detectable`), seeds (whether the chance of training is in every cell), equivalent (in how many).
        Deciding cells come first.
    """
    keys = ["claim", "confirmatory", "source", "says", "metric", "against", "expected"]
    rows = []
    for key, cells in judged.groupby(keys, sort=False):
        counts = cells["outcome"].value_counts()
        outcomes = {name: int(counts.get(name, 0)) for name in ("holds", "contradicted", "undecided")}
        sizes = {"median": "median", "least": "min", "largest": "max"}
        rows.append(
            dict(zip(keys, key))
            | {"margin": cells["margin"].iloc[0], "cells": len(cells)}
            | outcomes
            | {name: getattr(cells["point"], how)() for name, how in sizes.items()}
            | {"detectable": cells["detectable"].max(), "seeds": bool(cells["seeds"].all())}
            | {"equivalent": int((cells["verdict"] == "equivalent").sum())}
        )
    columns = [*keys, "margin", "cells", "holds", "contradicted", "undecided", "median", "least", "largest"]
    columns += ["detectable", "seeds", "equivalent"]
    return pd.DataFrame(rows, columns=columns).sort_values(
        "confirmatory", ascending=False, kind="stable", ignore_index=True
    )


def cells_markdown(judged: pd.DataFrame, cell: list[str], decimals: int = 3) -> str:
    """Every cell of every claim as a Markdown table: the difference with its interval, what that rests on, and the
    verdict.

    `cell` : the columns that tell the cells of a claim apart, such as task, backbone and loss.
    """
    head = ["Claim", "Expected", *(name.capitalize() for name in cell), "Difference", "95 % interval", "Seeds"]
    head += ["Patients", "df", "Could be shown", "Margin", "Verdict", "Outcome", "Decides"]
    lines = [
        [
            f"{display(row['metric'])} against {display(row['against'])}",
            row["expected"],
            *(display(str(row[name])) for name in cell),
            number_text(row["point"], decimals),
            bounds_text(row["low"], row["high"], decimals),
            " + ".join(str(int(row[name])) for name in ("n_seeds", "n_baseline") if not pd.isna(row.get(name))),
            str(int(row["n_patients"])),
            number_text(row["df"], 1),
            number_text(row["detectable"], decimals),
            number_text(row["margin"], decimals),
            answer(row),
            row["outcome"],
            "yes" if row["confirmatory"] else "no",
        ]
        for _, row in judged.iterrows()
    ]
    return markdown([head, *lines], "")


def answer(row: pd.Series) -> str:
    """The verdict on one cell in words: which way it differs, that it is equivalent, or that it is undecided."""
    if row["verdict"] != "different":
        return row["verdict"]
    return "higher" if row["point"] > 0 else "lower"


def claim_sentences(judged: pd.DataFrame) -> list[str]:
    """The frame of `claim_table` in words, a Markdown line a claim and kind of cell."""
    return [_sentence(row) for _, row in claim_table(judged).iterrows()]


def _sentence(row: pd.Series) -> str:
    outcomes = ", ".join(f"{name} in {row[name]}" for name in ("holds", "contradicted", "undecided") if row[name])
    least, largest, median = (_signed(row[name]) for name in ("least", "largest", "median"))
    parts = [
        f"{row['cells']} {'deciding' if row['confirmatory'] else 'explored'} cell{'s' if row['cells'] > 1 else ''}: "
        f"{outcomes}",
        f"difference {median}" if row["cells"] == 1 else f"differences {least} to {largest}, median {median}",
        f"{number_text(row['detectable'], 3)} could have been shown",
    ]
    if row["expected"] == "equivalent" or row["equivalent"]:
        fixed = f"within {row['margin']:g} is called equivalent"
        parts.append("no margin is fixed, so equivalence cannot be shown" if pd.isna(row["margin"]) else fixed)
    if not row["seeds"]:
        parts.append("the chance of training is not in it")
    return f"**{row['says'][0].upper()}{row['says'][1:]}** ({row['source']}): {'; '.join(parts)}."


def _signed(value: float) -> str:
    return "undefined" if pd.isna(value) else f"{value:+.3f}"


def readings_markdown(means: pd.DataFrame, caption: str) -> str:
    """Every reading of the maps as a Markdown table: a row a run or control, a column a score.

    `means` : of `comparison.record_means`, with the scores in the order of the columns. Where some pairs have no score
    the number of those that have follows it.
    """
    keys, scores = ["task", "backbone", "loss"], list(dict.fromkeys(means["metric"]))
    cells = means.set_index([*keys, "metric"])
    text = cells["value"].map(lambda value: number_text(value, 3))
    text += (" (" + cells["n"].map("{:,}".format) + ")").where(cells["n_skipped"] > 0, "")
    runs = means[keys].drop_duplicates().itertuples(index=False, name=None)
    lines = [[*map(display, run), *(text[(*run, score)] for score in scores)] for run in runs]
    if (cells["n_skipped"] > 0).any():
        caption += " In brackets: of so many pairs, the others have no such score."
    return markdown([["Task", "Classifier", "Loss", *map(display, scores)], *lines], caption, n_labels=3)
