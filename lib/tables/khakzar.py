"""Tables 1 and 2 of Khakzar et al. in the paper's arrangement, ours beside theirs, and the paper's four statements
checked on our numbers.

Every function takes tidy frames. A `results` frame has one row per run and metric, over all seeds:

    task             'multilabel' or 'binary'
    backbone         'tdensenet', 'resnet50', any other
    loss             'bce', 'wbce', 'focal', 'cb_focal', any other
    metric           'iobb', 'disjoint', 'auroc', ...
    value            the mean over seeds; ci_low, ci_high: its 95 % interval (NaN: none)
    n                units averaged over: films, or pairs of film and class
    n_skipped        optional, units left out because they are undefined (absent: 0)
    seeds            optional, how many seeds (absent: 1)

Runs that are not there become dashes; losses and backbones the paper does not have are appended after the paper's.
"""

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
    tex_body,
)
from lib.tables.names import BACKBONES, LOSSES, MISSING, TASKS, display, ordered

BASELINE = "bce"

_KEY = ["task", "backbone", "loss", "metric"]
_PAPER = "Khakzar et al."
_TABLES = {  # decimals: ours as many as the intervals can carry, the paper's as printed
    1: {
        "file": "khakzar_table1_alignment.csv",
        "metrics": ("iobb", "ior"),
        "decimals": 3,
        "paper_decimals": 4,
        "label": "alignment",
        "unit": ("pair of film and class", "pairs of film and class"),
        "title": "Alignment of class activation maps with the annotated boxes: mean soft IoBB and IoR",
    },
    2: {
        "file": "khakzar_table2_concepts.csv",
        "metrics": ("disjoint", "unique"),
        "decimals": 1,
        "paper_decimals": 0,
        "label": "concepts",
        "unit": ("annotated film", "annotated films"),
        "title": "Pathology-related concepts per annotated film, counted as Disjoint and as Unique",
    },
}
_CLAIMS = (  # statement, metric, claimed change against BCE
    (1, "auroc", "alike"),
    (1, "ap", "alike"),
    (2, "mean_probability", "up"),
    (3, "iobb", "up"),
    (3, "ior", "down"),
    (4, "disjoint", "up"),
    (4, "unique", "up"),
)


def read_published(number: int) -> pd.DataFrame:
    """Table 1 or 2 as Khakzar et al. print it: columns task, backbone, loss, metric, value (16 runs x 2 metrics)."""
    return pd.read_csv(PUBLISHED / _TABLES[number]["file"])


def table1(alignment: pd.DataFrame, *, data_label: str) -> pd.DataFrame:
    """Table 1, IoBB and IoR of every run beside the paper's.

    Parameters
    ----------
    alignment : results frame (see the module) with metrics 'iobb' and 'ior'; other metrics are left out, missing runs
    may be missing.
    data_label : what the numbers were measured on, e.g. 'Simulated phantom films, not patients'.

    Returns
    -------
    DataFrame with columns data, task, backbone, loss, metric, value, ci_low, ci_high, n, n_skipped (undefined, left
    out), seeds, paper: every cell of the table in the paper's order, NaN where there is no run or no published value.

    Raises
    ------
    ValueError : empty data_label, missing columns, or a run given twice.
    """
    return _beside_paper(alignment, 1, data_label)


def table2(concepts: pd.DataFrame, *, data_label: str) -> pd.DataFrame:
    """Table 2, Disjoint and Unique concepts of every run beside the paper's; arguments, columns and errors as in
    `table1`."""
    return _beside_paper(concepts, 2, data_label)


