# `make` alone lists what there is. Every target first makes sure that the environment is up to date (launch/bootstrap.sh).

VENV ?= .venv
RUNS ?= runs
CORPUS ?=
NPROC ?=
ARGS ?=
# Processes that run tests: one more than two cores, for some tests wait for processes of theirs.
WORKERS ?= 3
export VENV RUNS CORPUS NPROC

.DEFAULT_GOAL := help
.PHONY: help install demo curriculum docker docker-cpu test test-all test-gpu chaos lint format clean

help:  ## List the targets
	@echo "usage: make TARGET [VARIABLE=value ...]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "variables: VENV (.venv), PYTHON (the first >= 3.12 found), EXTRAS (dev), WORKERS (3)"

install:  ## Create or update the environment in .venv
	@launch/bootstrap.sh

demo: install  ## Train a small diffusion model on real text, in minutes (CORPUS=path, NPROC=ranks, RUNS=runs, ARGS="KEY=VALUE ...")
	@launch/demo.sh $(ARGS)

curriculum: install  ## From autoregressive to block diffusion on the demo's text, beside training from scratch (same variables)
	@launch/curriculum.sh $(ARGS)

docker:  ## Build the image for clusters, on NVIDIA's PyTorch (IMAGE=name, ARGS="arguments of docker build")
	@docker/build.sh gpu $(ARGS)

docker-cpu:  ## Build the image for CPUs (same variables)
	@docker/build.sh cpu $(ARGS)

test: install  ## Run the tests that need no GPU and take no long time (ARGS="-k name" for some of them)
	@$(VENV)/bin/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-all: install  ## Run the slow tests too: long ones of what rarely breaks
	@$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-gpu: install  ## Run the tests that need a GPU
	@$(VENV)/bin/python -m pytest -m gpu $(ARGS)

chaos: install  ## Disturb 120 trainings on two ranks at random moments, and compare with undisturbed ones (ARGS="--only hang --seed 3")
	@$(VENV)/bin/python -m tests.chaos $(ARGS)

lint: install  ## Check style (ruff), types (mypy), shell scripts (shellcheck) and Dockerfiles (hadolint)
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check
	@$(VENV)/bin/mypy
	@$(VENV)/bin/shellcheck -x launch/*.sh benchmarks/*.sh docker/*.sh docker/steps/*.sh .ci/run && echo "shellcheck: no issues found"
	@$(VENV)/bin/hadolint docker/Dockerfile docker/Dockerfile.cpu && echo "hadolint: no issues found"

format: install  ## Format the code
	@$(VENV)/bin/ruff check --fix
	@$(VENV)/bin/ruff format

clean:  ## Remove caches and build outputs; runs/ and .venv stay
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path './.venv' -prune -o -path './$(RUNS)' -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
