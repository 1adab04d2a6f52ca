"""The workflow for real, in a copy of the project: interrupted, finished, repeated, and stopped by bad input."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

from lib import records
from lib.data import RELEASES
from lib.params import ROOT, Run
from lib.preflight import check_before_work
from lib.workflow import ITS_ERROR

RUNS = ("multilabel-tdensenet-focal", "binary-tdensenet-bce")
DIGITS = ("digits-small_cnn-bce", "digits-small_transformer-bce")
LENSES = ("01_train", "02_metrics", "03_cam_alignment", "04_dissection")
PROJECT = ("lib", "notebooks", "params", "Snakefile", "Makefile", "pyproject.toml", "requirements.lock")
OF_A_RUN = {
    "model.safetensors",
    "model_last.safetensors",
    "run.json",
    "training.csv",
    "predictions.parquet",
    "metrics.csv",
    "cam_alignment.parquet",
    "concepts.parquet",
}
OF_METRICS = {
    "class",
    "n_positive",
    "n_negative",
    "prevalence",
    "auroc",
    "auroc_ci_low",
    "auroc_ci_high",
    "ap",
    "ap_ci_low",
    "ap_ci_high",
    "mean_probability",
    "mean_probability_ci_low",
    "mean_probability_ci_high",
    "brier",
    "ece",
}
OF_ALIGNMENT = {"image", "patient", "class", "n_boxes", "box_area", "cam_mass", "iobb", "ior", "iou", "logit"}
TABLES = {f"{name}.{suffix}" for name in ("table1_alignment", "table2_concepts") for suffix in ("csv", "md", "tex")}
FIGURES = {
    f"{name}.{suffix}"
    for name in ("fig1a_cams_multilabel", "fig1b_cams_binary", "fig2_performance")
    for suffix in ("png", "pdf")
}

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of what the study needs, with parameter files of its own."""
    folder = tmp_path_factory.mktemp("project")
    for name in PROJECT:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    program(folder / ".venv/bin/snakemake", f'exec "${{SNAKEMAKE:-{shutil.which("snakemake")}}}" "$@" $ADDED')
    (folder / "films").mkdir()
    for release in ("nih", "rsna"):
        (folder / "films" / RELEASES[release].lists[0].replace("*", "")).write_text("no list of films\n")
    studies = folder / "params" / "studies"
    (studies / "no_films.yaml").write_text(
        "study: no_films\nrelease: nih\ndata_root: /there/is/no/such/folder\ninit: scratch\n"
    )
    (studies / "misspelt.yaml").write_text("study: misspelt\nlearningrate: 0.1\n")
    (studies / "with_chexnet.yaml").write_text(
        "study: with_chexnet\nrelease: nih\nruns: [binary-tdensenet-bce]\ncomparison: false\nchexnet: Makefile\n"
    )
    return folder


def program(path, script):
    """A shell script that can be called; the project's own snakemake is one, which may add to what make says, `ADDED`,
    or call another program in its stead, `SNAKEMAKE`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def environment(**changes):
    """As from a shell in which the environment is activated; without `OUTPUTS`, results go to the project's own
    folder, and `lib` is the project's."""
    left_out = ("OUTPUTS", "PYTHONPATH", "PYTEST", "MAKE", "STUDY", "DATA_ROOT", "RUNS", "JOBS", "GPUS", "PROFILE")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return kept | {"PATH": path, "PYTHONDONTWRITEBYTECODE": "1"} | changes


