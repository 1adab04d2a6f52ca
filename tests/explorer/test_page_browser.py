"""The page in a real browser, with the network off: it draws, it steps, and what it says is what the tables say."""

import shutil

import numpy as np
import pytest

from lib import records
from lib.explorer import explore
from tests.analysis import reference_localization
from tests.explorer.study import EMPTY, LOSSES, open_small
from tests.explorer.test_page import decoded, held

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium in the path: apt-get install chromium")


@pytest.fixture(scope="module")
def opened(small_phantom, outputs):
    return open_small(small_phantom, "browsed")


@pytest.fixture(scope="module")
def saved(opened, tmp_path_factory):
    page = explore(opened, films=True)
    path = tmp_path_factory.mktemp("page") / "explore.html"
    page.save(path)
    return page, path


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, saved):
    """The page, loaded offline; whatever it asks for, and every error, fails the test that opened it."""
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900})
    page, faults = context.new_page(), []
    page.on("request", lambda request: faults.append(request.url) if not request.url.startswith("data:") else None)
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(saved[1].as_uri())
    assert faults.pop(0) == saved[1].as_uri()
    yield page
    context.close()
    assert not faults


READ = """() => { const figures = [...document.querySelectorAll("#panels figure[data-loss]")];
    const scores = figure => [...figure.querySelectorAll("dd")].map(dd => [dd.dataset.score, dd.textContent]);
    return [document.getElementById("where").textContent, document.getElementById("class").value,
        Object.fromEntries(figures.map(figure => [figure.dataset.loss, Object.fromEntries(scores(figure))]))] }"""


def numbers(read):
    where, name, scores = read
    found = {loss: {k: np.nan if v == "none" else float(v) for k, v in one.items()} for loss, one in scores.items()}
    return where.split(": ")[1], name, found


def shown(tab):
    """image, class and each loss's scores, as a reader sees them."""
    return numbers(tab.evaluate(READ))


def walk(tab):
    """The same of every film in the order of the page, by its button from the first to the last."""
    step = f"""() => {{ const read = {READ}, next = document.getElementById("next"), found = [read()];
        while (!next.disabled) {{ next.click(); found.push(read()); }} return found }}"""
    return list(map(numbers, tab.evaluate(step)))


def pair_of(data, image, name):
    """Which pair of the first group that is."""
    pairs = data["groups"][0]["pairs"]
    return next(
        k for k, one in enumerate(pairs) if (data["films"][one["film"]]["image"], one["class"]) == (image, name)
    )


def table_of(opened, run):
    path = opened.study.run(run).run_folder / "cam_alignment.parquet"
    return records.read_table(path).set_index(["image", "class"])


def test_every_view_draws_without_a_request_or_an_error(tab):
    for view in ("scatter", "channels", "matrix", "films"):
        tab.click(f"[data-view={view}]")
        assert tab.eval_on_selector_all("section", "all => all.filter(one => !one.hidden).map(one => one.id)") == [view]
    colours = """node => new Set(new Uint32Array(node.getContext("2d").getImageData(0, 0, node.width, node.height)
        .data.buffer)).size"""
    tab.wait_for_function("() => [...pictures.values()].every(picture => picture.complete)")
    for canvas in tab.query_selector_all("#panels canvas"):
        assert canvas.evaluate(colours) > 100
        assert canvas.get_attribute("role") == "img"


def test_twenty_pairs_read_from_the_page_agree_with_the_tables(tab, opened):
    rng, pairs = np.random.default_rng(0), []
    for task, name in (("multilabel", EMPTY), ("multilabel", "Infiltration"), ("binary", None)):
        tab.select_option("#task", task)
        if name:
            tab.select_option("#class", name)
        pairs += [(task, *one) for one in walk(tab)]
    for k in rng.choice(len(pairs), 20, replace=False):
        task, image, name, scores = pairs[k]
        for loss, found in scores.items():
            row = table_of(opened, f"{task}-tdensenet-{loss}").loc[(image, name)]
            wanted = {"iobb": row["iobb"], "ior": row["ior"], "p": 1 / (1 + np.exp(-float(row["logit"])))}
            for score, value in wanted.items():
                assert found[score] == pytest.approx(value, abs=1e-3, nan_ok=True)


