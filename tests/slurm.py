"""A Slurm of the tests' own, on this machine: its daemons, two nodes, and what it can be asked."""

from __future__ import annotations

import getpass
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

SCRIPTS = Path(__file__).parents[1] / "pipelines" / "slurm"
DAEMONS = ("munged", "slurmctld", "slurmd")
PLACES = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
NODES = ("one", "two")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}

# No cgroups and no database. The nodes have what the scripts ask for, whatever this machine has. A
# job that is queued again waits until its credential has expired.
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=1
ReturnToService=2
FirstJobId={first}
PartitionName=all Nodes=ALL Default=YES
"""


def missing() -> list[str]:
    """The programs of Slurm and munge that are not here."""
    return [name for name in (*DAEMONS, "sbatch", "srun") if not shutil.which(name, path=PLACES)]


class Slurm:
    """Its daemons, from `start` to `stop`. Jobs run as whoever runs the tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # short: a socket's path may have 107 characters
        # Whatever this runs in may be a job itself.
        outside = {name: value for name, value in os.environ.items() if "SLURM" not in name}
        programs = os.pathsep.join([str(Path(sys.executable).parent), PLACES])
        self.env = {**outside, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": programs}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Raises RuntimeError, with what a daemon said, where it does not come up."""
        host, folder = socket.gethostname(), self.folder
        about = CONFIGURATION.format(
            host=host, folder=folder, port=_free_port(), user=getpass.getuser(),
            first=random.randrange(1, 50_000),  # by which ray.sbatch chooses a port
        )  # fmt: skip
        for name in NODES:
            place = f"NodeHostname={host} NodeAddr=127.0.0.1 Port={_free_port()}"
            about += f"NodeName={name} {place} CPUs=16 RealMemory=65536\n"
        folder.chmod(0o755)  # munge wants others to be able to come to its socket
        (folder / "slurm.conf").write_text(about)
        (folder / "state").mkdir()
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o400)
        own = [f"--{name}={folder}/munge.{name}" for name in ("socket", "pid-file", "seed-file")]
        self._start("munged", "--foreground", f"--key-file={folder}/key", *own)
        self._until((folder / "munge.socket").exists)
        self._start("slurmctld", "-D", "-i")
        for name in NODES:
            self._start("slurmd", "-D", "-N", name)
        self._until(lambda: self._told("sinfo", "-h", "-N", "-o", "%T") == ["idle"] * len(NODES))

    def stop(self) -> None:
        with suppress(subprocess.SubprocessError):
            self.run("scancel", "--user", getpass.getuser())
            deadline = time.monotonic() + 20
            while self._told("squeue", "-h") and time.monotonic() < deadline:
                time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
        for left in self.processes():
            left.kill()

    def processes(self) -> list[psutil.Process]:
        """All that knows this Slurm: its daemons, and what runs in its jobs."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == self.env["SLURM_CONF"]:
                    found.append(process)
        return found

    def run(self, *words: object, **options) -> str:
        done = subprocess.run(
            list(map(str, words)), capture_output=True, text=True, timeout=60,
            **{"env": self.env, **options},
        )  # fmt: skip
        if done.returncode:
            raise subprocess.SubprocessError(f"{words}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def submit(
        self, script: str, *arguments: object, folder: Path, sbatch: Iterable[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> str:  # fmt: skip
        """The number of the job. sbatch: options of it; the job writes to a file in `folder`."""
        words = ["sbatch", "--parsable", *sbatch, SCRIPTS / script, *arguments]
        return self.run(*words, cwd=folder, env={**self.env, **(env or {})})

    def jobs(self, number: str) -> list[dict[str, str]]:
        """What Slurm says of a job, or of each of an array's tasks in their order."""
        lines = self._told("scontrol", "-o", "show", "job", number)
        every = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]
        return sorted(every, key=lambda job: job.get("ArrayTaskId", ""))

    def ended(self, number: str, seconds: float = 600) -> list[dict[str, str]]:
        """The same once all of them have ended, and are not to run again."""
        deadline = time.monotonic() + seconds
        while True:
            jobs = self.jobs(number)
            if {job["JobState"] for job in jobs} <= ENDED:
                return jobs
            assert time.monotonic() < deadline, jobs
            time.sleep(0.5)

    def _told(self, *words: str) -> list[str]:
        try:
            return self.run(*words).splitlines()
        except subprocess.SubprocessError:
            return []

    def _start(self, name: str, *options: str) -> None:
        with open(self.folder / f"{name}.out", "ab") as out:
            words = [shutil.which(name, path=PLACES) or name, *options]
            daemon = subprocess.Popen(words, stdout=out, stderr=out, env=self.env)
        self._daemons.append(daemon)

    def _until(self, condition) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            if time.monotonic() > deadline or any(each.poll() for each in self._daemons):
                logs = [*self.folder.glob("*.out"), *self.folder.glob("*.log")]
                told = "; ".join(log.read_text()[-300:].strip() for log in logs)
                raise RuntimeError(f"Slurm cannot be started here: {told}")
            time.sleep(0.2)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
