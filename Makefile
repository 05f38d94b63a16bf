# Every target makes and re-uses .venv; it is installed again only when pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ROOMS := parallelism checkpoint fault runtime launcher
# processes that share the tests: one has those of whole jobs, which mostly wait
WORKERS ?= 2
# more of its options
PYTEST ?=
BROWSER := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# every test and job starts processes: with modules that are compiled already
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo test check format gpu docs docs-serve picture pictures parity faults soak soak-planner soak-saving bench $(addprefix bench-,$(ROOMS)) $(addprefix test-,$(ROOMS)) clean

help:  ## list the targets
	@grep -hE '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 24

$(INSTALLED): pyproject.toml constraints.txt
	@start=$$(date +%s) && \
	{ test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); } && \
	echo "installing into $(VENV) (once; it is used again while pyproject.toml and constraints.txt stay the same)" && \
	$(BIN)/python -m pip install --quiet "$$(grep -E '^torch==' constraints.txt)" && \
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]" && \
	$(BIN)/python -m evermesh.parallelism.planner && \
	$(BIN)/python -m evermesh.fault.recorder.native && \
	$(BIN)/python -m evermesh.fault.detectors && \
	echo "installed in $$(( $$(date +%s) - start )) s" && touch $@

install: $(INSTALLED)  ## make the environment

demo: $(INSTALLED)  ## the main job: train, save, stop, resume on another number of workers
	$(BIN)/evermesh demo

test: $(INSTALLED)  ## all tests; those of the dashboard need Chromium, those of Slurm its daemons, those of numbers Prometheus (Debian: chromium; slurmctld slurmd slurm-client munge; prometheus)
	@test -n "$(BROWSER)" || echo "no Chromium: the tests of the dashboard are skipped. To run them: apt-get install chromium"
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST)

$(addprefix test-,$(ROOMS)): test-%: $(INSTALLED)  ## tests of one room: test-parallelism, test-checkpoint, ...
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile tests/$*

check: $(INSTALLED)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p evermesh
	$(BIN)/mypy tests docs/site

format: $(INSTALLED)  ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpu: $(INSTALLED)  ## the checks that only a GPU can make; skips aloud without one
	$(BIN)/python -m pytest tests/gpu -m gpu -rs

docs: $(INSTALLED)  ## the documentation as a site in build/site, with references and pictures from the code
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "open build/site/index.html"

docs-serve: $(INSTALLED)  ## the same at http://127.0.0.1:8000, built again when a page changes
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve --dev-addr 127.0.0.1:8000

picture: $(INSTALLED)  ## docs/images/dashboard.png, by Chromium
	$(BIN)/python -m tests.launcher.dashboard.picture docs/images/dashboard.png

pictures: $(INSTALLED)  ## the pictures that the documentation draws from the code, in build/pictures, to look at
	$(BIN)/python -m docs.site.pictures build/pictures

parity: $(INSTALLED)  ## gradients on every layout against one process; takes minutes
	$(BIN)/python -m pytest tests/runtime tests/parallelism tests/checkpoint tests/fault tests/launcher tests/deploy -m parity

faults: $(INSTALLED)  ## every kind of fault in real jobs of 2, 4 and 8 processes, and what torch says; FAULT_SEEDS=n of each, a quarter of an hour a seed, more on a busy machine; root, for networks
	$(BIN)/python -m tests.fault.suite --seeds $(or $(FAULT_SEEDS),1)
	$(BIN)/python -m tests.fault.suite.stock

soak: $(INSTALLED)  ## long runs: 200 restarts in a row, a clock that jumps, killed copies (KILLS=1000), flipped bits (FLIPS), 30 random faults (FAULTS=300 SEED=1)
	$(BIN)/python -m pytest tests/launcher tests/fault -m soak -s

soak-planner: $(INSTALLED)  ## a million random plans, each proved, in two processes; takes hours (PLANS=20000: minutes)
	$(BIN)/python -m pytest tests/parallelism/test_soak_planner.py -m soak -s

soak-saving: $(INSTALLED)  ## killed writers, random sequences of saves, damage, mutated files; takes an hour (POINTS, DAMAGES, MUTATIONS: how many)
	$(BIN)/python -m pytest tests/checkpoint -m soak

bench: $(INSTALLED)  ## all benchmarks; writes build/bench/NAME.json
	$(BIN)/python -m tests.benchmarks

$(addprefix bench-,$(ROOMS)): bench-%: $(INSTALLED)  ## benchmarks of one room
	$(BIN)/python -m tests.benchmarks $*

clean:  ## remove what was built
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
