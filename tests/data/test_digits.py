import json
import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_digits

from lib.data import open_data
from lib.data.digits import TABLE, read_digits, write_digits
from lib.data.release import DIGITS, FILM_COLUMNS, ReleaseError, task_boxes, task_targets


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "release"
    write_digits(folder)
    return folder


def read(root, **changes):
    return read_digits(root, **({"validation_fraction": 0.1, "seed": 0} | changes))


def snapshot(root) -> list:
    return sorted((path.relative_to(root), path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file())


def test_the_images_hold_the_data(root):
    data, release = load_digits(), read(root)
    assert len(release.films) == 1797 and list(release.films.columns) == list(FILM_COLUMNS)
    assert release.films["patient"].is_unique
    for i, (path, label) in enumerate(zip(release.films["path"], release.films["labels"], strict=True)):
        image = cv2.imread(path, cv2.IMREAD_UNCHANGED)
        assert image.shape == (32, 32) and image.dtype == np.uint8 and int(label) == data.target[i]
        blocks = image.reshape(8, 4, 8, 4)
        assert (blocks == blocks[:, :1, :, :1]).all()
        assert (np.round(blocks[:, 0, :, 0] * (16 / 255)) == data.images[i]).all()
    assert (data.images.max(), data.images.min()) == (16, 0)


def test_targets_are_one_digit_each(root):
    release = read(root)
    assert release.classes == DIGITS == tuple("0123456789")
    targets, names = task_targets(release.targets, "digits")
    assert targets.shape == (1797, 10) and targets.dtype == np.uint8 and names == list(DIGITS)
    assert (targets.sum(1) == 1).all() and (targets.argmax(1) == load_digits().target).all()
    assert len(release.boxes) == len(task_boxes(release.boxes, "digits")) == len(release.problems) == 0
    for task in ("multilabel", "binary", "pneumonia"):
        with pytest.raises(ValueError, match=f"task '{task}' needs a release of 15 classes"):
            task_targets(release.targets, task)


def test_every_digit_is_divided_alike(root):
    films = read(root, validation_fraction=0.2).films
    for _, digit in films.groupby("labels"):
        shares = digit["split"].value_counts(normalize=True)
        assert abs(shares["test"] - 0.3) < 0.004 and abs(shares["val"] - 0.7 * 0.2) < 0.004
    again, other = (read(root, validation_fraction=0.2, seed=seed).films["split"] for seed in (0, 1))
    assert films["split"].equals(again) and not films["split"].equals(other)
    test_of = [set(read(root, validation_fraction=f).films.query("split == 'test'")["image"]) for f in (0.1, 0.5)]
    assert test_of[0] == test_of[1] and len(test_of[0]) == (films["split"] == "test").sum()


def test_writing_again_changes_nothing(root):
    before = snapshot(root)
    write_digits(root)
    assert snapshot(root) == before


def test_an_interrupted_call_is_continued(tmp_path, root, monkeypatch):
    folder, imencode, calls = tmp_path / "d", cv2.imencode, []

    def die(*args):
        calls.append(args)
        if len(calls) > 9:
            raise KeyboardInterrupt
        return imencode(*args)

    monkeypatch.setattr(cv2, "imencode", die)
    with pytest.raises(KeyboardInterrupt):
        write_digits(folder)
    with pytest.raises(ReleaseError, match=r"holds no digits\.json"):
        read(folder)
    monkeypatch.setattr(cv2, "imencode", imencode)
    write_digits(folder)
    assert [name for name, _ in snapshot(folder)] == [name for name, _ in snapshot(root)]
    assert (folder / "images" / "digit_0003.png").read_bytes() == (root / "images" / "digit_0003.png").read_bytes()


def test_other_folders_and_sizes_are_refused(tmp_path, root):
    with pytest.raises(ValueError, match=r"already holds digits with .*32.*not the .*64"):
        write_digits(root, size=64)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ReleaseError, match=r"no digits\.json"):
        write_digits(tmp_path)
    for size in (0, -8, 12, 4, True):
        with pytest.raises(ValueError, match="multiple of 8"):
            write_digits(tmp_path / "d", size=size)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.fixture
