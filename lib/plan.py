"""The plan: every claim, how it is measured and what would count as an answer, fixed before the runs.

`params/plan.yaml` is the plan of the real study. A claim that is not in it is not judged. Every run keeps the digest of
the plan that stood when its training began, so that a plan which was changed afterwards does not look like the one
before.
"""

import datetime
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError, model_validator

from lib.analysis.comparison import BASELINE, record_effects
from lib.analysis.verdicts import verdicts
from lib.flat_yaml import ParameterError
from lib.params import PLAN, load_study
from lib.state import digest

# Opponents of a loss; and those that are the same networks, looked at in another way.
ABOUT_LOSSES = (BASELINE, "shifted_bce", "trunk", "head")
SAME_NETWORKS = ("other_film", "cam", "individual_scale", "all_features")


class Claim(BaseModel):
    """One claim about the difference of a metric to what it is compared with."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: str = Field(description="whose claim it is")
    says: str = Field(description="in words")
    family: str = Field(description="claims whose cells are corrected together")
    metric: str
    against: str = Field(description="what the run is compared with: bce, or a control")
    expected: Literal["higher", "lower", "equivalent"]


class Cell(BaseModel):
    """The task and backbone in which claims are decided."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    task: str
    backbone: str


class Plan(BaseModel):
    """Claims by name, and what they share."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    study: str = Field(description="the one that the margins belong to")
    written: datetime.date
    confirmatory: Cell = Field(description="of the study: all its other cells, and all other studies, are explored")
    seeds: str
    exclusions: list[str]
    margins: dict[str, PositiveFloat] = Field(description="by metric; without one, equivalence is not asked")
    claims: dict[str, Claim] = Field(min_length=1)
    digest: str = Field(description="of the file; runs keep it as `plan`")

    @model_validator(mode="after")
    def _one_claim_a_comparison(self):
        asked = [(claim.metric, claim.against) for claim in self.claims.values()]
        if twice := [key for key in asked if asked.count(key) > 1]:
            raise ValueError(f"two claims are about {' against '.join(twice[0])}")
        return self


def load_plan(path: Path = PLAN) -> Plan:
    """Read and check the plan.

    Raises
    ------
    ParameterError
        The file is missing or is no plan; the message names the key.
    """
    if not path.is_file():
        raise ParameterError(f"{path}: no such file; the plan of the study is part of the repository")
    try:
        return Plan(**yaml.safe_load(path.read_bytes()), digest=digest(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise ParameterError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (yaml.YAMLError, TypeError) as error:
        raise ParameterError(f"{path}: not a plan in yaml: {error}") from None


def claimed(plan: Plan, effects: pd.DataFrame, against: str) -> pd.DataFrame:
    """The effects that a claim of the plan is about, with a column `claim` in the place of `metric`.

    Parameters
    ----------
    effects : DataFrame
        metric, and the fields of `analysis.verdicts.Effect`; what no claim names is left out.
    against : str
        What they are differences to, as the plan calls it.
    """
    names = {claim.metric: name for name, claim in plan.claims.items() if claim.against == against}
    found = effects[effects["metric"].isin(names)]
    return found.rename(columns={"metric": "claim"}).assign(claim=found["metric"].map(names))


def record_claims(
    plan: Plan, records: pd.DataFrame, against: str, key: Sequence[str], *, n_replicates: int
) -> pd.DataFrame:
    """The effects on the metrics of per-film records that claims against `against` name, see
    `analysis.comparison.record_effects`; a control stands in the column `loss` under the name that the plan gives it.
    """
    metrics = [claim.metric for claim in plan.claims.values() if claim.against == against and claim.metric in records]
    options = {"n_replicates": n_replicates, "baseline": against, "paired": against in SAME_NETWORKS}
    effects = record_effects(records, metrics, key, **options)
    return claimed(plan, effects, against)


def judge(plan: Plan, study: str, effects: pd.DataFrame) -> pd.DataFrame:
    """A verdict for every cell of every claim, and whether the claim holds in it.

    Parameters
    ----------
    plan : Plan
    study : str
        In any but the plan's own all cells are explored: a rehearsal.
    effects : DataFrame
        claim (a name in the plan), task, backbone, loss, point, se, df and seeds: of `analysis.verdicts.effect`.

    Returns
    -------
    DataFrame
        The same with confirmatory (whether this cell decides the claim: the plan's own, and the chance of training is
        in it), source, says, family, metric, against, expected and margin of the claim; tests, p_different,
        p_equivalent, detectable and verdict of `analysis.verdicts.verdicts`, corrected over the confirmatory cells of a
        family, and over the others by themselves; and outcome: 'holds', 'contradicted' (different the other way, or
        different where equivalence was expected, or equivalent where a difference was), or 'undecided'.

    Raises
    ------
    ParameterError
        A claim that is not in the plan.
    """
    unknown = sorted(set(effects["claim"]) - plan.claims.keys())
    if unknown:
        raise ParameterError(
            f"{PLAN.name} has no claim {', '.join(unknown)}: a claim is written there before the runs that it is about"
        )
    said = pd.DataFrame([{"claim": name} | claim.model_dump() for name, claim in plan.claims.items()])
    cells = effects.merge(said, on="claim", how="left")
    cells["margin"] = [plan.margins.get(metric, np.nan) for metric in cells["metric"]]
    here = (cells["task"] == plan.confirmatory.task) & (cells["backbone"] == plan.confirmatory.backbone)
    cells["confirmatory"] = here & cells["seeds"] & (study == plan.study)
    found = verdicts(cells, ["family", "confirmatory"])
    direction = np.where(found["point"] > 0, "higher", "lower")
    answer = np.where(found["verdict"] == "different", direction, found["verdict"])
    decided = found["verdict"] != "undecided"
    outcome = np.where(answer == found["expected"], "holds", "contradicted")
    return found.assign(outcome=np.where(decided, outcome, "undecided"))


def decide(plan: Plan, judged: pd.DataFrame, losses: Collection[str]) -> pd.Series:
    """Whether each claim of the plan holds.

    Parameters
    ----------
    plan : Plan
    judged : DataFrame
        Of `judge`.
    losses : collection of str
        Those that the confirmatory cell is to have, see `deciding_losses`. A claim about losses is asked of each but
        BCE, one about a lens or a reading of maps of BCE.

    Returns
    -------
    Series by claim
        'holds' where it does for all of them, 'contradicted' where it is for any, else 'undecided'; 'incomplete' where
        one has no confirmatory cell yet, 'not judged' where none has.
    """
    cells, found = judged[judged["confirmatory"]], {}
    for name, claim in plan.claims.items():
        own = cells[cells["claim"] == name]
        outcomes = set(own["outcome"])
        asked = set(losses) - {BASELINE} if claim.against in ABOUT_LOSSES else {BASELINE}
        whole = "contradicted" if "contradicted" in outcomes else "undecided"
        whole = "holds" if outcomes == {"holds"} else whole
        found[name] = whole if asked <= set(own["loss"]) else "incomplete" if len(own) else "not judged"
    return pd.Series(found, name="outcome", dtype=object).rename_axis("claim")


def deciding_losses(plan: Plan) -> list[str]:
    """The losses of the plan's study in its confirmatory cell, as its file says, whatever runs were asked for."""
    study = load_study(plan.study, data_root=".")
    stem = f"{plan.confirmatory.task}-{plan.confirmatory.backbone}-"
    return [name.removeprefix(stem) for name in study.runs if name.startswith(stem)]


def chance_spread(differences: pd.DataFrame) -> pd.DataFrame:
    """What chance alone changes: the root mean square of the differences of BCE against BCE of another seed.

    Parameters
    ----------
    differences : DataFrame
        task, backbone, metric, difference, one row a pair of seeds; see `analysis.comparison.seed_differences`.

    Returns
    -------
    DataFrame
        A row a metric, a column a task and backbone.
    """
    squares = differences.assign(square=differences["difference"] ** 2)
    means = squares.groupby(["metric", "task", "backbone"], sort=False)["square"].mean()
    return np.sqrt(means).unstack(["task", "backbone"])
