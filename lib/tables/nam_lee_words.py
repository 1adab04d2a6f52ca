"""What the controls of Nam & Lee's methods say, in words, every number from a frame."""

import pandas as pd

from lib.analysis.controls import OTHER_FILM
from lib.analysis.place import metric_of
from lib.tables.layout import number_text
from lib.tables.nam_lee import METHODS
from lib.tables.names import display
from lib.tables.verdicts import answer


def stage_name(stage: str) -> str:
    """How a stage of `controls.cascade` is printed: 'none' is the trained network."""
    short = stage.removeprefix("trunk.")
    return "trained" if stage == "none" else stage if short.isdigit() else short


def place_table(means: pd.DataFrame, untrained: pd.DataFrame) -> pd.DataFrame:
    """Means of `sanity.place_means` of two networks as they are shown: a row per method and network, and the chance of
    hit and AUPRC, a column a score."""
    names = {"this run": means, "untrained": untrained, "chance": means.assign(value=means["chance"])}
    wide = pd.concat(
        {name: frame.pivot(index="method", columns="score", values="value") for name, frame in names.items()}
    ).swaplevel()
    wide.index = [f"{METHODS.get(method, method)}, {name}" for method, name in wide.index]
    return wide[list(dict.fromkeys(means["score"]))].sort_index().rename(columns=display)


def place_sentences(means: pd.DataFrame, effects: pd.DataFrame) -> list[str]:
    """LRP and RAP against CAM by scores that no constant and no scale can move: a Markdown paragraph a method, of
    `sanity.place_means` and the effects against 'cam' of `lens_effects.relevance_effects`."""
    value, out = means.set_index(["method", "score"])["value"], []
    effects = effects.set_index("metric")
    for method in (name for name in METHODS if name != "cam" and name in value):
        parts = [
            f"{display(score)} {value[method, score]:.3f} against {value['cam', score]:.3f} "
            f"({_difference(effects.loc[metric_of(score, method)])})"
            for score in value[method].index
        ]
        out.append(f"**{METHODS[method]} against CAM, by place**: {'; '.join(parts)}.")
    return out


def lens_sentences(judged: pd.DataFrame, likeness: pd.DataFrame) -> list[str]:
    """Whether each method sees what was learnt, by the claims of the plan, and what happens to its maps where weights
    are random: a Markdown paragraph a method.

    Parameters
    ----------
    judged : DataFrame
        Of `plan.judge`: the claims on pixel AUPRC against 'untrained' and 'other_film'.
    likeness : DataFrame
        Of `sanity.likeness_means`: to the maps of the same network with every weight random ('untrained'), to such maps
        of 'another film', and of other networks by kind ('another seed', 'another backbone').
    """
    out = []
    for method, rows in ((name, judged[judged["metric"] == metric_of("auprc", name)]) for name in METHODS):
        if not len(rows):
            continue
        said = next(text for outcome, text in _OUTCOMES.items() if outcome in set(rows["outcome"]))
        cells = [
            f"over {_OPPONENTS[row['against']]} {_difference(row)}, {_answer(row)}, on {row['n_patients']:.0f} patients"
            for _, row in rows.iterrows()
        ]
        alike = likeness[likeness["method"] == method].set_index("against")
        ranks = [f"{_MAPS.get(name, name)} {_ranks(alike.loc[name])}" for name in alike.index]
        ranks += [] if len(ranks) > len(_MAPS) else [_ALONE]
        said_of_maps = f"Rank correlation of its maps with those of {'; '.join(ranks)}."
        out.append(f"**{METHODS[method]} {said}.** Pixel AUPRC {'; '.join(cells)}. {said_of_maps}")
    return out


# The first that any claim has.
_OUTCOMES = {
    "contradicted": "would FAIL by this run",
    "undecided": "is neither shown to see what was learnt nor to fail",
    "holds": "sees what was learnt",
}
_MAPS = {"untrained": "the same network with every weight random (one draw)", OTHER_FILM: "that for another film"}
_ALONE = "no other seed or backbone of this run is trained: repeatability and reproducibility are unknown"
_OPPONENTS = {"untrained": "the untrained network", "other_film": "another film's boxes"}


def _answer(row) -> str:
    if row["verdict"] == "undecided":
        return f"undecided ({number_text(row['detectable'], 3)} could have been shown)"
    return f"equivalent (within {row['margin']:g})" if row["verdict"] == "equivalent" else answer(row)


def _ranks(row) -> str:
    return f"{number_text(row['rank'], 2)} (size {number_text(row['abs_rank'], 2)})"


def _difference(row) -> str:
    return f"{row['point']:+.3f} [{number_text(row['low'], 3)}, {number_text(row['high'], 3)}]"
