# make demo: install, run a small sweep, draw it.   make test: install with the dev tools, run the tests.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: cards help .venv .venv-dev demo test test-slow lint format bench clean

VENV ?= .venv
PYTHON ?= python3
JOBS ?= 2
# More options for the one `pip install torch`, for example the index of PyTorch's CPU builds (README).
TORCH_ARGS ?=
STAMP := $(VENV)/.kvcli-installed
LOG := install.log
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-ci} $(BIN)/python -m pytest -n $(JOBS)

cards: .venv-dev ## run the methods' tests and a small sweep, write docs/methods/
	$(BIN)/python docs/cards.py --measure

help: ## print this list
	@grep -E '^[a-z.-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

# $(call install,base|dev). The one stamp holds what it was made from: a checksum, base or dev, and whether the
# environment is ours. One that was there before keeps its packages: only what is missing is pinned.
define install
apt() { echo "error: $$1 is missing"; echo "  try:   apt-get install python3 python3-venv git     (as root)"; exit 2; } >&2
run() { "$$@" >>$(LOG) 2>&1 || { tail -n 30 $(LOG); echo "error: this failed: $$*"; echo "  given: the whole output is in $(LOG)"; exit 1; } >&2; }
sum="$$(cat pyproject.toml constraints.txt | cksum | tr ' ' -) $(CURDIR)"
had=($$(cat $(STAMP) 2>/dev/null || true))
extras=$(1)
[ "$${had[2]:-}" != dev ] || extras=dev
if [ "$${had[0]:-} $${had[1]:-} $${had[2]:-}" != "$$sum $$extras" ] || [ ! -x $(BIN)/kvcli ]; then
  : >$(LOG)
  owner=$${had[3]:-theirs}
  if [ ! -e $(VENV) ]; then
    command -v $(PYTHON) >/dev/null || apt python3
    $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || apt python3-venv
    command -v git >/dev/null || apt git
    echo "making $(VENV)"
    $(PYTHON) -m venv $(VENV) >>$(LOG) 2>&1 || { rm -rf $(VENV); tail -n 30 $(LOG) >&2; apt python3-venv; }
    owner=ours
    echo "nothing yet none ours" >$(STAMP)
  fi
  $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(VENV) needs Python 3.11 or newer"; echo "  try:   make VENV=another-folder PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; } >&2
  $(BIN)/python -m pip --version >/dev/null 2>&1 || run $(BIN)/python -m ensurepip
  pins=constraints.txt
  if [ $$owner = theirs ]; then
    pins=$(VENV)/.kvcli-pins.txt
    $(BIN)/python -c 'import importlib.metadata as m, re, sys; n = lambda s: re.sub("[-_.]+", "-", s).lower(); has = {n(d.metadata["Name"]) for d in m.distributions()}; sys.stdout.writelines(l for l in open("constraints.txt") if n(l.split("==")[0]) not in has)' >$$pins
    echo "$(VENV) was there before: its packages stay as they are"
  fi
  options=""
  [ $$extras = base ] || options="[$$extras]"
  echo "installing kvcli$$options into $(VENV) (output in $(LOG))"
  run $(BIN)/python -m pip install -c $$pins 'torch>=2.11' $(TORCH_ARGS)
  run $(BIN)/python -m pip install -c $$pins -e ".$$options"
  printf '%s\n' "$$sum" "$$extras $$owner" >$(STAMP)
fi
endef

.venv: ## install kvcli into .venv, without the dev tools
	@$(call install,base)

.venv-dev: ## install kvcli with the dev tools
	@$(call install,dev)

demo: .venv ## sweep the testbed model, print the table, draw it into runs/demo
	@export KVCLI_NO_NEXT=1
	$(BIN)/kvcli sweep --preset demo --out runs/demo
	$(BIN)/kvcli plot runs/demo
	env -u KVCLI_NO_NEXT $(BIN)/kvcli report runs/demo >/dev/null
	echo "report: runs/demo/report.md     (. $(BIN)/activate puts kvcli on the PATH)"

test: .venv-dev ## the test suite, without slow tests
	@$(PYTEST) -m "not slow and not peer and not gpu"

test-slow: .venv-dev ## the slow tests
	@$(PYTEST) -m "slow and not peer and not gpu" || [ $$? = 5 ] # 5: there are none

lint: .venv-dev ## ruff and mypy
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv-dev ## sort imports and format
	@$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .

bench: .venv ## the benchmarks, about 15 minutes; JSON in runs/bench
	@mkdir -p runs/bench
	for name in sweep_vs_kvpress marginal_cost capture gpu; do
	  echo "--- $$name"
	  options="--json runs/bench/$$name.json"
	  [ $$name != gpu ] || options=""
	  $(BIN)/python benchmarks/$$name.py $$options
	done

clean: ## remove caches; results and .venv stay
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist $(LOG)
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
