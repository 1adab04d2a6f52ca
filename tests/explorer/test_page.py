"""The page's data: what it holds, decoded again, against the tables that the notebooks write and slow references."""

import base64
import html
import json
import re

import cv2
import numpy as np
import pandas as pd
import pytest

from lib import records
from lib.analysis.dissection.concepts import concept_records, dissect
from lib.explorer import Page, explore
from lib.records import RecordError
from lib.runs import OpenStudy, Subject
from lib.state import TrainingError
from tests.analysis import reference_localization
from tests.explorer.study import EMPTY, LOSSES, open_small


@pytest.fixture(scope="module")
def opened(small_phantom, outputs):
    return open_small(small_phantom, "explored")


@pytest.fixture(scope="module")
def page(opened):
    return explore(opened)


def held(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.html, re.S)[1])


def decoded(packed, *shape):
    cells = np.frombuffer(base64.b64decode(packed["cells"]), "<u2") / 65535
    return cells.reshape(*shape, *packed["grid"])


def table(opened, group, run):
    run = opened.study.run(f"{group['task']}-{group['backbone']}-{run['loss']}", group["seed"])
    return records.read_table(run.run_folder / "cam_alignment.parquet").set_index(["image", "class"])


# ---- data


def test_every_trained_run_is_there_and_no_other(opened, page):
    found = [(one["task"], one["backbone"], run["loss"]) for one in held(page)["groups"] for run in one["runs"]]
    assert found == [*(("multilabel", "tdensenet", loss) for loss in LOSSES), ("binary", "tdensenet", "bce")]


def test_scores_are_those_of_the_tables(opened, page):
    data = held(page)
    for group in data["groups"]:
        for run in group["runs"]:
            known = table(opened, group, run)
            assert len(known) == len(group["pairs"]) > 15
            for k, pair in enumerate(group["pairs"]):
                row = known.loc[(data["films"][pair["film"]]["image"], pair["class"])]
                for score in ("iobb", "ior", "iou"):
                    ours = np.nan if run[score][k] is None else run[score][k]
                    assert ours == pytest.approx(row[score], abs=1e-5, nan_ok=True)
                assert run["p"][k] == pytest.approx(1 / (1 + np.exp(-float(row["logit"]))), abs=1e-5)


def test_decoded_maps_have_the_scores_of_the_tables(opened, page):
    data = held(page)
    for group in data["groups"]:
        for run in group["runs"]:
            known, maps = table(opened, group, run), decoded(run, len(group["pairs"]))
            for k, pair in enumerate(group["pairs"]):
                row = known.loc[(data["films"][pair["film"]]["image"], pair["class"])]
                iobb, ior, *_ = reference_localization.overlap(maps[k], pair["whole"], data["size"])
                assert iobb == pytest.approx(row["iobb"], abs=1e-3)
                assert ior == pytest.approx(row["ior"], abs=1e-3, nan_ok=True)
                assert (maps[k].max() == 0) == row["empty"]


def test_with_floor_and_top_the_maps_are_the_rectified_ones(opened, page):
    group = held(page)["groups"][0]
    for run in group["runs"]:
        subject = opened.subject(f"multilabel-tdensenet-{run['loss']}")
        pairs, maps = subject.pairs, decoded(run, len(group["pairs"]))
        films = pairs["row"].unique()
        output = next(subject.outputs(films, subject.layer, batch_size=len(films)))
        weight, features = subject.model.head.weight.detach().double(), output.maps[subject.layer].double()
        for k in (0, 7, len(pairs) - 1):
            film = list(films).index(pairs["row"][k])
            raw = np.einsum("f,fhw->hw", weight[pairs["output"][k]].numpy(), features[film].numpy()).clip(min=0)
            low, high = run["low"][k], run["high"][k]
            np.testing.assert_allclose(low + maps[k] * (high - low), raw, atol=1e-4 * max(1e-6, raw.max()))


