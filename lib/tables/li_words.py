"""What the tables of Li et al. and the five uses of the importance matrix say, in words, every number from a frame."""

import numpy as np
import pandas as pd

from lib.tables.layout import number_text, range_text
from lib.tables.li import CAMS, CHANGES, COEFFICIENTS, FEATURES, SCALES, row_label, table_number, with_fewer_films
from lib.tables.names import METRICS, class_name, display


def sentences(table: pd.DataFrame) -> list[str]:
    """What a frame of `table1` to `table4` says, in words: Markdown sentences, every number taken from the frame."""
    said = {1: _scale_sentences, 2: _mask_sentences, 3: _selection_sentences, 4: _change_sentences}
    return said[table_number(table)](table)


def scale_label(data_label: str, kind: str, bounds: str) -> str:
    """The data label, with the common scale where it is not the paper's."""
    usual = (kind, bounds) == ("tanh", "pixels")
    return data_label if usual else f"{data_label}; common scale: {kind}, from {bounds}"


def headings(run) -> tuple[str, str, str]:
    """Headings of the figures of a `lib.params.Run`: of the run, of its selected class, and by loss."""
    task, backbone, loss = map(display, (run.task, run.backbone, run.loss))
    of_run = f"{task}, {backbone}, {loss}, seed {run.seed}"
    return of_run, f"{class_name(run.selected_class)}: {of_run}", f"{task}, {backbone}, by loss, seed {run.seed}"


def selection_text(share: float, masks: np.ndarray, selected: int, union: bool = False) -> str:
    """How the principal features were chosen, as Tables II to IV say it. `masks` : bool (F, C). `union` : of the
    features of all ten digits, as Table II has them."""
    text = f"the top {100 * share:g} % of a class's column of the importance matrix"
    text += f" ({masks[:, selected].sum()} of {len(masks)} features)"
    return f"the union over ten classes of {text}, {masks.any(1).sum()} features" if union else text


def feature_text(name: str, candidates: pd.DataFrame) -> str:
    """The most extreme feature of one class. `candidates` : of `importance.confounder_candidates`, any order."""
    feature = candidates[candidates["class"] == name].nlargest(1, "robust_z").iloc[0]
    return (
        f"Feature {feature['feature']} stands out most for {name}: robust z {feature['robust_z']:.1f}, "
        f"selectivity {feature['selectivity']:.2f} (1 where there is one class only)."
    )


def marker_text(name: str, verdict, area: float) -> str:
    """Whether a planted marker was found out. `name` : the class on whose films it is; `verdict` : of
    `findings.confounder_test`; `area` : the share of the film that was covered."""
    said = f"The marker planted on films with {name} lies within {area:.1%} of the film."
    if not np.isfinite(verdict.excess_low):
        nothing = "The class's top features add nothing that covering it could take away"
        return f"{said} {nothing}: the confounder is not found."
    return (
        f"{said} Covering that place takes away **{verdict.share:.1%}** (95 % interval over patients: "
        f"{verdict.low:.1%} to {verdict.high:.1%}) of what the class's top features add on its films and not on "
        f"others, and of no other class more than {verdict.control:.1%} ({class_name(verdict.control_class)}). The "
        f"difference is {verdict.excess:.1%}, at the lower end of its interval {verdict.excess_low:.1%}: the "
        f"confounder is {'found' if verdict.found else 'not found'}."
    )


def use_sentences(
    selected: str,
    gap: pd.DataFrame,
    curve: pd.DataFrame,
    confounder: str,
    pruned: pd.DataFrame,
    losses: pd.DataFrame,
    outliers: pd.DataFrame,
) -> list[str]:
    """What the five uses of the importance matrix say of a run, in words.

    Parameters
    ----------
    selected : the class that is looked at.
    gap : of `importance.train_test_difference`.
    curve : of `findings.importance_curve`, on test films.
    confounder : of `feature_text` and `marker_text`.
    pruned : of `findings.pruning`.
    losses : of `findings.features_per_class`, with a column loss.
    outliers : of `findings.outliers`, with the film's image.
    """
    worst, strangest, n_features = gap.loc[gap["difference"].idxmax()], outliers.iloc[0], curve["k"].max()
    carry = curve.loc[(curve["class"] == selected) & (curve["share"] >= 0.8), "k"].min()
    auroc = pruned["auroc"].iloc[0]
    free = pruned.loc[(pruned["auroc"] >= auroc - 0.01).cummin(), "n_removed"].max()
    mean = losses.groupby("loss", sort=False)[["n_features80", "overlap"]].mean()
    counts = ", ".join(f"{display(loss)} {count:.0f}" for loss, count in mean["n_features80"].items())
    shared = ", ".join(f"{display(loss)} {share:.2f}" for loss, share in mean["overlap"].items())
    lines = [
        f"Between training and test films the column of {worst['class']} differs most: by {worst['difference']:.2f} of "
        f"its size, where chance gives {worst['by_chance']:.2f}.",
        f"{carry} of {n_features} features hold 80 % of the positive importance for {selected} on test films.",
        confounder,
        f"At least {free} of {n_features} features can be removed for at most 0.01 of the AUROC {auroc:.3f}.",
        f"Features that hold 80 % of a class's positive importance, mean over classes: {counts}.",
        f"The test film least like its class is {strangest['image']} ({strangest['class']}, distance "
        f"{strangest['distance']:.2f}).",
    ]
    if losses["class"].nunique() > 1:
        lines.insert(-1, f"Principal features that two classes share (Jaccard index), mean over classes: {shared}.")
    return lines


