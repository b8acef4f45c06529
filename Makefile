PYTHON ?= python
# tests are cheap each and many: processes help, threads inside of them do not
TEST_PROCESSES ?= 2

.DEFAULT_GOAL := help
.PHONY: help check lint types imports test test-quick faults same smoke bench bench-quick browser release-check house format

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  PYTHON=$(PYTHON) is used; give another one with: make check PYTHON=.venv/bin/python"

check: lint types imports test  ## everything a pull request has to pass: lint, types, imports, test

lint:  ## ruff: rules and formatting, without changing a file
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:  ## mypy --strict on the package
	$(PYTHON) -m mypy

imports:  ## import-linter: who may import whom
	$(PYTHON) -c "from importlinter.cli import lint_imports_command; lint_imports_command()"

test:  ## all tests but the long fault tests, in TEST_PROCESSES processes
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(TEST_PROCESSES) --dist loadfile -m "slow or not slow"

test-quick:  ## tests that are not slow and start no program: a minute and a half
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(TEST_PROCESSES) --dist loadfile -m "not slow and not program and not browser"

faults:  ## test the fault table of docs/unattended.md: kills, full disks, lost connections, no memory; 16 minutes on 2 cores
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(TEST_PROCESSES) --dist load -m faults

same:  ## make same COMMIT=main: train with that commit and with this tree, and compare every number bit for bit
	@test -n "$(COMMIT)" || (echo "say what to compare with: make same COMMIT=main" && exit 2)
	OMP_NUM_THREADS=1 $(PYTHON) -m tests.same $(COMMIT)

smoke:  ## the main command of the README, cut to a few steps, into a temporary folder
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	$(PYTHON) -m accelerate.commands.launch recipes/train_ham.py --output_dir "$$folder/ham" \
		--max_steps 4 --mining_start_epoch 0 --limit_train_examples 256 --limit_test_examples 100 && \
	ls "$$folder/ham"

bench:  ## ratios of our steps to published code and to the floor, evaluation and memory; about 10 minutes on 2 cores
	$(PYTHON) -m tests.benchmarks.step --repeats 3 --hard_fractions 0.5 1.0
	$(PYTHON) -m tests.benchmarks.evaluation --repeats 3
	$(PYTHON) -m tests.benchmarks.memory --repeats 3

bench-quick:  ## the same with a tiny network, to see that the benchmarks run; the figures mean nothing
	$(PYTHON) -m tests.benchmarks.step --quick
	$(PYTHON) -m tests.benchmarks.evaluation --quick
	$(PYTHON) -m tests.benchmarks.memory --quick
	$(PYTHON) -m tests.benchmarks.profile --quick
	$(PYTHON) -m tests.benchmarks.epoch --quick
	$(PYTHON) -m tests.benchmarks.scaling --quick

browser:  ## report.html and leaderboard.html in a headless Chromium; skips aloud where there is none
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m browser tests

release-check:  ## all of a release but the upload: build, check, install without the checkout, every command once
	$(PYTHON) -m tests.release_check

house:  ## size and shape of the package and its tests: lines, modules, long functions, repeats; tests/test_house.py holds the limits
	$(PYTHON) -m tests.house

format:  ## let ruff rewrite what it can
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
