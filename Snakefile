# Which notebook makes which file. `make demo` and `make study` call this; every rule is a plain papermill line.
import os
import sys

sys.path.insert(0, workflow.basedir)
from lib.params import ParameterError, load_study

try:
    overrides = {key: config[key] for key in ("data_root", "runs") if key in config}
    if "runs" in overrides:
        overrides["runs"] = overrides["runs"].split()
    study = load_study(config.get("study", "demo"), **overrides)
except ParameterError as error:
    sys.exit(str(error))

OUT = f"outputs/{study.study}"
RUN = f"{OUT}/{{run}}/seed{{seed}}"
OVERRIDES = f"-p data_root '{study.data_root}'" if "data_root" in overrides else ""
CORE = ["lib/params.py", "lib/records.py", "lib/data/nih.py", "lib/data/store.py", "lib/data/batches.py"]

# OMP_NUM_THREADS keeps jobs that run side by side from fighting over cores. A kernel start is retried by papermill's long timeout.
PAPERMILL = (
    "OMP_NUM_THREADS={threads} papermill {input.notebook} {log} -k python3 --no-progress-bar --log-level ERROR --stdout-file - --start-timeout 300 "
    f"-f {{input.study}} {OVERRIDES}"
)
RUN_PARAMETERS = " -f {input.run} -p seed {wildcards.seed}"
# Every kernel warns that it listens on this machine's loopback; a hundred times that hides the progress.
QUIETLY = " 2> >(grep -v 'IPKernelApp. WARNING' >&2)"


wildcard_constraints:
    run="[^/]+",
    seed=r"\d+",


rule all:
    input:
        f"{OUT}/tables/table1_alignment.csv",


rule data:
    input:
        notebook="notebooks/00_data.ipynb",
        study=f"params/studies/{study.study}.yaml",
        modules=[*CORE, "lib/data/phantom.py"],
    output:
        f"{OUT}/tables/films.csv",
        f"{OUT}/tables/problems.csv",
    log:
        f"{OUT}/00_data.ipynb",
    threads: workflow.cores
    shell:
        PAPERMILL + QUIETLY


rule pretext:
    input:
        notebook="notebooks/01_train.ipynb",
        study="params/studies/pretext.yaml",
        run="params/runs/multilabel-{backbone}-bce.yaml",
        modules=[*CORE, "lib/data/phantom.py", "lib/models.py", "lib/losses.py", "lib/training.py"],
    output:
        "outputs/pretext/multilabel-{backbone}-bce/seed0/model.safetensors",
    log:
        "outputs/pretext/multilabel-{backbone}-bce/seed0/01_train.ipynb",
    threads: 1
    resources:
        gpu=1,
    shell:
        PAPERMILL + " -f {input.run} -p seed 0" + f" -p image_size {study.image_size}" + QUIETLY


def initial_weights(wildcards):
    backbone = study.run(wildcards.run, 0).backbone
    return f"outputs/pretext/multilabel-{backbone}-bce/seed0/model.safetensors" if study.init == "phantom" else []


rule train:
    input:
        initial_weights,
        data=f"{OUT}/tables/films.csv",
        notebook="notebooks/01_train.ipynb",
        study=f"params/studies/{study.study}.yaml",
        run="params/runs/{run}.yaml",
        modules=[*CORE, "lib/models.py", "lib/losses.py", "lib/training.py"],
    output:
        f"{RUN}/model.safetensors",
        f"{RUN}/model_last.safetensors",
        f"{RUN}/run.json",
        f"{RUN}/training.csv",
    log:
        f"{RUN}/01_train.ipynb",
    threads: 1
    resources:
        gpu=study.gpus,
    shell:
        PAPERMILL + RUN_PARAMETERS + QUIETLY


def lens(notebook, modules):
    """Inputs of a notebook that looks at one trained run."""
    return dict(
        model=f"{RUN}/model.safetensors",
        notebook=f"notebooks/{notebook}.ipynb",
        study=f"params/studies/{study.study}.yaml",
        run="params/runs/{run}.yaml",
        modules=[*CORE, "lib/models.py", "lib/analysis/inference.py", "lib/analysis/statistics.py", *modules],
    )


rule metrics:
    input:
        **lens("02_metrics", ["lib/analysis/metrics.py"]),
    output:
        f"{RUN}/predictions.parquet",
        f"{RUN}/metrics.csv",
    log:
        f"{RUN}/02_metrics.ipynb",
    threads: 1
    resources:
        gpu=1,
    shell:
        PAPERMILL + RUN_PARAMETERS + QUIETLY


rule cam_alignment:
    input:
        **lens("03_cam_alignment", ["lib/analysis/cam.py", "lib/analysis/localization.py"]),
    output:
        f"{RUN}/cam_alignment.parquet",
    log:
        f"{RUN}/03_cam_alignment.ipynb",
    threads: 1
    resources:
        gpu=1,
    shell:
        PAPERMILL + RUN_PARAMETERS + QUIETLY


rule dissection:
    input:
        **lens("04_dissection", ["lib/analysis/dissection.py"]),
    output:
        f"{RUN}/concepts.parquet",
    log:
        f"{RUN}/04_dissection.ipynb",
    threads: 1
    resources:
        gpu=1,
    shell:
        PAPERMILL + RUN_PARAMETERS + QUIETLY


rule figures:
    input:
        runs=expand(
            f"{RUN}/{{file}}",
            run=study.runs,
            seed=study.seeds,
            file=["model.safetensors", "predictions.parquet", "metrics.csv", "cam_alignment.parquet", "concepts.parquet"],
        ),
        notebook="notebooks/05_figures.ipynb",
        study=f"params/studies/{study.study}.yaml",
        modules=["lib/figures.py", "lib/tables.py", "lib/analysis/statistics.py"],
    output:
        multiext(f"{OUT}/tables/table1_alignment", ".csv", ".md", ".tex"),
        multiext(f"{OUT}/tables/table2_concepts", ".csv", ".md", ".tex"),
        multiext(f"{OUT}/figures/fig1a_cams_multilabel", ".png", ".pdf"),
        multiext(f"{OUT}/figures/fig1b_cams_binary", ".png", ".pdf"),
        multiext(f"{OUT}/figures/fig2_performance", ".png", ".pdf"),
    log:
        f"{OUT}/05_figures.ipynb",
    threads: workflow.cores
    shell:
        PAPERMILL + QUIETLY
