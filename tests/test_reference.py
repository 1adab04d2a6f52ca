"""What goes into git of a study's results, and that README's tables are those."""

import json

import pandas as pd
import pytest

from lib import records, reference
from lib.params import ROOT, ParameterError, Study
from lib.plan import load_plan

KEPT = sorted(path for path in reference.FOLDER.glob("*") if path.is_dir())


@pytest.mark.parametrize("folder", KEPT, ids=lambda path: path.name)
def test_readme_prints_the_reference_results(folder):
    table = reference.result_table(folder)
    assert table.count("\n") >= 3
    assert table in (ROOT / "README.md").read_text() or table in (reference.FOLDER.parent / "README.md").read_text()


@pytest.mark.parametrize("folder", KEPT, ids=lambda path: path.name)
def test_reference_results_name_no_film_and_no_patient(folder):
    size = 0
    for path in folder.rglob("*"):
        size += path.stat().st_size
        assert path.is_dir() or path.suffix in (*reference.KINDS, ".json")
        if path.suffix == ".csv":
            assert not {"image", "patient", "row"} & set(pd.read_csv(path, nrows=0).columns)
    assert size < reference.LIMIT
    told = json.loads((folder / "provenance.json").read_text())
    assert (
        told["study"] == folder.name
        and told["runs"]
        and told["plan"]
        and "/" not in str(told["parameters"].get("data_root", ""))
    )


def test_some_results_are_in_git():
    assert KEPT


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setenv("OUTPUTS", str(tmp_path / "out"))
    monkeypatch.setattr(reference, "FOLDER", tmp_path / "reference")
    study = Study(study="small", runs=["multilabel-tdensenet-bce"], data_root="secret/folder")
    run = study.every_run[0]
    told = {"films": {"test": 3}, "identity": {"films": "abc"}, "commit": "c0", "host": "my-machine", "device": "cpu",
            "started": "2026-01-02", "finished": "2026-01-03", "train_seconds": 5.5}  # fmt: skip
    records.write_json(told, run.run_folder / "run.json")
    records.write_table(pd.DataFrame({"image": ["a.png"]}), run.run_folder / "metrics.csv")
    records.write_table(pd.DataFrame({"part": ["trunk"]}), run.run_folder / "trunk_head_parts.csv")
    average = {"task": "multilabel", "backbone": "tdensenet", "loss": "bce", "class": "Average"}
    performance = pd.DataFrame([average | {"auroc": 0.81251, "mean_probability": 0.1}])
    records.write_table(performance, study.folder / "tables" / "performance.csv")
    overlap = [
        average | {"metric": name, "value": value} for name, value in (("iobb", 0.5), ("ior", 0.25), ("empty", 0))
    ]
    overlap.append(overlap[0] | {"loss": "untrained"})
    records.write_table(pd.DataFrame(overlap), study.folder / "tables" / "table1_readings.csv")
    for name in ("films.csv", "table1_alignment.tex"):
        records.write_text("x", study.folder / "tables" / name)
    return study


def test_tables_are_collected_and_what_made_them_is_told(study):
    old = reference.FOLDER / "small" / "old.csv"
    old.parent.mkdir(parents=True)
    old.touch()
    with pytest.raises(ParameterError, match=r"holds no tables/verdicts.csv: run make study STUDY=small first"):
        reference.collect(study)
    assert old.exists()
    verdicts = study.folder / "tables" / "verdicts.csv"
    records.write_text("claim,plan\niobb_up,0123\n", verdicts)
    with pytest.raises(ParameterError, match="was judged by another plan: run 05_figures again first"):
        reference.collect(study)
    records.write_text(f"claim,plan\niobb_up,{load_plan().digest}\n", verdicts)
    folder = reference.collect(study)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {"performance.csv", "table1_readings.csv", "verdicts.csv", "provenance.json",
                     "multilabel-tdensenet-bce-seed0/trunk_head_parts.csv"}  # fmt: skip
    text = (folder / "provenance.json").read_text()
    told = json.loads(text)
    assert told["runs"]["small/multilabel-tdensenet-bce/seed0"]["commit"] == "c0" and told["train_seconds"] == 6
    assert "secret" not in text and "my-machine" not in text and told["films_digest"] == "abc"
    assert reference.result_table(folder).splitlines()[2] == "|BCE|0.813|0.100|0.500|0.250|0.000|"
    head = "||T-DenseNet: AUROC|Mean probability|IoBB|IoR|Empty maps|"
    assert reference.result_table(folder).splitlines()[0] == head


def test_more_than_git_should_hold_is_refused(study, monkeypatch):
    records.write_text(f"claim,plan\nx,{load_plan().digest}\n", study.folder / "tables" / "verdicts.csv")
    monkeypatch.setattr(reference, "LIMIT", 10)
    with pytest.raises(ParameterError, match="MB of results; at most"):
        reference.collect(study)
    assert not (reference.FOLDER / "small").exists()
