"""Notebook 10's widgets without a browser: their controls are set, and what they show is held against the tables, and
against references that go pixel by pixel."""

import base64
import json
from datetime import UTC, datetime

import cv2
import ipywidgets
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from scipy.special import expit

from lib import records
from lib.analysis.inference import LensError
from lib.analysis.relevance.heatmaps import heatmaps
from lib.explorer import films, hands
from lib.explorer.films import Film, Lightbox, Scores
from lib.models import build_model
from lib.params import Study
from lib.runs import OpenStudy
from lib.state import labels_digest
from tests.analysis import reference_localization
from tests.explorer.study import EMPTY, LOSSES, open_small

KINDS = list(hands.KINDS)


@pytest.fixture(scope="module")
def opened(small_phantom, outputs):
    return open_small(small_phantom, "by_hand")


@pytest.fixture(scope="module")
def lightbox(opened):
    return Lightbox(opened.subject("multilabel-tdensenet-focal"))


@pytest.fixture
def by_losses(lightbox):
    return hands.by_losses(lightbox)


@pytest.fixture(scope="module")
def digits(outputs):
    """No boxes, one loss, and a network that relevance has no rules for."""
    own = {"runs": ["digits-small_transformer-bce"], "image_size": 32, "init": "scratch", "device": "cpu"}
    study = OpenStudy(Study.build({"study": "digits_by_hand", "release": "digits", "flip": False, **own}))
    run = study.study.every_run[0]
    run.run_folder.mkdir(parents=True)
    save_file(build_model(run.backbone, run.n_outputs, "scratch", 0).state_dict(), run.weights_path)
    identity = run.identity | {"labels": labels_digest(study.films)}
    record = {"status": "finished", "parameters": run.model_dump(), "identity": identity}
    records.write_json(record, run.run_folder / "run.json")
    return Lightbox(study.subject(run))


def alignment(opened, loss):
    run = opened.study.run(f"multilabel-tdensenet-{loss}")
    return records.read_table(run.run_folder / "cam_alignment.parquet").set_index(["image", "class"])


def image_of(hand):
    """The file that the words begin with."""
    return hand.words.value.partition(",")[0]


def decoded(hand):
    return cv2.imdecode(np.frombuffer(hand.still, np.uint8), cv2.IMREAD_COLOR)


def given(name, content):
    return ({"name": name, "type": "", "size": len(content), "content": content, "last_modified": datetime.now(UTC)},)


# ---- one film, all losses


def test_what_stands_below_the_maps_is_what_the_tables_say(opened, lightbox, by_losses):
    known, seen = {loss: alignment(opened, loss) for loss in LOSSES}, 0
    for name in ("Effusion", "Infiltration"):
        by_losses.controls["class"].value = name
        by_losses.controls["by"].value = "iobb"
        for k in range(1, by_losses.controls["film"].max + 1):
            by_losses.controls["film"].value = k
            for loss in LOSSES:
                row, shown = known[loss].loc[(image_of(by_losses), name)], by_losses.table.loc[loss]
                assert shown["iobb"] == pytest.approx(row["iobb"], abs=1e-5)
                assert shown["ior"] == pytest.approx(row["ior"], abs=1e-5, nan_ok=True)
                assert shown["p"] == pytest.approx(expit(float(row["logit"])), abs=1e-5)
                seen += 1
    assert seen > 40


def test_iou_follows_the_threshold_and_is_that_of_the_pixels(lightbox, by_losses):
    name, by_losses.controls["class"].value = "Infiltration", "Infiltration"
    film, output = lightbox.film(image_of(by_losses)), lightbox.subject.classes.index(name)
    boxes, size, found = film.corners(name), lightbox.subject.run.image_size, []
    for threshold in (0.2, 0.5, 0.8):
        by_losses.controls["threshold"].value = threshold
        for loss in LOSSES:
            raw = film.signed(loss, output, "cam").double().clamp(min=0).numpy()
            native = (raw - raw.min()) / max(np.ptp(raw), 1e-30)
            iou = reference_localization.overlap(native, boxes, size, threshold=threshold)[2]
            assert by_losses.table.loc[loss, "iou"] == pytest.approx(iou, abs=1 / size**2)
            found.append(iou)
    assert np.ptp(found) > 0.05