def test_a_map_with_nothing_above_zero_is_empty_and_has_no_ior(page):
    group = held(page)["groups"][0]
    run = group["runs"][LOSSES.index("focal")]
    (k, *_) = [k for k, pair in enumerate(group["pairs"]) if pair["class"] == EMPTY]
    assert not decoded(run, len(group["pairs"]))[k].any()
    assert (run["iobb"][k], run["ior"][k], run["high"][k]) == (0, None, 0)


def test_films_have_the_named_boxes_of_all_findings(opened, page):
    boxes = opened.release.boxes
    for film in held(page)["films"]:
        own = boxes[boxes["image"] == film["image"]]
        assert [box[0] for box in film["boxes"]] == list(own["class"])
        corners = own[["x1", "y1", "x2", "y2"]].to_numpy() / 1024
        np.testing.assert_allclose([box[1:] for box in film["boxes"]], corners, atol=1e-5)


# ---- channels


@pytest.fixture(scope="module")
def dissected(opened):
    """What notebook 04 finds in the first run, film by film."""
    subject = opened.subject("multilabel-tdensenet-bce")
    (layer, q), regions = subject.dissection, subject.regions
    boxes = dict(zip(regions["row"], regions["boxes"]))
    return subject, dissect(subject.outputs(regions["row"], layer), boxes, layer=layer, q=q, image_size=32)


def test_concepts_are_those_of_the_dissection(opened, page, dissected):
    subject, dissection = dissected
    concepts = concept_records(dissection, opened.films).set_index("image")[["disjoint", "unique"]]
    data = held(page)
    channels, images = data["groups"][0]["runs"][0]["channels"], [film["image"] for film in data["films"]]
    assert channels["totals"] == concepts.loc[images].to_numpy().tolist()
    holds = pd.DataFrame(dissection.counts, index=opened.films.loc[dissection.rows, "image"])
    for c, channel in enumerate(channels["ids"]):
        assert channels["counts"][c] == [holds.loc[images[film], channel] for film in channels["films"][c]]
    boxes = opened.release.boxes
    for finding in channels["findings"]:
        inside = holds.index.isin(boxes.loc[boxes["class"] == finding["name"], "image"]) | (finding["name"] == "all")
        assert (finding["n"], finding["rest"]) == (inside.sum(), (~inside).sum())
        for channel, own, other in zip(finding["channels"], finding["inside"], finding["outside"]):
            assert (own, other) == ((holds[inside][channel] > 0).sum(), (holds[~inside][channel] > 0).sum())


def test_a_channels_films_are_those_of_its_highest_peaks_outlined_at_its_threshold(opened, page, dissected):
    subject, dissection = dissected
    (layer, _), data = subject.dissection, held(page)
    channels, rows = data["groups"][0]["runs"][0]["channels"], dissection.rows
    maps = next(subject.outputs(rows, layer, batch_size=len(rows))).maps[layer].double().numpy()
    where = opened.films.loc[rows, "image"].tolist()
    for c, channel in enumerate(channels["ids"]):
        films = [where.index(data["films"][film]["image"]) for film in channels["films"][c]]
        peaks = maps[:, channel].max((1, 2))
        np.testing.assert_allclose(peaks[films], np.sort(peaks)[::-1][: len(films)], rtol=1e-5)
        for shown, level, film in zip(decoded(channels, len(channels["ids"]), 5)[c], channels["levels"][c], films):
            above = maps[film, channel] >= dissection.thresholds.tau[channel]
            near = abs(shown - level) < 1e-4
            assert ((shown >= level) == above)[~near].all()


# ---- trunk and head


