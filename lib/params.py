"""What a study and a run are: validated parameters, and the paths that follow from them.

Parameters are flat `key: value` pairs, as papermill merges them. A study's are of four kinds, in four small classes:
`Data`, `Training`, `Loss` and `Analysis`; `params/studies/<study>.yaml` sets those that differ from the defaults below,
which are the demo's. `params/runs/<run>.yaml` says what makes one run. `python -m lib.params STUDY` validates a study
and all its runs.
"""

import itertools
import os
import re
import sys
import unicodedata
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lib.analysis.cam import METHODS as CAM_METHODS
from lib.data import RELEASES, TASKS
from lib.flat_yaml import ParameterError, load, nearest, shown
from lib.losses import LOSSES, SCALES

ROOT = Path(__file__).resolve().parents[1]
PLAN = ROOT / "params" / "plan.yaml"
# Whatever `init: phantom` starts from is a study of its own.
PRETEXT = "pretext_"
RESERVED = f"names that begin with {PRETEXT} are kept for the runs that init: phantom starts from; choose another name"
# The paper's runs. A loss or backbone of your own gets a file in params/runs and a place in the `runs` of a study.
GRID = tuple(
    "-".join(names)
    for names in itertools.product(
        ("multilabel", "binary"), ("tdensenet", "resnet50"), ("bce", "wbce", "focal", "cb_focal")
    )
)


