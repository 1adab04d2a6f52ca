# Which notebook makes which file. `make demo` and `make study` call this; every rule is a plain papermill line.
import glob
import os
import socket
import sys

sys.path.insert(0, workflow.basedir)
from snakemake.exceptions import WorkflowError

from lib.params import ParameterError, load_study

try:
    overrides = {key: config[key] for key in ("data_root", "runs") if key in config}
    if "runs" in overrides:
        overrides["runs"] = overrides["runs"].split()
    study = load_study(config.get("study", "demo"), **overrides)
except ParameterError as error:
    sys.exit(str(error))

OUTPUTS = os.environ.get("OUTPUTS") or "outputs"
OUT = f"{OUTPUTS}/{study.study}"
RUN = f"{OUT}/{{run}}/seed{{seed}}"
OVERRIDES = f" -p data_root '{study.data_root}'" if "data_root" in overrides else ""
STUDY = f" -f {{input.study}}{OVERRIDES}"
RUN_OF_STUDY = STUDY + " -f {input.run} -p seed {wildcards.seed}"
# Notebooks that look at the whole study are told which runs are part of it.
ALL_RUNS = STUDY + (f" -y 'runs: [{', '.join(study.runs)}]'" if "runs" in overrides else "")
CORE = ["lib/params.py", "lib/records.py", *sorted(glob.glob("lib/data/*.py"))]
MODELS = [*CORE, "lib/models.py", "lib/losses.py", "lib/training.py", "lib/devices.py"]
LENSES = [*MODELS, *sorted(glob.glob("lib/figures/*.py")), *sorted(glob.glob("lib/tables/*.py")), *sorted(glob.glob("lib/analysis/*.py"))]
SOURCES = [
    path
    for pattern in ("Data_Entry_2017*.csv", "BBox_List_2017.csv", "train_val_list.txt", "test_list.txt")
    for path in sorted(glob.glob(f"{study.data_root}/{pattern}"))
    if study.release == "nih"
]
PRETEXT = f"{OUTPUTS}/pretext_{study.image_size}px/multilabel-{{backbone}}-bce/seed0"

# OMP_NUM_THREADS keeps jobs that run side by side from fighting over cores. A busy machine may start a kernel slowly.
PAPERMILL = "OMP_NUM_THREADS={threads} papermill {input.notebook} {log} -k python3 --no-progress-bar --log-level ERROR --stdout-file - --start-timeout 300"
# Every kernel warns that it listens on this machine's loopback; a hundred times that hides the progress.
QUIETLY = " 2> >(grep -v 'IPKernelApp. WARNING' >&2)"


onstart:
    # A weights file that is missing or cannot be downloaded, or a layer that no model has, stops the study before any film is decoded.
    from lib.models import build_model

    socket.setdefaulttimeout(60)
    runs = {(run.backbone, run.init, run.cam_layer, run.dissection_layer) for run in (study.run(name, 0) for name in study.runs)}
    for backbone, init, *layers in sorted(runs):
        if init not in ("scratch", "phantom") or any(layers):
            try:
                model = build_model(backbone, 1, "scratch" if init == "phantom" else init)
                unknown = [layer for layer in layers if layer and layer not in dict(model.named_modules())]
                if unknown:
                    raise ValueError(f"{backbone} has no module {unknown[0]}: see the names of model.named_modules()")
            except (RuntimeError, ValueError) as error:
                raise WorkflowError(str(error)) from None


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
        sources=SOURCES,
        modules=[*CORE, *sorted(glob.glob("lib/figures/*.py")), "lib/analysis/lenses.py"],
    output:
        f"{OUT}/tables/films.csv",
        f"{OUT}/tables/problems.csv",
    log:
        f"{OUT}/00_data.ipynb",
    threads: 1
    shell:
        PAPERMILL + ALL_RUNS + QUIETLY


rule pretext:
    priority: 2
    input:
        notebook="notebooks/01_train.ipynb",
        study="params/studies/pretext.yaml",
        modules=MODELS,
    output:
        f"{PRETEXT}/model.safetensors",
    log:
        f"{PRETEXT}/01_train.ipynb",
    threads: 1
    resources:
        gpu=1,
    shell:
        PAPERMILL + " -f {input.study} -p task multilabel -p backbone {wildcards.backbone} -p loss bce -p seed 0"
        f" -p study pretext_{study.image_size}px -p image_size {study.image_size} -p device {study.device} -p precision {study.precision}" + QUIETLY


def initial_weights(wildcards):
    run = study.run(wildcards.run, 0)
    return f"{PRETEXT}/model.safetensors".format(backbone=run.backbone) if run.init == "phantom" else []


rule train:
    priority: 1
    input:
        initial_weights,
        data=f"{OUT}/tables/films.csv",
        notebook="notebooks/01_train.ipynb",
        study=f"params/studies/{study.study}.yaml",
        run="params/runs/{run}.yaml",
        modules=[*MODELS, *sorted(glob.glob("lib/figures/*.py"))],
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
        PAPERMILL + RUN_OF_STUDY + QUIETLY


def lens(notebook):
    """Inputs of a notebook that looks at one trained run."""
    return dict(
        model=f"{RUN}/model.safetensors",
        notebook=f"notebooks/{notebook}.ipynb",
        study=f"params/studies/{study.study}.yaml",
        run="params/runs/{run}.yaml",
        modules=LENSES,
    )


rule metrics:
    input:
        **lens("02_metrics"),
    output:
        f"{RUN}/predictions.parquet",
        f"{RUN}/metrics.csv",
    log:
        f"{RUN}/02_metrics.ipynb",
    threads: 1
    resources:
        gpu=1,
    shell:
        PAPERMILL + RUN_OF_STUDY + QUIETLY


rule cam_alignment:
    input:
        **lens("03_cam_alignment"),
    output:
        f"{RUN}/cam_alignment.parquet",
    log:
        f"{RUN}/03_cam_alignment.ipynb",
    threads: 1
    resources:
        gpu=1,
    shell:
        PAPERMILL + RUN_OF_STUDY + QUIETLY


rule dissection:
    input:
        **lens("04_dissection"),
    output:
        f"{RUN}/concepts.parquet",
    log:
        f"{RUN}/04_dissection.ipynb",
    threads: 1
    resources:
        gpu=1,
    shell:
        PAPERMILL + RUN_OF_STUDY + QUIETLY


FIG1 = {"multilabel": "fig1a_cams_multilabel", "binary": "fig1b_cams_binary"}


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
        modules=LENSES,
    output:
        multiext(f"{OUT}/tables/table1_alignment", ".csv", ".md", ".tex"),
        multiext(f"{OUT}/tables/table2_concepts", ".csv", ".md", ".tex"),
        [f"{OUT}/figures/{FIG1[task]}{suffix}" for task in sorted({study.run(run, 0).task for run in study.runs}) for suffix in (".png", ".pdf")],
        multiext(f"{OUT}/figures/fig2_performance", ".png", ".pdf"),
    log:
        f"{OUT}/05_figures.ipynb",
    threads: 16  # cut to what --cores allows
    shell:
        PAPERMILL + ALL_RUNS + QUIETLY
