import errno
import os
import signal
import stat

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file

from lib import params, records
from lib.params import Study
from lib.records import RecordError

FRAME = pd.DataFrame(
    {
        "image": ["00000001_000.png", "00000002_000.png"],
        "patient": ["1", "2"],
        "n": np.array([1, 2], np.int32),
        "value": [0.1 + 0.2, np.nan],
        "small": np.array([1e-30, 3], np.float32),
    }
)


def write_old(path):
    path.write_text("old")
    return path


# --- whole or not at all


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write_old(tmp_path / "table.csv")
    with pytest.raises(KeyboardInterrupt), records.atomic(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["table.csv"]


def test_a_writer_that_succeeds_replaces_the_old_file(tmp_path):
    path = write_old(tmp_path / "table.csv")
    with records.atomic(path) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".csv" and temporary.name.startswith(".")
        temporary.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["table.csv"]


def test_folders_are_made(tmp_path):
    records.write_text("é", tmp_path / "a" / "b" / "c.txt")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == "é".encode()


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_a_plain_new_file(tmp_path, mask, expected):
    before = os.umask(mask)
    try:
        records.write_text("x", tmp_path / "x.txt")
        (tmp_path / "plain.txt").write_text("x")
    finally:
        assert os.umask(before) == mask  # and the mask itself was left alone
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("x.txt", "plain.txt")]
    assert modes == [expected, expected]


@pytest.mark.parametrize(
    "write",
    [
        lambda path: records.write_text("new", path),
        lambda path: records.write_json({"a": 1}, path),
        lambda path: records.write_table(FRAME, path),
    ],
)
def test_a_full_disk_is_named_with_its_file(tmp_path, monkeypatch, write):
    path = write_old(tmp_path / "record.csv")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = r"no space left on the disk while writing .*record.csv; nothing was replaced"
    with pytest.raises(OSError, match=message) as caught:
        write(path)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["record.csv"]


@pytest.mark.parametrize(
    ("error", "free"),
    [
        (RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534"), 4096),  # torch.save
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), 10**9),  # safetensors
    ],
)
def test_a_full_disk_is_named_whatever_the_writer_raises(tmp_path, monkeypatch, error, free):
    monkeypatch.setattr(records.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": free}))
    path = tmp_path / "model.safetensors"
    with pytest.raises(OSError, match="no space left .*model.safetensors"), records.atomic(path):
        raise error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EFBIG])
def test_quotas_and_limits_of_size_are_full_disks_too(tmp_path, monkeypatch, number):
    path = write_old(tmp_path / "x.csv")
    cause = RuntimeError("unexpected pos 576 vs 534")  # as torch has it, whose own file it is not
    cause.__context__ = OSError(number, os.strerror(number))
    for error in (OSError(number, os.strerror(number)), cause):
        with pytest.raises(RecordError, match="no space left .*x.csv; nothing was replaced .*(quota|too large)"):
            with records.atomic(path):
                raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.csv"]


def test_a_disk_that_is_nearly_full_is_not_blamed_for_other_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(records.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 4096}))
    with pytest.raises(ValueError, match="bad value"), records.atomic(tmp_path / "x.csv"):
        raise ValueError("bad value")


def test_no_place_to_write_is_named_with_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "folder.csv").mkdir()
    places = [tmp_path / "file" / "x.csv", tmp_path / "folder.csv", tmp_path / ("x" * 300 + ".csv")]
    for path in places:
        with pytest.raises(RecordError, match="cannot be written .*nothing was replaced.*OUTPUTS"):
            records.write_text("new", path)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.csv"]

    def broken(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(RecordError, match="x.csv cannot be written .Input/output error"):
        records.write_text("new", tmp_path / "x.csv")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.csv"]


def test_what_a_killed_writer_left_goes_with_the_next(tmp_path):
    figure = Figure(figsize=(1, 1))
    for name in ("fig.png", "fig.pdf"):
        child = os.fork()
        if not child:
            with records.atomic(tmp_path / name) as temporary:
                temporary.write_text("half" * 10**6)
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
    assert len(os.listdir(tmp_path)) == 2
    records.write_figure(figure, tmp_path / "fig", dpi=50)
    assert sorted(os.listdir(tmp_path)) == ["fig.pdf", "fig.png"]


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "denied"), ValueError("bad value")])
def test_other_errors_pass_as_they_are(tmp_path, error):
    with pytest.raises(type(error)) as caught, records.atomic(tmp_path / "x.csv"):
        raise error
    assert caught.value is error and os.listdir(tmp_path) == []


# --- round trips


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables(tmp_path, suffix):
    path = tmp_path / f"table.{suffix}"
    records.write_table(FRAME.set_index(pd.Index([7, 9])), path)
    back = records.read_table(path)
    assert list(back.columns) == list(FRAME.columns)
    assert back["image"].tolist() == FRAME["image"].tolist() and back["value"].iloc[0] == 0.1 + 0.2
    assert np.isnan(back["value"].iloc[1])
    if suffix == "parquet":
        pd.testing.assert_frame_equal(back, FRAME)


