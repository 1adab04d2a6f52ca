"""What the papers' tables share: the frames they are made of and their checks, the text of cells, the layout in
Markdown and in LaTeX."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd

from lib.tables.names import MISSING

PUBLISHED = Path(__file__).parents[1] / "published"


def check_label(data_label: str) -> None:
    """ValueError where `data_label` does not say what the numbers were measured on."""
    if not data_label.strip():
        raise ValueError("data_label is empty: say what the numbers were measured on")


def check_frame(
    frame: pd.DataFrame, key: list[str], columns: list[str], where: str = "the frame", remedy: str = ""
) -> None:
    """ValueError where `frame` lacks a column of `key` or `columns`, or has two rows of one key; `where` names it,
    `remedy` says what to do."""
    missing = [name for name in key + columns if name not in frame]
    if missing:
        raise ValueError(f"{where} has no column {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}")
    twice = frame[frame.duplicated(key)]
    if len(twice):
        raise ValueError(f"{' '.join(map(str, twice[key].iloc[0])).strip()} is in {where} more than once{remedy}")


def long_metrics(metrics: pd.DataFrame, names: tuple[str, ...] = ("auroc", "ap", "mean_probability")) -> pd.DataFrame:
    """metrics.csv rows (columns <name>, <name>_ci_low, <name>_ci_high) as one row per metric: metric, value, ci_low,
    ci_high.

    All columns that belong to no metric (task, backbone, loss, class, prevalence, ...) are kept. Intervals that are
    absent become NaN.
    """
    parts = []
    given = {f"{name}{end}" for name in names for end in ("", "_ci_low", "_ci_high")}
    kept, none = metrics[[column for column in metrics if column not in given]], pd.Series(np.nan, metrics.index)
    for name in names:
        bounds = {bound: metrics.get(f"{name}_{bound}", none) for bound in ("ci_low", "ci_high")}
        parts.append(kept.assign(metric=name, value=metrics[name], **bounds))
    return pd.concat(parts, ignore_index=True)


def number_text(value: float, decimals: int) -> str:
    """The number, or a dash where it is not finite."""
    return MISSING if not np.isfinite(value) else f"{value:.{decimals}f}"


def bounds_text(low: float, high: float, decimals: int, between: str = "–") -> str:
    """Both bounds, or one dash where either is not finite."""
    bounds = [number_text(bound, decimals) for bound in (low, high)]
    return MISSING if MISSING in bounds else between.join(bounds)


def range_text(values: pd.Series, one: str, many: str) -> str:
    """'1 film', '306 films' or '8 to 306 films': the range of counts, with `one` or `many` as their noun."""
    low, high = values.min(), values.max()
    if pd.isna(low):
        return f"an unknown number of {many}"
    return f"{low:,.0f} {one if high == 1 else many}" if low == high else f"{low:,.0f} to {high:,.0f} {many}"


def of_cells(count: int, total: int) -> str:
    """'3 of 4 cells', 'none of 4 cells', 'all 4 cells' or 'the only cell'."""
    if count == total:
        return "the only cell" if total == 1 else f"all {total} cells"
    return f"{count or 'none'} of {total} {'cell' if total == 1 else 'cells'}"


def markdown(rows: Sequence[Sequence[str]], below: str, n_labels: int = 1) -> str:
    """`rows`, the first of which is the head, as a Markdown table with a paragraph `below`; the first `n_labels`
    columns are flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = [cell.ljust(w) if i < n_labels else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        return f"| {' | '.join(cells)} |"

    rule = "|" + "|".join("-" * (width + 1) + ("-" if i < n_labels else ":") for i, width in enumerate(widths)) + "|"
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:]), "", below, ""])


def tex(text: str) -> str:
    """`text` with LaTeX's special characters escaped, and dashes as LaTeX writes them."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {"—": "---", "–": "--", " %": r"\,\%"}
    special |= {character: "\\" + character for character in "&%$#_{}"}
    out, i = [], 0
    while i < len(text):
        key = text[i : i + 2] if text[i : i + 2] in special else text[i]
        out.append(special.get(key, key))
        i += len(key)
    return "".join(out)


def tex_row(cells: Iterable[str]) -> str:
    """Cells as a line of a LaTeX table; what a cell has between two ** at its beginning is bold."""
    return f"{' & '.join(map(_bold_tex, cells))} \\\\"


def tex_body(lines: Iterable[tuple[str, list[str]]], bold: bool = True) -> list[str]:
    """Lines of a label and its cells in LaTeX: a label with ** begins a group, the others are indented. `bold` False:
    labels are not bold."""
    body = []
    for label, cells in lines:
        begins = label.startswith("**")
        if begins and body:
            body.append(r"\addlinespace")
        body.append(("" if begins else r"\quad ") + tex_row([label if bold else label.strip("*"), *cells]))
    return body


def latex(
    head: Sequence[Sequence[str]], body: Iterable[str], *, caption: str, label: str, n_labels: int = 1, gap: int = 3
) -> str:
    """A LaTeX table over the text width (packages: booktabs).

    Parameters
    ----------
    head : the lines of headings, plain text; in all but the last, one heading spans the neighbouring columns that have
    it and the same ones above.
    body : lines of LaTeX, as of `tex_body`.
    caption : plain text.
    label : the table's name for references, after 'tab:'.
    n_labels : how many columns are flush left.
    gap : half the space between two columns, in points.
    """
    out = [
        r"\begin{table*}",
        rf"\centering\footnotesize\setlength{{\tabcolsep}}{{{gap}pt}}",
        rf"\caption{{{tex(caption)}}}",
        rf"\label{{tab:{label}}}",
        rf"\begin{{tabular}}{{{'l' * n_labels}{'c' * (len(head[0]) - n_labels)}}}",
        r"\toprule",
    ]
    for level in range(1, len(head)):
        spans, rules, start = [], [], n_labels + 1
        for texts, columns in groupby(zip(*(row[n_labels:] for row in head[:level]))):
            end = start + len(list(columns)) - 1
            spans.append(rf"\multicolumn{{{end - start + 1}}}{{c}}{{{tex(texts[-1])}}}")
            rules.append(rf"\cmidrule(lr){{{start}-{end}}}")
            start = end + 1
        out += [f"{' & '.join([*map(tex, head[level - 1][:n_labels]), *spans])} \\\\", "".join(rules)]
    return "\n".join(
        [*out, tex_row(head[-1]), r"\midrule", *body, r"\bottomrule", r"\end{tabular}", r"\end{table*}", ""]
    )


def _bold_tex(text: str) -> str:
    if not text.startswith("**"):
        return tex(text)
    bold, rest = text[2:].split("**", 1)
    return rf"\textbf{{{tex(bold)}}}{tex(rest)}"
