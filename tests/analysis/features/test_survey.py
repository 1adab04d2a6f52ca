from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from lib.analysis import cam
from lib.analysis.features import consistency, findings, masking, survey
from lib.analysis.features.importance import Importance
from lib.analysis.model_cams import model_cams
from tests.analysis.features import reference_features, reference_integrated
from tests.analysis.features.small_study import (
    CLASSES,
    METHODS,
    ROWS,
    TARGETS,
    N,
    close,
    planted,
    principal,
    study,
    view,
)


@pytest.mark.parametrize("size", [1, 3])
def test_maps_and_contributions_equal_the_gradients(case, size):
    masks = {"all": None, "each": case.kept, "one": principal(case)}
    stream = survey.film_cams(view(case, size), ROWS, METHODS, masks=masks)
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
    *_, cams = next(survey.film_cams(view(case, N), ROWS, ["hires"], masks=masks, classes=[2, 0]))
    close(cams["hires", "all"].maps, case.weighted["hires"].sum(2)[:, [2, 0]])
    close(cams["hires", "each"].contributions, (case.weighted["hires"].sum((3, 4)) * case.kept["hires"])[:, [2, 0]])
    assert cams["hires", "all"].logits.shape == (N, 3)


def test_closed_forms_equal_the_backward_passes_and_stand_in_for_them(monkeypatch):
    case = study("pooled")
    expected = {method: model_cams(case.model, case.films, "trunk", method=method) for method in cam.METHODS}
    monkeypatch.setattr(survey, "model_cams", None)
    for bias in (True, False):
        *_, cams = next(survey.film_cams(view(case, N, layer="trunk"), ROWS, cam.METHODS))
        for method, peer in expected.items():
            close(cams[method, "all"].maps, peer.maps)
            close(cams[method, "all"].contributions, peer.contributions)
        case.model.head.bias = case.model.head.bias if bias else None
    tokens = study("tokens")
    *_, cams = next(survey.film_cams(view(tokens, layer="trunk.norm"), ROWS, ["grad"]))
    laid_out = SimpleNamespace(model=tokens.model, films=tokens.films)
    *_, same = next(survey.film_cams(view(laid_out, layer="trunk.maps"), ROWS, ["grad"]))
    assert torch.equal(cams["grad", "all"].maps, same["grad", "all"].maps)


def test_choices_of_features_share_the_passes_and_films_keep_their_noise():
    case, seen = study("deep"), []
    case.model.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    masks = {"all": None, "some": {"score": np.arange(6) < 2}, "others": {"score": np.arange(6) >= 2}}
    *_, cams = next(survey.film_cams(view(case), ROWS, ["score"], masks=masks))
    assert sum(seen) == 3 * (1 + 1 + 6)
    close(cams["score", "some"].maps + cams["score", "others"].maps, cams["score", "all"].maps)
    assert cams["score", "some"].maps.abs().max() > 0
    for method in ("ss", "smooth_gradpp"):
        first, second = (
            {
                row: film
                for batch, _, cams in survey.film_cams(view(case, size), ROWS[order], [method], classes=[0])
                for row, film in zip(batch.rows.tolist(), cams[method, "all"].maps)
            }
            for size, order in ((4, np.arange(N)), (3, np.arange(N)[::-1]))
        )
        assert first.keys() == second.keys()
        for row, film in first.items():
            close(film, second[row], 1e-4)


def test_survey_equals_a_loop(case):
    found = survey.survey(view(case), ROWS, METHODS, size=12)
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
        close(found.percentiles[method], expected)
    assert not survey.survey(view(case), ROWS, ["hires"]).distribution


def test_cam_is_surveyed_where_the_layer_is_pooled_and_only_there(case):
    found = survey.survey(view(case), ROWS)
    pooled = case.layer == "trunk"
    assert tuple(found.importance) == ("grad", "hires", "gradpp", "xgrad", *["cam"] * pooled, "layer")
    if not pooled:
        with pytest.raises(ValueError, match="'cam' cannot work with layer"):
            survey.survey(view(case), ROWS, ["cam"])


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_percentiles_take_a_second_look_at_maps_that_were_kept_or_at_the_films(case, share, monkeypatch):
    calls, seen = [], view(case)

    def batches(rows):
        calls.append(len(rows))
        return seen.batches(rows)

    other = survey.survey(view(case, 2), ROWS[::-1], METHODS, size=12)
    whole = sum(found.maps.nbytes for *_, cams in survey.film_cams(seen, ROWS, METHODS) for found in cams.values())
    monkeypatch.setattr(survey, "KEPT_BYTES", int(share * whole))
    found = survey.survey(replace(seen, batches=batches), ROWS, METHODS, size=12)
    assert calls == [N] * (1 if share == 1 else 2)
    for method in METHODS:
        np.testing.assert_allclose(found.percentiles[method], other.percentiles[method], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="unknown bounds 'films'; choose pixels or image_extremes"):
        found.scales(bounds="films")
    with pytest.raises(ValueError, match="unknown scale 'log'; choose tanh or linear"):
        found.scales("log")


