# `make demo` and `make test` set everything up themselves; the second time they start at once.
PYTHON ?= python3
VENV   ?= .venv
PIP    := $(VENV)/bin/python -m pip --disable-pip-version-check
# Two threads: the demo's model is small, and more threads only wait for each other. Tests run one a core, up to four.
OMP_NUM_THREADS ?= 2
test: OMP_NUM_THREADS = 1
export OMP_NUM_THREADS
# Waiting threads sleep instead of spinning on cores that others need.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test lint docs clients clean help

help:
	@echo "make demo   install what the demo needs and run it (no GPU, no network after installation)"
	@echo "make test   install what the tests need and run all of them; one folder: make test T=tests/config"
	@echo "make lint   ruff check and format check"
	@echo "make clients  load exports in every program, vLLM and llama-cpp-python included: installs 5 GB, takes up to an hour"
	@echo "make docs   write the generated pages again (docs/recipe.md, docs/scale.md)"
	@echo "make clean  remove $(VENV) and what tools left behind"

demo: $(VENV)/.demo-installed
	$(VENV)/bin/ossia demo
	@echo "The command itself: source $(VENV)/bin/activate"

test: $(VENV)/.dev-installed
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(T)

lint: $(VENV)/.dev-installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

clients: $(VENV)/.dev-installed
	$(VENV)/bin/python -m benchmarks.clients

docs: $(VENV)/.dev-installed
	$(VENV)/bin/ossia explain --markdown > docs/recipe.md
	$(VENV)/bin/python -m benchmarks.scale

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Ossia needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version). Name another: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.dev-installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet -c constraints.txt -e '.[dev,dev-gpu]'
	@touch $@ $(VENV)/.demo-installed

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
