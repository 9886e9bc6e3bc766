# `make demo` pretrains on real images and shows the result; `make test` tests. Both set up `.venv` first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SEED ?= 0
TORCH_OPTIONS ?=
MUTANTS ?=
# Several processes share the tests, a file at a time; each takes up to 4 GB. When one crashes, the
# run ends with the name of its test.
PYTEST = $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile \
    --no-loadscope-reorder --max-worker-restart 0 $(PYTEST_OPTIONS)
PYTEST_OPTIONS ?=
# uv, where it is installed, takes 15 s for what takes pip 90.
UV := $(shell command -v uv)
INSTALL = $(if $(UV),$(UV) pip install --quiet --python $(BIN)/python,$(PIP_INSTALL))
PIP_INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check
# Large arrays in pages of 2 MB where Linux offers them on request: training on a CPU and the input
# pipeline are a fifth faster (docs/benchmarks.md). Other systems ignore it.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo demo-moco pod-sim test test-long test-tpu test-notebook test-torch mutants lint docs clean

# The marker is written last, so that an interrupted installation is repeated.
$(VENV)/ready: requirements.txt requirements/run.txt requirements/test.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -r requirements.txt
	touch $@

# The TPU compiler of this jax, 200 MB: it plans for TPU slices on any Linux machine.
$(VENV)/tpu: $(VENV)/ready
	$(INSTALL) "jax[tpu]"
	touch $@

$(VENV)/notebook: $(VENV)/ready
	$(INSTALL) nbclient ipykernel
	touch $@

# Only the CPU part is used. The wheels for Linux bring CUDA (gigabytes) unless TORCH_OPTIONS leads
# pip to PyTorch's own index of CPU builds (190 MB), which has no timm.
$(VENV)/torch: $(VENV)/ready
	$(PIP_INSTALL) torch==2.13.0 torchvision==0.28.0 $(TORCH_OPTIONS)
	$(PIP_INSTALL) timm==1.0.31
	touch $@

demo: $(VENV)/ready
	$(BIN)/python main.py --config=configs/simclr_demo.py --config.seed=$(SEED) \
	    --workdir=runs/simclr_demo_seed$(SEED)

demo-moco: $(VENV)/ready
	$(BIN)/python main.py --config=configs/moco_demo.py --config.seed=$(SEED) \
	    --workdir=runs/moco_demo_seed$(SEED)

# Two processes with two simulated devices each, like two hosts of a pod; this trains for real.
pod-sim: $(VENV)/ready
	$(BIN)/python -m common.distributed --processes=2 --devices=2 -- \
	    --config=configs/moco_demo.py --config.duration="1 epoch" --workdir=runs/pod_sim

test: $(VENV)/ready
	$(PYTEST)

# All that `make test` leaves out, in one call, so that it is compiled once. Together with `make test`
# that is every test.
test-long: $(VENV)/notebook $(VENV)/torch $(VENV)/tpu
	$(PYTEST) -m "slow or multiprocess or notebook or torch or tpu"

# Compiles small train steps for TPU slices.
test-tpu: $(VENV)/tpu
	$(BIN)/python -m pytest -m tpu

# Runs the notebook in its smoke setting.
test-notebook: $(VENV)/notebook
	$(BIN)/python -m pytest -m notebook

# Compares with PyTorch and timm: exported and imported weights.
test-torch: $(VENV)/torch
	$(BIN)/python -m pytest -m torch

# Puts single faults into copies of this checkout: the test named for each must fail. MUTANTS has
# options, e.g. MUTANTS="--every=10".
mutants: $(VENV)/ready
	$(BIN)/python tests/mutants/run.py $(MUTANTS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation site, into site/; needs no network once the packages are there.
$(VENV)/docs: docs/requirements.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -r docs/requirements.txt
	touch $@

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache site
