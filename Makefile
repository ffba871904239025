# demo, test, lab, figures: each sets up .venv first if it is not there.
PYTHON ?= python3
BIN := .venv/bin
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
# where it is set, as in many containers, every kernel and process would compile a thousand files anew
export PYTHONDONTWRITEBYTECODE :=
.PHONY: demo test test-scale lab figures results

demo: .venv/installed  ## train, evaluate and search on the demo corpus; everything it writes is in runs/quickstart
	mkdir -p runs/quickstart
	$(BIN)/papermill --progress-bar notebooks/00_quickstart.ipynb runs/quickstart/00_quickstart.ipynb
	$(BIN)/jupyter nbconvert --log-level=ERROR --to html runs/quickstart/00_quickstart.ipynb
	@echo "Open runs/quickstart/00_quickstart.html to see and hear it; results.json and figures/ are beside it."

test: .venv/installed  ## the test suite; what needs Ray is skipped where it is not installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder  # else the notebooks, few and long, come last

test-scale: .venv/scale  ## what needs Ray, whose start alone takes a minute of two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_scale.py tests/test_notebooks_scale.py

lab: .venv/installed  ## JupyterLab
	$(BIN)/jupyter lab notebooks

figures: .venv/scale  ## every notebook in full, in order, executed copies and figures to runs/
	mkdir -p runs/notebooks
	set -e; for notebook in $(NOTEBOOKS); do \
		$(BIN)/papermill --progress-bar $$notebook runs/notebooks/$$(basename $$notebook); done

results: .venv/installed  ## the README's table on real speech: make results ESR_DATA=<folder of corpora>
	$(BIN)/python benchmarks/retrieval.py

.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] <= (3, 13) else \
		f"This project needs Python 3.11, 3.12 or 3.13; {sys.executable} is {v[0]}.{v[1]}. Name another: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps resemblyzer==0.1.4  # its webrtcvad needs a compiler
	# numba's caches: two processes that fill one at once would spoil it
	$(BIN)/python -c "import umap" & umap=$$!; $(BIN)/python -c "import librosa.core.audio, librosa.core.pitch" && wait $$umap
	touch $@

.venv/scale: .venv/installed requirements-scale.txt  # Ray, which only 12_scale_out and its tests need
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-scale.txt
	touch $@
