# make demo   environment, install, then teacher and student side by side on the bundled problems
# make test   environment with everything needed to develop, then the tests
# make test-fast   the heart of the tests, in under 20 seconds: decoders equal plain ones, contract, masks, policies,
#                  values, settings, architecture
# All build .venv when it is missing or older than pyproject.toml and constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
WORKERS ?= 2

.PHONY: demo test test-fast fuzz lint format tables wheel clean

demo: $(VENV)/.installed
	$(BIN)/fewstep demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Whole files but for a few long tests, and of the decoders that guess only that they equal the autoregressive one.
FAST := $(addprefix tests/test_,architecture.py block_draft.py contract.py declarations.py decoders.py masks.py \
	policies.py sampling.py values.py accelerators.py::test_every_decoder_equals_the_autoregressive_one)
LONG := batch_of_8 or joins_late or equal_tensor_shapes or bundled or waits_for_nothing or uncached_decoder_runs or \
	cancelled_request or events_of_every_slot or grouping_into_passes

test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n $(WORKERS) -k 'not ($(LONG))' $(FAST)

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
	$(PIP) install --quiet -c constraints.txt -e '.[train,eval,gsm,gguf,serve,dev]'
	touch $@ $(VENV)/.installed
