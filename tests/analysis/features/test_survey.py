import copy
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

from lib.analysis import cam
from lib.analysis.features import consistency as consistency_module
from lib.analysis.features import findings, masking
from lib.analysis.features import scale as scale_module
from lib.analysis.features import survey as survey_module
from lib.analysis.features.importance import Importance
from lib.analysis.features.scale import ActivationDistribution
from lib.analysis.model_cams import model_cams
from lib.analysis.statistics import patient_replicates
from lib.data.batches import Batch
from lib.models import build_model
from tests.analysis.features import reference_features as reference
from tests.analysis.features import reference_integrated

CLASSES, N = ["a", "b", "c"], 7
ROWS = np.random.default_rng(5).permutation(40)[:N]
TARGETS = np.random.default_rng(6).integers(0, 2, (40, 3))
METHODS = ("hires", "gradpp")


class Pooled(nn.Module):
    """`trunk` gives signed maps (B, 6, 5, 5), which the head pools."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.Conv2d(5, 6, 3, padding=1)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, films):
        return self.head(self.trunk(films).mean((2, 3)))


class Deep(nn.Module):
    """`front` gives as many maps as the head pools, but it is not what the head pools."""

    def __init__(self):
        super().__init__()
        self.front = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(inplace=True))
        self.back = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(inplace=True))
        self.head = nn.Linear(6, 3)

    def forward(self, films):
        return self.head(self.back(self.front(films)).mean((2, 3)))


class Bare(nn.Module):
    """The films are the maps."""

    def __init__(self, weights):
        super().__init__()
        self.trunk = nn.Identity()
        self.head = nn.Linear(weights.shape[1], weights.shape[0], bias=False)
        self.head.weight.data.copy_(weights)

    def forward(self, films):
        return self.head(self.trunk(films).mean((2, 3)))


def tokens_of(maps):
    return maps.flatten(2).transpose(1, 2)


def study(name):
    """Model, layer, token_grid, films; in float64 the model and its two halves; the films' maps."""
    side = 32 if name == "tokens" else 10
    films = torch.randn(N, 3, side, side, generator=torch.Generator().manual_seed(2))
    if name == "tokens":
        model = build_model("small_transformer", 3, seed=1)
    else:
        model, generator = {"pooled": Pooled, "deep": Deep}[name](), torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    double = copy.deepcopy(model).double().eval()
    if name == "pooled":
        layer, grid, front, back = "trunk", (), double.trunk, lambda maps: double.head(maps.mean((2, 3)))
    elif name == "deep":
        layer, grid, front, back = "front", (), double.front, lambda maps: double.head(double.back(maps).mean((2, 3)))
    else:
        trunk, layer, grid = double.trunk, "trunk.blocks.0", (8, 8)

        def front(films):
            tokens = trunk.blocks[0](tokens_of(trunk.patches(films)) + trunk.positions)
            return tokens.transpose(1, 2).unflatten(2, grid)

        def back(maps):
            return double.head(trunk.norm(trunk.blocks[1](tokens_of(maps))).mean(1))

    with torch.no_grad():
        maps = front(films.double())
    return SimpleNamespace(
        model=model, layer=layer, grid=grid, films=films, double=double, back=back, maps=maps, selected=1
    )


@pytest.fixture(scope="module", params=["pooled", "deep", "tokens"])
def case(request):
    found = study(request.param)
    found.weighted = {
        method: np.array(
            [[reference.weighted_features(maps, found.back, c, method) for c in range(3)] for maps in found.maps]
        )
        for method in METHODS
    }  # (N, C, F, h, w)
    found.kept = {
        method: np.random.default_rng(k).random((3, found.maps.shape[1])) < 0.5 for k, method in enumerate(METHODS)
    }
    found.kept["hires"][:, 0], found.kept["gradpp"][:, 1] = True, True
    return found


def batches(case, size=3, order=None):
    order = np.arange(len(case.films)) if order is None else order
    return [
        Batch(torch.from_numpy(ROWS[order[k : k + size]]), case.films[order[k : k + size]], None)
        for k in range(0, len(order), size)
    ]


def close(ours, expected, scale=1e-5):
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(ours), expected, rtol=1e-4, atol=scale * np.nanmax(np.abs(expected)))


