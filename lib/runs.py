"""The door: a notebook's parameters in, an opened run or study out, with its films, its model and what they say of it.

`open_run` and `open_study` check every parameter before anything else happens.
"""

import ast
import os
import sys
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
from tqdm import tqdm

import lib.light_torchvision  # noqa: F401  before zennit, which imports torchvision
from lib.analysis.alignment import pair_cams
from lib.analysis.inference import LensError, Output, stream
from lib.analysis.pairs import box_pairs
from lib.analysis.relevance.rules import RelevanceError
from lib.data import RELEASES, open_data
from lib.data.batches import evaluation_batches
from lib.data.decoding import read_films
from lib.data.nih import read_names
from lib.data.release import UNHEALTHY, ReleaseError, film_boxes, task_boxes, task_targets
from lib.data.store import StoreError
from lib.devices import DeviceError, choose_device
from lib.flat_yaml import ParameterError, load, nearest, shown
from lib.models import (
    CHEXNET_CLASSES,
    Classifier,
    ModelError,
    build_model,
    check_backbone,
    layers,
    load_chexnet,
    load_model,
    select_output,
)
from lib.params import IDENTITY, PRETEXT, RESERVED, ROOT, Analysis, Run, Study, load_run, overlaid, parameter_file
from lib.records import RecordError
from lib.state import TrainingError, is_trained, labels_digest, require_trained, verify_weights

# What is refused with a sentence of its own. A notebook shows that sentence, and no traceback above it.
REFUSALS = (
    *(ParameterError, ReleaseError, StoreError, RecordError),
    *(DeviceError, ModelError, TrainingError, LensError, RelevanceError),
)


# ---- opening


def open_run(given: Mapping, *, trained: bool = True, chexnet: bool = False) -> "Subject":
    """Open the run that a notebook's parameters name.

    Parameters
    ----------
    given : mapping
        The notebook's `globals()`, right after its parameters cell: every plain variable is a parameter, so that a
        misspelt one, of which papermill only warns, is an error. None means: as the study's file says.
    trained : bool
        Whether the run must be trained already.
    chexnet : bool
        Whether the checkpoint that the parameter `chexnet` names takes the run's place.

    Raises
    ------
    ParameterError
        An unknown key (the nearest right one is named), a value out of range, a study that does not exist, code among
        the parameters, or a kernel in which the notebook has run before.
    ModelError
        An unknown backbone, or a file of CheXNet's that a parameter names and that is not there.
    TrainingError
        The run is not trained, or was trained with other parameters.
    """
    run, changed = _parameters(given, Run)
    check_backbone(run.backbone)
    if chexnet and run.chexnet:
        require_files(run.chexnet_files)
        return CheXNet(run, OpenStudy(run, changed))
    if trained:
        require_trained(run)
    return Subject(run, OpenStudy(run, changed))


def open_study(given: Mapping) -> "OpenStudy":
    """Open the study that a notebook's parameters name; arguments and errors as in `open_run`."""
    return OpenStudy(*_parameters(given, Study))


def require_files(files: Mapping[str, Path]) -> None:
    """ModelError where one of the files that parameters name, by these keys, is not there."""
    for key, path in files.items():
        if not os.path.isfile(path):
            raise ModelError(f"{key}: there is no file {path}")