def test_the_matrix_is_that_of_notebook_09(opened, page):
    groups = held(page)["groups"]
    assert groups[1]["matrix"] is None
    matrix, folder = groups[0]["matrix"], opened.study.run("multilabel-tdensenet-bce").run_folder
    known = records.read_table(folder / "trunk_head.parquet").groupby(["trunk", "head"])["iobb"].mean()
    (values,) = [metric["values"] for metric in matrix["metrics"] if metric["label"] == "IoBB"]
    assert (matrix["trunks"], matrix["heads"]) == (["BCE", "Focal"], ["BCE", "Focal", "trained"])
    wanted = [[known[trunk, head] for head in ("bce", "focal", "trained")] for trunk in ("bce", "focal")]
    np.testing.assert_allclose(values, wanted, rtol=1e-5)


# ---- pixels


def test_real_films_go_in_on_request_alone(opened, page):
    assert not opened.exact and not held(page)["pixels"] and "data:image/jpeg" not in page.html
    data = held(explore(opened, films=True, most=3))
    assert data["pixels"] and len(data["films"]) == 3
    for film in data["films"]:
        encoded = base64.b64decode(film["pixels"].removeprefix("data:image/jpeg;base64,"))
        shown = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)
        row = opened.films.index[opened.films["image"] == film["image"]]
        assert abs(shown - opened.images(row, 256)[0].astype(float)).mean() < 4


def test_simulated_films_always_go_in(opened, monkeypatch):
    monkeypatch.setattr(opened, "exact", True)
    data = held(explore(opened, most=1))
    assert data["pixels"] and data["films"][0]["pixels"].startswith("data:image/jpeg;base64,")


def test_of_many_films_some_are_taken_evenly_and_the_page_can_say_so(opened, page):
    data, whole = held(explore(opened, most=5)), held(page)
    images = [film["image"] for film in whole["films"]]
    places = [images.index(film["image"]) for film in data["films"]]
    assert places[0] == 0 and places[-1] == len(images) - 1 and np.ptp(np.diff(places)) <= 1
    assert data["n_boxed"] == whole["n_boxed"] == len(images)
    assert {pair["film"] for pair in data["groups"][0]["pairs"]} == set(range(5))


# ---- the file


def test_the_page_asks_for_nothing(page):
    loads = r"""https?://|(?:src|href|action)\s*=\s*["'](?!data:)|url\(|@import|\bimport\b|\bfetch\(|XMLHttp"""
    assert not re.findall(loads, page.html)
    assert "default-src 'none'" in page.html and len(page.html) < 10e6


def test_the_page_is_saved_whole_and_shows_itself_in_a_notebook(page, tmp_path):
    page.save(tmp_path / "deep" / "explore.html")
    assert (tmp_path / "deep" / "explore.html").read_text(encoding="utf-8") == page.html
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["explore.html"]
    frame = re.fullmatch(r'<iframe sandbox="allow-scripts" [^>]*srcdoc="([^"]*)"></iframe>', page._repr_html_())
    assert html.unescape(frame[1]) == page.html
    (tmp_path / "taken").mkdir()
    with pytest.raises(RecordError, match="cannot be written"):
        page.save(tmp_path / "taken")


def test_the_same_study_gives_the_same_bytes(opened, page):
    assert explore(opened) == page == Page(page.html)


def test_a_films_name_cannot_end_the_script(opened, monkeypatch):
    named = {"study": "any", "films": [{"image": "</script><b>@data@"}]}
    monkeypatch.setattr("lib.explorer.page.gather", lambda data, **options: named)
    page = explore(opened)
    assert held(page) == named and "</script><b>" not in page.html


# ---- what is refused


def test_what_cannot_be_shown_is_refused(opened, small_phantom, monkeypatch):
    with pytest.raises(ValueError, match="most is 0; a page shows at least 1 film"):
        explore(opened, most=0)
    other = OpenStudy(opened.study.model_copy(update={"study": "untouched"}))
    with pytest.raises(TrainingError, match="multilabel-tdensenet-bce seed 0 is not trained.*Run 01_train"):
        explore(other)
    monkeypatch.setattr(Subject, "boxes", opened.release.boxes[:0])
    with pytest.raises(ValueError, match="no film of split all has a box of Atelectasis"):
        explore(OpenStudy(opened.study))
