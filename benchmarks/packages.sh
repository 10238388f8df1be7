#!/usr/bin/env bash
# Installs the Debian packages of the brokers that the benchmarks compare with, where this machine lacks them. Nothing
# is started: each run starts its own brokers on free ports, so a service that the machine already runs is neither used
# nor stopped.
set -euo pipefail

export PATH="$PATH:/usr/sbin:/sbin"

missing=()
for package in nats-server rabbitmq-server; do
    command -v "$package" >/dev/null || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0

if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    echo "make bench needs ${missing[*]}: install it first (on Debian, as root: apt-get install ${missing[*]})." >&2
    exit 1
fi

# Packages ask policy-rc.d whether they may start their service; 101 means no.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi

echo "== installing Debian packages: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get -q update
apt-get -q install -y --no-install-recommends "${missing[@]}"