def control_table(run: tuple[pd.DataFrame, pd.DataFrame], untrained: tuple[pd.DataFrame, pd.DataFrame]) -> pd.DataFrame:
    """A trained network and an untrained one side by side, each as `findings.control` gives them; what only one has is
    left out.

    Returns
    -------
    DataFrame
        By its name a row for each correlation of sums with the logit (of all features, by the paper's rule) and each
        AUROC: run, run_low, run_high, untrained, untrained_low, untrained_high (95 %).
    """
    parts = []
    for name, (sums, scores) in {"run": run, "untrained": untrained}.items():
        sums = sums[sums["features"] == "all"]
        value = np.where(sums["chosen"] == "pearson", sums["pearson"], sums["spearman"])
        names = sums["method"].map(CAMS).fillna(sums["method"]) + ", " + sums["scale"].map(SCALES).str.lower()
        first = sums.assign(name="correlation, " + names, value=value)[["name", "value", "ci_low", "ci_high"]]
        names = "AUROC, " + scores["features"].map(FEATURES).str.lower() + " features"
        second = scores.assign(name=names)[["name", "auroc", "auroc_ci_low", "auroc_ci_high"]]
        table = pd.concat([first, second.set_axis(first.columns, axis=1)]).dropna(subset="name").set_index("name")
        parts.append(table.set_axis([name, f"{name}_low", f"{name}_high"], axis=1))
    return parts[0].join(parts[1], how="inner")


def control_sentences(table: pd.DataFrame) -> list[str]:
    """What `control_table` says, in words: which measures are higher than an untrained network's, the two intervals
    apart, and of which that is not shown. The plan claims nothing here."""
    told = table["run_low"] - table["untrained_high"] > 5e-4  # an identity is 1 in both networks, up to rounding
    unknown = table[["run_low", "untrained_high"]].isna().any(axis=1)
    groups = {
        "Higher than in the untrained network, so they depend on what was learnt": told,
        "Not shown to be higher than in the untrained network, so no evidence of what was learnt": ~told & ~unknown,
        "Without an interval, so that nothing is known": unknown,
    }
    out = []
    for said, rows in groups.items():
        cells = [
            f"{row.Index} {number_text(row.run, 3)} (untrained {number_text(row.untrained, 3)})"
            for row in table[rows].itertuples()
        ]
        out += [f"{said}: {'; '.join(cells)}."] if cells else []
    if (~told & ~unknown).get("AUROC, all features"):
        out.append("Its AUROC with all features is not above the untrained one's: nothing shows that it has learnt.")
    return out


def _raised(table: pd.DataFrame, value: str, column: str, before: str, after: str) -> tuple[int, int, float]:
    """How many of how many classes and methods have more of `value` where `column` is `after` than where it is
    `before`; the mean rise."""
    wide = table.astype({value: float}).pivot(index=["class", "method"], columns=column, values=value)
    rise = (wide[after] - wide[before]).dropna()
    return int((rise > 0).sum()), len(rise), float(rise.mean()) if len(rise) else np.nan


def _of(count: int, total: int) -> str:
    return f"all {total}" if count == total and total > 1 else f"{count or 'none'} of {total}"


def _rises(table: pd.DataFrame, column: str, before: str, after: str) -> list[str]:
    """'Pearson's for 3 of 4 methods (+0.108 on average)', then Spearman's, then that of the paper's rule; empty if
    nothing can be compared."""
    readings = {"pearson": "Pearson", "spearman": "Spearman", "value": "the paper's rule"}
    found = {name: _raised(table, coefficient, column, before, after) for coefficient, name in readings.items()}
    noun = "methods" if table["class"].nunique() == 1 else "pairs of class and method"
    return [
        f"{_of(n, all_)} {noun} by {name} ({mean:+.3f} on average)" for name, (n, all_, mean) in found.items() if all_
    ]


