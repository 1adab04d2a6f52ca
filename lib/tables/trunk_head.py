"""Where a change lives, in words; every number from the frames of `analysis.changes`."""

import pandas as pd

from lib.tables.layout import MISSING, number_text
from lib.tables.names import display


def change_sentences(changes: pd.DataFrame, metric: str) -> list[str]:
    """Each loss's change of a metric against BCE and whose it is, a Markdown line a loss.

    `changes` : of `analysis.changes.record_changes` or `prediction_changes`, of one task and backbone. A part counts
    where its interval leaves out 0.
    """
    mine = changes[changes["metric"] == metric]
    return [_sentence(loss, rows.set_index("part")) for loss, rows in mine.groupby("loss", sort=False)]


def _sentence(loss: str, rows: pd.DataFrame) -> str:
    said = {part: _size(row) for part, row in rows.iterrows()}
    counts = {part: bool(row["low"] > 0 or row["high"] < 0) for part, row in rows.iterrows()}
    owners = [f"the {part}'s" for part in ("head", "trunk") if counts[part]]
    whose = f"told apart from 0: {' and '.join(owners)}" if owners else "neither told apart from 0"
    share = f", {rows.loc['constant', 'point'] / rows.loc['trained', 'point']:.0%} of it" if counts["trained"] else ""
    left = "more than chance leaves" if counts["rest"] else "not told apart from 0"
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
