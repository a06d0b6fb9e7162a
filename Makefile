# Care Coordinator. `make` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
# Each of the many processes would compile all it imports anew: 5 s of CPU instead of 2.
export PYTHONDONTWRITEBYTECODE=
.DEFAULT_GOAL := help

VENV    := .venv
BIN     := $(VENV)/bin
PYTHON  ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell command -v $(p) 2>/dev/null)))
ARGS    ?=
# Processes that test side by side (tools/lanes.py); ARGS=-n0 for one, as a debugger needs it.
LANES   ?= 2
SERVERS := postgres or kafka or integration or slow or soak

# Images: make image SERVICE=scheduling [BASE=python:3.11-slim-bookworm] [TAG=dev] [FLAGS=...]
SERVICE ?=
BASE    ?=
TAG     ?= dev
IMAGES  ?= localhost/care-
FLAGS   ?=
BUILDER ?= $(firstword $(shell command -v buildah docker podman 2>/dev/null))
SERVICES := patients scheduling referrals notifications feedback
# Only the buildah command has an own name for building a Dockerfile.
BUILD    = $(BUILDER) $(if $(filter %buildah,$(BUILDER)),bud --layers,build)

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | expand -t 12

setup: $(BIN)/care  ## Install everything that is locked into .venv, generate, link `care`
	@$(BIN)/python tools/gen.py

up: setup  ## Run the whole system on this machine (ARGS="--port 8080 --kafka")
	@exec $(BIN)/care up $(ARGS)

unit: setup  ## Tests that need no server (under 60 s)
	@$(BIN)/pytest -q -n $(LANES) -m "not ($(SERVERS))" $(ARGS)

test: setup  ## All tests but images, bench, soak and cluster
	@$(BIN)/pytest -q -n $(LANES) -m "not soak" $(ARGS)

soak: setup  ## The long versions of kills and races
	@$(BIN)/pytest -q -s -m soak $(ARGS)

check: setup  ## Lint, types, import contracts, the protos' style and compatibility
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "ruff format: these differ"; $(BIN)/ruff format --check . ; }
	@$(BIN)/mypy --no-error-summary
	@out=$$($(BIN)/lint-imports 2>&1) || { echo "$$out"; exit 1; }
	@$(BIN)/buf lint
	@if [ -e protos/baseline.binpb ]; then $(BIN)/buf breaking protos --against protos/baseline.binpb; fi

format:  ## Format the Python
	@$(BIN)/ruff check --quiet --fix --select I . ; $(BIN)/ruff format --quiet .

gen: $(VENV)/.synced  ## Generate gen/ from protos/ when they changed
	@$(BIN)/python tools/gen.py

baseline: setup  ## At a release: what `buf breaking` compares with from then on
	@$(BIN)/buf build protos -o protos/baseline.binpb

bench: setup  ## The figures of docs/performance.md
	@$(BIN)/python -m bench $(ARGS)

lock:  ## Resolve the dependencies again (keeps what still fits; ARGS=--upgrade for newer)
	@$(BIN)/uv pip compile -q --universal --generate-hashes --no-emit-index-url --no-header --all-extras $(ARGS) \
	  pyproject.toml -o requirements.lock
	@$(BIN)/uv pip compile -q --universal --generate-hashes --no-emit-index-url --no-header --no-annotate $(ARGS) \
	  -c requirements.lock pyproject.toml -o requirements-runtime.lock

image: gen  ## One image: SERVICE=patients|…|gateway, BASE, TAG, FLAGS for the builder
	@[ -n "$(SERVICE)" ] || { echo "make image SERVICE=one of: $(SERVICES) gateway"; exit 2; }
	@[ -n "$(BUILDER)" ] || { echo "make image needs buildah, docker or podman"; exit 2; }
	$(BUILD) -t $(IMAGES)$(SERVICE):$(TAG) --build-arg SERVICE=$(SERVICE) \
	  $(if $(BASE),--build-arg BASE=$(BASE)) $(FLAGS) .

images:  ## All six
	@for service in $(SERVICES) gateway; do $(MAKE) image SERVICE=$$service; done

clean:  ## Remove what was generated and cached (not .venv, not the data)
	@rm -rf gen .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# --- How .venv comes about -------------------------------------------------------------------------------------------

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3"; exit 2; }
	@# Debian splits ensurepip off; without it `-m venv` fails half way.
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv; } &>/dev/null; } || \
	  { echo "Python's venv module is missing (Debian: apt-get install python3-venv)"; exit 2; }
	@$(PYTHON) -m venv $(VENV)

$(BIN)/uv: | $(BIN)/python
	@# uv itself is taken from the lock too, by pip, so that its hash is checked as well.
	@awk '/^[^ #]/ {on = /^uv==/} on && !/^ *#/' requirements.lock > $(VENV)/uv.txt
	@$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r $(VENV)/uv.txt

$(VENV)/.synced: requirements.lock | $(BIN)/uv
	@$(BIN)/uv pip sync --compile-bytecode -q --require-hashes requirements.lock
	@touch $@

$(BIN)/care: pyproject.toml $(VENV)/.synced tools/gen.py
	@$(BIN)/python tools/gen.py
	@$(BIN)/uv pip install -q --no-deps --no-build-isolation -e .
	@touch $@

.PHONY: help setup up unit test soak check format gen baseline bench lock image images clean
