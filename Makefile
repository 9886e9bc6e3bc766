# `make demo` pretrains on real images and shows the result; `make test` tests. Both set up first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SEED ?= 0
PYTEST_MARK ?=

.PHONY: demo demo-moco test test-all lint clean

# The marker is written last, so that an interrupted installation is repeated.
$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: $(VENV)/ready
	$(BIN)/python main.py --config=configs/simclr_demo.py --config.seed=$(SEED) \
	    --workdir=runs/simclr_demo_seed$(SEED)

demo-moco: $(VENV)/ready
	$(BIN)/python main.py --config=configs/moco_demo.py --config.seed=$(SEED) \
	    --workdir=runs/moco_demo_seed$(SEED)

test: $(VENV)/ready
	$(BIN)/python -m pytest

test-all: $(VENV)/ready
	$(BIN)/python -m pytest -m "$(PYTEST_MARK)"

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
