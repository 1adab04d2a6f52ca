"""Tables 1 and 2 of Khakzar et al. in the paper's arrangement, ours beside theirs, and the paper's four statements checked on our numbers.

Every function takes tidy frames. A `results` frame has one row per run and metric, seeds already averaged:

    task      'multilabel' or 'binary'             value            the mean
    backbone  'tdensenet', 'resnet50', any other   ci_low, ci_high  its 95 % interval (NaN: none)
    loss      'bce', 'wbce', 'focal', 'cb_focal'   n                units averaged over (films, or pairs of film and class)
    metric    'iobb', 'disjoint', 'auroc', ...     seeds            optional, how many seeds were averaged (absent: 1)

Runs that are not there become dashes; losses and backbones the paper does not have are appended after the paper's.
"""
from pathlib import Path

import numpy as np
import pandas as pd

from lib.tables.names import BACKBONES, LOSSES, MISSING, TASKS, display, ordered

BASELINE = "bce"

_KEY = ["task", "backbone", "loss", "metric"]
_PAPER = "Khakzar et al."
_TABLES = {  # decimals: ours as many as the intervals can carry, the paper's as printed
    1: {"file": "khakzar_table1_alignment.csv", "metrics": ("iobb", "ior"), "decimals": 3, "paper_decimals": 4, "label": "alignment",
        "unit": ("pair of film and class", "pairs of film and class"),
        "title": "Alignment of class activation maps with the annotated boxes: mean soft IoBB and IoR"},
    2: {"file": "khakzar_table2_concepts.csv", "metrics": ("disjoint", "unique"), "decimals": 1, "paper_decimals": 0, "label": "concepts",
        "unit": ("annotated film", "annotated films"),
        "title": "Pathology-related concepts per annotated film, counted as Disjoint and as Unique"},
}
_CLAIMS = (  # statement, metric, claimed change against BCE
    (1, "auroc", "alike"), (1, "ap", "alike"), (2, "mean_probability", "up"),
    (3, "iobb", "up"), (3, "ior", "down"), (4, "disjoint", "up"), (4, "unique", "up"),
)


def read_published(number: int) -> pd.DataFrame:
    """Table 1 or 2 as Khakzar et al. print it: columns task, backbone, loss, metric, value (16 runs x 2 metrics)."""
    return pd.read_csv(Path(__file__).parents[1] / "published" / _TABLES[number]["file"])


def table1(alignment: pd.DataFrame, *, data_label: str) -> pd.DataFrame:
    """Table 1, IoBB and IoR of every run beside the paper's.

    Parameters
    ----------
    alignment : results frame (see the module) with metrics 'iobb' and 'ior'; other metrics are left out, missing runs may be missing.
    data_label : what the numbers were measured on, e.g. 'Simulated phantom films, not patients'.

    Returns
    -------
    DataFrame with columns data, task, backbone, loss, metric, value, ci_low, ci_high, n, n_skipped (undefined, left out), seeds,
    paper: every cell of the table in the paper's order, NaN where there is no run or no published value.

    Raises
    ------
    ValueError : empty data_label, missing columns, or a run given twice.
    """
    return _beside_paper(alignment, 1, data_label)


def table2(concepts: pd.DataFrame, *, data_label: str) -> pd.DataFrame:
    """Table 2, Disjoint and Unique concepts of every run beside the paper's; arguments, columns and errors as in `table1`."""
    return _beside_paper(concepts, 2, data_label)


def _beside_paper(results: pd.DataFrame, number: int, data_label: str) -> pd.DataFrame:
    if not data_label.strip():
        raise ValueError("data_label is empty: say what the numbers were measured on")
    metrics = _TABLES[number]["metrics"]
    results = _checked(results, ["value", "ci_low", "ci_high", "n"])
    results = results[results["metric"].isin(metrics)]
    results = results.assign(**{name: value for name, value in (("seeds", 1), ("n_skipped", 0)) if name not in results})
    cells = pd.MultiIndex.from_product(
        [ordered(TASKS, results["task"]), ordered(BACKBONES, results["backbone"]), ordered(LOSSES, results["loss"]), metrics], names=_KEY)
    ours = results.set_index(_KEY)[["value", "ci_low", "ci_high", "n", "n_skipped", "seeds"]].reindex(cells)
    ours["paper"] = read_published(number).set_index(_KEY)["value"].reindex(cells)
    table = ours.reset_index()
    table.insert(0, "data", data_label)
    return table