def _beside_paper(results: pd.DataFrame, number: int, data_label: str) -> pd.DataFrame:
    check_label(data_label)
    metrics = _TABLES[number]["metrics"]
    results = _checked(results, ["value", "ci_low", "ci_high", "n"])
    results = results[results["metric"].isin(metrics)]
    results = results.assign(**{name: value for name, value in (("seeds", 1), ("n_skipped", 0)) if name not in results})
    known = zip((TASKS, BACKBONES, LOSSES), _KEY)
    cells = pd.MultiIndex.from_product([*(ordered(names, results[key]) for names, key in known), metrics], names=_KEY)
    ours = results.set_index(_KEY)[["value", "ci_low", "ci_high", "n", "n_skipped", "seeds"]].reindex(cells)
    ours["paper"] = read_published(number).set_index(_KEY)["value"].reindex(cells)
    table = ours.reset_index()
    table.insert(0, "data", data_label)
    return table


def _checked(frame: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    check_frame(frame, _KEY, columns, "the results frame", ": average the seeds first")
    return frame


def caption(table: pd.DataFrame, interval: str) -> str:
    """One paragraph under a table of `table1` or `table2`: what it shows, on which data, n, seeds and how the intervals
    were made.

    `interval` names the method, e.g. 'percentile bootstrap over patients, 2000 replicates'.
    """
    number = _number(table)
    spec, have = _TABLES[number], table.dropna(subset=["value"])
    tasks = have.groupby("task", sort=False)
    counts = [f"{range_text(rows['n'], *spec['unit'])} ({display(str(task)).lower()})" for task, rows in tasks]
    parts = [f"{spec['title']}. Data: {table['data'].iloc[0]}."]
    if counts:
        parts.append(f"Mean over {' and '.join(counts)}; {range_text(have['seeds'], 'seed', 'seeds')} a run.")
    skipped = have[have["n_skipped"] > 0]
    if len(skipped):
        cells = f"{len(skipped)} cell{'s' if len(skipped) > 1 else ''}"
        reason = " (an empty map has no IoR)" if number == 1 else ""
        parts.append(f"In {cells} up to {int(skipped['n_skipped'].max())} are undefined and left out{reason}.")
    paper = f"then, where it has that loss, the value of {_PAPER}, Table {number} (full NIH ChestX-ray14)"
    parts.append(f"Under each mean its 95 % interval ({interval}), {paper}.")
    if have["value"].size < len(table):
        parts.append(f"{MISSING}: no such run.")
    return " ".join(parts)


def _number(table: pd.DataFrame) -> int:
    metrics = set(table["metric"])
    for number, spec in _TABLES.items():
        if metrics == set(spec["metrics"]):
            return number
    raise ValueError(f"not a frame of table1 or table2: its metrics are {', '.join(sorted(metrics))}")


def _lines(table: pd.DataFrame) -> tuple[list[list[str]], list[tuple[str, list[str]]]]:
    """The lines of headings, and the printed lines, three a loss: mean (its label between **), interval, paper; no
    third where the paper has none."""
    spec = _TABLES[_number(table)]
    columns = list(dict.fromkeys(table[["task", "backbone", "metric"]].itertuples(index=False, name=None)))
    names = enumerate(("Task", "Classifier", "Metric"))
    head = [[name, *(display(column[part]) for column in columns)] for part, name in names]
    cells, lines = table.set_index(_KEY), []
    for loss in table["loss"].unique():
        rows = [cells.loc[(task, backbone, loss, metric)] for task, backbone, metric in columns]
        lines.append((f"**{display(loss)}**", [number_text(row["value"], spec["decimals"]) for row in rows]))
        lines.append(("95 % interval", [bounds_text(row["ci_low"], row["ci_high"], spec["decimals"]) for row in rows]))
        if any(pd.notna(row["paper"]) for row in rows):
            lines.append(("paper", [number_text(row["paper"], spec["paper_decimals"]) for row in rows]))
    return head, lines


def to_markdown(table: pd.DataFrame, *, interval: str) -> str:
    """A frame of `table1` or `table2` as a Markdown table in the paper's arrangement, its caption below; `interval` as
    in `caption`."""
    head, lines = _lines(table)
    below = f"**Table {_number(table)}.** {caption(table, interval)}"
    return markdown([*head, *([label, *cells] for label, cells in lines)], below)


def to_latex(table: pd.DataFrame, *, interval: str) -> str:
    """A frame of `table1` or `table2` as a LaTeX table over the text width (packages: booktabs); `interval` as in
    `caption`."""
    (head, lines), label = _lines(table), _TABLES[_number(table)]["label"]
    return latex(head, tex_body(lines, bold=False), caption=caption(table, interval), label=label)


def differences_to_bce(results: pd.DataFrame) -> pd.DataFrame:
    """Every cost-sensitive run minus the BCE run of its task and backbone: task, backbone, loss, metric, difference,
    ci_low, ci_high.

    The intervals are NaN: two separate intervals say little about a difference. Where a paired bootstrap was made, put
    its intervals in. Runs without a BCE run beside them are left out.
    """
    results = _checked(results, ["value"])
    group = ["task", "backbone", "metric"]
    baseline = results.loc[results["loss"] == BASELINE, group + ["value"]].rename(columns={"value": "baseline"})
    paired = results.loc[results["loss"] != BASELINE, _KEY + ["value"]].merge(baseline, on=group)
    return paired[_KEY].assign(difference=paired["value"] - paired["baseline"], ci_low=np.nan, ci_high=np.nan)


def statements(differences: pd.DataFrame, *, margin: float = 0.02) -> pd.DataFrame:
    """The four statements of Khakzar et al. (section 5), checked cell by cell against the BCE run.

    (1) AUROC and AP are alike across losses; (2) the mean predicted probability is higher; (3) IoBB is higher and IoR
    lower; (4) there are more concepts, Disjoint and Unique. A cell is one task, backbone and cost-sensitive loss: 12 in
    a whole study.

    Parameters
    ----------
    differences : task, backbone, loss, metric, difference (loss minus BCE), ci_low, ci_high of the PAIRED difference
    (NaN: none), as from
        `differences_to_bce`. Metrics named in METRICS are used, others left out.
    margin : AUROC and AP count as alike when they differ from BCE's by at most this.

    Returns
    -------
    DataFrame, one row per statement and metric and, for statements of two metrics, a row 'both': statement, metric,
    claim ('alike', 'up', 'down', 'both'), margin (NaN but for 'alike'), cells (with a difference), holds (the
    difference is as claimed), intervals (cells with an interval), supported (the whole interval is as claimed: within
    the margin, or on the claimed side of zero), contradicted (the whole interval is otherwise), excludes_zero,
    paper_cells and paper_holds (the same count in the paper's printed tables; 0 cells for statements 1 and 2, which it
    shows in Fig. 2 only). 'both' needs both metrics; contradicted and excludes_zero count where either does.

    Raises
    ------
    ValueError : margin not positive, missing columns, or a cell given twice.
    """
    if not margin > 0:
        raise ValueError(f"margin = {margin}: it must be positive")
    ours = _verdicts(_checked(differences, ["difference", "ci_low", "ci_high"]), margin)
    printed = pd.concat([read_published(1), read_published(2)], ignore_index=True)
    paper = _verdicts(differences_to_bce(printed), margin)
    rows = []
    for number in sorted({claim[0] for claim in _CLAIMS}):
        claims = {metric: claim for statement, metric, claim in _CLAIMS if statement == number}
        for metrics in [[metric] for metric in claims] + ([list(claims)] if len(claims) > 1 else []):
            name = metrics[0] if len(metrics) == 1 else "both"
            bound = margin if "alike" in map(claims.get, metrics) else np.nan
            row = {"statement": number, "metric": name, "claim": claims.get(name, "both"), "margin": bound}
            rows.append(row | _counts(ours, metrics, "") | _counts(paper, metrics, "paper_"))
    unprinted = ["paper_intervals", "paper_supported", "paper_contradicted", "paper_excludes_zero"]
    return pd.DataFrame(rows).drop(columns=unprinted)


def _verdicts(differences: pd.DataFrame, margin: float) -> pd.DataFrame:
    # An empty frame has columns of objects.
    differences = differences.astype(dict.fromkeys(["difference", "ci_low", "ci_high"], float))
    frame = differences[(differences["loss"] != BASELINE) & np.isfinite(differences["difference"])].copy()
    claim = frame["metric"].map({metric: claim for _, metric, claim in _CLAIMS})
    frame, claim = frame[claim.notna()], claim.dropna()
    alike, sign = claim == "alike", claim.map({"alike": 0.0, "up": 1.0, "down": -1.0}).astype(float)
    point, low, high = frame["difference"], frame["ci_low"], frame["ci_high"]
    nearest, farthest = np.minimum(low * sign, high * sign), np.maximum(low * sign, high * sign)
    frame["intervals"] = np.isfinite(low) & np.isfinite(high)
    frame["holds"] = np.where(alike, point.abs() <= margin, point * sign > 0)
    frame["supported"] = np.where(alike, (low >= -margin) & (high <= margin), nearest > 0)
    frame["contradicted"] = np.where(alike, (low > margin) | (high < -margin), farthest < 0)
    frame["excludes_zero"] = (low > 0) | (high < 0)
    return frame


def _counts(verdicts: pd.DataFrame, metrics: list[str], prefix: str) -> dict[str, int]:
    cells = verdicts[verdicts["metric"].isin(metrics)].groupby(["task", "backbone", "loss"])
    groups = [rows for _, rows in cells if len(rows) == len(metrics)]
    every = {name: sum(bool(rows[name].all()) for rows in groups) for name in ("holds", "intervals", "supported")}
    some = {name: sum(bool(rows[name].any()) for rows in groups) for name in ("contradicted", "excludes_zero")}
    return {f"{prefix}{name}": count for name, count in {"cells": len(groups), **every, **some}.items()}


def statement_sentences(checked: pd.DataFrame) -> list[str]:
    """The frame of `statements` in words: one Markdown paragraph per statement, every number taken from the frame."""
    return [_paragraph(int(number), rows.set_index("metric")) for number, rows in checked.groupby("statement")]


def _paragraph(number: int, rows: pd.DataFrame) -> str:
    margin = rows["margin"].max()
    heading = {
        1: "AUROC and AP are alike across losses",
        2: "The cost-sensitive losses raise the mean predicted probability",
        3: "The cost-sensitive losses raise IoBB and lower IoR",
        4: "The cost-sensitive losses give more concepts",
    }[number]
    overall, verdict = rows.iloc[-1], "cannot be checked, no cell has its runs"
    if overall["cells"]:
        verdict = f"holds in {of_cells(overall['holds'], overall['cells'])}"
    parts = [f"**{number}. {heading}**: {verdict}."]
    for metric, row in rows.iterrows():
        if metric != "both" and row["cells"]:
            parts.append(_metric_sentence(str(metric), row, margin))
    if not overall["paper_cells"]:
        parts.append("The paper shows this in its Fig. 2 only and prints no table to count in.")
    else:
        counts = {str(metric): of_cells(row["paper_holds"], row["paper_cells"]) for metric, row in rows.iterrows()}
        each = ", ".join(f"{display(metric)} in {count}" for metric, count in counts.items())
        parts.append(f"In the paper's own Table {number - 2}: {each}.")
    return " ".join(parts)


def _metric_sentence(metric: str, row: pd.Series, margin: float) -> str:
    what = {"alike": f"within {margin:g} of BCE's", "up": "higher than BCE's", "down": "lower than BCE's"}[row["claim"]]
    sentence = f"{display(metric)} is {what} in {of_cells(row['holds'], row['cells'])}"
    if not row["intervals"]:
        return sentence + " (no intervals)."
    yes, no = "excludes zero on that side", "on the other side"
    if row["claim"] == "alike":
        yes, no = "lies within that margin", "wholly outside it"
    of = "" if row["intervals"] == row["cells"] else f" (of {row['intervals']} with one)"
    supported, contradicted = (row[name] or "none" for name in ("supported", "contradicted"))
    return sentence + f"; the 95 % interval of the difference {yes} in {supported}{of}, {no} in {contradicted}."
