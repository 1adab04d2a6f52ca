"""The one place that writes results: every file goes to a temporary name first and is moved into place whole."""

import errno
import json
import os
import shutil
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from lib.locks import FULL, whole
from lib.params import Run, Study


class RecordError(FileNotFoundError):
    """Results that are not there yet, are damaged, or cannot be written; the message names the file and the way out."""


# Who writes what is read again.
NOTEBOOKS = {
    "run.json": "01_train",
    "finished.json": "01_train",
    "training.csv": "01_train",
    "predictions.parquet": "02_metrics",
    "metrics.csv": "02_metrics",
    "cam_alignment.parquet": "03_cam_alignment",
    "concepts.parquet": "04_dissection",
}


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success flush it to disk and move it into place, on failure
    remove it.

    Two writers of one file take turns; what a killed one left is written over by the next: see `locks.whole`.

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
    RecordError
        The disk is full, or `path` is no place where a file can be written. Other errors of the writer pass as they
        are.
    """
    path, of_writer = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as temporary:
            mode = temporary.stat().st_mode
            try:
                yield temporary
            except Exception as error:
                of_writer = error
                raise
            os.chmod(temporary, mode)  # safetensors moves a file of its own there
    except Exception as error:
        if full := _full_disk(error, path.parent):
            fault = f"no space left on the disk while writing {path}; nothing was replaced ({os.strerror(full)})"
            way = "Free some space and run again"
        elif error is of_writer or not isinstance(error, OSError):
            raise
        else:
            fault = f"{path} cannot be written ({error.strerror}: {error.filename or path}); nothing was replaced"
            way = "Make way for it, or name another folder by the environment variable OUTPUTS"
        refusal = RecordError(f"{fault}. {way}")
        refusal.errno = full or error.errno
        raise refusal from error


def _full_disk(error, folder):
    """The number of the error by which a writer failed for want of space, or None. safetensors and torch raise types
    of their own; torch keeps the cause as the context, or, where it opened the file itself, not at all."""
    for one in (error, error.__cause__, error.__context__):
        for number in FULL:
            if getattr(one, "errno", None) == number or f"os error {number})" in str(one):
                return number
    return errno.ENOSPC if isinstance(error, RuntimeError) and shutil.disk_usage(folder).free < 2**20 else None


def damaged(path: str | Path, why: object) -> RecordError:
    """The error for a result that is not as it was written; for want of a better way it is made again."""
    if isinstance(why, OSError) and why.errno:  # pyarrow's own have none
        return RecordError(f"{path} cannot be read ({why.strerror}): see its permissions and its disk")
    why = str(why).partition("\n")[0]
    return RecordError(f"{path} is damaged ({why}): delete it and run {_maker(path)} again")


def _maker(path):
    return NOTEBOOKS.get(Path(path).name, "the notebook that writes it")


def write_table(frame: pd.DataFrame, path: str | Path) -> None:
    """Write a tidy table, atomically: csv or parquet by the suffix of `path`, without the index."""
    with atomic(path) as temporary:
        if Path(path).suffix == ".parquet":
            frame.to_parquet(temporary, index=False, write_page_checksum=True)
        else:
            frame.to_csv(temporary, index=False)


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a table written by `write_table`.

    Raises
    ------
    RecordError
        It is missing, empty, cut short or otherwise damaged, as far as can be told: a parquet file has checksums, a
        csv none.
    """
    path = _present(path)
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path, page_checksum_verification=True)
        if not (content := path.read_bytes()).endswith(b"\n") or b"\0" in content:
            raise ValueError("empty or cut short")
        return pd.read_csv(path)
    except (ValueError, OSError) as error:  # of pandas and pyarrow
        raise damaged(path, error) from error


def _present(path):
    if not (path := Path(path)).is_file():
        raise RecordError(f"there is no file {path}: run {_maker(path)} first")
    return path


def read_runs(study: Study, name: str, losses: Container[str] | None = None) -> pd.DataFrame:
    """One table from every run of a study, stacked, with the run's task, backbone, loss and seed behind.

    Parameters
    ----------
    study : lib.params.Study
    name : str
        File name within a run's folder, such as 'metrics.csv'.
    losses : container of str, optional
        Only the runs of these losses.

    Raises
    ------
    FileNotFoundError
        Runs that have no such table yet; all are named.
    """
    runs = [run for run in study.every_run if losses is None or run.loss in losses]
    missing = [str(run.run_folder.relative_to(study.folder)) for run in runs if not (run.run_folder / name).is_file()]
    if missing:
        raise RecordError(
            f"{name} is missing in {', '.join(missing)} of {study.folder}: run notebooks 01 to 04 of these first"
        )
    return stack(runs, name)


def stack(runs: Sequence[Run], name: str) -> pd.DataFrame:
    """One table from several runs, as `read_runs`; of no runs an empty one."""
    tables = [
        read_table(run.run_folder / name).assign(task=run.task, backbone=run.backbone, loss=run.loss, seed=run.seed)
        for run in runs
    ]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


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
    write_text(json_text(record), path)


def json_text(record: dict) -> str:
    """What `write_json` writes."""
    return json.dumps(record, indent=1, allow_nan=False) + "\n"


def read_json(path: str | Path) -> dict:
    """Read a dictionary written by `write_json`; `RecordError` where it is missing, or is no such file."""
    path = _present(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        if not isinstance(record, dict):
            raise ValueError(f"a {type(record).__name__} instead of a dictionary")
    except (ValueError, RecursionError, OSError) as error:
        raise damaged(path, error) from error
    return record


def _refuse_constant(name):
    raise ValueError(f"{name} is no JSON")


def write_figure(figure: Figure, path: str | Path, dpi: int = 200) -> Figure:
    """Write a matplotlib figure as PNG and as PDF beside it, atomically, and return it. `path` has no suffix."""
    for suffix in (".png", ".pdf"):
        with atomic(Path(path).with_suffix(suffix)) as temporary:
            figure.savefig(
                temporary, dpi=dpi, bbox_inches="tight", metadata={"CreationDate": None} if suffix == ".pdf" else None
            )
    return figure