def _parameters(given, model):
    """The parameters, and those of them that were given and differ from what the study's file says."""
    _refuse_in_one_line()
    _refuse_code(given.get("In", ()))
    shell = {"In", "Out", "exit", "quit", "get_ipython"}
    values = {
        key: value
        for key, value in given.items()
        if not key.startswith("_") and key not in shell and not callable(value) and not isinstance(value, ModuleType)
    }
    # A kernel keeps the names of its first opening: at a second one, what is no key of a study may be a result.
    if known := given.get("_parameters"):
        values = {key: value for key, value in values.items() if key in known or key in model.model_fields}
    results = [
        key for key, value in values.items() if not isinstance(value, (str, int, float, list, tuple, dict, type(None)))
    ]
    if results:
        raise ParameterError(
            f"{', '.join(results[:3])}: no plain values, so this kernel has run the notebook before and parameters "
            "cannot be told from results. Restart the kernel and run all cells"
        )
    given["_parameters"] = set(values)
    values = {key: value for key, value in values.items() if value is not None}
    name = values.get("study", model.model_fields["study"].default)
    file = parameter_file("studies", name)
    if file.is_file():
        said = load(file)
    elif "release" in values:  # a study of the command line alone: nothing says otherwise
        said = {key: value for key, value in values.items() if key not in Analysis.model_fields}
    else:
        known = sorted(path.stem for path in file.parent.glob("*.yaml"))
        raise ParameterError(
            f"study: there is no params/studies/{name}.yaml{nearest(name, known)} (a study without a file of its own "
            "must name its release: -p release ...)"
        )
    default = {key: field.default for key, field in model.model_fields.items()}
    if model is Run:  # what its own file says besides what it is, such as the layer of a transformer
        run = "-".join(str({**default, **said, **values}[key]) for key in ("task", "backbone", "loss"))
        known = {path.stem for path in (ROOT / "params" / "runs").glob("*.yaml")}
        said = {**said, **load_run(run)} if run in known else said
    parameters = model.build(overlaid(said, values))
    if parameters.study.startswith(PRETEXT) and not _is_pretext(parameters):
        raise ParameterError(f"study: {RESERVED}")
    said = {key: said.get(key, default[key]) for key in values}  # a number may be given, or said, as text
    changed = {key for key, value in values.items() if said[key] not in (value, getattr(parameters, key))}
    return parameters, changed


def _is_pretext(parameters):
    """Whether these are the parameters of what `init: phantom` starts from."""
    pretext = Run.build(parameters.model_dump()).pretext
    keys = {"study", *IDENTITY} & type(parameters).model_fields.keys()
    return all(getattr(parameters, key) == getattr(pretext, key) for key in keys)


def _refuse_code(cells):
    """papermill pastes the keys of a parameter file into a cell as they are, so a key may be code. By now it has run:
    all that can be done is to say so."""
    plain = (ast.Assign, ast.AnnAssign, ast.Name, ast.Constant, ast.List, ast.Tuple, ast.Dict, ast.UnaryOp, ast.BinOp)
    injected = [ast.parse(cell) for cell in cells if cell.startswith("# Parameters\n")][-1:]
    for node in (node for cell in injected for node in ast.walk(cell) if isinstance(node, (ast.stmt, ast.expr))):
        number = isinstance(node, ast.Call) and ast.unparse(node.func) == "float"  # float('nan')
        if not isinstance(node, plain) and not number:
            raise ParameterError(
                f"papermill was given parameters that hold code, and it has run: {shown(ast.unparse(node))}. Read the "
                "parameter file before anything else, and restart the kernel"
            )


def _refuse_in_one_line():
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell:
        shell.set_custom_exc(
            REFUSALS, lambda self, kind, error, *_, **__: self._showtraceback(kind, error, [str(error)])
        )


