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
    main = load_study(config.get("study", "demo"), **overrides)
    STUDIES = {study.study: study for study in (main, *(load_study(name) for name in main.companions if "runs" not in overrides))}
except ParameterError as error:
    sys.exit(str(error))

OUTPUTS = os.environ.get("OUTPUTS") or "outputs"
OUT = f"{OUTPUTS}/{{study}}"
RUN = f"{OUT}/{{run}}/seed{{seed}}"
CORE = ["lib/params.py", "lib/records.py", *sorted(glob.glob("lib/data/*.py"))]
FIGURES = sorted(glob.glob("lib/figures/*.py") + glob.glob("lib/tables/*.py"))
MODELS = [*CORE, "lib/models.py", "lib/losses.py", "lib/training.py", "lib/devices.py"]
LENSES = [*MODELS, *FIGURES, *sorted(glob.glob("lib/analysis/*.py"))]
PRETEXT = f"{OUTPUTS}/pretext_{{size}}px/multilabel-{{backbone}}-bce/seed0"


def own_keys(wildcards):
    """What the command line says of the main study, for papermill: its data root, and which of its runs are part of it."""
    said = overrides if wildcards.study == main.study else {}
    root = f" -p data_root '{said['data_root']}'" if "data_root" in said else ""
    lists = {key: ", ".join(getattr(main, key)) for key in ("runs", "attribution", "features")} if "runs" in said else {}
    return root + "".join(f" -y '{key}: [{names}]'" for key, names in lists.items())


def sources(wildcards):
    """The lists of a real release, so that films are read again where one has changed."""
    study = STUDIES[wildcards.study]
    patterns = {
        "nih": ("Data_Entry_2017*.csv", "BBox_List_2017.csv", "train_val_list.txt", "test_list.txt"),
        "rsna": ("stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"),
    }
    return [path for pattern in patterns.get(study.release, ()) for path in sorted(glob.glob(f"{study.data_root}/{pattern}"))]


def chexnet_files(wildcards):
    """The checkpoint and the lists that a study names."""
    return [str(path) for path in STUDIES[wildcards.study].chexnet_files.values()]


STUDY = " -f {input.study}{params.own_keys}"
RUN_OF_STUDY = STUDY + " -f {input.run} -p seed {wildcards.seed}"

# OMP_NUM_THREADS keeps jobs that run side by side from fighting over cores. A busy machine may start a kernel slowly.
PAPERMILL = "OMP_NUM_THREADS={threads} papermill {input.notebook} {log} -k python3 --no-progress-bar --log-level ERROR --stdout-file - --start-timeout 300"
# Every kernel warns that it listens on this machine's loopback; a hundred times that hides the progress.
QUIETLY = " 2> >(grep -v 'IPKernelApp. WARNING' >&2)"


onstart:
    # A weights file that is missing or cannot be downloaded, or a layer that no model has, stops the study before any film is decoded.
    from lib.models import build_model, load_chexnet

    socket.setdefaulttimeout(60)
    try:
        for files in (study.chexnet_files for study in STUDIES.values()):
            for key, path in files.items():
                if not path.is_file():
                    raise RuntimeError(f"{key}: there is no file {path}")
            if "chexnet" in files:
                load_chexnet(files["chexnet"])
    except RuntimeError as error:
        raise WorkflowError(str(error)) from None
    every = (study.run(name, 0) for study in STUDIES.values() for name in study.runs)
    runs = {(run.backbone, run.init, run.cam_layer, run.dissection_layer) for run in every}
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
    study="(?!pretext_)[^/]+",  # the pretexts have a rule of their own
    run="[^/]+",
    size=r"\d+",
    seed=r"\d+",


def products(study):
    """The last files of a study, on which all others hang."""
    runs = lambda names, file: expand(RUN + "/" + file, study=study.study, run=names, seed=study.seeds)
    made = runs(study.attribution, "attribution.parquet") + runs(study.features, "importance.parquet")
    if study.comparison:
        made.append(f"{OUTPUTS}/{study.study}/tables/table1_alignment.csv")
    if study.chexnet and study.release == "nih":
        made.append(f"{OUTPUTS}/{study.study}/chexnet/attribution.parquet")
    if study.release.endswith("rsna"):
        made.append(f"{OUTPUTS}/{study.study}/tables/intention.csv")
    return made


rule all:
    input:
        [products(study) for study in STUDIES.values()],


rule data:
    input:
        sources,
        notebook="notebooks/00_data.ipynb",
        study="params/studies/{study}.yaml",
        modules=[*CORE, *FIGURES, "lib/analysis/lenses.py"],
    output:
        f"{OUT}/tables/films.csv",
        f"{OUT}/tables/problems.csv",
    log:
        f"{OUT}/00_data.ipynb",
    params:
        own_keys=own_keys,
    threads: 1
    shell:
        PAPERMILL + STUDY + QUIETLY


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
    params:
        # The same for every study of one image size: a pretext is trained once.
        device=f" -p device {main.device} -p precision {main.precision}",
    shell:
        PAPERMILL + " -f {input.study} -p task multilabel -p backbone {wildcards.backbone} -p loss bce -p seed 0"
        " -p study pretext_{wildcards.size}px -p image_size {wildcards.size}{params.device}" + QUIETLY