def _checked(frame: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    missing = [name for name in _KEY + columns if name not in frame]
    if missing:
        raise ValueError(f"the results frame has no column {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}")
    twice = frame[frame.duplicated(_KEY)]
    if len(twice):
        raise ValueError(f"{' '.join(map(str, twice[_KEY].iloc[0]))} is in the results frame more than once: average the seeds first")
    return frame


def caption(table: pd.DataFrame, interval: str) -> str:
    """One paragraph under a table of `table1` or `table2`: what it shows, on which data, n, seeds and how the intervals were made.

    `interval` names the method, e.g. 'percentile bootstrap over patients, 2000 replicates'.
    """
    number = _number(table)
    spec, have = _TABLES[number], table.dropna(subset=["value"])
    counts = [f"{_range(rows['n'], *spec['unit'])} ({display(str(task)).lower()})" for task, rows in have.groupby("task", sort=False)]
    parts = [f"{spec['title']}. Data: {table['data'].iloc[0]}."]
    if counts:
        parts.append(f"Mean over {' and '.join(counts)}; {_range(have['seeds'], 'seed', 'seeds')} a run.")
    skipped = have[have["n_skipped"] > 0]
    if len(skipped):
        cells = f"{len(skipped)} cell{'s' if len(skipped) > 1 else ''}"
        reason = " (an empty map has no IoR)" if number == 1 else ""
        parts.append(f"In {cells} up to {int(skipped['n_skipped'].max())} are undefined and left out{reason}.")
    parts.append(f"Under each mean its 95 % interval ({interval}), then the value of {_PAPER}, Table {number} (full NIH ChestX-ray14).")
    if have["value"].size < len(table):
        parts.append(f"{MISSING}: no such run.")
    return " ".join(parts)


def _number(table: pd.DataFrame) -> int:
    metrics = set(table["metric"])
    for number, spec in _TABLES.items():
        if metrics == set(spec["metrics"]):
            return number
    raise ValueError(f"not a frame of table1 or table2: its metrics are {', '.join(sorted(metrics))}")


def _range(values: pd.Series, one: str, many: str) -> str:
    low, high = values.min(), values.max()
    if pd.isna(low):
        return f"an unknown number of {many}"
    return f"{low:,.0f} {one if high == 1 else many}" if low == high else f"{low:,.0f} to {high:,.0f} {many}"


def _number_text(value: float, decimals: int) -> str:
    return MISSING if not np.isfinite(value) else f"{value:.{decimals}f}"


def _lines(table: pd.DataFrame) -> tuple[list[tuple[str, str, str]], list[tuple[str, list[str]]]]:
    """The columns (task, backbone, metric) and the printed lines, three a loss: mean, interval, paper."""
    spec = _TABLES[_number(table)]
    columns = list(dict.fromkeys(table[["task", "backbone", "metric"]].itertuples(index=False, name=None)))
    cells, lines = table.set_index(_KEY), []
    for loss in table["loss"].unique():
        rows = [cells.loc[(task, backbone, loss, metric)] for task, backbone, metric in columns]
        low, high = ([_number_text(row[name], spec["decimals"]) for row in rows] for name in ("ci_low", "ci_high"))
        lines.append((display(loss), [_number_text(row["value"], spec["decimals"]) for row in rows]))
        lines.append(("95 % interval", [MISSING if MISSING in pair else "–".join(pair) for pair in zip(low, high)]))
        lines.append(("paper", [_number_text(row["paper"], spec["paper_decimals"]) for row in rows]))
    return columns, lines


def to_markdown(table: pd.DataFrame, *, interval: str) -> str:
    """A frame of `table1` or `table2` as a Markdown table in the paper's arrangement, its caption below; `interval` as in `caption`."""
    columns, lines = _lines(table)
    head = [[name] + [display(column[part]) for column in columns] for name, part in (("Task", 0), ("Classifier", 1), ("Metric", 2))]
    body = head[1:] + [[f"**{name}**" if i % 3 == 0 else name] + cells for i, (name, cells) in enumerate(lines)]
    widths = [max(len(row[i]) for row in head + body) for i in range(len(columns) + 1)]

    def line(row: list[str]) -> str:
        return f"| {row[0].ljust(widths[0])} | {' | '.join(map(str.rjust, row[1:], widths[1:]))} |"

    rule = "|" + "|".join("-" * (width + 1) + ("-" if i == 0 else ":") for i, width in enumerate(widths)) + "|"
    title = f"**Table {_number(table)}.** {caption(table, interval)}"
    return "\n".join([line(head[0]), rule, *map(line, body), "", title, ""])


def to_latex(table: pd.DataFrame, *, interval: str) -> str:
    """A frame of `table1` or `table2` as a LaTeX table over the text width (packages: booktabs); `interval` as in `caption`."""
    columns, lines = _lines(table)
    number = _number(table)
    groups = [("Task", [column[0] for column in columns]), ("Classifier", [column[:2] for column in columns])]
    out = [r"\begin{table*}", r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
           rf"\caption{{{_tex(caption(table, interval))}}}", rf"\label{{tab:{_TABLES[number]['label']}}}",
           rf"\begin{{tabular}}{{l{'c' * len(columns)}}}", r"\toprule"]
    for name, keys in groups:
        spans, rules, start = [], [], 2
        for key in dict.fromkeys(keys):
            width = keys.count(key)
            spans.append(rf"\multicolumn{{{width}}}{{c}}{{{_tex(display(key if isinstance(key, str) else key[-1]))}}}")
            rules.append(rf"\cmidrule(lr){{{start}-{start + width - 1}}}")
            start += width
        out += [f"{name} & {' & '.join(spans)} \\\\", "".join(rules)]
    out += [f"Metric & {' & '.join(_tex(display(column[2])) for column in columns)} \\\\", r"\midrule"]
    for i, (name, cells) in enumerate(lines):
        if i and i % 3 == 0:
            out.append(r"\addlinespace")
        label = _tex(name) if i % 3 == 0 else rf"\quad {_tex(name)}"
        out.append(f"{label} & {' & '.join(map(_tex, cells))} \\\\")
    return "\n".join([*out, r"\bottomrule", r"\end{tabular}", r"\end{table*}", ""])


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "—": "---", "–": "--", " %": r"\,\%"}
    special |= {character: "\\" + character for character in "&%$#_{}"}
    out, i = [], 0
    while i < len(text):
        key = text[i:i + 2] if text[i:i + 2] in special else text[i]
        out.append(special.get(key, key))
        i += len(key)
    return "".join(out)


