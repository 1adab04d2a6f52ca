"""What `make study` is told, by environment variables, what must stand before Snakemake plans any work, and what each
job needs.
"""

import fnmatch
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.data import RELEASES
from lib.flat_yaml import ParameterError
from lib.locks import try_lock
from lib.params import LENSES, OF_RUNS, ROOT, Run, Study, load_study

# For awk: what a failed notebook ends with, without papermill's own traceback above it; any other traceback is shown
# whole.
ITS_ERROR = r"""/^Traceback/ {held = !told} held && /^Exception encountered at/ {held = 0; told = 1; next}
held {text = text $0 "\n"; next} NF {print}
END {if (told) print "The notebook, as far as it came: " ENVIRON["notebook"]; else printf "%s", text}"""


def check_name(key: str, folder: str) -> None:
    """Raise a `ParameterError` where Snakemake, papermill or a shell would read more than a folder's name."""
    if re.search(r"^[~-]|[{}\x00-\x1f\x7f\ud800-\udfff]", folder):
        raise ParameterError(
            f"{key}={folder!a}: name a folder without ~ or - in front, braces, control characters or broken text"
        )


def told(environ: Mapping[str, str]) -> tuple[str, dict[str, str | list[str]]]:
    """The folder of all results, from `OUTPUTS`, and the keys of the study that `DATA_ROOT` and `RUNS` set, if any.

    A DATA_ROOT is relative to the working directory; RUNS are names between blanks.

    Raises
    ------
    ParameterError
        A folder's name that is more than that, see `check_name`.
    """
    # Not every shell knows a ~ within a word of make's.
    root, outputs = os.path.expanduser(environ.get("DATA_ROOT", "")), environ.get("OUTPUTS") or "outputs"
    check_name("DATA_ROOT", root)
    check_name("OUTPUTS", outputs)
    keys = {"data_root": root and os.path.abspath(root), "runs": environ.get("RUNS", "").split()}
    return str(Path(outputs)), {key: value for key, value in keys.items() if value}


def jobs_of(study: Study) -> Iterator[tuple[str, str, int]]:
    """What is to be made for a study: a rule of the Snakefile, and of a rule for runs the run and its seed ('' and 0
    else). The further seeds of a run are analysed as its first."""
    asked = study.pneumonia_runs
    compared = study.comparison * study.runs
    whole = {"data": True, "figures": compared, "intention": asked, "chexnet": study.chexnet and not asked}
    whole |= {"explore": compared, "laboratory": study.laboratory}
    yield from ((rule, "", 0) for rule, wanted in whole.items() if wanted)
    trained = dict.fromkeys(
        [*compared, *(run.name for run in asked), *(run for key in LENSES for run in getattr(study, key))]
    )
    each = {"train": trained, **dict.fromkeys(("metrics", "cam_alignment", "dissection"), compared)}
    yield from ((rule, run, seed) for rule, runs in each.items() for run in runs for seed in study.seeds_of(run))
    some = {key: getattr(study, key) for key in LENSES if key != "trunk_and_head"}
    yield from ((rule, run, seed) for rule, runs in some.items() for run in runs for seed in study.seeds_of(run))
    changed = [study.run(run, seed) for run in study.trunk_and_head for seed in study.seeds_of(run)]
    # Where fewer runs or seeds are asked for, a BCE run may be left alone.
    yield from (("trunk_and_head", run.name, run.seed) for run in changed if len(run.siblings) > 1)


def check_releases(studies: Iterable[Study]) -> None:
    """Look whether the folder of each study's release is there, and in it the first of its lists.

    Raises
    ------
    ParameterError
        One is not: said here within seconds, by the first notebook after half a minute.
    """
    for study in studies:
        lists, root = RELEASES[study.release].lists, study.release_folder
        check_name("data_root", str(root))
        try:
            names = [name.lower() for name in os.listdir(root)] if lists else []
        except OSError:
            names = None
        if lists and not fnmatch.filter(names or [], lists[0].lower()):
            fault = "is not a folder that can be read" if names is None else f"holds no {lists[0]}"
            raise ParameterError(f"data_root of study {study.study}: {root} {fault}; name another with DATA_ROOT=")


def hold_outputs(outputs: str, studies: Iterable[str]) -> list[int]:
    """Make the folder of all results, and take the lock of each study in it.

    The kernel keeps the locks, so they go with this process however that ends; Snakemake's own would outlive a kill.

    Returns
    -------
    list of int
        File descriptors that hold the locks until this process ends.

    Raises
    ------
    ParameterError
        A folder that cannot be written, or a study that is being run already.
    """
    held = []
    for study in sorted(studies):
        try:
            Path(outputs).mkdir(parents=True, exist_ok=True)
            lock = try_lock(Path(outputs, f".{study}.lock"))
        except OSError as error:
            fault = "it is no folder" if isinstance(error, FileExistsError) else error.strerror
            raise ParameterError(
                f"OUTPUTS={outputs}: results cannot be written there ({fault}): name another folder"
            ) from None
        if lock is None:
            raise ParameterError(f"Study {study} is being run already: wait for it, or stop it first.")
        held.append(lock)
    return held


