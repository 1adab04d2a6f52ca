"""The door: what a notebook's parameters open, and what they are refused with."""

import json
import shutil

import numpy as np
import pytest
import yaml
from papermill.translators import PythonTranslator
from safetensors.torch import save_file

from lib import params, records
from lib.data.release import CLASSES, ReleaseError
from lib.flat_yaml import ParameterError, load
from lib.models import ModelError, build_model
from lib.params import ROOT, Run, Study
from lib.runs import OpenStudy, Subject, open_run, open_study
from lib.state import TrainingError, is_trained, labels_digest, require_trained

SMALL = {"image_size": 32, "validation_fraction": 0.3, "init": "scratch", "epochs": 2, "device": "cpu"}


@pytest.fixture
def study(small_phantom, tmp_path, monkeypatch):
    """Writes params/studies/<name>.yaml in a root of its own; the release is the one of all tests."""
    monkeypatch.setattr(params, "ROOT", tmp_path)
    monkeypatch.setattr("lib.runs.ROOT", tmp_path)
    monkeypatch.setenv("OUTPUTS", str(tmp_path / "outputs"))
    shutil.copytree(ROOT / "params" / "runs", tmp_path / "params" / "runs")

    def write(name, **changes):
        values = {
            "study": name,
            "runs": ["multilabel-tdensenet-focal"],
            "release": "nih",
            "data_root": str(small_phantom),
        }
        path = tmp_path / "params" / "studies" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(values | SMALL | changes))
        return name

    return write


def train(run):
    """Leave what a finished run leaves, with random weights."""
    run.run_folder.mkdir(parents=True)
    model = build_model(run.backbone, run.n_outputs, "scratch", run.seed)
    for name in ("model.safetensors", "model_last.safetensors"):
        save_file(model.state_dict(), run.run_folder / name)
    identity = run.identity | {"labels": labels_digest(OpenStudy(run).films)}
    record = {"status": "finished", "parameters": run.model_dump(), "identity": identity}
    records.write_json(record, run.run_folder / "run.json")
    return run


# --- parameters


def test_what_is_not_given_is_as_the_studys_file_says(study):
    name = study("mine", n_replicates=17)
    subject = open_run({"study": name, "loss": "focal", "n_replicates": None, "cam_method": None}, trained=False)
    assert (subject.run.n_replicates, subject.run.cam_method, subject.run.epochs, subject.run.loss) == (
        17,
        "cam",
        2,
        "focal",
    )
    assert open_run({"study": name, "n_replicates": 5}, trained=False).run.n_replicates == 5
    assert open_study({"study": name}).study.n_replicates == 17


def test_what_the_runs_own_file_says_is_no_option(study):
    name = study("mine", release="digits", data_root="", runs=["digits-small_transformer-bce"])
    given = {"study": name, "task": "digits", "backbone": "small_transformer", "loss": "bce"}
    subject = open_run(given, trained=False)
    assert subject.run.token_grid == [8, 8] and subject.run.cam_layer and subject.folder == subject.run.run_folder
    assert open_run(given | {"token_grid": [8, 8]}, trained=False).folder == subject.run.run_folder
    assert open_run(given | {"cam_layer": "trunk.maps"}, trained=False).folder.name == "cam_layer=trunk.maps"


def test_a_notebooks_own_names_are_not_parameters(study):
    shell = {
        "__name__": "__main__",
        "_ih": [],
        "In": [],
        "Out": {},
        "exit": print,
        "get_ipython": print,
        "yaml": yaml,
        "load": load,
    }
    assert open_run({**shell, "study": study("mine"), "epochs": 3}, trained=False).run.epochs == 3


def test_a_misspelt_key_is_an_error(study):
    name = study("mine")
    with pytest.raises(ParameterError, match=r"los: no such parameter; did you mean loss\?"):
        open_run({"study": name, "los": "bce"}, trained=False)
    with pytest.raises(ParameterError, match=r"loss: no such parameter"):  # a study holds no loss
        open_study({"study": name, "loss": "bce"})


def test_a_study_that_does_not_exist_must_say_what_it_is(study):
    study("mine")
    with pytest.raises(ParameterError, match=r"no params/studies/mime.yaml; did you mean mine\? .*-p release"):
        open_run({"study": "mime"}, trained=False)
    assert open_run({"study": "own", "release": "phantom"}, trained=False).run.study == "own"


