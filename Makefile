# Python 3.11 is all that must be there; everything else goes into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3.11)
BUILD ?= cpu
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help setup doctor quickstart serve stop check check-k8s test test-slow test-all bench bench-train bench-elastic bench-serve bench-compress bench-sweep clean

help:  ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*  ## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

setup:  ## make .venv from requirements/cpu.lock (BUILD=gpu: gpu.lock); instant when it is there
	@$(PYTHON) requirements/install.py $(BUILD)

doctor: setup  ## what this machine can do, what will be slow, what to mend
	@$(BIN)/adaptfleet doctor

quickstart: setup  ## from nothing to a live endpoint: two fine-tunes, served and compared with the base
	@$(BIN)/adaptfleet quickstart

serve: setup  ## the OpenAI-compatible endpoint with everything published, on this machine
	@$(BIN)/adaptfleet serve

stop:  ## stop what `make serve` started, and nothing else
	@$(BIN)/adaptfleet stop

check: setup  ## format, lint, types, import rules, guards
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(PYTEST) tests/house

check-k8s: setup  ## every Kubernetes overlay against schemas, the operator's and Serve's rules, contracts and locks
	$(BIN)/python -m k8s.validation

test: setup  ## all tests but the slow ones
	$(BIN)/python tests/lanes.py "not slow and not gpu"

test-slow: setup  ## the slow tests
	$(BIN)/python tests/lanes.py "slow and not gpu"

test-all: test test-slow  ## both

.PHONY: test-gpu
test-gpu: setup  ## what needs a GPU, on a machine that has one (BUILD=gpu)
	$(PYTEST) -m gpu

bench: setup  ## every benchmark, into bench/results/*.json
	$(BIN)/python bench/rescore.py
	$(BIN)/python bench/data.py
	$(BIN)/python bench/serve.py
	$(BIN)/python bench/train.py

bench-train: setup  ## training: tokens/s, memory and loss against TRL
	$(BIN)/python bench/train.py

bench-elastic: setup  ## training: what kills, preemptions and joining nodes cost; pools, services and a day of one fleet
	$(BIN)/python bench/elastic.py
	$(BIN)/python bench/pools.py
	$(BIN)/python bench/fleet_day.py
	$(BIN)/python bench/manifests.py

bench-serve: setup  ## serving: the endpoint against bare vLLM, many adapters, kills, replicas that come and go
	$(BIN)/python bench/serve.py

bench-compress: setup  ## compression: bytes, perplexity and speed of each recipe against the bf16 parent
	$(BIN)/python bench/compress.py

bench-sweep: setup  ## search: the joint space against independent trials and random search
	$(BIN)/python bench/sweep.py

clean:  ## remove caches and build output; .venv, ~/.adaptfleet and results stay
	rm -rf build .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
