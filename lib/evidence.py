"""What a study's results say about the claims of the plan: from the records that the lenses left to effects."""

import pandas as pd

from lib import records
from lib.analysis.changes import prediction_changes, record_changes
from lib.analysis.comparison import BASELINE, elsewhere, prediction_effects, with_control
from lib.analysis.lens_effects import feature_effects, relevance_effects
from lib.params import Study, load_study
from lib.plan import Plan, claimed, record_claims

PAIR, FILM = ["image", "class"], ["image"]


def gather(plan: Plan, study: Study, *, n_replicates: int) -> pd.DataFrame:
    """The effects that the plan has claims about, as far as the study's results reach.

    Parameters
    ----------
    plan : Plan
    study : Study
        02, 03 and 04 have been run for every run of it. What 06, 07 and 09 left is used where it is; so are the BCE
        runs of `shuffled_study`.
    n_replicates : int
        Of the bootstrap over patients.

    Returns
    -------
    DataFrame
        claim, task, backbone, loss, and the fields of `analysis.verdicts.Effect`, n_seeds, n_baseline, n_patients: for
        `plan.judge`.

    Raises
    ------
    RecordError
        A run whose results of 02, 03 or 04 are missing.
    """
    drawn = {"n_replicates": n_replicates}
    predictions = records.read_runs(study, "predictions.parquet")
    alignment, concepts = (records.read_runs(study, f"{name}.parquet") for name in ("cam_alignment", "concepts"))
    found = [claimed(plan, prediction_effects(predictions, **drawn), BASELINE)]
    found += [
        record_claims(plan, table, BASELINE, key, **drawn) for table, key in ((alignment, PAIR), (concepts, FILM))
    ]
    for name, (maps, channels) in controls(study, alignment).items():
        found.append(record_claims(plan, with_control(alignment, maps, name), name, PAIR, **drawn))
        found.append(record_claims(plan, with_control(concepts, channels, name), name, FILM, **drawn))
    found += _of_changes(plan, study, alignment, drawn)
    found += _of_lenses(plan, study, drawn)
    return pd.concat(found, ignore_index=True)


def controls(study: Study, alignment: pd.DataFrame) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
    """Alignment and concepts of what the BCE runs are set against, by the plan's name for it: the untrained networks,
    the boxes of another film, and, where that study's results are there, networks trained on shuffled labels. None of
    a study without a BCE run.

    Raises
    ------
    RecordError
        The shuffled study differs in more than its labels.
    """
    if not any(run.loss == BASELINE for run in study.every_run):
        return {}
    bare = (records.read_runs(study, f"{name}_untrained.parquet", [BASELINE]) for name in ("cam_alignment", "concepts"))
    other = records.read_runs(study, "concepts_other_film.parquet", [BASELINE])
    found = {"untrained": tuple(bare), "other_film": (elsewhere(alignment), other)}
    if study.shuffled_study:
        shuffled = load_study(study.shuffled_study, data_root=study.data_root)
        tables = _made(shuffled, shuffled.runs, "cam_alignment", "concepts")
        if all(map(len, tables)):
            _require_alike(study, shuffled)
            found["shuffled"] = tuple(tables)
    return found


def _require_alike(study, shuffled):
    own, other = study.every_run[0].identity, shuffled.every_run[0].identity
    may = {"shuffle_labels", "task", "backbone", "loss", "seed"}
    if apart := [key for key in own if own[key] != other[key] and key not in may]:
        raise records.RecordError(f"{shuffled.study} is no control of {study.study}: {', '.join(apart)} differ")


def _of_changes(plan, study, alignment, drawn):
    """Of what 09 left: the runs against BCE and a constant, and the parts of the trunk and of the head."""
    names = ("trunk_head", "trunk_head_predictions", "prior_shift", "prior_shift_predictions")
    maps, predictions, shifted, moved = _made(study, study.trunk_and_head, *names)
    if maps.empty:
        return []
    parts = pd.concat(
        [record_changes(maps, shifted, ["iobb", "ior"], **drawn), prediction_changes(predictions, moved, **drawn)]
    )
    found = [claimed(plan, parts[parts["part"] == name], name) for name in ("trunk", "head")]
    for loss, rival in shifted.groupby("shifted_to", sort=False):
        trained = alignment[alignment["loss"] == loss]
        beside = pd.concat([trained, rival.assign(loss="shifted_bce")], ignore_index=True)
        found.append(record_claims(plan, beside, "shifted_bce", PAIR, **drawn))
    return found


def _of_lenses(plan, study, drawn):
    """Of what 06 and 07 left. Claims about a lens are about BCE's runs, and CAM's own come from 03's records."""
    found = []
    place, bare = _made(study, study.attribution, "place", "place_untrained")
    if len(place):
        for against, effects in relevance_effects(place, bare, **drawn).items():
            asked = (effects["loss"] == BASELINE) & (effects["metric"] != "auprc")
            found.append(claimed(plan, effects if against == "cam" else effects[asked], against))
    (scores,) = _made(study, study.features, "feature_scores")
    if len(scores):
        found += [claimed(plan, effects, against) for against, effects in feature_effects(scores, **drawn).items()]
    return found


def _made(study, names, *files):
    """These tables of those of the named runs, with all their seeds, that have them all."""
    runs = [study.run(name, seed) for name in names for seed in study.seeds_of(name)]
    runs = [run for run in runs if all((run.run_folder / f"{file}.parquet").is_file() for file in files)]
    return [records.stack(runs, f"{file}.parquet") for file in files]
