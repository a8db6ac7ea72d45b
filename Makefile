# Everything is made inside this folder: `.venv`, `build`, `runs`. `make PYTHON=/path/to/python search` picks a Python.

.DELETE_ON_ERROR:
.PHONY: search test test-oldest test-slow sanitize sanitize-kernels bench speed lint format gpu-static bench-gpu clean distclean

VENV := .venv
BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip
PYTHONS := $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python3.10)

# Requirements stand in pyproject.toml and nowhere else.
BUILD_TOOLS := $(shell sed -n 's/^requires = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ,)
TORCH := $(shell sed -n 's/^ *\("torch[><=].*"\),/\1/p' pyproject.toml)
RUFF := $(shell sed -n 's/^lint = \[\(.*\)\]/\1/p' pyproject.toml)
SOURCES := setup.py pyproject.toml $(wildcard csrc/*/*.hpp csrc/*/*.cpp)

# No cache outside: neither pip's, nor matplotlib's.
export PIP_NO_CACHE_DIR ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1
export MPLCONFIGDIR ?= $(CURDIR)/$(VENV)/matplotlib
# One thread: operators this small gain little from a second, which waits where the other core is busy.
export OMP_NUM_THREADS ?= 1
unexport PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX

# A whole search on scikit-learn's digits: about a minute and a half on two cores.
RUN := runs/digits
DIGITS := --space digits --data digits --seed 0 \
	--pretrain-steps 1500 --pretrain-batch-size 64 --pretrain-lr 0.15 --pretrain-nesterov \
	--pretrain-schedule cosine --pretrain-clip-norm 5 --pretrain-label-smoothing 0 \
	--generations 6 --population 20 --parents 6 \
	--shift accumulate --shift-steps 5 --shift-batch-size 64 --shift-lr 0.001 --shift-label-smoothing 0 \
	--retrain-check 3 --retrain-epochs 12 --retrain-batch-size 64 --retrain-lr 0.1 --retrain-nesterov

search: $(VENV)/.made-search
	$(BIN)/fastshift search $(DIGITS) --out $(RUN) --resume

# A process a core, at most four; benchmarks could not be timed so.
PARALLEL := -n auto --maxprocesses 4 --benchmark-disable

test: $(VENV)/.made-test
	$(BIN)/pytest -m "not slow" $(PARALLEL) $(ARGS)

# The tests under the oldest versions that pyproject.toml allows (of a bound such as >=13 the newest
# 13.x), in an environment of their own; on Python 3.11 or 3.10, which these were made for. What newer
# parts of theirs deprecate is not ours.
OLDEST := $(shell grep -oE '"[a-z0-9-]+>=[0-9.]+' pyproject.toml | sed 's/"\(.*\)>=\(.*\)/\1~=\2.0/')

test-oldest:
	$(MAKE) test VENV=.venv-oldest PYTHON='$(or $(PYTHON),python3.11 python3.10 python3)' BUILD_TOOLS= TORCH='$(OLDEST)' ARGS="-W ignore::DeprecationWarning $(ARGS)"

test-slow: $(VENV)/.made-test
	$(BIN)/pytest -m slow $(PARALLEL) $(ARGS)

# The compiled parts with AddressSanitizer and UBSan, beside the installed ones; needs gcc's runtimes.
# FS_EMULATE adds the bfloat16 kernels with their instructions spelled out, for any AVX-512 machine.
SANITIZE := build/sanitize
SANITIZE_CXX = $${CXX:-g++}
SANITIZE_FLAGS := -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined -DFS_EMULATE
SANITIZED := tests/test_cpu.py tests/test_cpu_lines.py tests/test_cpu_memory.py tests/test_cpu_calls.py \
	tests/test_operators.py tests/test_operators_calls.py tests/test_operators_compiled.py \
	tests/test_levels.py tests/test_population.py tests/test_sampler.py tests/test_trie_plan.py
SANITIZED_RUN = LD_PRELOAD="$$($(SANITIZE_CXX) -print-file-name=libasan.so) $$($(SANITIZE_CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(CURDIR)/$(SANITIZE)/lib \
	$(BIN)/pytest -q --capture=sys -p no:cacheprovider

sanitize: $(VENV)/.made-test
	FASTSHIFT_CXXFLAGS="$(SANITIZE_FLAGS)" \
	    $(BIN)/python setup.py -q build --build-base $(SANITIZE) --build-lib $(SANITIZE)/lib
	$(SANITIZED_RUN) -m "not slow" $(SANITIZED) $(ARGS)
	$(SANITIZED_RUN) -m slow -k "training_pass or inference_ or large_image" tests/test_cpu.py tests/test_cpu_lines.py $(ARGS)

# The Triton kernels' tests under the interpreter, each access checked against the tensors' memory.
sanitize-kernels: $(VENV)/.made-test
	FASTSHIFT_WATCH=1 $(BIN)/pytest -q $(wildcard tests/test_kernels_*.py) $(ARGS)

bench: $(VENV)/.made-test
	$(BIN)/pytest $(wildcard benchmarks/bench_*.py) $(ARGS)

# The speed record and what the READMEs say of it: about an hour on two quiet cores.
speed: $(VENV)/.made-test
	$(BIN)/python benchmarks/speed.py record --threads 1 $(ARGS)
	$(BIN)/python benchmarks/speed.py record --threads 2 --subset
	$(BIN)/python benchmarks/speed.py readme

lint: $(VENV)/.made-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.made-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What can be said of the Triton kernels without a GPU: compiled for three architectures, read, checked.
# `make gpu-static ARGS=--record` keeps the table as the one to check against.
gpu-static: $(VENV)/.made-test
	TRITON_CACHE_DIR=$(CURDIR)/build/triton $(BIN)/python benchmarks/gpu_static.py $(ARGS)

# The GPU's speed, with a budget of ten minutes: checked, timed beside two baselines, kept in benchmarks/records.
# Without a CUDA device it names what is not measured.
bench-gpu: $(VENV)/.made-test
	TRITON_CACHE_DIR=$(CURDIR)/build/triton $(BIN)/python benchmarks/gpu.py $(ARGS)

# What was built and what tools left behind; `distclean` takes the environment and the runs too.
clean:
	rm -rf build dist *.egg-info fastshift/*.so .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(VENV)/.made-search $(VENV)/.made-test .venv-oldest/.made-test
	find fastshift kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .venv-oldest runs

# The environment, in steps that are each made once; a stamp marks a step that ended well.
$(VENV)/.made:
	@for python in $(PYTHONS); do \
	    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue; \
	    echo "making $(VENV) with $$("$$python" --version)"; \
	    "$$python" -m venv $(VENV) && "$(BIN)/python" -m pip --version >/dev/null && touch $@ && exit 0; \
	    echo "make: $$python cannot make a virtual environment; it needs its venv module (Debian: python3-venv)" >&2; \
	    exit 1; \
	done; \
	echo "make: no Python of 3.10 or newer among: $(PYTHONS); name one with make PYTHON=..." >&2; exit 1

$(VENV)/.made-lint: $(VENV)/.made pyproject.toml
	$(PIP) install -q $(RUFF)
	@touch $@

$(VENV)/.made-torch: $(VENV)/.made pyproject.toml
	@$(BIN)/python -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' || \
	    { echo "make: Python.h not found; install Python's headers (Debian: python3-dev)" >&2; exit 1; }
	@command -v "$${CXX:-g++}" >/dev/null || \
	    { echo "make: no C++ compiler $${CXX:-g++}; install g++, or name one with CXX=..." >&2; exit 1; }
	@echo 'installing $(TORCH): the first time takes some minutes'
	$(PIP) install $(BUILD_TOOLS) $(TORCH)
	@touch $@

# Nothing is built in isolation, where pip would install a torch of its own choice.
$(VENV)/.made-search: $(VENV)/.made-torch $(SOURCES)
	@echo 'compiling the C++ parts: one to four minutes'
	$(PIP) install -q --no-build-isolation -e '.[cli,digits,report]'
	@touch $@

$(VENV)/.made-test: $(VENV)/.made-torch $(SOURCES)
	@echo 'compiling the C++ parts: one to four minutes'
	$(PIP) install -q --no-build-isolation -e '.[test]'
	@touch $@
