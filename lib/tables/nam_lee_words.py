"""What the controls of Nam & Lee's methods say, in words, every number from a frame."""

import numpy as np
import pandas as pd

from lib.analysis.relevance.sanity import BOUND
from lib.tables.layout import number_text
from lib.tables.nam_lee import METHODS
from lib.tables.names import display


def stage_name(stage: str) -> str:
    """How a stage of `controls.cascade` is printed: 'none' is the trained network."""
    short = stage.removeprefix("trunk.")
    return "trained" if stage == "none" else stage if short.isdigit() else short


def place_table(means: pd.DataFrame, untrained: pd.DataFrame) -> pd.DataFrame:
    """Means of `sanity.place_means` of two networks as they are shown: a row per method and network, a column a score,
    and the chance of hit and AUPRC beneath."""
    names = {"this run": means, "untrained": untrained}
    wide = pd.concat(
        {name: frame.pivot(index="method", columns="score", values="value") for name, frame in names.items()}
    ).swaplevel()
    wide.index = [f"{METHODS.get(method, method)}, {name}" for method, name in wide.index]
    scores = list(dict.fromkeys(means["score"]))
    chance = means.drop_duplicates("score").set_index("score")["chance"].rename("chance")
    return pd.concat([wide[scores].sort_index(), chance[scores].to_frame().T]).rename(columns=display)


def place_sentences(means: pd.DataFrame, differences: pd.DataFrame) -> list[str]:
    """LRP and RAP against CAM by scores that no constant and no scale can move: a Markdown paragraph a method, of
    `sanity.place_means` and `place_differences`."""
    value, out = means.set_index(["method", "score"])["value"], []
    for method, rows in differences[differences["against"] == "cam"].groupby("method", sort=False):
        parts = [
            f"{display(row.score)} {value[method, row.score]:.3f} against {value['cam', row.score]:.3f} "
            f"({_difference(row)}: {_direction(row)})"
            for row in rows.itertuples()
        ]
        out.append(f"**{METHODS.get(method, method)} against CAM, by place**: {'; '.join(parts)}.")
    return out


def control_sentences(bar: pd.DataFrame, differences: pd.DataFrame, likeness: pd.DataFrame) -> list[str]:
    """What the controls say of each method: a Markdown paragraph a method.

    `bar` : of `sanity.bar`. `differences` : of `sanity.place_differences`. `likeness` : of `sanity.likeness_means`, to
    the maps of other networks by kind ('untrained', 'another seed', 'another backbone').
    """
    other = differences[(differences["against"] == "other_film") & (differences["score"] == "auprc")]
    other, out = other.set_index("method"), []
    for row in bar.itertuples():
        gain = pd.Series({"difference": row.gain, "ci_low": row.gain_low, "ci_high": row.gain_high})
        text = f"**{METHODS.get(row.method, row.method)} {'FAILS' if row.fails else 'is not shown to fail'}.** "
        text += f"Pixel AUPRC over the untrained network: {_difference(gain)}, on {row.n} pairs: "
        text += f"{_UNTRAINED[row.untrained]}. "
        film = other.loc[row.method]
        text += f"Over another film's boxes: {_difference(film)}, {_FILM[_direction(film)]}. "
        if row.random == "unknown":
            text += "No stable map of the random network: it is not known whether its maps would change. "
        else:
            fell = f"at most {BOUND:g} once {stage_name(row.forgotten)} is random" if row.forgotten else ""
            text += (
                f"With every weight random its maps keep a rank correlation of {row.rank:.2f} with the trained "
                f"network's ({fell or f'never below {BOUND:g}'}): {_RANDOM[row.random]}. "
            )
        kin = likeness[likeness["method"] == row.method].set_index("against")["rank"]
        said = [f"{kin[name]:.2f} of {name}" for name in kin.index if name != "untrained"]
        floor = number_text(kin.get("untrained", np.nan), 2)
        text += (
            f"Likeness to the maps (rank correlation) {' and '.join(said)}, {floor} of the untrained network."
            if said
            else "No other seed or backbone of this run is trained: repeatability and reproducibility are unknown."
        )
        out.append(text)
    return out


_UNTRAINED = {
    "fails": "it does not tell what was learnt from nothing learnt",
    "passes": "it tells them apart",
    "unknown": "no interval, so nothing is known",
}
_RANDOM = {"fails": "they are pictures of the film, not of what was learnt", "passes": "they depend on what was learnt"}
_FILM = {
    "higher": "so it looks at this film",
    "lower": "so it lies rather where such lesions are on other films",
    "not told apart": "so what it knows of the place may be anatomy alone",
    "no interval": "so nothing is known",
}


def _difference(row) -> str:
    return f"{row.difference:+.3f} [{number_text(row.ci_low, 3)}, {number_text(row.ci_high, 3)}]"


def _direction(row) -> str:
    if not (np.isfinite(row.ci_low) and np.isfinite(row.ci_high)):
        return "no interval"
    return "higher" if row.ci_low > 0 else "lower" if row.ci_high < 0 else "not told apart"