def _plain(name: str) -> str:
    """A study's, run's or backbone's name: it becomes a folder, a file's name and a word of a shell's line."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}", name):
        raise ValueError("a name has letters, digits and _ . + - alone, at most 100, and begins with none of . + -")
    return name


Name = Annotated[str, AfterValidator(_plain)]


class _Keys(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value, field):
        entries = value if isinstance(value, (list, tuple)) else [value]
        if cls.model_fields[field.field_name].annotation is not bool and any(isinstance(one, bool) for one in entries):
            raise ValueError("true and false (to yaml yes, no, on and off as well) are no value for it")
        return value

    @field_validator("*")
    @classmethod
    def _of_reasonable_size(cls, value):
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, int) and one >= 2**31:
                raise ValueError("must be below 2147483648")
            if isinstance(one, str) and (
                len(one) > 1000 or {unicodedata.category(letter) for letter in one} & {"Cc", "Cs"}
            ):
                raise ValueError("must be one line of at most 1000 letters, all of which can be written")
        return value


# Keys of Data and Training that say where films lie or what computes, and change no weight, see `IDENTITY`.
FREE = {"json_schema_extra": {"free": True}}


class Data(_Keys):
    """Which films, and what the models see of them."""

    release: Literal[tuple(RELEASES)] = Field("phantom", description="phantom, phantom_rsna, nih, rsna, digits")
    data_root: str = Field("", description="folder of the release; empty: the study's own, for what it makes", **FREE)
    skip_bad_films: bool = Field(
        False, description="go on without missing or unreadable films (they are listed)", **FREE
    )
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="share of train_val films held out, by patient")
    phantom_films: int = Field(1000, ge=60, description="films of the simulated release")
    phantom_size: int = Field(224, ge=64, le=1024, description="their side, pixels")
    phantom_seed: int = Field(0, ge=0, description="which patients are simulated")
    phantom_floor: float = Field(0.035, ge=0, le=0.1, description="share of films every finding is lifted to")
    phantom_marker: str = Field("", description="a finding whose films carry a burnt-in marker, a planted confounder")
    phantom_prevalence: float = Field(1.0, gt=0, le=1, description="share of the training films' findings that is left")
    image_size: int = Field(66, ge=32, le=1024, description="side of the films that the models see, pixels")
    no_finding_output: bool = Field(True, description="multilabel: 15 outputs with 'No Finding'; False: 14")


class Training(_Keys):
    """How the weights come about, whatever the loss."""

    init: str = Field(
        None, min_length=1, description="imagenet, phantom (other simulated films first), scratch, or a weights file"
    )
    epochs: int = Field(1, ge=1, description="passes over the training films")
    batch_size: int = Field(16, ge=2, description="films per step, all devices together")
    learning_rate: float = Field(1.5e-4, gt=0, description="Adam's, at the start of the cosine")
    weight_decay: float = Field(1e-6, ge=0, description="Adam's L2 term")
    warmup_steps: int = Field(0, ge=0, description="linear warm-up of the learning rate, steps")
    final_learning_rate: float = Field(0.0, ge=0, le=1, description="end of the cosine, as a share of learning_rate")
    gradient_clip: float = Field(0.0, ge=0, description="largest gradient norm; 0: not clipped")
    jitter: float = Field(0.1, ge=0, lt=1, description="brightness and contrast vary by up to this share")
    flip: bool = Field(True, description="training films are mirrored at random")
    augmentation: Literal["paper", "imba"] = Field("paper", description="crop, flip and jitter, or the authors' code")
    shuffle_labels: bool = Field(
        False, description="a control that can learn nothing: label sets dealt out anew among the training films"
    )
    label_noise: bool = Field(
        False, description="labels of the training films are as often wrong as NIH's, see published/nih_label_noise.csv"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 where it is faster")
    gpus: int = Field(1, ge=1, description="GPUs (or CPU processes) of one run; above 1 it runs under torchrun")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:1, mps", **FREE
    )


class Loss(_Keys):
    """Constants of the losses (Khakzar et al., eq. 2)."""

    alpha: float = Field(0.25, ge=0, le=1, description="Focal: weight of the positives")
    gamma: float = Field(2.0, ge=0, description="Focal, CB-Focal: focusing exponent")
    beta: float = Field(0.9999, ge=0, lt=1, description="CB-Focal: base of the effective number of films")
    wbce_scheme: Literal["paper", "pos_weight"] = Field("paper", description="WBCE: N-/N, N+/N, or N-/N+, 1")
    wbce_counts: Literal["train", "batch"] = Field(
        "train", description="WBCE: classes counted over all films or a batch"
    )
    cb_scale: Literal[SCALES] = Field("global", description="CB-Focal: scale of the printed weights")
    loss_factor: float = Field(1.0, gt=0, description="constant in front of the loss")


class Analysis(_Keys):
    """How a trained run is looked at."""

    checkpoint: Literal["best", "last"] = Field("best", description="best validation AUROC, or the last epoch")
    n_replicates: int = Field(300, ge=0, description="bootstrap replicates over patients; 0: no intervals")
    annotated: Literal["test", "all"] = Field("test", description="which films with boxes are analysed")
    cam_method: Literal[tuple(CAM_METHODS)] = Field("cam", description="cam, grad, gradpp, xgrad, hires, layer")
    cam_layer: str = Field(
        "", description="module whose maps CAM reads; empty: the backbone's own, which the head pools"
    )
    token_grid: list[Annotated[int, Field(ge=1)]] = Field(
        [], max_length=2, description="rows and columns of a transformer's tokens in cam_layer"
    )
    dissection_layer: str = Field("", description="module whose maps are dissected; empty: the backbone's own")
    dissection_quantile: float = Field(
        0.0, ge=0, lt=1, description="q, the share of positions above a threshold; 0: the backbone's own"
    )
    concept_reading: Literal["paper", "imba"] = Field(
        "paper", description="concepts as in the paper or the authors' code"
    )
    concept_resolution: Literal["image", "native"] = Field(
        "image", description="components on upsampled or native maps"
    )
    connectivity: Literal[4, 8] = Field(8, description="neighbours of a pixel in a component")
    box_rounding: Literal["outward", "trunc"] = Field("outward", description="box corners to whole pixels")
    # attribution (Nam & Lee)
    chexnet: str = Field("", description="CheXNet checkpoint that 06 explains instead of the run; empty: the run")
    chexnet_train_list: str = Field("", description="films that checkpoint was trained on, to report the others apart")
    chexnet_val_list: str = Field("", description="films that checkpoint was chosen on")
    relevance_init: Literal["one", "logit"] = Field("one", description="relevance starts from 1, or from the logit")
    relevance_batchnorm: Literal["identity", "merge"] = Field(
        "identity", description="BatchNorm passes on, or is merged"
    )
    rap_negative: Literal["paper", "authors_conv"] = Field(
        "paper", description="negative relevance in RAP: eq. 5, or code"
    )
    # integrated feature analysis (Li et al.)
    feature_class: str = Field("", description="class whose maps 07 shows; empty: the marker's, else the task's own")
    perturbation_films: int = Field(0, ge=0, description="films for Score, SS, IS and Smooth Grad++, which are slow")
    principal_share: float = Field(0.05, gt=0, le=1, description="share of the features that count as principal")
    activation_scale: Literal["tanh", "linear"] = Field("tanh", description="function of the common scale")
    activation_bounds: Literal["pixels", "image_extremes"] = Field(
        "pixels", description="what P10 and P90 are taken of"
    )


# Keys of a study that name some of its runs, for a lens that not every run is looked at with.
LENSES = ("attribution", "features", "trunk_and_head")
OF_RUNS = (*LENSES, "more_seeds")  # keys that name runs of the study


class Study(Analysis, Loss, Training, Data):
    """Parameters that all runs of a study share. Field descriptions are the documentation of each key."""

    study: str = Field(
        "demo", pattern=r"^[A-Za-z0-9_]+$", max_length=100, description="name: results go to outputs/<study>/"
    )
    runs: list[Name] = Field(list(GRID), min_length=1, description="the runs of the study, each a file of params/runs")
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(
        [0], min_length=1, description="every run is trained once per seed"
    )
    more_seeds: list[Annotated[str, Field(pattern=r"^[^/]+/seed(0|[1-9]\d{0,8})$")]] = Field(
        [], description="further seeds of single runs, as their folders are called: <run>/seed<k>"
    )
    comparison: bool = Field(True, description="whether 02 to 05 compare the runs, as Khakzar et al. do")
    laboratory: bool = Field(False, description="whether 11 compares this study and its companions, dose by dose")
    attribution: list[Name] = Field([], description="runs that 06 explains by relevance")
    features: list[Name] = Field([], description="runs whose features 07 analyses")
    trunk_and_head: list[Name] = Field([], description="BCE runs; 09 asks where the other losses change them")
    shuffled_study: str = Field(
        "",
        pattern=r"^[A-Za-z0-9_]*$",
        description="the same films learnt with shuffled labels: a control of 05, a study of its own, made before",
    )
    companions: list[Name] = Field([], description="other studies that are made along with this one")

    @model_validator(mode="before")
    @classmethod
    def _init_follows_the_release(cls, values):
        release = values.get("release", "phantom")
        source = RELEASES.get(release) if isinstance(release, str) else None
        return {**values, "init": source.init} if values.get("init") is None and source else values

    @field_validator("runs", *LENSES)
    @classmethod
    def _known_runs(cls, runs):
        for name in runs:
            if not parameter_file("runs", name).is_file():
                known = sorted(path.stem for path in (ROOT / "params" / "runs").glob("*.yaml") if path.is_file())
                raise ValueError(f"no file params/runs/{name}.yaml{nearest(name, known)}")
        return runs

    @field_validator("runs", "seeds", "more_seeds", *LENSES, "companions")
    @classmethod
    def _each_once(cls, values):
        if len(set(values)) < len(values):
            raise ValueError("names an entry twice")
        return values

    @field_validator("token_grid")
    @classmethod
    def _rows_and_columns(cls, grid):
        if len(grid) == 1:
            raise ValueError("takes two numbers, rows and columns, such as [8, 8]; or none: []")
        return grid

    @model_validator(mode="after")
    def _keys_go_together(self):
        lists = RELEASES[self.release].lists
        if self.batch_size % self.gpus or self.batch_size < 2 * self.gpus:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of gpus ({self.gpus}), with at least 2 films for each"
            )
        if lists and not self.data_root:
            raise ValueError(
                f"data_root is empty: name the folder that holds {lists[0]} (-p data_root ..., or make ... "
                "DATA_ROOT=...)"
            )
        if self.label_noise and "multilabel" not in RELEASES[self.release].tasks:
            raise ValueError(f"label_noise is known of NIH's findings, which release {self.release} does not have")
        if self.augmentation == "imba" and not self.flip:
            raise ValueError(
                "augmentation: imba transposes and turns films, so flip: false cannot be kept; use augmentation: paper"
            )
        if other := [name for name in self.trunk_and_head if not name.endswith("-bce")]:
            raise ValueError(f"trunk_and_head names {other[0]}; it names BCE runs, against which 09 sets the others")
        if known := [entry for entry in self.more_seeds if int(entry.rpartition("/seed")[2]) in self.seeds]:
            raise ValueError(f"more_seeds names {known[0]}, which is one of seeds already")
        for key in OF_RUNS:
            if foreign := [name for name in getattr(self, key) if name.partition("/")[0] not in self.runs]:
                raise ValueError(f"{key} names {foreign[0]}, which is none of the study's runs")
        if self.shuffled_study == self.study:
            raise ValueError(f"shuffled_study names {self.study}, which is this study itself")
        if self.study in self.companions:
            raise ValueError(f"companions names {self.study}, which is this study itself")
        if self.phantom_marker:
            _require_class("phantom_marker", self.phantom_marker, _classes("multilabel"))
        if self.feature_class:
            tasks = RELEASES[self.release].tasks
            _require_class("feature_class", self.feature_class, [name for task in tasks for name in _classes(task)])
        return self

    @classmethod
    def build(cls, values, source="the parameters"):
        """Validate `values`; a `ParameterError` names each bad key of `source` in one readable line."""
        try:
            return cls(**values)
        except ValidationError as error:
            lines = []
            for item in error.errors():
                key = ".".join(map(str, item["loc"]))
                if item["type"] == "extra_forbidden":
                    said = key if key.isidentifier() and len(key) < 80 else shown(key)
                    lines.append(f"{said}: no such parameter{nearest(key, cls.model_fields)}")
                else:
                    said = item["msg"].removeprefix("Value error, ")
                    near = nearest(item["input"], _choices(cls, key)) if item["type"] == "literal_error" else ""
                    lines.append(f"{key}: {said}{near}" + (f" (got {shown(item['input'])})" if item["loc"] else ""))
            lines = lines if len(lines) < 6 else [*lines[:5], f"and {len(lines) - 5} more"]
            raise ParameterError(f"{source}: " + "; ".join(line.removeprefix(": ") for line in lines)) from None

    @property
    def folder(self) -> Path:
        """outputs/<study>, or <study> in the folder that the environment variable OUTPUTS names"""
        return ROOT / (os.environ.get("OUTPUTS") or "outputs") / self.study

    @property
    def release_folder(self) -> Path:
        """Where the release lies; for what the study makes itself without a data_root, a folder of its own."""
        return (ROOT / self.data_root).resolve() if self.data_root else self.folder / "release"

    @property
    def chexnet_files(self) -> dict[str, Path]:
        """The files that `chexnet`, `chexnet_train_list` and `chexnet_val_list` name, by these names; no empty ones."""
        named = {key: getattr(self, key) for key in ("chexnet", "chexnet_train_list", "chexnet_val_list")}
        return {key: (ROOT / path).resolve() for key, path in named.items() if path}

    @property
    def store_size(self) -> int:
        """Side of the stored films: a margin of 1/7 over image_size for the random crop (256 for 224)."""
        return round(self.image_size * 8 / 7)

    @property
    def store_folder(self) -> Path:
        """Where the study's uint8 memory map lies."""
        return self.folder / "store" / f"{self.store_size}px"

    @property
    def data_label(self) -> str:
        """What every table and figure says its numbers were measured on."""
        return RELEASES[self.release].label.format(study=self.study)

    @property
    def every_run(self) -> list["Run"]:
        """All runs of the study, each with every seed that it has."""
        return [self.run(name, seed) for name in self.runs for seed in self.seeds_of(name)]

    @property
    def pneumonia_runs(self) -> list["Run"]:
        """Those that 08 asks where they look."""
        return [run for run in self.every_run if run.task == "pneumonia"]

    def seeds_of(self, name: str) -> list[int]:
        """The seeds of a run: those of the study and its own further ones."""
        entries = [entry.rpartition("/seed") for entry in self.more_seeds]
        return [*self.seeds, *(int(seed) for run, _, seed in entries if run == name)]

    def run(self, name, seed=None) -> "Run":
        """The `Run` of this study that params/runs/<name>.yaml describes; by default with the study's first seed."""
        values = load_run(name)
        seed = self.seeds[0] if seed is None else seed
        return Run.build(
            {**self.model_dump(), **values, "seed": seed}, f"params/runs/{name}.yaml on study {self.study}"
        )