def test_one_scale_divides_all_by_the_largest_and_leaves_iobb(lightbox, by_losses):
    own, before = by_losses.table, by_losses.still
    by_losses.controls["scale"].value = True
    film, name = lightbox.film(image_of(by_losses)), by_losses.controls["class"].value
    output = lightbox.subject.classes.index(name)
    largest = max(film.signed(loss, output, "cam").max().item() for loss in LOSSES)
    assert f"1 is {largest:.3g}" in by_losses.words.value and by_losses.still != before
    pd.testing.assert_frame_equal(by_losses.table[["iobb", "ior", "p"]], own[["iobb", "ior", "p"]])
    signed = torch.stack([film.signed(loss, output, "cam") for loss in LOSSES])
    units = films.unit_maps(signed, "cam", common=True)
    torch.testing.assert_close(units, signed.clamp(min=0) / largest)
    assert not films.unit_maps(-signed.abs(), "cam", common=True).any()


def test_films_come_in_the_order_that_is_asked_for(opened, lightbox, by_losses):
    known = pd.DataFrame({loss: alignment(opened, loss)["iobb"] for loss in LOSSES}).xs("Infiltration", level="class")
    expected = {"iobb": known.mean(axis=1), "iobb apart": known.max(axis=1) - known.min(axis=1)}
    by_losses.controls["class"].value = "Infiltration"
    for by, values in expected.items():
        by_losses.controls["by"].value = by
        assert by_losses.controls["film"].value == 1 and by_losses.controls["film"].max == len(values)
        listed = []
        for k in range(1, 6):
            by_losses.controls["film"].value = k
            listed.append(values[image_of(by_losses)])
        np.testing.assert_allclose(listed, np.sort(values)[::-1][:5])


def test_the_arrows_step_and_stop_at_both_ends(by_losses):
    back, _, on = by_losses.children[1].children
    slider, first = by_losses.controls["film"], image_of(by_losses)
    back.click()
    assert slider.value == 1
    on.click()
    assert slider.value == 2 and image_of(by_losses) != first
    slider.value = slider.max
    on.click()
    assert slider.value == slider.max


def test_disagreement_of_probabilities_is_of_ranks():
    images = ["a.png", "b.png", "c.png", "d.png"]
    index = pd.MultiIndex.from_product([images, ["Mass"]], names=["image", "class"])
    low = np.array([0.1, 0.2, 0.3, 0.4])
    p = pd.DataFrame({"bce": low, "wbce": low + 0.5, "focal": [0.4, 0.2, 0.3, 0.1]}, index=index)
    scores = Scores(p, p * np.nan, p * np.nan)
    assert films.orders(scores, "Mass") == ["p apart", "p"]
    assert films.order(scores, "Mass", "p apart").to_dict() == {"a.png": 0.75, "b.png": 0, "c.png": 0, "d.png": 0.75}
    lifted = Scores(p[["bce", "wbce"]], p * np.nan, p * np.nan)
    assert not films.order(lifted, "Mass", "p apart").any()


def test_boxes_of_all_findings_are_drawn_and_the_asked_ones_strong(lightbox):
    image = lightbox.pairs.groupby("image").size().idxmax()
    film, name = lightbox.film(image), lightbox.pairs.set_index("image")["class"][image].iloc[0]
    released = lightbox.subject.release.boxes.query("image == @image")
    assert len(film.boxes) == len(released) > len(film.corners(name)) > 0
    size = lightbox.subject.run.image_size
    np.testing.assert_allclose(film.boxes["x2"], released["x2"] * size / 1024)
    frames = hands._frames(film, name, size)
    assert {found for asked, _, found in frames if asked} == {name} and frames[-1][0] and not frames[0][0]
    binary = Film(film.name, "", film.picture, film.boxes, film.batch, {})
    assert binary.asked("Unhealthy").all()


def test_an_empty_map_is_called_empty(by_losses, lightbox, monkeypatch):
    said = []
    monkeypatch.setattr(hands, "picture", lambda panels, *_, **__: said.extend(panels) or b"")
    by_losses.controls["class"].value = EMPTY
    film, output = lightbox.film(image_of(by_losses)), lightbox.subject.classes.index(EMPTY)
    above = {loss: bool((film.signed(loss, output, "cam") > 0).any()) for loss in LOSSES}
    assert [panel.said for panel in said[1:5]] == ["" if above[loss] else "empty map" for loss in LOSSES]
    assert not above["focal"] and any(above.values())
    row = by_losses.table.loc["focal"]
    assert row["iobb"] == 0 and np.isnan(row["ior"])
    assert "IoR —" in [line for panel in said[1:5] if panel.title == "Focal" for line in panel.lines][1]


