"""The plan: every claim, how it is measured and what would count as an answer, fixed before the runs.

`params/plan.yaml` is the plan of the real study. A claim that is not in it is not judged; its digest is printed beside
the runs, so that a plan which was changed afterwards does not look like the one before.
"""

import datetime
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError

from lib.analysis.comparison import record_effects
from lib.analysis.verdicts import verdicts
from lib.params import ROOT, ParameterError

PATH = ROOT / "params" / "plan.yaml"


class Claim(BaseModel):
    """One claim about the difference of a metric to what it is compared with."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: str = Field(description="whose claim it is")
    says: str = Field(description="in words")
    family: str = Field(description="claims whose cells are corrected together")
    metric: str
    against: str = Field(description="what the run is compared with: bce, or a control")
    expected: Literal["higher", "lower", "equivalent"]


class Plan(BaseModel):
    """Claims by name, and what they share."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    study: str = Field(description="the one that the margins belong to")
    written: datetime.date
    seeds: str
    exclusions: list[str]
    margin_rule: str
    margins: dict[str, PositiveFloat] = Field(description="by metric; without one, equivalence is not asked")
    claims: dict[str, Claim] = Field(min_length=1)
    digest: str = Field(description="of the file: the first 12 digits of its SHA-256")

    def margin(self, study: str, metric: str) -> float:
        """The equivalence margin of a metric; NaN where none is fixed, as for any study but the plan's own."""
        return self.margins.get(metric, np.nan) if study == self.study else np.nan


def load_plan(path: Path = PATH) -> Plan:
    """Read and check the plan.

    Raises
    ------
    ParameterError
        The file is missing or is no plan; the message names the key.
    """
    if not path.is_file():
        raise ParameterError(f"{path}: no such file; the plan of the study is part of the repository")
    content = path.read_bytes()
    try:
        return Plan(**yaml.safe_load(content), digest=hashlib.sha256(content).hexdigest()[:12])
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
    effects = record_effects(records, metrics, key, n_replicates=n_replicates, baseline=against)
    return claimed(plan, effects, against)


def judge(plan: Plan, study: str, effects: pd.DataFrame) -> pd.DataFrame:
    """A verdict for every cell of every claim, and whether the claim holds in it.

    Parameters
    ----------
    plan : Plan
    study : str
        Its margins are used for its own study alone.
    effects : DataFrame
        claim (a name in the plan), point, se, df and whatever tells cells apart: of `analysis.verdicts.effect`.

    Returns
    -------
    DataFrame
        The same with source, says, family, metric, against, expected and margin of the claim, p_different,
        p_equivalent, verdict, and outcome: 'holds', 'contradicted' (different the other way, or different where
        equivalence was expected, or equivalent where a difference was), or 'undecided'.

    Raises
    ------
    ParameterError
        A claim that is not in the plan.
    """
    unknown = sorted(set(effects["claim"]) - plan.claims.keys())
    if unknown:
        raise ParameterError(
            f"{PATH.name} has no claim {', '.join(unknown)}: a claim is written there before the runs that it is about"
        )
    said = pd.DataFrame([{"claim": name} | claim.model_dump() for name, claim in plan.claims.items()])
    cells = effects.merge(said, on="claim", how="left")
    cells["margin"] = [plan.margin(study, metric) for metric in cells["metric"]]
    found = verdicts(cells)
    direction = np.where(found["point"] > 0, "higher", "lower")
    answer = np.where(found["verdict"] == "different", direction, found["verdict"])
    decided = found["verdict"] != "undecided"
    outcome = np.where(answer == found["expected"], "holds", "contradicted")
    return found.assign(outcome=np.where(decided, outcome, "undecided"))


def null_margins(differences: pd.DataFrame) -> dict[str, float]:
    """Margins by the plan's rule, from BCE runs alone.

    Parameters
    ----------
    differences : DataFrame
        metric, difference: of BCE runs of two seeds, one row a pair of seeds, task and backbone.

    Returns
    -------
    dict of metric to ``2 sqrt(mean(difference^2))``
    """
    squares = differences.assign(square=differences["difference"] ** 2).groupby("metric", sort=False)["square"]
    return {metric: 2 * float(np.sqrt(value)) for metric, value in squares.mean().items()}