def principal(case):
    return {method: mask[case.selected] for method, mask in case.kept.items()}


# --- maps and importance


@pytest.mark.parametrize("size", [1, 3])
def test_maps_and_contributions_equal_the_gradients(case, size):
    masks = {"all": None, "each": case.kept, "one": principal(case)}
    stream = survey_module.film_cams(
        case.model, batches(case, size), case.layer, METHODS, masks=masks, token_grid=case.grid
    )
    start = 0
    for batch, output, cams in stream:
        here = slice(start, start + len(batch.rows))
        start = here.stop
        close(output.logits, case.double(batch.images.double()).detach())
        assert list(cams) == [(method, name) for method in METHODS for name in masks]
        for method in METHODS:
            weighted = case.weighted[method][here]
            for name, mask in (
                ("all", np.ones_like(case.kept[method])),
                ("each", case.kept[method]),
                ("one", principal(case)[method]),
            ):
                chosen = weighted * np.broadcast_to(mask, weighted.shape[1:3])[None, :, :, None, None]
                close(cams[method, name].maps, chosen.sum(2))
                close(cams[method, name].contributions, chosen.sum((3, 4)))
    assert start == N


def test_some_classes_in_any_order(case):
    masks = {"all": None, "each": {method: mask[[2, 0]] for method, mask in case.kept.items()}}
    *_, cams = next(
        survey_module.film_cams(
            case.model, batches(case, N), case.layer, ["hires"], masks=masks, classes=[2, 0], token_grid=case.grid
        )
    )
    close(cams["hires", "all"].maps, case.weighted["hires"].sum(2)[:, [2, 0]])
    close(cams["hires", "each"].contributions, (case.weighted["hires"].sum((3, 4)) * case.kept["hires"])[:, [2, 0]])
    assert cams["hires", "all"].logits.shape == (N, 3)


def test_closed_forms_equal_the_backward_passes_and_stand_in_for_them(monkeypatch):
    case = study("pooled")
    expected = {method: model_cams(case.model, case.films, "trunk", method=method) for method in cam.METHODS}
    monkeypatch.setattr(survey_module, "model_cams", None)
    for bias in (True, False):
        *_, cams = next(survey_module.film_cams(case.model, batches(case, N), "trunk", cam.METHODS))
        for method, peer in expected.items():
            close(cams[method, "all"].maps, peer.maps)
            close(cams[method, "all"].contributions, peer.contributions)
        case.model.head.bias = case.model.head.bias if bias else None
    tokens = study("tokens")
    *_, cams = next(survey_module.film_cams(tokens.model, batches(tokens), "trunk.norm", ["grad"], token_grid=(8, 8)))
    *_, same = next(survey_module.film_cams(tokens.model, batches(tokens), "trunk.maps", ["grad"]))
    assert torch.equal(cams["grad", "all"].maps, same["grad", "all"].maps)


def test_choices_of_features_share_the_passes_and_films_keep_their_noise():
    case, seen = study("deep"), []
    case.model.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    masks = {"all": None, "some": {"score": np.arange(6) < 2}, "others": {"score": np.arange(6) >= 2}}
    *_, cams = next(survey_module.film_cams(case.model, batches(case), case.layer, ["score"], masks=masks))
    assert sum(seen) == 3 * (1 + 1 + 6)
    close(cams["score", "some"].maps + cams["score", "others"].maps, cams["score", "all"].maps)
    assert cams["score", "some"].maps.abs().max() > 0
    for method in ("ss", "smooth_gradpp"):
        first, second = (
            {
                row: film
                for batch, _, cams in survey_module.film_cams(
                    case.model, batches(case, size, order), case.layer, [method], classes=[0]
                )
                for row, film in zip(batch.rows.tolist(), cams[method, "all"].maps)
            }
            for size, order in ((4, None), (3, np.arange(N)[::-1].copy()))
        )
        assert first.keys() == second.keys()
        for row, film in first.items():
            close(film, second[row], 1e-4)


