"""What is checked before a study starts its work, so that hours of decoding do not end in a missing file, and what can
be checked afterwards: `python -m lib.preflight STUDY` reads again what the study has stored and trained.
"""

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from lib.data.store import verify_folder
from lib.flat_yaml import ParameterError
from lib.locks import SPARE_BYTES
from lib.models import build_model, load_chexnet
from lib.params import Run, Study, load_study
from lib.records import RecordError, read_json
from lib.runs import REFUSALS, require_files
from lib.state import verify_weights


def check_before_work(studies: Iterable[Study]) -> None:
    """Read the checkpoints and look for the files that the studies name, build every model that their runs start from,
    and write to the disk of the results.

    Only a model that is downloaded or has named layers is made whole; of the others the shapes alone.

    Raises
    ------
    ValueError
        An unknown backbone, a layer that its model does not have, or a folder where no results can be written.
    RuntimeError
        A file that is not there, weights that cannot be downloaded, or weights that do not fit.
    """
    socket.setdefaulttimeout(60)  # else a download that hangs never ends
    studies = list(studies)
    for study in studies:
        require_files(study.chexnet_files)
        if study.chexnet:
            load_chexnet(study.chexnet_files["chexnet"])
    every = [run for study in studies for run in study.every_run]
    paths = [run.init_path for run in every]  # where init is phantom, this checks params/studies/pretext.yaml as well
    starts = ["scratch" if run.init == "phantom" else str(path or run.init) for run, path in zip(every, paths)]
    kinds = {(run.backbone, init, run.cam_layer, run.dissection_layer) for run, init in zip(every, starts)}
    for backbone, init, *layers in sorted(kinds):
        with torch.device("meta" if init == "scratch" else "cpu"):
            model = build_model(backbone, 1, init)
        unknown = [layer for layer in layers if layer and layer not in dict(model.named_modules())]
        if unknown:
            raise ValueError(f"{backbone} has no module {unknown[0]}: see the names of model.named_modules()")
    for folder in dict.fromkeys(run.folder for run in every):
        require_room(folder)


def require_room(folder: Path) -> None:
    """ParameterError where no results can be written into `folder`, which need not be there yet."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(there).free
    except OSError as error:
        raise ParameterError(
            f"results cannot be written to {there} ({error.strerror}): make way for them, or name another folder with "
            "OUTPUTS="
        ) from None
    if free < SPARE_BYTES:
        raise ParameterError(
            f"the disk of {there} has {free / 2**20:.0f} MiB left, and {SPARE_BYTES / 2**20:.0f} MiB are the least to "
            "begin with: make room, or name another folder with OUTPUTS="
        )


def check_results(study: Study) -> Iterator[tuple[str, bool]]:
    """Read again what a study has stored and trained, and hold it against the digests on record.

    Yields
    ------
    line : str
        A thing, and what was found.
    good : bool
        Whether nothing is wrong with it; what is not there yet is good.
    """
    every = [one for run in study.every_run for one in ((run, run.pretext) if run.init == "phantom" else (run,))]
    things = {}
    for one in (study, *every):
        folder, size = one.store_folder, one.store_size
        what = f"films of {size} px" + (f", study {one.study}" if one.study != study.study else "")
        things[folder] = what, os.path.lexists(folder), verify_folder, (folder, size)
    for run in every:
        what = f"weights of {run.name} seed {run.seed}, study {run.study}"
        things[run.run_folder] = what, _is_trained(run), verify_weights, (run,)
    for what, there, verify, arguments in things.values():
        try:
            if there:
                verify(*arguments)
            yield f"{what}: {'no fault found' if there else 'not there yet'}", True
        except REFUSALS as error:
            yield f"{what}: {error}", False


def _is_trained(run: Run) -> bool:
    """Whether training has come to its end; where the record cannot be read `verify_weights` says so."""
    try:
        return read_json(run.run_folder / "run.json").get("status") != "running"
    except RecordError:
        return os.path.lexists(run.run_folder / "run.json")


def main(names: list[str]) -> None:
    """Print what `check_results` finds for a study and its companions; SystemExit where something is wrong."""
    try:
        if len(names) != 1:
            raise ParameterError(
                "python -m lib.preflight STUDY: name one study, a file of params/studies without .yaml"
            )
        # No film of the release is read, so none need be there.
        study = load_study(names[0], data_root=".")
        studies = [study, *(load_study(name, data_root=".") for name in study.companions)]
    except ParameterError as error:
        sys.exit(str(error))
    goods = []
    for study in studies:
        for line, good in check_results(study):
            print(f"{study.study}: {line}", file=sys.stdout if good else sys.stderr, flush=True)
            goods.append(good)
    if faults := goods.count(False):
        sys.exit(f"{faults} of {len(goods)} things {'are' if faults > 1 else 'is'} not as written: see above")


if __name__ == "__main__":
    main(sys.argv[1:])
