"""The data room. `open_data` is its door: a study's parameters in, its release and its store out."""


def open_data(study):
    """The release and the store of a study; the phantom is written and the store is built where they are missing.

    Parameters
    ----------
    study : lib.params.Study

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
    from lib.data.nih import read_release
    from lib.data.phantom import write_phantom
    from lib.data.store import open_store
    from lib.locks import exclusive

    choice = "skip" if study.skip_bad_films else "error"
    if study.release == "phantom":
        study.folder.mkdir(parents=True, exist_ok=True)
        with exclusive(study.folder / ".phantom.lock", f"waiting for another process that writes {study.release_folder}"):
            write_phantom(study.release_folder, n_films=study.phantom_films, size=study.phantom_size, seed=study.phantom_seed,
                          floor=study.phantom_floor)
    release = read_release(study.release_folder, validation_fraction=study.validation_fraction, seed=0, on_missing=choice)
    store = open_store(release, study.store_folder, study.store_size, on_unreadable=choice)
    if store.unreadable:
        release = release.without(store.unreadable, "unreadable")
    return release, store
