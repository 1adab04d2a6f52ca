"""The parts of a change against their definition and, with their intervals, against a slow count of patients."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from scipy.stats import t as student
from sklearn.metrics import average_precision_score, roc_auc_score

from lib.analysis.changes import PARTS, pair_means, parts, prediction_changes, record_changes
from lib.analysis.statistics import patient_replicates

CLASSES, LOSSES, R = ["Mass", "Edema"], ("bce", "wbce", "focal"), 40
PATIENTS = np.array([4, 4, 1, 7, 7, 7, 2, 9, 9, 5, 3, 3])


def test_the_parts_against_their_definition():
    rng = np.random.default_rng(4)
    bb, lb, bl, ll = rng.random((4, 7))
    found = parts(bb, lb, bl, ll)
    for i in range(7):
        first_trunk = (lb[i] - bb[i], ll[i] - lb[i])  # exchange the trunk, then the head
        first_head = (ll[i] - bl[i], bl[i] - bb[i])
        assert found.trunk[i] == pytest.approx((first_trunk[0] + first_head[0]) / 2)
        assert found.head[i] == pytest.approx((first_trunk[1] + first_head[1]) / 2)
        assert found.interaction[i] == pytest.approx(first_head[0] - first_trunk[0])
    np.testing.assert_allclose(found.trunk + found.head, found.whole)
    # What the head alone does is the head's: a trunk that is the same has no part.
    same = parts(bb, bb, ll, ll)
    np.testing.assert_allclose(same.trunk, 0)
    np.testing.assert_allclose(same.head, ll - bb)


def frames(seeds=(0,), losses=LOSSES, seed=0):
    """Records or predictions of every trunk and head on a few films, and those of BCE shifted to every loss."""
    rng, films = np.random.default_rng(seed), [f"{i:02d}.png" for i in range(len(PATIENTS))]
    n = len(films) * len(CLASSES)
    given = {"task": "multilabel", "backbone": "tdensenet", "image": np.repeat(films, len(CLASSES))}
    given |= {"patient": np.repeat(PATIENTS, len(CLASSES)), "class": CLASSES * len(films)}
    given |= {"target": np.tile([0, 1, 1, 0, 0, 1, 0, 1], n)[:n]}
    made, shifted = [], []
    for one in seeds:
        for trunk in losses:
            for head in (*losses, "trained"):
                values = {"iobb": rng.random(n), "logit": rng.normal(size=n), "seed": one}
                made.append(pd.DataFrame(given | values | {"trunk": trunk, "head": head}))
        for loss in losses[1:]:
            values = {"iobb": rng.random(n), "logit": rng.normal(size=n), "seed": one}
            shifted.append(pd.DataFrame(given | values | {"shifted_to": loss}))
    order = rng.permutation(n * len(made))
    return pd.concat(made, ignore_index=True).iloc[order], pd.concat(shifted, ignore_index=True)


def of(frame, **wanted):
    """Rows with these values, by image and class."""
    for column, value in wanted.items():
        frame = frame[frame[column] == value]
    return frame.sort_values(["image", "class"])


def slow_parts(value, records, shifted, loss, seed):
    """Each part of a quantity `value(rows)` of one loss and seed, from its definition."""
    pair = {(t, h): value(of(records, seed=seed, trunk=t, head=h)) for t in LOSSES for h in (*LOSSES, "trained")}
    rival, bce, run = value(of(shifted, seed=seed, shifted_to=loss)), pair["bce", "trained"], pair[loss, "trained"]
    bb, lb, bl, ll = pair["bce", "bce"], pair[loss, "bce"], pair["bce", loss], pair[loss, loss]
    trunk, head = (lb - bb + ll - bl) / 2, (bl - bb + ll - lb) / 2
    return dict(zip(PARTS, (run - bce, ll - bb, trunk, head, ll - lb - bl + bb, rival - bce, run - rival)))


def cell(changes, loss, part, metric):
    (row,) = changes[(changes["loss"] == loss) & (changes["part"] == part) & (changes["metric"] == metric)].itertuples()
    return row


@pytest.mark.parametrize("seeds", [(0,), (0, 3)])
def test_changes_of_records_against_a_slow_count(seeds):
    records, shifted = frames(seeds)
    records.loc[(records["trunk"] == "bce") & (records["image"] < "03.png"), "iobb"] = np.nan  # empty maps
    found = record_changes(records, shifted, ["iobb"], n_replicates=R)
    assert len(found) == (len(LOSSES) - 1) * len(PARTS)
    of_patients = found.pivot(index="loss", columns="part", values="n_patients")
    assert (of_patients.drop(columns="rest") == 5).all(
        axis=None
    )  # patients 4 and 1 have empty maps of BCE's trunk alone
    assert (of_patients["rest"] == 7).all()
    counts = patient_replicates(PATIENTS, R, 0)
    weights = np.repeat(counts.counts[:, counts.patient], len(CLASSES), axis=1)
    by_seed = {
        (loss, part): [slow_parts(lambda rows: rows["iobb"].to_numpy(), records, shifted, loss, s)[part] for s in seeds]
        for loss in LOSSES[1:]
        for part in PARTS
    }
    for (loss, part), values in by_seed.items():
        row = cell(found, loss, part, "iobb")
        assert row.point == pytest.approx(np.mean([np.nanmean(one) for one in values]))
        drawn = [
            np.mean([one[kept] @ w[kept] / w[kept].sum() for one in values for kept in [~np.isnan(one)]])
            for w in weights
        ]
        variance = np.var(drawn, ddof=1)
        if len(seeds) > 1:
            variance += np.var([np.nanmean(one) for one in values], ddof=1) / len(seeds)
        assert row.se == pytest.approx(np.sqrt(variance)) and row.seeds == (len(seeds) > 1)
        assert row.n_seeds == len(seeds)
        assert row.high - row.point == pytest.approx(student.ppf(0.975, row.df) * row.se)
    whole = found.pivot(index="loss", columns="part", values="point")
    np.testing.assert_allclose(whole["trunk"] + whole["head"], whole["whole"])


METRICS = {
    "auroc": lambda y, z: np.mean([roc_auc_score(y[c], z[c]) for c in (0, 1)]),
    "ap": lambda y, z: np.mean([average_precision_score(y[c], z[c]) for c in (0, 1)]),
    "mean_probability": lambda y, z: expit(z).mean(),
}


def score(metric):
    def value(rows):
        by_class = [
            [rows.loc[rows["class"] == name, column].to_numpy() for name in CLASSES] for column in ("target", "logit")
        ]
        return METRICS[metric](*map(np.array, by_class))

    return value


@pytest.mark.parametrize("metric", METRICS)
def test_changes_of_predictions_against_scikit_learn(metric):
    predictions, shifted = frames((0, 3))
    found = prediction_changes(predictions, shifted, n_replicates=R)
    assert found.iloc[0]["seeds"] and (found["se"] > 0).all()
    for loss in LOSSES[1:]:
        slow = [slow_parts(score(metric), predictions, shifted, loss, seed) for seed in (0, 3)]
        for part in PARTS:
            assert cell(found, loss, part, metric).point == pytest.approx(np.mean([one[part] for one in slow]))


def test_the_interval_of_a_mean_probability_is_that_of_its_records():
    """Over all classes alike, the mean probability is a mean of records: both ways must draw the same patients."""
    predictions, shifted = frames()
    records = [frame.assign(p=expit(frame["logit"])) for frame in (predictions, shifted)]
    by_record = record_changes(*records, ["p"], n_replicates=R)
    by_class = prediction_changes(predictions, shifted, n_replicates=R)
    by_class = by_class[by_class["metric"] == "mean_probability"].reset_index(drop=True)
    columns = ["loss", "part", "point", "se", "low", "high"]
    pd.testing.assert_frame_equal(by_record[columns], by_class[columns])


def test_every_trunk_with_every_head():
    records, shifted = frames()
    found = pair_means(records, records, ["iobb"])
    assert list(found.index.get_level_values("metric").unique()) == ["auroc", "ap", "mean_probability", "iobb"]
    assert set(found.columns) == {*LOSSES, "trained"}
    rows = of(records, trunk="focal", head="wbce")
    assert found.loc[("iobb", "focal"), "wbce"] == pytest.approx(rows["iobb"].mean())
    assert found.loc[("auroc", "focal"), "wbce"] == pytest.approx(score("auroc")(rows))
    # Runs that have no head in common beside each other: what was not made is undefined.
    rival = shifted.assign(trunk="rival", head=shifted["shifted_to"])
    beside = pair_means(*[pd.concat([records[records["head"] == "trained"], rival])] * 2, ["iobb"])
    assert np.isnan(beside.loc[("ap", "rival"), "trained"]) and np.isfinite(beside.loc[("ap", "rival"), "focal"])


def test_a_loss_without_a_second_seed_is_compared_with_its_own():
    records, shifted = frames((0, 3))
    once = (records["seed"] == 0) | ~records[["trunk", "head"]].isin(["focal"]).any(axis=1)
    found = record_changes(records[once], shifted, ["iobb"], n_replicates=R)
    alone = [frame[frame["seed"] == 0] for frame in (records, shifted)]
    assert cell(found, "focal", "trunk", "iobb").n_seeds == 1 and cell(found, "wbce", "trunk", "iobb").n_seeds == 2
    expected = cell(record_changes(*alone, ["iobb"], n_replicates=R), "focal", "trunk", "iobb").point
    assert cell(found, "focal", "trunk", "iobb").point == expected


def test_a_metric_that_no_record_has_and_a_single_patient():
    records, shifted = frames()
    found = record_changes(records.assign(ior=np.nan), shifted.assign(ior=np.nan), ["ior"], n_replicates=R)
    assert found[["point", "se", "low", "high"]].isna().all(axis=None)
    first = records["image"] == "00.png"
    single = records.assign(ior=records["iobb"].where(first)), shifted.assign(ior=shifted["iobb"])
    found = record_changes(*single, ["ior"], n_replicates=R)
    assert found["point"].notna().all() and found[["se", "low", "high"]].isna().all(axis=None)
    assert (found["n_patients"] == 1).all()
    one = record_changes(records.assign(patient=1), shifted.assign(patient=1), ["iobb"], n_replicates=R)
    assert one["point"].notna().all() and one[["se", "low", "high"]].isna().all(axis=None)


@pytest.mark.parametrize(
    "changes", [prediction_changes, lambda *frames, **options: record_changes(*frames, ["iobb"], **options)]
)
def test_pairs_of_other_films_are_refused(changes):
    records, shifted = frames()
    with pytest.raises(ValueError, match="different films"):
        changes(records.iloc[1:], shifted, n_replicates=R)
