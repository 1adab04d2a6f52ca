"""The page of a study: what is on it is what the notebooks hold, and what is not there is said."""

import base64
import html
import inspect
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import cv2
import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat import v4

from lib import figures, records, report
from lib.params import ROOT, Study, load_study
from lib.workflow import jobs_of

RUNS = ["multilabel-tdensenet-bce", "multilabel-tdensenet-focal"]
PICTURE = np.random.default_rng(0).integers(0, 2, (40, 60, 1)).repeat(3, 2).astype(np.uint8) * 200  # sharp edges
TABLE = "| Loss | IoBB |\n|---|---:|\n| BCE | 0.541 |"
COUNT = 3 + 4 * 2  # of the notebooks of a study of these runs
ENDED = "2026-01-02T10:00:00.5+00:00"


def png(picture=PICTURE):
    return base64.b64encode(cv2.imencode(".png", picture)[1].tobytes()).decode()


def shown(source, **data):
    names = {"text": "text/plain", "markdown": "text/markdown", "table": "text/html", "picture": "image/png"}
    data = {names[key]: value for key, value in data.items()} | (
        {"text/plain": "<object>"} if "text" not in data else {}
    )
    return v4.new_code_cell(source, execution_count=1, outputs=[v4.new_output("display_data", data=data)])


