import base64
import math
import os
import runpy
import sys

import pytest
import yaml
from papermill.translators import PythonTranslator
from pydantic import ValidationError

from lib import params
from lib.data import RELEASES
from lib.flat_yaml import ParameterError, load
from lib.params import FREE, GRID, IDENTITY, ROOT, Data, Loss, Run, Study, Training, load_study

STUDIES = sorted(path.stem for path in (ROOT / "params" / "studies").glob("*.yaml"))
RUNS = sorted(path.stem for path in (ROOT / "params" / "runs").glob("*.yaml"))


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A root of our own with one study and one run; returns a function that writes more."""
    monkeypatch.setattr(params, "ROOT", tmp_path)

    def write(kind, name, text):
        path = tmp_path / "params" / kind / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    write("runs", "binary-resnet50-bce", "task: binary\nbackbone: resnet50\nloss: bce\n")
    write("studies", "small", "study: small\nruns: [binary-resnet50-bce]\nseeds: [3, 4]\nepochs: 7\n")
    return write


# --- the files of the repository


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_is_valid(name):
    needs_root = load(ROOT / "params" / "studies" / f"{name}.yaml").get("release") in ("nih", "rsna")
    study = load_study(name, **({"data_root": "somewhere"} if needs_root else {}))
    assert study.study == name and len(study.runs) >= 1


@pytest.mark.parametrize("name", RUNS)
def test_every_run_is_named_by_what_it_holds(name):
    study = {"pneumonia": "demo_rsna", "digits": "digits"}.get(name.split("-")[0], "demo")
    run = load_study(study).run(name, seed=2)
    assert (run.name, run.seed, run.study) == (name, 2, study)


def test_the_grid_has_a_file_each():
    assert len(GRID) == 16 and set(GRID) <= set(RUNS)
    assert set(load_study("demo").runs) == set(GRID)


def test_nih_is_the_papers_recipe():
    study = load_study("nih", data_root="somewhere")
    recipe = {
        "release": "nih",
        "init": "imagenet",
        "learning_rate": 4e-4,
        "weight_decay": 1e-6,
        "epochs": 50,
        "batch_size": 512,
        "image_size": 224,
    }
    assert {key: getattr(study, key) for key in recipe} == recipe
    assert study.no_finding_output and set(study.runs) == set(GRID) and study.store_size == 256
    with pytest.raises(ParameterError, match="data_root is empty.*DATA_ROOT="):
        load_study("nih")


# --- values


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("learning_rat", "learning_rate"),
        ("epoch", "epochs"),
        ("Loss", "loss"),
        ("dataroot", "data_root"),
        ("weightdecay", "weight_decay"),
    ],
)
def test_a_misspelt_key_names_the_nearest(key, near):
    with pytest.raises(ParameterError, match=f"my file: {key}: no such parameter; did you mean {near}\\?"):
        Run.build({key: 1}, "my file")


def test_a_key_near_nothing_is_still_refused():
    with pytest.raises(ParameterError, match="zzzzzz: no such parameter$"):
        Run.build({"zzzzzz": 1})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", 0),
        ("epochs", 2.5),
        ("epochs", "many"),
        ("batch_size", 1),
        ("learning_rate", 0),
        ("learning_rate", -1e-3),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("weight_decay", -1),
        ("validation_fraction", 0),
        ("validation_fraction", 1),
        ("image_size", 16),
        ("image_size", 4096),
        ("phantom_films", 1),
        ("alpha", 1.5),
        ("gamma", -1),
        ("beta", 1.0),
        ("jitter", 1.0),
        ("loss", "hinge"),
        ("task", "ternary"),
        ("device", "gpu"),
        ("gpus", 0),
        ("checkpoint", "first"),
        ("cam_method", "gradcam"),
        ("connectivity", 6),
        ("dissection_quantile", 1),
        ("concept_resolution", "film"),
        ("precision", "fp8"),
        ("wbce_scheme", "batch"),
        ("cb_scale", "max"),
        ("seed", -1),
        ("seed", 2**31),
        ("seeds", []),
        ("runs", []),
        ("study", "a/b"),
        ("study", ""),
        ("study", "a\n"),
        ("init", ""),
        ("n_replicates", -1),
        ("final_learning_rate", 2),
        ("skip_bad_films", "perhaps"),
        ("epochs", None),
    ],
)
def test_out_of_range(key, value):
    with pytest.raises(ParameterError, match=f"^here: {key}: .*got "):
        Run.build({key: value}, "here")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seeds": [0, -1]}, r"seeds.1: .*got -1"),
        ({"seeds": [0, 1, 0]}, "seeds: names an entry twice"),
        ({"runs": ["binary-resnet50-bce", "binary-resnet50-bce"]}, "runs: names an entry twice"),
        (
            {"runs": ["binary-resnet50-bec"]},
            r"runs: no file params/runs/binary-resnet50-bec.yaml; did you mean binary-resnet50-bce\?",
        ),
        ({"release": "nih"}, "data_root is empty"),
        ({"epochs": 0, "loss": "hinge", "sed": 1}, "epochs: .*loss: .*sed: no such parameter; did you mean seed"),
    ],
)
def test_what_a_list_or_several_keys_get_wrong(values, message):
    with pytest.raises(ParameterError, match=message):
        Run.build(values)


def test_parameters_cannot_change_afterwards():
    with pytest.raises(ValidationError, match="frozen"):
        Study().epochs = 3


def test_numbers_that_yaml_reads_as_text():
    assert Study.build(yaml.safe_load("learning_rate: 1e-3")).learning_rate == 1e-3  # yaml 1.1 wants 1.0e-3


# --- paths


def test_paths(monkeypatch):
    monkeypatch.delenv("OUTPUTS", raising=False)
    run = Run(study="abc", task="binary", backbone="resnet50", loss="wbce", seed=5, image_size=224)
    assert run.name == "binary-resnet50-wbce"
    assert run.folder == ROOT / "outputs" / "abc"
    assert run.run_folder == run.folder / "binary-resnet50-wbce" / "seed5"
    assert run.weights_path == run.run_folder / "model.safetensors"
    assert Run(checkpoint="last").weights_path.name == "model_last.safetensors"
    assert run.store_size == 256 and run.store_folder == run.folder / "store" / "256px"
    assert run.release_folder == run.folder / "release"
    assert "phantom" in run.data_label and "not patients" in run.data_label


def test_data_root_is_absolute_or_from_the_repository(tmp_path):
    assert Study(release="nih", data_root=str(tmp_path)).release_folder == tmp_path
    assert Study(release="nih", data_root="films/nih").release_folder == ROOT / "films" / "nih"
    assert "phantom" not in Study(release="nih", data_root="x").data_label


# --- files and overrides


def test_a_run_is_its_study_and_its_own_file(elsewhere):
    study = load_study("small")
    run = study.run("binary-resnet50-bce", 4)
    assert (run.epochs, run.task, run.backbone, run.loss, run.seed) == (7, "binary", "resnet50", "bce", 4)
    assert run.run_folder.parts[-3:] == ("small", "binary-resnet50-bce", "seed4")


def test_overrides_win_and_are_checked(elsewhere):
    assert load_study("small", epochs=2).epochs == 2
    with pytest.raises(ParameterError, match="studies/small.yaml: epochs: .*got 0"):
        load_study("small", epochs=0)
    with pytest.raises(ParameterError, match="epocs: no such parameter; did you mean epochs"):
        load_study("small", epocs=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("study: broken\nmodel:\n  epochs: 3\n", "broken.yaml: must hold flat"),
        ("- a\n- b\n", "broken.yaml: must hold flat"),
        ("", "broken.yaml: must hold flat"),
        ("study: [broken\n", "broken.yaml: not valid yaml"),
        ("study: other\nruns: [binary-resnet50-bce]\n", "study says 'other'.*file's own name"),
        (
            "study: broken\nruns: [binary-resnet50-bce]\nepoch: 3\n",
            "params/studies/broken.yaml: epoch: no such parameter; did you mean epochs",
        ),
    ],
)
def test_a_study_file_that_is_wrong(elsewhere, text, message):
    elsewhere("studies", "broken", text)
    with pytest.raises(ParameterError, match=message):
        load_study("broken")


def test_a_study_that_does_not_exist(elsewhere):
    with pytest.raises(ParameterError, match=r"smal.yaml: no such file; did you mean small\?.*has small"):
        load_study("smal")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "task: multilabel\nbackbone: resnet50\nloss: bce\n",
            "binary-resnet50-focal.yaml: describes multilabel-resnet50-bce; .*<task>-<backbone>-<loss>",
        ),
        (
            "task: binary\nbackbone: resnet50\nloss: focul\n",
            "binary-resnet50-focal.yaml on study small: loss: .*got 'focul'",
        ),
        ("task: binary\nbackbone: resnet50\nlos: focal\n", r"los: no such parameter; did you mean loss\?"),
        ("", "binary-resnet50-focal.yaml: must hold flat"),
    ],
)
def test_a_run_file_that_is_wrong(elsewhere, text, message):
    elsewhere("runs", "binary-resnet50-focal", text)
    with pytest.raises(ParameterError, match=message):
        load_study("small", runs=["binary-resnet50-bce", "binary-resnet50-focal"])


# --- keys


def test_every_key_has_a_meaning_that_papermill_can_read():
    for key, field in Run.model_fields.items():
        assert field.description and "=" not in field.description, key  # papermill takes the last = of a line apart


def test_a_trained_run_depends_on_every_key_that_makes_weights():
    """A new key of these classes belongs to the identity unless it says that it is free."""
    made = {key for part in (Data, Training, Loss) for key in part.model_fields} | {"task", "backbone", "loss", "seed"}
    assert made - set(IDENTITY) == {"data_root", "skip_bad_films", "device"} and set(IDENTITY) <= made

    class Longer(Training):
        momentum: float = 0.9
        where: str = params.Field("here", **FREE)

    assert set(params.identity_keys(Longer)) - set(IDENTITY) == {"momentum"}


def test_initial_weights_follow_the_release_where_none_are_named():
    for release, source in RELEASES.items():
        values = {"release": release, "data_root": "films", "task": source.tasks[0]}
        assert Run.build(values).init == source.init
        assert Run.build(values | {"init": None}).init == source.init
        assert Run.build(values | {"init": "scratch"}).init == "scratch"
    assert Run.build({"release": "nih", "data_root": "films"}).init == "imagenet"  # never minutes of phantom for films


@pytest.mark.parametrize(
    ("key", "wrong", "near"), [("loss", "fokal", "focal"), ("release", "nhi", "nih"), ("cam_method", "hirez", "hires")]
)
def test_a_misspelt_choice_names_the_nearest(key, wrong, near):
    with pytest.raises(ParameterError, match=f"{key}: .*; did you mean {near}\\? \\(got '{wrong}'\\)"):
        Run.build({key: wrong})


def test_a_task_goes_with_its_release():
    with pytest.raises(ParameterError, match="task digits does not go with release phantom"):
        Run.build({"task": "digits"})
    with pytest.raises(ParameterError, match="task multilabel does not go with release rsna"):
        Run.build({"release": "rsna", "data_root": "films"})
    assert Run.build({"release": "digits", "task": "digits"}).n_outputs == 10
    assert Run.build({"task": "pneumonia"}).n_outputs == 1


def test_lenses_look_at_runs_of_the_study():
    with pytest.raises(
        ParameterError, match="attribution names binary-resnet50-bce, which is none of the study's runs"
    ):
        Study.build({"runs": ["binary-tdensenet-bce"], "attribution": ["binary-resnet50-bce"]})
    fewer = load_study("demo", runs=["multilabel-tdensenet-focal"])
    assert fewer.attribution == fewer.features == ["multilabel-tdensenet-focal"]
    assert load_study("demo", runs=("multilabel-tdensenet-focal",)) == fewer


def test_imba_augmentation_mirrors():
    with pytest.raises(ParameterError, match="flip: false"):
        Study.build({"augmentation": "imba", "flip": False})


def test_the_selected_class():
    assert Run.build({}).selected_class == "Pneumonia"
    assert Run.build({"task": "binary"}).selected_class == "Unhealthy"
    assert Run.build({"phantom_marker": "Nodule"}).selected_class == "Nodule"
    assert Run.build({"phantom_marker": "Nodule", "task": "binary"}).selected_class == "Unhealthy"
    assert Run.build({"phantom_marker": "Nodule", "feature_class": "Mass"}).selected_class == "Mass"
    assert Run.build({"release": "digits", "task": "digits"}).selected_class == "7"


def test_siblings_differ_in_the_loss_alone_and_hold_the_run_itself():
    runs = ["multilabel-tdensenet-bce", "multilabel-resnet50-bce", "multilabel-tdensenet-focal", "binary-tdensenet-bce"]
    run = Run.build({"runs": runs, "seeds": [3], "seed": 3})
    assert [(other.name, other.seed) for other in run.siblings] == [
        ("multilabel-tdensenet-bce", 3),
        ("multilabel-tdensenet-focal", 3),
    ]
    assert run.siblings[1] is run
    own = Run.build(
        {"runs": runs, "backbone": "mobilenetv3_small_100"}
    )  # given on the command line: it has no file in params/runs
    assert own.siblings == [own]


def test_chexnet_files_are_those_named_from_the_projects_root(tmp_path):
    assert Run.build({}).chexnet_files == {}
    found = Run.build(
        {"chexnet": "weights/model.pth.tar", "chexnet_train_list": str(tmp_path / "train.txt")}
    ).chexnet_files
    assert found == {"chexnet": ROOT / "weights" / "model.pth.tar", "chexnet_train_list": tmp_path / "train.txt"}


# --- faults: whatever a file holds, a sentence says what is wrong with it

HOSTILE = (
    "$(touch x)",
    "a b",
    "a'b",
    'a"b',
    "a\nb",
    "..",
    "../runs/binary-resnet50-bce",
    "-x",
    ".x",
    "x" * 101,
    "é",
    "",
)
SMALL = "study: broken\nruns: [binary-resnet50-bce]\n"
BINARY = base64.b64encode(b'" + str(1 / 0) + "').decode()


def refused(call, *words):
    """The one sentence that `call` is refused with."""
    with pytest.raises(ParameterError) as error:
        call()
    said = str(error.value)
    assert "\n" not in said and len(said) < 700 and all(word in said for word in words), said
    return said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 3\nbatch_size: 4\nepochs: 5\n", "lines 3 and 5: the key 'epochs' stands there twice"),
        ('epochs: 3\n"epochs": 5\n', "lines 3 and 4: the key 'epochs' stands there twice"),
        ("<<: [{epochs: 9}]\n", "must hold flat"),
        ("seeds: &s [*s]\n", "must hold flat"),
        ("seeds: [[1], [2]]\n", "must hold flat"),
        ("runs: [{a: 1}]\n", "must hold flat"),
        ("? [a]\n: 3\n", "must hold flat"),
        ("seeds: " + "[" * 2000 + "]" * 2000, "must hold flat"),
        (f"data_root: !!binary {BINARY}\n", "line 3: the tag 'tag:yaml.org,2002:binary' is not read"),
        ("seeds: !!set {0}\n", "line 3: the tag 'tag:yaml.org,2002:set' is not read"),
        ("init: !!python/object/apply:os.getcwd []\n", "line 3: the tag 'tag:yaml.org,2002:python/object"),
        ("1: 2\n", "'1': no such parameter"),
        ("yes: 2\n", "yes: no such parameter"),
        ("'': 2\n", "'': no such parameter"),
        ('"x = 1\\nimport os": 3\n', "'x = 1\\nimport os': no such parameter"),
        ("phantom_films: 0500\n", "line 3: to yaml '0500' is octal"),
        ("phantom_films: 0x1F4\n", "line 3: to yaml '0x1F4' is octal, hexadecimal"),
        ("phantom_films: 1:30\n", "line 3: to yaml '1:30' is octal, hexadecimal, a time"),
        (f"phantom_films: {'9' * 5000}\n", "or a huge number: write it in plain digits"),
        (f"phantom_films: '{'9' * 5000}'\n", "phantom_films: Unable to parse"),
        ("phantom_films: 99999999999999999999\n", "must be below 2147483648 (got 99999999999999999999)"),
        ("epochs: true\n", "epochs: true and false"),
        ("learning_rate: on\n", "learning_rate: true and false"),
        ("seeds: [true]\n", "seeds: true and false"),
        ("token_grid: [true, true]\n", "token_grid: true and false"),
        ("seeds: [99999999999]\n", "seeds.0: Input should be less than 2147483648"),
        ("seeds: [1, 1.0]\n", "seeds: names an entry twice"),
        ("learning_rate: .nan\n", "learning_rate: Input should be a finite number"),
        ("epochs:\n", "epochs: Input should be a valid integer (got None)"),
        ("token_grid: [3]\n", "token_grid: takes two numbers, rows and columns, such as [8, 8]; or none"),
        ('data_root: "a\\0b"\n', "data_root: must be one line"),
        ('data_root: "a\\nb"\n', "data_root: must be one line"),
        ('data_root: "\\ud800"\n', "data_root: must be one line"),
        (f"data_root: {'x' * 5000}\n", "data_root: must be one line of at most 1000 letters"),
        (f"loss_factor: {'x' * 20000}\n", "loss_factor: Input should be a valid number"),
        (f"epochs: [{'1, ' * 3000}1]\n", "(got [1, 1, 1, 1, 1, 1, ...])"),
        ("".join(f"k{i}: 1\n" for i in range(100)), "k4: no such parameter; and 95 more"),
        ("companions: [broken]\n", "companions names broken, which is this study itself"),
        ("phantom_marker: Pneumothorx\n", "there is no class 'Pneumothorx' to look at; did you mean Pneumothorax?"),
        ("feature_class: Pneumonya\n", "there is no class 'Pneumonya' to look at; did you mean Pneumonia?"),
        ("---\nstudy: broken\n", "not valid yaml: expected a single document"),
        ("data_root: a\0b\n", "not valid yaml: unacceptable character #x0000"),
        ("data_root: =\n", "not valid yaml: could not determine a constructor"),
    ],
    ids=lambda value: value[:24],
)
def test_what_a_file_must_not_say(elsewhere, text, message):
    elsewhere("studies", "broken", SMALL + text)
    refused(lambda: load_study("broken"), "broken.yaml: ", message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("study: broken # \xe9\n".encode("latin-1"), "byte 16 is no UTF-8: save it as text in UTF-8"),
        (SMALL.encode("utf-16"), "byte 0 is no UTF-8"),
        (bytes(range(256)), "byte 128 is no UTF-8"),
        (SMALL.encode() + b"#" * 2**17, "is longer than 64 KiB"),
        (b"# nothing\n", "must hold flat 'key: value' lines, and holds none"),
        (None, "is a folder, a device or a broken link"),
        ("/dev/zero", "is a folder, a device or a broken link"),
        ("nowhere", "is a folder, a device or a broken link"),
        ("broken.yaml", "is a folder, a device or a broken link"),
        ("/proc/self/mem", "cannot be read (Input/output error)"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_what_is_no_file_of_parameters(elsewhere, content, message):
    path = elsewhere("studies", "broken", "")
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        path.symlink_to(content)
    else:
        path.mkdir()
    refused(lambda: load_study("broken"), f"{path}: ", message)


def test_a_pipe_is_no_file_of_parameters(elsewhere):
    path = elsewhere("studies", "broken", "")
    path.unlink()
    os.mkfifo(path)
    refused(lambda: load_study("broken"), "is a folder, a device or a broken link")


def test_what_good_files_may_say(elsewhere):
    """Dates are words, as to papermill; lists may be shared; a number may stand in quotes."""
    text = "\ufeffstudy: fine\r\nruns: &r [binary-resnet50-bce]\r\nfeatures: *r\r\ndata_root: 2020-01-01\r\n"
    elsewhere("studies", "fine", text + "learning_rate: 1\nepochs: '7'\nseeds: [1.0]\nflip: 'no'\nweight_decay: 1e-4\n")
    study = load_study("fine")
    assert (study.data_root, study.learning_rate, study.epochs, study.seeds) == ("2020-01-01", 1.0, 7, [1])
    assert (study.flip, study.weight_decay, study.features) == (False, 1e-4, ["binary-resnet50-bce"])


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: repr(name)[:12])
def test_a_name_is_one_plain_word(elsewhere, name):
    """It becomes a folder, a file's name and a word of a shell's line, so nothing is looked up by another."""
    rule = "a name has letters, digits and _ . + - alone"
    refused(lambda: load_study(name), "names no file of params/studies: ", rule)
    refused(lambda: load_study("small").run(name), "names no file of params/runs: ", rule)
    for key in ("runs", "attribution", "features", "companions"):
        refused(lambda key=key: load_study("small", **{key: [name]}), f"{key}.0: {rule}")
    refused(lambda: Run.build({"backbone": name}), f"backbone: {rule}")


def test_names_of_timm_are_plain_words(elsewhere):
    elsewhere("runs", "binary-resnet50.a1_in1k-bce", "task: binary\nbackbone: resnet50.a1_in1k\nloss: bce\n")
    assert load_study("small", runs=["binary-resnet50.a1_in1k-bce"]).every_run[0].backbone == "resnet50.a1_in1k"


def test_a_name_that_is_none_is_refused():
    for name in (None, True, 3, ["demo"]):
        refused(lambda name=name: load_study(name), "names no file of params/studies")


def test_the_names_of_pretexts_are_kept(elsewhere):
    elsewhere("studies", "pretext_66px", "study: pretext_66px\nruns: [binary-resnet50-bce]\n")
    refused(lambda: load_study("pretext_66px"), "are kept for the runs that init: phantom starts from; choose another")


@pytest.mark.parametrize("text", ["study: other", "seed: 5", "seeds: [5]", "features: []", "companions: []"])
def test_a_runs_file_says_nothing_of_the_study(elsewhere, text):
    """study would have had its results written to another study's folder, seed would have been dropped in silence."""
    elsewhere("runs", "binary-resnet50-bce", f"task: binary\nbackbone: resnet50\nloss: bce\n{text}\n")
    refused(lambda: load_study("small"), f"binary-resnet50-bce.yaml: {text.partition(':')[0]} is for a study's file")