def test_an_empty_table_keeps_its_columns(tmp_path):
    for suffix in ("csv", "parquet"):
        records.write_table(FRAME.head(0), tmp_path / f"empty.{suffix}")
        assert list(records.read_table(tmp_path / f"empty.{suffix}").columns) == list(FRAME.columns)


def test_json(tmp_path):
    record = {"run": "é", "parameters": {"epochs": 3, "rate": 0.1 + 0.2, "layer": None}, "list": [1, 2.5, "x", True]}
    records.write_json(record, tmp_path / "run.json")
    assert records.read_json(tmp_path / "run.json") == record


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), np.float64("nan"), np.float32("nan"), np.int64(3), torch.tensor(1.0)]
)
def test_json_refuses_what_it_cannot_give_back(tmp_path, value):
    path = write_old(tmp_path / "run.json")
    with pytest.raises((ValueError, TypeError)):
        records.write_json({"a": {"b": [value]}}, path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["run.json"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"3", b'{"a": NaN}', b'{"a": "\xe9"}', b"[" * 10**5, b"\0" * 99]
)
def test_a_damaged_json_is_named_with_the_way_out(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(RecordError, match="run.json is damaged .*: delete it and run 01_train again$") as error:
        records.read_json(tmp_path / "run.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["metrics.csv", "concepts.parquet"])
def test_a_damaged_table_is_named_with_its_notebook(tmp_path, name):
    path, maker = tmp_path / name, {"metrics.csv": "02_metrics", "concepts.parquet": "04_dissection"}[name]
    with pytest.raises(RecordError, match=f"no file .*{name}: run {maker} first"):
        records.read_table(path)
    records.write_table(pd.concat([FRAME] * 100), path)
    whole = path.read_bytes()
    damages = [b"", whole[: len(whole) // 2 + 3], b"\0" * len(whole), whole[:200] + b"\0" * 99 + b"\n"]
    if name == "concepts.parquet":  # a bit of a value, where nothing but a checksum tells
        at = whole.index(np.float64(0.1 + 0.2).tobytes())
        damages += [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]]
    for content in damages:
        path.write_bytes(content)
        with pytest.raises(RecordError, match=f"{name} is damaged .*: delete it and run {maker} again") as error:
            records.read_table(path)
        assert "\n" not in str(error.value)


def test_what_cannot_be_read_need_not_be_deleted(tmp_path, monkeypatch):
    path = write_old(tmp_path / "metrics.csv")

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(records.Path, "read_bytes", refuse)
    with pytest.raises(RecordError, match="metrics.csv cannot be read .Permission denied.: see its permissions"):
        records.read_table(path)


def test_tensors(tmp_path):
    # safetensors moves a file of its own onto the temporary one.
    with records.atomic(tmp_path / "model.safetensors") as temporary:
        save_file({"a": torch.arange(5)}, temporary)
    assert load_file(tmp_path / "model.safetensors")["a"].tolist() == [0, 1, 2, 3, 4]
    assert os.listdir(tmp_path) == ["model.safetensors"]
    (tmp_path / "plain").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_figures(tmp_path):
    figure = Figure(figsize=(1, 1))
    figure.add_subplot().plot([0, 1])
    for _ in range(2):
        assert records.write_figure(figure, tmp_path / "figures" / "fig1", dpi=50) is figure
    assert sorted(os.listdir(tmp_path / "figures")) == ["fig1.pdf", "fig1.png"]
    assert (tmp_path / "figures" / "fig1.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "figures" / "fig1.pdf").read_bytes()[:4] == b"%PDF"


# --- all runs of a study


def test_runs_are_stacked_in_order_and_the_missing_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Study, "folder", property(lambda self: tmp_path / "outputs" / self.study))
    assert params.ROOT != tmp_path
    study = Study(runs=["binary-resnet50-focal", "multilabel-tdensenet-bce"], seeds=[1, 0])
    runs = [study.run(name, seed) for name in study.runs for seed in study.seeds]

    def write(value):
        metrics = pd.DataFrame({"class": ["Average"], "auroc": [float(value)]})
        records.write_table(metrics, runs[value].run_folder / "metrics.csv")

    write(0), write(1)
    missing = "multilabel-tdensenet-bce/seed1, multilabel-tdensenet-bce/seed0"
    with pytest.raises(FileNotFoundError, match=f"metrics.csv is missing in {missing} of .*01 to 04"):
        records.read_runs(study, "metrics.csv")
    write(2), write(3)
    table = records.read_runs(study, "metrics.csv")
    assert table["auroc"].tolist() == [0, 1, 2, 3] and table.index.tolist() == [0, 1, 2, 3]
    assert table[["task", "backbone", "loss", "seed"]].values.tolist() == [
        ["binary", "resnet50", "focal", 1], ["binary", "resnet50", "focal", 0],
        ["multilabel", "tdensenet", "bce", 1], ["multilabel", "tdensenet", "bce", 0],
    ]  # fmt: skip