def test_a_wrong_backbone_is_named_before_any_film_is_read(study):
    with pytest.raises(ModelError, match="backbone 'resnet55' is neither") as error:
        open_run({"study": study("mine"), "backbone": "resnet55"}, trained=False)
    near = str(error.value).split("near it: ")[1].split(", ")
    assert "resnet50" in near and len(near) == len(set(near))


def test_a_kernel_opens_again_with_other_parameters(study):
    """In JupyterLab: a value of the parameters cell is changed, or a key added, and the first cells are run again."""
    given = {"study": study("mine"), "n_replicates": None}
    subject = open_run(given, trained=False)
    given |= {"subject": subject, "table": np.zeros(2), "name": "a result", "n_replicates": 7, "connectivity": 4}
    again = open_run(given, trained=False)
    assert (again.run.n_replicates, again.run.connectivity) == (7, 4)
    with pytest.raises(ParameterError, match="loss: .*did you mean focal"):
        open_run(given | {"loss": "fokal"}, trained=False)


def test_a_kernel_that_has_run_the_notebook_before_says_so(study):
    for left in ({"run": Run()}, {"study": Study(), "array": np.zeros(2)}):
        with pytest.raises(ParameterError, match="Restart the kernel and run all cells"):
            open_run(left, trained=False)


# --- what is opened


def test_an_untrained_run_is_refused_and_a_trained_one_opens(study):
    given = {"study": study("mine")}
    with pytest.raises(TrainingError, match="multilabel-tdensenet-focal seed 0 is not trained: .*Run 01_train"):
        open_run(given)
    run = train(open_run(given, trained=False).run)
    subject = open_run(given)
    assert not subject.model.training and subject.layer == "trunk.relu5" and subject.classes == list(CLASSES)
    assert subject.targets.shape == (len(subject.films), 15) and set(subject.pairs["class"]) <= set(CLASSES)
    assert subject.boxes[["x2", "y2"]].to_numpy().max() <= run.image_size
    assert set(subject.regions["image"]) == set(subject.pairs["image"])
    [output] = subject.outputs(subject.rows("test")[:2], subject.layer)
    assert output.maps[subject.layer].shape[:2] == (2, 512)
    assert list(subject.siblings) == ["focal"] and subject.siblings["focal"] is subject
    shown = subject._repr_markdown_()
    assert "trunk.relu5" in shown and subject.label in shown and "image_size 32" in shown


def test_other_weights_than_the_parameters_are_refused(study):
    name = study("mine")
    train(open_run({"study": name}, trained=False).run)
    for key, value in (("epochs", 3), ("phantom_seed", 1), ("gamma", 1.0), ("init", "imagenet")):
        with pytest.raises(TrainingError, match=f"trained with other parameters \\({key}: .* -> {value}\\)"):
            open_run({"study": name, key: value})
    open_run({"study": name, "device": "cpu", "n_replicates": 3, "skip_bad_films": True})  # none of these makes weights


def test_films_with_other_labels_than_the_weights_were_trained_with_are_refused(study, small_phantom, tmp_path):
    """Only the release differs, so no parameter tells."""
    name = study("mine")
    train(open_run({"study": name}, trained=False).run)
    release = shutil.copytree(small_phantom, tmp_path / "release")
    table = release / "Data_Entry_2017.csv"
    table.write_text(table.read_text().replace(",No Finding,", ",Edema,", 1))
    with pytest.raises(TrainingError, match="trained with other films, labels or splits than .*release has"):
        assert open_run({"study": name, "data_root": str(release)}).model


def test_a_record_that_knows_less_had_the_defaults(study):
    run = train(open_run({"study": study("mine")}, trained=False).run)
    path = run.run_folder / "run.json"
    record = json.loads(path.read_text())
    for part in ("parameters", "identity"):
        record[part] = {key: value for key, value in record[part].items() if key not in ("augmentation", "loss_factor")}
    records.write_json(record, path)
    assert is_trained(run)
    other = run.model_copy(update={"loss_factor": 2.0})
    with pytest.raises(TrainingError, match="loss_factor: 1.0 -> 2.0"):
        require_trained(other)


