# fastapi-headroom. `make` lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DURATION ?=
FAULT ?=
SCALE ?=

# Debian ships Python without venv. Installed only as root, or by sudo without a password.
AS_ROOT := $(if $(filter 0,$(shell id -u)),,sudo -n)
INSTALL_VENV := { echo "==> installing python3-venv" && $(AS_ROOT) apt-get update -qq && \
	$(AS_ROOT) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv >/dev/null; }

.DEFAULT_GOAL := help
.PHONY: help demo test check bench packs soak clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(VENV)/.ready: pyproject.toml constraints.txt tests/arq.txt
	@echo "==> virtual environment in $(VENV) (a minute or two the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: run make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(INSTALL_VENV) || { echo "Python's venv is missing: run sudo apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/arq -r tests/arq.txt
	@touch $@

demo: $(VENV)/.ready ## run the shop with everything around it; DURATION=120 FAULT=loop_block proves an alert
	@$(BIN)/python -m demo_app demo $(if $(DURATION),--duration $(DURATION)) $(if $(FAULT),--fault $(FAULT)) $(if $(SCALE),--scale $(SCALE))

test: $(VENV)/.ready ## run the tests, with real servers
	@$(BIN)/python -m demo_app servers
	@failed=0; \
	$(BIN)/python -m pytest -m "not soak and not alone" -n 3 --dist loadfile || failed=1; \
	$(BIN)/python -m pytest -m "alone and not soak" || failed=1; \
	exit $$failed

soak: $(VENV)/.ready ## run the long proofs
	@$(BIN)/python -m demo_app servers
	@$(BIN)/python -m pytest -m soak

check: $(VENV)/.ready ## lint, types, and generated files that differ from their source
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m fastapi_headroom.pack --check

packs: $(VENV)/.ready ## write dashboards, rules and docs/metrics.md anew
	@$(BIN)/python -m fastapi_headroom.pack

bench: $(VENV)/.ready ## measure against peers, as ratios in one run (some minutes)
	@$(BIN)/python -m demo_app servers
	@$(BIN)/python -m benchmarks

clean: ## remove what make made
	rm -rf $(VENV) .demo dist build
