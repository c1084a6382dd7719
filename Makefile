# The commands of this repository; `make help` lists them. Everything they install goes into .venv and build/.
#
#   TORCH    what `pip install` is told to get torch:  make test TORCH="torch==2.14.1"
#   VERSIONS the releases of torch, and of Python before a colon, that `make test-versions` runs the tests under
#   WHEEL    the wheel that it runs, as `make release-wheel` makes; default: one built for each Python
#   TRITONS  the releases whose machine code `make test-tritons` reads
#   ARCHS    what the CUDA module of `make wheel` is built for:  make wheel ARCHS="9.0 10.0+PTX"
#   PYTHONS  what `make release-wheel` builds for; by default python3.10, 3.11, ... that PATH has
#   BASE     the revision that `make bench-compare` compares this tree with:  make bench-compare BASE=v0.1.0
#   FIGURES  what `make evidence-report` makes its pages from:  make evidence-report FIGURES=build/evidence/full/figures.json
#   PICTURE  where `make bench` draws the ratios:  make bench PICTURE=bench/report/cpu.png
#   SYSTEM   1: `make gpu-report` and `make sanitize` take PYTHON as it is and build in the source tree; no network
#   OUT      the folder that `make gpu-report` leaves its stages' results in
#   DATA     the folder with CIFAR and a text that `make evidence-gpu` measures on
#   STAGE    which of its stages it runs: quick, tests, sanitize, bench, profile, or all
#   ARGS     further arguments of the script or of pytest:  make test ARGS="-k checkpoint"

PYTHON ?= python3
TORCH ?= torch==2.13.0
VERSIONS ?= 3.10:2.6.0 3.12:2.9.1 3.11:2.13.0 3.13:2.15.0
TRITONS ?= 3.4.0 3.5.1 3.6.0 3.7.1 3.8.0 3.9.0
WORKERS ?= 2
FIGURES ?= bench/evidence/figures.json
PICTURE ?= build/bench/ratios.png
OUT ?= gpu-report
STAGE ?= all

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# Tests of a group share what they build, and only the tools' tests have groups. Keeping track of them costs the square
# of the number of tests: 13,300 empty ones take 46 s of CPU with it and 28 s without.
SHARED := -n $(WORKERS) --dist worksteal
GROUPED := -n $(WORKERS) --dist loadgroup
# Benchmarks say nothing while two workers share the machine.
PYTEST := -m pytest --benchmark-disable
CPP_FILES = $(shell find csrc bench -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
# What runs where there is a GPU: on a machine that is shut off, the Python that is there.
ON_SYSTEM := $(filter-out 0,$(SYSTEM))
GPU_PY := $(if $(ON_SYSTEM),$(PYTHON),$(PY))
GPU_NEEDS := $(if $(ON_SYSTEM),,$(VENV)/.extra-test $(VENV)/.extra-demo)

.DEFAULT_GOAL := help
.PHONY: help demo evidence evidence-report evidence-gpu test test-tools test-clients lint format bench bench-cpu bench-compare bench-check bench-baseline bench-predict wheel release-wheel test-versions test-tritons sanitize sanitize-cpu gpu-report clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s%s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.extra-demo ## train with and without Lookahead and compare (QUICK=1: a short run)
	$(PY) -m bench.demo $(if $(filter-out 0,$(QUICK)),--quick) $(ARGS)

evidence: $(VENV)/.extra-evidence ## measure what slow weights do for training, in hours (QUICK=1: minutes, SMOKE=1: seconds)
	$(PY) -m bench.evidence --scale $(if $(filter-out 0,$(SMOKE)),smoke,$(if $(filter-out 0,$(QUICK)),quick,full)) $(ARGS)

evidence-report: $(VENV)/.extra-evidence ## the pages of that measurement, from the figures kept in FIGURES
	$(PY) -m bench.evidence report $(FIGURES) $(ARGS)

# Where the GPU's Python is the system's, it has what [evidence] names; the folder has the data, nothing is downloaded.
evidence-gpu: $(if $(ON_SYSTEM),,$(VENV)/.extra-evidence) ## CIFAR and a GPT of 124 M on a GPU: make evidence-gpu DATA=folder (ARGS=--dry-run: on a CPU)
	$(GPU_PY) -m bench.evidence.gpu $(if $(DATA),--data "$(DATA)") $(ARGS)

# Two workers share the cores: a thread that spins, as OpenMP's do by default, takes one from the other's test.
test test-tools test-clients test-versions test-tritons sanitize-cpu: export OMP_WAIT_POLICY ?= passive

# What builds wheels, reads machine code, reports a build, measures or trains is no other under another torch, and takes
# as long as the rest; clients are installed by `make test-clients`.
TOOLS := building benchmarks evidence
APART := $(TOOLS) clients

test: $(VENV)/.extra-test ## the tests of the package
	LOOKAHEAD_FUSED_EXPECTED_IN=$(CURDIR) $(PY) $(PYTEST) $(SHARED) $(APART:%=--ignore tests/%) $(ARGS)

test-tools: $(VENV)/.extra-test $(VENV)/.extra-demo $(VENV)/.extra-evidence $(VENV)/.extra-release ## the tests of what builds it, of the machine code, of the benchmarks and the evidence
	LOOKAHEAD_FUSED_EXPECTED_IN=$(CURDIR) $(PY) $(PYTEST) $(GROUPED) $(ARGS) $(TOOLS:%=tests/%)

# Lightning's command line is made by jsonargparse.
CLIENTS := accelerate deepspeed fastai "jsonargparse[signatures]" lightning skorch stable-baselines3 timm transformers

# torch is named twice: the newest torchvision would bring another. DeepSpeed's setup imports torch, and compiles what it
# needs when it runs, by ninja. The registry's torchvision, which fastai and timm ask for, is built for CUDA; beside a
# torch for the CPU it cannot be imported, and transformers would try to. It is moved apart, where timm's tests alone
# find it (tests/clients/torchvision_apart.py).
build/clients/.installed: $(VENV)/.torch Makefile
	$(PYTHON) -m venv build/clients
	build/clients/bin/pip --disable-pip-version-check install --quiet $(TORCH) hypothesis ninja "pytest>=8,<9.2" \
	  pytest-benchmark setuptools wheel
	DS_BUILD_OPS=0 build/clients/bin/pip --disable-pip-version-check install --quiet --no-build-isolation $(TORCH) \
	  $(CLIENTS)
	rm -rf build/clients/torchvision-apart
	build/clients/bin/python -c "import torchvision" 2>/dev/null || { \
	  release=$$(build/clients/bin/pip freeze | grep '^torchvision==') \
	  && build/clients/bin/pip --disable-pip-version-check install --quiet --no-deps \
	    --target build/clients/torchvision-apart "$$release" \
	  && build/clients/bin/pip uninstall --quiet --yes torchvision; }
	@touch $@

test-clients: build/clients/.installed $(VENV)/.built ## training frameworks, each by its own loop (CLIENTS.md)
	PATH="$(CURDIR)/build/clients/bin:$$PATH" PYTHONPATH=$(CURDIR) TORCH_EXTENSIONS_DIR=$(CURDIR)/build/clients/extensions \
	  build/clients/bin/python -m pytest --benchmark-disable $(ARGS) tests/clients

lint: $(VENV)/.extra-lint ## ruff, mypy and clang-format, changing nothing
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy lookahead_fused
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_FILES)

format: $(VENV)/.extra-lint ## rewrite the sources as `make lint` wants them
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP_FILES)

BENCH := -m pytest -q -p no:cacheprovider --benchmark-quiet bench/suites/bench_suite.py

bench: $(VENV)/.extra-test $(VENV)/.extra-demo ## every benchmark on this CPU: a table, build/bench/bench.json and report.html
	@mkdir -p build/bench
	$(PY) $(BENCH) --benchmark-json=build/bench/bench.json $(ARGS)
	$(PY) -m bench.report build/bench/bench.json --html build/bench/report.html --picture $(PICTURE) \
	  --gpu $(OUT)/benchmarks.json

# The base is built without CUDA: steps on a CPU are compared.
bench-compare: $(VENV)/.built ## is this tree slower than a revision: make bench-compare BASE=main
	@test -n "$(BASE)" || { echo "name the revision to compare with: make bench-compare BASE=main"; exit 2; }
	rm -rf build/bench/base && mkdir -p build/bench/base
	git archive $(BASE) | tar -x -C build/bench/base
	cd build/bench/base && LOOKAHEAD_FUSED_CUDA=0 $(CURDIR)/$(PY) setup.py -q build_ext --inplace
	$(PY) -m lookahead_fused.bench compare build/bench/base . $(ARGS)

bench-check: $(VENV)/.extra-test ## compare with bench/suites/baseline.json (ARGS=--counts: without ratios of times)
	$(PY) -m bench.suites.gate check $(ARGS)

bench-baseline: $(VENV)/.extra-test ## renew bench/suites/baseline.json (ARGS=--counts: keep its ratios of times)
	$(PY) -m bench.suites.gate baseline $(ARGS)

bench-predict: $(VENV)/.extra-demo ## a prediction for GPUs, beside what make gpu-report measured
	$(PY) -m bench.report.predict $(OUT)/benchmarks.json

bench-cpu: $(VENV)/.built ## step times against torch's optimizers on this CPU
	$(PY) -m bench.suites.cpu $(ARGS)

wheel: $(VENV)/.tools ## a wheel in dist/, and what machine code is in it
	@start=$$(date +%s); $(if $(ARCHS),TORCH_CUDA_ARCH_LIST="$(ARCHS)") $(PIP) wheel --no-deps --wheel-dir dist . \
	  && echo "built in $$(($$(date +%s) - start)) s on $$(getconf _NPROCESSORS_ONLN) cores"
	$(PY) -m bench.gpu.cuda_code $(if $(ARCHS),--expect "$(ARCHS)") "$$(ls -t dist/*.whl | head -1)"

release-wheel: $(VENV)/.extra-release ## one wheel in dist/ for every Python found and every Linux on x86-64, checked
	$(PY) csrc/release_wheel.py $(PYTHONS)

# Where there is a GPU. Each check runs the tests that launch kernels.
SANITIZED := --backend cuda -m "not slow" -k "(test_rules or test_layout) and cuda-cuda or test_cuda_gpu and not graph"
sanitize: $(GPU_NEEDS) ## compute-sanitizer's memcheck, racecheck and initcheck over the CUDA tests
	@$(GPU_PY) -c 'import lookahead_fused as l; s = l.backends()["cuda"]; s.available or exit("nothing to check: " + s.reason)'
	$(GPU_PY) -m bench.gpu.sanitizer memcheck racecheck initcheck -- \
	  -m pytest -q -p no:cacheprovider $(SANITIZED) $(ARGS) tests

sanitize-cpu: $(VENV)/.extra-test ## the suite over a CPU module with ASan and UBSan in it (QUICK=1: a part of it)
	$(PY) tests/sanitize_cpu.py $(if $(filter-out 0,$(QUICK)),--quick) $(SHARED) $(ARGS)

gpu-report: $(GPU_NEEDS) ## all that a GPU is for, in stages, into OUT (SYSTEM=1: no environment, no network)
	@$(GPU_PY) -m bench.gpu.stages --out $(OUT) --only $(STAGE) $(if $(ON_SYSTEM),--build) -- $(ARGS)

test-versions: $(VENV)/.built ## the tests of the package, from wheels, under each of VERSIONS (QUICK=1: a part of them)
	$(PY) tests/versions.py $(if $(filter-out 0,$(QUICK)),--quick) $(if $(WHEEL),--wheel $(WHEEL)) $(VERSIONS) \
	  -- $(SHARED) --benchmark-disable $(APART:%=--ignore $(CURDIR)/tests/%) $(ARGS)

# Each beside .venv's torch, which is asked for nothing but the CPU: compiling takes no GPU.
test-tritons: $(VENV)/.extra-test ## the Triton kernels compiled, and interpreted, by each release in TRITONS
	@set -e; for release in $(TRITONS); do \
	  place=$(CURDIR)/build/tritons/$$release; \
	  rm -rf $$place; \
	  $(PIP) install --quiet --no-deps --target $$place "triton==$$release"; \
	  PYTHONPATH=$$place $(PY) -c 'import triton; print("== triton", triton.__version__)'; \
	  PYTHONPATH=$$place LOOKAHEAD_FUSED_EXPECTED_IN=$(CURDIR) $(PY) $(PYTEST) $(GROUPED) -m "not slow" $(ARGS) \
	    tests/building/test_triton_code.py $(wildcard tests/test_triton_*.py); \
	  rm -rf $$place; \
	done

clean: ## remove everything the other commands made
	rm -rf $(VENV) build dist *.egg-info .benchmarks .hypothesis
	rm -f lookahead_fused/*.so lookahead_fused/_build_info.json
	find . -type d \( -name __pycache__ -o -name '.*_cache' \) -prune -exec rm -rf {} +

# ---- the environment: each file in .venv marks a stage that is up to date --------------------------------------

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Python 3.10 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "python3 -m venv does not work here; install it (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# A stage whose file does not hold the present settings is done again.
ifneq ($(shell cat $(VENV)/.torch 2>/dev/null),$(TORCH))
.PHONY: $(VENV)/.torch
endif
$(VENV)/.torch: $(VENV)/.python
	$(PIP) install $(TORCH)
	@echo '$(TORCH)' > $@

$(VENV)/.tools: $(VENV)/.python pyproject.toml
	$(PIP) install --quiet build
	$(PY) -c 'import build; print(*build.ProjectBuilder(".").build_system_requires, sep="\n")' > $@.txt
	$(PIP) install --quiet -r $@.txt
	@touch $@

# find lists the directories too, so that a file added or removed counts as a change.
COMPILED_WITH := $(strip $(shell for compiler in c++ g++ clang++; do command -v $$compiler; done; \
  echo "$$CXX" "$$CXXFLAGS" "$$LDFLAGS" "$$LOOKAHEAD_FUSED_CPU"; \
  echo "$$CUDAFLAGS" "$$CUDAHOSTCXX" "$$NVCC_PREPEND_FLAGS" "$$NVCC_APPEND_FLAGS" "$$NVCC_CCBIN"; \
  command -v nvcc; echo "$$CUDA_HOME" "$$FORCE_CUDA" "$$LOOKAHEAD_FUSED_CUDA" "$$TORCH_CUDA_ARCH_LIST"))
ifneq ($(shell cat $(VENV)/.built 2>/dev/null),$(COMPILED_WITH))
.PHONY: $(VENV)/.built
endif
$(VENV)/.built: $(VENV)/.torch $(VENV)/.tools setup.py pyproject.toml $(shell find csrc 2>/dev/null)
	$(PIP) install --no-build-isolation --editable .
	@$(PY) -c 'import json; modules = json.load(open("lookahead_fused/_build_info.json"))["modules"].items(); \
	  print(*(name + ": " + (record["reason"] or "built") for name, record in modules), sep="\n")'
	@echo '$(COMPILED_WITH)' > $@

$(VENV)/.extra-%: pyproject.toml | $(VENV)/.built
	$(PIP) install --quiet --no-build-isolation --editable ".[$*]"
	@touch $@
