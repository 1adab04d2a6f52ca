"""The laboratory in words; every number from the frames of `lib.laboratory` and `analysis.dose`."""

from collections.abc import Iterable

import pandas as pd

from lib.analysis.dose import seed_interval
from lib.tables.layout import bounds_text
from lib.tables.names import display

NAMES = {
    "survive": "Counts that stand without the lesion",
    "responds_counted": "Counted channels that the lesion moves",
    "responds_uncounted": "Other channels that the lesion moves",
}
# What the laboratory shows, in this order, as a narrow axis has it.
SHOWN = {
    **{"auroc": "AUROC", "mean_probability": "Mean\nprobability", "iobb": "IoBB", "ior_zero": "IoR,\nempty as 0"},
    **{"iobb_minmax": "IoBB,\nmin-max", "hit": "Hit rate", "auprc": "Pixel\nAUPRC", "unique": "Unique\nconcepts"},
    **{"survive": "Stand without\nthe lesion", "responds_counted": "Counted,\nmoved by it"},
    **{"responds_uncounted": "Not counted,\nmoved by it"},
}


def response_sentences(contrasts: pd.DataFrame, metrics: Iterable[str], by: str = "loss") -> list[str]:
    """What changes each metric, a Markdown line for each value of the column `by`: in how many of the comparisons the
    interval over seeds leaves out 0, which way, and the range of the changes.

    `contrasts` : of `analysis.dose.contrasts`; where it has no row, that is what is said.
    """
    return [
        f"**{display(str(name))}**: {'; '.join(_change(rows, metric) for metric in metrics)}."
        for name, rows in contrasts.groupby(by, sort=False)
    ] or ["No two runs differ in this alone."]


def _change(rows: pd.DataFrame, metric: str) -> str:
    rows = rows[rows["metric"] == metric]
    counts = {"higher": (rows["low"] > 0).sum(), "lower": (rows["high"] < 0).sum()}
    said = " and ".join(f"{way} in {n} of {len(rows)}" for way, n in counts.items() if n)
    none = f"told apart in none of {len(rows)}" if rows["low"].notna().any() else "of one seed, so not tested"
    return f"{NAMES.get(metric, display(metric))} {said or none} ({_range(rows['point'])})"


def _range(points: pd.Series) -> str:
    low, high = f"{points.min():+.3f}", f"{points.max():+.3f}"
    return low if low == high else f"{low} to {high}"


def causal_sentences(table: pd.DataFrame, control: pd.DataFrame) -> list[str]:
    """What becomes of the concepts when the lesion is taken away, a Markdown line a loss, then one for untrained
    networks.

    Parameters
    ----------
    table : DataFrame
        prevalence, noise, loss, seed, metric, value: of each prevalence the means over the rest, with intervals over
        the seeds.
    control : DataFrame
        seed, metric, value of untrained networks.
    """
    said = []
    for loss, rows in table.groupby("loss", sort=False):
        doses = sorted(rows["prevalence"].unique(), reverse=True)
        parts = (f"with {dose:g} of the findings left, {_causes(rows[rows['prevalence'] == dose])}" for dose in doses)
        said.append(f"**{display(loss)}**: {'; '.join(parts)}.")
    return [*said, f"**Untrained**: {_causes(control)}."]


def _causes(rows: pd.DataFrame) -> str:
    def share(metric: str) -> str:
        found = seed_interval(rows[rows["metric"] == metric].groupby("seed")["value"].mean())
        if pd.isna(found.point):
            return "an undefined share"
        return f"{found.point:.0%} [{bounds_text(100 * found.low, 100 * found.high, 0, ', ')}]"

    stand, answer, others = map(share, ("survive", "responds_counted", "responds_uncounted"))
    return (
        f"{stand} of the counts stand without it, and it moves {answer} of the counted channels and {others} of others"
    )