def test_films_that_change_between_the_two_looks_are_named(case, monkeypatch):
    monkeypatch.setattr(survey, "KEPT_BYTES", 0)
    seen = view(case)
    looks = iter([ROWS, ROWS[1:]])
    with pytest.raises(ValueError, match="the second pass saw other class activations"):
        survey.survey(replace(seen, batches=lambda rows: seen.batches(next(looks))), ROWS, METHODS, size=12)


@pytest.mark.parametrize("size", [1, N])
def test_pictures_are_on_their_own_or_on_the_common_scale(case, size):
    nan = np.full(3, np.nan)
    for kind, curve in (("tanh", np.tanh), ("linear", lambda line: np.clip(line, -1, 1))):
        scales = {"gradpp": (np.array([9, 3.0, 9]), np.array([9, -0.4, 9])), "hires": (nan, nan)}
        options = {"features": principal(case), "size": 9, "kind": kind, "methods": list(scales)}
        drawn = survey.pictures(view(case, size), ROWS, 1, scales, **options)
        assert list(drawn) == [(name, method) for method in scales for name in ("", "S-", "FS-S-")]
        assert np.isnan(drawn["S-", "hires"]).all() and np.isfinite(drawn["", "hires"]).all()
        kept = principal(case)["gradpp"]
        for n, weighted in enumerate(case.weighted["gradpp"][:, 1]):
            own = reference_integrated.bilinear(reference_features.own_scale(weighted.sum(0)), 9)
            close(drawn["", "gradpp"][n], own, 1e-4)
            for name, maps in (("S-", weighted), ("FS-S-", weighted[kept])):
                close(drawn[name, "gradpp"][n], curve(3 * reference_integrated.bilinear(maps.sum(0), 9) - 0.4), 1e-4)


def test_passes_are_counted_by_method():
    seen = view(study("pooled"))
    table = survey.passes(seen, 6, ["grad", "score"])
    assert table.to_dict("index") == {
        "grad": {"forward passes": 1, "backward passes": 3},
        "score": {"forward passes": 7, "backward passes": 0},
    }
    assert survey.passes(seen, 6).index.tolist() == list(survey.SLOW)


def test_films_from_the_surest_to_the_least_sure():
    logits = np.array([[0.0, 3], [0, 9], [0, 1], [0, 7], [0, 5], [0, 2], [0, 8]])
    found = survey.Survey({}, np.arange(7) + 30, logits)
    np.testing.assert_allclose(found.confidence(1), [1 / (1 + np.exp(-v)) for v in (3, 9, 1, 7, 5, 2, 8)])
    assert found.spread(1, 3).tolist() == [1, 4, 2] and found.spread(1, 7).tolist() == [1, 6, 3, 4, 0, 5, 2]
    rows = np.arange(50, 60)
    assert survey.evenly(rows, 4).tolist() == [50, 53, 56, 59] and survey.evenly(rows, 99).tolist() == rows.tolist()


def test_results_do_not_depend_on_the_batches(case):
    scales, surveys, frames = {method: (np.full(3, 0.8), np.full(3, -0.2)) for method in METHODS}, [], []
    for size, order in ((N, np.arange(N)), (2, np.random.default_rng(0).permutation(N))):
        found = survey.survey(view(case, size), ROWS[order], METHODS, size=9)
        surveys.append(found)
        sums = consistency.activation_sums(view(case, size), ROWS[order], 1, scales, 9, features=principal(case))
        odd = findings.outliers(view(case, size), ROWS[order], surveys[0].importance["hires"].own, "hires")
        effect = masking.masking_effect(view(case, size), ROWS[order], 1, METHODS, features=principal(case))
        logits = masking.logits_with(view(case, size), ROWS[order], {"some": case.kept["hires"]})["some"]
        rows, maps = findings.responses(
            view(case, size), ROWS[order], 1, case.kept["hires"][1], size=9, top=4, method="hires"
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
        np.testing.assert_allclose(*(found.percentiles[method] for found in surveys), rtol=1e-4, atol=1e-6)
    for first, second in zip(*frames):
        pd.testing.assert_frame_equal(first.reset_index(drop=True), second.reset_index(drop=True), rtol=1e-3, atol=1e-4)


def test_no_films_are_named():
    case, targets = planted()
    for call in (
        lambda: survey.survey(view(case, layer="trunk", targets=targets, classes=CLASSES[:2]), []),
        lambda: masking.logits_with(view(case, layer="trunk"), [], {}),
        lambda: findings.responses(view(case, layer="trunk"), [], 0, np.ones(5), size=4),
        lambda: masking.masking_effect(view(case, layer="trunk"), [], 0, ["grad"]),
    ):
        with pytest.raises(ValueError, match="there are no films"):
            call()


def test_importance_frame_holds_every_entry():
    generator = np.random.default_rng(4)
    train, test = (
        survey.Survey(
            {method: Importance(*generator.normal(size=(3, 6, 2)), np.ones(2), np.ones(2)) for method in METHODS},
            ROWS,
            None,
        )
        for _ in range(2)
    )
    frame = survey.importance_frame(train, test, CLASSES[:2])
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
    assert survey.selected_output("a", ["a", "b"], targets) == 0
    with pytest.raises(ValueError, match="no test film has b: choose another class with feature_class"):
        survey.selected_output("b", ["a", "b"], targets)
    with pytest.raises(ValueError, match="no class 'c'.*one of a, b"):
        survey.selected_output("c", ["a", "b"], targets)