def test_a_runs_file_has_each_key_once(elsewhere):
    elsewhere("runs", "binary-resnet50-bce", "task: binary\nbackbone: resnet50\nloss: focal\nloss: bce\n")
    refused(
        lambda: load_study("small"), "runs/binary-resnet50-bce.yaml: lines 3 and 4: the key 'loss' stands there twice"
    )


def test_a_run_that_is_a_folder(elsewhere):
    path = elsewhere("runs", "binary-resnet50-focal", "")
    path.unlink()
    path.mkdir()
    refused(
        lambda: load_study("small", runs=["binary-resnet50-focal"]),
        "no file params/runs/binary-resnet50-focal.yaml; did you mean binary-resnet50-bce?",
    )


def test_the_class_whose_features_are_shown_is_one_of_the_task(elsewhere):
    """07 would have found it after the training."""
    elsewhere("runs", "multilabel-resnet50-bce", "task: multilabel\nbackbone: resnet50\nloss: bce\n")
    runs = ["binary-resnet50-bce", "multilabel-resnet50-bce"]
    assert load_study("small", runs=runs, features=runs[1:], feature_class="Mass").feature_class == "Mass"
    for keys, word in (
        ({"features": runs, "feature_class": "Mass"}, "no class 'Mass' to look at (Unhealthy)"),
        ({"features": runs[1:], "feature_class": "7"}, "no class '7' to look at"),
        ({"features": runs[1:], "phantom_marker": "No Finding", "no_finding_output": False}, "no class 'No Finding'"),
    ):
        refused(lambda keys=keys: load_study("small", runs=runs, **keys), "feature_class: ", word)