def long_metrics(metrics: pd.DataFrame, names: tuple[str, ...] = ("auroc", "ap", "mean_probability")) -> pd.DataFrame:
    """metrics.csv rows (columns <name>, <name>_ci_low, <name>_ci_high) as one row per metric: metric, value, ci_low, ci_high.

    All columns that belong to no metric (task, backbone, loss, class, prevalence, ...) are kept. Intervals that are absent become NaN.
    """
    parts = []
    keep = [column for column in metrics if not any(column in (name, f"{name}_ci_low", f"{name}_ci_high") for name in names)]
    for name in names:
        bounds = {f"ci_{side}": metrics.get(f"{name}_ci_{side}", pd.Series(np.nan, metrics.index)) for side in ("low", "high")}
        parts.append(metrics[keep].assign(metric=name, value=metrics[name], **bounds))
    return pd.concat(parts, ignore_index=True)


def differences_to_bce(results: pd.DataFrame) -> pd.DataFrame:
    """Every cost-sensitive run minus the BCE run of its task and backbone: task, backbone, loss, metric, difference, ci_low, ci_high.

    The intervals are NaN: two separate intervals say little about a difference. Where a paired bootstrap was made, put its intervals in.
    Runs without a BCE run beside them are left out.
    """
    results = _checked(results, ["value"])
    group = ["task", "backbone", "metric"]
    baseline = results.loc[results["loss"] == BASELINE, group + ["value"]].rename(columns={"value": "baseline"})
    paired = results.loc[results["loss"] != BASELINE, _KEY + ["value"]].merge(baseline, on=group)
    return paired[_KEY].assign(difference=paired["value"] - paired["baseline"], ci_low=np.nan, ci_high=np.nan)


