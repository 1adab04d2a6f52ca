"""What the writers of releases share: a folder that is written once, whatever comes between, and its images."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np

from lib.data.release import ReleaseError
from lib.locks import exclusive, write_whole


def read_parameters(path: Path) -> dict | None:
    """The parameters in `<kind>.json`; None where it is missing, damaged or no file."""
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def write_once(
    root: Path, what: str, parameters: dict, is_complete: Callable[[], bool], write: Callable[[bool], None]
) -> None:
    """Have `write` fill the folder `root`, unless that is done: `<kind>.json`, with the parameters, comes last.

    Until then they stand in `<kind>.unfinished.json`, whose lock the writer holds: a second one waits. After an
    interruption, or where files have gone since, the next call goes on.

    Parameters
    ----------
    root : folder, new or empty or of an earlier call
    what : what it holds, for messages; the last word is the <kind> of the file names
    parameters : plain values, all that the content depends on
    is_complete : whether the folder still has all its files; asked once it is written
    write : writes what is not there; with True it begins anew, since what is there has unknown parameters

    Raises
    ------
    ReleaseError
        `root` holds something else, or was written with other parameters; `<kind>.json` is damaged; the folder cannot
        be written, or its disk is full.
    """
    kind = what.split()[-1]
    finished, unfinished = root / f"{kind}.json", root / f"{kind}.unfinished.json"

    def is_written() -> bool:
        if not os.path.lexists(finished):
            return False
        found = read_parameters(finished)
        if found is None:
            raise ReleaseError(f"{finished} is damaged: delete the folder {root} to have it written again")
        if found != parameters:
            raise ReleaseError(
                f"{root} already holds {what} with {found!s:.400}, not the {parameters} asked for: choose another "
                "folder, or delete it"
            )
        return is_complete()

    try:
        if is_written():
            return
        ours = finished.exists() or os.path.lexists(unfinished)
        if not ours and os.path.lexists(root) and (not root.is_dir() or any(root.iterdir())):
            raise ReleaseError(
                f"{root} exists and holds no {kind} (it has no {kind}.json): choose an empty or new folder"
            )
        root.mkdir(parents=True, exist_ok=True)
        with exclusive(unfinished, f"waiting for another process that writes {root}"):
            try:
                written = is_written()  # by another process, while this one waited
            except ReleaseError:
                unfinished.unlink()
                raise
            if written:
                unfinished.unlink()
                return
            anew = not finished.exists() and read_parameters(unfinished) != parameters
            # In place: a new file of that name would not be the one that is locked.
            unfinished.write_text(json.dumps(parameters))
            write(anew)
            # Of killed writers, beside a file that another has finished: the others were written over.
            for temporary in root.rglob(".*.tmp*"):
                temporary.unlink()
            os.replace(unfinished, finished)
    except OSError as error:
        raise ReleaseError(
            f"{root} cannot be written ({error}): remove what is in the way, make room, or choose another folder, then "
            "call again, which goes on with what is there"
        ) from error


def write_png(path: Path, image: np.ndarray, options: Sequence[int] = ()) -> None:
    """Write pixels as PNG; `options` are those of `cv2.imencode`.

    Raises
    ------
    ReleaseError
        They cannot be encoded.
    """
    encoded, content = cv2.imencode(".png", image, options)
    if not encoded:
        raise ReleaseError(f"{path} cannot be encoded as PNG: call again, which goes on with what is there")
    write_whole(path, content.tobytes())
