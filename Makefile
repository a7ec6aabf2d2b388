# `make` alone lists the targets. Most targets first bring the environment up to date (launch/bootstrap.sh).

VENV ?= .venv
RUNS ?= runs
RECIPE ?= demo
CORPUS ?=
NPROC ?=
ARGS ?=
# The number of processes that run tests: one more than two cores, because some tests wait for processes that they start.
WORKERS ?= 3
export VENV RUNS RECIPE CORPUS NPROC

.DEFAULT_GOAL := help
.PHONY: help install demo curriculum processes post-training docker docker-cpu docs test test-all test-gpu chaos lint format clean

help:  ## List the targets
	@echo "usage: make TARGET [VARIABLE=value ...]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "variables: VENV (.venv), PYTHON (the first >= 3.12 found), EXTRAS (dev), WORKERS (3)"

install:  ## Create or update the environment in .venv
	@launch/bootstrap.sh

demo: install  ## Train a small diffusion model on real text, in minutes (RECIPE=demo_moe for experts, CORPUS=path, NPROC=ranks, RUNS=runs, ARGS="KEY=VALUE ...")
	@launch/demo.sh $(ARGS)

curriculum: install  ## Train from autoregressive to block diffusion on the demo's text, and compare with training from scratch (same variables)
	@launch/curriculum.sh $(ARGS)

processes: install  ## Train every noise process on the characters of the demo's text, and compare them (NPROC=trainings side by side, others as before)
	@launch/processes.sh $(ARGS)

post-training: install  ## Pretrain a small model, then SFT, CAP and DPO on questions, and measure what each gains (NPROC=ranks, RUNS=runs, ARGS)
	@launch/post_training.sh $(ARGS)

docker:  ## Build the image for GPU clusters from NVIDIA's PyTorch image (IMAGE=name, ARGS="arguments of docker build")
	@docker/build.sh gpu $(ARGS)

docker-cpu:  ## Build the image for CPUs (same variables)
	@docker/build.sh cpu $(ARGS)

docs: install  ## Build the documentation site in build/site; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict && echo "open build/site/index.html"

test: install  ## Run the fast tests that need no GPU (ARGS="-k name" selects tests)
	@$(VENV)/bin/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-all: install  ## Run all tests that need no GPU, also the slow ones
	@$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-gpu: install  ## Run the tests that need a GPU
	@$(VENV)/bin/python -m pytest -m gpu $(ARGS)

chaos: install  ## Disturb trainings on two ranks at random moments, and compare each with an undisturbed training (ARGS="--only hang --seed 3")
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

clean:  ## Remove caches and build outputs, but keep runs/ and .venv
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path './.venv' -prune -o -path './$(RUNS)' -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