def test_tables_of_other_weights_are_named(opened):
    lightbox = Lightbox(opened.subject("multilabel-tdensenet-focal"))
    lightbox.scores.p["wbce"] = lightbox.scores.p["wbce"] + 0.01
    said = hands.by_losses(lightbox).words.value
    assert "tables of WBCE are of other weights" in said and "BCE," not in said.split("tables of")[1]


def test_predictions_are_the_tables_where_there_is_one(opened, lightbox):
    loss, image = "bce", opened.films.loc[opened.rows("test")[0], "image"]
    path = opened.subject("multilabel-tdensenet-bce").path("predictions.parquet")
    table = pd.DataFrame({"image": [image], "class": ["Mass"], "logit": np.float32([1.5])})
    records.write_table(table, path)
    try:
        again = Lightbox(opened.subject("multilabel-tdensenet-focal")).scores.p
    finally:
        path.unlink()
    assert again.loc[(image, "Mass"), loss] == pytest.approx(expit(1.5))
    subject = opened.subject("multilabel-tdensenet-focal")
    (output,) = subject.outputs([lightbox.rows[image]], subject.layer)
    expected = expit(output.logits[0].double().numpy())
    ours = lightbox.scores.p["focal"].xs(image, level="image").reindex(subject.classes)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


# ---- methods


def test_methods_are_scored_by_their_positive_part(lightbox):
    hand = hands.by_methods(lightbox)
    film, name = lightbox.film(image_of(hand)), hand.controls["class"].value
    output, subject = lightbox.subject.classes.index(name), lightbox.subjects["wbce"]
    assert list(hand.table.index) == [(method, loss) for method in ("cam", "gradpp", "lrp", "rap") for loss in LOSSES]
    raw = heatmaps(subject.model, film.batch.images, torch.tensor([output]), "lrp", init=subject.run.relevance_init)[0]
    unit = raw.double().clamp(min=0).numpy()
    iobb, ior, *_ = reference_localization.overlap(unit / unit.max(), film.corners(name), subject.run.image_size)
    assert hand.table.loc[("lrp", "wbce"), ["iobb", "ior"]].tolist() == pytest.approx([iobb, ior], abs=1e-5)
    head = subject.model.head.weight[output].detach()
    maps = film.outputs["wbce"].maps[subject.layer][0]
    torch.testing.assert_close(
        film.signed("wbce", output, "cam"), torch.einsum("f,fhw->hw", head, maps), rtol=1e-4, atol=1e-5
    )


def test_a_method_is_ticked_and_all_are_named(lightbox):
    hand = hands.by_methods(lightbox)
    assert set(films.METHODS) <= hand.controls.keys() and set(films.METHODS) <= hands.METHOD_NAMES.keys()
    for method in ("gradpp", "lrp", "rap"):
        hand.controls[method].value = False
    hand.controls["smooth_gradpp"].value = True
    assert list(hand.table.index.unique("method")) == ["cam", "smooth_gradpp"]
    assert "(513 passes)" in hand.controls["score"].description and "pass" not in hand.controls["cam"].description
    hand.controls["cam"].value = hand.controls["smooth_gradpp"].value = False
    assert not len(hand.table) and decoded(hand).shape[0] > 200


# ---- failures


def test_failures_by_hand():
    images = list("abcdef")
    index = pd.MultiIndex.from_product([images, ["Mass"]], names=["image", "class"])
    p = pd.DataFrame({"bce": [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]}, index=index)
    hit = pd.DataFrame({"bce": [0.0, 1.0, np.nan, np.nan, 0.0, np.nan]}, index=index)
    has = pd.Series([True, True, False, False, True, True], images)
    found = films.failures(Scores(p, p * np.nan, hit), has, "Mass", "bce")
    assert found == {"missed": ["f", "e"], "false alarm": ["c", "d"], "wrong place": ["a"]}
    lifted = films.failures(Scores(p + 10, p * np.nan, hit), has, "Mass", "bce")
    assert lifted == found


def test_a_list_jumps_to_its_film(lightbox):
    hand = hands.failures(lightbox)
    name = hand.controls["class"].value
    for kind in KINDS:
        options = hand.controls[kind].options
        hand.controls[kind].value = options[-1][1]
        assert hand.words.value.startswith(options[-1][1])
        assert [hand.controls[other].value for other in KINDS if other != kind] == [None, None]
        has = "has" if kind != "false alarm" else "does not have"
        assert f"{has} {name}" in hand.words.value
    shown = hand.table
    hand.controls["threshold"].value = 0.25
    assert hand.controls[KINDS[-1]].value == options[-1][1] and not hand.table["iou"].equals(shown["iou"])
    hand.controls["loss"].value = "bce"
    assert hand.words.value.startswith(next(hand.controls[kind].value for kind in KINDS if hand.controls[kind].value))


