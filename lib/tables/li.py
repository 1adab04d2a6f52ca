"""Tables I to IV of Li et al., ours beside the paper's row of one of its data sets, and what the numbers say in words.

Tidy frames in. The columns that identify a row, where a table has them:

    class     optional, the selected class, where there are several     features  'all', 'principal', 'non_principal'
    method    the ids of CAMS, or any other                             metric    as said at the table
    scale     'individual', 'common_raw' (the signed maps are summed as they are) or 'common_tanh' (their values on the
              common scale)

Further columns are n (films) and ci_low, ci_high (the 95 % interval; optional, NaN: none). Rows that are not there
become dashes; methods the paper prints no numbers for come after its four, in the order of CAMS.
"""

import numpy as np
import pandas as pd

from lib.tables.layout import (
    PUBLISHED,
    bounds_text,
    check_frame,
    check_label,
    latex,
    long_metrics,
    markdown,
    number_text,
    range_text,
    tex_body,
)
from lib.tables.names import METRICS, MISSING, class_name, ordered

CAMS = {
    "grad": "Grad",
    "hires": "Pixel-wise Grad",
    "gradpp": "Grad++",
    "xgrad": "XGrad",
    "cam": "CAM",
    "layer": "Layer",
    "smooth_gradpp": "Smooth Grad++",
    "score": "Score-CAM",
    "ss": "SS-CAM",
    "is": "IS-CAM",
}
SCALES = {
    "individual": "Individual scale",
    "common_raw": "Common scale, raw sum",
    "common_tanh": "Common scale, scaled values",
}
FEATURES = {"all": "All", "principal": "Principal", "non_principal": "Non-principal"}
_PRINTED = {"grad": "grad_cam", "hires": "pixelwise_grad_cam", "gradpp": "grad_cam_pp", "xgrad": "xgrad_cam"}
COEFFICIENTS = {"pearson": "Pearson", "spearman": "Spearman"}
CHANGES = {"average_increase": "Average increase (%)", "average_drop": "Average drop (%)"}
_CORRELATION = (
    "Bold: the coefficient of the paper's rule, Pearson where Henze and Zirkler's test does not reject a bivariate "
    "normal distribution at 0.05, else Spearman."
)
_RAW = (
    "Raw sum: of the signed maps before the tanh, as the authors' code computes it, so the paper's S- value stands "
    "there; scaled values: after it, as the paper words it."
)
_TABLES = {
    1: {
        "file": "li_table1_consistency.csv",
        "label": "consistency",
        "decimals": 3,
        "roman": "I",
        "title": "Consistency: correlation over films of the sum of class activations with the logit of the selected "
        "class",
        "notes": f"{_CORRELATION} Individual scale: negative values dropped, each map scaled to its own 0 to 1. {_RAW} "
        "Where the head is pooling and one linear layer, the raw sum of CAM, Grad, XGrad and pixel-wise Grad is the "
        "logit up to constants, so there a 1 is an identity.",
    },
    2: {
        "file": "li_table2_masked_accuracy.csv",
        "label": "masked-features",
        "decimals": 3,
        "roman": "II",
        "title": "Performance with principal and with all other features only",
        "notes": "The features left out are set to zero at the target layer and the forward pass goes on; no mask "
        "depends on a film's own label.",
    },
    3: {
        "file": "li_table3_feature_selection.csv",
        "label": "selected-consistency",
        "decimals": 3,
        "roman": "III",
        "title": "Consistency with the logit on the common scale, of maps of all features (S-) and of the principal "
        "ones (FS-S-)",
        "notes": f"{_CORRELATION} {_RAW} FS-S- maps are scaled by P10 and P90 of the maps of all features.",
    },
    4: {
        "file": "li_table4_localisation_change.csv",
        "label": "increase-drop",
        "decimals": 2,
        "roman": "IV",
        "title": "Average increase (higher is better) and average drop (lower is better) of the confidence when the "
        "film is multiplied by its map",
        "notes": "Maps scaled to their own 0 to 1, without a threshold; films of confidence 0 do not count in the "
        "drop. Change: 100 (FS-CAM - CAM) / CAM, none where CAM has 0.",
    },
}
_KEY = {
    1: ["class", "method", "scale"],
    2: ["class", "metric", "features"],
    3: ["class", "method", "scale", "features"],
    4: ["class", "method", "metric", "features"],
}
_COLUMNS = {  # of the printed table: the last part of the key, and what heads it
    1: {(scale,): (name,) for scale, name in SCALES.items()},
    2: {(features,): (f"{name} features",) for features, name in FEATURES.items()},
    3: {
        (scale, features): (SCALES[scale], name)
        for scale in ("common_raw", "common_tanh")
        for features, name in (("all", "S-"), ("principal", "FS-S-"))
    },
    4: {
        (metric, features): (title, name)
        for metric, title in CHANGES.items()
        for features, name in (("all", "CAM"), ("principal", "FS-CAM"), ("change", "Change"))
    },
}


