"""Effects of lenses against their controls: against films really drawn again, seed by seed."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from lib.analysis import lens_effects
from lib.analysis.verdicts import Effect
from tests.analysis.reference_statistics import auroc, resampled_films

RUN = {"task": "multilabel", "backbone": "tdensenet"}
PATIENTS = [str(k // 2) for k in range(24)]
R = 60


def relevance(seed, loss="bce", methods=("cam", "lrp"), shift=0.0, other=True):
    rng = np.random.default_rng([seed, len(loss), int(10 * shift)])
    rows = [(f"{k:02d}", "Mass", patient, m) for k, patient in enumerate(PATIENTS) for m in methods]
    frame = pd.DataFrame(rows, columns=["image", "class", "patient", "method"]).sample(frac=1, random_state=seed)
    columns = ["empty", "hit", "auprc", "iou_tuned", *(["hit_other", "auprc_other"] if other else [])]
    frame[columns] = rng.random((len(frame), len(columns))) + shift
    frame.iloc[[0, 7], 4:] = np.nan  # maps that were refused
    return frame.assign(**RUN, loss=loss, seed=seed)


def of(frame, method, column):
    part = frame[frame["method"] == method].set_index("image")
    return part[column].sort_index().to_numpy()


def close(row, point, drawn, arms):
    """The effect of means over seeds, from its definition; the degrees of freedom have tests of their own."""
    between = sum(np.var(arm, ddof=1) / len(arm) for arm in arms) if len(arms[0]) > 1 else 0
    assert row["point"] == pytest.approx(point, abs=1e-9)
    assert row["se"] == pytest.approx(np.sqrt(np.var(drawn, ddof=1) + between), abs=1e-9)
    assert row["seeds"] == (len(arms[0]) > 1) and 10 <= row["n_patients"] <= 12


@pytest.mark.parametrize("seeds", [1, 3])
def test_relevance_against_each_opponent(seeds):
    runs = {
        loss: [relevance(seed, loss, shift=k / 5) for seed in range(seeds)] for k, loss in enumerate(("bce", "wbce"))
    }
    bare = {loss: [relevance(9 + seed, loss, other=False) for seed in range(seeds)] for loss in runs}
    place, untrained = (pd.concat(sum(parts.values(), [])) for parts in (runs, bare))
    found = lens_effects.relevance_effects(place, untrained, n_replicates=R)
    assert {name: len(frame) for name, frame in found.items()} == {"cam": 8, "untrained": 16, "other_film": 8}
    films = resampled_films(PATIENTS, R, 0)
    for against, frame in found.items():
        assert list(frame) == [*RUN, "loss", "metric", *Effect._fields, "n_seeds", "n_baseline", "n_patients"]
        for _, row in frame.iterrows():
            score, method = row["metric"].removesuffix("_lrp"), "lrp" if row["metric"].endswith("_lrp") else "cam"
            own = [of(one, method, score) for one in runs[row["loss"]]]
            if against == "untrained":
                other = [of(one, method, score) for one in bare[row["loss"]]]
                pairs = [(a, b) for a in own for b in other]
                arms = [[np.nanmean(one) for one in several] for several in (own, other)]
            else:
                source = ("cam", score) if against == "cam" else (method, f"{score}_other")
                pairs = [(a, of(one, *source)) for a, one in zip(own, runs[row["loss"]])]
                arms = [[np.nanmean(a - b) for a, b in pairs]]
            point = np.mean([np.nanmean(a - b) for a, b in pairs])
            drawn = [np.mean([np.nanmean((a - b)[chosen]) for a, b in pairs]) for chosen in films]
            close(row, point, drawn, arms)
            assert row["n_seeds"] == row["n_baseline"] == seeds


def test_metrics_are_called_as_the_plan_calls_them():
    found = lens_effects.relevance_effects(relevance(0), relevance(1, other=False), n_replicates=R)
    assert set(found["cam"]["metric"]) == {"empty_lrp", "hit_lrp", "auprc_lrp", "iou_tuned_lrp"}
    assert set(found["other_film"]["metric"]) == {"hit", "auprc", "hit_lrp", "auprc_lrp"}
    plain = lens_effects.relevance_effects(relevance(0, other=False), relevance(1, other=False), n_replicates=R)
    assert not len(plain["other_film"])  # not a difference of 0
    with pytest.raises(ValueError, match="control untrained were evaluated on different films"):
        lens_effects.relevance_effects(relevance(0), relevance(1).iloc[3:], n_replicates=R)


# --- features


def features(seed, loss="bce"):
    rng = np.random.default_rng([seed, len(loss)])
    logit = rng.normal(size=24)
    frame = pd.DataFrame({"image": [f"{k:02d}" for k in range(24)], "patient": PATIENTS, "class": "Mass"})
    frame = frame.assign(target=np.arange(24) % 3 == 0, logit=logit, logit_principal=logit + rng.normal(size=24))
    for name, noise in (("individual_scale", 2), ("common_scale", 0.5), ("raw_sum", 0.1)):
        frame[name] = 1e3 * (logit + noise * rng.normal(size=24))
    return frame.sample(frac=1, random_state=seed).assign(**RUN, loss=loss, seed=seed)


@pytest.mark.parametrize("seeds", [1, 2])
def test_features_against_individual_scales_and_all_features(seeds):
    runs = {loss: [features(seed, loss) for seed in range(seeds)] for loss in ("bce", "wbce")}
    found = lens_effects.feature_effects(pd.concat(sum(runs.values(), [])), n_replicates=R)
    assert {name: frame["metric"].unique().tolist() for name, frame in found.items()} == {
        "individual_scale": ["consistency_gradpp", "consistency_gradpp_raw"],
        "all_features": ["auroc_principal"],
    }
    films = [list(range(24)), *resampled_films(PATIENTS, R, 0)]
    for frame in found.values():
        assert set(frame["loss"]) == {"bce", "wbce"}
        for _, row in frame.iterrows():
            apart = []
            for one in (one.sort_values("image") for one in runs[row["loss"]]):
                by = {name: one[name].to_numpy() for name in one}
                if row["metric"] == "auroc_principal":
                    scores = [
                        [auroc(by[name][f], by["target"][f]) for f in films] for name in ("logit_principal", "logit")
                    ]
                else:
                    name = "raw_sum" if row["metric"].endswith("raw") else "common_scale"
                    scores = [
                        [np.corrcoef(by[name][f], by["logit"][f])[0, 1] for f in films]
                        for name in (name, "individual_scale")
                    ]
                apart.append(np.subtract(*scores))
            mean = np.mean(apart, axis=0)
            close(row, mean[0], mean[1:], [[one[0] for one in apart]])


def test_seeds_with_other_films_are_refused_and_no_common_scale_is_no_effect():
    with pytest.raises(ValueError, match="the seeds of multilabel-tdensenet-bce were evaluated on different films"):
        lens_effects.feature_effects(pd.concat([features(0), features(1).iloc[1:]]), n_replicates=5)
    none = features(0).assign(common_scale=np.nan, individual_scale=7.0)
    row = lens_effects.feature_effects(none, n_replicates=5)["individual_scale"].iloc[0]
    assert np.isnan(row["point"]) and np.isnan(row["se"])


def test_scores_of_films_are_taken_by_row():
    rows = np.array([7, 2, 5])
    films = pd.DataFrame({"image": list("cab"), "patient": list("xyx"), "labels": ""}, index=rows)
    targets = np.zeros((9, 2), int)
    targets[[2, 5], 1] = 1
    names = [
        (row, method, part, scale)
        for row in sorted(rows)
        for method in ("grad", "gradpp")
        for part in ("all", "principal")
        for scale in ("individual", "common_raw", "common_tanh")
    ]
    sums = pd.DataFrame(names, columns=["row", "method", "features", "scale"])
    sums["activation"] = np.arange(len(sums), dtype=float)
    logits = {"all": np.array([[0, 1], [0, 2], [0, 3]]), "principal": np.array([[0, 4], [0, 5], [0, 6]])}
    view = SimpleNamespace(classes=["Mass", "Nodule"], targets=targets)
    found = lens_effects.feature_scores(view, films, 1, sums, logits)
    assert found["image"].tolist() == list("cab") and (found["class"] == "Nodule").all()
    assert found["target"].tolist() == [0, 1, 1] and found["logit"].tolist() == [1, 2, 3]
    assert found["logit_principal"].tolist() == [4, 5, 6]
    of_map = sums[(sums["method"] == "gradpp") & (sums["features"] == "all")].set_index(["row", "scale"])["activation"]
    for column, scale in (
        ("individual_scale", "individual"),
        ("common_scale", "common_tanh"),
        ("raw_sum", "common_raw"),
    ):
        assert found[column].tolist() == [of_map[row, scale] for row in rows]
