"""What `make study` is told, what stands before any work, and what each job needs."""

import fcntl
import os
import shlex
from types import SimpleNamespace

import pytest

from lib.data import RELEASES
from lib.flat_yaml import ParameterError
from lib.params import Run, Study, load_study
from lib.workflow import Call, check_releases, hold_outputs, jobs_of, told


def test_what_is_not_said_is_the_studys_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert told({}) == ("outputs", {})
    assert told({"DATA_ROOT": "", "RUNS": " ", "OUTPUTS": ""}) == ("outputs", {})
    said = {"DATA_ROOT": "some films", "RUNS": " a  b\n", "OUTPUTS": "./my results//x/"}
    assert told(said) == ("my results/x", {"data_root": str(tmp_path / "some films"), "runs": ["a", "b"]})
    monkeypatch.setenv("HOME", "/home/one")
    assert told({"DATA_ROOT": "~/films"})[1] == {"data_root": "/home/one/films"}
    assert told({"OUTPUTS": "../a/../b"})[0] == "../a/../b"  # a could be a link


@pytest.mark.parametrize("key", ["DATA_ROOT", "OUTPUTS"])
@pytest.mark.parametrize("folder", ["~nobody of that name/x", "-x", "a{b}", "a\nb", "a\x1b[2J", "a\udcff"], ids=ascii)
def test_a_name_that_is_more_than_a_folders_is_refused_in_one_printable_line(key, folder):
    with pytest.raises(ParameterError) as refused:
        told({key: folder})
    sentence = str(refused.value)
    assert sentence.startswith(f"{key}=") and sentence.isascii() and sentence.isprintable()


def nih(root):
    return Study.build({"study": "x", "release": "nih", "data_root": str(root), "init": "scratch"})


def test_a_release_that_is_not_there_is_refused(tmp_path):
    check_releases([load_study("smoke")])  # makes its films itself
    (tmp_path / "file").touch()
    for root, fault in (
        ("/there/is/none", "is not a folder"),
        (tmp_path / "file", "is not a folder"),
        (tmp_path, "holds no Data_Entry_2017"),
    ):
        with pytest.raises(ParameterError, match=rf"study x: {root} {fault}.*DATA_ROOT="):
            check_releases([load_study("smoke"), nih(root)])
    odd = tmp_path / "a [b] *"
    odd.mkdir()
    (odd / "Data_Entry_2017_v2020.csv").touch()
    check_releases([nih(odd)])
    (odd / "Data_Entry_2017_v2020.csv").rename(odd / "data_entry_2017.CSV")  # as the reader takes it
    check_releases([nih(odd)])
    with pytest.raises(ParameterError, match="braces"):  # Snakemake would read them as a wildcard
        check_releases([nih(tmp_path / "a{b}")])


def test_one_process_at_a_time_makes_a_study(tmp_path):
    outputs = tmp_path / "not yet" / "there"
    held = hold_outputs(str(outputs), {"b": None, "a": None})
    assert sorted(path.name for path in outputs.iterdir()) == [".a.lock", ".b.lock"]
    assert not any(os.get_inheritable(lock) for lock in held)  # a job that outlives a kill keeps none
    with pytest.raises(ParameterError, match=r"^Study b is being run already: wait for it, or stop it first"):
        hold_outputs(str(outputs), ["b", "c"])
    for lock in held:
        os.close(lock)
    os.close(*hold_outputs(str(outputs), ["a"]))