def _scale_sentences(table: pd.DataFrame) -> list[str]:
    out, (fewer, few) = [], with_fewer_films(table)
    if few:
        most = range_text(table.loc[~fewer, "n"], "film", "films")
        left_out = "; ".join(f"{row_label(*key)} ({films})" for key, films in few.items())
        out.append(f"The counts leave out what was measured on fewer than {most}: {left_out}.")
        table = table.assign(**{name: table[name].where(~fewer) for name in (*COEFFICIENTS, "value")})
    for scale, name in (("common_raw", "raw sums"), ("common_tanh", "sums of scaled values")):
        said, rises = "cannot be compared: no method has both scales", _rises(table, "scale", "individual", scale)
        if rises:
            said = f"against individual ones: the correlation with the logit rises for {', '.join(rises)}"
        out.append(f"The common scale ({name}) {said}.")
    first = table[table["class"] == table["class"].iloc[0]]
    count, total, mean = _raised(first, "paper", "scale", "individual", "common_raw")
    if total:
        dataset, many = table["dataset"].iloc[0], _of(count, total)
        out.append(f"The paper's S- maps ({dataset}) raise it for {many} methods ({mean:+.3f} on average).")
    by_method = table[table["scale"] == "common_raw"].groupby("method", sort=False)["pearson"]
    exact = [CAMS.get(method, method) for method, values in by_method if (values > 0.9995).all()]
    if exact:
        out.append(
            f"The raw sum of {', '.join(exact)} is the logit up to constants (Pearson above 0.9995): with a pooled "
            "linear head that is an identity, not evidence."
        )
    return out + _rule_sentence(table)


def _rule_sentence(table: pd.DataFrame) -> list[str]:
    chosen = table.loc[table["value"].notna(), "chosen"]
    many = _of(int((chosen == "spearman").sum()), len(chosen))
    return [f"The paper's rule takes Spearman in {many} cells."] if len(chosen) else []


def _mask_sentences(table: pd.DataFrame) -> list[str]:
    out = []
    for (name, metric), rows in table.groupby(["class", "metric"], sort=False):
        rows = rows.set_index("features")
        value, count = rows["value"], rows["n_features"]
        if not np.isfinite(value.to_numpy(float)).all():
            continue
        where = f"{class_name(name)}: " if name else ""
        low, high = rows["ci_low"], rows["ci_high"]
        verdict = "the other features do at least as well as the principal ones, unlike in the paper"
        if value["principal"] > value["non_principal"]:
            verdict = "the principal features do better than all others together, as in the paper"
        if low["principal"] <= high["non_principal"] and low["non_principal"] <= high["principal"]:  # never for NaN
            verdict = "the intervals overlap, so the two are not told apart"
        out.append(
            f"{where}With {count['principal']:.0f} principal features of {count['all']:.0f} the "
            f"{METRICS.get(metric, metric)} is {value['principal']:.3f}, with all {value['all']:.3f}, with the other "
            f"{count['non_principal']:.0f} {value['non_principal']:.3f}: {verdict}."
        )
    if not out:
        unknown = "the numbers of all, principal or non-principal features are not there"
        out.append(f"The masks cannot be compared: {unknown}.")
    paper = table.dropna(subset=["paper"]).drop_duplicates("features").set_index("features")["paper"]
    if len(paper):
        out.append(
            f"The paper's accuracies ({table['dataset'].iloc[0]}): {paper['principal']:.3f} with the principal "
            f"features, {paper['all']:.3f} with all, {paper['non_principal']:.3f} with the others."
        )
    return out


def _selection_sentences(table: pd.DataFrame) -> list[str]:
    out = []
    for scale, name in (("common_raw", "Raw sums"), ("common_tanh", "Sums of scaled values")):
        rises = _rises(table[table["scale"] == scale], "features", "all", "principal")
        said = "with the principal features only the correlation with the logit rises for"
        out += [f"{name}: {said} {', '.join(rises)}."] if rises else []
    if not out:
        out.append("The selection cannot be compared: no method has maps of all and of the principal features.")
    printed = table[(table["scale"] == "common_raw") & (table["class"] == table["class"].iloc[0])]
    count, total, mean = _raised(printed, "paper", "features", "all", "principal")
    if total:
        out.append(
            f"The paper's FS-S- maps ({table['dataset'].iloc[0]}) have a higher one than its S- maps for "
            f"{_of(count, total)} methods ({mean:+.3f} on average)."
        )
    return out + _rule_sentence(table)


def _change_sentences(table: pd.DataFrame) -> list[str]:
    out = []
    for metric, better in (("average_increase", 1), ("average_drop", -1)):
        change = table[(table["metric"] == metric) & (table["features"] == "change")]
        ours, paper = change["value"].dropna(), change.drop_duplicates("method")["paper"].dropna()
        name = CHANGES[metric].removesuffix(" (%)").lower()
        if len(ours):
            better_in = _of(int((ours * better > 0).sum()), len(ours))
            out.append(
                f"With the principal features only the {name} changes by {ours.mean():+.1f} % on average; it improves "
                f"in {better_in} cells."
            )
        else:
            out.append(f"The change of the {name} is not known: no method has both maps, or the original's is 0.")
        if len(paper):
            better_in = _of(int((paper * better > 0).sum()), len(paper))
            out.append(f"The paper's ({change['dataset'].iloc[0]}): {paper.mean():+.1f} %, it improves in {better_in}.")
    return out