def read_published(number: int) -> pd.DataFrame:
    """Table 1 to 4 as Li et al. print it, a row per number. Tables 2 and 4: the X-rays only."""
    return pd.read_csv(PUBLISHED / _TABLES[number]["file"])


def table1(consistency: pd.DataFrame, *, dataset: str = "X-rays", data_label: str) -> pd.DataFrame:
    """Table I, how well the sum of class activations follows the logit, on individual and on common scales.

    Parameters
    ----------
    consistency : [class], method, scale, pearson, spearman, normal (bool, the test for a bivariate normal does not
    reject), chosen ('pearson' or
        'spearman', the coefficient the paper's rule takes; '' or NaN: neither exists), n, and optionally ci_low,
        ci_high of the chosen one, and features: then only the rows 'all' count. Methods may differ in n, where some are
        tried on few films: the printed table says on how many, and `sentences` leave those rows out.
    dataset : the paper's row to put beside, e.g. 'X-rays' or 'MNIST'.
    data_label : what ours were measured on, e.g. 'Simulated phantom films, not patients'.

    Returns
    -------
    DataFrame, a row a cell in the paper's order: table (1), data, dataset, class, method, scale, pearson, spearman,
    normal, chosen, value (the chosen coefficient), ci_low, ci_high, n, paper. NaN where there is no row, or the paper
    has no number.

    Raises
    ------
    ValueError : empty data_label, a data set the paper does not have, missing columns, unknown ids, or a row given
    twice.
    """
    if "features" in consistency:
        consistency = consistency[consistency["features"] == "all"]
    return _consistency(1, consistency, dataset, data_label, "")


def table2(masked: pd.DataFrame, *, selection: str, dataset: str = "X-rays", data_label: str) -> pd.DataFrame:
    """Table II, what the classifier can do with its principal features only, and with all others only.

    Parameters
    ----------
    masked : [class], features ('all', 'principal', 'non_principal'), n_features, n, and auroc or accuracy or both, each
    with its
        <name>_ci_low and <name>_ci_high (optional).
    selection : how the principal features were chosen, e.g. 'the top 5 % of the importance matrix for any class'.
    dataset, data_label : as for `table1`; the paper's numbers are accuracies.

    Returns
    -------
    DataFrame: table (2), data, dataset, selection, class, metric, features, value, ci_low, ci_high, n, n_features,
    paper.

    Raises
    ------
    ValueError : as `table1`, or an empty selection.
    """
    names = tuple(name for name in ("auroc", "accuracy") if name in masked)
    if not names:
        has = ", ".join(map(str, masked.columns))
        raise ValueError(f"the frame has neither a column auroc nor accuracy; it has {has}")
    frame = _checked(2, long_metrics(masked, names), ["n_features", "n"])
    printed = read_published(2).replace({"features": {"principal_top5pct": "principal"}}).query("dataset == @dataset")
    paper = {("accuracy", row.features): row.accuracy for row in printed.itertuples()}
    columns, levels = ["value", "ci_low", "ci_high", "n", "n_features"], [list(names), list(FEATURES)]
    return _assembled(2, frame, levels, columns, paper, dataset, data_label, selection)


