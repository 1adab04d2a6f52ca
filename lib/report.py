"""One page of a study, to hand on: `python -m lib.report STUDY`, or `make report STUDY=…`.

outputs/<study>/report.html is made of the executed notebooks: their findings first, then their figures and tables, each
under the text that explains it, links to the files, and what all was made from. A notebook's findings are what stands
under its headings `## Finding`, of which every notebook has one.

It asks nothing of any network, which its Content-Security-Policy forbids, and has at most `LIMIT` bytes. A notebook
that is missing, failed, or no longer goes with the weights and parameters is named in red at the top, and nothing of it
is shown. In a study on patients what shows or names their films is left out, unless `--films` is given.
"""

import argparse
import base64
import inspect
import io
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from html import escape
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

import cv2
import nbformat
import numpy as np
import pandas as pd
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import math_to_image
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode

from lib import figures, records
from lib.data import RELEASES
from lib.params import Analysis, ParameterError, Run, Study, load_study
from lib.plan import load_plan
from lib.records import RecordError
from lib.state import is_trained
from lib.workflow import jobs_of, told

LIMIT = 5_000_000  # bytes
PARTS = {"findings": "Findings", "details": "Figures and tables", "files": "Files", "provenance": "Provenance"}
PICTURES = (".png", ".pdf")
KINDS = (".csv", ".md", ".tex", *PICTURES)
# The notebook of each rule of the Snakefile, in the order of the page.
NOTEBOOKS = {"figures": "05_figures", "laboratory": "11_laboratory", "intention": "08_intention", "data": "00_data"}
NOTEBOOKS |= {"trunk_and_head": "09_trunk_and_head", "metrics": "02_metrics", "cam_alignment": "03_cam_alignment"}
NOTEBOOKS |= {"dissection": "04_dissection", "attribution": "06_attribution", "features": "07_feature_analysis"}
NOTEBOOKS |= {"chexnet": "chexnet/06_attribution", "train": "01_train", "explore": "10_explore"}
# Figures on which no film is seen. What is not named here is left out of the report of a study on patients.
WITHOUT_FILMS = {"activation_distribution", "ages", "alignment_distributions", "change_parts", "channel_responses"}
WITHOUT_FILMS |= {"class_curves", "class_overlap", "concept_distributions", "consistency_scatter", "convergence"}
WITHOUT_FILMS |= {"cooccurrence", "dose_response", "importance_panels", "iou_by_threshold", "loss_comparison"}
WITHOUT_FILMS |= {"loss_weights", "performance", "prevalence", "principal_curve", "pruning_curve", "randomisation"}
WITHOUT_FILMS |= {"reliability", "share_dots", "train_test_gap", "training_curves"}
FOLDERS = re.compile(r"(?<![\w.])(?:/[^/\s]+)+/")  # of absolute paths, which are of this machine alone
FILM_NAME = re.compile(r"[\w.-]+\.(?:png|jpe?g|dcm)\b", re.IGNORECASE)
EMBEDDED = re.compile(r"<(?:iframe|img|script)")  # what notebooks show by hand, and on what films is not known
ROWS_OF_FILMS = re.compile(r"<th[^>]*>(?:image|patient)</th>")
SAFE = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
* { box-sizing: border-box; }
body { font: 17px/1.5 Charter, 'Bitstream Charter', Cambria, Georgia, serif; color: #1c1c1c; background: #fff; }
body { max-width: 62rem; margin: 0 auto; padding: 1.5rem; overflow-wrap: break-word; }
p, ul, ol, h1, h2, h3, h4, figcaption, .unfinished, details { max-width: 41rem; }
h1, h2, h3, h4 { line-height: 1.25; margin: 2em 0 .5em; } h1 { margin-top: .5em; font-size: 2rem; }
h2 { font-size: 1.5rem; border-top: 2px solid #1c1c1c; padding-top: .5em; } h3 { font-size: 1.2rem; }
h4 { font-size: 1rem; } a { color: #0b4f8a; } code { font-size: .85em; } summary { cursor: pointer; }
figure { margin: 1rem 0 1.8rem; } figure p, figcaption { font-size: .88rem; line-height: 1.42; margin: .4rem 0; }
img { max-width: 100%; height: auto; display: block; margin: .4rem 0; } img.formula { display: inline; margin: 0; }
.scroll { overflow-x: auto; margin: .5rem 0; } table { border-collapse: collapse; border: 0; }
table { font: .78rem/1.35 system-ui, 'Segoe UI', Roboto, Arial, sans-serif; font-variant-numeric: tabular-nums; }
th, td { padding: .22em .6em; border: 0; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
.dataframe th, .dataframe td { text-align: right; } .dataframe tbody th, .runs :first-child { text-align: left; }
thead tr:last-child th { border-bottom: 1px solid #1c1c1c; } .runs td, figure td { white-space: nowrap; }
.meta, figure .files, .note, summary { color: #555; font-size: .82rem; } .note { font-style: italic; }
pre { font-size: .8rem; overflow-x: auto; } details { border-left: 3px solid #ddd; padding-left: 1rem; }
.unfinished { border: 2px solid; padding: .2rem 1rem; background: #fff4f4; } .unfinished, .bad { color: #b00020; }
@media (max-width: 600px) { body { font-size: 16px; padding: 1rem; } h1 { font-size: 1.6rem; } ul { padding: 0 1em; } }
@media print { body { font-size: 10pt; max-width: none; padding: 0; } a { color: inherit; text-decoration: none; }
 .scroll { overflow: visible; } table { font-size: 6.5pt; } img { max-height: 22cm; width: auto; }
 figure td { white-space: normal; }
 h2, h3, h4, figcaption { break-after: avoid; } tr, img { break-inside: avoid; } th, td { padding: .2em .35em; } }
"""


@dataclass(frozen=True)
class Executed:
    """A notebook that belongs to a study, as it was executed.

    Attributes
    ----------
    rule : str
        That of the Snakefile which makes it, a key of `NOTEBOOKS`.
    of : lib.params.Study or lib.params.Run
        What it was executed for.
    path : Path
        Where it lies, or should.
    notebook : NotebookNode or None
        None where there is a fault.
    fault : str
        Why it is no result of the study as it stands, in words; empty where it is one.
    """

    rule: str
    of: Study
    path: Path
    notebook: NotebookNode | None
    fault: str

    @property
    def run(self) -> str:
        """<run>/seed<k>, or nothing for a notebook of the whole study."""
        return f"{self.of.name}/seed{self.of.seed}" if isinstance(self.of, Run) else ""


def executed(study: Study) -> list[Executed]:
    """Every notebook that the study asks for, in the order of the page and then of its runs."""
    found = []
    for rule, name, seed in jobs_of(study):
        if rule in NOTEBOOKS:
            of = study.run(name, seed) if name else study
            path = (of.run_folder if name else study.folder) / f"{NOTEBOOKS[rule]}.ipynb"
            found.append(Executed(rule, of, path, *_read(rule, of, path)))
    return sorted(found, key=lambda one: list(NOTEBOOKS).index(one.rule))


def _read(rule, of, path):
    if not path.is_file():
        return None, "not run"
    try:
        notebook = nbformat.read(path, as_version=4)
        known = notebook.metadata.get("papermill", {})
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    except (nbformat.ValidationError, ValueError, AttributeError, KeyError, TypeError, OSError) as error:
        return None, f"cannot be read ({type(error).__name__})"
    for output in outputs:
        if output.output_type == "error":
            return None, f"failed ({output.ename}: {output.evalue[:300]})"
    if not known.get("end_time") or not sections(notebook):
        return None, "did not come to its end"
    # Training's keys are on the run's own record. 06 explains the run also where the study names a checkpoint.
    keys = Analysis.model_fields.keys() - {"chexnet"}
    given = {key: value for key, value in known.get("parameters", {}).items() if key in keys and value is not None}
    if other := [f"{key}: {value}" for key, value in given.items() if value != getattr(of, key)]:
        return None, f"run with other parameters ({', '.join(other)})"
    if rule == "train" and not is_trained(of):
        return None, "left no finished run of these parameters"
    read = {"train": [], "data": []}.get(rule, [of] if isinstance(of, Run) else of.every_run)
    if newer := [run for run in read if _time(_record(run).get("finished")) > _time(known["end_time"])]:
        return None, f"older than the weights of {newer[0].name}/seed{newer[0].seed}"
    return notebook, ""


def _time(text):
    """Seconds; 0 where a time is not known."""
    return datetime.fromisoformat(text).timestamp() if text else 0


def _record(run):
    try:
        return records.read_json(run.run_folder / "run.json")
    except RecordError:
        return {}


def sections(notebook: NotebookNode) -> list[tuple[str, list[str | NotebookNode]]]:
    """A notebook by its title and its headings `##`: under each its texts, in markdown, and code cells, in order."""
    found = [("", [])]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text, *parts = re.split(r"^##? +(.+)$", cell.source, flags=re.MULTILINE)
            found[-1][1].append(text)
            found += [(heading.strip(), [text]) for heading, text in zip(parts[::2], parts[1::2])]
        elif cell.cell_type == "code":
            found[-1][1].append(cell)
    return found[1:]


def is_finding(heading: str) -> bool:
    """Whether what stands under a heading is what the notebook found."""
    return heading.startswith("Finding")


class _Renderer(IPythonRenderer):
    """nbconvert's, with formulas as pictures: their letters come by no script."""

    def inline_math(self, body):
        buffer, size = io.BytesIO(), 12
        text = FontProperties(size=size, math_fontfamily="stix")
        depth = math_to_image(f"${body}$", buffer, prop=text, dpi=300, format="png")
        height = _picture(buffer.getvalue()).shape[0] * 72 / 300
        style = f"height:{height / size:.2f}em;vertical-align:{-depth / size:.2f}em"
        return f'<img class="formula" style="{style}" alt="{escape(body)}" src="{_data(buffer.getvalue(), "png")}">'


def markdown(source: str) -> str:
    """HTML of a text in markdown; tables scroll within themselves, and HTML in it is text."""
    return _scrolling(MarkdownWithMath(renderer=_Renderer(exclude_anchor_links=True)).render(source))


def _scrolling(html):
    return html.replace("<table", '<div class="scroll" tabindex="0"><table').replace("</table>", "</table></div>")


def _data(content, kind):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _picture(content):
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)


def compressed(png: bytes) -> bytes:
    """A picture as WebP, at quality 85 or, where that is smaller, as it is for lines and type, without loss."""
    picture, form = _picture(png), cv2.IMWRITE_WEBP_QUALITY
    lossy = cv2.imencode(".webp", picture, [form, 85])[1].tobytes()
    if len(png) > 4 * len(lossy):  # a film: without loss it has half of the PNG, and takes seconds
        return lossy
    return min(lossy, cv2.imencode(".webp", picture, [form, 101])[1].tobytes(), key=len)


def described(source: str) -> dict[str, str]:
    """The figures of `lib.figures` that a cell draws: what each shows, the first sentence of its docstring, by name."""
    said = {}
    for name in re.findall(r"\bfigures\.(\w+)\(", source):
        function = getattr(figures, name, None)
        if function and "data_label" in inspect.signature(function).parameters:
            text = re.split(r"\n\n|(?<!sec)\.\s(?=[A-Z`])", inspect.getdoc(function))[0]
            said[name] = text.replace("\n", " ").replace("`", "").rstrip(".") + "."
    return said


def plain(text: str) -> str:
    """The first sentence of a text in markdown, without its marks."""
    return re.split(r"(?<=\.)\s", text)[0].replace("*", "").replace("`", "")


def files_named(source: str, folder: Path) -> list[Path]:
    """Tables and figures of a folder whose names a cell spells out; of an f-string any that fit."""
    texts = (re.sub(r"\{[^}]*\}", "*", text) for text in re.findall(r'"([^"\n]*)"', source))
    names = [name for text in texts if len((name := text.rpartition("/")[2]).replace("*", "")) > 3]
    named = (path for path in results(folder) for name in names if fnmatchcase(path.stem, name) or path.name == name)
    return list(dict.fromkeys(named))


def results(folder: Path) -> list[Path]:
    """The tables (csv, md, tex) and figures (png, pdf) in a study's or run's folder, those of one name together."""
    paths = (path for place in (folder, folder / "tables", folder / "figures") for path in place.glob("*.*"))
    return sorted((path for path in paths if path.suffix in KINDS), key=_place)


def _place(path):
    return path.parent, path.stem, KINDS.index(path.suffix)


class Page:
    """What the page of a study is put together with.

    Parameters
    ----------
    study : lib.params.Study
    films : bool
        Whether films of patients may be seen and named.

    Attributes
    ----------
    pieces : list of (str, str)
        HTML that `fitted` puts in its place, and what stands there instead where there is no room.
    withheld : int
        Figures and tables left out because films of patients are seen or named in them.
    """

    def __init__(self, study: Study, films: bool):
        self.study, self.pieces, self.withheld = study, [], 0
        self.withholds = bool(RELEASES[study.release].lists) and not films

    def piece(self, html: str, instead: str) -> str:
        """The mark of a piece, to stand on the page."""
        self.pieces.append((html, f'<p class="note">Left out for want of room: {instead}</p>'))
        return f"<!--piece {len(self.pieces) - 1}-->"

    def masked(self, text: str) -> str:
        """A text without the folders of absolute paths and, where they are withheld, without names of films."""
        text = FOLDERS.sub("…/", text)
        return FILM_NAME.sub("[a film]", text) if self.withholds else text

    def link(self, path: Path, text: str = "") -> str:
        """A link to a file of the study, relative to the page."""
        target = os.path.relpath(path, self.study.folder).replace(os.sep, "/")
        return f'<a href="{quote(target)}">{escape(text or path.stem)}</a>'

    def links(self, paths: Sequence[Path]) -> str:
        """Links to files, those that differ in the suffix alone together."""
        by_name = groupby(sorted(set(paths), key=_place), key=lambda path: path.with_suffix(""))
        linked = {name: ", ".join(self.link(path, path.suffix[1:]) for path in alike) for name, alike in by_name}
        return "; ".join(f"{escape(name.name)} ({links})" for name, links in linked.items())

    def outputs(self, cell: NotebookNode, about: str, path: Path) -> Iterator[tuple[str, str]]:
        """What a cell shows, as pairs of a kind (picture, table, words) and HTML. `about` : what it is about, in words,
        for those who do not see it."""
        names, seen = set(described(cell.source)), 0
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                seen += 1
                free = not self.withholds or (names and names <= WITHOUT_FILMS)
                put = self.picture if free else self.withhold
                yield "picture", put(f"{about} ({seen})" if seen > 1 else about, path, data["image/png"])
            elif "<table" in (html := data.get("text/html", "")) and not EMBEDDED.search(html):
                html = re.sub(r'<style.*?</style>|border="1"', "", html, flags=re.DOTALL)
                if self.withholds and (ROWS_OF_FILMS.search(html) or FILM_NAME.search(html)):
                    yield "table", self.withhold(f"{about} A table.", path)
                else:
                    yield "table", _scrolling(html) if "<td" in html else "<p>None.</p>"
            elif text := self.masked(data.get("text/markdown", "")).strip():
                html = markdown(text)
                yield "table" if "<table" in html else "words", html
            elif data.keys() == {"text/plain"}:
                yield "words", f"<pre>{escape(self.masked(data['text/plain']))}</pre>"

    def picture(self, alt: str, path: Path, png: str) -> str:
        """A picture, compressed; a note where there is no room for it."""
        shown = f'<img alt="{escape(alt)}" src="{_data(compressed(base64.b64decode(png)), "webp")}">'
        return self.piece(shown, f"{escape(alt)} See {self.link(path)}.")

    def withhold(self, what: str, path: Path, _png: str = "") -> str:
        """A note in the place of what shows or names films of patients."""
        self.withheld += 1
        return f'<p class="note">Left out, for films of patients are in it: {escape(what)} See {self.link(path)}.</p>'

    def section(self, heading: str, cells: list[str | NotebookNode], path: Path) -> str:
        """What a section of a notebook shows, in its order: words, and figures and tables under their text, before
        their files. Empty where it shows nothing."""
        html, text, files, last = [], [], set(), ""
        for cell in cells:
            if isinstance(cell, str):
                text, last = text + [markdown(cell)] * bool(cell.strip()), cell.strip() or last
                continue
            said = list(described(cell.source).values())
            about = f"{heading.rstrip('?')}. {' '.join(said) or plain(last)}"
            files |= {*files_named(cell.source, path.parent), *printed_in(cell, path.parent)}
            outputs = list(self.outputs(cell, about, path))
            mixed = {"picture", "table"} <= {kind for kind, _ in outputs}
            for kind, shown in groupby(outputs, key=lambda pair: pair[0]):
                bodies = "".join(body for _, body in shown)
                if kind == "words":
                    html += [*text, bodies]
                else:
                    own = {one for one in files if not mixed or (one.suffix in PICTURES) == (kind == "picture")}
                    caption = "".join(text or [f"<p>{escape(one)}</p>" for one in said if kind == "picture"])
                    head = f"<figcaption>{caption}</figcaption>" * bool(caption)
                    foot = f'<p class="files">{self.links(own)}</p>' if own else ""
                    html.append(f"<figure>{head}{bodies}{foot}</figure>")
                    files -= own
                text = []
        return "".join(html + text) if html else ""

    def words(self, one: Executed) -> str:
        """The sentences that a notebook found."""
        cells = (cell for heading, cells in sections(one.notebook) if is_finding(heading) for cell in cells)
        outputs = (output.get("data", {}) for cell in cells if not isinstance(cell, str) for output in cell.outputs)
        return "".join(markdown(self.masked(data["text/markdown"])) for data in outputs if "text/markdown" in data)


def printed_in(cell: NotebookNode, folder: Path) -> list[Path]:
    """The files of tables that a cell shows word for word as their md has them."""
    shown = {output.get("data", {}).get("text/markdown", "").strip() for output in cell.outputs} - {""}
    every = results(folder) if shown else []
    stems = [path.stem for path in every if path.suffix == ".md" and path.read_text(encoding="utf-8").strip() in shown]
    return [path for path in every if path.stem in stems]


def fitted(text: str, pieces: Sequence[tuple[str, str]]) -> tuple[str, int]:
    """The page with its pieces in their places, from the last on with what stands there instead until it has at most
    `LIMIT` bytes, and how many were left out."""
    chosen, left_out = [html for html, _ in pieces], 0
    size = len(text.encode()) + sum(len(html.encode()) for html in chosen)
    for place in reversed(range(len(pieces))):
        if size > LIMIT - 1000:  # the note that says how many were left out comes on top
            size += len(pieces[place][1].encode()) - len(chosen[place].encode())
            chosen[place], left_out = pieces[place][1], left_out + 1
    return re.sub(r"<!--piece (\d+)-->", lambda mark: chosen[int(mark[1])], text), left_out


def report(study: Study, films: bool = False) -> tuple[str, list[Executed]]:
    """The page of a study, and those of its notebooks that are not as they should be.

    Parameters
    ----------
    study : lib.params.Study
    films : bool
        Whether the page of a study on patients may show and name their films.
    """
    page, every = Page(study, films), executed(study)
    whole, faulty = [one for one in every if not one.fault], [one for one in every if one.fault]
    often = Counter(one.run for one in whole if one.run).most_common(1)
    typical = often[0][0] if often else ""
    shown = {}  # of each notebook that of the typical run, or of the first run that has it
    for one in whole:
        if one.rule not in shown or one.run == typical:
            shown[one.rule] = one
    body = f'<h2 id="findings">{PARTS["findings"]}</h2>{_choice(typical, every)}'
    for rule, one in shown.items():
        body += _head(page, one, f"finding-{rule}")
        for heading, cells in sections(one.notebook):
            body += page.section(heading, cells, one.path) if is_finding(heading) else ""
        body += _folded(page, [other for other in whole if other.rule == rule and other is not one])
    body += f'<h2 id="details">{PARTS["details"]}</h2>'
    for rule, one in shown.items():
        body += _head(page, one, rule)
        for place, (heading, cells) in enumerate(sections(one.notebook)):
            if not is_finding(heading) and (html := page.section(heading, cells, one.path)):
                body += f"<h4>{escape(heading)}</h4>{html}" if place else html
    body += f'<h2 id="files">{PARTS["files"]}</h2>{"".join(_files(page, every))}'
    body += f'<h2 id="provenance">{PARTS["provenance"]}</h2>{"".join(_provenance(page))}'
    text, left_out = fitted(_whole(page, faulty, shown, body), page.pieces)
    said = f"{left_out} figures or parts were left out to keep below {LIMIT / 1e6:.0f} MB. " * bool(left_out)
    said += f"{page.withheld} figures and tables with films of patients were left out. " * bool(page.withheld)
    note = f'<p class="note">{said}Each is named in its place.</p>' * bool(said)
    return text.replace("<!--left out-->", note), faulty


def write(study: Study, films: bool = False) -> tuple[Path, list[Executed]]:
    """Write the page of a study into its folder, atomically; arguments and notebooks as in `report`.

    Raises
    ------
    ParameterError
        The study has no results at all.
    """
    if not study.folder.is_dir():
        raise ParameterError(f"{study.folder} holds no results: run make study STUDY={study.study} first")
    text, faulty = report(study, films)
    records.write_text(text, study.folder / "report.html")
    return study.folder / "report.html", faulty


def _whole(page, faulty, shown, body):
    title = f"Study {page.study.study}{' (not finished)' * bool(faulty)}"
    entries = []
    for rule, one in shown.items():
        name, number = escape(sections(one.notebook)[0][0]), one.path.stem[:2]
        links = f'<a href="#finding-{rule}">finding</a>, <a href="#{rule}">figures and tables</a>'
        entries.append(f"<li>{number} {name}: {links}</li>")
    parts = " · ".join(f'<a href="#{key}">{name}</a>' for key, name in PARTS.items())
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{SAFE}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}</style></head><body><header><h1>{title}</h1>{_warning(page, faulty)}
<p>{escape(page.study.data_label)}. Every sentence, number and picture comes from the executed notebooks.</p>
<!--left out--></header>
<nav aria-label="Contents"><p>{parts}</p><ul>{"".join(entries)}</ul></nav><main>{body}</main></body></html>
"""


def _warning(page, faulty):
    """What is missing, by what is wrong with it and then by runs."""
    runs, notebooks = {}, {}
    for one in faulty:
        runs.setdefault((one.fault, one.rule), []).append(one.run)
    for (fault, rule), of in runs.items():
        notebooks.setdefault((fault, ", ".join(filter(None, of))), []).append(NOTEBOOKS[rule])
    if not faulty:
        return ""
    lines = (
        f"<li><b>{', '.join(sorted(names))}</b>: {escape(page.masked(fault))}{f' ({escape(of)})' if of else ''}</li>"
        for (fault, of), names in notebooks.items()
    )
    return (
        f'<div class="unfinished" role="alert"><p><b>This study is not finished.</b> {len(faulty)} of its executed '
        f"notebooks are missing or do not count; what is below is without them.</p><ul>{''.join(lines)}</ul></div>"
    )


def _choice(typical, every):
    if len({one.run for one in every if one.run}) < 2:
        return ""
    return (
        f"<p>Of single runs one is shown, {escape(typical)}, which has most notebooks; what it lacks is of the first "
        "that has it. What the others found is folded beneath; their notebooks are "
        '<a href="#files">linked</a>.</p>'
    )


def _head(page, one, anchor):
    title = sections(one.notebook)[0][0]
    name = escape(f"{title} ({one.run})" if one.run else title)
    when = one.notebook.metadata["papermill"]["end_time"][:16].replace("T", " ")
    return f'<h3 id="{anchor}">{name}</h3><p class="meta">{page.link(one.path)}, executed {when} UTC</p>'


def _folded(page, others):
    if not others:
        return ""
    told = "".join(f"<h4>{escape(one.run)}</h4>{page.words(one)}" for one in others)
    html = f"<details><summary>The same of {len(others)} other run{'s' * (len(others) > 1)}</summary>{told}</details>"
    return page.piece(html, "what other runs found.")


def _files(page, every):
    rows, there = {}, page.study.folder
    for folder in ("tables", "figures"):
        if linked := page.links(results(there / folder)).replace("; ", "</li><li>"):
            yield f"<h3>{folder.capitalize()} of the study</h3><ul><li>{linked}</li></ul>"
    for one in every:
        name = page.link(one.path, NOTEBOOKS[one.rule]) if one.path.is_file() else NOTEBOOKS[one.rule]
        fault = f' <span class="bad">({escape(page.masked(one.fault))})</span>' if one.fault else ""
        rows.setdefault(one.run or "the study", {})[NOTEBOOKS[one.rule]] = f"{name}{fault}"
    rows = {run: ", ".join(names[name] for name in sorted(names)) for run, names in rows.items()}
    yield f"<h3>Executed notebooks</h3>{_table(rows)}"
    pages = [there / "explore.html", *(there.parent / name / "report.html" for name in page.study.companions)]
    linked = [page.link(path, f"{path.parent.name}/{path.name}") for path in pages if path.is_file()]
    yield f"<h3>Other pages</h3><p>{', '.join(linked)}</p>" if linked else ""


def _provenance(page):
    study, plan, fields = page.study, load_plan(), Study.model_fields
    made = {f"{run.name}/seed{run.seed}": _record(run) for run in study.every_run}
    made = {name: record for name, record in made.items() if record}
    first, said = next(iter(made.values()), {}), {}
    for key, value in study.model_dump().items():
        if value != fields[key].default and key != "data_root":
            said[key] = ", ".join(map(str, value)) if isinstance(value, list) else value
    facts = {
        "data": study.data_label,
        "films": ", ".join(f"{count} {split}" for split, count in first.get("films", {}).items()),
        "fingerprint of the films": first.get("identity", {}).get("films", ""),
        "parameters other than by default": "; ".join(f"{key}: {value}" for key, value in said.items()),
        "plan of claims": f"{plan.digest} of {plan.written}",
        "versions": ", ".join(f"{name} {number}" for name, number in first.get("versions", {}).items()),
    }
    for key in ("commit", "device", "python", "plan"):
        counts = Counter(str(record.get(key, "unknown")) for record in made.values())
        facts[f"{key}, when training began"] = "; ".join(f"{value} ({count})" for value, count in counts.items())
    yield _table({key: escape(page.masked(str(value))) for key, value in facts.items() if value})
    columns = {"started": "training started, UTC", "train_seconds": "seconds", "best_epoch": "best epoch"}
    columns |= {"best_val_auroc": "validation AUROC", "status": "status"}
    rows = [{name: record.get(key, "") for key, name in columns.items()} for record in made.values()]
    if rows:
        frame = pd.DataFrame(rows, index=pd.Index(made, name="run")).round(3).reset_index()
        frame[columns["started"]] = [text[:16].replace("T", " ") for text in frame[columns["started"]]]
        yield f"<h3>Runs</h3>{_scrolling(frame.to_html(index=False, border=0, classes='runs'))}"


def _table(rows):
    """Of each row its name and its HTML."""
    return _scrolling(
        f"<table>{''.join(f'<tr><th>{escape(key)}</th><td>{html}</td></tr>' for key, html in rows.items())}</table>"
    )


def main(words: Sequence[str]) -> None:
    """Write a study's report and print where; SystemExit where it cannot be."""
    parser = argparse.ArgumentParser(prog="python -m lib.report", description="One page of a study, to hand on.")
    parser.add_argument("study", help="a file of params/studies without .yaml")
    parser.add_argument("--films", action="store_true", help="show and name films of patients, too")
    given = parser.parse_args(words)
    try:
        # No film of the release is read, so none need be there.
        path, faulty = write(load_study(given.study, **told(os.environ)[1] | {"data_root": "."}), given.films)
    except (ParameterError, RecordError) as error:
        sys.exit(str(error))
    print(path)
    if faulty:
        print(f"{len(faulty)} notebooks are missing or do not count; the page names them", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
