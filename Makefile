# make quickstart | audit | demo | compare | test | style. The first call of any makes .venv and installs the package into it.
PYTHON ?= python3
BIN := .venv/bin
QUICKSTART := outputs/quickstart

.PHONY: quickstart audit demo compare test style
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

compare: .venv/installed
	$(BIN)/python train_hf.py recipes/quickstart.yaml --compare cot,no_cot,no_thoughts,pause,coconut --output_dir $(QUICKSTART)-compare

test: .venv/installed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

style: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	-$(BIN)/mlinter --no-cache --no-progress --enable-all-trf-rules *_mmcoconut.py