@dataclass(frozen=True)
class Call:
    """What one call of Snakemake makes.

    Its methods take a job's wildcards as Snakemake passes them: an object whose attributes `study`, `run` and `seed`
    are texts, as far as the job has them, with `items()`.

    Attributes
    ----------
    outputs : str
        Folder of all results.
    said : dict
        Keys of the main study that were set from outside, see `told`.
    studies : dict of str to Study
        The main study, and behind it those that are made along with it.
    no_gpus : bool
        Whether it was said that there are none.
    """

    outputs: str
    said: dict[str, str | list[str]]
    studies: dict[str, Study]
    no_gpus: bool = False

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "Call":
        """From the variables `STUDY` (else the demo), `OUTPUTS`, `DATA_ROOT`, `RUNS` and `GPUS` (0: none); a
        `ParameterError` as `told`, `load_study` and `check_releases` raise it."""
        outputs, said = told(environ)
        main = load_study(environ.get("STUDY", "demo"), **said)
        companions = {} if "runs" in said else {name: load_study(name) for name in main.companions}
        check_releases([main, *companions.values()])
        return cls(outputs, said, {main.study: main, **companions}, environ.get("GPUS") == "0")

    @property
    def main(self) -> Study:
        """The study that was asked for."""
        return next(iter(self.studies.values()))

    @property
    def first(self) -> Run:
        """The run that the main study's pictures begin with: the one that notebooks open unless they are told
        otherwise, where the study has it."""
        default = "-".join(Run.model_fields[key].default for key in ("task", "backbone", "loss"))
        return self.main.run(default if default in self.main.runs else self.main.runs[0])

    def leads_to_first(self, wildcards: Any) -> bool:
        """Whether a job is of the first run, or of its study or its pretext, as far as its wildcards say."""
        run = self.first
        names = {"study": run.study, "run": run.name, "seed": run.seed}
        names |= {"size": run.image_size, "backbone": run.backbone}
        return all(str(names[key]) == value for key, value in wildcards.items())

    def given(self, wildcards: Any) -> str:
        """Arguments of papermill: a study's file, a run's, and what was said of the main study, quoted for a shell."""
        main, keys = self.main, dict(wildcards.items())
        own = self.said if keys["study"] == main.study else {}
        words = ["-f", f"params/studies/{keys['study']}.yaml"]
        words += ["-p", "data_root", main.data_root] if "data_root" in own else []
        for key in ("runs", *OF_RUNS) if "runs" in own else ():
            words += ["-y", f"{key}: [{', '.join(getattr(main, key))}]"]
        if "run" in keys:
            words += ["-f", f"params/runs/{keys['run']}.yaml", "-p", "seed", keys["seed"]]
        return shlex.join(words)

    def files_of(self, runs: Iterable[Run], *names: str) -> list[str]:
        """These files of these runs, below `outputs`."""
        folders = [f"{self.outputs}/{run.study}/{run.name}/seed{run.seed}" for run in runs]
        return [f"{folder}/{name}" for folder in folders for name in names]

    def every(self, study: str, *names: str) -> list[str]:
        """These files of every run of a study."""
        return self.files_of(self.studies[study].every_run, *names)

    def siblings(self, wildcards: Any) -> list[str]:
        """Models that differ from a run in the loss alone: 07 and 09 compare them."""
        run = self.studies[wildcards.study].run(wildcards.run, wildcards.seed)
        return self.files_of(run.siblings, "run.json")

    def initial_weights(self, wildcards: Any) -> list[str]:
        """The model that a run starts from, where `init` is 'phantom'."""
        run = self.studies[wildcards.study].run(wildcards.run)
        return self.files_of([run.pretext], "run.json") if run.init == "phantom" else []

    def release_lists(self, wildcards: Any) -> list[str]:
        """The lists of a real release, so that films are read again where one has changed."""
        study = self.studies[wildcards.study]
        folder, patterns = Path(study.data_root), RELEASES[study.release].lists
        return [str(path) for pattern in patterns for path in sorted(folder.glob(pattern))]

    def chexnet_files(self, wildcards: Any) -> list[str]:
        """The checkpoint of CheXNet's that a study names, and the lists that belong to it."""
        return [str(path) for path in self.studies[wildcards.study].chexnet_files.values()]

    def gpus(self, wildcards: Any, of: int = 1) -> int:
        """How many GPUs a job asks for: `of`, or none where there are none or the study's `device` is another."""
        study = self.studies.get(dict(wildcards.items()).get("study"), self.main)
        return 0 if self.no_gpus or study.device in ("cpu", "mps") else of

    def to_open(self) -> str:
        """What there is to look at by now, in a sentence: the pages, a picture and a notebook; empty where there is
        nothing yet."""
        folder, (run,) = f"{self.outputs}/{self.main.study}/", self.files_of([self.first], "")
        pictures = (
            f"{folder}figures/{name}.png" for name in ("fig1a_cams_multilabel", "fig1b_cams_binary", "fig_shares")
        )
        notebooks = (f"{folder}{name}.ipynb" for name in ("05_figures", "08_intention", "11_laboratory"))
        choices = [[f"{folder}report.html"], [f"{folder}explore.html"], [*pictures, f"{run}fig_cams.png"]]
        choices += [[*notebooks, f"{run}03_cam_alignment.ipynb", f"{run}01_train.ipynb"]]
        there = [next(filter(os.path.isfile, (ROOT / path for path in paths)), None) for paths in choices]
        return f"Open {', '.join(os.path.relpath(path) for path in there if path)}" if any(there) else ""