class OpenStudy:
    """A study and its films, which are read when they are first asked for.

    Attributes
    ----------
    study : lib.params.Study
    release : lib.data.release.Release
    store : lib.data.store.Store
        Its films, row by row.
    films : DataFrame
        The release's; the index is the row in the store.
    label : str
        What every table and figure says its numbers were measured on.
    interval : str
        How intervals are made, for captions.
    exact : bool
        Whether the pixels of every lesion, lung and marker are known.
    """

    def __init__(self, study: Study, changed: set[str] = frozenset()):
        self.study, self.changed = study, changed
        self.label, self.exact = study.data_label, RELEASES[study.release].exact
        self.interval = f"percentile bootstrap over patients, {study.n_replicates} replicates"

    @cached_property
    def _data(self):
        return open_data(self.study)

    release = property(lambda self: self._data[0])
    store = property(lambda self: self._data[1])
    films = property(lambda self: self.release.films)

    def rows(self, split: str) -> np.ndarray:
        """Rows of the films of 'train', 'val' or 'test', or of 'all'."""
        return self.store.rows(split)

    def images(self, rows, size: int = 256) -> np.ndarray:
        """Films to look at, straight from their files, uint8 (N, size, size)."""
        return read_films(self.films.loc[rows, "path"], size)

    def truth(self, what: str, rows) -> list:
        """What is known of simulated films to the pixel: 'lesions' (a mask a finding), 'lungs' or 'marker', film by
        film; see the functions of `data.phantom.films`."""
        from lib.data.phantom import films

        read = {"lesions": films.read_lesion_masks, "lungs": films.read_lung_mask, "marker": films.read_marker_mask}
        return [read[what](self.study.release_folder, image) for image in self.films.loc[rows, "image"]]

    def subject(self, run: Run | str) -> "Subject":
        """A run of this study on the films that are open already; by name with the first seed."""
        return Subject(self.study.run(run) if isinstance(run, str) else run, self)

    def cams_by_loss(
        self, task: str, backbone: str, losses: list[str], images: pd.DataFrame, size: int = 256
    ) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
        """What the runs of every loss see in the same pairs; the first seed of each.

        Parameters
        ----------
        images : DataFrame
            image, class: pairs that have boxes. For the binary task its only class stands for every class.

        Returns
        -------
        pairs : DataFrame
            Of `analysis.pairs.box_pairs`, P rows.
        maps : float (P, losses, size, size)
            See `analysis.alignment.pair_cams`; NaN for a loss without a run.
        probabilities : float (P, losses)
        """
        subjects = {
            loss: self.subject(name) for loss in losses if (name := f"{task}-{backbone}-{loss}") in self.study.runs
        }
        one = next(iter(subjects.values()))
        wanted = images[["image", "class"]]
        if len(one.classes) == 1:
            wanted = wanted.assign(**{"class": one.classes[0]})
        pairs = wanted.drop_duplicates().merge(box_pairs(self.films, one.boxes, one.classes), on=["image", "class"])
        maps = np.full((len(pairs), len(losses), size, size), np.nan)
        probabilities = np.full((len(pairs), len(losses)), np.nan)
        for loss, subject in subjects.items():
            outputs, column = subject.outputs(pairs["row"].unique(), subject.layer, batch_size=8), losses.index(loss)
            options = {"layer": subject.layer, "size": size, "method": subject.run.cam_method}
            maps[:, column], probabilities[:, column] = pair_cams(outputs, pairs, subject.model.head, **options)
        return pairs, maps, probabilities

    def beside(self, folder: Path) -> Path:
        """`folder`; where options of a lens differ from the study's, a folder there that is named by them."""
        lens = Analysis.model_fields.keys() - {"chexnet", "chexnet_train_list", "chexnet_val_list"}  # has its own
        changed = sorted(self.changed & lens)
        return folder / "-".join(_said(self.study, key) for key in changed) if changed else folder

    def path(self, name: str) -> Path:
        """Where a result of the whole study goes; of a lens with other options see `beside`."""
        return self.beside(self.study.folder) / name

    def _repr_markdown_(self):
        study = self.study
        counts = sorted({len(study.seeds_of(name)) for name in study.runs})
        seeds = f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} seed{'s' if counts != [1] else ''}"
        return (
            f"Study **{study.study}**: {len(study.runs)} runs, {seeds} each, films of {study.image_size} px. "
            f"{self.label}.{_differences(study, self.changed)}"
        )


