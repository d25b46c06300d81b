# Each target does its own set-up in .venv; nothing is needed beyond Python >= 3.10, a C++ compiler and make.
#   make demo    a captioning model on a clip, stock against Saccade; ends with a table and a picture in out/demo
#   make test    every test that runs without a GPU (with one, those too)
#   make bench   timings against transformers, diffusers, torch.compile
#   make lint    ruff, mypy, clang-format
# SACCADE_CUDA=ON makes a missing nvcc an error; the default builds CUDA kernels where nvcc is found.

PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(shell find csrc kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
CXX_FILES := $(SOURCES) $(shell find tests -name '*.cpp' -o -name '*.h' 2>/dev/null)

.PHONY: demo test bench lint format clean
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/saccade demo $(VIDEO) --out $(or $(OUT),out/demo)

test: .venv/installed
	$(BIN)/python -m pytest -q $(ARGS)

bench: .venv/installed
	$(BIN)/python -m bench $(ARGS)

lint: .venv/linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: .venv/linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf .venv build out python/saccade/_C.so python/saccade/_no_binary.txt

.venv/torch:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "saccade needs Python >= 3.10")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q 'torch>=2.10' numpy
	touch $@

# torch first: the build takes its headers from the environment instead of fetching a second torch.
.venv/installed: .venv/torch pyproject.toml setup.py backend.py CMakeLists.txt python/saccade/_schemas.inc $(SOURCES)
	$(BIN)/pip install -q -e '.[test]'
	touch $@

.venv/linters: .venv/installed
	$(BIN)/pip install -q 'ruff==0.17.*' mypy clang-format
	touch $@