def test_a_slider_redraws_at_once_and_the_iou_follows_it(tab, saved):
    data = held(saved[0])
    timed = """() => Array.from({length: 21}, (_, k) => {
        const slider = document.getElementById("level"), start = performance.now();
        slider.value = .1 + .04 * k;
        slider.dispatchEvent(new Event("input"));
        return performance.now() - start; })"""
    assert min(tab.evaluate(timed)) < 50  # ms; what else runs on the machine only adds
    group = data["groups"][0]
    for level in (0.15, 0.5, 0.85):
        tab.fill("#level", str(level))
        image, name, scores = shown(tab)
        k = pair_of(data, image, name)
        for run in group["runs"]:
            native = decoded(run, len(group["pairs"]))[k]
            iou = reference_localization.overlap(native, group["pairs"][k]["whole"], data["size"], threshold=level)[2]
            assert scores[run["loss"]]["iou"] == pytest.approx(iou, abs=1e-3)
    tab.fill("#level", "0")
    assert shown(tab)[2]["bce"]["iou"] == pytest.approx(group["runs"][0]["iou"][k], abs=1e-3)


def test_arrow_keys_and_buttons_step_through_the_films(tab):
    tab.select_option("#class", EMPTY)
    first = shown(tab)[0]
    tab.click("h1")
    tab.keyboard.press("ArrowLeft")
    assert shown(tab)[0] == first and tab.is_disabled("#back")
    tab.keyboard.press("ArrowRight")
    second = shown(tab)[0]
    assert second != first
    tab.click("#back")
    assert shown(tab)[0] == first
    tab.click("#next")
    assert shown(tab)[0] == second
    tab.focus("#level")  # whose own keys these are
    tab.keyboard.press("ArrowRight")
    assert shown(tab)[0] == second and tab.input_value("#level") == "0.31"
    assert tab.evaluate("() => getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_an_empty_map_says_so(tab):
    tab.select_option("#class", EMPTY)
    labels = {loss: tab.get_attribute(f"[data-loss={loss}] canvas", "aria-label") for loss in LOSSES}
    assert ", empty;" in labels["focal"] and ", empty;" not in labels["bce"]
    assert np.isnan(shown(tab)[2]["focal"]["ior"])


@pytest.mark.parametrize(
    ("order", "of", "value"),
    [
        ("iobb", "all", lambda scores: np.mean([one["iobb"] for one in scores.values()])),
        ("iobb", "wbce", lambda scores: scores["wbce"]["iobb"]),
        ("p", "cb_focal", lambda scores: scores["cb_focal"]["p"]),
        ("iobb-spread", None, lambda scores: np.ptp([one["iobb"] for one in scores.values()])),
        ("p-spread", None, lambda scores: np.ptp([one["p"] for one in scores.values()])),
    ],
)
def test_films_come_in_the_order_that_is_asked_for(tab, order, of, value):
    tab.select_option("#class", EMPTY)
    tab.select_option("#order", order)
    if of:
        tab.select_option("#of", of)
    else:
        assert not tab.is_visible("#of")
    for rising in (False, True):
        tab.set_checked("#rising", rising)
        found = [value(scores) for _, _, scores in walk(tab)]
        assert len(found) > 2
        steps = np.diff(found) if rising else -np.diff(found)
        assert (steps >= -2e-3).all()  # what is read has three digits


def test_on_one_scale_the_weaker_map_is_weaker(tab, saved):
    data = held(saved[0])
    image, name, _ = shown(tab)
    group, k = data["groups"][0], pair_of(data, image, name)
    tops = {run["loss"]: run["high"][k] for run in group["runs"]}
    tab.select_option("#scale", "common")
    for loss, top in tops.items():
        found = tab.evaluate(f"() => Math.max(...group.runs.find(run => run.loss === '{loss}').map)")
        native = decoded(group["runs"][LOSSES.index(loss)], len(group["pairs"]))[k]
        wanted = reference_localization.resized(native, data["size"]).max() * top / max(tops.values())
        assert found == pytest.approx(wanted, abs=1e-2)


def test_a_dot_leads_to_its_film_and_a_brush_gives_the_means(tab, opened):
    tab.click("[data-view=scatter]")
    tables = {loss: table_of(opened, f"multilabel-tdensenet-{loss}") for loss in LOSSES}
    rows = (
        "() => [...document.querySelectorAll('#means tr')].map(row => [...row.children].map(cell => cell.textContent))"
    )
    head, *body = tab.evaluate(rows)
    assert head == ["Finding", "pairs", "BCE", "WBCE", "Focal", "CB-Focal"]
    for name, count, *means in body:
        kept = [
            table if name == "all" else table.xs(name.replace(" ", "_"), level="class") for table in tables.values()
        ]
        assert int(count) == len(kept[0])
        assert list(map(float, means)) == pytest.approx([table["iobb"].mean() for table in kept], abs=1e-3)
    box = tab.locator("#plots canvas").first.bounding_box()
    span = box["width"] - 56

    def place(first, second):
        return box["x"] + 44 + first * span, box["y"] + box["height"] - 44 - second * span

    bce, wbce = tables["bce"]["iobb"], tables["wbce"]["iobb"]
    edge = float(np.sort(bce)[len(bce) // 2 : len(bce) // 2 + 2].mean())
    tab.mouse.move(*place(edge, -0.05))
    tab.mouse.down()
    tab.mouse.move(*place(1.02, 1.02), steps=3)
    tab.mouse.up()
    chosen = bce[bce > edge].index
    *_, last = tab.evaluate(rows)
    assert (last[0], int(last[1])) == ("all", len(chosen))
    assert float(last[3]) == pytest.approx(wbce[chosen].mean(), abs=1e-3)
    tab.click("#clear")
    tab.locator("#plots canvas").first.focus()
    for _ in range(3):
        tab.keyboard.press("ArrowRight")
    tab.keyboard.press("Enter")
    image, name, _ = shown(tab)
    assert tab.is_visible("#films") and bce[(image, name)] == pytest.approx(np.sort(bce)[2], abs=1e-6)
    tab.click("[data-view=scatter]")
    far = max(bce.index, key=lambda one: min(np.hypot(bce[one] - bce.drop(one), wbce[one] - wbce.drop(one))))
    tab.mouse.click(*place(bce[far], wbce[far]))
    assert shown(tab)[:2] == far


def test_channels_and_matrix_show_what_the_page_holds(tab, saved):
    group = held(saved[0])["groups"][0]
    tab.click("[data-view=channels]")
    tab.select_option("#loss", "focal")
    tab.select_option("#kind", EMPTY)
    channels = group["runs"][LOSSES.index("focal")]["channels"]
    (finding,) = [one for one in channels["findings"] if one["name"] == EMPTY]
    titles = tab.locator("#rows h2").all_text_contents()
    assert [int(title.split()[1].rstrip(":")) for title in titles] == finding["channels"]
    assert f"{finding['inside'][0]} of {finding['n']} films with boxes of {EMPTY}" in titles[0]
    tab.click("[data-view=matrix]")
    tab.select_option("#metric", label="IoBB")
    (values,) = [metric["values"] for metric in group["matrix"]["metrics"] if metric["label"] == "IoBB"]
    cells = tab.locator("#table td").all_text_contents()
    assert list(map(float, cells)) == pytest.approx(np.ravel(values), abs=1e-3)
    tab.select_option("#task", "binary")
    assert "Notebook 09 has not run" in tab.inner_text("#matrix") and not tab.is_visible("#table")
    tab.click("[data-view=scatter]")
    assert "another loss" in tab.inner_text("#scatter") and not tab.is_visible("#plots")


def test_another_task_or_backbone_keeps_the_film(tab):
    tab.click("h1")
    tab.keyboard.press("ArrowRight")
    image = shown(tab)[0]
    tab.select_option("#task", "binary")
    assert shown(tab)[:2] == (image, "Unhealthy")


def test_it_runs_in_the_frame_of_a_notebook(browser, saved):
    context = browser.new_context(offline=True)
    page, faults = context.new_page(), []
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.set_content(saved[0]._repr_html_())
    frame = page.frames[1]
    frame.select_option("#class", EMPTY)
    frame.fill("#level", "0.6")
    assert "of" in frame.inner_text("#where") and frame.inner_text("#level-said") == "0.60"
    context.close()
    assert not faults