def table3(consistency: pd.DataFrame, *, selection: str, dataset: str = "X-rays", data_label: str) -> pd.DataFrame:
    """Table III, consistency of the S-CAMs of all and of the principal features.

    `consistency` : as for `table1`, with features 'all' or 'principal'; rows of the individual scale do not count.
    `selection` : as for
    `table2`. Columns and errors as for `table1`, with selection and features.
    """
    if "scale" in consistency and "features" in consistency:
        consistency = consistency[(consistency["scale"] != "individual") & (consistency["features"] != "non_principal")]
    return _consistency(3, consistency, dataset, data_label, selection)


def table4(localisation: pd.DataFrame, *, selection: str, dataset: str = "X-rays", data_label: str) -> pd.DataFrame:
    """Table IV, how confidence changes when a film is multiplied by its map, for the CAM and the FS-CAM, and the change
    in percent.

    Parameters
    ----------
    localisation : [class], method, metric ('average_increase' or 'average_drop'), features ('all': the original CAM,
    'principal': the
        FS-CAM), value in percent, n, and optionally ci_low, ci_high.
    selection, dataset, data_label : as for `table2`.

    Returns
    -------
    DataFrame: table (4), data, dataset, selection, class, method, metric, features (also 'change', in percent of the
    original), value, ci_low, ci_high, n, paper. The paper prints changes only.

    Raises
    ------
    ValueError : as `table2`.
    """
    frame = _checked(4, localisation, ["value", "n"])
    key = ["class", "method", "metric"]
    before, after = (frame[frame["features"] == features].set_index(key) for features in ("all", "principal"))
    both = before.join(after["value"].rename("after"), how="inner")
    change = 100 * (both["after"] - both["value"]) / both["value"].where(both["value"] != 0)
    change = both.assign(value=change, features="change", ci_low=np.nan, ci_high=np.nan).reset_index()
    printed = read_published(4).query("dataset == @dataset")
    ids = {name: method for method, name in _PRINTED.items()}
    paper = {(ids[row.method], row.metric, "change"): row.percent_change for row in printed.itertuples()}
    levels = [_methods(frame), list(CHANGES), ["all", "principal", "change"]]
    frame = pd.concat([frame, change.drop(columns="after")], ignore_index=True)
    return _assembled(4, frame, levels, ["value", "ci_low", "ci_high", "n"], paper, dataset, data_label, selection)


def _consistency(number: int, frame: pd.DataFrame, dataset: str, data_label: str, selection: str) -> pd.DataFrame:
    frame = _checked(number, frame, [*COEFFICIENTS, "normal", "chosen", "n"])
    frame = frame.assign(chosen=frame["chosen"].where(frame["chosen"] != "", None))
    unknown = set(frame["chosen"].dropna()) - set(COEFFICIENTS)
    if unknown:
        raise ValueError(f"chosen is {', '.join(map(str, unknown))}: it must name the coefficient, pearson or spearman")
    chosen = frame["spearman"].where(frame["chosen"].notna())
    frame = frame.assign(value=np.where(frame["chosen"] == "pearson", frame["pearson"], chosen))
    if number == 1:
        levels, prefixes = [list(SCALES)], {("individual",): "", ("common_raw",): "s_"}
    else:
        levels = [["common_raw", "common_tanh"], ["all", "principal"]]
        prefixes = {("common_raw", "all"): "s_", ("common_raw", "principal"): "fs_s_"}
    printed = read_published(number).query("dataset == @dataset").set_index("method")["correlation_with_logit"]
    cells = [(method, *column) for method in _PRINTED for column in prefixes if len(printed)]
    paper = {(method, *column): printed[prefixes[tuple(column)] + _PRINTED[method]] for method, *column in cells}
    columns = [*COEFFICIENTS, "normal", "chosen", "value", "ci_low", "ci_high", "n"]
    return _assembled(number, frame, [_methods(frame), *levels], columns, paper, dataset, data_label, selection)