class Run(Study):
    """Parameters of one run: a study's, and the four that tell runs apart."""

    task: Literal[TASKS] = Field(
        "multilabel", description="multilabel (15 labels), binary (Unhealthy), pneumonia, digits"
    )
    backbone: Name = Field("tdensenet", description="tdensenet, resnet50, densenet121, vgg16, or any timm name")
    loss: Literal[tuple(LOSSES)] = Field("focal", description="bce, wbce, focal, cb_focal, or one of your own")
    seed: int = Field(0, ge=0, lt=2**31, description="of initialisation, order and augmentation")

    @model_validator(mode="after")
    def _task_suits_release(self):
        if self.task not in RELEASES[self.release].tasks:
            raise ValueError(f"task {self.task} does not go with release {self.release}")
        if self.name in self.features and (self.feature_class or self.phantom_marker):
            _require_class("feature_class", self.selected_class, _classes(self.task, self.no_finding_output))
        return self

    @property
    def name(self) -> str:
        """<task>-<backbone>-<loss>"""
        return f"{self.task}-{self.backbone}-{self.loss}"

    @property
    def run_folder(self) -> Path:
        """outputs/<study>/<run>/seed<k>"""
        return self.folder / self.name / f"seed{self.seed}"

    @property
    def weights_path(self) -> Path:
        """The checkpoint that the analysis reads."""
        return self.run_folder / ("model.safetensors" if self.checkpoint == "best" else "model_last.safetensors")

    @property
    def identity(self) -> dict:
        """The parameters that its weights depend on."""
        return {key: getattr(self, key) for key in IDENTITY}

    @property
    def pretext(self) -> "Run":
        """The run that `init: phantom` starts from: all labels, BCE, on the patients of params/studies/pretext.yaml."""
        keys = ("image_size", "device", "precision", "backbone")
        own = {"study": f"{PRETEXT}{self.image_size}px", "task": "multilabel", "loss": "bce"}
        study = load(ROOT / "params" / "studies" / "pretext.yaml")
        return Run.build({**study, **{key: getattr(self, key) for key in keys}, **own}, "params/studies/pretext.yaml")

    @property
    def init_path(self) -> Path | None:
        """The file of the initial weights, where `init` means one."""
        if self.init == "phantom":
            return self.pretext.weights_path
        return None if self.init in ("imagenet", "scratch") else (ROOT / self.init).resolve()

    @property
    def siblings(self) -> list["Run"]:
        """The study's runs of this one's task, backbone and seed, and this one: they differ in the loss alone."""
        stem = self.name.rpartition("-")[0]
        names = [name for name in dict.fromkeys([*self.runs, self.name]) if name.rpartition("-")[0] == stem]
        names = [name for name in names if name == self.name or self.seed in self.seeds_of(name)]
        return [self if name == self.name else self.run(name, self.seed) for name in names]

    @property
    def n_outputs(self) -> int:
        """Logits: 1 for the binary and pneumonia tasks, 10 for digits, else 15, or 14 without 'No Finding'."""
        return {"multilabel": 14 + self.no_finding_output, "digits": 10}.get(self.task, 1)

    @property
    def selected_class(self) -> str:
        """The class whose maps 07 shows."""
        marked = self.phantom_marker if self.task == "multilabel" else ""
        return self.feature_class or marked or {"binary": "Unhealthy", "digits": "7"}.get(self.task, "Pneumonia")


