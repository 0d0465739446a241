# What a person types. `make demo` and `make test` need python3 (3.10 ... 3.13) and make, nothing else.
PYTHON  ?= python3
PROFILE ?= smoke
BIN     := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lab reproduce notebooks readme lock clean

help:       ## what can be typed here
	@grep -E '^[a-z]+: .*##|^[a-z]+: +##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

demo: .venv/ready  ## who is robust? A table and a picture in a few minutes (figures/smoke/mcs/fig2.png)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/rdd reproduce mcs/fig2 --profile smoke   # with more threads small networks wait for each other

test: .venv/ready  ## notebooks in step and clean, their tests, pytest, ruff
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_in_step.py
	OMP_NUM_THREADS=1 TQDM_DISABLE=1 $(BIN)/nbdev_test --n_workers $$($(BIN)/python -c 'import os; print(min(4, os.cpu_count()))') --timing \
	  --skip_folder_re '^([_.]|guard_early$$|mat$$)'   # pytest runs those pages, at small sizes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --deselect tests/test_in_step.py

lab: .venv/ready  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir=nbs

reproduce: .venv/ready  ## every figure and table: make reproduce PROFILE=smoke|cpu|paper
	$(BIN)/rdd reproduce all --profile $(PROFILE)

notebooks: .venv/ready  ## export, run every library notebook in place, clean
	$(BIN)/nbdev_export
	find nbs -name '*.ipynb' -not -path '*/.*' -not -path 'nbs/papers/*' | sort | \
	  OMP_NUM_THREADS=2 TQDM_DISABLE=1 xargs -n 1 $(BIN)/jupyter nbconvert --log-level WARN --to notebook --execute --inplace --ExecutePreprocessor.timeout=600
	$(BIN)/nbdev_clean

readme: .venv/ready  ## README.md from nbs/index.ipynb
	$(BIN)/python tests/readme.py > .README.md && mv .README.md README.md

lock: .venv/ready  ## requirements.lock from settings.ini
	printf 'requests>=2.32\n' > .venv/override.txt   # torchattacks pins requests~=2.25.1 and never imports it
	$(BIN)/uv pip compile --quiet --universal --python-version $$(sed -n 's/^min_python = //p' settings.ini) --extra dev --extra oracles \
	  --override .venv/override.txt --no-emit-index-url --no-annotate --custom-compile-command "make lock" pyproject.toml -o requirements.lock

clean:      ## remove the environment and what builds leave behind
	rm -rf .venv build dist *.egg-info _proc .pytest_cache .ruff_cache

.venv/ready: requirements.lock settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "rdd_lib needs Python 3.10 ... 3.13; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name another one: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo "python3 cannot make virtual environments; on Debian and Ubuntu install the package python3-venv"; exit 1; }
	@echo "installing the pinned environment into .venv (once; about two minutes, 6 GB)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@
