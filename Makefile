.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SWEEPS := $(addprefix results/deepseek-v3-,uniform chat gpqa-tilted prefill)  # those of results/sweep.toml
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder
export MPLBACKEND := Agg

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/epsim: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "epsim needs Python 3.11 or newer; use make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable . --group dev
	touch $@

install: $(BIN)/epsim  ## create .venv and install epsim with its development tools

sweep: $(BIN)/epsim  ## the main job: DeepSeek-V3, four kinds of traffic, tables and figures under results/
	$(BIN)/epsim sweep --config results/sweep.toml --out 'results/deepseek-v3-{workload}'
	@printf '%s\n' 'plot $(wordlist 1,2,$(SWEEPS))' 'plot $(wordlist 3,4,$(SWEEPS))' \
		'report $(SWEEPS) results/advice-gpt-oss-20b --out results/report.html' | xargs -P 2 -L 1 $(BIN)/epsim

test: $(BIN)/epsim  ## lint, types and tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy & types=$$!; $(PYTEST); tests=$$?; wait $$types && exit $$tests

quick: $(BIN)/epsim  ## the quick loop, without the slow tests
	$(PYTEST) -q -x -m 'not slow'

tables: $(BIN)/epsim  ## write the tables of the READMEs again, each by the command above it
	$(BIN)/python tests/readme.py

notebooks: $(BIN)/epsim  ## execute the notebooks again, with their outputs (about 4 minutes)
	$(BIN)/python tests/notebooks.py

bench: $(BIN)/epsim  ## speed against a plain numpy pipeline, in one run
	$(BIN)/python tests/bench.py

bench-cuda: $(BIN)/epsim  ## on a GPU: the same rows as the CPU, and how fast (about 5 minutes; needs epsim[cuda])
	$(BIN)/python tests/bench_cuda.py --out results/measured/speed-h100.json

.PHONY: help install sweep test quick tables notebooks bench bench-cuda
