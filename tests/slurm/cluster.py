"""A Slurm of two nodes on this machine, all of whose files are in one folder. It needs root."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "squeue", "munged")
NODES = ("n1", "n2")
_CONFIG = """
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/d.%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/d.%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/d.%n.log
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def reason_to_skip() -> str | None:
    """Why no cluster can be started here; None if it can."""
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        return (
            f"Slurm is not installed (no {', '.join(missing)}): apt-get install --no-install-recommends "
            "slurmctld slurmd slurm-client munge"
        )
    return None if os.geteuid() == 0 else "Slurm's daemons are started as root"


class Cluster:
    """Starts the daemons; `stop` ends them."""

    def __init__(self, folder: Path, ports: tuple[int, int, int]):
        self.folder, self.host = folder, socket.gethostname()
        for name in ("ctld", *(f"d.{node}" for node in NODES)):
            (folder / name).mkdir()
        config = folder / "slurm.conf"
        config.write_text(_CONFIG.format(host=self.host, ports=ports, folder=folder))
        self.environment = os.environ | {
            "SLURM_CONF": str(config),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # for `accelerate`
            "ADDRESS": "127.0.0.1",  # the names of the nodes are known to Slurm alone
            "ACCELERATE_USE_CPU": "true",
            "GPUS_PER_NODE": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        folder.chmod(0o755)  # munged refuses folders that others may write to
        self.daemons = [
            self._start(
                *("munged", "--foreground", "--force", "--num-threads=2", f"--key-file={key}"),
                *(f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid"),
                *(f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munge.log"),
            )
        ]
        self._wait(lambda: (folder / "munge.socket").exists())
        self.daemons.append(self._start("slurmctld", "-D"))
        self.daemons += [self._start("slurmd", "-D", "-N", node) for node in NODES]
        self._wait(lambda: self.run("sinfo", "--noheader", "--format=%T %D").split() == ["idle", "2"])

    def _start(self, *words: str) -> subprocess.Popen:
        with (self.folder / f"{words[0]}.out").open("a") as log:
            return subprocess.Popen(words, env=self.environment, stdout=log, stderr=log)

    def _wait(self, is_reached, seconds: float = 60) -> None:  # type: ignore[no-untyped-def]
        end = time.monotonic() + seconds
        while not is_reached():
            assert time.monotonic() < end, self.logs()
            time.sleep(0.5)

    def logs(self) -> str:
        """The ends of all logs."""
        paths = sorted([*self.folder.glob("*.out"), *self.folder.glob("*.log")])
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in paths)

    def run(self, *words: str) -> str:
        """Standard output of one of Slurm's commands."""
        return subprocess.run(words, env=self.environment, capture_output=True, text=True).stdout

    def submit(self, *words: str) -> int:
        """The number of a job of `sbatch words`."""
        command = ["sbatch", "--parsable", "--gpus-per-node=0", "--cpus-per-task=1", "--time=30", *words]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + self.logs()
        return int(done.stdout)

    def is_over(self, job: int) -> bool:
        """Whether no task of the job waits or runs."""
        return not self.run("squeue", "--noheader", f"--jobs={job}").strip()

    def stop(self) -> None:
        """End all daemons and what they have started."""
        self.run("scancel", "--signal=KILL", "--user=root")
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self.daemons:
            daemon.wait(30)
