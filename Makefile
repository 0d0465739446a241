# What a person types. `make demo` and `make test` need python3 (3.10 ... 3.13) and make, nothing else.
PYTHON  ?= python3
PROFILE ?= smoke
BIN     := .venv/bin
WORKERS ?= $(shell getconf _NPROCESSORS_ONLN)
ONE     := OMP_NUM_THREADS=1 TQDM_DISABLE=1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lab reproduce gpu notebooks readme docs lock clean

help:       ## what can be typed here
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

demo: .venv/ready  ## who is robust? A table and a picture in a few minutes (figures/smoke/mcs/fig2.png)
	$(BIN)/rdd reproduce mcs/fig2 --profile smoke

test: .venv/ready  ## ruff, every library notebook and every test once, at sizes that prove the point
	$(BIN)/ruff check .
	$(ONE) $(BIN)/python tests/notebooks.py --workers $(WORKERS)   # pytest runs the papers' pages, small
	$(ONE) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations=10

test-all: .venv/ready  ## the same at full size, with the slow cells of the notebooks and the papers' pages: hours, for releases
	$(BIN)/ruff check .
	$(ONE) $(BIN)/python tests/notebooks.py --papers --slow --workers $(WORKERS)
	$(ONE) RDD_TESTS=full $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=30

# Its root is the checkout, so that links out of nbs/ lead somewhere; .jupyter/ has its defaults (no question about news).
lab: .venv/ready  ## JupyterLab on the notebooks (with options: make lab LAB="--no-browser --port 9000")
	JUPYTER_CONFIG_PATH="$(CURDIR)/.jupyter$${JUPYTER_CONFIG_PATH:+:$$JUPYTER_CONFIG_PATH}" \
	  $(BIN)/jupyter lab --notebook-dir=. $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB) nbs/index.ipynb

reproduce: .venv/ready  ## every figure and table: make reproduce PROFILE=smoke|cpu|paper
	$(BIN)/rdd reproduce all --profile $(PROFILE)

# Without a GPU the same stages at tiny sizes, on a pretended one (with options: make gpu GPU="--minutes 9 --only tests").
gpu: .venv/ready  ## what to do with twelve minutes on a GPU, into runs/gpu-<device>.tar.gz; without one, a rehearsal
	$(BIN)/python benchmarks/gpu.py $(GPU)

notebooks: .venv/ready  ## export, run every library notebook in place, clean
	$(BIN)/nbdev_export
	find nbs -name '*.ipynb' -not -path '*/.*' -not -path 'nbs/papers/*' | sort | \
	  OMP_NUM_THREADS=2 TQDM_DISABLE=1 xargs -n 1 $(BIN)/jupyter nbconvert --log-level WARN --to notebook --execute --inplace \
	    --ExecutePreprocessor.timeout=600 --ExecutePreprocessor.store_widget_state=False
	$(BIN)/nbdev_clean

readme: .venv/ready  ## README.md, benchmarks/README.md and the map nbs/README.md from the notebooks
	$(BIN)/python tests/readme.py

docs: .venv/ready  ## the site, in _docs/html: notebooks, papers, API; nothing is run, a warning is an error
	rm -rf _docs
	$(BIN)/python docs/prepare.py _docs/src
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -c docs -d _docs/doctrees _docs/src _docs/html

lock: .venv/ready  ## requirements.lock from settings.ini
	printf 'requests>=2.32\n' > .venv/override.txt   # torchattacks pins requests~=2.25.1 and never imports it
	$(BIN)/uv pip compile --quiet --universal --python-version $$(sed -n 's/^min_python = //p' settings.ini) --extra dev --extra all --extra attacks \
	  --override .venv/override.txt --no-emit-index-url --no-annotate --custom-compile-command "make lock" pyproject.toml -o requirements.lock

clean:      ## remove the environment and what builds leave behind
	rm -rf .venv build dist *.egg-info _proc _docs _docs .pytest_cache .ruff_cache

.venv/ready: requirements.lock settings.ini hatch_build.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "rdd_lib needs Python 3.10 ... 3.13; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name another one: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo "python3 cannot make virtual environments; on Debian and Ubuntu install the package python3-venv"; exit 1; }
	@echo "installing the pinned environment into .venv (once; two to four minutes, 6 GB)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@
