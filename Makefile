# Every target sets up what it needs; `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS ?= 2

.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sort | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "stillframe needs Python 3.11 or newer; set PYTHON=python3.x" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

setup: $(STAMP) ## a virtual environment in .venv with stillframe in it

demo: $(STAMP) ## the main job, end to end: a guest saved, wrecked and brought back
	$(BIN)/stillframe demo

peers: $(STAMP) ## what the tests compare with: Debian's QEMU 7.2 and 10.0, a Linux guest, the cross compiler, libvirt
	scripts/peers

test: $(STAMP) peers ## every test; without the peers, those that need them are skipped by name
	$(BIN)/pytest -n $(JOBS) --dist loadgroup $(PYTEST_ARGS)

conformance: $(STAMP) peers ## recorded dialogues with QEMU 10.0, held again with stillframe-qemu
	$(BIN)/pytest -q -rP tests/conformance

hunt: $(STAMP) peers ## long random runs beside qemu-img and QEMU, ours and theirs in turn; SEED=N repeats one
	@seed=$${SEED:-$$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')}; echo "seed $$seed: make hunt SEED=$$seed repeats it"; \
	SEED=$$seed STILLFRAME_LONG=1 $(BIN)/pytest -n $(JOBS) --hypothesis-seed=$$seed tests/qcow2/test_qcow2_sequences.py tests/qcow2/test_qcow2_mirror.py tests/conformance/test_invented.py

lint: $(STAMP) ## ruff's format and lint, mypy --strict
	$(BIN)/ruff format --check src tests bench
	$(BIN)/ruff check src tests bench
	$(BIN)/mypy

format: $(STAMP) ## put the sources into ruff's format
	$(BIN)/ruff format src tests bench
	$(BIN)/ruff check --fix src tests bench

guest: ## rebuild the bundled guest, byte for byte (compiler: guest/TOOLCHAIN)
	$(MAKE) -C guest

wheel: $(STAMP) ## build the wheel into dist/
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist .

wheel-demo: wheel ## run the demo from the wheel alone, in an empty environment
	scripts/wheel-demo dist/*.whl

crash: $(STAMP) peers ## more than 50,000 different states in which a crash can leave an image, each opened, checked and compared
	mkdir -p build/crash
	PYTHONPATH=tests $(BIN)/python -m qcow2.crash_run --states 90000 --jobs $(JOBS) --folder build/crash $(CRASH_ARGS)
	STILLFRAME_LONG=1 $(BIN)/pytest -q -n $(JOBS) tests/snapshots/test_group_crashes.py tests/snapshots/test_live_crashes.py

stress: $(STAMP) peers ## snapshots of a guest that never rests, two minutes, then a busy machine killed over and over, ten; STRESS_ARGS="--minutes N --rounds N --seed N"
	$(BIN)/python tests/storm.py
	$(BIN)/python tests/stress.py $(STRESS_ARGS)

kill: $(STAMP) peers ## a QEMU that runs a guest, and the stillframe before it, killed at every step of saves and loads, and over and over under load
	STILLFRAME_LONG=1 STILLFRAME_ADOPT_ROUNDS=30 $(BIN)/pytest -q -n $(JOBS) --dist loadgroup --timeout 0 tests/qemu/test_failures.py tests/qemu/test_adopt.py

kvm: $(STAMP) peers ## the tests of a QEMU as the engine, with KVM; where it cannot be used they are skipped, with the reason
	STILLFRAME_ACCEL=kvm $(BIN)/pytest -rs -n $(JOBS) --dist loadgroup tests/qemu

bench: $(STAMP) peers ## figures beside a peer's in the same run
	mkdir -p build/bench
	$(BIN)/python bench/startup.py --json build/bench/startup.json
	$(BIN)/python bench/qcow2.py --json build/bench/qcow2.json
	$(BIN)/python bench/nbd.py --json build/bench/nbd.json
	$(BIN)/python bench/monitor.py --json build/bench/monitor.json
	$(BIN)/python bench/snapshots.py --json build/bench/snapshots.json
	$(BIN)/python bench/plot.py build/bench/snapshots.json build/bench/snapshots.svg
	$(BIN)/python bench/qemu.py --json build/bench/qemu.json
	$(BIN)/python bench/engine.py --json build/bench/engine.json $(BENCH_ARGS)

FUZZ_SECONDS ?= 600
FUZZ_TARGETS ?= look check write repair stream lineage names monitor

.PHONY: fuzz
fuzz: $(STAMP) ## atheris on everything that reads what others wrote, FUZZ_SECONDS for each of FUZZ_TARGETS
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[fuzz]'
	for target in $(FUZZ_TARGETS); do $(BIN)/python tests/fuzzing/run.py $$target --seconds $(FUZZ_SECONDS) || exit 1; done

clean: ## remove what the targets made, not what they fetched
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove what was fetched, too
	rm -rf .cache

.PHONY: help setup demo peers test conformance hunt lint format guest wheel wheel-demo crash stress kill kvm bench clean distclean
