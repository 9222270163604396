# make demo: from raw text to generated text on this machine's CPU. make test: the test suite. make docs: the pages of docs/
# as a site, in site/. make faults: what can happen to a run, done to it some 2,100 times, and docs/reliability.md.
# make tpu-table: what a TPU's compiler makes of the training step, beside those of other trainers if REFERENCE, MAXTEXT and
# LEVANTER name checkouts of them, the last two with PEERS_PYTHON (docs/will-it-fit.md).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
FAULTS_ARGS ?=
REFERENCE ?=
MAXTEXT ?=
LEVANTER ?=
PEERS_PYTHON ?=
TPU_TABLE_ARGS ?=
# A file's tests share what is slow to make, so they stay together, in the order that tests/conftest.py gives.
PYTEST_ARGS ?= -n auto --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all faults check docs tpu-table install clean

demo: install
	$(BIN)/python scripts/demo.py $(DEMO_ARGS)

test: install
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-all: install
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "slow or not slow"

faults: install
	$(BIN)/python -m tests.faults --scale full --report docs/reliability.md $(FAULTS_ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

tpu-table: install
	$(BIN)/python benchmarks/tpu_table.py $(if $(REFERENCE),--reference $(REFERENCE)) $(if $(MAXTEXT),--maxtext $(MAXTEXT)) \
	  $(if $(LEVANTER),--levanter $(LEVANTER)) $(if $(PEERS_PYTHON),--peers-python $(PEERS_PYTHON)) $(TPU_TABLE_ARGS)
	$(BIN)/python benchmarks/tpu_estimates.py

install: $(VENV)/installed

# Kept as long as pyproject.toml stays the same.
$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
	  { echo "torch_xla needs Python 3.10 to 3.13, and $(PYTHON) is another; name one: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[xla,dev]'
	touch $@

$(VENV)/docs-installed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) demo site
