# A fresh machine needs Python 3.11 or later and make; everything else is installed into virtual environments here.

PYTHON ?= python3
PIP = -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Asked for by its exact version, pip also finds a torch that lies on the machine's disk.
TORCH = $(shell grep -E '^torch(vision)?==' constraints.txt)
HOST ?= $(or $(VULTUS_HOST),127.0.0.1)
PORT ?= $(or $(VULTUS_PORT),8000)

.PHONY: run test check format clean

run:
	@echo "Vultus: http://$(HOST):$(PORT)/docs will answer as soon as this says ready (the first start installs packages)."
	@$(MAKE) --no-print-directory .venv/run.done
	@VULTUS_HOST=$(HOST) VULTUS_PORT=$(PORT) .venv/run/bin/vultus serve

test: .venv/test.done
	.venv/test/bin/python -m pytest $(ARGS)

check: .venv/test.done
	.venv/test/bin/ruff format --check .
	.venv/test/bin/ruff check .
	.venv/test/bin/mypy
	.venv/test/bin/python -m pytest -q tests/test_layers.py tests/test_docs.py

format: .venv/test.done
	.venv/test/bin/ruff check --fix .
	.venv/test/bin/ruff format .

# The serving environment has no torch, and nothing of training/ is needed to run it.
.venv/run.done: pyproject.toml constraints.txt
	@$(PYTHON) -m venv .venv/run
	@.venv/run/bin/python $(PIP) -e '.[pictures]'
	@touch $@

.venv/test.done: pyproject.toml constraints.txt
	@$(PYTHON) -m venv .venv/test
	@.venv/test/bin/python $(PIP) $(TORCH)
	@.venv/test/bin/python $(PIP) -e '.[test,check]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