def start(project, *arguments, **changes):
    """`make study` as a user calls it, but for the set-up of the environment."""
    command = ["make", "--no-print-directory", "--old-file=setup", "study", "JOBS=2", *arguments]
    return subprocess.Popen(
        command,
        cwd=project,
        env=environment(**changes),
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def make_study(project, *arguments, **changes):
    process = start(project, *arguments, **changes)
    try:
        said, _ = process.communicate(timeout=1200)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


def output(command, cwd, **changes):
    """What a command says, on both channels; it must end well."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=cwd, env=environment(**changes), check=False, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


def dry_run(project, *arguments, **changes):
    """Counts of the jobs that `make study` would run."""
    status, said = make_study(project, *arguments, ADDED="--dry-run --quiet rules", **changes)
    assert status == 0 and "Exception" not in said, said
    rows = [line.split() for line in said.splitlines()]
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}


# ---- one study, from nothing to its tables


@pytest.fixture(scope="module")
def study(project):
    """Folder of the smoke study, killed in the middle of training and called again; and what the second call said."""
    process = start(project, "STUDY=smoke")
    folder, deadline = project / "outputs" / "smoke", time.monotonic() + 400
    while not list(folder.glob("*/seed0/state/epoch-*.pt")):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (folder / "tables" / "table1_alignment.csv").exists()
    status, said = make_study(project, "STUDY=smoke")
    assert status == 0, said
    return folder, said


def test_every_promised_name_is_on_disk(study):
    folder, _ = study
    for name in RUNS:
        run = folder / name / "seed0"
        assert {path.name for path in run.iterdir()} >= OF_A_RUN | {f"{lens}.ipynb" for lens in LENSES}
        record = records.read_json(run / "run.json")
        assert record["status"] == "finished" and record["run"] == name
        assert len(pd.read_csv(run / "training.csv")) == record["parameters"]["epochs"] == 2
        weights = load_file(run / "model.safetensors")
        assert weights["head.weight"].shape == (len(record["classes"]), 512) and all(
            tensor.isfinite().all() for tensor in weights.values()
        )
    assert {path.name for path in (folder / "tables").iterdir()} >= TABLES
    assert {path.name for path in (folder / "figures").iterdir()} >= FIGURES
    assert (folder / "explore.html").is_file() and not (folder.parent / "smoke_digits" / "explore.html").exists()
    assert all((folder.parent / name / "report.html").is_file() for name in ("smoke", "smoke_rsna", "smoke_digits"))
    assert all(
        path.stat().st_size > 0 for path in folder.rglob("*") if path.is_file() and not path.name.endswith("lock")
    )
    assert not [path for path in folder.rglob(".*") if not path.name.endswith(".lock")], "half-written files"


def test_records_have_the_promised_columns(study):
    folder, _ = study
    films = records.read_table(folder / "tables" / "films.csv").set_index("split")["films"]
    for name, n_classes in zip(RUNS, (15, 1), strict=True):
        run = folder / name / "seed0"
        predictions = records.read_table(run / "predictions.parquet")
        assert list(predictions) == ["image", "patient", "class", "target", "logit"]
        assert len(predictions) == n_classes * films["test"] and np.isfinite(predictions["logit"]).all()
        metrics = records.read_table(run / "metrics.csv")
        assert set(metrics) >= OF_METRICS
        assert metrics["class"].nunique() == len(metrics) and "Average" in set(metrics["class"])
        assert set(records.read_table(run / "cam_alignment.parquet")) >= OF_ALIGNMENT
        assert set(records.read_table(run / "concepts.parquet")) >= {"image", "patient", "disjoint", "unique"}
    run = folder / RUNS[0] / "seed0"
    attribution = records.read_table(run / "attribution.parquet")
    assert set(attribution) >= {
        "image",
        "patient",
        "class",
        "method",
        "threshold",
        "iou_lesion",
        "iou_background",
        "mean_iou",
    }
    assert set(attribution["method"]) == {"cam", "lrp", "rap"} and attribution["iou_lesion"].between(0, 1).all()
    importance = records.read_table(run / "importance.parquet")
    assert (
        set(importance) >= {"class", "feature", "method", "train", "test"}
        and len(importance) == 15 * 512 * importance["method"].nunique()
    )
    for name in DIGITS:
        consistency = records.read_table(folder.parent / "smoke_digits" / name / "seed0" / "li_table1.csv")
        assert set(consistency["method"]) == {
            "grad",
            "hires",
            "gradpp",
            "xgrad",
            "cam",
            "layer",
            "score",
            "smooth_gradpp",
            "ss",
            "is",
        }
    shares = records.read_table(folder.parent / "smoke_rsna" / "tables" / "intention.csv")
    assert set(shares) >= {"model", "kind", "method", "region", "value", "area", "gain"}


def test_the_papers_tables_are_on_disk(study):
    run = study[0] / RUNS[0] / "seed0"
    for name in ("table2_mean_iou", "table2_iou_lesion", "li_table1", "li_table2", "li_table3", "li_table4"):
        assert "paper" in (run / f"{name}.md").read_text() and (run / f"{name}.tex").stat().st_size
    for name in (
        "fig_heatmaps",
        "fig_iou_lesion_by_threshold",
        "fig6_methods",
        "fig8_scaled_cams",
        "fig9_consistency",
        "fig10_selection",
        "fig11_importance_all",
        "fig11_importance_own",
    ):
        assert (run / f"{name}.png").stat().st_size and (run / f"{name}.pdf").stat().st_size


def test_executed_notebooks_are_whole_and_free_of_errors(study):
    folder, _ = study
    notebooks = [folder / run / "seed0" / f"{lens}.ipynb" for run in RUNS for lens in LENSES]
    notebooks += [folder / RUNS[0] / "seed0" / f"{lens}.ipynb" for lens in ("06_attribution", "07_feature_analysis")]
    notebooks.append(folder / RUNS[1] / "seed0" / "07_feature_analysis.ipynb")
    notebooks += [folder / "00_data.ipynb", folder / "05_figures.ipynb"]
    notebooks += [folder.parent / "smoke_rsna" / f"{name}.ipynb" for name in ("00_data", "08_intention")]
    digits = folder.parent / "smoke_digits"
    notebooks += [digits / "00_data.ipynb", *(digits / run / "seed0" / "07_feature_analysis.ipynb" for run in DIGITS)]
    for path in notebooks:
        notebook = nbformat.read(path, as_version=4)
        assert notebook.metadata.papermill.exception is None, path
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert all(cell.metadata.papermill.status == "completed" for cell in code), path
        assert not [output for cell in code for output in cell.outputs if output.output_type == "error"], path


def test_progress_is_visible(study):
    _, said = study
    steps = re.findall(r"(\d+) of (\d+) steps", said)
    assert [int(done) for done, _ in steps] == list(range(1, len(steps) + 1)) and {
        int(total) for _, total in steps
    } == {len(steps)}
    assert 14 < len(steps) < 25  # the killed call had finished some
    assert "100%" in said and "(100%) done" in said
    assert "epoch 2/2" in said and "validation AUROC" in said or "already trained" in said
    assert "binary-tdensenet-bce seed 0: run 2 of 2 of study smoke, 2 epochs on " in said
    pages = ("report.html", "explore.html", "figures/fig1a_cams_multilabel.png", "05_figures.ipynb")
    assert said.splitlines()[-1] == f"Open {', '.join(f'outputs/smoke/{page}' for page in pages)}"


def test_a_second_call_does_nothing(study, project):
    folder, _ = study
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    status, said = make_study(project, "STUDY=smoke")
    assert status == 0 and "Nothing to be done" in said
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_lost_file_is_made_again_whatever_follows_from_it(study, project, tmp_path):
    """A notebook that fails takes its earlier results along, though what was made of them is still there."""
    folder, _ = study
    run = f"{RUNS[0]}/seed0"
    for file in (f"{run}/metrics.csv", f"{run}/training.csv", "tables/films.csv", "figures/fig2_performance.pdf"):
        path = tmp_path / Path(file).name
        shutil.move(folder / file, path)
        jobs = dry_run(project, "STUDY=smoke")
        shutil.move(path, folder / file)
        assert jobs, f"{file}: nothing to be done"
    assert dry_run(project, "STUDY=smoke") == {}


def test_a_table_dated_in_the_future_starts_nothing_anew(study, project):
    """What is in it decides: a clock that runs ahead changes nothing."""
    table = study[0] / "tables" / "films.csv"
    was = table.stat()
    os.utime(table, ns=(was.st_atime_ns, was.st_mtime_ns + 365 * 86400 * 10**9))
    jobs = dry_run(project, "STUDY=smoke")
    os.utime(table, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert jobs == {}


def test_a_changed_module_is_looked_at_again_but_not_trained_again(study, project):
    lenses = {"metrics", "cam_alignment", "dissection", "attribution", "features", "intention", "figures"}
    for path, rules in {
        "analysis/relevance/steps.py": lenses | {"explore", "report"},
        "explorer/page.html": {"explore", "report"},
        "report.py": {"report"},
        "workflow.py": set(),
    }.items():
        module = project / "lib" / path
        text = module.read_text()
        module.write_text(f"{text}# changed\n")
        jobs = dry_run(project, "STUDY=smoke")
        module.write_text(text)
        assert jobs.keys() - {"all", "total"} == rules, path


def test_a_finished_run_keeps_no_state_and_is_not_trained_again(study, project):
    """Snakemake removes what is declared, the record, before it runs the job again that makes it."""
    folder, _ = study
    run = folder / RUNS[1] / "seed0"
    assert not list(folder.parent.glob("*/*/seed*/state/*.pt"))
    weights = (run / "model.safetensors").read_bytes()
    (project / "params" / "runs" / f"{RUNS[1]}.yaml").open("a").write("# changed\n")
    this_alone = f"-- {(run / 'run.json').relative_to(project)}"
    status, said = make_study(project, "STUDY=smoke", ADDED=this_alone)
    assert status == 0 and f"{RUNS[1]} seed 0: already trained, 2 epochs" in said and "epoch 1/2" not in said, said
    assert (run / "model.safetensors").read_bytes() == weights
    assert records.read_json(run / "run.json")["status"] == "finished"


def test_a_study_that_runs_already_is_said(project):
    (project / "outputs").mkdir(exist_ok=True)
    with open(project / "outputs" / ".smoke.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        status, said = make_study(project, "STUDY=smoke")
    assert status != 0 and "being run already" in said and "Building DAG" not in said


# ---- what stops it


def test_a_mistyped_folder_of_films_is_the_last_thing_said_and_soon(project, tmp_path):
    status, said = make_study(project, "STUDY=no_films", OUTPUTS=str(tmp_path / "none"))
    sentence, makes_own = said.splitlines()
    assert status != 0 and makes_own.startswith("make: ***")
    assert (
        "no_films" in sentence and "/there/is/no/such/folder is not a folder" in sentence and "DATA_ROOT=" in sentence
    )
    assert not (tmp_path / "none").exists()


def test_a_failing_notebook_is_kept_and_nothing_is_published(project, tmp_path):
    status, said = make_study(project, "STUDY=no_films", "DATA_ROOT=films", OUTPUTS=str(tmp_path))
    kept, films = tmp_path / "no_films" / "00_data.ipynb", project / "films" / "Data_Entry_2017.csv"
    assert "Traceback" not in said and f"The notebook, as far as it came: {kept}\n" in said, said
    notebook = nbformat.read(kept, as_version=4)
    assert notebook.metadata.papermill.exception is True
    (error,) = [out for cell in notebook.cells for out in cell.get("outputs", []) if out.output_type == "error"]
    assert str(films) in error.evalue and error.traceback == [error.evalue]  # its sentence alone
    assert status != 0 and said.count(error.evalue) == 1, said
    assert [path.name for path in (tmp_path / "no_films").rglob("*") if path.is_file()] == ["00_data.ipynb"]


PAPERMILLS_OWN = """Traceback (most recent call last):
  File "papermill", line 8, in <module>
    sys.exit(papermill())
papermill.exceptions.PapermillExecutionError:
"""
UNEXPECTED = """ZeroDivisionError                         Traceback (most recent call last)
Cell In[1], line 1
----> 1 1 / 0
Traceback (most recent call last):
ZeroDivisionError: division by zero
"""
KERNEL_DIED = """Traceback (most recent call last):
  File "papermill", line 8, in <module>
nbclient.exceptions.DeadKernelError: Kernel died
"""
SEE = "The notebook, as far as it came: some\\n/00.ipynb\n"


@pytest.mark.parametrize(
    "written, shown",
    [
        ("a warning\n\nanother\n", "a warning\nanother\n"),
        (f'{PAPERMILLS_OWN}---\nException encountered at "In [1]":\nno such folder\n\n', f"no such folder\n{SEE}"),
        (f'w\n{PAPERMILLS_OWN}---\nException encountered at "In [1]":\n{UNEXPECTED}', f"w\n{UNEXPECTED}{SEE}"),
        (KERNEL_DIED, KERNEL_DIED),
    ],
    ids=["no error", "expected", "unexpected", "papermill's"],
)
def test_of_a_failed_notebook_its_own_error_is_shown(written, shown):
    options = {"env": {**os.environ, "notebook": r"some\n/00.ipynb"}, "capture_output": True, "text": True}
    assert subprocess.run(["awk", ITS_ERROR], input=written, check=True, **options).stdout == shown


@pytest.mark.parametrize(
    "keys, fault",
    [
        ({"backbone": "resnet5O"}, "resnet5O.*resnet50"),
        ({"cam_layer": "trunk.layer9"}, "tdensenet has no module trunk.layer9"),
        ({"init": "/no/weights.pth"}, "/no/weights.pth"),
        ({"chexnet": "/no/checkpoint"}, "chexnet: there is no file /no/checkpoint"),
    ],
    ids=str,
)
def test_a_wrong_model_stops_before_any_work(keys, fault):
    run = Run.build({"init": "scratch", **keys})
    study = SimpleNamespace(chexnet_files=run.chexnet_files, chexnet=run.chexnet, every_run=[run])
    with pytest.raises((ValueError, RuntimeError), match=fault):
        check_before_work([study])


def test_a_misspelt_parameter_stops_before_any_work(project, tmp_path):
    status, said = make_study(project, "STUDY=misspelt", OUTPUTS=str(tmp_path))
    assert (
        status != 0
        and "params/studies/misspelt.yaml: learningrate: no such parameter; did you mean learning_rate?" in said
    )
    assert "Building DAG" not in said and "Traceback" not in said and not (tmp_path / "misspelt").exists()


def test_imagenet_weights_that_cannot_be_had_stop_before_any_work(project, small_phantom, tmp_path):
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    changes = nowhere | {"TORCH_HOME": str(tmp_path / "cache"), "OUTPUTS": str(tmp_path / "outputs"), "no_proxy": ""}
    arguments = ("STUDY=nih", f"DATA_ROOT={small_phantom}", "RUNS=binary-resnet50-bce")
    status, said = make_study(project, *arguments, **changes)
    assert status != 0 and "ImageNet weights of resnet50 could not be downloaded" in said
    assert "local file" in said and "init: scratch" in said
    assert not (tmp_path / "outputs" / "nih").exists()
    assert dry_run(project, *arguments, **changes)["train"] == 1  # looking costs no download


# ---- the graph


def test_a_list_of_films_that_was_copied_again_starts_nothing_anew(project, tmp_path):
    """Its bytes decide, though it is longer than Snakemake compares by itself, and newer than what was made of it."""
    films, outputs = tmp_path / "films", tmp_path / "outputs"
    shutil.copytree(project / "films", films)
    the_list = films / "Data_Entry_2017.csv"
    the_list.write_text("a film\n" * 200_000)
    program(
        tmp_path / "bin" / "papermill", 'touch "$(dirname "$2")"/tables/films.csv "$(dirname "$2")"/tables/problems.csv'
    )
    changes = {"PATH": f"{tmp_path / 'bin'}:{environment()['PATH']}"}
    arguments = ("STUDY=nih_sample", f"DATA_ROOT={films}", f"OUTPUTS={outputs}")
    changes["ADDED"] = f"-- {outputs}/nih_sample/tables/films.csv"
    status, said = make_study(project, *arguments, **changes)
    assert status == 0 and "Nothing to be done" not in said, said
    for text, nothing in (("a film\n", True), ("b film\n", False)):
        the_list.write_text(text * 200_000)
        status, said = make_study(project, *arguments, **changes)
        assert status == 0 and ("Nothing to be done" in said) == nothing, said


OF_ALL = {"data": 1, "train": 16, "metrics": 16, "cam_alignment": 16, "dissection": 16, "figures": 1, "explore": 1}
OF_ALL |= {"report": 1, "all": 1}
# Of the demo besides: two pretexts, from which its backbones start, and its companions: pneumonia (3 runs), the
# confounder (1), digits (2).
OF_DEMO = {
    **OF_ALL,
    "pretext": 2,
    "data": 4,
    "train": 22,
    "attribution": 2,
    "features": 7,
    "intention": 1,
    "trunk_and_head": 1,
    "report": 4,
}


@pytest.mark.parametrize(
    "study, arguments, expected",
    [
        ("demo", [], OF_DEMO),
        ("nih_sample", ["DATA_ROOT=films"], {**OF_ALL, "attribution": 3, "features": 2}),
        ("nih", ["DATA_ROOT=films", "PROFILE=slurm"], {**OF_ALL, "attribution": 4, "features": 4, "trunk_and_head": 4}),
        (
            "nih_sample",
            ["DATA_ROOT=films", f"RUNS={' '.join(RUNS)}"],
            {
                "data": 1,
                "train": 2,
                "metrics": 2,
                "cam_alignment": 2,
                "dissection": 2,
                "figures": 1,
                "attribution": 1,
                "features": 1,
                "explore": 1,
                "report": 1,
                "all": 1,
            },
        ),
        ("rsna", ["DATA_ROOT=films"], {"data": 1, "train": 3, "intention": 1, "report": 1, "all": 1}),
        ("with_chexnet", ["DATA_ROOT=films"], {"data": 1, "chexnet": 1, "report": 1, "all": 1}),
    ],
)
def test_a_study_is_its_runs_and_their_notebooks(project, study, arguments, expected, tmp_path):
    jobs = dry_run(project, f"STUDY={study}", *arguments, OUTPUTS=str(tmp_path))
    assert jobs.pop("total") == sum(jobs.values())
    assert jobs == expected


# What the notebooks write that rules declare, as a stand-in for papermill touches it.
WRITTEN = {
    "00": "tables/films.csv tables/problems.csv",
    "01": "run.json training.csv model.safetensors",
    "02": "predictions.parquet metrics.csv",
    "03": "cam_alignment.parquet cam_alignment_untrained.parquet fig_cams.png",
    "04": "concepts.parquet concepts_untrained.parquet concepts_other_film.parquet",
}


@pytest.fixture
def executed(project, tmp_path):
    """A function of make's arguments that says what a stand-in for papermill executed, one after another, and what make
    said."""
    cases = "".join(f'{number}*) cd "$folder"; touch {names};;' for number, names in WRITTEN.items())
    script = 'folder=$(dirname "$2"); mkdir -p "$folder/tables"; echo "executed: $2"; touch "$2"; '
    program(tmp_path / "bin" / "papermill", f'{script} case $(basename "$2") in {cases} esac')

    def call(*arguments, target="study", **changes):
        command = ["make", "--no-print-directory", "--old-file=setup", target, "JOBS=1", *arguments]
        path = f"{tmp_path / 'bin'}:{environment()['PATH']}"
        said = output(command, project, PATH=path, OUTPUTS=str(tmp_path / "results"), **changes)
        return re.findall(rf"^executed: {tmp_path / 'results'}/(\S+)$", said, re.MULTILINE), said

    return call


def test_make_first_is_one_run_from_which_the_demo_carries_on(executed, project, tmp_path):
    done, said = executed(target="first")
    run = "demo/multilabel-tdensenet-focal/seed0"
    before = {"demo/00_data.ipynb", "pretext_66px/multilabel-tdensenet-bce/seed0/01_train.ipynb"}
    assert set(done[:2]) == before and done[2] == f"{run}/01_train.ipynb"
    assert set(done[3:]) == {f"{run}/{lens}.ipynb" for lens in LENSES[1:]}
    shown = [
        os.path.relpath(tmp_path / "results" / run / name, project) for name in ("fig_cams.png", f"{LENSES[2]}.ipynb")
    ]
    assert said.splitlines()[-1] == f"Open {', '.join(shown)}"
    left = dry_run(project, "STUDY=demo", OUTPUTS=str(tmp_path / "results"))
    once = dict.fromkeys(("data", "pretext", "train", "metrics", "cam_alignment", "dissection"), 1)
    assert left.pop("total") == sum(left.values())
    assert left == {rule: n - once.get(rule, 0) for rule, n in OF_DEMO.items()}


def test_the_first_pictures_come_before_further_runs(executed):
    only = "--omit-from figures attribution features"
    done, _ = executed("STUDY=demo", f"RUNS={' '.join(['binary-tdensenet-bce', RUNS[0]])}", ADDED=only)
    assert len(done) == 10 and {path.split("/")[1] for path in done[2:6]} == {RUNS[0]}


def test_make_makes_the_environment_first(project):
    made = output(["make", "-n", "demo"], project)
    assert "--require-hashes -r requirements.lock" in made
    assert "cp params/profiles/ipython_kernel_config.py .venv/etc/ipython/" in made


TOLD = ("STUDY", "DATA_ROOT", "RUNS", "OUTPUTS")


@pytest.fixture
def passed_on(project, tmp_path):
    """A function of make's arguments: (words after `snakemake`, variables of its environment, what was said)."""
    shown = tmp_path / "shown"
    names = " ".join(f'"${name}"' for name in TOLD)
    stand_in = program(tmp_path / "snakemake", f"printf '%s\\0' {names} \"$@\" > '{shown}'")

    def call(*arguments, target="study", status=0, **changes):
        shown.unlink(missing_ok=True)
        command = ["make", "--no-print-directory", "--old-file=setup", target, *arguments]
        options = {"env": environment(SNAKEMAKE=str(stand_in), **changes), "capture_output": True, "text": True}
        done = subprocess.run(command, cwd=project, check=False, timeout=60, **options)
        assert (done.returncode == 0) == (status == 0), done
        given = shown.read_text().split("\0")[:-1] if shown.exists() else None
        variables = given and dict(zip(TOLD, given, strict=False))
        return given and given[len(TOLD) :], variables, done.stderr

    return call


def test_make_passes_on_what_it_is_given(passed_on):
    words, told, _ = passed_on("GPUS=0", target="demo")
    assert told == {"STUDY": "demo", "DATA_ROOT": "", "RUNS": "", "OUTPUTS": ""} and "--resources" not in words
    words, told, _ = passed_on("STUDY=nih", "DATA_ROOT=x", "RUNS=a b", "GPUS=3", "JOBS=5", OUTPUTS="/scratch")
    assert told == {"STUDY": "nih", "DATA_ROOT": "x", "RUNS": "a b", "OUTPUTS": "/scratch"}
    assert words[-4:] == ["--cores", "5", "--resources", "gpu=3"]
    assert words[words.index("--quiet") :][:4] == ["--quiet", "host", "reason", "rules"]
    words, *_ = passed_on("PROFILE=slurm")
    assert words[-2:] == ["--profile", "params/profiles/slurm"] and "--cores" not in words
    assert "rules" not in words  # it hides why a job was refused
    words, told, _ = passed_on(target="first")
    assert words[0] == "first" and words[-2] == "--cores" and told["STUDY"] == "demo"
    assert passed_on("STUDY=nih", target="demo")[1]["STUDY"] == "demo"
    words, *_ = passed_on("JOBS=", "GPUS=")  # as many as there are
    assert int(words[words.index("--cores") + 1]) == os.cpu_count()


ODD = (
    "$(touch ran)",
    "`touch ran`",
    "$$(touch ran)",
    "$(shell touch ran)",
    "a'b\"c;touch ran",
    "a  b",
    "a\nb",
    "${HOME}",
    "#",
)


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("way", ["argument", "environment"])
def test_what_is_typed_arrives_as_it_was_typed_and_is_never_run(passed_on, project, value, way):
    typed = dict.fromkeys(TOLD, value)
    _, told, _ = passed_on(*(f"{name}={value}" for name in TOLD)) if way == "argument" else passed_on(**typed)
    assert told == typed and not (project / "ran").exists()


@pytest.mark.parametrize(
    "argument",
    ["JOBS=0", "JOBS=x", "JOBS=-1", "JOBS=2.5", "JOBS=2 2", "JOBS=99999", "JOBS=1;touch ran", "GPUS=x", "GPUS=-1"]
    + ["PROFILE=slrm", "PROFILE=$$(touch ran)", "PROFILE=ipython_kernel_config.py"],
)
def test_a_number_or_profile_that_is_none_is_refused_in_one_sentence(passed_on, project, argument):
    words, _, said = passed_on(argument, status=2)
    sentence, makes_own = said.splitlines()
    assert words is None and sentence.startswith(argument) and makes_own.startswith("make: ***")
    assert not (project / "ran").exists()


def test_a_checkout_that_cannot_be_written_is_refused_in_one_sentence(project, tmp_path):
    (tmp_path / ".snakemake").touch()
    command = ["make", "--no-print-directory", f"--file={project / 'Makefile'}", "--old-file=setup", "study"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode != 0 and done.stderr.startswith(f"{tmp_path}/.snakemake must be a folder")
    assert len(done.stderr.splitlines()) == 2


def test_names_reach_papermill_quoted_and_are_never_run(project, tmp_path):
    """Whatever a folder is called: it is one word of one argument, and every study's lock lies beside its results."""
    odd = "o'q\" $(touch ran) `touch ran`;touch ran;ü [x]* \\n"
    films, outputs = tmp_path / f"films {odd}", tmp_path / odd
    shutil.copytree(project / "films", films)
    program(tmp_path / "bin" / "papermill", 'printf "%s\\n" GIVEN "$@" END; exit 1')
    arguments = ("STUDY=nih_sample", f"DATA_ROOT={films}", f"OUTPUTS={outputs}", f"RUNS={' '.join(RUNS)}")
    status, said = make_study(project, *arguments, PATH=f"{tmp_path / 'bin'}:{environment()['PATH']}")
    (given,) = re.findall(r"GIVEN\n(.*?)\nEND", said, re.DOTALL)
    assert status != 0 and given.splitlines()[:6] == [
        "notebooks/00_data.ipynb",
        f"{outputs}/nih_sample/00_data.ipynb",
        "-f",
        "params/studies/nih_sample.yaml",
        "-p",
        "data_root",
    ]
    assert given.splitlines()[6:9] == [str(films), "-y", f"runs: [{', '.join(RUNS)}]"]
    assert f"The notebook, as far as it came: {outputs}/nih_sample/00_data.ipynb" not in said  # papermill said nothing
    assert sorted(path.name for path in outputs.iterdir()) == [".nih_sample.lock", "nih_sample"]
    assert not list(project.glob("ran*"))


@pytest.mark.parametrize("user, allowed", [(0, True), (1000, False)])
def test_lab_opens_the_notebooks_for_root_too(project, user, allowed, tmp_path):
    (tmp_path / "id").write_text(f"#!/bin/sh\necho {user}\n")
    (tmp_path / "id").chmod(0o755)
    lab = output(["make", "-n", "lab"], project, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert "default_url=/lab/tree/notebooks" in lab and ("--allow-root" in lab) == allowed


def test_clean_states_keeps_what_is_not_finished(project, tmp_path):
    clean = ["make", "--no-print-directory", "clean-states"]
    assert output(clean, project, OUTPUTS=str(tmp_path / "none yet")) == ""
    for name, status in (("done", "finished"), ("half", "running")):
        folder = tmp_path / "my outputs" / "study" / name / "seed0"
        records.write_json({"status": status}, folder / "run.json")
        for file in ("model.safetensors", "state/epoch-00001-a.pt", "state/epoch-00002-b.pt", "state/finished.json"):
            records.write_json({}, folder / file)
        (folder / "state" / "epoch-00002-b.pt").write_bytes(bytes(2**21))
    said = output(clean, project, OUTPUTS=str(tmp_path / "my outputs"))
    assert re.fullmatch(r"2[.,][01]M\s+of training states removed\n", said)
    left = {path.relative_to(folder.parents[1]).as_posix() for path in folder.parents[1].rglob("*.pt")}
    assert left == {"half/seed0/state/epoch-00001-a.pt", "half/seed0/state/epoch-00002-b.pt"}
    assert len(list((folder.parents[1] / "done").rglob("*.*"))) == 3
    assert output(clean, project, OUTPUTS=str(tmp_path / "my outputs")) == ""


@pytest.mark.parametrize("name", ["o'q\" $(touch ran) `touch ran`", "-x", "[a]*", "ü\n"], ids=ascii)
def test_clean_states_takes_a_name_as_it_is(project, tmp_path, name):
    """A folder with a blank is one folder: the half of its name is another study's, which is not finished."""
    state = "run/seed0/state/epoch-00001-a.pt"
    for study, status in (("odd x", "finished"), ("x", "running"), ("-f", "finished")):
        folder = tmp_path / name / study / "run/seed0"
        records.write_json({"status": status}, folder / "run.json")
        records.write_json({}, tmp_path / name / study / state)
    command = ["make", f"--file={project / 'Makefile'}", "clean-states", f"OUTPUTS={name}"]
    assert "of training states removed" in output(command, tmp_path)
    assert [path.relative_to(tmp_path / name).as_posix() for path in tmp_path.rglob("*.pt")] == [f"x/{state}"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_clean_states_of_what_is_no_folder_says_so(project, tmp_path):
    (tmp_path / "file").touch()
    command = ["make", "--no-print-directory", "clean-states", f"OUTPUTS={tmp_path / 'file'}"]
    done = subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode != 0 and str(tmp_path / "file") in done.stderr and len(done.stderr.splitlines()) == 2


def test_make_check_names_the_study_as_it_was_typed(project):
    command = ["make", "--no-print-directory", "--old-file=setup", "check", "STUDY=$$(touch ran)"]
    done = subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "$$(touch ran)" in done.stderr and "Traceback" not in done.stderr
    assert not list(project.glob("ran*"))
