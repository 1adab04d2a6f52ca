# Which notebook makes which file. `make demo` and `make study` call this; every rule is a plain papermill line.
import glob, os, shlex, sys

sys.path.insert(0, workflow.basedir)
from lib.data import RELEASES
from lib.params import OF_RUNS, ParameterError, load_study
from lib.workflow import check_releases, hold_outputs, jobs_of, told

try:
    OUTPUTS, said = told(os.environ)
    main = load_study(os.environ.get("STUDY", "demo"), **said)
    STUDIES = {main.study: main} | {name: load_study(name) for name in main.companions if "runs" not in said}
    check_releases(STUDIES.values())
    held = hold_outputs(OUTPUTS, STUDIES) if workflow.is_main_process else []
except ParameterError as error:
    sys.exit(str(error))

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
    END {if (told) print "The notebook, as far as it came: " ENVIRON["notebook"]; else printf "%s", text}"""
# OMP_NUM_THREADS keeps jobs that run side by side from fighting over cores. A busy machine may start a kernel slowly.
PAPERMILL = (
    "{{ OMP_NUM_THREADS={threads} papermill {input.notebook:q} {log:q} {params.given} -k python3 --stdout-file -"
    ' --log-level ERROR --no-progress-bar --start-timeout 300 2>&1 >&3 | notebook={log:q} awk "$ITS_ERROR" >&2; }} 3>&1'
)

def given(wildcards):
    """For papermill: a study's file, a run's, and what the command line says of the main study."""
    words, own = ["-f", f"params/studies/{wildcards.study}.yaml"], said if wildcards.study == main.study else {}
    words += ["-p", "data_root", main.data_root] if "data_root" in own else []
    for key in ("runs", *OF_RUNS) if "runs" in own else ():
        words += ["-y", f"{key}: [{', '.join(getattr(main, key))}]"]
    if "run" in wildcards.keys():
        words += ["-f", f"params/runs/{wildcards.run}.yaml", "-p", "seed", wildcards.seed]
    return shlex.join(words)

def release_lists(wildcards):
    """The lists of a real release, so that films are read again where one has changed."""
    study = STUDIES[wildcards.study]
    root, patterns = study.data_root, RELEASES[study.release].lists
    return [f"{root}/{path}" for pattern in patterns for path in sorted(glob.glob(pattern, root_dir=root))]

def chexnet_files(wildcards):
    return [str(path) for path in STUDIES[wildcards.study].chexnet_files.values()]

def initial_weights(wildcards):
    run = STUDIES[wildcards.study].run(wildcards.run)
    return f"{PRETEXT}/run.json".format(size=run.image_size, backbone=run.backbone) if run.init == "phantom" else []

def siblings(wildcards):
    """Models that differ from a run in the loss alone: 07 and 09 compare them."""
    runs = STUDIES[wildcards.study].run(wildcards.run, wildcards.seed).siblings
    return [f"{RUN}/run.json".format(study=run.study, run=run.name, seed=run.seed) for run in runs]

def of_runs(study, *files):
    """These files of all runs of a study."""
    runs = STUDIES[study].every_run
    return [f"{RUN}/{file}".format(study=study, run=run.name, seed=run.seed) for run in runs for file in files]

def products(study, of=()):
    """What these rules declare for a study; by default all: else what lies in between is not made if it is lost."""
    jobs = [job for job in jobs_of(STUDIES[study]) if job[0] in of or not of]
    files = (expand(getattr(rules, rule).output, study=study, run=run, seed=seed) for rule, run, seed in jobs)
    return sorted({path for several in files for path in several})


onstart:
    from lib.preflight import check_before_work
    try:
        check_before_work(STUDIES.values())
    except (RuntimeError, ValueError) as error:
        sys.exit(str(error))


# The pretexts have a rule of their own. No name can be more than one word of a command.
wildcard_constraints: study=r"(?!pretext_)\w+", run=r"[\w.+-]+", backbone=r"[\w.+-]+", size=r"\d+", seed=r"\d+"


rule all:
    input: lambda wildcards: sum(map(products, STUDIES), [])


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
    output: multiext(f"{RUN}/cam_alignment", ".parquet", "_untrained.parquet")
    log: f"{RUN}/03_cam_alignment.ipynb"

use rule notebook as dissection with:
    input: **notebook_of_run("04_dissection")
    output: multiext(f"{RUN}/concepts", ".parquet", "_untrained.parquet", "_other_film.parquet")
    log: f"{RUN}/04_dissection.ipynb"

# Which of Figures 1a and 1b there are depends on the tasks of a study, so they are not declared.
use rule notebook as figures with:
    input:
        lambda wildcards: of_runs(wildcards.study, "run.json", "predictions.parquet"),
        lambda wildcards: of_runs(wildcards.study, "metrics.csv", "cam_alignment.parquet", "concepts.parquet"),
        lambda wildcards: products(wildcards.study, of=("attribution", "features", "trunk_and_head")),
        "params/plan.yaml", **notebook_of_study("05_figures")
    output:
        multiext(f"{OUT}/tables/", "null.csv", "verdicts.csv", "verdicts.md", "claims.csv", "performance.csv"),
        multiext(f"{OUT}/tables/table1_readings", ".csv", ".md"),
        multiext(f"{OUT}/tables/table1_alignment", ".csv", ".md", ".tex"),
        multiext(f"{OUT}/tables/table2_concepts", ".csv", ".md", ".tex"),
        multiext(f"{OUT}/figures/fig2_performance", ".png", ".pdf")
    log: f"{OUT}/05_figures.ipynb"
    threads: 16  # cut to what --cores allows

use rule notebook as attribution with:
    input: lambda w: of_runs(w.study, "run.json"), "params/plan.yaml", **notebook_of_run("06_attribution")
    output: multiext(f"{RUN}/", "attribution.parquet", "place.parquet", "place_untrained.parquet")
    log: f"{RUN}/06_attribution.ipynb"
    params: given=lambda wildcards: given(wildcards) + " -p chexnet ''"

use rule notebook as chexnet with:
    input: chexnet_files, f"{OUT}/tables/films.csv", **notebook_of_study("06_attribution")
    output: f"{OUT}/chexnet/attribution.parquet"
    log: f"{OUT}/chexnet/06_attribution.ipynb"

use rule notebook as features with:
    input: siblings, **notebook_of_run("07_feature_analysis")
    output: multiext(f"{RUN}/", "importance.parquet", "feature_scores.parquet")
    log: f"{RUN}/07_feature_analysis.ipynb"

use rule notebook as trunk_and_head with:
    input: siblings, **notebook_of_run("09_trunk_and_head")
    output: multiext(f"{RUN}/", "trunk_head.parquet", "trunk_head_parts.csv", "prior_shift.parquet")
    log: f"{RUN}/09_trunk_and_head.ipynb"

use rule notebook as intention with:
    input: lambda wildcards: of_runs(wildcards.study, "run.json"), chexnet_files, **notebook_of_study("08_intention")
    output: f"{OUT}/tables/intention.csv"
    log: f"{OUT}/08_intention.ipynb"

use rule notebook as laboratory with:
    input:
        lambda wildcards: sum((of_runs(name, "run.json") for name in STUDIES), []),
        **notebook_of_study("11_laboratory")
    output: multiext(f"{OUT}/tables/laboratory", ".csv", "_doses.csv", "_untrained.csv", "_losses.csv", "_changes.csv")
    log: f"{OUT}/11_laboratory.ipynb"
    threads: 16
