"""What several test files share: a small simulated release, and a folder for results outside the repository."""

import pytest

from lib.data.phantom.films import write_phantom

# Each keeps a worker for a minute or more. They come first, so that none is left to one worker at the end.
LONGEST = ("test_study", "test_heatmaps", "test_training")


def pytest_collection_modifyitems(items):
    """What takes longest comes first, file by file; the rest keeps its order."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def outputs(tmp_path_factory):
    """Results of tests go here, also from processes that they start; never to the repository's own folder."""
    folder = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OUTPUTS", str(folder))
        yield folder


@pytest.fixture(scope="session")
def small_phantom(tmp_path_factory):
    """Folder of a simulated release of 100 films at 64 px."""
    root = tmp_path_factory.mktemp("phantom") / "release"
    write_phantom(root, n_films=100, size=64, seed=0)
    return root
