"""The one place that writes results: every file goes to a temporary name first and is moved into place whole."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from lib.params import Study


class RecordError(FileNotFoundError):
    """Results that other steps have not made yet; the message names the runs and the notebooks."""


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success flush it to disk and move it into place, on failure
    remove it.

    Parameters
    ----------
    path : path-like
        Final name. Its folder is made if it is missing.

    Yields
    ------
    Path
        Where to write. It keeps the suffix of `path`, by which writers choose a format.

    Raises
    ------
    OSError
        The disk is full; the file that did not fit is named. Other errors of the writer pass as they are.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)  # the new name, too, outlives a power cut
        os.fsync(folder)
        os.close(folder)
    except Exception as error:
        if _disk_is_full(error, path.parent):
            raise OSError(
                errno.ENOSPC,
                f"no space left on the disk while writing {path}; nothing was replaced. Free some space and run again",
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _disk_is_full(error, folder):
    """Whether a writer failed for want of space. safetensors and torch raise types of their own, and torch does not
    name the cause."""
    return (
        getattr(error, "errno", None) == errno.ENOSPC
        or f"os error {errno.ENOSPC}" in str(error)
        or shutil.disk_usage(folder).free < 2**20
    )


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_table(frame: pd.DataFrame, path: str | Path) -> None:
    """Write a tidy table, atomically: csv or parquet by the suffix of `path`, without the index."""
    with atomic(path) as temporary:
        if Path(path).suffix == ".parquet":
            frame.to_parquet(temporary, index=False)
        else:
            frame.to_csv(temporary, index=False)


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a table written by `write_table`."""
    return pd.read_parquet(path) if Path(path).suffix == ".parquet" else pd.read_csv(path)


def read_runs(study: Study, name: str) -> pd.DataFrame:
    """One table from every run of a study, stacked, with the run's task, backbone, loss and seed in front.

    Parameters
    ----------
    study : lib.params.Study
    name : str
        File name within a run's folder, such as 'metrics.csv'.

    Raises
    ------
    FileNotFoundError
        Runs that have no such table yet; all are named.
    """
    runs = study.every_run
    missing = [str(run.run_folder.relative_to(study.folder)) for run in runs if not (run.run_folder / name).is_file()]
    if missing:
        raise RecordError(
            f"{name} is missing in {', '.join(missing)} of {study.folder}: run notebooks 01 to 04 of these first"
        )
    return pd.concat(
        [
            read_table(run.run_folder / name).assign(task=run.task, backbone=run.backbone, loss=run.loss, seed=run.seed)
            for run in runs
        ],
        ignore_index=True,
    )


def write_text(text: str, path: str | Path) -> None:
    """Write a text file, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_paper_table(table: pd.DataFrame, path: str | Path, markdown: str, latex: str) -> None:
    """Write a table of a paper in all its forms, atomically: csv, and the given md and tex. `path` has no suffix."""
    write_table(table, f"{path}.csv")
    write_text(markdown, f"{path}.md")
    write_text(latex, f"{path}.tex")


def write_json(record: dict, path: str | Path) -> None:
    """Write a dictionary of plain values as indented JSON, atomically. NaN is refused: JSON has none."""
    write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", path)


def read_json(path: str | Path) -> dict:
    """Read a dictionary written by `write_json`."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_figure(figure: Figure, path: str | Path, dpi: int = 200) -> None:
    """Write a matplotlib figure as PNG and as PDF beside it, atomically. `path` has no suffix."""
    for suffix in (".png", ".pdf"):
        with atomic(Path(path).with_suffix(suffix)) as temporary:
            figure.savefig(
                temporary, dpi=dpi, bbox_inches="tight", metadata={"CreationDate": None} if suffix == ".pdf" else None
            )
