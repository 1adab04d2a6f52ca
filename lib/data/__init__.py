"""The data room. `open_data` is its door: a study's parameters in, its release and its store out."""


def open_data(study):
    """The release and the store of a study; the phantom or the digits are written and the store is built where they are
    missing.

    Parameters
    ----------
    study : lib.params.Study
        Its `release`: 'nih' and 'rsna' are read from `release_folder`; 'phantom', 'phantom_rsna' (the phantom in RSNA's
        layout) and, without a
        `data_root`, 'digits' are written there first.

    Returns
    -------
    release : lib.data.nih.Release
        Its films are exactly those of the store, row by row.
    store : lib.data.store.Store

    Raises
    ------
    lib.data.nih.ReleaseError
        Broken release, or films that are missing where `study.skip_bad_films` is False.
    lib.data.store.StoreError
        Films that are unreadable where `study.skip_bad_films` is False, or a store that cannot be built.
    """
    # Imported here: the processes that decode films import this package too, and would start seconds later.
    from lib.data.store import open_store

    choice = "skip" if study.skip_bad_films else "error"
    _write_release(study)
    release = _read_release(study, choice)
    store = open_store(release, study.store_folder, study.store_size, on_unreadable=choice)
    if store.unreadable:
        release = release.without(store.unreadable, "unreadable")
    return release, store


def _write_release(study):
    """Write what the study makes itself, where it is missing."""
    simulated = study.release in ("phantom", "phantom_rsna")
    if not simulated and (study.release != "digits" or study.data_root):
        return
    from lib.data.digits import write_digits
    from lib.data.phantom.films import write_phantom
    from lib.locks import exclusive

    study.folder.mkdir(parents=True, exist_ok=True)
    with exclusive(study.folder / ".release.lock", f"waiting for another process that writes {study.release_folder}"):
        if simulated:
            write_phantom(
                study.release_folder,
                n_films=study.phantom_films,
                size=study.phantom_size,
                seed=study.phantom_seed,
                floor=study.phantom_floor,
                marker=study.phantom_marker,
                layout="rsna" if study.release == "phantom_rsna" else "nih",
            )
        else:
            write_digits(study.release_folder)


def _read_release(study, on_missing):
    from lib.data.digits import read_digits
    from lib.data.nih import read_release
    from lib.data.rsna import read_rsna

    draw = {"validation_fraction": study.validation_fraction, "seed": 0}
    if study.release == "digits":
        return read_digits(study.release_folder, **draw)
    if study.release in ("phantom", "nih"):
        return read_release(study.release_folder, **draw, on_missing=on_missing)
    if study.release in ("rsna", "phantom_rsna"):
        return read_rsna(study.release_folder, **draw, on_missing=on_missing)
    raise ValueError(f"release is {study.release!r}; it must be 'phantom', 'nih', 'phantom_rsna', 'rsna' or 'digits'")
