#!/usr/bin/env bash
# Installs what tests/distributed starts: SLURM, munge, an ssh server, pdsh and ip, as Debian packages them.
#
# `make test` calls it first. It installs where nobody minds: as root with apt, in a container or where CI is set.
# Elsewhere it says what to do, and the tests that lack something are skipped. No service is started, now or at the
# next boot.
set -euo pipefail

PACKAGES=(slurmctld slurmd slurm-client munge openssh-server openssh-client pdsh iproute2)

missing=()
for package in "${PACKAGES[@]}"; do
    dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed ||
        missing+=("$package")
done
if [ ${#missing[@]} = 0 ]; then exit 0; fi

leave() {
    echo "tests/distributed: $1; the tests that need ${missing[*]} are skipped"
    exit 0
}

if ! command -v apt-get >/dev/null; then leave "no apt here"; fi
if [ "$(id --user)" != 0 ]; then leave "not root (sudo tests/distributed/install.sh)"; fi
if [ -d /run/systemd/system ] && [ -z "${CI:-}" ] && [ "${1:-}" != --here ]; then
    leave "this machine runs services, so nothing is installed unasked (tests/distributed/install.sh --here)"
fi

# Packages ask this program whether they may start their services.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    trap 'rm -f $policy' EXIT
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod +x $policy
fi
started=$SECONDS
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
if { apt-get update && apt-get install --yes --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    if command -v systemctl >/dev/null; then
        for package in "${missing[@]}"; do
            case $package in
            slurmctld | slurmd | munge) systemctl disable "$package" >/dev/null 2>&1 || true ;;
            openssh-server) systemctl disable ssh >/dev/null 2>&1 || true ;;
            esac
        done
    fi
    echo "tests/distributed: installed ${missing[*]} in $((SECONDS - started)) s"
    rm -f "$log"
else
    tail -n 5 "$log"
    leave "apt-get failed ($log)"
fi
