# make demo    train, export and run a small model from nothing    make lint    clang-format, ruff, mypy
# make test    build and run the fast tests                        make bench   the benchmarks
# make test-all  also the slow ones (wheels, fault loops, demo)    make dev     build in place, for work on the sources
# make sanitize  the ops' tests with address and undefined behaviour sanitizers (gcc)
# make test-cuda  the CUDA kernels without a GPU: emulated, checked for races, compiled by nvcc
# make cuda-env  an environment .venv-cuda with a CUDA build of torch and the whole extension compiled for it
#
# Everything is installed into .venv. A machine needs python3 >= 3.10 with venv and headers, a C++20 compiler and make.
# Another torch: make test TORCH="torch==2.12.1". Fewer compile jobs and processes of fast tests: MAX_JOBS=1.

PYTHON ?= python3
TORCH ?= torch==2.13.0
export MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 2)

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
SOURCES := $(shell find csrc cmake -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cmake' -o -name '*.in') \
	$(wildcard glam_ext/functional.py) CMakeLists.txt setup.py pyproject.toml

.DELETE_ON_ERROR:
.PHONY: demo test test-all test-cuda cuda-env lint format bench sanitize dev clean

dev: $(VENV)/.built

demo: $(VENV)/.built
	$(PY) -m glam_ext.recipes.demo

# A file's tests share a process, as they share what it builds. A process that crashes ends the run: replaced, it would hang
# (pytest-xdist, issue 784). Threads that wait for work give their core to others.
TEST_JOBS ?= $(shell echo $$(($(MAX_JOBS) < 8 ? $(MAX_JOBS) : 8)))
test: $(VENV)/.built
	OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder \
	  --max-worker-restart=0 $(PYTEST_ARGS)

test-all: $(VENV)/.built
	$(PY) -m pytest -m "slow or not slow" $(PYTEST_ARGS)

test-cuda: $(VENV)/.built
	$(PY) -m pytest -m "slow or not slow" tests/cuda $(PYTEST_ARGS)

# Built from a copy, as build/cmake belongs to the other environment, and tested by another copy, of the tests alone: beside
# the sources they would import those. CUDA_HOME's toolkit should be of torch's CUDA version.
CUDA_TORCH ?= torch==2.14.1
CUDA_HOME ?= /usr/local/cuda
CUDA_SOURCE := build/cuda-env

cuda-env:
	test -x .venv-cuda/bin/python || $(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python -m pip install --quiet "setuptools>=77" wheel "cmake>=3.24" ninja nlohmann-json numpy $(CUDA_TORCH)
	mkdir -p $(CUDA_SOURCE)
	git ls-files -z | tar -c --null -T - | tar -x -C $(CUDA_SOURCE)
	CUDA_HOME=$(CUDA_HOME) GLAM_CMAKE_ARGS="-DGLAM_CUDA=ON" \
	  .venv-cuda/bin/python -m pip install --no-build-isolation "$(CUDA_SOURCE)[test]"
	cd $(CUDA_SOURCE)/tests && $(abspath .venv-cuda/bin/glam) doctor
	rm -rf $(CUDA_SOURCE)/outside && mkdir $(CUDA_SOURCE)/outside && cp -r $(CUDA_SOURCE)/tests $(CUDA_SOURCE)/outside
	cd $(CUDA_SOURCE)/outside && $(abspath .venv-cuda/bin/python) -m pytest -o pythonpath= tests/cuda/test_fake_tensors.py

lint: $(VENV)/.installed
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.installed
	$(VENV)/bin/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.built
	@for script in $(filter-out $(addprefix benchmarks/,common.py generated.py gpu.py gpu_resources.py gpu_traffic.py ranks.py reference_rates.py),$(wildcard benchmarks/*.py)); do echo "== $$script"; $(PY) $$script || exit 1; done

# The ops' tests on a build with the sanitizers, in a copy: Python finds the package beside the tests it runs.
SANITIZED := build/sanitize/package
SANITIZERS = $(shell $(or $(CXX),g++) -print-file-name=libasan.so):$(shell $(or $(CXX),g++) -print-file-name=libubsan.so)

sanitize: $(VENV)/.installed
	$(VENV)/bin/cmake -S . -B build/sanitize/cmake -G Ninja -DGLAM_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(PY)) \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV)/bin/ninja) \
	  -DCMAKE_PREFIX_PATH=$$($(PY) -c "import torch; print(torch.utils.cmake_prefix_path)") \
	  -DGLAM_EXTRA_RPATH=$$($(PY) -c "import os, torch; print(os.path.dirname(torch.__file__) + '/lib')")
	$(VENV)/bin/cmake --build build/sanitize/cmake --parallel $(MAX_JOBS)
	$(VENV)/bin/cmake --install build/sanitize/cmake --prefix $(SANITIZED)
	tar -c --exclude=glam_ext/lib --exclude='glam_ext/_C*.so' csrc/cpu csrc/ops glam_ext tests pyproject.toml | tar -x -C $(SANITIZED)
	cd $(SANITIZED) && LD_PRELOAD=$(SANITIZERS) ASAN_OPTIONS=detect_leaks=0 $(abspath $(PY)) -m pytest -q \
	  -p no:cacheprovider -k "not compile and not threads" tests/ops $(PYTEST_ARGS)

clean:
	rm -rf build dist *.egg-info glam_ext/lib glam_ext/include glam_ext/share glam_ext/_C*.so $(VENV)/.built $(VENV)/.installed

# --- stamps: each is redone only when what it was made from changed

$(VENV)/.created:
	@bash cmake/check_machine.sh $(PYTHON)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.tools: $(VENV)/.created Makefile
	@echo "installing $(TORCH) and the build tools into $(VENV)"
	$(PIP) "setuptools>=77" wheel "cmake>=3.24" ninja nlohmann-json numpy $(TORCH)
	touch $@

# The first build goes through pip, which also installs what the package, its tests and the linters need; after that a
# changed source is a matter for CMake and Ninja alone.
$(VENV)/.installed: $(VENV)/.tools pyproject.toml setup.py
	$(PIP) --no-build-isolation -v --editable ".[dev]"
	touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(VENV)/bin/ninja -C build/cmake -j $(MAX_JOBS) install
	touch $@
