import tracemalloc
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from lib.analysis.cam import class_activation_maps
from lib.analysis.features import consistency as module
from lib.analysis.features.consistency import class_totals, consistency, henze_zirkler
from lib.analysis.features.scale import tanh_scale
from lib.analysis.features.survey import survey
from lib.analysis.statistics import patient_replicates
from tests.analysis.features import reference_features
from tests.analysis.features import reference_integrated as reference
from tests.analysis.features.small_study import CLASSES, METHODS, ROWS, TARGETS, N, close, principal, study, view
from tests.toys import bare, draw


def pairs(n=60):
    generator = np.random.default_rng(n)
    x = generator.normal(size=n)
    return {
        "normal": (x, 0.8 * x + generator.normal(size=n)),
        "scales": (1e9 * x, 1e-9 * (x + generator.normal(size=n)) + 3),
        "skewed": (np.exp(x), x + generator.normal(size=n)),
        "heavy": (generator.standard_cauchy(n), generator.standard_cauchy(n)),
        "nearly linear": (x, x + 1e-3 * generator.normal(size=n)),
        "ties": (np.round(x), np.round(x + generator.normal(size=n))),
    }


@pytest.mark.parametrize("n", [5, 60])
@pytest.mark.parametrize("name", pairs())
def test_henze_zirkler_equals_its_formula_and_pingouin(name, n):
    pingouin = pytest.importorskip("pingouin")
    x, y = pairs(n)[name]
    statistic, p = henze_zirkler(x, y)
    if name != "scales":  # the direct inverse loses its digits there; the test is the same for x / 1e9
        np.testing.assert_allclose(statistic, reference.henze_zirkler(x, y), rtol=1e-8)
    else:
        x, y = x / 1e9, (y - 3) * 1e9
    peer = pingouin.multivariate_normality(np.stack([x, y], axis=1))
    np.testing.assert_allclose([statistic, p], [peer.hz, peer.pval], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(
        henze_zirkler(y, -3 * x + 2 * y), [statistic, p], rtol=1e-6, atol=1e-12
    )  # invariant to affine maps


def test_henze_zirkler_of_many_films_is_exact_both_ways(monkeypatch):
    generator = np.random.default_rng(0)
    for draws in (
        generator.normal(size=(2, 3000)),
        generator.standard_t(4, size=(2, 3000)),
        np.round(generator.normal(size=(2, 3000)), 1),
    ):
        b2 = (1.25 * 3000) ** (1 / 3) / 2
        direct = sum(np.exp(-b2 / 2 * ((draws - point[:, None]) ** 2).sum(axis=0)).sum() for point in draws.T)
        for block in (2**12, 2**21):  # one pass, and many
            monkeypatch.setattr(module, "_BLOCK", block)
            np.testing.assert_allclose(module._gauss_sum(draws, b2), direct, rtol=1e-12)
    far = np.append(
        generator.normal(size=(2, 500)), [[300.0], [-300.0]], axis=1
    )  # too wide for the transform: pairs in blocks
    direct = sum(np.exp(-2 * ((far - point[:, None]) ** 2).sum(axis=0)).sum() for point in far.T)
    for block in (2**12, 2**21):
        monkeypatch.setattr(module, "_BLOCK", block)
        np.testing.assert_allclose(module._gauss_sum(far, 4.0), direct, rtol=1e-12)


def test_henze_zirkler_keeps_its_level_and_its_memory():
    generator = np.random.default_rng(1)
    rejected = np.mean([henze_zirkler(*generator.normal(size=(2, 40)))[1] < 0.05 for _ in range(400)])
    assert 0.02 < rejected < 0.09
    tracemalloc.start()
    henze_zirkler(*generator.normal(size=(2, 25000)))
    henze_zirkler(*generator.standard_cauchy(size=(2, 4000)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 128 * 2**20  # a matrix of all pairs would take 5 GB


@pytest.mark.parametrize("name", pairs())
def test_consistency_gives_both_coefficients_and_picks_one(name):
    x, y = pairs()[name]
    found = consistency(x, y)
    np.testing.assert_allclose(found.pearson, stats.pearsonr(x, y)[0], rtol=1e-9)
    np.testing.assert_allclose(found.spearman, stats.spearmanr(x, y)[0], rtol=1e-9)
    assert found.normal == (found.p > 0.05) and found.n == 60 and found.note == ""
    assert found.coefficient == (found.pearson if found.normal else found.spearman)
    assert found.used == {"normal": "pearson", "skewed": "spearman", "heavy": "spearman"}.get(name, found.used)


def test_consistency_without_contrast():
    x = np.arange(5.0)
    for totals, logits, note in (
        (np.zeros(5), x, "constant totals"),
        (x, np.full(5, 0.1), "constant logits"),
        (np.full(5, 7.0), np.zeros(5), "constant totals and logits"),
        (x[:2], x[:2], "2 films are too few"),
        (x[:0], x[:0], "0 films are too few"),
    ):
        found = consistency(totals, logits)
        assert found.note == note and found.used == "" and not found.normal
        assert np.isnan([found.coefficient, found.pearson, found.spearman, found.statistic, found.p]).all()
    found = consistency(x, -3 * x + 1)
    assert (found.pearson, found.spearman, found.statistic, found.p, found.normal) == (
        pytest.approx(-1),
        -1,
        20,
        0,
        False,
    ) and "linear" in found.note
    for totals, logits, message in (
        (x, x[:3], "shape"),
        (x, np.where(x == 3, np.nan, x), "logits: NaN or infinite value of film 3"),
    ):
        with pytest.raises(ValueError, match=message):
            consistency(totals, logits)


def test_raw_totals_are_the_logits_for_xgrad_and_hires():
    maps, weights, bias = draw((30, 6, 4, 4), 1).relu(), draw((3, 6), 2), draw((3,), 3)
    logits = maps.mean((2, 3)) @ weights.T + bias
    for method in ("xgrad", "hires"):
        raw = class_activation_maps(maps, weights, method)
        torch.testing.assert_close(raw.sum((2, 3)), logits - bias)
        totals = class_totals(raw, *tanh_scale(raw.quantile(0.1).item(), raw.quantile(0.9).item()), 16)
        np.testing.assert_allclose(
            totals["raw"], 16 * (logits - bias), rtol=1e-9
        )  # enlarged by whole factors, a sum only grows
        for c in range(3):
            found = consistency(totals["raw"][:, c], logits[:, c])
            assert found.pearson == pytest.approx(1, abs=1e-12) and found.coefficient == pytest.approx(1, abs=1e-12)
            # The scale is not linear and the individual scale forgets the level: neither is exact.
            assert consistency(totals["scaled"][:, c], logits[:, c]).pearson < 0.9999
            assert consistency(totals["individual"][:, c], logits[:, c]).pearson < 0.99


def test_totals_equal_their_definitions():
    raw = 3 * draw((3, 2, 3, 4), 4)
    raw[1, 0] = 0.7  # no contrast: the usual CAM is empty
    alpha, beta = tanh_scale([-1.0, -2.0], [2.0, 3.0])
    totals, first = class_totals(raw, alpha, beta, 7), class_totals(raw, alpha, beta, 7, order="scale_first")
    for n in range(3):
        for c in range(2):
            native = raw[n, c].numpy()
            film = reference.bilinear(native, 7)
            positive = np.maximum(native, 0)
            span = positive.max() - positive.min()
            unit = (positive - positive.min()) / span if span > 1e-12 else np.zeros_like(native)
            np.testing.assert_allclose(totals["raw"][n, c], film.sum(), rtol=1e-9)
            np.testing.assert_allclose(totals["scaled"][n, c], np.tanh(alpha[c] * film + beta[c]).sum(), rtol=1e-9)
            np.testing.assert_allclose(
                first["scaled"][n, c], reference.bilinear(np.tanh(alpha[c] * native + beta[c]), 7).sum(), rtol=1e-9
            )
            np.testing.assert_allclose(
                totals["individual"][n, c], reference.bilinear(unit, 7).sum(), rtol=1e-9, atol=1e-12
            )
    np.testing.assert_array_equal(class_totals(raw, 1.0, 0.0, 7)["raw"], totals["raw"])


def test_activation_sums_equal_a_loop(case):
    scales = {method: (np.array([1.0, 0.7 + k, 2.0]), np.array([0.0, -0.2, 1.0])) for k, method in enumerate(METHODS)}
    table = module.activation_sums(view(case), ROWS, 1, scales, 9, features=principal(case))
    assert list(table) == ["row", "method", "features", "scale", "activation", "logit"] and len(table) == N * 2 * 2 * 3
    logits = case.double(case.films.double()).detach().numpy()
    found = table.set_index(["row", "method", "features", "scale"])
    for method in METHODS:
        for label, mask in (("all", 1.0), ("principal", principal(case)[method].astype(float)[:, None, None])):
            expected = [
                reference_features.totals((weighted * mask).sum(0), 0.7 + METHODS.index(method), -0.2, 9)
                for weighted in case.weighted[method][:, 1]
            ]
            for scale in ("individual", "common_raw", "common_tanh"):
                part = found.xs((method, label, scale), level=(1, 2, 3)).loc[ROWS]
                close(part["activation"], [one[scale] for one in expected], 1e-4)
                close(part["logit"], logits[:, 1])


def sums_of(activation, logit, **names):
    return pd.DataFrame(
        {"row": np.arange(len(logit)) + 3, "method": "grad", "features": "all", "scale": "common_raw"}
        | names
        | {"activation": activation, "logit": logit}
    )


def test_consistency_table_equals_numpy_and_its_intervals_a_loop(monkeypatch):
    generator = np.random.default_rng(0)
    x = generator.normal(size=90)
    y = x + 0.7 * generator.normal(size=90)
    patients = {row: f"p{row % 31}" for row in range(200)}
    skewed, offset = np.round(np.exp(2 * x), 1), 1e6 + 1e-3 * x  # ties; digits that a sum of squares would lose
    table = module.consistency_table(
        pd.concat([sums_of(skewed, y), sums_of(offset, y, scale="common_tanh")]), patients, 200, seed=4
    )
    assert table["chosen"].tolist() == ["spearman", "pearson"] and (table["n"] == 90).all()
    draws = patient_replicates([patients[row] for row in np.arange(90) + 3], 200, 4)
    for (_, line), values, statistic in zip(table.iterrows(), (skewed, offset), (stats.spearmanr, stats.pearsonr)):
        np.testing.assert_allclose(
            [line["pearson"], line["spearman"]],
            [stats.pearsonr(values, y)[0], stats.spearmanr(values, y)[0]],
            rtol=1e-6,
        )
        drawn = []
        for counts in draws.counts:
            chosen = np.repeat(np.arange(90), counts[draws.patient])
            drawn.append(statistic(values[chosen], y[chosen])[0])
        np.testing.assert_allclose([line["ci_low"], line["ci_high"]], np.percentile(drawn, [2.5, 97.5]), rtol=1e-6)
        assert line["ci_low"] < line[line["chosen"]] < line["ci_high"]
    monkeypatch.setattr(module, "_REPLICATES", 100)  # one replicate at a time
    again = module.consistency_table(
        pd.concat([sums_of(skewed, y), sums_of(offset, y, scale="common_tanh")]), patients, 200, seed=4
    )
    pd.testing.assert_frame_equal(table, again, rtol=1e-12)


def test_correlations_that_do_not_exist():
    y = np.random.default_rng(0).normal(size=20)
    patients = {row: str(row) for row in range(40)}
    table = module.consistency_table(
        pd.concat(
            [
                sums_of(np.full(20, 2.5), y),
                sums_of(np.full(20, np.nan), y, method="gradpp"),
                sums_of(y + y**2, y, method="xgrad"),
            ]
        ),
        patients,
        50,
    )
    for which, note in ((0, "constant totals"), (1, "no common scale")):
        assert table.loc[which, ["pearson", "spearman", "ci_low", "ci_high"]].isna().all()
        assert table.loc[which, "chosen"] == "" and not table.loc[which, "normal"] and note in table.loc[which, "note"]
    assert np.isfinite(table.loc[2, ["pearson", "spearman", "ci_low", "ci_high"]].astype(float)).all()
    alone = module.consistency_table(sums_of(y + y**2, y), {row: "one patient" for row in range(40)}, 50)
    none = module.consistency_table(sums_of(y + y**2, y), patients, 0)
    for frame in (alone, none):
        assert frame[["ci_low", "ci_high"]].isna().all(axis=None) and np.isfinite(frame["pearson"]).all()
    rare = module.consistency_table(sums_of(np.where(np.arange(20) == 4, 1.0, 0.0), y), patients, 50).iloc[
        0
    ]  # replicates without film 4
    assert rare["ci_low"] <= rare["spearman"] <= rare["ci_high"]
    with pytest.raises(ValueError, match="totals: NaN"):
        module.consistency_table(sums_of(np.append(np.nan, y[1:]), y), patients, 50)


def test_maps_of_zeros_do_not_stop_the_table():
    weights = torch.tensor([[-1.0, -2.0, -1.0], [1.0, 2.0, -1.0]])
    case = SimpleNamespace(
        model=bare(weights), films=torch.rand(N, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    )
    found = survey(view(case, layer="trunk", targets=TARGETS[:, :2], classes=CLASSES[:2]), ROWS, ["gradpp"], size=4)
    scales = found.scales()  # no weight of class 0 is positive
    for c, exists in ((0, False), (1, True)):
        sums = module.activation_sums(view(case, layer="trunk"), ROWS, c, scales, 4)
        table = module.consistency_table(sums, {row: str(row) for row in range(40)}, 20).set_index("scale")
        assert (table["pearson"].notna() == exists).all() and ((table["chosen"] != "") == exists).all()


def test_methods_that_perturb_the_film_join_on_a_few_films(monkeypatch):
    monkeypatch.setattr(module, "SLOW", ("score",))
    case = study("pooled")
    seen, sums = view(case), sums_of(np.arange(3.0), np.arange(3.0))
    options = {"size": 9, "kind": "tanh", "bounds": "pixels"}
    assert module.with_perturbation(sums, seen, ROWS, ROWS, 1, 0, **options) is sums
    found = module.with_perturbation(sums, seen, ROWS[:5], ROWS[2:], 1, 3, **options)
    pd.testing.assert_frame_equal(found[:3], sums)
    slow = found[3:]
    assert slow["method"].eq("score").all() and slow["row"].unique().tolist() == ROWS[[2, 4, 6]].tolist()
    scales = module.survey(seen, ROWS[[0, 2, 4]], ["score"], size=9).scales()
    expected = module.activation_sums(seen, ROWS[[2, 4, 6]], 1, scales, 9)
    np.testing.assert_allclose(slow["activation"], expected["activation"])


def test_pearson_of_films_drawn_again_is_that_of_the_films_repeated(monkeypatch):
    x, y = pairs(20)["heavy"]
    patients = np.arange(20) // 2
    draws = patient_replicates(patients, 15, 0)
    found = module.replicate_correlations(x, y, draws.counts, draws.patient)
    for value, counts in zip(found, draws.counts, strict=True):
        films = np.repeat(np.arange(20), counts[draws.patient])
        assert value == pytest.approx(np.corrcoef(x[films], y[films])[0, 1])
    monkeypatch.setattr(module, "_REPLICATES", 4 * 20)  # four at a time
    np.testing.assert_array_equal(module.replicate_correlations(x, y, draws.counts, draws.patient), found)
    assert np.isnan(module.replicate_correlations(np.ones(20), y, draws.counts, draws.patient)).all()
