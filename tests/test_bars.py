"""What takes long shows how far it is, once it has taken long; what is short says nothing."""

import pytest
import torch
from tqdm import tqdm

from lib import runs
from lib.data.phantom import films as phantom
from lib.params import Run


@pytest.mark.parametrize("delay, shown", [(10, False), (0, True)])
def test_a_pass_over_the_films(small_phantom, monkeypatch, capsys, delay, shown):
    monkeypatch.setattr(runs, "tqdm", lambda *args, **keys: tqdm(*args, **{**keys, "delay": delay, "mininterval": 0}))
    run = Run.build({"release": "nih", "data_root": str(small_phantom), "init": "scratch", "image_size": 32})
    subject = runs.Subject(run, runs.OpenStudy(run))
    rows = subject.rows("all")
    _ = subject.store  # opening it has a bar of its own
    capsys.readouterr()
    batches = list(subject.batches(rows, 30))
    assert torch.cat([batch.images for batch in batches]).shape[0] == len(rows) == 100
    said = capsys.readouterr().out
    assert (f"{run.name}: 100%" in said and " 4/4 [" in said) if shown else said == ""
    assert len(next(subject.batches(rows, 30)).rows) == 30


def test_drawing_films(tmp_path, monkeypatch, capsys):
    phantom.write_phantom(tmp_path / "short", n_films=20, size=64, seed=0, workers=1)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(phantom, "tqdm", lambda *args, **keys: tqdm(*args, **{**keys, "delay": 0}))
    phantom.write_phantom(tmp_path / "long", n_films=20, size=64, seed=0, workers=1)
    assert "drawing films: 100%" in capsys.readouterr().out
