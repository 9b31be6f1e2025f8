# hwnas: every target sets up what it needs.
PYTHON ?= python3
DEVICE ?= cpu
BIN := .venv/bin
ifeq ($(DEVICE),gpu)
EXTRAS ?= dev,gpu
CONSTRAINTS := constraints-gpu.txt
else
EXTRAS ?= dev
CONSTRAINTS := constraints.txt
endif
comma := ,
STAMP := .venv/.installed-$(DEVICE)-$(subst $(comma),-,$(EXTRAS))

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu check bench bench-check claims profile clean

help: ## this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	@touch $@

setup: $(STAMP) ## make .venv and install hwnas with the tested versions: DEVICE=cpu|gpu

demo: $(STAMP) ## from nothing to a measured model under a limit on this CPU
	$(BIN)/hwnas search --data digits --limit-fraction 0.5 --tables demo/tables --run demo/run

test: $(STAMP) ## the default test suite, in two processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-gpu: ## every test that needs an NVIDIA GPU, in one command; needs no package index
	PYTHONPATH="$(CURDIR):$$PYTHONPATH" $(PYTHON) -m pytest -m gpu -p no:cacheprovider -rs \
		$$(grep -rl --include='*.py' 'pytest.mark.gpu' tests)

check: $(STAMP) ## ruff, mypy, the import floors, doctests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --doctest-modules hwnas profilers latency_tables quant

bench: $(STAMP) ## run every benchmark at full size and write its result
	$(BIN)/python -m benchmarks run

bench-check: $(STAMP) ## re-run every committed benchmark at reduced size against its stated band
	$(BIN)/python -m benchmarks check

claims: $(STAMP) ## check the published systems' claims and write the results
	$(BIN)/python -m benchmarks claims

profile: $(STAMP) ## measure a latency table: make profile DEVICE=cpu|gpu
	$(BIN)/hwnas profile --device $(DEVICE)

clean: ## remove what make made
	rm -rf .venv build dist demo *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
