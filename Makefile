# Each target makes what it needs: the environment .venv, and natten2 built in it.
PYTHON ?= python3
TORCH ?= torch==2.13.0

BIN := .venv/bin
SOURCES := CMakeLists.txt $(shell find natten2/csrc -type f)
CPP := $(filter-out CMakeLists.txt,$(SOURCES)) $(wildcard examples/cpp/*.cpp tests/*.cpp)

.PHONY: demo test test-long lint format bench build clean

demo: .venv/natten2
	$(BIN)/python -m examples.digits

test: .venv/natten2
	$(BIN)/python -m pytest -m "not long" -n auto --dist worksteal

test-long: .venv/natten2
	$(BIN)/python -m pytest

lint: .venv/natten2
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: .venv/natten2
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: .venv/natten2
	$(BIN)/python -m benchmarks cpu --case shapes corners --memory --json benchmarks/results/cpu.json

build: .venv/natten2

clean:
	rm -rf .venv build dist

# The build and the tools come from .venv itself: an isolated build would fetch torch a second time.
.venv/environment: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install "$(TORCH)" "scikit-build-core>=0.11" "cmake>=3.25" ninja
	touch $@

.venv/natten2: .venv/environment $(SOURCES)
	$(BIN)/python -m pip install --no-build-isolation --editable ".[examples,lint,test]"
	touch $@