def test_a_class_without_failures_is_said_and_left_again(lightbox, monkeypatch):
    hand, found = hands.failures(lightbox), films.failures
    monkeypatch.setattr(films, "failures", lambda *_: dict.fromkeys(KINDS, []))
    hand.controls["loss"].value = "wbce"
    assert "WBCE fails on no film" in hand.words.value and not hand.controls["missed"].options
    hand.controls["threshold"].value = 0.3
    monkeypatch.setattr(films, "failures", found)
    hand.controls["loss"].value = "bce"
    assert "by the release" in hand.words.value


# ---- channels


def test_a_channel_is_removed_as_if_its_maps_were_zero(lightbox):
    hand = hands.channels(lightbox)
    name, loss, k = (hand.controls[key].value for key in ("class", "loss", "channel"))
    one = lightbox.subjects[loss]
    output, weights = one.classes.index(name), one.model.head.weight.detach().double()
    for image, row in hand.table.iterrows():
        maps = lightbox.film(image).outputs[loss].maps[one.layer][0].double()
        without = maps.clone()
        without[k] = 0
        for state, seen in (("before", maps), ("after", without)):
            logit = (weights[output] * seen.mean((1, 2))).sum() + one.model.head.bias[output].item()
            assert row[state] == pytest.approx(expit(logit.item()), abs=1e-5)
    rows = one.rows("test")
    strongest = [output.maps[one.layer][0, k].mean().item() for output in one.outputs(rows, one.layer, batch_size=1)]
    expected = one.films.loc[rows[np.argsort(strongest)[::-1][: hands.TOP_FILMS]], "image"]
    assert list(hand.table.index) == list(expected)


def test_channels_add_what_equations_3_and_4_say(lightbox):
    one, name = lightbox.subject, "Infiltration"
    rows, output = one.rows("test"), one.classes.index(name)
    weights = one.model.head.weight[output].detach().double().numpy()
    added = np.stack([weights * seen.maps[one.layer][0].double().mean((1, 2)).numpy()
                      for seen in one.outputs(rows, one.layer, batch_size=1)])  # fmt: skip
    has = one.targets[rows, output] == 1
    table, source = lightbox.importance("focal", name)
    np.testing.assert_allclose(table["all"], added.mean(0), atol=1e-6)
    np.testing.assert_allclose(table["own"], added[has].mean(0), atol=1e-6)
    assert source == f"{len(rows)} test films"
    principal = lightbox.principal("focal", name, "all")
    assert list(principal.index) == list(np.argsort(-added.mean(0))[: films.LISTED])
    beyond = added[has].mean(0) - added.mean(0)
    assert list(lightbox.principal("focal", name, "contrast").index) == list(np.argsort(-beyond)[: films.LISTED])


def test_the_importance_of_notebook_07_is_taken_where_it_is(opened, lightbox):
    path = opened.subject("multilabel-tdensenet-wbce").path("importance.parquet")
    table = pd.DataFrame({"class": "Mass", "feature": [0, 1, 2], "method": "grad", "train": [0.1, 0.3, 0.2],
                          "test": 0.0, "train_own": np.nan, "test_own": 0.0})  # fmt: skip
    records.write_table(pd.concat([table, table.assign(method="gradpp", train=9.0)]), path)
    try:
        found, source = lightbox.importance("wbce", "Mass")
        assert list(lightbox.principal("wbce", "Mass", "all").index) == [1, 2, 0] and "07" in source
        assert list(found["all"]) == [0.1, 0.3, 0.2]
        with pytest.raises(LensError, match="no film of Mass is among the training films.*on all films"):
            lightbox.principal("wbce", "Mass", "contrast")
    finally:
        path.unlink()


# ---- a film of one's own


def test_a_films_own_file_has_its_own_probabilities(lightbox):
    hand, film = hands.own_film(lightbox), lightbox.subject.films.loc[lightbox.subject.rows("test")[3]]
    with open(film["path"], "rb") as file:
        hand.controls["file"].value = given("mine.png", file.read())
    known = lightbox.scores.p.xs(film["image"], level="image").reindex(hand.table.index)
    np.testing.assert_allclose(hand.table[LOSSES], known[LOSSES], atol=1e-6)
    assert "mine.png" in hand.words.value and hand.controls["class"].value == hand.table.index[0]
    hand.controls["path"].value = lightbox.subject.films.loc[lightbox.subject.rows("test")[4], "path"]
    assert not np.allclose(hand.table.sort_index(), known.sort_index()[LOSSES])


