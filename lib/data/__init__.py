"""The data room: the table of the releases it can read, and its door, `open_data`.

To add a release: a module that reads it into a `lib.data.release.Release`, and a line in `RELEASES`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lib.data.release import Release
    from lib.data.store import Store

# The readers are imported where they are called: parameters ask this table, and the processes that decode films import
# this package; both would start seconds later.


def _read_nih(study, **options):
    from lib.data.nih import read_release

    return read_release(study.release_folder, **options)


def _read_rsna(study, **options):
    from lib.data.rsna import read_rsna

    return read_rsna(study.release_folder, **options)


def _read_digits(study, on_missing, **draw):  # they come whole from the library, or are written again
    from lib.data.digits import read_digits

    return read_digits(study.release_folder, **draw)


def _write_phantom(study, layout):
    from lib.data.phantom.films import write_phantom

    keys = {key: getattr(study, f"phantom_{key}") for key in ("size", "seed", "floor", "marker", "prevalence")}
    write_phantom(study.release_folder, n_films=study.phantom_films, layout=layout, **keys)


def _write_digits(study):
    from lib.data.digits import write_digits

    if not study.data_root:
        write_digits(study.release_folder)


@dataclass(frozen=True)
class Source:
    """A line of the table: what the study knows of a release before it is opened.

    Attributes
    ----------
    label : str
        What tables and figures say their numbers were measured on; `{study}` stands for the study's name.
    tasks : tuple of str
        What can be learnt from its labels, see `release.task_targets`.
    read : callable
        (study, validation_fraction=..., seed=..., on_missing=...) to a `Release`.
    write : callable or None
        (study): makes the release where the study makes it itself.
    init : str
        Initial weights where the study names none.
    lists : tuple of str
        Files under `data_root` whose change means reading again; the first must be there.
    exact : bool
        Whether the pixels of every lesion, lung and marker are known (`phantom.films`).
    """

    label: str
    tasks: tuple[str, ...]
    read: Callable
    write: Callable | None = None
    init: str = "imagenet"
    lists: tuple[str, ...] = ()
    exact: bool = False


_RSNA_TASKS = ("binary", "pneumonia")
_NIH_TASKS = ("multilabel", *_RSNA_TASKS)
_SIMULATED = {"init": "phantom", "exact": True}
_write_nih, _write_rsna = (partial(_write_phantom, layout=layout) for layout in ("nih", "rsna"))
_NIH_LISTS = ("Data_Entry_2017*.csv", "BBox_List_2017.csv", "train_val_list.txt", "test_list.txt")
_RSNA_LISTS = ("stage_2_train_labels.csv", "stage_2_detailed_class_info.csv")
RELEASES = {
    "phantom": Source("Simulated phantom films, not patients", _NIH_TASKS, _read_nih, _write_nih, **_SIMULATED),
    "nih": Source("NIH ChestX-ray14 films, study {study}", _NIH_TASKS, _read_nih, lists=_NIH_LISTS),
    "phantom_rsna": Source(
        "Simulated phantom films in RSNA's layout, not patients", _RSNA_TASKS, _read_rsna, _write_rsna, **_SIMULATED
    ),
    "rsna": Source("RSNA pneumonia films, study {study}", _RSNA_TASKS, _read_rsna, lists=_RSNA_LISTS),
    "digits": Source(
        "Handwritten digits of scikit-learn, 8 x 8 pixels", ("digits",), _read_digits, _write_digits, init="scratch"
    ),
}
TASKS = tuple(dict.fromkeys(task for source in RELEASES.values() for task in source.tasks))


def open_data(study) -> "tuple[Release, Store]":
    """The release and the store of a study; the store, and what the study makes itself, are written where missing.

    Parameters
    ----------
    study : lib.params.Study

    Returns
    -------
    release : lib.data.release.Release
        Its films are exactly those of the store, row by row; its problems are also those seen in the pixels.
    store : lib.data.store.Store

    Raises
    ------
    lib.data.release.ReleaseError
        Broken release, or films that are missing where `study.skip_bad_films` is False.
    lib.data.store.StoreError
        Films that are unreadable where `study.skip_bad_films` is False, or a store that is damaged or cannot be built.
    """
    import pandas as pd

    from lib.data.release import problem_frame
    from lib.data.store import open_store

    if study.release not in RELEASES:
        raise ValueError(f"release is {study.release!r}; it must be one of {', '.join(map(repr, RELEASES))}")
    source, choice = RELEASES[study.release], "skip" if study.skip_bad_films else "error"
    if source.write:
        source.write(study)
    release = source.read(study, validation_fraction=study.validation_fraction, seed=0, on_missing=choice)
    store = open_store(release, study.store_folder, study.store_size, on_unreadable=choice)
    if store.unreadable:
        release = release.without(store.unreadable, "unreadable")
    problems = pd.concat([release.problems, problem_frame(store.remarks())], ignore_index=True)
    return replace(release, problems=problems), store
