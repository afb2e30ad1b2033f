# `make demo` and `make test` work on a fresh machine: they create a virtual environment, install packages, then run.
# Other builds of PyTorch: `make TORCH=torch test` (the newest, with CUDA on Linux), `make TORCH="torch==2.11.0" test`.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
OUTPUTS ?= outputs
PHOTO ?= docs/assets/parrots.jpg
PROMPT ?= a cat
WORKERS ?= 2
N ?= 5000
SEED ?= 0

BIN := $(VENV)/bin
# Modules are compiled when they are first imported: most never are.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
SUDO := $(shell test "$$(id -u)" = 0 || echo sudo)
# Rebuilt when the list of dependencies changes.
INSTALLED := $(VENV)/.installed
SOURCES := $(wildcard src scripts tests benchmarks space)
SPEED := docs/results/speed

# Location of the data for `make results`; see docs/evaluation.md.
DATA ?= data
RESULTS ?= docs/results/embedded
EVALUATE := $(BIN)/python scripts/evaluate.py
EVALUATION := scripts/configs/embedded_evaluation

.PHONY: help setup demo style quality test peer-tests fuzz docs browser-test screenshots figures bench bench-gpu bench-embedded results reproduce clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 14

setup: $(INSTALLED)  ## create .venv and install the package with its development tools

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) "$(TORCH)"
	$(INSTALL) --editable ".[dev]"
	touch $@

demo: setup  ## generate an image from a prompt, reconstruct a photo (into outputs/)
	mkdir -p $(OUTPUTS)
	$(BIN)/flextok generate "$(PROMPT)" --output $(OUTPUTS)/prompt.png
	$(BIN)/flextok reconstruct $(PHOTO) --output $(OUTPUTS)/reconstruction.png

style: setup  ## fix lint and format the code
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

quality: setup  ## check lint, format and types
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

test: setup  ## run the whole test suite, in WORKERS processes of one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

peer-tests: $(VENV)/.installed-peer  ## run the model tests of the installed Transformers on our classes
	$(BIN)/python scripts/peer_tests.py --workers $(WORKERS)

fuzz: setup  ## try N hostile inputs at each door: public calls, saved folders, image files
	PYTHONPATH=tests $(BIN)/python tests/fuzz/doors.py --inputs $(N) --seed $(SEED)

docs: $(VENV)/.installed-docs  ## build the documentation site into site/; every warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

browser-test: $(VENV)/.installed-browser  ## test the demo in headless Chromium, installing it if needed
	$(BIN)/python -m pytest -s tests/demo

screenshots: $(VENV)/.installed-browser  ## the same, saving screenshots to docs/assets
	SCREENSHOTS=docs/assets $(BIN)/python -m pytest -s tests/demo/browser

figures: setup  ## regenerate the figures of README and docs with the embedded model
	$(BIN)/python scripts/draw_figures.py

# Extras for the targets above, installed on first use.
$(VENV)/.installed-peer: $(INSTALLED)
	$(INSTALL) --editable ".[peer]"
	touch $@

$(VENV)/.installed-docs: $(INSTALLED)
	$(INSTALL) --editable ".[docs]"
	touch $@

$(VENV)/.installed-browser: $(INSTALLED)
	$(INSTALL) --editable ".[browser]"
	command -v chromium chromium-browser google-chrome > /dev/null || \
		{ $(SUDO) apt-get update -qq && $(SUDO) apt-get install --yes -qq chromium; }
	touch $@

bench: setup  ## CPU benchmarks into docs/results/speed: about 45 minutes on two idle cores
	$(BIN)/python benchmarks/bench_prior.py --results $(SPEED)
	$(BIN)/python benchmarks/bench_scaling.py --results $(SPEED)
	$(BIN)/python benchmarks/bench_shortcuts.py $(if $(wildcard $(DATA)/everyday128),--data $(DATA)/everyday128) --results $(SPEED)
	$(BIN)/python benchmarks/bench_tokenizer.py --results $(SPEED)

bench-gpu: setup  ## GPU benchmarks into docs/results/speed: 2.5 minutes
	$(BIN)/python benchmarks/bench_gpu.py --results $(SPEED)

bench-embedded: setup  ## time the embedded model and tokenizer training steps; the last lines are JSON
	$(BIN)/python benchmarks/bench_pipeline.py
	$(BIN)/python benchmarks/bench_training.py

results: setup  ## evaluate the embedded model into docs/results/embedded: about 25 minutes
	$(EVALUATE) reconstruction --config $(EVALUATION)/reconstruction.yaml --data $(DATA)/embedded128 --output $(RESULTS)
	$(EVALUATE) generation --config $(EVALUATION)/generation.yaml --data $(DATA)/everyday128 --output $(RESULTS)
	$(EVALUATE) reconstruction --config $(EVALUATION)/photos.yaml --data $(DATA)/photo_eval --output $(RESULTS)/photos
	$(EVALUATE) reconstruction --config $(EVALUATION)/caltech.yaml --data $(DATA)/caltech101_128 --output $(RESULTS)/caltech

reproduce: setup  ## run the study of docs/reproduction.md: about 90 minutes on two cores
	$(BIN)/python scripts/reproduce.py

clean:  ## remove everything the targets above created
	rm -rf $(VENV) $(OUTPUTS) build dist site src/*.egg-info .pytest_cache .ruff_cache .mypy_cache