def test_it_is_loudly_not_for_diagnosis(lightbox):
    hand = hands.own_film(lightbox)
    assert "NOT FOR DIAGNOSIS" in hand.children[0].value
    blue, green, red = (decoded(hand)[: hands._TITLE, :, k].astype(int) for k in range(3))
    assert ((red > 150) & (green < 60) & (blue < 60)).sum() > 200


@pytest.mark.parametrize(
    "name, content, why",
    [
        ("notes.txt", b"no film", "it is a .txt file"),
        ("empty.png", b"", "it is empty"),
        ("film.dcm", b"\0" * 400, "it is not a DICOM file"),
        ("cut.png", cv2.imencode(".png", np.zeros((64, 64), np.uint8))[1].tobytes()[:60], "it is truncated"),
        ("wide.png", cv2.imencode(".png", np.zeros((64, 96), np.uint8))[1].tobytes(), r"it is not square \(96 x 64\)"),
        ("<b>.jpg", b"\x89PNG", "it is not a JPEG file"),
    ],
)
def test_a_file_that_is_no_film_is_named_and_what_is_accepted(lightbox, name, content, why):
    with pytest.raises(LensError, match=rf"^{name}: {why}.*Accepted are square .*\.png, \.jpg, \.jpeg or \.dcm"):
        lightbox.own_film(name, content)
    hand = hands.own_film(lightbox)
    before, words = hand.still, hand.words.value
    hand.controls["file"].value = given(name, content)
    assert 'role="alert"' in hand.words.value and words in hand.words.value and hand.still == before
    assert "<b>.jpg" not in hand.words.value


def test_a_path_that_is_not_there_is_named(lightbox):
    hand = hands.own_film(lightbox)
    hand.controls["path"].value = "/there/is/no/film.png"
    assert "film.png: it cannot be read" in hand.words.value


# ---- studies of other kinds


def test_without_boxes_and_with_one_loss(digits):
    assert not len(digits.pairs) and films.orders(digits.scores, "3") == ["p"]
    by_losses = hands.by_losses(digits)
    assert by_losses.table[["iobb", "ior", "iou"]].isna().all(axis=None) and by_losses.table["p"].between(0, 1).all()
    by_losses.controls["class"].value = "7"
    assert digits.has("7")[image_of(by_losses)] in (True, False)
    assert len(digits.rows) == len(digits.subject.rows("test")) == by_losses.controls["film"].max


def test_a_network_without_rules_says_so_and_shows_the_rest(digits):
    hand = hands.by_methods(digits)
    assert list(hand.table.index.unique("method")) == ["cam", "gradpp"]
    assert "LRP: the forward of Classifier cannot be followed" in hand.words.value


def test_every_hand_has_a_picture_where_nothing_runs(digits, lightbox, monkeypatch):
    for make in (hands.by_losses, hands.by_methods, hands.failures, hands.channels, hands.own_film):
        for box in (digits, lightbox):
            hand = make(box)
            bundle = hand._repr_mimebundle_()
            assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == hand.model_id
            assert base64.b64decode(bundle["image/png"]) == hand.still == hand.picture.value
            assert decoded(hand).shape[1] > 256
    monkeypatch.setattr(hands, "_attended", lambda: False)
    hand = hands.by_losses(digits)
    assert hand._repr_mimebundle_().keys() == {"image/png", "text/plain"} and not hand.picture.value
    assert len(json.dumps(ipywidgets.Widget.get_state(hand.picture), default=str)) < 2000


# ---- drawing


def test_a_long_text_is_cut_where_it_would_leave_its_panel():
    font = hands._font(13)
    assert hands._fitted("short", font, 200) == "short"
    cut = hands._fitted("a name that is much too long for one panel", font, 120)
    assert cut.endswith("…") and font.getlength(cut) <= 120 < font.getlength(cut[:-1] + "wide…")


def test_the_strongest_of_a_map_covers_and_nothing_of_it_does_not():
    film = np.full((64, 64), 100, np.uint8)
    values = np.zeros((64, 64), np.float32)
    values[:, 32:] = 1
    panel = hands.Panel(film, "", cover=hands._cover(values, hands._HEAT))
    drawn = hands._film(panel, 1.0, 64)
    assert (drawn[:, :30] == 100).all() and (abs(drawn[:, 34:].astype(float) - 255 * hands._HEAT[-1, :3]) <= 1).all()
    assert (hands._film(panel, 0.0, 64) == 100).all()