def statements(differences: pd.DataFrame, *, margin: float = 0.02) -> pd.DataFrame:
    """The four statements of Khakzar et al. (section 5), checked cell by cell against the BCE run.

    (1) AUROC and AP are alike across losses; (2) the mean predicted probability is higher; (3) IoBB is higher and IoR lower;
    (4) there are more concepts, Disjoint and Unique. A cell is one task, backbone and cost-sensitive loss: 12 in a whole study.

    Parameters
    ----------
    differences : task, backbone, loss, metric, difference (loss minus BCE), ci_low, ci_high of the PAIRED difference (NaN: none), as from
        `differences_to_bce`. Metrics named in METRICS are used, others left out.
    margin : AUROC and AP count as alike when they differ from BCE's by at most this.

    Returns
    -------
    DataFrame, one row per statement and metric and, for statements of two metrics, a row 'both': statement, metric, claim ('alike', 'up',
    'down', 'both'), margin (NaN but for 'alike'), cells (with a difference), holds (the difference is as claimed), intervals (cells with an
    interval), supported (the whole interval is as claimed: within the margin, or on the claimed side of zero), contradicted (the whole
    interval is otherwise), excludes_zero, paper_cells and paper_holds (the same count in the paper's printed tables; 0 cells for
    statements 1 and 2, which it shows in Fig. 2 only). 'both' needs both metrics; contradicted and excludes_zero count where either does.

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
        for metric, claim in claims.items():
            rows.append({"statement": number, "metric": metric, "claim": claim, "margin": margin if claim == "alike" else np.nan}
                        | _counts(ours, [metric], "") | _counts(paper, [metric], "paper_"))
        if len(claims) > 1:
            rows.append({"statement": number, "metric": "both", "claim": "both", "margin": margin if "alike" in claims.values() else np.nan}
                        | _counts(ours, list(claims), "") | _counts(paper, list(claims), "paper_"))
    return pd.DataFrame(rows).drop(columns=["paper_intervals", "paper_supported", "paper_contradicted", "paper_excludes_zero"])


def _verdicts(differences: pd.DataFrame, margin: float) -> pd.DataFrame:
    differences = differences.astype(dict.fromkeys(["difference", "ci_low", "ci_high"], float))  # an empty frame has columns of objects
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
    heading = {1: "AUROC and AP are alike across losses", 2: "The cost-sensitive losses raise the mean predicted probability",
               3: "The cost-sensitive losses raise IoBB and lower IoR", 4: "The cost-sensitive losses give more concepts"}[number]
    overall = rows.iloc[-1]
    verdict = f"holds in {_of(overall['holds'], overall['cells'])}" if overall["cells"] else "cannot be checked, no cell has its runs"
    parts = [f"**{number}. {heading}**: {verdict}."]
    for metric, row in rows.iterrows():
        if metric != "both" and row["cells"]:
            parts.append(_metric_sentence(str(metric), row, margin))
    if not overall["paper_cells"]:
        parts.append("The paper shows this in its Fig. 2 only and prints no table to count in.")
    else:
        each = ", ".join(f"{display(str(metric))} in {_of(row['paper_holds'], row['paper_cells'])}" for metric, row in rows.iterrows())
        parts.append(f"In the paper's own Table {number - 2}: {each}.")
    return " ".join(parts)


def _metric_sentence(metric: str, row: pd.Series, margin: float) -> str:
    what = {"alike": f"within {margin:g} of BCE's", "up": "higher than BCE's", "down": "lower than BCE's"}[row["claim"]]
    sentence = f"{display(metric)} is {what} in {_of(row['holds'], row['cells'])}"
    if not row["intervals"]:
        return sentence + " (no intervals)."
    alike = row["claim"] == "alike"
    yes, no = ("lies within that margin", "wholly outside it") if alike else ("excludes zero on that side", "on the other side")
    of = "" if row["intervals"] == row["cells"] else f" (of {row['intervals']} with one)"
    supported, contradicted = (row[name] or "none" for name in ("supported", "contradicted"))
    return sentence + f"; the 95 % interval of the difference {yes} in {supported}{of}, {no} in {contradicted}."


def _of(count: int, total: int) -> str:
    noun = "cell" if total == 1 else "cells"
    if count == total:
        return "the only cell" if total == 1 else f"all {total} {noun}"
    return f"{count or 'none'} of {total} {noun}"
