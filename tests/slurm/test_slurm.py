"""A study through `PROFILE=slurm` on a real Slurm of one node: cancelled, orphaned, finished, equal to a local one."""

import os
import re
import shutil
import signal
import subprocess
import time

import pandas as pd
import pytest
from safetensors.torch import load_file

from lib import records
from tests.slurm.cluster import missing, one_node, program
from tests.test_study import make_study, project, start  # noqa: F401  a fixture

RUN = "multilabel-tdensenet-focal"
STUDY = f"""
study: clustered
runs: [{RUN}]
release: phantom
phantom_films: 100
phantom_size: 64
image_size: 32
validation_fraction: 0.3
init: scratch
epochs: 6
batch_size: 16
n_replicates: 20
device: cpu
"""
RULES = {"data", "train", "metrics", "cam_alignment", "dissection", "figures", "explore", "report"}
TABLES = ("training.csv", "predictions.parquet", "metrics.csv", "cam_alignment.parquet", "concepts.parquet")
WAITING = "another process trains it; waiting for its result"
ONE_THREAD = "--set-threads train=1 figures=1"  # as a local run with JOBS=1 has

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("SLURM_TEST") != "1", reason="asked for by SLURM_TEST=1: ten minutes on two cores"
    ),
    pytest.mark.skipif(bool(missing()), reason=f"not installed: {', '.join(missing())} (slurm-wlm, munge)"),
]


@pytest.fixture(scope="module")
def cluster():
    with one_node() as environment:
        yield environment


@pytest.fixture(scope="module")
def local(project):  # noqa: F811
    """Folder of the study as a local call makes it."""
    (project / "params" / "studies" / "clustered.yaml").write_text(STUDY)
    process = start(project, "STUDY=clustered", "JOBS=1", OUTPUTS=str(project / "local"))
    said = process.communicate(timeout=7200)[0]
    assert process.returncode == 0, said
    return project / "local" / "clustered"


@pytest.fixture(scope="module")
def calls(project, local, cluster):  # noqa: F811
    """What three calls of the study said: of the first a job was cancelled, the second was killed, the third ended."""
    state = project / "outputs" / "clustered" / RUN / "seed0" / "state"
    # Without a retry: else the call that lost a job submits it again.
    arguments = ("STUDY=clustered", "PROFILE=slurm")
    changes = {"ADDED": f"{ONE_THREAD} --retries 0 --latency-wait 10", **cluster}

    first = start(project, *arguments, **changes)
    wait_for_more(lambda: set(state.glob("epoch-*.pt")), first)
    asked("scancel", *running(cluster), environment=cluster)
    said = [first.communicate(timeout=7200)[0]]

    second = start(project, *arguments, **changes)
    wait_for_more(lambda: set(state.glob("epoch-*.pt")), second)
    os.killpg(second.pid, signal.SIGKILL)
    (orphan,) = running(cluster)
    asked("scontrol", "suspend", orphan, environment=cluster)  # so that it still trains when the next call comes to it
    said.append(second.communicate()[0])

    third = start(project, *arguments, **changes)
    wait_for_more(lambda: {text for text in logs(project, "train") if WAITING in text}, third)
    asked("scontrol", "resume", orphan, environment=cluster)
    said.append(third.communicate(timeout=7200)[0])
    assert third.returncode == 0, said[-1]
    return said


def wait_for_more(found, process):
    """Until a function finds more than when it was called first."""
    before, deadline = found(), time.monotonic() + 7200
    while not found() - before:
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.05)


def asked(name, *arguments, environment):
    options = {"env": os.environ | environment, "capture_output": True, "text": True, "check": True}
    return subprocess.run([program(name), *arguments], **options).stdout


def running(environment):
    return asked("squeue", "--noheader", "--states=running", "--format=%i", environment=environment).split()


def logs(project, rule):  # noqa: F811
    """What the jobs of a rule said, in the order in which they were submitted."""
    folder = project / ".snakemake" / "slurm_logs" / f"rule_{rule}"
    return [path.read_text() for path in sorted(folder.rglob("*.log"), key=lambda path: int(path.stem))]


def test_every_job_is_one_of_slurms(calls, project):  # noqa: F811
    submitted = set(re.findall(r"rule_(\w+)/\S+/\d+\.log", "".join(calls)))
    assert submitted == RULES and all(logs(project, rule) for rule in RULES)
    assert calls[-1].splitlines()[-1].startswith("Open outputs/clustered/report.html, ")


def test_a_cancelled_job_is_said_and_carried_on(calls, project):  # noqa: F811
    assert "SLURM status is: 'CANCELLED'" in calls[0] and "make: ***" in calls[0]
    cancelled, carried_on, *_ = logs(project, "train")
    assert "epoch 1/6" in cancelled and "epoch 6/6" not in cancelled
    assert "carries on after epoch" in carried_on and "epoch 1/6" not in carried_on


def test_what_a_killed_call_left_running_is_waited_for(calls, project):  # noqa: F811
    _, orphan, waited = logs(project, "train")
    assert WAITING in waited and "epoch 6" not in waited
    assert "epoch 6/6" in orphan and "already trained, 6 epochs" in waited


def test_epoch_lines_are_kept_with_the_jobs_that_went_well(calls, project):  # noqa: F811
    assert logs(project, "train")[1].count("validation AUROC") > 1


def test_nothing_differs_from_a_local_run_of_as_many_threads(calls, local, project):  # noqa: F811
    ours, theirs = project / "outputs" / "clustered", local
    record = records.read_json(ours / RUN / "seed0" / "run.json")
    assert record["threads"] == records.read_json(theirs / RUN / "seed0" / "run.json")["threads"] == 1
    weights = [load_file(folder / RUN / "seed0" / "model.safetensors") for folder in (ours, theirs)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0].keys() | weights[1].keys())
    for name in [f"{RUN}/seed0/{table}" for table in TABLES] + ["tables/table1_alignment.csv", "tables/verdicts.csv"]:
        frames = [records.read_table(folder / name) for folder in (ours, theirs)]
        frames = [frame.drop(columns=["seconds", "films_per_second"], errors="ignore") for frame in frames]
        pd.testing.assert_frame_equal(*frames, check_exact=True)


def test_a_refused_submission_says_why_and_a_partition_is_obeyed(project, cluster):  # noqa: F811
    """The node has no GPU, and training with `device: auto` asks for one."""
    shutil.rmtree(project / "refused", ignore_errors=True)
    text = STUDY.replace("device: cpu", "device: auto").replace("clustered", "refused")
    (project / "params" / "studies" / "refused.yaml").write_text(text)
    added = "--retries 0 --until train --default-resources slurm_partition=other slurm_account=mine mem_mb=2000"
    changes = {"ADDED": added, "OUTPUTS": str(project / "refused")}
    status, said = make_study(project, "STUDY=refused", "PROFILE=slurm", **changes, **cluster)
    assert status != 0 and "SLURM sbatch failed" in said and "--gpus=1" in said
    films = re.search(r"SLURM jobid (\d+) \(log: \S+/rule_data/refused/", said)[1]
    assert asked(
        "squeue", "--noheader", "--states=all", "--jobs", films, "--format=%P %T", environment=cluster
    ).split() == ["other", "COMPLETED"]