def test_survey_equals_a_loop(case):
    found = survey_module.survey(
        case.model, batches(case), TARGETS, CLASSES, case.layer, METHODS, size=12, token_grid=case.grid
    )
    np.testing.assert_array_equal(found.rows, ROWS)
    close(found.logits, case.double(case.films.double()).detach())
    for method in METHODS:
        terms = case.weighted[method].sum((3, 4))
        everything, own = np.zeros((2, terms.shape[2], 3))
        for c in range(3):
            mine = [n for n in range(N) if TARGETS[ROWS[n], c]]
            for f in range(terms.shape[2]):
                everything[f, c] = sum(terms[n, c, f] for n in range(N)) / N
                own[f, c] = sum(terms[n, c, f] for n in mine) / len(mine)
        close(found.importance[method].all, everything)
        close(found.importance[method].own, own)
        expected = np.zeros((2, 3))
        for c in range(3):
            pixels = [reference_integrated.bilinear(film, 12) for film in case.weighted[method].sum(2)[:, c]]
            expected[:, c] = [reference_integrated.percentile(pixels, p) for p in (10, 90)]
        value, error = found.distribution[method].percentiles((10, 90))
        assert (np.abs(value - expected) <= error + 1e-4 * np.abs(expected).max()).all()
    assert not survey_module.survey(
        case.model, batches(case), TARGETS, CLASSES, case.layer, ["hires"], token_grid=case.grid
    ).distribution


def test_results_do_not_depend_on_the_batches(case):
    scales, surveys, frames = {method: (np.full(3, 0.8), np.full(3, -0.2)) for method in METHODS}, [], []
    for size, order in ((N, None), (2, np.random.default_rng(0).permutation(N))):

        def parts(size=size, order=order):
            return batches(case, size, order)

        found = survey_module.survey(
            case.model, parts(), TARGETS, CLASSES, case.layer, METHODS, size=9, token_grid=case.grid
        )
        surveys.append(found)
        sums = consistency_module.activation_sums(
            case.model, parts(), case.layer, 1, scales, 9, features=principal(case), token_grid=case.grid
        )
        odd = findings.outliers(
            case.model,
            parts(),
            TARGETS,
            surveys[0].importance["hires"].own,
            CLASSES,
            case.layer,
            "hires",
            token_grid=case.grid,
        )
        effect = masking.masking_effect(
            case.model, parts(), case.layer, 1, METHODS, features=principal(case), token_grid=case.grid
        )
        logits = masking.logits_with(
            case.model, parts(), case.layer, {"some": case.kept["hires"]}, token_grid=case.grid
        )["some"]
        rows, maps = findings.responses(
            case.model,
            parts(),
            case.layer,
            1,
            case.kept["hires"][1],
            size=9,
            top=4,
            method="hires",
            token_grid=case.grid,
        )
        frames.append(
            [
                sums.sort_values(["row", "method", "features", "scale"]),
                odd,
                effect,
                pd.DataFrame(logits, found.rows).sort_index(),
                pd.DataFrame(maps.reshape(4, -1), rows),
            ]
        )
    for method in METHODS:
        close(surveys[0].importance[method].all, surveys[1].importance[method].all)
        np.testing.assert_allclose(
            *(found.distribution[method].percentiles().value for found in surveys), rtol=2**-9, atol=1e-5
        )
    for first, second in zip(*frames):
        pd.testing.assert_frame_equal(first.reset_index(drop=True), second.reset_index(drop=True), rtol=1e-3, atol=1e-4)


def test_a_class_without_variation_has_no_scale_and_the_others_have():
    distribution = ActivationDistribution(CLASSES)
    maps = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    maps[:, 1] = -0.3
    distribution.update(maps)
    for kind, curve, ends in (("tanh", np.tanh, (0.1, 0.9)), ("linear", lambda values: values, (0, 1))):
        for bounds in ("pixels", "image_extremes"):
            alpha, beta = scale_module.common_scale(distribution, kind, bounds)
            assert np.isnan([alpha[1], beta[1]]).all() and np.isfinite([*alpha[[0, 2]], *beta[[0, 2]]]).all()
            if bounds == "pixels":
                low, high = (np.percentile(maps.transpose(0, 1).flatten(1), p, axis=1) for p in (10, 90))
            else:
                low, high = np.percentile(maps.amin((2, 3)), 50, axis=0), np.percentile(maps.amax((2, 3)), 90, axis=0)
            for values, end in ((low, ends[0]), (high, ends[1])):
                np.testing.assert_allclose(curve(alpha * values + beta)[[0, 2]], end, atol=2e-3)
    for bad in (("log", "pixels"), ("tanh", "films")):
        with pytest.raises(ValueError, match="choose tanh or linear, and pixels or image_extremes"):
            scale_module.common_scale(distribution, *bad)


