#!/usr/bin/env bash
# Install packages of Debian or Ubuntu. The base image's digest fixes their release.
#
#   system_packages.sh NAME...
#
# Environment variables:
#   DRY_RUN   1: only print what apt would do   (default: 0)
set -euo pipefail

(($# > 0)) || { echo "system_packages: name at least one package" >&2; exit 1; }
export DEBIAN_FRONTEND=noninteractive
if [[ "${DRY_RUN:-0}" == 1 ]]; then
  apt-get install --simulate --no-install-recommends "$@"
  exit
fi
apt-get update
apt-get install --yes --no-install-recommends "$@"
# The lists are as large as the packages, and soon out of date.
rm -rf /var/lib/apt/lists/*
