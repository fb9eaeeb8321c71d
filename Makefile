# make setup: the environment in .venv; make search: the quick start; make test: all tests; make check: before a commit.
PYTHON ?= python3
BIN := .venv/bin
# tests and recipes on real data find it here; they skip with a reason where it is absent
ifneq ($(wildcard ../shared/data),)
export LMNAS_DATA ?= $(abspath ../shared/data)
endif

.PHONY: setup search test check format

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $@

search: setup
	$(BIN)/lmnas search quickstart

test: setup
	$(BIN)/python -m pytest -n 2

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 -m 'not slow'

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