# --- consistency


def test_pictures_are_on_their_own_or_on_the_common_scale():
    raw = torch.linspace(-2, 3, 2 * 4).reshape(2, 1, 2, 2)
    cams = {"grad": SimpleNamespace(maps=raw)}
    own = scale_module.pictures(cams, 4)["grad"]
    assert own.shape == (2, 4, 4) and own.min() == 0 and own.max() == 1
    scales = {"grad": (np.array([np.nan, 0.5]), np.array([np.nan, 0.1]))}
    common = scale_module.pictures(cams, 2, scales, selected=1)["grad"]
    close(common, np.tanh(0.5 * raw[:, 0].double().numpy() + 0.1))
    linear = scale_module.pictures(cams, 2, scales, selected=1, kind="linear")["grad"]
    close(linear, np.clip(0.5 * raw[:, 0].double().numpy() + 0.1, -1, 1))
    assert linear.max() == 1 and np.isnan(scale_module.pictures(cams, 2, scales, selected=0)["grad"]).all()


def test_activation_sums_equal_a_loop(case):
    scales = {method: (np.array([1.0, 0.7 + k, 2.0]), np.array([0.0, -0.2, 1.0])) for k, method in enumerate(METHODS)}
    table = consistency_module.activation_sums(
        case.model, batches(case), case.layer, 1, scales, 9, features=principal(case), token_grid=case.grid
    )
    assert list(table) == ["row", "method", "features", "scale", "activation", "logit"] and len(table) == N * 2 * 2 * 3
    logits = case.double(case.films.double()).detach().numpy()
    found = table.set_index(["row", "method", "features", "scale"])
    for method in METHODS:
        for label, mask in (("all", 1.0), ("principal", principal(case)[method].astype(float)[:, None, None])):
            expected = [
                reference.totals((weighted * mask).sum(0), 0.7 + METHODS.index(method), -0.2, 9)
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
    table = consistency_module.consistency_table(
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
    monkeypatch.setattr(consistency_module, "_REPLICATES", 100)  # one replicate at a time
    again = consistency_module.consistency_table(
        pd.concat([sums_of(skewed, y), sums_of(offset, y, scale="common_tanh")]), patients, 200, seed=4
    )
    pd.testing.assert_frame_equal(table, again, rtol=1e-12)


def test_correlations_that_do_not_exist():
    y = np.random.default_rng(0).normal(size=20)
    patients = {row: str(row) for row in range(40)}
    table = consistency_module.consistency_table(
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
    alone = consistency_module.consistency_table(sums_of(y + y**2, y), {row: "one patient" for row in range(40)}, 50)
    none = consistency_module.consistency_table(sums_of(y + y**2, y), patients, 0)
    for frame in (alone, none):
        assert frame[["ci_low", "ci_high"]].isna().all(axis=None) and np.isfinite(frame["pearson"]).all()
    rare = consistency_module.consistency_table(sums_of(np.where(np.arange(20) == 4, 1.0, 0.0), y), patients, 50).iloc[
        0
    ]  # replicates without film 4
    assert rare["ci_low"] <= rare["spearman"] <= rare["ci_high"]
    with pytest.raises(ValueError, match="totals: NaN"):
        consistency_module.consistency_table(sums_of(np.append(np.nan, y[1:]), y), patients, 50)


def test_maps_of_zeros_do_not_stop_the_table():
    weights = torch.tensor([[-1.0, -2.0, -1.0], [1.0, 2.0, -1.0]])
    case = SimpleNamespace(
        model=Bare(weights), films=torch.rand(N, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    )
    found = survey_module.survey(case.model, batches(case), TARGETS[:, :2], CLASSES[:2], "trunk", ["gradpp"], size=4)
    scales = {"gradpp": scale_module.common_scale(found.distribution["gradpp"])}  # no weight of class 0 is positive
    for c, exists in ((0, False), (1, True)):
        sums = consistency_module.activation_sums(case.model, batches(case), "trunk", c, scales, 4)
        table = consistency_module.consistency_table(sums, {row: str(row) for row in range(40)}, 20).set_index("scale")
        assert (table["pearson"].notna() == exists).all() and ((table["chosen"] != "") == exists).all()


# --- masked films and features


@pytest.mark.parametrize("softmax", [False, True])
def test_masking_effect_equals_a_loop(case, softmax):
    table = masking.masking_effect(
        case.model,
        batches(case),
        case.layer,
        1,
        METHODS,
        features=principal(case),
        softmax=softmax,
        token_grid=case.grid,
    )
    assert list(table) == ["method", "features", "metric", "value", "n", "n_zero"] and len(table) == 8
    found = table.set_index(["method", "features", "metric"])
    for method in METHODS:
        for label, mask in (("all", 1.0), ("principal", principal(case)[method].astype(float)[:, None, None])):
            before, after = [], []
            for film, weighted in zip(case.films.double(), case.weighted[method][:, 1]):
                before.append(reference.confidence(case.double, film, 1, softmax))
                after.append(
                    reference.confidence(case.double, reference.masked_film(film, (weighted * mask).sum(0)), 1, softmax)
                )
            increase, drop = reference_integrated.increase_and_drop(before, after)
            np.testing.assert_allclose(found.loc[(method, label, "average_increase"), "value"], increase)
            np.testing.assert_allclose(found.loc[(method, label, "average_drop"), "value"], drop, rtol=1e-3, atol=1e-3)
    assert (table["n"] == N).all() and (table["n_zero"] == 0).all()


def test_equal_maps_are_asked_once_and_the_answer_stands():
    case, seen = study("pooled"), []
    alone = pd.concat(
        [masking.masking_effect(case.model, batches(case), "trunk", 2, [method]) for method in survey_module.GRADIENT],
        ignore_index=True,
    )
    case.model.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    together = masking.masking_effect(case.model, batches(case), "trunk", 2, survey_module.GRADIENT)
    pd.testing.assert_frame_equal(together, alone)
    assert sum(seen) == 3 * N  # the films, those under Grad, pixel-wise Grad and XGrad, those under Grad++
    assert together.groupby("metric")["value"].nunique().max() > 1


def test_logits_of_some_features(case):
    n_features = case.maps.shape[1]
    one, each = principal(case)["hires"], case.kept["hires"]
    masks = {
        "all": np.ones(n_features),
        "every": np.ones((3, n_features), dtype=bool),
        "one": one,
        "rest": ~one,
        ("each", 1): each,
        "tensor": torch.from_numpy(each[0]),
        "none": np.zeros(n_features),
    }
    found = masking.logits_with(case.model, batches(case), case.layer, masks, token_grid=case.grid)
    full = case.double(case.films.double()).detach().numpy()
    close(found["all"], full)
    close(found["every"], full)
    for name, mask in masks.items():
        expected = np.zeros((N, 3))
        for c in range(3):
            row = torch.as_tensor(np.asarray(mask) if np.ndim(mask) == 1 else mask[c]).double()
            expected[:, c] = case.back(case.maps * row[:, None, None])[:, c].detach()
        close(found[name], expected)
        assert found[name].dtype == np.float32
    assert np.abs(found["one"] - full).max() > 1e-3 and np.abs(found["one"] - found["rest"]).max() > 1e-3
    for bad in (np.ones(n_features + 1), np.ones((2, n_features)), np.full(n_features, 0.5)):
        with pytest.raises(ValueError, match="mask"):
            masking.logits_with(case.model, batches(case), case.layer, {"bad": bad}, token_grid=case.grid)


def test_logits_cost_one_pass_or_one_for_each_choice():
    for name, passes in (("pooled", 1), ("deep", 1 + 1 + 2)):
        case, seen = study(name), []
        case.model.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(len(inputs[0])))
        choice = np.array([[1, 0, 1, 0, 1, 0], [0, 1, 1, 1, 0, 0], [1, 0, 1, 0, 1, 0]])
        masking.logits_with(case.model, batches(case, N), case.layer, {"one": choice[1], "each": choice})
        assert len(seen) == passes


# --- films


def planted():
    """Bare films of 5 features: all alike but for film 4, which shows feature 3 in one corner instead of feature 0."""
    films = torch.rand(N, 5, 6, 6, generator=torch.Generator().manual_seed(0)) * 0.1
    films[:, 0] += 1
    films[4, 0] -= 1
    films[4, 3, 0:2, 4:6] += 9
    weights = torch.tensor([[1.0, 0.1, 0.1, 0.8, 0.1], [0.2, 1.0, 0.1, -0.1, 0.3]])
    return SimpleNamespace(model=Bare(weights), films=films), np.column_stack([np.ones(40), np.zeros(40)]).astype(int)


@pytest.mark.parametrize("size", [1, 3])
def test_a_planted_odd_film_is_the_first_outlier(size):
    case, targets = planted()
    targets[ROWS[2]] = [0, 1]
    targets[ROWS[5]] = [0, 0]  # belongs to no class: no row
    importance = (
        survey_module.survey(case.model, batches(case), targets, CLASSES[:2], "trunk", ["grad"]).importance["grad"].own
    )
    table = findings.outliers(case.model, batches(case, size), targets, importance, CLASSES[:2], "trunk")
    assert list(table) == ["row", "class", "distance", "logit"] and len(table) == N - 1
    assert (
        table.loc[0, "row"] == ROWS[4]
        and table.loc[0, "class"] == "a"
        and table.loc[0, "distance"] > 3 * table.loc[1, "distance"]
    )
    assert table["distance"].is_monotonic_decreasing and table["row"].dtype == np.int64
    logits = case.model(case.films).detach().numpy()
    for _, line in table.iterrows():
        n = ROWS.tolist().index(line["row"])
        label = CLASSES.index(line["class"])
        terms = (case.model.head.weight[label] * case.films[n].mean((1, 2))).detach().double().numpy()
        column = importance[:, label]
        np.testing.assert_allclose(
            line["distance"], 1 - terms @ column / np.sqrt((terms @ terms) * (column @ column)), atol=1e-6
        )
        np.testing.assert_allclose(line["logit"], logits[n, label], rtol=1e-5)


def test_no_film_of_any_class_gives_no_outlier():
    case, _ = planted()
    table = findings.outliers(case.model, batches(case), np.zeros((40, 2)), np.ones((5, 2)), CLASSES[:2], "trunk")
    assert list(table) == ["row", "class", "distance", "logit"] and not len(table)


def test_responses_find_the_planted_film_and_place():
    case, _ = planted()
    mask = np.arange(5) == 3
    for size in (1, 3, N):
        rows, maps = findings.responses(case.model, batches(case, size), "trunk", 0, mask, size=12, top=3)
        assert rows[0] == ROWS[4] and maps.shape == (3, 12, 12) and maps.dtype == np.float32
        totals = (0.8 / 36 * case.films[:, 3].sum((1, 2))).numpy()
        np.testing.assert_array_equal(rows, ROWS[np.argsort(-totals)[:3]])
        close(maps[0], reference_integrated.bilinear((0.8 / 36 * case.films[4, 3]).double().numpy(), 12))
        assert np.maximum(maps[0], 0)[0:4, 8:12].sum() > 0.7 * np.maximum(maps[0], 0).sum()
    rows, _ = findings.responses(
        case.model, batches(case), "trunk", 1, mask, size=6, top=50
    )  # its weight for class 1 is negative
    assert len(rows) == N and rows[-1] == ROWS[4]
    dead, _ = findings.responses(case.model, batches(case), "trunk", 1, np.zeros(5), size=6, top=4)
    np.testing.assert_array_equal(dead, ROWS[:4])  # ties: in the order of the films


def test_marked_share_counts_positive_response_on_widened_marks():
    response, marks = np.zeros((2, 9, 9)), np.zeros((2, 9, 9), bool)
    marks[0, 4, 4], marks[1, 0, 0] = True, True  # widened by one cell of 2: 5 x 5, and 3 x 3 in the corner
    response[0, 2, 6], response[0, 1, 4], response[1, 2, 2], response[1, 8, 8] = 3, 4, 2, -9
    assert findings.marked_share(response, marks, 2) == pytest.approx((5 / 9, 34 / 162))
    share, area = findings.marked_share(-np.abs(response), marks, 2)
    assert np.isnan(share) and area == pytest.approx(34 / 162)


def test_no_films_are_named():
    case, targets = planted()
    for call in (
        lambda: survey_module.survey(case.model, [], targets, CLASSES[:2], "trunk"),
        lambda: masking.logits_with(case.model, [], "trunk", {}),
        lambda: findings.responses(case.model, [], "trunk", 0, np.ones(5), size=4),
        lambda: masking.masking_effect(case.model, [], "trunk", 0, ["grad"]),
    ):
        with pytest.raises(ValueError, match="there are no films"):
            call()


# --- frames


def test_carried_and_curve_equal_loops():
    importance = np.random.default_rng(3).normal(size=(20, 4))
    importance[:, 2] = np.nan  # a class without films
    importance[:, 3] = -1.0  # nothing positive
    names = [*CLASSES, "d"]
    table = findings.carried(importance, names, 0.2)
    curve = findings.importance_curve(importance, names)
    tops = {c: reference_integrated.top(importance[:, c], 0.2) for c in (0, 1, 3)}
    assert table["class"].tolist() == names and list(curve) == ["class", "k", "share"] and len(curve) == 80
    for c in (0, 1, 3):
        others = [len(tops[c] & tops[o]) / len(tops[c] | tops[o]) for o in tops if o != c]
        np.testing.assert_allclose(table.loc[c, "overlap"], sum(others) / 2)
    assert 0 < table["overlap"].max() and np.isnan(table.loc[2, "overlap"])
    for c in (0, 1):
        positive = sorted((v for v in importance[:, c] if v > 0), reverse=True)
        shares = [sum(positive[:k]) / sum(positive) for k in range(1, 21)]
        np.testing.assert_allclose(curve.loc[curve["class"] == names[c], "share"], shares)
        assert curve.loc[curve["class"] == names[c], "k"].tolist() == list(range(1, 21))
        assert table.loc[c, "n_features80"] == next(k for k, share in enumerate(shares, 1) if share >= 0.8)
        np.testing.assert_allclose(table.loc[c, "participation"], sum(positive) ** 2 / sum(v**2 for v in positive))
    assert (
        curve.loc[curve["class"].isin(["c", "d"]), "share"].isna().all()
        and (table.loc[[2, 3], "n_features80"] == 0).all()
    )
    assert np.isnan(findings.carried(importance[:, :1], names[:1], 0.2)["overlap"]).all()


def test_importance_frame_holds_every_entry():
    generator = np.random.default_rng(4)
    train, test = (
        survey_module.Survey(
            {method: Importance(*generator.normal(size=(3, 6, 2)), np.ones(2), np.ones(2)) for method in METHODS},
            {},
            ROWS,
            None,
        )
        for _ in range(2)
    )
    frame = survey_module.importance_frame(train, test, CLASSES[:2])
    assert (
        list(frame) == ["class", "feature", "method", "train", "test", "train_own", "test_own"]
        and len(frame) == 2 * 6 * 2
    )
    for line in frame.itertuples():
        here, there, place = (
            train.importance[line.method],
            test.importance[line.method],
            (line.feature, CLASSES.index(line[1])),
        )
        assert (line.train, line.test, line.train_own, line.test_own) == (
            here.all[place],
            there.all[place],
            here.own[place],
            there.own[place],
        )
    assert not frame.duplicated(["class", "feature", "method"]).any()


def test_the_selected_class_must_be_there_and_have_films():
    targets = {"training": np.array([[1, 0], [0, 1]]), "test": np.array([[1, 0]])}
    assert survey_module.selected_output("a", ["a", "b"], targets) == 0
    with pytest.raises(ValueError, match="no test film has b: choose another class with feature_class"):
        survey_module.selected_output("b", ["a", "b"], targets)
    with pytest.raises(ValueError, match="no class 'c'.*one of a, b"):
        survey_module.selected_output("c", ["a", "b"], targets)