def identity_keys(*parts: type[BaseModel]) -> tuple[str, ...]:
    """The keys of these classes that weights depend on: all but the free, so that a new one cannot be forgotten."""
    fields = {key: part.model_fields[key] for part in parts for key in part.__annotations__}
    return tuple(key for key, field in fields.items() if not (field.json_schema_extra or {}).get("free"))


# A trained run stands only while all of these stand unchanged.
IDENTITY = identity_keys(Run, Data, Training, Loss)


def _choices(model, key):
    return getattr(model.model_fields[key].annotation, "__args__", ())


def _classes(task, no_finding=True):
    from lib.data.release import CLASSES, DIGITS, task_targets  # pandas, which few parameters need

    targets = np.empty((0, len(DIGITS if task == "digits" else CLASSES)), np.uint8)
    return task_targets(targets, task, no_finding)[1]


def _require_class(key, name, classes):
    if name not in classes:
        known = ", ".join(dict.fromkeys(classes))
        raise ValueError(f"{key}: there is no class {shown(name)} to look at{nearest(name, classes)} ({known})")


def parameter_file(kind: Literal["studies", "runs"], name: str) -> Path:
    """params/<kind>/<name>.yaml; ParameterError where `name` is none."""
    try:
        return ROOT / "params" / kind / f"{_plain(name)}.yaml"
    except ValueError as error:
        raise ParameterError(f"{shown(name)} names no file of params/{kind}: {error}") from None


