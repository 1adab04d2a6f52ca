"""What `make study` is told, by environment variables, and what must stand before Snakemake plans any work."""

import fnmatch
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from lib.data import RELEASES
from lib.flat_yaml import ParameterError
from lib.locks import try_lock
from lib.params import LENSES, Study


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
    whole |= {"laboratory": study.laboratory}
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
