# Which notebook makes which file. `make demo` and `make study` call this; every rule is a plain papermill line.
import atexit, glob, os, sys

sys.path.insert(0, workflow.basedir)
from lib.params import ParameterError
from lib.workflow import ITS_ERROR, Call, hold_outputs, jobs_of

try:
    call = Call.of(os.environ)
    OUTPUTS, STUDIES, every = call.outputs, call.studies, call.every
    held = hold_outputs(OUTPUTS, STUDIES) if workflow.is_main_process else []
except ParameterError as error:
    sys.exit(str(error))

OUT = f"{OUTPUTS}/{{study}}"
RUN = f"{OUT}/{{run}}/seed{{seed}}"
PRETEXT = f"{OUTPUTS}/pretext_{{size}}px/multilabel-{{backbone}}-bce/seed0"
os.environ["ITS_ERROR"] = ITS_ERROR
ALONE = {f"lib/{name}.py" for name in ("workflow", "preflight", "reference", "report")}  # that no notebook imports


def modules(*patterns):
    paths = {path for pattern in patterns for path in glob.glob(f"lib/{pattern}", recursive=True)}
    return sorted(paths - ALONE)


DATA = modules("params.py", "runs.py", "records.py", "analysis/pairs.py", "data/**/*.py")
MODELS, FIGURES = modules("*.py", "data/**/*.py"), modules("figures/*.py", "tables/*.py")
EXPLORER = modules("explorer/*.py", "explorer/*.html")
LENSES = sorted({*MODELS, *FIGURES, *modules("analysis/**/*.py")})

# OMP_NUM_THREADS keeps jobs that run side by side from fighting over cores. A busy machine may start a kernel slowly.
PAPERMILL = (
    "{{ OMP_NUM_THREADS={threads} papermill {input.notebook:q} {log:q} {params.given} -k python3 --stdout-file -"
    ' --log-level ERROR --no-progress-bar --start-timeout 300 2>&1 >&3 | notebook={log:q} awk "$ITS_ERROR" >&2; }} 3>&1'
)

def first_then(other):
    """A priority: what leads to the first pictures of the study that was asked for comes before all else."""
    return lambda wildcards: 3 if call.leads_to_first(wildcards) else other

def products(study, of=(), only=()):
    """What these rules declare for a study, or for `only` one run and seed of it; by default all: else what lies in
    between is not made if it is lost."""
    jobs = [job for job in jobs_of(STUDIES[study]) if (job[0] in of or not of) and (not only or job[1:] == only)]
    files = (expand(getattr(rules, rule).output, study=study, run=run, seed=seed) for rule, run, seed in jobs)
    return sorted({path for several in files for path in several})


onstart:
    from lib.preflight import check_before_work
    try:
        check_before_work(STUDIES.values())
    except (RuntimeError, ValueError) as error:
        sys.exit(str(error))

# Below what Snakemake says last of all.
onsuccess:
    atexit.register(lambda: print(call.to_open(), flush=True))


# The pretexts have a rule of their own. No name can be more than one word of a command.
wildcard_constraints: study=r"(?!pretext_)\w+", run=r"[\w.+-]+", backbone=r"[\w.+-]+", size=r"\d+", seed=r"\d+"


rule all:
    input: lambda wildcards: sum(map(products, STUDIES), expand(f"{OUT}/report.html", study=STUDIES))

# One run of the study that was asked for, as far as its first pictures.
rule first:
    input:
        lambda wildcards: products(
            call.main.study, ("train", "metrics", "cam_alignment", "dissection"), (call.first.name, call.first.seed))


rule notebook:
    params: given=call.given
    threads: 1
    resources: gpu=call.gpus
    shell: PAPERMILL


def notebook_of_study(name, modules=LENSES):
    return dict(notebook=f"notebooks/{name}.ipynb", study="params/studies/{study}.yaml", modules=modules)


def notebook_of_run(name):
    return dict(**notebook_of_study(name), run="params/runs/{run}.yaml", model=f"{RUN}/run.json")


use rule notebook as data with:
    priority: first_then(0)
    input: call.release_lists, **notebook_of_study("00_data", DATA + FIGURES)
    output: multiext(f"{OUT}/tables/", "films.csv", "problems.csv")
    log: f"{OUT}/00_data.ipynb"
    resources: gpu=0