def load_run(name: str) -> dict:
    """What params/runs/<name>.yaml says; ParameterError, too, where that is a study's to say."""
    path = parameter_file("runs", name)
    values = load(path)
    if foreign := [key for key in values if key in Study.__annotations__ or key == "seed"]:
        raise ParameterError(f"{path}: {foreign[0]} is for a study's file to say (seed: its seeds); remove it here")
    return values


def overlaid(said: dict, given: dict) -> dict:
    """What is `given` on top of what a file says; where fewer runs are given, fewer are left to look at."""
    if not isinstance(given.get("runs"), (list, tuple)):  # absent, or refused later
        return {**said, **given}
    lists = {key: said[key] for key in OF_RUNS if isinstance(said.get(key), list)}
    fewer = {key: [run for run in runs if str(run).partition("/")[0] in given["runs"]] for key, runs in lists.items()}
    return {**said, **fewer, **given}


def load_study(name, **overrides):
    """The validated `Study` of params/studies/<name>.yaml, and each of its runs validated with it.

    `overrides` are keys given on the command line, which win over the file.
    """
    path = parameter_file("studies", name)
    if name.startswith(PRETEXT):
        raise ParameterError(f"{path}: {RESERVED}")
    values = overlaid(load(path), overrides)
    study = Study.build(values, f"params/studies/{name}.yaml")
    if study.study != name:
        raise ParameterError(f"{path}: its key study says {study.study!r}; it must be the file's own name")
    named = [("companions", other) for other in study.companions]
    for key, other in [*named, *([("shuffled_study", study.shuffled_study)] if study.shuffled_study else [])]:
        if not parameter_file("studies", other).is_file():
            raise ParameterError(f"{path}: {key} names {other}, but there is no file params/studies/{other}.yaml")
    for run_name in study.runs:
        run = study.run(run_name)
        if run.name != run_name:
            raise ParameterError(
                f"params/runs/{run_name}.yaml: describes {run.name}; the file's name must be <task>-<backbone>-<loss>"
            )
    return study


if __name__ == "__main__":
    try:
        if len(sys.argv) != 2:
            raise ParameterError("python -m lib.params STUDY: name one study, a file of params/studies without .yaml")
        print(f"{sys.argv[1]}: {len(load_study(sys.argv[1]).runs)} runs, parameters valid")
    except ParameterError as error:
        sys.exit(str(error))
