# make demo   environment, install, then teacher and student side by side on the bundled problems
# make test   environment with everything needed to develop, then the tests
# Both build .venv when it is missing or older than pyproject.toml and constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
WORKERS ?= 2

.PHONY: demo test fuzz lint format tables wheel clean

demo: $(VENV)/.installed
	$(BIN)/fewstep demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Every field of every file of a checkpoint, every option, every field of rows and every moment of a kill, of which
# `make test` draws some.
fuzz: $(VENV)/.installed-dev
	FEWSTEP_FUZZ=all $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m '' tests/test_damaged_checkpoints.py tests/test_hostile_inputs.py tests/test_kills.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The tables of settings in docs/, from what decoders and policies declare.
tables: $(VENV)/.installed-dev
	$(BIN)/python tests/option_tables.py

wheel: $(VENV)/.installed-dev
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fewstep needs Python 3.11 or newer; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt -e '.[train,eval,gsm,gguf,dev]'
	touch $@ $(VENV)/.installed
