# Two commands matter: `make run` and `make test`. Each sets up what it needs, once.
PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
BIN := .venv/bin
READY := .venv/.ready
# two lesson notebooks run side by side: one thread each, or they fight
LESSONS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1

.PHONY: help run test check bench tables reports lab clean
help: ## what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s%s\n", $$1, $$2}' Makefile

$(READY): settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kdnb needs Python 3.11 or newer: make PYTHON=...")'
	@echo "Setting up .venv, once: 2 to 10 minutes, most of it the download of torch."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

run: $(READY) ## distil: images to a recorded result, in minutes (ARGS="-p mag 100X" sets parameters)
	@$(BIN)/kdnb_run nbs/run_distill.ipynb out.ipynb $(ARGS)

test: check ## all checks and tests
	@$(LESSONS) $(BIN)/nbdev_test --n_workers 2 --do_print --skip_file_re '^(_|\.|run_)' --skip_folder_re '^(_|\.|bench$$|paper$$)'
	@$(LESSONS) $(BIN)/python -m pytest -n auto --dist loadfile

check: $(READY) ## the quick part: lint, export fresh, notebooks clean, imports one way
	@$(BIN)/ruff check -q .
	@$(BIN)/python -m pytest tests/test_hygiene.py tests/test_dag.py

bench: $(READY) ## run every benchmark notebook
	@set -e; for nb in $(wildcard nbs/bench/*.ipynb); do \
	  $(BIN)/papermill --cwd nbs/bench $$nb results/executed/bench-$$(basename $$nb); done
	@$(if $(wildcard nbs/bench/*.ipynb),,echo "nbs/bench holds no notebooks yet")

tables: $(READY) ## rebuild results/tables and the block of the README from the run records
	@$(BIN)/python -c 'from kdnb.reports import main; main()' --readme README.md

reports: tables ## the same, and show it in the notebooks of nbs/paper
	@set -e; for nb in nbs/paper/table*.ipynb nbs/paper/figure*.ipynb; do \
	  $(BIN)/jupyter execute --inplace $$nb; $(BIN)/nbdev_clean --fname $$nb; done

lab: $(READY) ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab nbs

clean: ## remove what building and testing leave; .venv, cache/ and results/ stay
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache out.ipynb
	@find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +
