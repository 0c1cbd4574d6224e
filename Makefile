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
GPU_PYTHON ?= python3
GPU_ARGS ?=
GPU_JOBS ?= 8
ARCH ?= sm_80,sm_90,sm_100
EXTRAS := test,demo,train,dev

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
# One stamp for the native build, named after what it was built for: another VENV or another
# RESNET_FAST_BUILD has another name, so it builds again.
BUILT := build/stamps/$(subst /,_,$(abspath $(VENV)))-$(or $(RESNET_FAST_BUILD),auto)
NATIVE := setup.py $(shell find csrc -type f)

CUDA_HOME ?= /usr/local/cuda
DRY := $(CURDIR)/build/dry_gpu/libcuda.so.1
# Errors of memory beyond these 8 GiB come of sizes that are values; more would be the machine's.
ON_DRY_GPU = env LD_PRELOAD=$(DRY) LD_LIBRARY_PATH=$(dir $(DRY)) TRITON_LIBCUDA_PATH=$(dir $(DRY)) \
  TRITON_CACHE_DIR=$(dir $(DRY))triton DRY_GPU_GIB=8 PYTHONPATH=tests:. $(GPU_PYTHON)

.PHONY: help setup env verify test lint demo bench gpu dry-gpu kernels cuda-check clean distclean

help:
	@echo "make test    run the tests (PYTEST_ARGS=..., TEST_JOBS=processes)"
	@echo "make lint    ruff"
	@echo "make demo    verify, train and measure; writes build/demo/report.html"
	@echo "make bench   benchmarks of ops and of ResNet-50; writes build/bench"
	@echo "make gpu     on a GPU machine: build, tests, measurements (GPU_PYTHON=, GPU_JOBS=, GPU_ARGS=...)"
	@echo "make dry-gpu the host's part of the GPU tests, by a CUDA build of PyTorch without a GPU"
	@echo "make kernels compile every Triton kernel without a GPU (ARCH=sm_90,...)"
	@echo "make cuda-check  compile every CUDA kernel without a GPU, by nvcc"
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

test: $(BUILT)
	$(PY) -m pytest -n $(TEST_JOBS) $(PYTEST_ARGS)

lint: $(DEPS)
	$(PY) -m ruff check .

demo: $(BUILT)
	$(PY) -m bench demo --out build/demo

bench: $(BUILT)
	@mkdir -p build/bench
	$(PY) -m pytest bench/ops.py --benchmark-only --benchmark-json=build/bench/ops.json
	$(PY) -m bench models --model resnet50 --mode infer,train --batch 1,16 --dtype fp32,bf16 \
	  --device cpu --providers eager_nchw,eager,compile,resnet_fast \
	  --out build/bench/models.jsonl

# On a machine with an NVIDIA GPU, offline: with the interpreter whose packages are installed. Tests run
# in shards at once, as most of their time is the compilation of kernels; measurements run alone.
gpu:
	RESNET_FAST_BUILD=auto $(GPU_PYTHON) setup.py build_ext --inplace
	@mkdir -p build/gpu
	@echo "$(GPU_PYTHON) -m pytest -m gpu, $(GPU_JOBS) shards at once; build/gpu/tests-*.log"
	@seq 0 $$(($(GPU_JOBS) - 1)) | xargs -P $(GPU_JOBS) -I{} sh -c '$(GPU_PYTHON) -m pytest -m gpu -q \
	  --shard {}/$(GPU_JOBS) $(PYTEST_ARGS) >build/gpu/tests-{}.log 2>&1; \
	  status=$$?; tail -n 12 build/gpu/tests-{}.log; exit $$status'
	$(GPU_PYTHON) -m bench gpu $(GPU_ARGS)

# Without a GPU: all that happens on the host for one, by a CUDA build of PyTorch (tests/dry_gpu).
dry-gpu: $(DRY)
	RESNET_FAST_BUILD=cuda CUDA_HOME=$(CUDA_HOME) $(GPU_PYTHON) setup.py build_ext --inplace
	$(ON_DRY_GPU) -m pytest -p dry_gpu.plugin -m gpu -q $(PYTEST_ARGS)
	$(ON_DRY_GPU) -m dry_gpu host

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
