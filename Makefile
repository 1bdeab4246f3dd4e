# Five commands; each first sets up what it needs (.ci/setup), once, and works offline afterwards.
# A checkout path may contain spaces: always `.venv/bin/python -m ...`, never a script from .venv/bin.

PY := .venv/bin/python
ARGS ?=
NBVAL := CI=1 $(PY) -m pytest -q --nbval-lax --nbval-current-env --nbval-cell-timeout=600 --timeout=660
NO_NEWS := {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false}}

# The Jupyter kernel "python3" is the one of .venv, whatever kernels the user has registered.
export JUPYTER_PREFER_ENV_PATH := 1
export JUPYTER_PATH := $(CURDIR)/.venv/share/jupyter
export PYTHON
unexport PYTHONPATH PYTHONHOME

.PHONY: help tour lab test site clean set-up
.DEFAULT_GOAL := help

help:
	@echo "make tour    run all notebooks and show their results as pages, runs/tour/pages/index.html"
	@echo "make lab     open the notebooks in JupyterLab"
	@echo "make test    check the style (ruff), run the tests (pytest) and the notebooks in smoke mode"
	@echo "make site    build the project's pages from the notebooks as they were run, runs/site/index.html"
	@echo "make clean   remove runs/ and caches (not .venv: rm -rf .venv does that)"
	@echo
	@echo "The first one sets up .venv, which takes minutes and gigabytes, once; PYTHON=python3.12 chooses the Python."
	@echo "ARGS=... is passed on: make tour ARGS='--only 05 --smoke', make test ARGS='-k golden'."

set-up:
	@sh .ci/setup

tour: set-up
	@$(PY) notebooks/tour.py $(ARGS)

lab: set-up
	@echo "Starting JupyterLab; stop it with Ctrl-C. Without a browser here, open the address it prints."
	@mkdir -p .venv/share/jupyter/lab/settings; printf '%s\n' '$(NO_NEWS)' >.venv/share/jupyter/lab/settings/overrides.json
	@root=; if [ "$$(id -u)" = 0 ]; then root=--allow-root; fi; \
	first=$$(ls notebooks/[0-9][0-9]_*.ipynb 2>/dev/null | head -n 1); \
	$(PY) -m jupyterlab $$root $$first $(ARGS)

site: set-up
	@$(PY) notebooks/site/build.py $(ARGS)

test: set-up
	@echo "Checking the style (ruff)."
	@$(PY) -m ruff check .
	@echo "Running the tests (pytest)."
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses 4 --dist loadfile $(ARGS)
	@echo "Running the notebooks in smoke mode (nbval), chapters and solutions side by side."
	@mkdir -p runs; $(NBVAL) notebooks/solutions >runs/solutions.txt 2>&1 & solutions=$$!; \
	$(NBVAL) notebooks/[0-9]*.ipynb; code=$$?; \
	wait $$solutions || code=1; cat runs/solutions.txt; exit $$code

clean:
	@echo "Removing runs/ and caches. .venv stays; rm -rf .venv removes it, and the next make builds it again."
	@rm -rf runs .pytest_cache .ruff_cache .coverage build dist *.egg-info
	@find . \( -path ./.venv -o -path ./.git \) -prune -o -type d \
		\( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +
