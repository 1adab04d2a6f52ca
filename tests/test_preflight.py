"""What is refused before a study begins, and what `python -m lib.preflight` finds afterwards."""

import errno
import json
import re
import shutil
from collections import namedtuple

import numpy as np
import pytest
import yaml
from safetensors.torch import save_file

from lib import preflight, records
from lib.flat_yaml import ParameterError
from lib.models import ModelError, build_model
from lib.params import ROOT, Run, load_study
from lib.preflight import check_before_work, check_results, main
from lib.runs import OpenStudy
from lib.state import WEIGHTS, digest, labels_digest

RUN = "multilabel-tdensenet-focal"


@pytest.fixture
def study(small_phantom, tmp_path, monkeypatch):
    """Writes params/studies/<name>.yaml in a root of its own; the release is the one of all tests."""
    for module in ("lib.params", "lib.runs"):
        monkeypatch.setattr(f"{module}.ROOT", tmp_path)
    monkeypatch.setenv("OUTPUTS", str(tmp_path / "outputs"))
    for kind in ("runs", "studies"):
        shutil.copytree(ROOT / "params" / kind, tmp_path / "params" / kind)

    def write(name="mine", **changes):
        values = {"study": name, "runs": [RUN], "release": "nih", "data_root": str(small_phantom), "image_size": 32}
        values |= {"validation_fraction": 0.3, "init": "scratch", "epochs": 2, "device": "cpu"} | changes
        (tmp_path / "params" / "studies" / f"{name}.yaml").write_text(yaml.safe_dump(values))
        return name

    return write


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept") / "mine"


@pytest.fixture
def finished(study, kept, capsys):
    """The study with its store and what a finished run leaves, with random weights; they are made once."""
    opened = OpenStudy(load_study(study()))
    [run] = opened.study.every_run
    if kept.is_dir():
        shutil.copytree(kept, opened.study.folder)
        return run
    assert opened.store.size
    run.run_folder.mkdir(parents=True)
    model = build_model(run.backbone, run.n_outputs, "scratch", run.seed)
    for file in WEIGHTS:
        save_file(model.state_dict(), run.run_folder / file)
    record = {"status": "finished", "parameters": run.model_dump()}
    record["identity"] = run.identity | {"labels": labels_digest(opened.films)}
    record["weights"] = {file: digest(run.run_folder / file) for file in WEIGHTS}
    records.write_json(record, run.run_folder / "run.json")
    shutil.copytree(opened.study.folder, kept)
    capsys.readouterr()
    return run


# --- beforehand


@pytest.mark.parametrize("left", ["file", "link", "loop", "of the study"])
def test_a_place_where_no_results_can_be_written(study, tmp_path, left):
    outputs = tmp_path / "outputs"
    if left == "file":
        outputs.write_text("")
    elif left == "of the study":
        outputs.mkdir()
        (outputs / "mine").write_text("")
    else:
        outputs.symlink_to(outputs if left == "loop" else tmp_path / "nowhere")
    with pytest.raises(ParameterError, match=f"results cannot be written to {outputs}.*OUTPUTS=") as error:
        check_before_work([load_study(study())])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_takes_nothing_is_refused(study, tmp_path, monkeypatch, number):
    def refuse(**_):
        raise OSError(number, "what the system says")

    monkeypatch.setattr(preflight.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ParameterError, match=rf"written to {tmp_path} \(what the system says\)"):
        check_before_work([load_study(study())])


def test_a_disk_that_is_nearly_full_is_refused(study, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage(2**26 - 1))
    with pytest.raises(ParameterError, match=f"the disk of {tmp_path} has 64 MiB left.*make room, or name another"):
        check_before_work([load_study(study())])
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage(2**26))
    check_before_work([load_study(study())])
    assert not (tmp_path / "outputs").exists()


def test_the_file_of_the_pretext_is_checked_before_papermill_reads_it(study, tmp_path):
    path = tmp_path / "params" / "studies" / "pretext.yaml"
    check_before_work([load_study(study(release="phantom", data_root="", init="phantom"))])
    for text, said in (('"x = 1\\nimport os": 2\n', "'x = 1.nimport os': no such"), ("seeds: !!set {0}\n", "the tag")):
        path.write_text((ROOT / "params" / "studies" / "pretext.yaml").read_text() + text)
        with pytest.raises(ParameterError, match=f"params/studies/pretext.yaml.*{said}"):
            check_before_work([load_study("mine")])


def test_weights_are_looked_for_from_the_projects_root(study, tmp_path, monkeypatch):
    run = Run.build({"init": "start.safetensors", "backbone": "small_cnn"})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=f"no weights file at {tmp_path}/start.safetensors"):
        check_before_work([load_study(study(init="start.safetensors"))])
    save_file(build_model(run.backbone, 1).state_dict(), tmp_path / "start.safetensors")
    check_before_work([load_study(study(init="start.safetensors", release="digits", runs=["digits-small_cnn-bce"]))])


@pytest.mark.parametrize("path", ["nowhere", "x" * 300, "."])
def test_lists_of_chexnet_that_are_not_there(study, path):
    with pytest.raises(ModelError, match="^chexnet_val_list: there is no file /"):
        check_before_work([load_study(study(chexnet_val_list=path))])


# --- afterwards


def test_what_is_not_there_yet_is_no_fault(study):
    found = list(check_results(load_study(study())))
    assert [(line.rpartition(": ")[2], good) for line, good in found] == [("not there yet", True)] * 2


def test_what_is_whole(finished, capsys):
    main(["mine"])
    assert capsys.readouterr() == (
        f"mine: films of 37 px: no fault found\nmine: weights of {RUN} seed 0, study mine: no fault found\n",
        "",
    )


def test_the_films_need_not_be_there(finished, study, capsys):
    study(data_root="")  # as params/studies/nih.yaml has it
    main(["mine"])
    assert capsys.readouterr().out.count("no fault found") == 2


def damage_pixels(run):
    images = np.lib.format.open_memmap(run.store_folder / "images.npy", mode="r+")
    images[-1, -1, -1] ^= 1
    images.flush()


def damage_weights(run, name="model_last.safetensors"):
    path = run.run_folder / name
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def shorten(run):
    path = run.store_folder / "images.npy"
    path.write_bytes(path.read_bytes()[:-1])


def forge(run):
    path = run.store_folder / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": 1}))


def test_a_run_that_still_trains_is_no_fault(finished, capsys):
    path = finished.run_folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "running"}))
    main(["mine"])
    assert capsys.readouterr().out.splitlines()[1].endswith(": not there yet")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_pixels, "store/37px is damaged: 1 of .* films checked .* that of row .* delete that folder"),
        (shorten, "store/37px is not as it was built: delete that folder, it is built again"),
        (forge, "store/37px is not as it was built"),
        (lambda run: (run.store_folder / "images.npy").unlink(), "store/37px is not as it was built"),
        (lambda run: (run.store_folder / "store.json").write_text(""), "store/37px is not as it was built"),
        (lambda run: (run.store_folder / "store.json").unlink(), "store/37px is not as it was built"),
        (damage_weights, "seed0/model_last.safetensors is not the file that training wrote"),
        (lambda run: damage_weights(run, "model.safetensors"), "seed0/model.safetensors is not the file that training"),
        (lambda run: (run.run_folder / "model_last.safetensors").unlink(), "seed0/model_last.safetensors"),
        (lambda run: (run.run_folder / "run.json").write_text("[]"), "seed0/run.json"),
    ],
    ids=range(10),
)
def test_what_was_damaged_since_is_said(finished, capsys, damage, said):
    damage(finished)
    with pytest.raises(SystemExit, match="^1 of 2 things is not as written: see above$"):
        main(["mine"])
    shown, told = capsys.readouterr()
    assert len(shown.splitlines()) == len(told.splitlines()) == 1
    assert re.search(said, told)


def test_companions_and_pretexts_are_checked_as_well(study):
    study("other", init="phantom", release="phantom", data_root="")
    study("mine", companions=["other"])
    lines = [line for name in ("mine", "other") for line, _ in check_results(load_study(name))]
    assert [line.rpartition(", study ")[2] for line in lines if "weights" in line] == [
        "mine: not there yet",
        "other: not there yet",
        "pretext_32px: not there yet",
    ]


@pytest.mark.parametrize("names", [[], [""], ["a", "b"], ["../x"], ["$(touch x)"], ["nowhere"]], ids=repr)
def test_the_command_refuses_in_a_line(study, names):
    study()
    with pytest.raises(SystemExit) as ended:
        main(names)
    assert isinstance(ended.value.code, str) and len(ended.value.code.splitlines()) == 1