def _methods(frame: pd.DataFrame) -> list[str]:
    present = {*_PRINTED, *frame["method"]}
    return ordered({method: name for method, name in CAMS.items() if method in present}, frame["method"])


def _checked(number: int, frame: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    blank = {"class": "", "ci_low": np.nan, "ci_high": np.nan}
    frame = frame.assign(**{name: value for name, value in blank.items() if name not in frame})
    where = f"the frame for Table {_TABLES[number]['roman']}"
    remedy = ": one row each, and a column class where there are several selected classes"
    check_frame(frame, _KEY[number], columns, where, remedy)
    metrics = set(CHANGES) if number == 4 else {"auroc", "accuracy"}
    for name, known in (("scale", set(SCALES)), ("features", set(FEATURES)), ("metric", metrics)):
        unknown = set(frame[name]) - known if name in _KEY[number] else ()
        if unknown:
            raise ValueError(
                f"unknown {name} {', '.join(map(str, unknown))} in {where}: choose {', '.join(sorted(known))}"
            )
    return frame


def _assembled(number, frame, levels, columns, paper, dataset, data_label, selection) -> pd.DataFrame:
    """Every cell of the table, in its order: classes, then the product of the levels."""
    check_label(data_label)
    if number > 1 and not selection.strip():
        raise ValueError("selection is empty: say how the principal features were chosen")
    known = read_published(1)["dataset"].unique()
    if dataset not in known:
        raise ValueError(f"Li et al. have no data set {dataset!r}: choose {', '.join(known)}")
    cells = pd.MultiIndex.from_product([list(dict.fromkeys(frame["class"])) or [""], *levels], names=_KEY[number])
    table = frame.set_index(_KEY[number])[columns].reindex(cells)
    table["paper"] = [paper.get(cell[1:], np.nan) for cell in cells]
    table = table.reset_index()
    labels = {"table": number, "data": data_label, "dataset": dataset}
    labels |= {"selection": selection} if number > 1 else {}
    return table.assign(**labels)[[*labels, *table]]


def caption(table: pd.DataFrame, interval: str) -> str:
    """One paragraph under a table of `table1` to `table4`: what it shows, on which data and how many films, the
    intervals, the readings.

    `interval` names the method, e.g. 'percentile bootstrap over patients, 2000 replicates'.
    """
    spec, have = _TABLES[table_number(table)], table.dropna(subset=["value"])
    parts = [f"{spec['title']}. Data: {table['data'].iloc[0]}."]
    if len(have):
        parts.append(f"Over {range_text(have['n'], 'film', 'films')}.")
    if "selection" in table:
        parts.append(f"Principal features: {table['selection'].iloc[0]}.")
    parts.append(spec["notes"])
    of = " of the bold coefficient" if "chosen" in table else ""
    parts.append(f"95 % interval{of}: {interval}." if _has_intervals(table) else "No intervals.")
    row = f"Li et al., Table {spec['roman']}, {table['dataset'].iloc[0]}"
    what = {2: " (accuracy)", 4: " (the change only)"}.get(table_number(table), "")
    known = f"Paper: {row}{what}; other films and another classifier than ours."
    parts.append(known if table["paper"].notna().any() else f"{row}: not transcribed here.")
    if table_number(table) == 1:
        own = [CAMS.get(method, method) for method in table["method"].unique() if method not in _PRINTED]
        parts += [f"Without numbers in the paper: {', '.join(own)}."] if own else []
    if table[["value", "paper"]].isna().any(axis=None):
        parts.append(f"{MISSING}: none.")
    return " ".join(parts)


def table_number(table: pd.DataFrame) -> int:
    if "table" not in table or not len(table):
        raise ValueError("not a frame of table1, table2, table3 or table4: it has no rows or no column table")
    return int(table["table"].iloc[0])


def _has_intervals(table: pd.DataFrame) -> bool:
    return bool(np.isfinite(table[["ci_low", "ci_high"]].to_numpy(float)).all(axis=1).any())


def row_label(name: str, row: str) -> str:
    return ", ".join(filter(None, (class_name(name), CAMS.get(row) or METRICS.get(row) or row.capitalize())))


def with_fewer_films(table: pd.DataFrame) -> tuple[pd.Series, dict[tuple[str, str], str]]:
    """Which cells have fewer films than others of their class, and how many films the classes and methods of such cells
    have."""
    n = table["n"].astype(float)  # an empty frame has columns of objects
    fewer = n < n.groupby(table["class"]).transform("max")
    groups = n.groupby([table["class"], table["method"]], sort=False)
    return fewer, {key: range_text(films, "film", "films") for key, films in groups if fewer[films.index].any()}


def _lines(table: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """The printed lines, a group per class and method (Table II: metric); a label or a cell between ** is bold."""
    number = table_number(table)
    decimals, columns, rows_of = _TABLES[number]["decimals"], list(_COLUMNS[number]), _KEY[number][1]
    lines, cells = [], table.set_index(_KEY[number])
    few = with_fewer_films(table)[1] if number == 1 else {}
    for name, row in dict.fromkeys(table[["class", rows_of]].itertuples(index=False, name=None)):
        group = [cells.loc[(name, row, *column)] for column in columns]
        label = row_label(name, row) + (f" ({few[name, row]})" if (name, row) in few else "")
        if number in (1, 3):
            for coefficient, title in COEFFICIENTS.items():
                texts = [number_text(cell[coefficient], decimals) for cell in group]
                bold = [cell["chosen"] == coefficient and text != MISSING for cell, text in zip(group, texts)]
                texts = [f"**{text}**" if chosen else text for text, chosen in zip(texts, bold)]
                lines.append((f"**{label}**, {title}" if coefficient == "pearson" else title, texts))
        else:
            lines.append((f"**{label}**", [number_text(cell["value"], decimals) for cell in group]))
        if _has_intervals(table):
            bounds = [bounds_text(cell["ci_low"], cell["ci_high"], decimals, " to ") for cell in group]
            lines.append(("95 % interval", bounds))
        if number == 2:
            lines.append(("number of features", [number_text(cell["n_features"], 0) for cell in group]))
        lines.append(("paper", [number_text(cell["paper"], decimals) for cell in group]))
    return lines


def to_markdown(table: pd.DataFrame, *, interval: str) -> str:
    """A frame of `table1` to `table4` as a Markdown table with its caption below; `interval` as in `caption`."""
    number = table_number(table)
    groups, *names = zip(*_COLUMNS[number].values())
    head = [["Features" if number == 2 else "CAM", *groups], *(["", *level] for level in names)]
    rows = [*head, *([label, *cells] for label, cells in _lines(table))]
    return markdown(rows, f"**Table {_TABLES[number]['roman']}.** {caption(table, interval)}")


def to_latex(table: pd.DataFrame, *, interval: str) -> str:
    """A frame of `table1` to `table4` as a LaTeX table over the text width (packages: booktabs); `interval` as in
    `caption`."""
    number = table_number(table)
    *groups, names = zip(*_COLUMNS[number].values())
    head = [*(["", *level] for level in groups), ["Features" if number == 2 else "CAM", *names]]
    name, below = f"li-{_TABLES[number]['label']}", caption(table, interval)
    return latex(head, tex_body(_lines(table)), caption=below, label=name, gap=4)


def printed(table: pd.DataFrame, *, interval: str) -> tuple[str, str]:
    """A frame of `table1` to `table4` in Markdown and in LaTeX, for `records.write_paper_table`."""
    return to_markdown(table, interval=interval), to_latex(table, interval=interval)