# The same for every study of one image size: a pretext is trained once.
use rule notebook as pretext with:
    priority: first_then(2)
    input: notebook="notebooks/01_train.ipynb", study="params/studies/pretext.yaml", modules=MODELS
    output: f"{PRETEXT}/run.json"
    log: f"{PRETEXT}/01_train.ipynb"
    params:
        given="-f params/studies/pretext.yaml -p task multilabel -p backbone {backbone} -p loss bce -p seed 0"
        " -p study pretext_{size}px -p image_size {size}"
        f" -p device {call.main.device} -p precision {call.main.precision}"

# Its weights are not declared: that is removed before a job runs again, and a finished run shall not train anew.
use rule notebook as train with:
    priority: first_then(1)
    input:
        call.initial_weights, f"{OUT}/tables/films.csv",
        **notebook_of_study("01_train", MODELS + FIGURES), run="params/runs/{run}.yaml"
    output: multiext(f"{RUN}/", "run.json", "training.csv")
    log: f"{RUN}/01_train.ipynb"
    resources: gpu=lambda wildcards: call.gpus(wildcards, STUDIES[wildcards.study].gpus)

use rule notebook as metrics with:
    priority: first_then(0)
    input: **notebook_of_run("02_metrics")
    output: multiext(f"{RUN}/", "predictions.parquet", "metrics.csv")
    log: f"{RUN}/02_metrics.ipynb"

use rule notebook as cam_alignment with:
    priority: first_then(0)
    input: **notebook_of_run("03_cam_alignment")
    output: multiext(f"{RUN}/cam_alignment", ".parquet", "_untrained.parquet")
    log: f"{RUN}/03_cam_alignment.ipynb"

use rule notebook as dissection with:
    priority: first_then(0)
    input: **notebook_of_run("04_dissection")
    output: multiext(f"{RUN}/concepts", ".parquet", "_untrained.parquet", "_other_film.parquet")
    log: f"{RUN}/04_dissection.ipynb"

# Which of Figures 1a and 1b there are depends on the tasks of a study, so they are not declared.
use rule notebook as figures with:
    input:
        lambda w: every(w.study, "run.json", "predictions.parquet", "metrics.csv", "cam_alignment.parquet"),
        lambda w: every(w.study, "concepts.parquet"),
        lambda w: products(w.study, of=("attribution", "features", "trunk_and_head")),
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
    input: lambda w: every(w.study, "run.json"), "params/plan.yaml", **notebook_of_run("06_attribution")
    output: multiext(f"{RUN}/", "attribution.parquet", "place.parquet", "place_untrained.parquet")
    log: f"{RUN}/06_attribution.ipynb"
    params: given=lambda wildcards: call.given(wildcards) + " -p chexnet ''"

use rule notebook as chexnet with:
    input: call.chexnet_files, f"{OUT}/tables/films.csv", **notebook_of_study("06_attribution")
    output: f"{OUT}/chexnet/attribution.parquet"
    log: f"{OUT}/chexnet/06_attribution.ipynb"

use rule notebook as features with:
    input: call.siblings, **notebook_of_run("07_feature_analysis")
    output: multiext(f"{RUN}/", "importance.parquet", "feature_scores.parquet")
    log: f"{RUN}/07_feature_analysis.ipynb"

use rule notebook as trunk_and_head with:
    input: call.siblings, **notebook_of_run("09_trunk_and_head")
    output: multiext(f"{RUN}/", "trunk_head.parquet", "trunk_head_parts.csv", "prior_shift.parquet")
    log: f"{RUN}/09_trunk_and_head.ipynb"

use rule notebook as intention with:
    input: lambda w: every(w.study, "run.json"), call.chexnet_files, **notebook_of_study("08_intention")
    output: f"{OUT}/tables/intention.csv"
    log: f"{OUT}/08_intention.ipynb"

use rule notebook as laboratory with:
    input: lambda w: sum((every(name, "run.json") for name in STUDIES), []), **notebook_of_study("11_laboratory")
    output: multiext(f"{OUT}/tables/laboratory", ".csv", "_doses.csv", "_untrained.csv", "_losses.csv", "_changes.csv")
    log: f"{OUT}/11_laboratory.ipynb"
    threads: 16

use rule notebook as explore with:
    input:
        lambda w: products(w.study, of=("figures", "trunk_and_head")),
        **notebook_of_study("10_explore", LENSES + EXPLORER)
    output: f"{OUT}/explore.html"
    log: f"{OUT}/10_explore.ipynb"

rule report:
    input: lambda w: products(w.study), "lib/report.py"
    output: f"{OUT}/report.html"
    shell: "OMP_NUM_THREADS=1 python -m lib.report {wildcards.study}"
