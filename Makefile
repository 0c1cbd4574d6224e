# Every target sets up what it needs: a virtual environment, torch first, the rest, the build.
#
#   make test                          # .venv, torch, dependencies, native build, tests
#   make test VENV=/path/to/venv       # in an environment of yours; a torch in it is kept
#   make test TORCH="torch==2.6.0" PYTHON=python3.12 PYTEST_ARGS="-k build -x"
#   RESNET_FAST_BUILD=none make test   # auto | cpu | cuda | none: see setup.py

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
TEST_JOBS ?= 2
VERIFY_ARGS ?=
FUZZ_ARGS ?= --minutes 3 --small
FUZZ_FILES_ARGS ?= --inputs 5000
GPU_PYTHON ?= python3
GPU_ARGS ?=
GPU_JOBS ?= 8
GPU_SECONDS ?= 540
OUT ?= build/gpu
ARCH ?= sm_80,sm_90,sm_100
EXTRAS := test,demo,train,vision,dev

# The torch that is there, as a constraint: nothing that is installed after it may replace it. One
# that brings its own triton, as CUDA builds do, keeps that too.
define ASK_TORCH
from importlib.metadata import requires, version
print("torch==" + version("torch"))
if not any(r.startswith("triton") and "extra ==" not in r for r in requires("torch")):
    print("# brings no triton")
endef
export ASK_TORCH

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# Headers alone: what else the package names is for its Python half.
CUTLASS := $(PIP) install --no-deps nvidia-cutlass
DEPS := $(VENV)/.resnet_fast-deps
SITE := $(VENV)/.resnet_fast-docs
# One stamp for the native build, named after what it was built for: another VENV or another
# RESNET_FAST_BUILD has another name, so it builds again.
BUILT := build/stamps/$(subst /,_,$(abspath $(VENV)))-$(or $(RESNET_FAST_BUILD),auto)
NATIVE := setup.py $(shell find csrc -type f)

CUDA_HOME ?= /usr/local/cuda
DRY := $(CURDIR)/build/dry_gpu/libcuda.so.1
# Errors of memory beyond these 8 GiB come of sizes that are values; more would be the machine's.
# Batch 256 needs a GPU's memory, of which nothing is written.
ON_DRY_GPU = env LD_PRELOAD=$(DRY) LD_LIBRARY_PATH=$(dir $(DRY)) TRITON_LIBCUDA_PATH=$(dir $(DRY)) \
  TRITON_CACHE_DIR=$(dir $(DRY))triton DRY_GPU_GIB=8 PYTHONPATH=tests:. $(GPU_PYTHON)
ON_LARGE_DRY_GPU = $(subst GIB=8,GIB=139,$(ON_DRY_GPU))

SANITIZED := $(CURDIR)/build/sanitize
SANITIZE := -fsanitize=address,undefined -fno-sanitize=vptr -fno-wrapv

.PHONY: help setup env verify test test-quick test-all lint docs demo bench fuzz fuzz-files sanitize gpu gpu-test gpu-sanitize dry-gpu kernels \
  cuda-check clean distclean

help:
	@echo "make test    run the tests (PYTEST_ARGS=..., TEST_JOBS=processes)"
	@echo "make test-quick  one case a test, without the slow ones: the inner loop"
	@echo "make test-all    every combination of parameters, not those alone that hold each pair"
	@echo "make lint    ruff and mypy"
	@echo "make docs    build the documentation site; open build/site/index.html"
	@echo "make demo    verify, train and measure; writes build/demo/report.html"
	@echo "make bench   benchmarks of ops and of ResNet-50; writes build/bench"
	@echo "make gpu     on a GPU machine: build, checks and measurements in 9 minutes (GPU_ARGS=...)"
	@echo "make gpu-test      there: the GPU tests, in shards; make gpu-sanitize: under compute-sanitizer"
	@echo "             (GPU_PYTHON=, GPU_JOBS=, GPU_SECONDS=, OUT=folder of the results, PYTEST_ARGS=)"
	@echo "make dry-gpu the host's part of both, by a CUDA build of PyTorch without a GPU"
	@echo "make kernels compile every Triton kernel without a GPU (ARCH=sm_90,...)"
	@echo "make cuda-check  compile every CUDA kernel without a GPU, by nvcc"
	@echo "make fuzz    random configurations of the CPU kernels against PyTorch (FUZZ_ARGS=...)"
	@echo "make fuzz-files  damaged and hostile files under a memory limit (FUZZ_FILES_ARGS=...)"
	@echo "make sanitize the same as fuzz in a build with AddressSanitizer and UBSan"
	@echo "make verify  compare every op, block and model with the fp64 reference (VERIFY_ARGS=...)"
	@echo "make env     what is live on this machine, what is not and why"
	@echo "make setup   only the environment and the native build"
	@echo "make clean   remove what was built; make distclean: the virtual environment too"
	@echo "variables: PYTHON VENV TORCH PYTEST_ARGS RESNET_FAST_BUILD MAX_JOBS TORCH_CUDA_ARCH_LIST"

setup: $(BUILT)

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	  "Python 3.10 or newer is needed, $(PYTHON) is %d.%d: make PYTHON=..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

