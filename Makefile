# make demo     installs the core alone into .venv and runs the demonstration    (make demo ARGS=--quick: 30 seconds)
# make test     adds what the tests need and runs them                           (make test ARGS='-k kd')
# make check    everything that CI runs; `make -k check` goes on after a failure
# make faults   plants faults into the methods and shows that the tests catch them
# make format | docs | generated | clean
#
# Every target is safe to run twice: packages are installed again only when pyproject.toml or constraints.txt changed.
# What pip fetches follows its own settings; for a torch without CUDA set PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS.

PYTHON ?= $(shell command -v python3.11 || command -v python3 || command -v python)
JOBS ?= 2
ARGS ?=

bin := .venv/bin
pip := $(bin)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
# One thread a process: two workers on two cores are faster than four threads, and sums come out in one order.
one_thread := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
extras := text,export,track,dev

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test check formatted lint types generated docs faults format clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# --- the environment: a stamp is touched only after its install went through ---

$(bin)/python:
	@$(PYTHON) -c 'import sys; sys.exit("limbeck needs Python 3.11 or newer, found %s; set PYTHON=" % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

.venv/core.stamp: pyproject.toml constraints.txt | $(bin)/python
	@echo "installing limbeck into .venv (a minute or two)"
	@$(pip) --editable .
	@touch $@

.venv/test.stamp: pyproject.toml constraints.txt | $(bin)/python
	@echo "installing limbeck with $(extras) into .venv (two or three minutes)"
	@$(pip) --editable '.[$(extras)]'
	@touch .venv/core.stamp $@

# --- what a user runs ---

demo: .venv/core.stamp
	$(bin)/limbeck demo $(ARGS)

test: .venv/test.stamp
	$(one_thread) $(bin)/python -m pytest -n $(JOBS) $(ARGS)

# --- what CI runs: the fast answers first, the tests last so that their summary closes the output ---

check: formatted lint types generated docs test

formatted: .venv/test.stamp
	$(bin)/ruff format --check --output-format concise .

lint: .venv/test.stamp
	$(bin)/ruff check .

types: .venv/test.stamp
	$(bin)/mypy

# The tables in README and docs must be what the code, recipes, vectors and evidence say now.
generated: .venv/test.stamp
	$(one_thread) $(bin)/python -m limbeck.catalogue --check

docs: .venv/test.stamp
	$(one_thread) NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(bin)/mkdocs build --strict --quiet

# --- now and then ---

faults: .venv/test.stamp
	$(one_thread) $(bin)/python -m tests.faults $(ARGS)

format: .venv/test.stamp
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

clean:
	rm -rf .venv site build dist .mypy_cache .pytest_cache .ruff_cache