class Subject:
    """An opened run: what a lens looks at. Model and films are loaded when they are first asked for.

    Attributes
    ----------
    run : lib.params.Run
    data : OpenStudy
        Its `release`, `store`, `films`, `label`, `interval`, `exact`, `rows` and `images` are also the subject's own.
    model : lib.models.Classifier
        Trained, on `device`, in evaluation mode.
    layer : str
        The one whose maps CAM reads.
    targets : uint8 (N, C)
        Of all films, for the run's task.
    classes : list of str
    boxes : DataFrame
        image, class, x1, y1, x2, y2 in pixels of the films that the model sees.
    """

    lists = None  # of films that a model from elsewhere was made with, see `CheXNet`

    def __init__(self, run: Run, data: OpenStudy):
        self.run, self.data = run, data
        self.name, self.task = run.name, run.task
        self.label, self.interval, self.exact = data.label, data.interval, data.exact
        self.device = choose_device(run.device)
        self.folder = data.beside(run.run_folder)

    release = property(lambda self: self.data.release)
    store = property(lambda self: self.data.store)
    films = property(lambda self: self.data.films)
    targets = property(lambda self: self._task[0])
    classes = property(lambda self: self._task[1])

    def rows(self, split: str) -> np.ndarray:
        """See `OpenStudy.rows`."""
        return self.data.rows(split)

    def images(self, rows, size: int = 256) -> np.ndarray:
        """See `OpenStudy.images`."""
        return self.data.images(rows, size)

    @cached_property
    def _task(self):
        return task_targets(self.release.targets, self.task, self.run.no_finding_output)

    @cached_property
    def model(self) -> Classifier:
        record = require_trained(self.run)
        if labels_digest(self.films) != record["identity"].get("labels"):
            raise TrainingError(
                f"{self.run.run_folder}: trained with other films, labels or splits than {self.release.root} has. Run "
                "01_train with these films first, in a study of their own"
            )
        verify_weights(self.run, self.run.weights_path.name)
        return load_model(self.run.weights_path, self.run.backbone, self.run.n_outputs).to(self.device)

    @cached_property
    def untrained(self) -> "Subject":
        """The same network with weights as they are drawn, before any training, pretraining included: a control.

        From another seed than the run's: the very weights that a run started from are still seen in its own.
        """
        other = type(self)(self.run, self.data)
        other.model = build_model(*self._architecture, seed=self.run.seed + 2**31).to(self.device).eval()
        return other

    @property
    def _architecture(self):
        return self.run.backbone, self.run.n_outputs

    @cached_property
    def layer(self) -> str:
        return self.run.cam_layer or layers(self.run.backbone)[0]

    @cached_property
    def dissection(self) -> tuple[str, float]:
        """The layer that is dissected, and q."""
        _, layer, q = layers(self.run.backbone)
        return self.run.dissection_layer or layer, self.run.dissection_quantile or q

    @cached_property
    def boxes(self) -> pd.DataFrame:
        return film_boxes(task_boxes(self.release.boxes, self.task), self.run.image_size)

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """Every (film, class) with boxes among the films that `annotated` says, see `analysis.pairs.box_pairs`."""
        pairs = box_pairs(self.films.loc[self.rows(self.run.annotated)], self.boxes, self.classes)
        if not len(pairs):
            raise ReleaseError(
                f"{self.release.root}: no film of split {self.run.annotated} has a box of "
                f"{', '.join(self.classes)}; see the release's list of boxes, and the parameter annotated"
            )
        return pairs

    @cached_property
    def regions(self) -> pd.DataFrame:
        """The annotated films with their boxes of every class together, as one pair a film."""
        films, boxes = self.films.loc[self.rows(self.run.annotated)], task_boxes(self.release.boxes, "binary")
        return box_pairs(films, film_boxes(boxes, self.run.image_size), [UNHEALTHY])

    def batches(self, rows, batch_size: int | None = None) -> Iterator:
        """Whole films in order, as the model sees them, on its device; by default in batches of `batch_size`. A bar is
        shown where they take more than ten seconds."""
        rows, size = np.asarray(rows), batch_size or self.run.batch_size
        options = {"image_size": self.run.image_size, "batch_size": size, "device": self.device}
        batches = evaluation_batches(self.store, rows, self.targets, **options)
        bar = {"unit": "batch", "delay": 10, "mininterval": 5, "ascii": True, "leave": False}
        return iter(tqdm(batches, self.name, -(-len(rows) // size), file=sys.stdout, **bar))

    def outputs(self, rows, *layers: str, batch_size: int | None = None) -> Iterator[Output]:
        """One forward pass over the films: logits and the maps of `layers`, see `analysis.inference.stream`."""
        return stream(self.model, self.batches(rows, batch_size), list(layers))

    @cached_property
    def siblings(self) -> dict[str, "Subject"]:
        """The trained runs that differ from this one in the loss alone, by loss; this one is among them."""
        others = {run.loss: self if run == self.run else Subject(run, self.data) for run in self.run.siblings}
        return {loss: other for loss, other in others.items() if is_trained(other.run)}

    def path(self, name: str) -> Path:
        """Where a result goes: the run's folder; with other options than the study's, a folder there named by them."""
        return self.folder / name

    def _repr_markdown_(self):
        run = self.run
        if self.origin:
            films = f"{len(self.films):,} films of {run.image_size} px, {len(self.rows('test')):,} of them test films"
            what = f"{films}; {self.origin}; CAM reads `{self.layer}`"
        else:
            batches = f"{run.epochs} epochs of batches of {run.batch_size} at {run.image_size} px"
            what = f"to be trained, {batches}, from init {run.init}"
        differs = _differences(run, self.data.changed)
        beside = self.data.beside(Path())
        differs += f" Results go to `{beside}/`." if beside != Path() else ""
        return f"**{self.name}**, seed {run.seed}, study {run.study}: {what}. {self.label}.{differs}"

    @property
    def origin(self) -> str:
        """Where the weights come from, in words; empty where there are none yet."""
        return f"weights of the {self.run.checkpoint} epoch" if is_trained(self.run) else ""


class CheXNet(Subject):
    """The public CheXNet checkpoint in the place of a run: its own classes, on the films of the study."""

    classes, origin = list(CHEXNET_CLASSES), "the public checkpoint"

    def __init__(self, run: Run, data: OpenStudy):
        super().__init__(run, data)
        self.name, self.task, self.folder = "CheXNet", "multilabel", data.beside(run.folder / "chexnet")
        self.layer = layers("densenet121")[0]

    _architecture = "densenet121", len(CHEXNET_CLASSES)

    @cached_property
    def model(self) -> Classifier:
        return load_chexnet(self.run.chexnet_files["chexnet"]).to(self.device)

    @cached_property
    def targets(self) -> np.ndarray:
        """Of its own classes, in its order."""
        return self.release.targets[:, [self.release.classes.index(name) for name in self.classes]]

    @cached_property
    def pneumonia(self) -> Classifier:
        """The same with its logit of pneumonia alone."""
        return select_output(self.model, self.classes.index("Pneumonia"))

    @cached_property
    def lists(self) -> dict[str, set[str]]:
        """Names of the films that it was trained and chosen on, as far as parameters name the lists."""
        files = {key: path for key, path in self.run.chexnet_files.items() if key != "chexnet"}
        return {key: read_names(path, self.films["image"]) for key, path in files.items()}


def _said(parameters, key):
    value = getattr(parameters, key)
    value = "x".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{key}={''.join(letter if letter.isalnum() or letter in '._' else '_' for letter in value) or 'own'}"


def _differences(parameters, changed):
    """What differs from the defaults, in words: what the study's file says, and what was given on top of it."""
    named = {
        *Run.__annotations__,
        *"study runs seeds release data_root companions attribution features trunk_and_head".split(),
    }
    default = {key: field.default for key, field in type(parameters).model_fields.items()}
    default["init"] = RELEASES[parameters.release].init
    other = {key for key in default if getattr(parameters, key) != default[key]} - named
    parts = (("Other than by default", other - changed), ("Other than the study's file says", changed - named))
    return "".join(
        f" {text}: {', '.join(f'{key} {getattr(parameters, key)}' for key in sorted(keys))}."
        for text, keys in parts
        if keys
    )