def test_another_lens_writes_beside_and_never_replaces(study):
    name = study("mine", connectivity=4)
    run = train(open_run({"study": name}, trained=False).run)
    assert open_run({"study": name}).path("x.csv") == run.run_folder / "x.csv"
    assert open_run({"study": name, "connectivity": 4}).path("x.csv") == run.run_folder / "x.csv"  # as its file says
    assert (
        open_run({"study": name, "cam_method": "hires"}).path("x.csv") == run.run_folder / "cam_method=hires" / "x.csv"
    )
    several = open_run({"study": name, "cam_method": "hires", "token_grid": [2, 3], "cam_layer": "a/../b"})
    assert several.path("x").parent.name == "cam_layer=a_.._b-cam_method=hires-token_grid=2x3"
    assert (
        several.path("x").parent.parent == run.run_folder and "Results go to `cam_layer=" in several._repr_markdown_()
    )
    assert open_study({"study": name, "n_replicates": 5}).path("tables/x").parts[-3:] == (
        "n_replicates=5",
        "tables",
        "x",
    )
    alone = {"study": "alone", "release": "phantom", "cam_method": "hires"}  # without a file: what it is is no option
    assert open_run(alone, trained=False).folder.name == "cam_method=hires"


def test_fewer_runs_leave_fewer_to_look_at(study):
    runs = ["multilabel-tdensenet-focal", "binary-tdensenet-focal"]
    opened = open_study({"study": study("mine", runs=runs, features=runs), "runs": runs[:1]})
    assert opened.study.features == runs[:1]


def test_the_runs_of_every_loss_side_by_side(study):
    name = study("mine", runs=["multilabel-tdensenet-focal", "binary-tdensenet-focal"])
    opened = open_study({"study": name})
    for run in opened.study.every_run:
        train(run)
    wanted = opened.subject("multilabel-tdensenet-focal").pairs.head(3)
    pairs, maps, probabilities = opened.cams_by_loss("multilabel", "tdensenet", ["bce", "focal"], wanted, size=16)
    assert maps.shape == (3, 2, 16, 16) and np.isnan(maps[:, 0]).all() and np.isfinite(maps[:, 1]).all()
    assert list(pairs["class"]) == list(wanted["class"]) and np.isnan(probabilities[:, 0]).all()
    pairs, *_ = opened.cams_by_loss("binary", "tdensenet", ["focal"], wanted, size=16)
    assert set(pairs["class"]) == {"Unhealthy"} and set(pairs["image"]) == set(wanted["image"])


def test_simulated_films_know_the_truth(small_phantom, study):
    opened = OpenStudy(
        Run.build(
            {
                "release": "phantom",
                "data_root": str(small_phantom),
                "study": "mine",
                "phantom_films": 100,
                "phantom_size": 64,
                **SMALL,
            }
        )
    )
    rows = opened.rows("test")[:2]
    lungs, lesions = opened.truth("lungs", rows), opened.truth("lesions", rows)
    assert len(lungs) == len(lesions) == 2 and lungs[0].any() and isinstance(lesions[0], dict)
    assert opened.exact and not OpenStudy(Run.build({"release": "nih", "data_root": "films"})).exact
    assert isinstance(opened.subject(opened.study), Subject)


# --- faults


def test_code_among_the_parameters_is_said(study):
    """papermill pastes a key as it is, so that of a foreign file may be code: nothing else would ever tell."""
    given = {"study": study("mine"), "epochs": 3}
    plain = "# Parameters\nepochs = 3\nseeds = [1, -2]\nnote = {'a': None}\nlearning_rate = float('nan')\n"
    assert open_run(given | {"In": ["", "import this; print(this)", plain]}, trained=False).run.epochs == 3
    edited = "# Parameters\nepochs = 3 * 1\nlearning_rate: float = 1e-4 * 2\nseeds = (1, 2)\n"  # by hand, in JupyterLab
    old = "# Parameters\nepochs = print(3)\n"  # of a cell that has been mended since
    assert open_run(given | {"In": ["", old, edited]}, trained=False).run.epochs == 3
    for key, code in (
        ("epochs = 3\nimport os; seed", "import os"),
        ("epochs = 3; print(1); seed", "print(1)"),
        ("epochs = __import__('os').getpid(); seed", "__import__"),
        ("epochs = [one for one in (1,)][0]; seed", "[one for one in"),
        ("study.real", "study.real"),
        ("epochs: print(1)", "print(1)"),
    ):
        pasted = PythonTranslator.codify({"study": "mine", key: 0})
        with pytest.raises(ParameterError, match="hold code, and it has run.*Read the parameter file") as error:
            open_run(given | {"In": ["", "study = 'demo'", pasted]}, trained=False)
        assert code in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["../../x", "$(touch x)", "a\nb", "", "x" * 300, 5, ["demo"]])
