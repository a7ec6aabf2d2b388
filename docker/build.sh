#!/usr/bin/env bash
# Build an image of this working tree. `make docker` and `make docker-cpu` run this script.
#
#   docker/build.sh gpu|cpu [ARGUMENTS OF docker build...]
#
# Environment variables:
#   IMAGE   the name of the image   (default: w1train:VERSION and w1train:latest; both with -cpu for the CPU's image)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { printf 'docker/build.sh: %s\n' "$*" >&2; exit 1; }

kind="${1:-}"
case "$kind" in
  gpu) file=docker/Dockerfile suffix="" ;;
  cpu) file=docker/Dockerfile.cpu suffix=-cpu ;;
  *) fail "name the image: docker/build.sh gpu|cpu" ;;
esac
shift

command -v docker >/dev/null || fail "there is no docker on PATH. Without Docker, 'make install' builds the same environment in .venv"
docker info >/dev/null 2>&1 || fail "docker is installed, but no daemon answers 'docker info': start it, or join the group that may use it"

version="$(git describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)"
names=("w1train:$version$suffix" "w1train:latest$suffix")
if [[ -n "${IMAGE:-}" ]]; then names=("$IMAGE"); fi
docker build --file "$file" --build-arg "CODE_VERSION=$version" "${names[@]/#/--tag=}" "$@" .
if [[ "$kind" == gpu ]]; then flags="--gpus=all --ipc=host "; fi
printf 'built %s. To try it: docker run --rm %s%s\n' "${names[*]}" "${flags:-}" "${names[0]}"
