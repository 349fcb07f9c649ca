.DEFAULT_GOAL := help
PYTHON := .venv/bin/python
PYTEST := $(PYTHON) -m pytest
# Two shared cores: one thread for each process is faster than several that wait for each other.
export OMP_NUM_THREADS ?= 1
# Where a process takes more, its threads wait without spinning, for the same reason.
export OMP_WAIT_POLICY ?= PASSIVE
# Who shares a worker is for tests/conftest.py to say. Unit tests keep a core busy and share nothing.
SEVERAL := -n auto --maxprocesses 4
# The others start servers and wait for them much: those with an engine in one worker, all others beside it.
BESIDE := -n 2
SEED ?= 1

.PHONY: help
help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  \033[1m%-14s\033[0m %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## Make .venv, install packages and etcd (does nothing when all is there)
	@deploy/dev/setup.sh

.PHONY: demo
demo: setup ## A policy's whole life on real parts; writes demo/report.json (SEED=1)
	$(PYTHON) -m demo --seed $(SEED)

.PHONY: test
test: setup ## All tests: unit, contract, integration, fault
	$(PYTEST) $(SEVERAL) tests/unit
	$(PYTEST) $(BESIDE) tests/contract
	$(PYTEST) $(BESIDE) tests/integration
	$(PYTEST) $(BESIDE) tests/fault

.PHONY: test-unit
test-unit: setup ## The tests that need no server
	$(PYTEST) $(SEVERAL) tests/unit

.PHONY: test-fault
test-fault: setup ## The fault tests, long ones included
	MINT_FAULT_LONG=1 $(PYTEST) tests/fault --timeout 1800

.PHONY: test-matrix
test-matrix: setup ## Kill every process at every phase of a GRPO step (20 minutes); CI runs its diagonal
	$(PYTEST) tests/fault -m matrix

.PHONY: test-motion
test-motion: setup ## The long proofs of adapters in motion; CI runs shorter ones
	$(PYTEST) tests/unit tests/integration tests/fault -m motion

.PHONY: test-history
test-history: setup ## 20 seeded histories of the catalog with kills, checked (10 minutes); CI runs two short ones
	$(PYTEST) tests/fault/test_catalog_history.py -m history

.PHONY: bench-catalog
bench-catalog: setup ## The catalog at a million policies (an hour; ARGS="--num 20000 --skip mlflow" for less)
	$(PYTHON) -m bench.catalog $(ARGS)

.PHONY: bench-eviction
bench-eviction: setup ## Policies of eviction compared on simulated requests (3 minutes; ARGS="--reps 1" for less)
	$(PYTHON) -m bench.eviction $(ARGS)

.PHONY: bench-download
bench-download: setup ## Ranged parallel download against a single stream (5 minutes; ARGS="--size-mb 256 --reps 3")
	$(PYTHON) -m bench.download $(ARGS)

.PHONY: bench-packed
bench-packed: setup ## Into the slot of a live engine: expert by expert, packed, and by our hook (3 minutes)
	$(PYTHON) -W ignore -m bench.packed $(ARGS)

.PHONY: bench-sweep
bench-sweep: setup ## One engine through 100,000 adapters of a catalog of a million (40 to 70 minutes; NUM=2000 for less)
	$(PYTHON) -W ignore -m bench.sweep $(if $(NUM),--num $(NUM)) $(ARGS)

.PHONY: bench-handoff
bench-handoff: setup ## An update's way to its first token, against merge and reload (15 minutes; ARGS="--cases dense_small")
	$(PYTHON) -W ignore -m bench.handoff $(ARGS)

.PHONY: bench-wave
bench-wave: setup ## A thousand policies at once, against the base (an hour; ARGS="--policies 100 --requests 300 --reps 1")
	$(PYTHON) -W ignore -m bench.wave $(ARGS)

.PHONY: bench-docs
bench-docs: setup ## Write the tables of docs/benchmarks.md from bench/results
	$(PYTHON) -m bench.docs

.PHONY: check
check: lint types protos-check test ## What CI runs: lint, types, protos, tests

.PHONY: lint
lint: setup ## ruff and import-linter
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	.venv/bin/lint-imports

.PHONY: types
types: setup ## mypy
	$(PYTHON) -m mypy

.PHONY: protos
protos: setup ## Generate the Python stubs
	$(PYTHON) protos/build.py generate

.PHONY: protos-check
protos-check: setup ## buf lint, breaking changes, and whether the committed stubs are fresh
	$(PYTHON) protos/build.py lint
	$(PYTHON) protos/build.py breaking $${MINT_BREAKING_AGAINST:-HEAD}
	$(PYTHON) protos/build.py check

.PHONY: format
format: setup ## Format the code
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

.PHONY: up
up: setup ## Start everything on free loopback ports
	.venv/bin/mint up

.PHONY: down
down: setup ## Stop everything; data stays in .state
	.venv/bin/mint down

.PHONY: status
status: setup ## Show what runs
	.venv/bin/mint status

.PHONY: clean
clean: ## Remove caches and the state folder (asks nothing)
	rm -rf .state .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