def test_a_name_is_checked_before_any_file_is_looked_for(study, name):
    study("mine")
    for open_one in (open_study, lambda given: open_run(given, trained=False)):
        with pytest.raises(ParameterError, match="names no file of params/studies: a name has letters") as error:
            open_one({"study": name})
        assert "\n" not in str(error.value) and len(str(error.value)) < 300
    with pytest.raises(ParameterError, match="^the parameters: (backbone|task|loss): "):
        open_run({"study": "mine", "backbone": name, "loss": "focal"}, trained=False)


def test_a_file_with_a_key_twice_is_refused_by_the_door_too(study, tmp_path):
    for kind, name in (("studies", study("mine")), ("runs", "multilabel-tdensenet-focal")):
        path = tmp_path / "params" / kind / f"{name}.yaml"
        whole = path.read_text()
        path.write_text(whole + whole.splitlines()[-1])
        with pytest.raises(ParameterError, match=f"{kind}/{name}.yaml: lines .* stands there twice"):
            open_run({"study": "mine"}, trained=False)
        path.write_text(whole)
    assert open_run({"study": "mine"}, trained=False)


def test_numbers_in_words_are_no_other_options(study):
    """papermill -r gives every value as text."""
    name = study("mine", n_replicates=5)
    assert open_study({"study": name, "n_replicates": "5"}).path("x").parent.name == name
    assert open_study({"study": name, "n_replicates": "6"}).path("x").parent.name == "n_replicates=6"


def test_the_studies_of_pretexts_hold_nothing_else(study, tmp_path):
    study("mine")
    shutil.copy(ROOT / "params" / "studies" / "pretext.yaml", tmp_path / "params" / "studies")
    pretext = {**load(ROOT / "params" / "studies" / "pretext.yaml"), "study": "pretext_66px"}
    own = pretext | {"task": "multilabel", "backbone": "resnet50", "loss": "bce", "seed": 0}
    assert (
        open_run(own | {"device": "cpu"}, trained=False).run
        == Run.build(own | {"init": "phantom", "device": "cpu"}).pretext
    )
    assert open_study(pretext).study.study == "pretext_66px"
    for other in ({"loss": "focal"}, {"epochs": 9}, {"task": "binary"}, {"study": "pretext_1"}, {"seed": 1}):
        with pytest.raises(ParameterError, match="pretext_ are kept for the runs that init: phantom starts from"):
            open_run(own | other, trained=False)
    with pytest.raises(ParameterError, match="pretext_ are kept"):
        open_study(pretext | {"phantom_films": 100})


def test_lists_of_chexnet_that_are_not_there(study, tmp_path):
    (tmp_path / "weights").write_bytes(b"")
    given = {"study": study("mine"), "chexnet": str(tmp_path / "weights")}
    assert open_run(given, chexnet=True)
    for key in ("chexnet", "chexnet_train_list", "chexnet_val_list"):
        for path in (tmp_path / "nowhere", tmp_path, "x" * 300):
            with pytest.raises(ModelError, match=f"^{key}: there is no file /"):
                open_run(given | {key: str(path)}, chexnet=True)


@pytest.mark.parametrize("release", ["phantom", "digits"])
def test_films_that_cannot_be_written_are_refused_in_a_sentence(tmp_path, monkeypatch, release):
    """What the study makes itself; there is no make before a notebook that is run by hand."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("OUTPUTS", str(tmp_path / "file"))
    opened = OpenStudy(Study.build({"study": "mine", "release": release, "phantom_films": 60}))
    with pytest.raises(ReleaseError, match=r"file/mine/release cannot be written \(.*choose another folder"):
        opened.films  # noqa: B018
