"""What is checked before a study starts its work, so that hours of decoding do not end in a missing file."""

import socket
from collections.abc import Iterable

import torch

from lib.models import build_model, load_chexnet
from lib.params import Study


def check_before_work(studies: Iterable[Study]) -> None:
    """Build every model that the studies' runs start from, and read the checkpoints and look for the files they name.

    Only a model that is downloaded or has named layers is made whole; of the others the shapes alone.

    Raises
    ------
    ValueError
        An unknown backbone, or a layer that its model does not have.
    RuntimeError
        A file that is not there, weights that cannot be downloaded, or weights that do not fit.
    """
    socket.setdefaulttimeout(60)  # else a download that hangs never ends
    studies = list(studies)
    for study in studies:
        for key, path in study.chexnet_files.items():
            if not path.is_file():
                raise RuntimeError(f"{key}: there is no file {path}")
        if study.chexnet:
            load_chexnet(study.chexnet_files["chexnet"])
    every = (run for study in studies for run in study.every_run)
    kinds = {(run.backbone, run.init, run.cam_layer, run.dissection_layer) for run in every}
    for backbone, init, *layers in sorted(kinds):
        known = init in ("scratch", "phantom")
        with torch.device("meta" if known else "cpu"):
            model = build_model(backbone, 1, "scratch" if known else init)
        unknown = [layer for layer in layers if layer and layer not in dict(model.named_modules())]
        if unknown:
            raise ValueError(f"{backbone} has no module {unknown[0]}: see the names of model.named_modules()")
