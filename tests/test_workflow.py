"""What `make study` is told, and what stands before any work."""

import fcntl
import os

import pytest

from lib.flat_yaml import ParameterError
from lib.params import Study, load_study
from lib.workflow import check_releases, hold_outputs, jobs_of, told


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
    assert [job[0] for job in jobs if not job[1]] == ["data", "figures"]


def test_a_change_of_losses_needs_another_loss(tmp_path):
    runs = ["multilabel-tdensenet-focal", "multilabel-tdensenet-bce", "binary-tdensenet-bce"]
    keys = {"runs": runs, "seeds": [0, 1], "more_seeds": [f"{runs[1]}/seed5", f"{runs[1]}/seed6", f"{runs[0]}/seed5"]}
    study = Study(**keys, trunk_and_head=["multilabel-tdensenet-bce", "binary-tdensenet-bce"])
    asked = [job[1:] for job in jobs_of(study) if job[0] == "trunk_and_head"]
    assert asked == [("multilabel-tdensenet-bce", seed) for seed in (0, 1, 5)]
    with pytest.raises(ParameterError, match="trunk_and_head names multilabel-tdensenet-focal; it names BCE runs"):
        Study.build(keys | {"trunk_and_head": runs[:1]})
