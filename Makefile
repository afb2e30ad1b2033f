# `make demo` and `make test` set everything up on a fresh machine: a virtual environment, the packages, then the job.
# Other builds of PyTorch: `make TORCH=torch test` (the newest, with CUDA on Linux), `make TORCH="torch==2.11.0" test`.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
OUTPUTS ?= outputs
PHOTO ?= docs/assets/parrots.jpg
PROMPT ?= a cat
WORKERS ?= 2

BIN := $(VENV)/bin
SUDO := $(shell test "$$(id -u)" = 0 || echo sudo)
# Made again when the list of dependencies changes.
INSTALLED := $(VENV)/.installed
SOURCES := $(wildcard src scripts tests benchmarks space)
SPEED := docs/results/speed

# Where the data of `make results` lies; see docs/evaluation.md.
DATA ?= data
RESULTS ?= docs/results/embedded
EVALUATE := $(BIN)/python scripts/evaluate.py
EVALUATION := scripts/configs/embedded_evaluation

.PHONY: help setup demo style quality test docs browser-test screenshots figures bench bench-gpu bench-embedded results reproduce clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 14

setup: $(INSTALLED)  ## create .venv and install the package with its development tools

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

demo: setup  ## a prompt becomes an image, a photo becomes a contact sheet (in outputs/)
	mkdir -p $(OUTPUTS)
	$(BIN)/flextok generate "$(PROMPT)" --output $(OUTPUTS)/prompt.png
	$(BIN)/flextok reconstruct $(PHOTO) --output $(OUTPUTS)/reconstruction.png

style: setup  ## put the code into the project's format
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

quality: setup  ## check lint, format and types
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

test: setup  ## run the whole test suite, in WORKERS processes of one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

docs: $(VENV)/.installed-docs  ## build the documentation site into site/, with every warning an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

browser-test: $(VENV)/.installed-browser  ## use the demo in a headless Chromium, which is installed if there is none
	$(BIN)/python -m pytest -s tests/demo

screenshots: $(VENV)/.installed-browser  ## the same, keeping images of the pages in docs/assets
	SCREENSHOTS=docs/assets $(BIN)/python -m pytest -s tests/demo/browser

figures: setup  ## draw the figures of README and documentation again, with the embedded model
	$(BIN)/python scripts/draw_figures.py

# Extras of the targets above, installed when first needed.
$(VENV)/.installed-docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	touch $@

$(VENV)/.installed-browser: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[browser]"
	command -v chromium chromium-browser google-chrome > /dev/null || \
		{ $(SUDO) apt-get update -qq && $(SUDO) apt-get install --yes -qq chromium; }
	touch $@

bench: setup  ## measure speed on a CPU into docs/results/speed: about 45 minutes on two quiet cores
	$(BIN)/python benchmarks/bench_prior.py --results $(SPEED)
	$(BIN)/python benchmarks/bench_scaling.py --results $(SPEED)
	$(BIN)/python benchmarks/bench_shortcuts.py $(if $(wildcard $(DATA)/everyday128),--data $(DATA)/everyday128) --results $(SPEED)
	$(BIN)/python benchmarks/bench_tokenizer.py --results $(SPEED)

bench-gpu: setup  ## measure speed on a GPU into docs/results/speed: 2.5 minutes
	$(BIN)/python benchmarks/bench_gpu.py --results $(SPEED)

bench-embedded: setup  ## time the embedded model, and training steps of a tokenizer; each last line is JSON
	$(BIN)/python benchmarks/bench_pipeline.py
	$(BIN)/python benchmarks/bench_training.py

results: setup  ## measure the embedded model into docs/results/embedded: about 25 minutes
	$(EVALUATE) reconstruction --config $(EVALUATION)/reconstruction.yaml --data $(DATA)/embedded128 --output $(RESULTS)
	$(EVALUATE) generation --config $(EVALUATION)/generation.yaml --data $(DATA)/everyday128 --output $(RESULTS)
	$(EVALUATE) reconstruction --config $(EVALUATION)/photos.yaml --data $(DATA)/photo_eval --output $(RESULTS)/photos
	$(EVALUATE) reconstruction --config $(EVALUATION)/caltech.yaml --data $(DATA)/caltech101_128 --output $(RESULTS)/caltech

reproduce: setup  ## run the study of docs/reproduction.md: about an hour and a half on two cores
	$(BIN)/python scripts/reproduce.py

clean:  ## remove what the targets above made
	rm -rf $(VENV) $(OUTPUTS) build dist site src/*.egg-info .pytest_cache .ruff_cache .mypy_cache
