"""A SLURM cluster of two nodes, as Debian packages it, on two hosts of this machine.

munge signs, slurmctld schedules (on node1), a slurmd serves on each node. Two partitions share the nodes:
`low`, whose jobs are put back into the queue when `high` wants them. All state is in the hosts' folder.
"""

import re
import secrets
from pathlib import Path

from hosts import Host, TwoHosts, wait_for

NEEDED = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
}

# A requeued job waits until its old credentials have expired: here the least that SLURM takes, 5 seconds.
CONFIGURATION = """
ClusterName=test
SlurmctldHost=node1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=10
MessageTimeout=30
NodeName=node1,node2 CPUs=4 RealMemory=4096 State=UNKNOWN
PartitionName=low Nodes=node1,node2 Default=YES PriorityTier=1 GraceTime=60 MaxTime=30
PartitionName=high Nodes=node1,node2 PriorityTier=2 PreemptMode=OFF MaxTime=30
"""


class SlurmCluster:
    """The running cluster; commands go through `run`, which works on node1 like a login node."""

    def __init__(self, hosts: TwoHosts) -> None:
        self.folder, self.nodes = hosts.folder, hosts.hosts
        self.head: Host = self.nodes[0]
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(folder=self.folder))
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        (self.folder / "state").mkdir()
        munge = {
            "key-file": "key",
            "socket": "socket",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        words = [f"--{option}={self.folder}/munge.{suffix}" for option, suffix in munge.items()]
        self._serve(self.head, ["munged", "--foreground", "--force", *words], "munged")
        wait_for((self.folder / "munge.socket").exists, 20, f"munged ({self.folder}/munged.out)")
        self._serve(self.head, ["slurmctld", "-D"], "slurmctld")
        for node in self.nodes:
            self._serve(node, ["slurmd", "-D", "-N", node.name], f"slurmd-{node.name}")
        wait_for(self._idle, 60, "two idle nodes")

    def _serve(self, host: Host, words: list[str], name: str) -> None:
        host.start(words, environment=self.environment, log=self.folder / f"{name}.out")

    def _idle(self) -> bool:
        done = self.head.run(["sinfo", "-h", "-p", "low", "-o", "%T %D"], environment=self.environment)
        return done.stdout.split() == ["idle", "2"]

    def run(self, words: list[str], folder: Path | None = None, **variables: str) -> str:
        """What a SLURM command prints. AssertionError when it fails."""
        done = self.head.run(words, environment={**self.environment, **variables}, folder=folder)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, words: list[str], folder: Path, **variables: str) -> str:
        """Submit a job from `folder` with sbatch; its number."""
        return self.run(["sbatch", "--parsable", *words], folder, **variables).strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode and so on."""
        shown = self.run(["scontrol", "--oneliner", "show", "job", number])
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def state(self, number: str) -> str:
        """The job's state, for example PENDING, RUNNING, COMPLETED."""
        return self.job(number)["JobState"]

    def wait_for_end(self, number: str, log: Path, seconds: float = 600) -> dict[str, str]:
        """Wait until the job is in a state it does not leave; what `job` says then."""
        active = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "PREEMPTED")
        what = f"the end of job {number} ({log})"
        wait_for(lambda: self.state(number) not in active, seconds, what)
        return self.job(number)
