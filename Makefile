# make quickstart | audit | demo | screenshots | compare | test | test-slow | test-releases | edge | style
# The first call of any makes .venv and installs the package into it.
PYTHON ?= python3
BIN := .venv/bin
QUICKSTART := outputs/quickstart

# The oldest and the newest transformers that setup.cfg admits, less the pin, on which `make test` runs everything.
PIN := $(shell sed -n 's/^transformers==//p' constraints.txt)
RELEASES := $(filter-out $(PIN),5.18.0 5.24.0)
CORE_TESTS := $(addprefix tests/test_,compat.py latent.py modeling.py generation.py processing.py configuration.py \
	remote_code.py versions.py)
PYTEST_OPTIONS := -n auto --maxprocesses 4 --dist worksteal

.PHONY: quickstart audit demo screenshots compare test test-slow releases test-releases edge style
.NOTPARALLEL:

.venv/installed: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q torch -c constraints.txt
	$(BIN)/python -m pip install -q -e ".[test]" -c constraints.txt
	touch $@

quickstart: .venv/installed
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --num_cpu_threads_per_process 2 --mixed_precision no --dynamo_backend no \
		train_hf.py recipes/quickstart.yaml --output_dir $(QUICKSTART) --overwrite true
	cd / && $(abspath $(BIN))/python $(abspath examples/answer_mazes.py) $(abspath $(QUICKSTART))

audit: .venv/installed
	$(BIN)/python -m mmcoconut.audit --model $(QUICKSTART) --output_dir $(QUICKSTART)-audit --overwrite true

demo: .venv/installed
	$(BIN)/python -m mmcoconut.demo --model $(QUICKSTART)

screenshots: .venv/installed
	$(BIN)/python examples/screenshot_demo.py $(QUICKSTART) docs/demo.png --example 3

compare: .venv/installed
	$(BIN)/python train_hf.py recipes/quickstart.yaml --compare cot,no_cot,no_thoughts,pause,coconut --output_dir $(QUICKSTART)-compare

test: .venv/installed
	$(BIN)/python -m pytest $(PYTEST_OPTIONS)

# Tests that take longer than ten seconds or so, or several processes: with `make test` the whole suite.
test-slow: .venv/installed
	$(BIN)/python -m pytest $(PYTEST_OPTIONS) -m slow

# Beside the pin and without it: each release of transformers in a folder of its own, moved there when it is whole.
.releases/%: | .venv/installed
	rm -rf $@.part && mkdir -p .releases
	$(BIN)/python -m pip install -q --no-deps --retries 10 --target $@.part transformers==$*
	mv $@.part $@

releases: $(addprefix .releases/,$(RELEASES))

test-releases: releases
	for release in $(RELEASES); do \
		echo "transformers $$release" && PYTHONPATH=.releases/$$release $(BIN)/python -m pytest $(PYTEST_OPTIONS) -m "" $(CORE_TESTS) || exit 1; \
	done
	$(BIN)/python -m pytest $(PYTEST_OPTIONS) tests/test_releases.py

# The newest release of everything but torch, whose pin stays: an open range takes a build of several gigabytes.
edge:
	test -x .venv-edge/bin/python || $(PYTHON) -m venv .venv-edge
	grep '^torch==' constraints.txt > .venv-edge/torch.txt
	.venv-edge/bin/python -m pip install -q --upgrade --upgrade-strategy eager -c .venv-edge/torch.txt torch -e ".[test]"
	.venv-edge/bin/python -m pip list | grep -E '^(torch|transformers|trl|peft|accelerate|datasets|tokenizers|huggingface_hub) '
	.venv-edge/bin/python -m pytest $(PYTEST_OPTIONS) $(CORE_TESTS)

style: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	-$(BIN)/mlinter --no-cache --no-progress --enable-all-trf-rules *_mmcoconut.py
