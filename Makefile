# Everything psq needs is installed into .venv, and nothing anywhere else.
# Needed beforehand: Python 3.11 or newer and a C++ compiler (without one psq runs on NumPy, slower).

# On x86-64 Linux the default index has torch with gigabytes of CUDA packages. For the CPU build name the index that
# pytorch.org's installation page gives for it: make TORCH_INDEX_URL=... run

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.psq-installed
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { command -v "$$python"; break; }; done)

# What an editable install does not see by itself: dependencies, native code, new packages.
INSTALLED_FROM := pyproject.toml constraints.txt CMakeLists.txt $(wildcard psq/native/*) \
	$(shell find psq proto server worker -name __init__.py)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install run test lint types check build bench bars results theory gan fuzz faults simulate-faults soak clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

install: $(STAMP) ## make .venv and install psq in it, editable

run: $(STAMP) ## train a real model through psq and by plain Adam, compare, draw a picture
	@$(BIN)/psq demo

test: $(STAMP) ## run every test, two at a time
	$(BIN)/python -m pytest -n 2 --dist loadscope

lint: $(STAMP) ## check style and layers
	$(BIN)/ruff check
	$(BIN)/lint-imports

types: $(STAMP) ## check types
	$(BIN)/mypy

check: lint types test ## all of the above: what CI runs

build: $(STAMP) ## make a wheel in dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

bench: $(STAMP) ## measure everything and write docs/performance.md (half an hour; BENCH="--only step")
	$(BIN)/python bench/report.py $(BENCH)

bars: $(STAMP) ## measure every bar briefly: name, measured, target, holds (6 minutes)
	@$(BIN)/python bench/bars.py $(BARS)

results: $(STAMP) ## train every recipe on three tasks, write docs/results.md (many hours; RESULTS="--budget 30m --page")
	$(BIN)/python bench/results.py $(RESULTS)

theory: $(STAMP) ## show what theory says on small problems, write docs/theory.md's numbers and pictures (2 minutes)
	@$(BIN)/python bench/theory.py $(THEORY)

gan: $(STAMP) ## train the games of examples/gan and write docs/gan.md (half an hour; GAN="--only ring")
	$(BIN)/python bench/gan.py $(GAN)

fuzz: $(STAMP) ## fuzz native decoders (FUZZ_SECONDS=600, needs clang), then all that parses (10 minutes more)
	@$(BIN)/python tests/fuzz/fuzz.py --seconds $(or $(FUZZ_SECONDS),600)
	$(BIN)/python -m pytest -q --timeout 1800 --hypothesis-profile fuzz tests/fuzz tests/wire \
		tests/unit/state/test_state_hostile.py --deselect tests/fuzz/test_codec_fuzz.py

faults: $(STAMP) ## real faults for real processes, all of them, then kills (45 minutes; KILLS=100 of each kind)
	FAULTS=all $(BIN)/python -m pytest -q --timeout 1800 tests/faults
	PYTHONPATH=tests $(BIN)/python -m faults.hostile
	PYTHONPATH=tests $(BIN)/python -m faults.killer --kills $(or $(KILLS),100)

soak: $(STAMP) ## one long job and a fault every ten seconds; says what leaks (SOAK_SECONDS=600)
	@PYTHONPATH=tests $(BIN)/python -m faults.soak --seconds $(or $(SOAK_SECONDS),600)

simulate-faults: $(STAMP) ## whole jobs under simulated faults, on all cores (SEEDS=100000 FROM=0; half an hour)
	@$(BIN)/python -m tests.simulation --seeds $(or $(SEEDS),100000) --from $(or $(FROM),0)

clean: ## remove what was built, drawn and cached; .venv stays
	rm -rf build dist runs .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find psq proto server worker tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well
	rm -rf $(VENV)

$(BIN)/python:
	@test -n "$(PYTHON)" || { \
		echo "psq needs Python 3.11 or newer, and there is none on PATH:" \
			"python3 is $$(python3 --version 2>/dev/null || echo missing)." \
			"Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) cannot make virtual environments:" \
			"install its venv module (Debian: python3-venv)" >&2; exit 1; }

$(STAMP): $(INSTALLED_FROM) | $(BIN)/python
	@echo "Installing psq and what it needs into $(VENV); the first time takes a few minutes"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		$(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) \
		-c constraints.txt -e '.[worker,plot,dev]'
	@touch $@