@pytest.mark.parametrize("runs", [5, None, "binary-resnet50-bce", {"a": 1}, [["a"]], [None]])
def test_runs_of_the_command_line_that_are_no_list_of_names(elsewhere, runs):
    elsewhere("studies", "small", "study: small\nruns: [binary-resnet50-bce]\nfeatures:\n")
    refused(
        lambda: load_study("small", runs=runs), "small.yaml: runs", "features: Input should be a valid list (got None)"
    )


def test_companions_may_name_each_other(elsewhere):
    for name, other in ("ab", "ba"):
        elsewhere("studies", name, f"study: {name}\nruns: [binary-resnet50-bce]\ncompanions: [{other}]\n")
    assert load_study("a").companions == ["b"] and load_study("b").companions == ["a"]


def test_values_of_any_size_are_refused_in_a_line():
    refused(lambda: Run.build({"token_grid": (True, True)}), "token_grid: true and false")
    for key in ("seed", "connectivity", "epochs", "task"):
        for value in (10**5000, "x" * 10**5, ["x"] * 10**5, {"x": "x" * 10**5}):
            refused(lambda key=key, value=value: Run.build({key: value}), f"{key}: ")
    refused(lambda: Run.build({"x" * 10**5: 1}), "no such parameter")


def test_what_papermill_makes_of_a_file_that_was_read_is_what_was_read(elsewhere):
    """papermill writes values into a cell as Python; what it would write unquoted is refused above."""
    words = [
        '"',
        "\\",
        '\\"',
        "'''",
        '"""',
        "{x}",
        "$(id)",
        "`id`",
        "\u2028",
        "\U0001f600",
        "#",
        '" + str(1 / 0) + "',
        "\\N{DASH}",
    ]
    text = "study: broken\n" + yaml.safe_dump({"data_root": "".join(words), "runs": words}, allow_unicode=True)
    values, cell = load(elsewhere("studies", "broken", text)), {}
    exec(PythonTranslator.codify(values), {}, cell)
    assert cell == values == {"study": "broken", "data_root": "".join(words), "runs": words}