def notebook(said, *cells, **parameters):
    """One of the study's: a title, cells, and a finding."""
    title = v4.new_markdown_cell(f"# About {said}\n\n*A question?*")
    finding = [v4.new_markdown_cell("## Finding"), shown("Markdown(...)", markdown=f"**{said}**: 1 < 2 & held.")]
    papermill = {"end_time": ENDED, "exception": None, "parameters": parameters}
    return v4.new_notebook(cells=[title, *cells, *finding], metadata={"papermill": papermill})


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study that is finished: two runs, every notebook executed."""
    monkeypatch.setenv("OUTPUTS", str(tmp_path))
    study = Study(study="small", release="phantom", runs=RUNS, n_replicates=20)
    for run in study.every_run:
        record = {"status": "finished", "parameters": run.model_dump(), "identity": {"films": "f1lm5"}}
        record |= {"finished": "2026-01-01T00:00:00+00:00", "started": "2026-01-01T00:00:00+00:00", "commit": "c0ffee"}
        records.write_json(record | {"films": {"test": 3}, "best_epoch": 4}, run.run_folder / "run.json")
        run.weights_path.touch()
    for name in ("table1_alignment.csv", "table1_alignment.md", "table1_alignment.tex", "odd name.csv"):
        records.write_text(TABLE if name.endswith("md") else "a\n1\n", study.folder / "tables" / name)
    records.write_text("", study.folder / "figures" / "fig2_performance.png")
    rows = pd.DataFrame({"image": ["00000013_019.png"], "labels": ["Mass"]}).to_html()
    cells = {
        "figures": [
            v4.new_markdown_cell("## Figure 2: performance\n\nThe share $w_+$ <b>by loss</b>."),
            shown('f = figures.performance(x)\nwrite(f, path("figures/fig2_performance"))', picture=png()),
            v4.new_markdown_cell("## Look at some"),
            shown("figures.cam_grid(x)", picture=png(PICTURE[::-1])),
            shown("rows.head()", table=rows),
            shown("shown", markdown=TABLE),
            v4.new_markdown_cell("## Nothing is shown here"),
            v4.new_code_cell("x = 1"),
        ]
    }
    for rule, name, seed in jobs_of(study):
        of = study.run(name, seed) if name else study
        made = notebook(f"{rule} {name}".strip(), *cells.get(rule, []), study="small", n_replicates=20)
        save(made, (of.run_folder if name else study.folder) / f"{report.NOTEBOOKS[rule]}.ipynb")
    return study


def save(made, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(made, path)


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def of(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def page_of(study, **options):
    path, _ = report.write(study, **options)
    assert path == study.folder / "report.html"
    return path.read_text()


def test_the_page_asks_for_nothing_and_its_links_are_there(study):
    page = page_of(study)
    tags = Tags(page)
    assert not tags.of("script") and not tags.of("link") and not tags.of("iframe") and "url(" not in page
    (policy,) = [tag["content"] for tag in tags.of("meta") if "http-equiv" in tag]
    assert policy.startswith("default-src 'none'") and "http" not in policy
    assert all(tag["src"].startswith("data:image/") for _, tag in tags.found if "src" in tag)
    ids = [tag["id"] for _, tag in tags.found if "id" in tag]
    assert len(ids) == len(set(ids))
    linked = [unquote(tag["href"]) for tag in tags.of("a")]
    for target in linked:
        assert target[1:] in ids if target.startswith("#") else (study.folder / target).is_file(), target
    for path in [*study.folder.rglob("tables/*"), *study.folder.rglob("figures/*"), *study.folder.rglob("*.ipynb")]:
        assert str(path.relative_to(study.folder)) in linked
    assert "small (not finished)" not in page and 'class="unfinished"' not in page
    assert page == page_of(study)  # nothing on it says when it was made


def test_findings_come_first_and_are_those_of_the_notebooks(study):
    page = page_of(study)
    findings = page[page.index('<h2 id="findings">') : page.index('<h2 id="details">')]
    said = [
        f"<p><strong>{rule} {name}".strip() + "</strong>: 1 &lt; 2 &amp; held.</p>" for rule, name, _ in jobs_of(study)
    ]
    assert len(said) == COUNT and all(findings.count(sentence) == 1 for sentence in said)
    assert page.count("&amp; held") == len(said)
    assert findings.index("figures</strong>") < findings.index("data</strong>") < findings.index("metrics multi")
    folded = findings[findings.index("<details>") : findings.index("</details>")]
    assert RUNS[1] in folded and RUNS[0] not in folded


def test_figures_and_tables_stand_under_their_text_with_their_files(study):
    page = page_of(study)
    figure, map_, rows, table = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
    caption = re.search("<figcaption>(.*?)</figcaption>", figure, re.DOTALL)[1]
    assert caption.startswith("<p>The share <img") and "&lt;b&gt;by loss&lt;/b&gt;" in caption
    assert 'href="figures/fig2_performance.png">png</a>' in figure and figure.index(caption) < figure.index("fig2_")
    assert "Khakzar et al., Fig. 1: a row per film" in map_  # it has no text of its own
    assert "00000013_019.png" in rows
    assert [f"table1_alignment.{kind}" in table for kind in ("csv", "md", "tex")] == [True] * 3
    assert '<div class="scroll" tabindex="0"><table>' in table and "0.541" in table
    assert "Nothing is shown here" not in page


def test_every_picture_has_a_text_and_is_the_notebooks(study):
    pictures = Tags(page_of(study)).of("img")
    assert len(pictures) == 3
    formula, first, second = pictures
    assert formula["alt"] == "w_+" and "Figure 2: performance" in first["alt"] and "AUROC" in first["alt"]
    for tag, expected in ((first, PICTURE), (second, PICTURE[::-1])):
        content = np.frombuffer(base64.b64decode(tag["src"].partition(",")[2]), np.uint8)
        np.testing.assert_array_equal(cv2.imdecode(content, cv2.IMREAD_COLOR), expected)


def test_pictures_are_the_smaller_of_two_forms():
    noise = np.random.default_rng(1).normal(128, 20, (256, 256, 1)).repeat(3, 2).clip(0, 255).astype(np.uint8)
    content = report.compressed(base64.b64decode(png(noise)))
    back = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    assert len(content) < len(base64.b64decode(png(noise))) / 2
    assert 0 < np.abs(back.astype(int) - noise).mean() < 8


def failed(made):
    error = v4.new_output("error", ename="LensError", evalue="layer x of /home/me/secret/run.json", traceback=[])
    made.cells[-1].outputs = [error]
    return made


def unended(made):
    del made.metadata["papermill"]["end_time"]
    return made


def asked_otherwise(made):
    made.metadata["papermill"]["parameters"]["n_replicates"] = 7
    return made


def earlier(made):
    made.metadata["papermill"]["end_time"] = "2025-12-31T23:59:59.9+00:00"
    return made


FAULTS = {
    failed: "failed (LensError: layer x of …/run.json)",
    unended: "did not come to its end",
    asked_otherwise: "run with other parameters (n_replicates: 7)",
    earlier: f"older than the weights of {RUNS[0]}/seed0",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["05_figures", "03_cam_alignment"])
def test_a_notebook_that_does_not_count_is_named_and_not_shown(study, fault, name):
    folder = study.folder if name.startswith("05") else study.every_run[0].run_folder
    path = folder / f"{name}.ipynb"
    save(fault(nbformat.read(path, 4)), path)
    page, rule = page_of(study), name.partition("_")[2]
    warning = page[page.index('<div class="unfinished"') : page.index("</ul></div>")]
    assert "This study is not finished." in warning and f"<b>{name}</b>: {FAULTS[fault]}" in html.unescape(warning)
    assert (RUNS[0] in warning) == (name.startswith("03") or fault is earlier)
    assert "<title>Study small (not finished)</title>" in page and "secret" not in page
    assert (
        f"<strong>{rule} {RUNS[0]}".removesuffix(f" {RUNS[0]}" if name.startswith("05") else "") + "</strong>"
        not in page
    )
    assert page.count("&amp; held") == COUNT - 1


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"cells": 3, "nbformat": 4, "metadata": {}}'])
def test_a_notebook_that_is_missing_or_damaged_is_named(study, content):
    path = study.every_run[1].run_folder / "04_dissection.ipynb"
    path.write_text(content) if content is not None else path.unlink()
    page = page_of(study)
    warning = page[page.index('<div class="unfinished"') : page.index("</ul></div>")]
    assert "04_dissection" in warning and RUNS[1] in warning and RUNS[0] not in warning
    assert page.count("&amp; held") == COUNT - 1


def test_a_run_that_is_not_trained_is_named(study):
    (study.every_run[1].run_folder / "run.json").unlink()
    page = page_of(study)
    assert "<b>01_train</b>: left no finished run of these parameters" in page and "(not finished)" in page


def test_runs_without_anything_are_named_once(study):
    for path in study.every_run[1].run_folder.glob("*.ipynb"):
        path.unlink()
    page = page_of(study)
    assert f"<b>01_train, 02_metrics, 03_cam_alignment, 04_dissection</b>: not run ({RUNS[1]}/seed0)" in page


def test_a_study_without_results_has_no_page(tmp_path, monkeypatch):
    monkeypatch.setenv("OUTPUTS", str(tmp_path))
    with pytest.raises(report.ParameterError, match="make study STUDY=small"):
        report.write(Study(study="small", runs=RUNS))
    assert not list(tmp_path.iterdir())


def test_films_of_patients_are_seen_and_named_only_where_that_is_asked(study, monkeypatch):
    real = Study.build({**study.model_dump(), "release": "nih", "data_root": "somewhere", "init": "phantom"})
    for run in real.every_run:
        record = records.read_json(run.run_folder / "run.json")
        records.write_json(record | {"parameters": run.model_dump()}, run.run_folder / "run.json")
    path = study.folder / "05_figures.ipynb"
    made = nbformat.read(path, 4)
    made.cells[-1].outputs[0].data["text/markdown"] = "Least like its class is 00000013_019.png (Mass)."
    made.cells.insert(2, shown("plt.imshow(film)", picture=png()))  # by whom it is drawn is not known
    made.cells.insert(3, shown("explore(study)", table="<iframe srcdoc='<table><td>000</td></table>'></iframe>"))
    save(made, path)
    page = page_of(real)
    assert "00000013_019" not in page and "Least like its class is [a film] (Mass)." in page
    assert [tag["alt"].partition(". ")[0] for tag in Tags(page).of("img")] == ["w_+", "Figure 2: performance"]
    assert (
        page.count("Left out, for films of patients are in it") == 3
        and "3 figures and tables with films of patients were left out" in page
    )
    assert "iframe" not in page and "somewhere" not in page and "(not finished)" not in page
    assert not Tags(page).of("iframe")
    page = page_of(real, films=True)
    assert page.count("00000013_019.png") == 2 and len(Tags(page).of("img")) == 4 and "eft out" not in page


def test_figures_said_to_be_without_films_take_none():
    for name in report.WITHOUT_FILMS:
        parameters = inspect.signature(getattr(figures, name)).parameters
        assert "data_label" in parameters
        assert not [
            key for key in ("films", "images") if key in parameters and parameters[key].annotation is np.ndarray
        ]


def test_what_has_no_room_is_left_out_from_the_end_and_said(study, monkeypatch):
    whole = page_of(study)
    assert len(whole.encode()) < report.LIMIT == 5_000_000
    noise = np.random.default_rng(2).integers(0, 256, (300, 300, 3)).astype(np.uint8)
    path = study.folder / "00_data.ipynb"
    made = nbformat.read(path, 4)
    made.cells[1:1] = [
        v4.new_markdown_cell("## Noise"),
        *(shown(f"figures.ages({k})", picture=png(noise)) for k in "ab"),
    ]
    save(made, path)
    size = len(page_of(study).encode())
    assert size > len(whole.encode()) + 100_000
    monkeypatch.setattr(report, "LIMIT", size - 10_000)
    page = page_of(study)
    assert len(page.encode()) <= report.LIMIT and len(Tags(page).of("img")) == 4
    assert "1 figures or parts were left out" in page and "Left out for want of room: Noise. Age in years" in page
    monkeypatch.setattr(report, "LIMIT", len(whole.encode()) + 1000)
    assert len(page_of(study).encode()) <= report.LIMIT


def test_a_page_that_cannot_be_written_whole_leaves_the_one_before(study, monkeypatch):
    before = page_of(study)
    monkeypatch.setattr(report, "report", lambda *given: ("half \ud800", []))
    with pytest.raises(UnicodeEncodeError):
        report.write(study)
    assert (study.folder / "report.html").read_text() == before


def test_files_are_found_by_names_that_a_cell_spells_out(tmp_path):
    for name in ("fig6_methods.png", "fig8_scaled_cams.pdf", "tables/films.csv", "li_table1.tex", "model.json"):
        records.write_text("", tmp_path / name)
    source = '''%matplotlib inline
write(path("tables/films.csv")); drawn[f"fig{7 if digits else 8}_scaled_cams"]; path(f"figures/{names[task]}"), "a"'''
    assert [path.name for path in report.files_named(source, tmp_path)] == ["fig8_scaled_cams.pdf", "films.csv"]


def test_the_notebooks_are_those_of_the_workflow():
    text = (ROOT / "Snakefile").read_text()
    logs = dict(
        re.findall(r'use rule notebook as (\w+) with:.*?log: f"{(?:OUT|RUN|PRETEXT)}/(.+?)\.ipynb"', text, re.DOTALL)
    )
    assert logs.pop("pretext") == "01_train"
    assert {rule: logs[rule] for rule in report.NOTEBOOKS} == report.NOTEBOOKS
    shown_rules = {
        rule for rule, log in logs.items() if (ROOT / "notebooks" / f"{log.rpartition('/')[2]}.ipynb").is_file()
    }
    assert shown_rules == set(report.NOTEBOOKS)


def test_it_is_called_by_the_name_of_a_study(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUTPUTS", str(tmp_path))
    monkeypatch.setenv("RUNS", RUNS[0])
    with pytest.raises(SystemExit, match="no such file"):
        report.main(["no_such_study"])
    study = load_study("nih_sample", data_root=".", runs=[RUNS[0]])
    study.folder.mkdir()
    report.main(["nih_sample"])
    told = capsys.readouterr()
    assert told.out == f"{study.folder / 'report.html'}\n" and "7 notebooks" in told.err
    assert RUNS[1] not in (study.folder / "report.html").read_text()
