# `make` lists the targets. Only Python 3.10-3.12, make and git must be installed beforehand.
.DEFAULT_GOAL := help
# without stored bytecode each process compiles torch anew, which takes 15 seconds
unexport PYTHONDONTWRITEBYTECODE
.PHONY: help setup demo test bench scale soak gpu lab report doors notebooks readme site site-test clean

PYTHONS  ?= python3 python3.12 python3.11 python3.10
VENV     := .venv
BIN      := $(VENV)/bin
READY    := $(VENV)/.installed
CORES    := $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
WORKERS  ?= $(shell echo $$(($(CORES) < 4 ? $(CORES) : 4)))
THREADS  ?= $(shell echo $$(($(CORES) / $(WORKERS) > 1 ? $(CORES) / $(WORKERS) : 1)))
# for the notebooks' own tests, in case one hangs. All tests together take about 10 minutes on two idle cores
LIMIT    := $(shell command -v timeout >/dev/null 2>&1 && echo timeout 1500)
ARTEFACT ?= tab1_adcorda
PRESET   ?= small
ARGS     ?=
GPU      ?=
OUT      ?= out.ipynb
STORE    ?=

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv with the package and its tools; the other targets do this themselves

$(READY): settings.ini setup.py
	@for p in $(PYTHONS); do \
	  if $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then echo "set-up with $$($$p --version)"; exec $$p -m venv $(VENV); fi; \
	done; echo "refine_nb needs Python 3.10 or newer, and none of these is: $(PYTHONS). Install one, or name one: make PYTHONS=/path/to/python3.11" >&2; exit 1
	@if $(BIN)/python -m pip install -q uv && $(BIN)/uv pip install -q --python $(BIN)/python -e '.[dev]'; then :; \
	else echo 'uv could not install: trying pip, which takes longer'; $(BIN)/python -m pip install -q -e '.[dev]'; fi
	@$(BIN)/python -m pip install -q --no-deps torchattacks==3.5.1 # used in tests only, as a reference: its metadata pins a very old requests
	@$(BIN)/python -m pip install -q --no-deps imagecorruptions==1.1.2 || echo 'imagecorruptions could not be installed: tables of corruptions leave out frost, which needs its photographs'
	@touch $@

demo: $(READY) ## Table 1 of AdCorDA on 8x8 digits, in about a minute on a CPU, after the set-up: out.ipynb
	$(BIN)/papermill nbs/tab1_adcorda.ipynb out.ipynb -p model resnet34

test: $(READY) ## every test: the notebooks' own, then tests/; GPU=0 lets them see the first GPU, STORE=... reuses what demos made before
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && \
	REFINE_HOME="$(or $(STORE),$$scratch/home)" REFINE_REPORTS="$$scratch/reports" REFINE_PRESET=demo REFINE_PRECISION= REFINE_LAYOUT= CUDA_VISIBLE_DEVICES=$(GPU) OMP_NUM_THREADS=$(THREADS) \
	  $(LIMIT) $(BIN)/nbdev_test --n_workers $(WORKERS) --do_print --timing
	CUDA_VISIBLE_DEVICES=$(GPU) $(BIN)/python -m pytest tests -rs --timeout 600 -n $(WORKERS)

bench: $(READY) ## our speed beside that of other code bases, into reports/bench/; ARGS=--quick takes a few minutes, ARGS="--rows pgd_foolbox" runs one row
	$(BIN)/python tools/bench.py $(ARGS)

scale: $(READY) ## how the plan of all artefacts scales to 64 GPUs, simulated from this machine's prices, into reports/scale/
	$(BIN)/python tools/scale.py $(ARGS)

soak: $(READY) ## what a store survives: killed processes, damaged files, full disks; into reports/reliability/; ARGS="--kills 100 --damages 300"
	$(BIN)/python tools/soak.py $(ARGS)

gpu: ## everything worth running while a GPU is at hand, without .venv: ARGS="--budget 25m --data DATA.tar --out FOLDER"
	@p=$(BIN)/python; test -x $$p || p=python3; exec $$p tools/gpu.py $(ARGS)

lab: $(READY) ## Jupyter Lab on the notebooks
	$(BIN)/jupyter lab --notebook-dir nbs

report: $(READY) ## one artefact into reports/: ARTEFACT=tab1_adcorda PRESET=small ARGS="-p model resnet18 -p dataset cifar10_resplit"
	@test -f nbs/$(ARTEFACT).ipynb || { echo "there is no nbs/$(ARTEFACT).ipynb: choose one of $(basename $(notdir $(wildcard nbs/tab*.ipynb nbs/fig*.ipynb)))" >&2; exit 1; }
	$(BIN)/papermill nbs/$(ARTEFACT).ipynb $(OUT) -p preset $(PRESET) $(ARGS)

doors: $(READY) ## the rooms' front doors from their notebooks, then the package
	$(BIN)/python tools/doors.py
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

notebooks: doors ## run every notebook in place (demo), then the package, the README and clean notebooks from them
	$(BIN)/python tools/run_notebooks.py
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tools/readme.py

readme: $(READY) ## README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

site: $(READY) ## build the site from the stored notebooks and reports: _docs/html/index.html; needs no network
	$(BIN)/python docs/build.py

site-test: site ## test the site in Chromium, if installed: links, search, numbers, a narrow screen, contrast
	REFINE_SITE=_docs/html $(BIN)/python -m pytest tests/test_site.py -rs --timeout 600

clean: ## remove .venv, caches and out.ipynb; the results in REFINE_HOME are kept
	rm -rf $(VENV) build dist *.egg-info .pytest_cache _proc _docs out.ipynb
	find . -name __pycache__ -prune -exec rm -rf {} + -o -name .ipynb_checkpoints -prune -exec rm -rf {} + -o -name .last_checked -exec rm -f {} +