@pytest.mark.parametrize(
    ("words", "said"), [([], "name one study"), (["a", "b"], "name one study"), (["../x"], "'../x'")]
)
def test_the_command_refuses_in_a_line(words, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lib.params", *words])
    with pytest.raises(SystemExit, match=said) as ended:
        runpy.run_path(params.__file__, run_name="__main__")
    assert len(str(ended.value).splitlines()) == 1


def test_further_seeds_are_those_of_the_run():
    runs = ["multilabel-tdensenet-bce", "multilabel-tdensenet-focal", "multilabel-tdensenet-wbce"]
    further = [f"{runs[0]}/seed7", f"{runs[1]}/seed7", f"{runs[1]}/seed8"]
    study = Study(runs=runs, seeds=[0, 1], more_seeds=further)
    assert [(run.loss, run.seed) for run in study.every_run] == [
        ("bce", 0), ("bce", 1), ("bce", 7), ("focal", 0), ("focal", 1), ("focal", 7), ("focal", 8), ("wbce", 0),
        ("wbce", 1)
    ]  # fmt: skip
    assert [run.loss for run in study.run(runs[0], 7).siblings] == ["bce", "focal"]
    assert [run.loss for run in study.run(runs[0], 1).siblings] == ["bce", "focal", "wbce"]


@pytest.mark.parametrize(
    ("further", "said"),
    [
        (["multilabel-tdensenet-bce/seed1"], "more_seeds names multilabel-tdensenet-bce/seed1, which is one of seeds"),
        (["multilabel-tdensenet-bce/seed2"] * 2, "more_seeds: names an entry twice"),
        (
            ["pneumonia-vgg16-bce/seed2"],
            "more_seeds names pneumonia-vgg16-bce/seed2, which is none of the study's runs",
        ),
        (["multilabel-tdensenet-bce"], "more_seeds.0"),
        (["multilabel-tdensenet-bce/seed02"], "more_seeds.0"),
    ],
)
def test_further_seeds_of_no_run_or_named_twice(further, said):
    with pytest.raises(ParameterError, match=said):
        Study.build({"seeds": [0, 1], "more_seeds": further})