def initial_weights(wildcards):
    run = STUDIES[wildcards.study].run(wildcards.run, 0)
    return f"{PRETEXT}/model.safetensors".format(size=run.image_size, backbone=run.backbone) if run.init == "phantom" else []


rule train:
    priority: 1
    input:
        initial_weights,
        data=f"{OUT}/tables/films.csv",
        notebook="notebooks/01_train.ipynb",
        study="params/studies/{study}.yaml",
        run="params/runs/{run}.yaml",
        modules=[*MODELS, *FIGURES],
    output:
        f"{RUN}/model.safetensors",
        f"{RUN}/model_last.safetensors",
        f"{RUN}/run.json",
        f"{RUN}/training.csv",
    log:
        f"{RUN}/01_train.ipynb",
    params:
        own_keys=own_keys,
    threads: 1
    resources:
        gpu=lambda wildcards: STUDIES[wildcards.study].gpus,
    shell:
        PAPERMILL + RUN_OF_STUDY + QUIETLY


def lens(notebook):
    """Inputs of a notebook that looks at one trained run."""
    return dict(
        model=f"{RUN}/model.safetensors",
        notebook=f"notebooks/{notebook}.ipynb",
        study="params/studies/{study}.yaml",
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
    params:
        own_keys=own_keys,
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
    params:
        own_keys=own_keys,
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
    params:
        own_keys=own_keys,
    threads: 1
    resources:
        gpu=1,
    shell:
        PAPERMILL + RUN_OF_STUDY + QUIETLY


rule attribution:
    input:
        **lens("06_attribution"),
    output:
        f"{RUN}/attribution.parquet",
    log:
        f"{RUN}/06_attribution.ipynb",
    params:
        own_keys=own_keys,
    threads: 1
    resources:
        gpu=1,
    shell:
        PAPERMILL + RUN_OF_STUDY + " -p chexnet ''" + QUIETLY


rule chexnet:
    input:
        chexnet_files,
        data=f"{OUT}/tables/films.csv",
        notebook="notebooks/06_attribution.ipynb",
        study="params/studies/{study}.yaml",
        modules=LENSES,
    output:
        f"{OUT}/chexnet/attribution.parquet",
    log:
        f"{OUT}/chexnet/06_attribution.ipynb",
    params:
        own_keys=own_keys,
    threads: 1
    resources:
        gpu=1,
    shell:
        PAPERMILL + STUDY + QUIETLY


def siblings(wildcards):
    """Models of the same task and backbone, trained with the other losses: 07 compares them."""
    study = STUDIES[wildcards.study]
    stem = wildcards.run.rpartition("-")[0]
    return expand(f"{RUN}/model.safetensors", study=study.study, run=[run for run in study.runs if run.rpartition("-")[0] == stem], seed=wildcards.seed)


rule features:
    input:
        siblings,
        **lens("07_feature_analysis"),
    output:
        f"{RUN}/importance.parquet",
    log:
        f"{RUN}/07_feature_analysis.ipynb",
    params:
        own_keys=own_keys,
    threads: 1
    resources:
        gpu=1,
    shell:
        PAPERMILL + RUN_OF_STUDY + QUIETLY


def files_of_runs(*names):
    """A function of the wildcards: the named files of every run of a study."""
    return lambda wildcards: expand(
        f"{RUN}/{{file}}", study=wildcards.study, run=STUDIES[wildcards.study].runs, seed=STUDIES[wildcards.study].seeds, file=names
    )


rule intention:
    input:
        files_of_runs("model.safetensors"),
        chexnet_files,
        notebook="notebooks/08_intention.ipynb",
        study="params/studies/{study}.yaml",
        modules=LENSES,
    output:
        f"{OUT}/tables/intention.csv",
    log:
        f"{OUT}/08_intention.ipynb",
    params:
        own_keys=own_keys,
    threads: 1
    resources:
        gpu=1,
    shell:
        PAPERMILL + STUDY + QUIETLY


# Which of Figures 1a and 1b there are depends on the tasks of a study, so they are not declared.
rule figures:
    input:
        files_of_runs("model.safetensors", "predictions.parquet", "metrics.csv", "cam_alignment.parquet", "concepts.parquet"),
        notebook="notebooks/05_figures.ipynb",
        study="params/studies/{study}.yaml",
        modules=LENSES,
    output:
        multiext(f"{OUT}/tables/table1_alignment", ".csv", ".md", ".tex"),
        multiext(f"{OUT}/tables/table2_concepts", ".csv", ".md", ".tex"),
        multiext(f"{OUT}/figures/fig2_performance", ".png", ".pdf"),
    log:
        f"{OUT}/05_figures.ipynb",
    params:
        own_keys=own_keys,
    threads: 16  # cut to what --cores allows
    shell:
        PAPERMILL + STUDY + QUIETLY
