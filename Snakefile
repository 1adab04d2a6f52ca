# Which notebook makes which file. `make demo` and `make study` call this; every rule is a plain papermill line.
import glob
import os
import sys

sys.path.insert(0, workflow.basedir)
from lib.data import RELEASES
from lib.params import ParameterError, load_study

try:
    said = {key: config[key] for key in ("data_root", "runs") if key in config}
    said |= {"runs": said["runs"].split()} if "runs" in said else {}
    main = load_study(config.get("study", "demo"), **said)
    STUDIES = {main.study: main} | {name: load_study(name) for name in main.companions if "runs" not in said}
except ParameterError as error:
    sys.exit(str(error))

OUTPUTS = os.environ.get("OUTPUTS") or "outputs"
OUT = f"{OUTPUTS}/{{study}}"
RUN = f"{OUT}/{{run}}/seed{{seed}}"
PRETEXT = f"{OUTPUTS}/pretext_{{size}}px/multilabel-{{backbone}}-bce/seed0"


def modules(*patterns):
    return sorted({path for pattern in patterns for path in glob.glob(f"lib/{pattern}.py", recursive=True)})


DATA = modules("params", "runs", "records", "analysis/pairs", "data/**/*")
MODELS, LENSES, FIGURES = modules("*", "data/**/*"), modules("**/*"), modules("figures/*", "tables/*")

# What a failed notebook ends with, without papermill's own traceback above it; any other traceback is shown whole.
os.environ["ITS_ERROR"] = r"""/^Traceback/ {held = !told} held && /^Exception encountered at/ {held = 0; told = 1; next}
    held {text = text $0 "\n"; next} NF {print}
    END {if (told) print "The notebook, as far as it came: " notebook; else printf "%s", text}"""
# OMP_NUM_THREADS keeps jobs that run side by side from fighting over cores. A busy machine may start a kernel slowly.
PAPERMILL = (
    "{{ OMP_NUM_THREADS={threads} papermill {input.notebook} {log:q} {params.given} -k python3 --stdout-file -"
    " --log-level ERROR --no-progress-bar --start-timeout 300 2>&1 >&3"
    ' | awk -v notebook={log:q} "$ITS_ERROR" >&2; }} 3>&1'
)


def given(wildcards):
    """For papermill: a study's file, a run's, and what the command line says of the main study."""
    keys, own = f"-f params/studies/{wildcards.study}.yaml", said if wildcards.study == main.study else {}
    if "data_root" in own:
        keys += f" -p data_root '{main.data_root}'"
    for key in ("runs", "attribution", "features") if "runs" in own else ():
        keys += f" -y '{key}: [{', '.join(getattr(main, key))}]'"
    if "run" in wildcards.keys():
        keys += f" -f params/runs/{wildcards.run}.yaml -p seed {wildcards.seed}"
    return keys


def release_lists(wildcards):
    """The lists of a real release, so that films are read again where one has changed."""
    study = STUDIES[wildcards.study]
    root, patterns = study.data_root, RELEASES[study.release].lists
    return [path for pattern in patterns for path in sorted(glob.glob(f"{root}/{pattern}"))]


def chexnet_files(wildcards):
    return [str(path) for path in STUDIES[wildcards.study].chexnet_files.values()]


def initial_weights(wildcards):
    run = STUDIES[wildcards.study].run(wildcards.run)
    pretext = f"{PRETEXT}/run.json".format(size=run.image_size, backbone=run.backbone)
    return pretext if run.init == "phantom" else []


def siblings(wildcards):
    """Models that differ from a run in the loss alone: 07 compares them."""
    runs = STUDIES[wildcards.study].run(wildcards.run, wildcards.seed).siblings
    return [f"{RUN}/run.json".format(study=run.study, run=run.name, seed=run.seed) for run in runs]


def of_runs(study, key, *files):
    """These files of the runs that a key of the study lists."""
    runs, seeds = getattr(STUDIES[study], key), STUDIES[study].seeds
    return expand(f"{RUN}/{{file}}", study=study, run=runs, seed=seeds, file=files)


def products(name, study):
    """The last files of a study, on which all others hang."""
    whole = {
        "tables/table1_alignment.csv": study.comparison,
        "tables/intention.csv": study.pneumonia_runs,
        "chexnet/attribution.parquet": study.chexnet and not study.pneumonia_runs,
    }
    runs = of_runs(name, "attribution", "attribution.parquet") + of_runs(name, "features", "importance.parquet")
    return runs + [f"{OUTPUTS}/{name}/{file}" for file, wanted in whole.items() if wanted]