# torch before anything that depends on it, so that nothing else chooses its version.
$(DEPS): pyproject.toml | $(PY)
	@$(PY) -c "import torch" 2>/dev/null || { echo $(PIP) install $(TORCH); $(PIP) install $(TORCH); }
	$(PIP) install "setuptools>=77" ninja
	@$(PY) -c "$$ASK_TORCH" > $(VENV)/torch.txt
	RESNET_FAST_BUILD=none $(PIP) install --no-build-isolation -c $(VENV)/torch.txt \
	  -e ".[$(EXTRAS)$$(sed -n 's/^# brings no triton/,triton/p' $(VENV)/torch.txt)]"
	@if command -v nvcc >/dev/null; then echo $(CUTLASS); $(CUTLASS); fi
	@touch $@

# In place and through ninja: after an edit only what changed is compiled again.
$(BUILT): $(DEPS) $(NATIVE)
	@rm -rf build/stamps resnet_fast/_C.*.so
	$(PY) setup.py build_ext --inplace
	@mkdir -p $(@D) && touch $@

env: $(BUILT)
	$(PY) -m resnet_fast env

verify: $(BUILT)
	$(PY) -m resnet_fast verify $(VERIFY_ARGS)

fuzz: $(BUILT)
	$(PY) -m tests.fuzz $(FUZZ_ARGS)

fuzz-files: $(BUILT)
	$(PY) tests/fuzz_files.py $(FUZZ_FILES_ARGS)

# A package of its own under build/, run from there. Libraries that Python loads want ASan before
# all others; what leaks is Python's. Overflow of integers stays visible: no -fwrapv.
sanitize: $(DEPS)
	CXXFLAGS="$(SANITIZE) -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g" \
	  LDFLAGS="$(SANITIZE)" RESNET_FAST_BUILD=cpu \
	  $(PY) setup.py -q build --build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects
	cd $(SANITIZED) && PYTHONPATH=$(CURDIR) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	  $(abspath $(PY)) -m tests.fuzz $(FUZZ_ARGS)

test: $(BUILT)
	$(PY) -m pytest -n $(TEST_JOBS) $(PYTEST_ARGS)

test-quick: $(BUILT)
	$(PY) -m pytest -n $(TEST_JOBS) --quick $(PYTEST_ARGS)

test-all: $(BUILT)
	$(PY) -m pytest -n $(TEST_JOBS) --every $(PYTEST_ARGS)

lint: $(DEPS)
	$(PY) -m ruff check .
	$(PY) -m mypy

# The site is made from the sources; the package need not be built.
$(SITE): pyproject.toml | $(DEPS)
	RESNET_FAST_BUILD=none $(PIP) install --no-build-isolation -c $(VENV)/torch.txt -e ".[docs]"
	@touch $@

docs: $(SITE)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

demo: $(BUILT)
	$(PY) -m bench demo --out build/demo

bench: $(BUILT)
	@mkdir -p build/bench
	$(PY) -m pytest bench/ops.py --benchmark-only --benchmark-json=build/bench/ops.json
	$(PY) -m bench models --model resnet50 --mode infer,train --batch 1,16 --dtype fp32,bf16 \
	  --device cpu --providers eager_nchw,eager,compile,resnet_fast \
	  --out build/bench/models.jsonl

# On a machine with an NVIDIA GPU, offline: with the interpreter whose packages are installed.
# RESNET_FAST_BUILD=none builds nothing: Triton's kernels need no build.
GPU_BUILD = $(GPU_PYTHON) setup.py build_ext --inplace
SHARDS = $(GPU_PYTHON) tests/support/shards.py --out $(OUT) --jobs $(GPU_JOBS) --seconds $(GPU_SECONDS)

gpu:
	$(GPU_BUILD)
	$(GPU_PYTHON) -m bench gpu $(if $(filter --out% --resume%,$(GPU_ARGS)),,--out $(OUT)) $(GPU_ARGS)

gpu-test:
	$(GPU_BUILD)
	$(SHARDS) tests -m "gpu and not sanitizer" $(PYTEST_ARGS)

gpu-sanitize:
	$(GPU_BUILD)
	$(SHARDS) sanitizer -m sanitizer $(PYTEST_ARGS)

# Without a GPU: all that happens on the host for one, by a CUDA build of PyTorch (tests/dry_gpu).
dry-gpu: $(DRY)
	RESNET_FAST_BUILD=cuda CUDA_HOME=$(CUDA_HOME) $(GPU_PYTHON) setup.py build_ext --inplace
	$(ON_DRY_GPU) -m pytest -p dry_gpu.plugin -m "gpu and not sanitizer" -q $(PYTEST_ARGS)
	$(ON_DRY_GPU) -m dry_gpu host
	rm -rf $(dir $(DRY))run
	$(ON_LARGE_DRY_GPU) -m dry_gpu gpu --out $(dir $(DRY))run --budget 7200

$(DRY): tests/dry_gpu/runtime.cpp
	@mkdir -p $(@D)
	nvcc -O2 -std=c++17 -shared -cudart none -Xcompiler -fPIC $< -o $@ -ldl -Xlinker -soname=libcuda.so.1
	@ln -sf $(notdir $(DRY)) $(@D)/libcuda.so

# Every CUDA kernel, by nvcc.
cuda-check: $(DEPS)
	$(PY) -m bench cuda

# Every Triton kernel, compiled without a GPU: registers, spills, tensor-core instructions.
kernels: $(DEPS)
	$(PY) -m bench kernels --arch $(ARCH)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .benchmarks resnet_fast/_C.*.so
	find resnet_fast bench tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-ci
