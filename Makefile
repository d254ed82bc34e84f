# isofusion: every target does its own set-up on a machine that has only Python 3.11+ with venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
OUT    ?= runs

.PHONY: study test test-slow check ladder openstax clean help
help:            ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*##/\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
	@touch $@

study: $(READY)  ## the built-in study on the CPU (about a quarter of an hour); ends with the path of the report
	$(BIN)/isofusion study run studies/world-mini.toml --out $(OUT)/world-mini --resume

test: $(READY)   ## the quick tests (under 8 minutes on 2 cores; warnings are errors)
	$(BIN)/python -m pytest -n auto --dist loadfile

test-slow: $(READY)  ## the slow tests: whole small studies, killed and continued
	$(BIN)/python -m pytest -m slow --timeout 3600

check: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ladder: $(READY)  ## the careful ladder (about 2 hours on 2 cores)
	$(BIN)/isofusion study run studies/world-ladder.toml --out $(OUT)/world-ladder --resume

openstax: $(READY)  ## real data: make openstax DATA=FOLDER
	@test -n "$(DATA)" || { echo "give the data folder: make openstax DATA=FOLDER" >&2; exit 2; }
	$(BIN)/isofusion study run studies/openstax-mini.toml --data "$(DATA)" --out $(OUT)/openstax-mini --resume

clean:           ## remove the environment and every build product (never a study)
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
