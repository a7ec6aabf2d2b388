#!/usr/bin/env bash
# Build an image of this working tree: what `make docker` and `make docker-cpu` run.
#
#   docker/build.sh gpu|cpu [ARGUMENTS OF docker build...]
#
# Environment variables:
#   IMAGE   the name to give it   (default: w1train:VERSION, w1train:VERSION-cpu)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { printf 'docker/build.sh: %s\n' "$*" >&2; exit 1; }

kind="${1:-}"
case "$kind" in
  gpu) file=docker/Dockerfile suffix="" ;;
  cpu) file=docker/Dockerfile.cpu suffix=-cpu ;;
  *) fail "say which: docker/build.sh gpu|cpu" ;;
esac
shift

command -v docker >/dev/null || fail "there is no docker on PATH. Without Docker, 'make install' builds the same environment in .venv"
docker info >/dev/null 2>&1 || fail "docker is here, but no daemon answers 'docker info': start it, or join the group that may use it"

version="$(git describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)"
image="${IMAGE:-w1train:$version$suffix}"
docker build --file "$file" --build-arg "CODE_VERSION=$version" --tag "$image" "$@" .
printf 'built %s. Look at it: docker run --rm %s%s\n' "$image" "$([[ "$kind" == gpu ]] && echo '--gpus all --ipc=host ')" "$image"
