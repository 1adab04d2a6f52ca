"""What of a study's results goes into git: `python -m lib.reference STUDY`, or `make reference STUDY=…`; of some of its
runs, RUNS="…" as for `make study`.

outputs/reference/<study>/ holds its tables, the figures on which no film is seen, and provenance.json: what they were
made from, on what machine, in what time. README's tables of results are made of these files (`result_table`), and a
test holds both together.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from lib import records
from lib.params import ROOT, ParameterError, Study, load_study
from lib.plan import load_plan
from lib.state import environment
from lib.tables.layout import long_metrics, number_text
from lib.tables.names import display
from lib.workflow import told

FOLDER = ROOT / "outputs" / "reference"
# No file that names single films or patients, and no picture of one.
OF_STUDY = ("tables/performance.csv", "tables/table1_*", "tables/table2_*", "tables/differences_to_bce.csv")
OF_STUDY += ("tables/verdicts.*", "tables/claims.csv", "tables/null.csv", "figures/fig2_performance.png")
OF_RUN = ("table2_*", "fig_*_by_threshold.png", "fig_randomisation.png", "relevance_verdicts.csv")
OF_RUN += ("trunk_head_parts.csv", "fig_trunk_and_head.png", "importance_*.csv")
KINDS = (".csv", ".md", ".png")
LIMIT = 2_500_000  # bytes a study


def files(study: Study) -> Iterator[tuple[Path, Path]]:
    """Each result of the study that goes into git, and its place in the study's folder of reference results."""
    for pattern in OF_STUDY:
        for path in sorted(study.folder.glob(pattern)):
            yield path, Path(path.name)
    for run in study.every_run:
        for pattern in OF_RUN:
            for path in sorted(run.run_folder.glob(pattern)):
                yield path, Path(f"{run.name}-seed{run.seed}", path.name)


def provenance(study: Study) -> dict:
    """What the results were made from: parameters, plan, films, and by run the commit, device, times and best AUROC."""
    every = study.every_run
    if study.shuffled_study:
        shuffled = load_study(study.shuffled_study, data_root=study.data_root).every_run
        every = [*every, *(run for run in shuffled if (run.run_folder / "run.json").is_file())]
    runs = {f"{run.study}/{run.name}/seed{run.seed}": records.read_json(run.run_folder / "run.json") for run in every}
    first = next(iter(runs.values()))
    changed = {key: value for key, value in study.model_dump().items() if value != Study.model_fields[key].default}
    kept = (
        "commit",
        "resumed",
        "plan",
        "started",
        "finished",
        "train_seconds",
        "device",
        "best_epoch",
        "best_val_auroc",
    )
    made = {name: {key: run[key] for key in kept if key in run} for name, run in runs.items()}
    return {
        "study": study.study,
        "data": study.data_label,
        "parameters": {key: value for key, value in changed.items() if key != "data_root"},
        "films": first["films"],
        "films_digest": first["identity"]["films"],
        "versions": first.get("versions", {}),
        "plan": load_plan().digest,
        "collected_by": environment()["commit"],
        "train_seconds": round(sum(run["train_seconds"] for run in made.values())),
        "runs": made,
    }


def collect(study: Study) -> Path:
    """Copy the results of a study to its folder of reference results, whose former contents go.

    Raises
    ------
    ParameterError
        05 has not been run, or by another plan; or the results are larger than what git should hold.
    """
    chosen = [(path, place) for path, place in files(study) if path.suffix in KINDS]
    if not (study.folder / "tables" / "verdicts.csv").is_file():
        raise ParameterError(f"{study.folder} holds no tables/verdicts.csv: run make study STUDY={study.study} first")
    judged = records.read_table(study.folder / "tables" / "verdicts.csv")
    if len(judged) and set(judged["plan"]) != {load_plan().digest}:
        raise ParameterError(
            f"{study.folder}/tables/verdicts.csv was judged by another plan: run 05_figures again first"
        )
    size = sum(path.stat().st_size for path, _ in chosen)
    if size > LIMIT:
        raise ParameterError(f"{size / 1e6:.1f} MB of results; at most {LIMIT / 1e6:.1f} MB of a study go into git")
    made, folder = provenance(study), FOLDER / study.study
    shutil.rmtree(folder, ignore_errors=True)
    for path, place in chosen:
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / place)
    records.write_json(made, folder / "provenance.json")
    return folder


def result_table(folder: Path, task: str = "multilabel") -> str:
    """Macro AUROC, mean probability, IoBB, IoR (of maps that are not empty) and the share of empty maps, as README
    prints them: a row a loss, the runs of one task.

    `folder` : that of `collect`.
    """
    performance, overlap = (pd.read_csv(folder / name) for name in ("performance.csv", "table1_readings.csv"))
    overlap = overlap[overlap["loss"].isin(performance["loss"])]  # without the controls
    average = performance[performance["class"] == "Average"]
    values = pd.concat([long_metrics(average, ("auroc", "mean_probability")), overlap])
    values = values[values["task"] == task].set_index(["backbone", "loss", "metric"])["value"]
    backbones, losses = (values.index.unique(level) for level in ("backbone", "loss"))
    columns = [
        (backbone, name) for backbone in backbones for name in ("auroc", "mean_probability", "iobb", "ior", "empty")
    ]
    heads = (f"{display(backbone)}: " * (name == "auroc") + display(name) for backbone, name in columns)
    rows = [["", *heads]]
    rows.append(["---", *["---:"] * len(columns)])
    for loss in losses:
        found = (values.get((backbone, loss, name), np.nan) for backbone, name in columns)
        rows.append([display(loss), *(number_text(value, 3) for value in found)])
    return "\n".join(f"|{'|'.join(row)}|" for row in rows)


if __name__ == "__main__":
    try:
        print(collect(load_study(*sys.argv[1:2], **told(os.environ)[1])))
    except ParameterError as error:
        sys.exit(str(error))
