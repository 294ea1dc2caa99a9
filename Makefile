# Every target makes the virtual environment it needs, from pyproject.toml alone.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo test check bench faults clean
.DELETE_ON_ERROR:

$(VENV)/.demo: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "apecache needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cpu,demo]'
	touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/apecache demo --out demo --overwrite

test: $(VENV)/.dev
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy apecache cli
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.speed.startup --quick
	$(BIN)/python -m benchmarks.speed.store --quick
	$(BIN)/python -m benchmarks.speed.commits --quick
	$(BIN)/python -m benchmarks.speed.search --quick
	$(BIN)/python -m benchmarks.speed.extract --quick
	$(BIN)/python -m benchmarks.speed.losses --quick
	$(BIN)/python -m benchmarks.speed.fit --quick
	$(BIN)/python -m benchmarks.speed.sweep --quick
	$(BIN)/python -m benchmarks.quality.flickr8k --quick
	$(BIN)/python -m benchmarks.quality.heads --quick
	$(BIN)/python -m benchmarks.quality.scout --quick
	$(BIN)/python -m benchmarks.quality.recipes --quick
	$(BIN)/python -m benchmarks.quality.storage --quick
	$(BIN)/python -m benchmarks.quality.sweep --quick
	$(BIN)/python -m benchmarks.speed.engines --quick
	$(BIN)/python -m benchmarks.laws.render
	$(BIN)/python -m benchmarks.reliability.faults --quick
	$(BIN)/python -m benchmarks.reliability.cluster --quick
	$(BIN)/python -m benchmarks.reliability.engines --quick

faults: $(VENV)/.dev
	$(BIN)/python -m benchmarks.reliability.faults
	$(BIN)/python -m benchmarks.reliability.cluster

clean:
	rm -rf $(VENV) demo build dist *.egg-info
