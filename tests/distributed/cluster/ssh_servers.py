"""ssh between the hosts, with keys of their own that exist only as long as they do."""

import subprocess

from hosts import TwoHosts, wait_for

NEEDED = {
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "pdsh": "pdsh",
}

SERVER = """
HostKey {folder}/ssh_host_key
AuthorizedKeysFile {folder}/ssh_key.pub
PubkeyAuthentication yes
PasswordAuthentication no
PermitRootLogin prohibit-password
UsePAM no
StrictModes no
PidFile none
"""

CLIENT = """
Host node1 node2
    IdentityFile {folder}/ssh_key
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/known_hosts
    StrictHostKeyChecking yes
"""


def serve_ssh(hosts: TwoHosts) -> None:
    """Let every host reach every other by `ssh <name>`; AssertionError when it does not work."""
    folder = hosts.folder
    for key in ("ssh_host_key", "ssh_key"):
        made = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(folder / key)]
        subprocess.run(made, check=True)
    host_key = (folder / "ssh_host_key.pub").read_text()
    (folder / "known_hosts").write_text("".join(f"{host.name} {host_key}" for host in hosts.hosts))
    (folder / "sshd_config").write_text(SERVER.format(folder=folder))
    (folder / "ssh_config").write_text(CLIENT.format(folder=folder))
    for host in hosts.hosts:
        # ssh reads no other file for all users, and finds the home folder not by $HOME.
        bound = host.run(["mount", "--bind", str(folder / "ssh_config"), "/etc/ssh/ssh_config"])
        assert bound.returncode == 0, bound.stderr
        server = ["/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config")]
        host.start(server, log=folder / f"sshd-{host.name}.log")
    for host in hosts.hosts:
        for other in hosts.hosts:
            words = ["ssh", other.name, "hostname"]
            reached = lambda host=host, words=words, name=other.name: host.run(words).stdout.strip() == name  # noqa: E731
            wait_for(reached, 20, f"ssh from {host.name} to {other.name}")
