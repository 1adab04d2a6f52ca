"""A Slurm of one node on this machine, from Debian's slurm-wlm and munge, for as long as a command runs:

    python -m tests.slurm.cluster make study STUDY=smoke PROFILE=slurm GPUS=0

munged, slurmctld and slurmd listen on loopback alone, keep everything in a temporary folder, and are stopped behind the
command; no systemd, no accounting, no change to the machine's own Slurm.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sinfo", "sbatch", "srun", "squeue", "scancel", "scontrol")
CPUS = 8  # that the node claims to have, however many there are: a job may ask for as many as a real node has
CONFIGURATION = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=100000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
PartitionName=other Nodes={host} MaxTime=INFINITE State=UP
"""


def program(name: str) -> str | None:
    """Path of a program; the daemons' folder is in the PATH of administrators alone."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def missing() -> list[str]:
    """The programs that are not installed."""
    return [name for name in PROGRAMS if not program(name)]


def _free_ports(n):
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def one_node() -> Iterator[dict[str, str]]:
    """Yield the environment variables with which Slurm's commands find the cluster, when its node is idle.

    Raises
    ------
    RuntimeError
        A daemon ended, or the node is not idle within a minute; the ends of the logs are in the message.
    """
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a socket's path is short
    folder.chmod(0o755)  # munge's clients, and munged of its folder: no one else may write
    for name in ("state", "spool", "munge", "bin"):
        (folder / name).mkdir(mode=0o755)
    key, configuration = folder / "munge" / "munge.key", folder / "slurm.conf"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    host, user = socket.gethostname().partition(".")[0], os.environ.get("USER") or "root"
    options = {"host": host, "user": user, "folder": folder, "ports": _free_ports(2), "cpus": CPUS}
    configuration.write_text(CONFIGURATION.format(**options))
    environment = {
        "SLURM_CONF": str(configuration),
        "PATH": f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    # Within a job the plugin calls srun without any variable of Slurm's.
    srun = folder / "bin" / "srun"
    srun.write_text(f'#!/bin/sh\nSLURM_CONF={configuration} exec {program("srun")} "$@"\n')
    srun.chmod(0o755)
    munged = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
    munged += [f"--pid-file={folder}/munge/munged.pid", f"--seed-file={folder}/munge/munged.seed"]
    munged += [f"--log-file={folder}/munge/munged.log"]
    daemons, logs = [], []
    try:
        for command in (munged, ["slurmctld", "-D", "-i"], ["slurmd", "-D", "-N", host]):
            logs.append(folder / f"{command[0]}.said")
            daemons.append(_start(command, environment, logs[-1]))
            time.sleep(0.5)
        deadline = time.monotonic() + 60
        while _states(environment) != {"idle"}:
            dead = [logs[i] for i, daemon in enumerate(daemons) if daemon.poll() is not None]
            if dead or time.monotonic() > deadline:
                said = "\n".join(path.read_text(errors="replace")[-2000:] for path in dead or logs)
                raise RuntimeError(f"no idle node: {said}")
            time.sleep(0.2)
        yield environment
    finally:
        subprocess.run([program("scancel"), "--user", user], env=os.environ | environment, capture_output=True)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _start(command, environment, log):
    # A daemon ends with this process even where it is killed.
    command = ["setpriv", "--pdeathsig", "TERM", program(command[0]), *command[1:]]
    with open(log, "wb") as said:
        options = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, env=os.environ | environment, start_new_session=True, **options)


def _states(environment):
    command = [program("sinfo"), "--noheader", "--format=%T"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    return set(done.stdout.split())


if __name__ == "__main__":
    if absent := missing():
        sys.exit(f"not installed: {', '.join(absent)} (Debian's packages slurm-wlm and munge)")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with one_node() as found:
        command = subprocess.Popen(sys.argv[1:], env=os.environ | found, start_new_session=True)
        try:
            status = command.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(command.pid, signal.SIGTERM)
    sys.exit(status)