def scratch(tmp_path, root):
    """A copy of the digits, to be damaged."""
    return shutil.copytree(root, tmp_path / "scratch")


@pytest.mark.parametrize("name, fault", [("images/digit_0003.png", "gone"), (TABLE, "empty"), ("images", "gone")])
def test_digits_that_are_gone_are_written_again(scratch, root, name, fault):
    path = scratch / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if fault == "empty":
        path.touch()
    write_digits(scratch)
    files = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    assert all((scratch / file).read_bytes() == (root / file).read_bytes() for file in files)
    assert len([path for path in scratch.rglob("*") if path.is_file()]) == len(files)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff"])
def test_a_damaged_record_of_the_digits_is_named(scratch, content):
    (scratch / "digits.json").write_bytes(content)
    with pytest.raises(ReleaseError, match=r"digits\.json is damaged: delete the folder .*scratch"):
        write_digits(scratch)


def test_digits_that_cannot_be_written(tmp_path, monkeypatch):
    for size in (float("nan"), float("inf"), "32", None, 32.0, 10**6):
        with pytest.raises(ValueError, match="^size is .*: it must be a multiple of 8 pixels, up to 1024"):
            write_digits(tmp_path / "d", size=size)
    assert not (tmp_path / "d").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ReleaseError, match="file exists and holds no digits"):
        write_digits(tmp_path / "file")
    with pytest.raises(ReleaseError, match="below cannot be written .*Not a directory"):
        write_digits(tmp_path / "file" / "below")
    monkeypatch.setattr(cv2, "imencode", lambda *_: (False, np.zeros(0, np.uint8)))
    with pytest.raises(ReleaseError, match=r"digit_0000\.png cannot be encoded as PNG"):
        write_digits(tmp_path / "d")


def copy(root, folder, lines=None):
    """The release with another table."""
    folder.mkdir()
    (folder / "images").symlink_to(root / "images")
    (folder / "digits.json").write_text(json.dumps({}))
    (folder / TABLE).write_text((root / TABLE).read_text() if lines is None else "\n".join(lines))
    return folder


def test_damaged_folders(tmp_path, root):
    lines = (root / TABLE).read_text().splitlines()
    assert read(copy(root, tmp_path / "a")).films["labels"].equals(read(root).films["labels"])
    for name, changed, message in (
        ("b", ["image;label", *lines[1:]], "must begin with 'image,label'"),
        ("c", [*lines[:5], "digit_0004.png,10", *lines[6:]], "row 6 is 'digit_0004.png,10', not an image and a digit"),
        ("d", [*lines, "digit_9999.png,3"], "1 images of .* are missing from images/: digit_9999.png"),
        ("e", [*lines, lines[-1]], "names an image twice"),
        ("f", lines[:4], "fewer than 3 of a digit"),
        ("g", [], "must begin with"),
    ):
        with pytest.raises(ReleaseError, match=message):
            read(copy(root, tmp_path / name, changed))
    with pytest.raises(ReleaseError, match="is not a folder"):
        read(tmp_path / "nowhere")
    for fraction in (0, 1, float("nan")):
        with pytest.raises(ValueError, match="validation_fraction"):
            read(root, validation_fraction=fraction)


def test_open_data_writes_the_digits_only_without_a_data_root(tmp_path, root):
    common = {"release": "digits", "folder": tmp_path, "store_folder": tmp_path / "store", "store_size": 37}
    common |= {"validation_fraction": 0.1, "skip_bad_films": False}
    study = SimpleNamespace(**common, data_root="", release_folder=tmp_path / "release")
    release, store = open_data(study)
    assert release.films.equals(store.films) and store.images.shape == (1797, 37, 37)
    assert (tmp_path / "release" / "digits.json").exists()
    for row in (0, 900, 1796):
        image = cv2.imread(release.films["path"][row], 0)
        assert (store.images[row] == cv2.resize(image, (37, 37), interpolation=cv2.INTER_LINEAR)).all()
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(ReleaseError, match="elsewhere is not a folder"):
        open_data(SimpleNamespace(**common, data_root=str(elsewhere), release_folder=elsewhere))
    assert not elsewhere.exists()
