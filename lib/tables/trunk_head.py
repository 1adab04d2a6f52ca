"""Where a change lives, in words; every number from the frames of `analysis.changes`."""

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from lib.tables.layout import MISSING, number_text
from lib.tables.names import display


def fit_sentences(fits: pd.DataFrame, positives: ArrayLike, n_films: int, n_features: int) -> str:
    """Whether every head has arrived at its optimum, and what it could learn by heart.

    `fits` : gradient and separated of every `trunk_head.Refit`. `positives` : training films of each class, of
    `n_films`.
    """
    short, heart = (fits["gradient"] > 1e-4).sum(), fits["separated"].max()
    rarer = np.minimum(positives, n_films - np.asarray(positives))
    learnt = (
        f"A head tells the training films of up to {heart} of them apart without an error: these it may have "
        "learnt by heart, which training does not do."
        if heart
        else "No head tells the training films of any class apart without an error."
    )
    return (
        f"{short} of {len(fits)} fits stopped before their gradient was a ten-thousandth of that at the start. There "
        f"are {n_films:,} training films and {n_features:,} features; {(rarer < n_features).sum()} of {len(rarer)} "
        f"classes have fewer positives (or negatives) than there are features. {learnt}"
    )


def change_sentences(changes: pd.DataFrame, metric: str) -> list[str]:
    """Each loss's change of a metric against BCE and whose it is, a Markdown line a loss.

    `changes` : of `analysis.changes.record_changes` or `prediction_changes`, of one task and backbone. A part counts
    where its interval leaves out 0; of one without an interval it is unknown.
    """
    mine = changes[changes["metric"] == metric]
    return [_sentence(loss, rows.set_index("part")) for loss, rows in mine.groupby("loss", sort=False)]


def _sentence(loss: str, rows: pd.DataFrame) -> str:
    said = {part: _size(row) for part, row in rows.iterrows()}
    counts = {part: bool(row["low"] > 0 or row["high"] < 0) for part, row in rows.iterrows()}
    unknown = {part: bool(row[["low", "high"]].isna().any()) for part, row in rows.iterrows()}
    owners = [f"the {part}'s" for part in ("head", "trunk") if counts[part]]
    whose = f"told apart from 0: {' and '.join(owners)}" if owners else "neither told apart from 0"
    if doubtful := [f"the {part}'s" for part in ("head", "trunk") if unknown[part]]:
        whose = "; ".join([whose] * bool(owners) + [f"unknown of {' and '.join(doubtful)}"])
    part = rows.loc["constant", "point"] / rows.loc["trained", "point"]
    share = f", {part:.0%} of it" if counts["trained"] and pd.notna(part) else ""
    left = "more than chance leaves" if counts["rest"] else "not told apart from 0"
    left = "unknown whether that is chance" if unknown["rest"] else left
    return (
        f"**{display(loss)}, {display(rows['metric'].iloc[0])}**: {said['trained']} as trained, {said['whole']} with "
        f"heads refitted. Of the latter the head's part is {said['head']}, the trunk's {said['trunk']} ({whose}; "
        f"interaction {said['interaction']}). BCE and one constant a class, nothing else, change it by "
        f"{said['constant']}{share}; the trained run differs from that by {said['rest']} ({left})."
    )


def _size(row: pd.Series) -> str:
    bounds = [number_text(row[end], 3) for end in ("low", "high")]
    interval = "" if MISSING in bounds else f" [{', '.join(bounds)}]"
    return f"{row['point']:+.3f}{interval}" if pd.notna(row["point"]) else "undefined"