onstart:
    from lib.preflight import check_before_work
    try:
        check_before_work(STUDIES.values())
    except (RuntimeError, ValueError) as error:
        sys.exit(str(error))


# The pretexts have a rule of their own.
wildcard_constraints: study="(?!pretext_)[^/]+", run="[^/]+", size=r"\d+", seed=r"\d+"


rule all:
    input: [products(*study) for study in STUDIES.items()]


rule notebook:
    params: given=given
    threads: 1
    resources: gpu=1
    shell: PAPERMILL


def notebook_of_study(name, modules=LENSES):
    return dict(notebook=f"notebooks/{name}.ipynb", study="params/studies/{study}.yaml", modules=modules)


def notebook_of_run(name):
    return dict(**notebook_of_study(name), run="params/runs/{run}.yaml", model=f"{RUN}/run.json")


use rule notebook as data with:
    input: release_lists, **notebook_of_study("00_data", DATA + FIGURES)
    output: multiext(f"{OUT}/tables/", "films.csv", "problems.csv")
    log: f"{OUT}/00_data.ipynb"
    resources: gpu=0

# The same for every study of one image size: a pretext is trained once.
use rule notebook as pretext with:
    priority: 2
    input: notebook="notebooks/01_train.ipynb", study="params/studies/pretext.yaml", modules=MODELS
    output: f"{PRETEXT}/run.json"
    log: f"{PRETEXT}/01_train.ipynb"
    params:
        given="-f params/studies/pretext.yaml -p task multilabel -p backbone {backbone} -p loss bce -p seed 0"
        " -p study pretext_{size}px -p image_size {size}" f" -p device {main.device} -p precision {main.precision}"

# Its weights are not declared: that is removed before a job runs again, and a finished run shall not train anew.
use rule notebook as train with:
    priority: 1
    input:
        initial_weights, f"{OUT}/tables/films.csv",
        **notebook_of_study("01_train", MODELS + FIGURES), run="params/runs/{run}.yaml"
    output: multiext(f"{RUN}/", "run.json", "training.csv")
    log: f"{RUN}/01_train.ipynb"
    resources: gpu=lambda wildcards: STUDIES[wildcards.study].gpus

use rule notebook as metrics with:
    input: **notebook_of_run("02_metrics")
    output: multiext(f"{RUN}/", "predictions.parquet", "metrics.csv")
    log: f"{RUN}/02_metrics.ipynb"

use rule notebook as cam_alignment with:
    input: **notebook_of_run("03_cam_alignment")
    output: f"{RUN}/cam_alignment.parquet"
    log: f"{RUN}/03_cam_alignment.ipynb"

use rule notebook as dissection with:
    input: **notebook_of_run("04_dissection")
    output: f"{RUN}/concepts.parquet"
    log: f"{RUN}/04_dissection.ipynb"

# Which of Figures 1a and 1b there are depends on the tasks of a study, so they are not declared.
use rule notebook as figures with:
    input:
        lambda wildcards: of_runs(wildcards.study, "runs", "run.json", "predictions.parquet"),
        lambda wildcards: of_runs(wildcards.study, "runs", "metrics.csv", "cam_alignment.parquet", "concepts.parquet"),
        **notebook_of_study("05_figures")
    output:
        multiext(f"{OUT}/tables/table1_alignment", ".csv", ".md", ".tex"),
        multiext(f"{OUT}/tables/table2_concepts", ".csv", ".md", ".tex"),
        multiext(f"{OUT}/figures/fig2_performance", ".png", ".pdf")
    log: f"{OUT}/05_figures.ipynb"
    threads: 16  # cut to what --cores allows

use rule notebook as attribution with:
    input: **notebook_of_run("06_attribution")
    output: f"{RUN}/attribution.parquet"
    log: f"{RUN}/06_attribution.ipynb"
    params: given=lambda wildcards: given(wildcards) + " -p chexnet ''"

use rule notebook as chexnet with:
    input: chexnet_files, f"{OUT}/tables/films.csv", **notebook_of_study("06_attribution")
    output: f"{OUT}/chexnet/attribution.parquet"
    log: f"{OUT}/chexnet/06_attribution.ipynb"

use rule notebook as features with:
    input: siblings, **notebook_of_run("07_feature_analysis")
    output: f"{RUN}/importance.parquet"
    log: f"{RUN}/07_feature_analysis.ipynb"

use rule notebook as intention with:
    input:
        lambda wildcards: of_runs(wildcards.study, "runs", "run.json"), chexnet_files,
        **notebook_of_study("08_intention")
    output: f"{OUT}/tables/intention.csv"
    log: f"{OUT}/08_intention.ipynb"
