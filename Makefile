# make demo    a synthetic cohort from the embedded simulated one (15 to 30 minutes on 2 cores, more on old ones)
# make test    the tests (half an hour or more on 2 cores); make test-slow those that kill, preempt, distil, or start a Slurm
# make bench   our way beside that of MONAI's tutorials, what planning 100,000 subjects takes, and docs/benchmarks.md (half an hour on 2 quiet cores)
# make scale   a cohort of many small images through the workflow, at two sizes (SCALE="10000 100000" by default: hours; SCALE=1000 for a try)
# make docs    the pages of docs/ as a site in build/site, which opens without a server or a network
# make env     only the environment in .venv, which all of these create first, with nothing but Python 3.11 and make
SHELL := bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CORES ?= $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || sysctl -n hw.ncpu)

.PHONY: help env demo test test-slow docs bench bench-gpu scale check format lock clean

# The lock is complete, so pip need not resolve anything (--no-deps). torch comes first, with its own dependencies: a
# CPU wheel that lies on the machine (PIP_FIND_LINKS) has none, the registry's brings CUDA.
$(VENV)/.ready: envs/requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; found = sys.version.split()[0]; \
	sys.version_info >= (3, 11) or sys.exit(f"$(PYTHON) is Python {found}, expected 3.11 or newer: make PYTHON=python3.11 ...")'
	@echo "Creating the environment in $(VENV): downloads about 0.7 GB, takes 2.1 GB of disk (with CUDA, which PyPI adds"
	@echo "on Linux, some GB more of both; a CPU wheel of torch in PIP_FIND_LINKS avoids that), and a few minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(PIP) $$(grep '^torch==' envs/requirements.lock)
	$(PIP) --no-deps -r envs/requirements.lock
	$(PIP) --no-deps --editable .
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready envs/requirements-test.lock
	$(PIP) --no-deps -r envs/requirements-test.lock
	@touch $@

env: $(VENV)/.ready

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# Jobs of one thread, two beside each other: for images and batches this small a second thread gains a tenth at most, and
# half of many jobs is starting Python and loading libraries.
ONE_THREAD := autoencoder=1 embedder=1 decoder=1 diffusion=1 latents=1 scale=1 tone=1 generate=1 calibrate=1 showcase=1 evaluate=1 privacy=1 downstream_data=1 downstream_train=1 downstream_test=1

demo: $(VENV)/.ready
	$(BIN)/meddiff run config/config.yaml --cores $(CORES) -- --set-threads $(ONE_THREAD)
	@echo
	@echo "The demo is complete. Look at:"
	@echo "  results/demo/report.html          real beside synthetic, measured figures"
	@echo "  results/demo/contact-sheet.png    the same images as one picture"
	@echo "  results/demo/release/             the synthetic cohort, a BIDS dataset"

# One process per core, each with one thread; the longest files, which run the workflow, begin first.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(CORES) --dist loadfile --no-loadscope-reorder

test: $(VENV)/.ready-test
	$(PYTEST) -m "not slow" tests/test_end_to_end.py tests

test-slow: $(VENV)/.ready-test
	$(PYTEST) -m slow tests/test_chaos.py tests/test_end_to_end.py tests/test_slurm.py tests

docs: $(VENV)/.ready-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "The site is complete: build/site/index.html"

# What is measured alone: make bench NAMES="diffusion loader". Results stay in benchmarks/results, one file per
# comparison.
bench: $(VENV)/.ready-test
	$(BIN)/python -m benchmarks run $(NAMES)
	$(BIN)/python -m benchmarks render
	$(BIN)/python benchmarks/dry_run.py

SCALE ?= 10000 100000

scale: $(VENV)/.ready-test
	$(BIN)/python benchmarks/scale.py $(SCALE) --cores $(CORES)

check: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/mypy
	$(BIN)/snakemake --lint

format: $(VENV)/.ready-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile rules

# Pins the newest versions that pyproject.toml allows, in a throw-away environment.
lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet $$(grep '^torch==' envs/requirements.lock) -e .
	build/lock/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > build/run.txt
	build/lock/bin/python -m pip install --quiet -e .[test]
	build/lock/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > build/all.txt
	(sed -n '/^#/p' envs/requirements.lock; cat build/run.txt) > build/lock.txt && mv build/lock.txt envs/requirements.lock
	(sed -n '/^#/p' envs/requirements-test.lock; comm -13 <(sort build/run.txt) <(sort build/all.txt)) > build/lock.txt && mv build/lock.txt envs/requirements-test.lock
	rm -rf build

# Needs no environment but a Python with torch and a GPU: what else is missing goes into build/gpu, from a registry or
# the folder WHEELS.
OUT ?= results/bench-gpu
MINUTES ?= 9
# Parts that are measured alone, with all of the time: make bench-gpu ONLY="ukb sampling,start"
ONLY ?=
bench-gpu:
	@$(PYTHON) -c "import torch; torch.cuda.is_available() or exit('No GPU is visible to $(PYTHON); see docs/gpu.md')"
	@mkdir -p build/gpu
	@needed="$$(PYTHONPATH=build/gpu $(PYTHON) benchmarks/gpu_packages.py)"; test -z "$$needed" || \
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --target build/gpu $(if $(WHEELS),--no-index --find-links $(WHEELS)) $$needed
	PYTHONPATH=build/gpu:. TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/compiled $(PYTHON) -m benchmarks.gpu --minutes $(MINUTES) --out $(OUT) --only "$(ONLY)"

clean:
	rm -rf $(VENV) build results .snakemake