def test_a_companion_of_another_study_is_not_made_twice(tmp_path):
    with open(tmp_path / ".b.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ParameterError, match="Study b is being run already"):
            hold_outputs(str(tmp_path), ["b", "c"])


@pytest.mark.parametrize("kind", ["file", "below a file", "dangling link", "looping link", "lock is a folder", "long"])
def test_a_folder_that_cannot_be_written_is_refused_in_one_sentence(tmp_path, kind):
    outputs = tmp_path / "results"
    if kind in ("file", "below a file"):
        outputs.touch()
        outputs = outputs / "x" if kind == "below a file" else outputs
    elif kind == "dangling link":
        outputs.symlink_to(tmp_path / "nowhere")
    elif kind == "looping link":
        outputs.symlink_to(outputs)
    elif kind == "lock is a folder":
        (outputs / ".smoke.lock").mkdir(parents=True)
    else:
        outputs = tmp_path / ("x" * 300)
    with pytest.raises(ParameterError) as refused:
        hold_outputs(str(outputs), ["smoke"])
    assert f"OUTPUTS={outputs}: results cannot be written there (" in str(refused.value)
    assert "Errno" not in str(refused.value) and "name another folder" in str(refused.value)


# ---- what is to be made


def test_the_jobs_of_a_study():
    study = Study(
        release="digits",
        runs=["digits-small_cnn-bce", "digits-small_transformer-bce"],
        seeds=[0, 1],
        more_seeds=["digits-small_cnn-bce/seed5", "digits-small_transformer-bce/seed5"],
        features=["digits-small_cnn-bce"],
    )
    jobs = list(jobs_of(study))
    assert len(set(jobs)) == len(jobs)
    runs = [(run, seed) for run in study.runs for seed in (0, 1, 5)]
    for rule in ("train", "metrics", "cam_alignment", "dissection"):
        assert [job[1:] for job in jobs if job[0] == rule] == runs
    assert [job[1:] for job in jobs if job[0] == "features"] == [
        ("digits-small_cnn-bce", 0),
        ("digits-small_cnn-bce", 1),
        ("digits-small_cnn-bce", 5),
    ]
    assert [job[0] for job in jobs if not job[1]] == ["data", "figures", "explore"]


def test_a_change_of_losses_needs_another_loss(tmp_path):
    runs = ["multilabel-tdensenet-focal", "multilabel-tdensenet-bce", "binary-tdensenet-bce"]
    keys = {"runs": runs, "seeds": [0, 1], "more_seeds": [f"{runs[1]}/seed5", f"{runs[1]}/seed6", f"{runs[0]}/seed5"]}
    study = Study(**keys, trunk_and_head=["multilabel-tdensenet-bce", "binary-tdensenet-bce"])
    asked = [job[1:] for job in jobs_of(study) if job[0] == "trunk_and_head"]
    assert asked == [("multilabel-tdensenet-bce", seed) for seed in (0, 1, 5)]
    with pytest.raises(ParameterError, match="trunk_and_head names multilabel-tdensenet-focal; it names BCE runs"):
        Study.build(keys | {"trunk_and_head": runs[:1]})


@pytest.mark.parametrize("name", ["demo", "smoke", "digits", "demo_rsna", "dose", "nih_sample", "nih_part"])
def test_a_study_that_compares_runs_is_explored(name):
    rules = {rule for rule, *_ in jobs_of(load_study(name, data_root="."))}
    assert ("explore" in rules) == ("cam_alignment" in rules) == (name not in ("digits", "demo_rsna", "dose"))


# ---- what each job needs


class Wildcards(SimpleNamespace):
    """As Snakemake passes them."""

    def items(self):
        return vars(self).items()


FOCAL, BCE = "multilabel-tdensenet-focal", "multilabel-tdensenet-bce"


def test_a_call_is_its_study_and_companions(tmp_path):
    call = Call.of({"OUTPUTS": str(tmp_path)})
    assert list(call.studies) == ["demo", "demo_rsna", "demo_confounder", "digits"] and call.main.study == "demo"
    assert Call.of({"STUDY": "digits"}).main == load_study("digits")
    few = Call.of({"RUNS": f"{BCE} {FOCAL}"})
    assert list(few.studies) == ["demo"] and few.main.runs == [BCE, FOCAL] and few.outputs == "outputs"
    with pytest.raises(ParameterError, match="data_root of study nih_sample"):
        Call.of({"STUDY": "nih_sample", "DATA_ROOT": str(tmp_path)})


def test_the_first_run_is_what_notebooks_open_where_the_study_has_it():
    assert Call.of({}).first == load_study("demo").run(Run().name)
    assert Call.of({"STUDY": "demo_rsna"}).first.name == "pneumonia-vgg16-bce"
    assert Call.of({"RUNS": BCE}).first.name == BCE


@pytest.mark.parametrize(
    "wildcards, leads",
    [
        ({"study": "demo"}, True),
        ({"study": "digits"}, False),
        ({"study": "demo", "run": FOCAL, "seed": "0"}, True),
        ({"study": "demo", "run": FOCAL, "seed": "1"}, False),
        ({"study": "demo", "run": BCE, "seed": "0"}, False),
        ({"study": "demo_confounder", "run": FOCAL, "seed": "0"}, False),
        ({"size": "66", "backbone": "tdensenet"}, True),
        ({"size": "66", "backbone": "resnet50"}, False),
    ],
    ids=str,
)
def test_what_leads_to_the_first_run(wildcards, leads):
    assert Call.of({}).leads_to_first(Wildcards(**wildcards)) == leads


def test_what_papermill_is_given():
    given = Call.of({}).given
    file = ["-f", "params/studies/demo.yaml"]
    assert given(Wildcards(study="demo")).split() == file
    run = [*file, "-f", f"params/runs/{BCE}.yaml", "-p", "seed", "3"]
    assert given(Wildcards(study="demo", run=BCE, seed="3")).split() == run
    said = Call.of({"STUDY": "smoke", "DATA_ROOT": "some $films", "RUNS": FOCAL}).given(Wildcards(study="smoke"))
    assert shlex.split(said) == [
        *["-f", "params/studies/smoke.yaml", "-p", "data_root", os.path.abspath("some $films")],
        *["-y", f"runs: [{FOCAL}]", "-y", f"attribution: [{FOCAL}]", "-y", f"features: [{FOCAL}]"],
        *["-y", "trunk_and_head: []", "-y", "more_seeds: []"],
    ]
    assert "-p" not in Call("x", {"data_root": "films"}, Call.of({}).studies).given(Wildcards(study="digits"))


def test_files_of_runs():
    call = Call.of({"OUTPUTS": "my results", "RUNS": f"{BCE} {FOCAL}"})
    assert call.every("demo", "a", "b") == [
        f"my results/demo/{run}/seed0/{file}" for run in (BCE, FOCAL) for file in "ab"
    ]
    of = Wildcards(study="demo", run=FOCAL, seed="0")
    assert call.siblings(of) == call.every("demo", "run.json")
    assert call.initial_weights(of) == [f"my results/pretext_66px/{BCE}/seed0/run.json"]
    assert call.chexnet_files(of) == call.release_lists(of) == []
    assert Call.of({"STUDY": "smoke"}).initial_weights(Wildcards(study="smoke", run=FOCAL, seed="0")) == []


def test_the_lists_of_a_release_are_found_by_their_patterns(tmp_path):
    names = ["Data_Entry_2017_v2020.csv", "BBox_List_2017.csv", "train_val_list.txt", "test_list.txt"]
    for name in (*names, "README.txt"):
        (tmp_path / name).touch()
    found = Call.of({"STUDY": "nih_sample", "DATA_ROOT": str(tmp_path)}).release_lists(Wildcards(study="nih_sample"))
    assert sorted(found) == sorted(str(tmp_path / name) for name in names) and len(RELEASES["nih"].lists) == 4


def test_a_job_asks_for_a_gpu_where_its_study_wants_one():
    of, pretext = Wildcards(study="x", run=FOCAL, seed="0"), Wildcards(size="66", backbone="resnet50")
    for device, n in {"auto": 1, "cuda": 1, "cuda:1": 1, "cpu": 0, "mps": 0}.items():
        call = Call("x", {}, {"x": Study(study="x", device=device)})
        assert call.gpus(of) == call.gpus(pretext) == n and call.gpus(of, 4) == 4 * n
    assert [Call.of({"GPUS": said}).gpus(of, 4) for said in ("", "0", "2")] == [4, 0, 4]


def test_what_there_is_to_open_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = Call.of({"OUTPUTS": str(tmp_path / "out")})
    assert call.to_open() == ""
    run = f"out/demo/{FOCAL}/seed0"
    of_run = [f"{run}/fig_cams.png", f"{run}/03_cam_alignment.ipynb"]
    of_study = ["out/demo/report.html", "out/demo/explore.html", "out/demo/figures/fig1b_cams_binary.png"]
    for files in (of_run, [*of_study, "out/demo/05_figures.ipynb"]):
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).touch()
        assert call.to_open() == f"Open {', '.join(files)}"
