"""Hosts of their own on one machine: Linux namespaces joined by virtual cables.

Each host has its own network, host name, processes, /run and /etc/hosts, and sees the machine's other
files, as hosts with shared storage do. Nothing of it is visible outside, no port of the machine is used,
and everything that runs on a host ends with it.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

NEEDED = {"unshare": "util-linux", "nsenter": "util-linux", "ip": "iproute2", "bash": "bash"}

# The first process of a host: makes the host's own view of the machine, says so, and collects orphans.
FIRST_PROCESS = """
set -e
hostname "$1"
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd
mount --bind "$2" /etc/hosts
ip link set lo up
echo ready
exec >/dev/null
while true; do sleep 3600; done
"""


# A rank's place, which this process may have taken in another test; a scheduler would hand it on to its jobs.
PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class HostsUnavailableError(Exception):
    """Why no host can be made here."""


class Host:
    """One host; `run` and `start` are what a shell on it would do."""

    def __init__(self, name: str, address: str, hosts_file: Path) -> None:
        self.name, self.address = name, address
        command = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.process = subprocess.Popen(
            [*command, "bash", "-c", FIRST_PROCESS, "host", name, str(hosts_file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "ready":
            reason = self.process.communicate()[1].strip()
            raise HostsUnavailableError(f"namespaces cannot be made here ({reason})")
        parent = self.process.pid
        self.first_pid = int(Path(f"/proc/{parent}/task/{parent}/children").read_text().split()[0])

    def command(self, words: Sequence[str]) -> list[str]:
        """The words that run `words` on this host when the machine runs them."""
        spaces = ["--net", "--uts", "--mount", "--pid"]
        return ["nsenter", "--target", str(self.first_pid), *spaces, "--", *words]

    def run(
        self,
        words: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        timeout: float = 120,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end; its output is in the result, whatever its exit code."""
        process = self.start(words, environment=environment, folder=folder)
        try:
            out, error = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, error = process.communicate()
            raise AssertionError(f"{words} on {self.name}: no end in {timeout} s\n{out}\n{error}") from None
        return subprocess.CompletedProcess(list(words), process.returncode, out, error)

    def start(
        self,
        words: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        log: Path | None = None,
    ) -> "subprocess.Popen[str]":
        """Start a command; its output goes to `log`, or to pipes. It ends with the host at the latest."""
        change = ["env", f"--chdir={folder or Path.cwd()}"]
        change += [f"--unset={name}" for name in PLACES]
        change += [f"{key}={value}" for key, value in (environment or {}).items()]
        with contextlib.ExitStack() as held:
            target = held.enter_context(log.open("ab")) if log else None
            return subprocess.Popen(
                self.command([*change, *words]),
                stdout=target or subprocess.PIPE,
                stderr=subprocess.STDOUT if target else subprocess.PIPE,
                stdin=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )

    def close(self) -> None:
        """End the host and every process on it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.first_pid, signal.SIGKILL)
        self.process.wait(timeout=30)


class TwoHosts:
    """node1 (10.77.0.1) and node2 (10.77.0.2), joined by a cable; a context manager.

    `folder` is an empty directory with a short path, for sockets and configuration; it is removed at the end.
    Raises HostsUnavailableError where the machine does not allow it.
    """

    def __enter__(self) -> "TwoHosts":
        missing = sorted({package for name, package in NEEDED.items() if not shutil.which(name)})
        if missing:
            raise HostsUnavailableError(f"not installed: {', '.join(missing)}")
        if os.geteuid() != 0:
            raise HostsUnavailableError("network namespaces need root")
        with contextlib.ExitStack() as undo:
            self.folder = Path(tempfile.mkdtemp(prefix="hosts-"))
            undo.callback(shutil.rmtree, self.folder, ignore_errors=True)
            hosts_file = self.folder / "hosts"
            names = {"node1": "10.77.0.1", "node2": "10.77.0.2"}
            lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in names.items())]
            hosts_file.write_text("\n".join(lines) + "\n")
            self.hosts: list[Host] = []
            for name, address in names.items():
                host = Host(name, address, hosts_file)
                undo.callback(host.close)
                self.hosts.append(host)
            self._connect()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _connect(self) -> None:
        first, second = (str(host.first_pid) for host in self.hosts)
        ends = ["netns", first, "type", "veth", "peer", "name", "eth0", "netns", second]
        made = subprocess.run(["ip", "link", "add", "eth0", *ends], capture_output=True, text=True)
        if made.returncode:
            raise HostsUnavailableError(f"no virtual cable ({made.stderr.strip()})")
        for host in self.hosts:
            for words in (
                ["address", "add", f"{host.address}/24", "dev", "eth0"],
                ["link", "set", "eth0", "up"],
            ):
                done = host.run(["ip", *words])
                assert done.returncode == 0, done.stderr


def wait_for(condition, seconds: float, what: str):  # type: ignore[no-untyped-def]
    """What `condition()` returns once that is true; AssertionError after `seconds`, naming `what`."""
    end = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.1)
