# Needs make and Python 3.11 or newer. Everything is installed into .venv, in the versions of constraints.txt.

PYTHON ?= python3.11 python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: venv demo test sbi-test lint types wheel-smoke release bench gpu docs format clean
.NOTPARALLEL:
.DEFAULT_GOAL := venv

venv: .venv/installed-base

# Stamps: a second run installs nothing unless pyproject.toml or constraints.txt has changed.
.venv/created:
	@for python in $(PYTHON); do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "Creating .venv with $$($$python --version)"; \
	        $$python -m venv --clear .venv && touch $@ && exit 0; \
	        echo "'$$python -m venv' failed; on Debian, install python3-venv" >&2; exit 1; \
	    fi; \
	done; \
	echo "pyrnode needs Python 3.11 or newer, and none of '$(PYTHON)' is." >&2; \
	echo "Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1

.venv/installed-base: .venv/created pyproject.toml constraints.txt
	@echo "Installing pyrnode into .venv; PyTorch is large, so the first time takes minutes"
	$(PIP_INSTALL) --editable .
	@touch $@

.venv/installed-test: .venv/created pyproject.toml constraints.txt
	@echo "Installing pyrnode and its tests' needs into .venv; PyTorch is large, so the first time takes minutes"
	$(PIP_INSTALL) --editable '.[test]'
	@touch $@ .venv/installed-base

.venv/installed-dev: .venv/created pyproject.toml constraints.txt
	@echo "Installing the developers' tools into .venv"
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@ .venv/installed-test .venv/installed-base

demo: .venv/installed-base
	$(BIN)/python -m pyrnode demo --out runs/demo

# One process a core, each with the tests of whole files. ARGS are passed on: make test ARGS="tests/test_packaging.py -x"
test: .venv/installed-test
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(ARGS)

# sbi has an environment of its own on top of .venv, so that what it needs moves no version of the others' tests.
.venv/installed-sbi: .venv/installed-test
	@echo "Installing sbi into .venv/sbi"
	$(BIN)/python -m venv --clear .venv/sbi
	@where='import sysconfig; print(sysconfig.get_path("purelib"))'; outer="$$($(BIN)/python -c "$$where")"; \
	echo "import site; site.addsitedir('$$outer')" >"$$(.venv/sbi/bin/python -c "$$where")/outer.pth"
	.venv/sbi/bin/python -m pip install --quiet --constraint constraints.txt 'sbi>=0.27,<0.28'
	@touch $@

sbi-test: .venv/installed-sbi
	.venv/sbi/bin/python -m pytest tests/test_sbi.py tests/test_sbi_pace.py $(ARGS)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev
	$(BIN)/mypy

bench: .venv/installed-test
	$(BIN)/python -m benchmarks.speed

# On a machine with a GPU, with the Python that has its torch: `make gpu GPU_PYTHON=python3 ARGS="--seconds 540"` goes on
# where it was cut. Nothing is installed.
GPU_PYTHON ?= $(BIN)/python
gpu:
	$(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

docs: .venv/created
	$(PIP_INSTALL) --editable '.[docs]'
	$(BIN)/mkdocs build --site-dir site

# The wheel as a user gets it: built, installed in a fresh environment outside the checkout, and trained with there.
wheel-smoke: .venv/installed-dev
	@set -eu; work="$$(mktemp -d)"; trap 'rm -rf "$$work"' EXIT; \
	$(BIN)/python -m build --wheel --outdir "$$work/dist" . >"$$work/build.log" 2>&1 \
	    || { cat "$$work/build.log" >&2; exit 1; }; \
	echo "Built $$(basename "$$work"/dist/*.whl); installing it into $$work/venv"; \
	$(BIN)/python -m venv "$$work/venv"; \
	"$$work/venv/bin/python" -m pip install --quiet --constraint constraints.txt "$$work"/dist/*.whl; \
	cd "$$work"; unset PYTHONPATH; \
	venv/bin/python -c "import pathlib, sys, pyrnode; \
	    here = pathlib.Path(pyrnode.__file__).resolve(); \
	    assert here.is_relative_to(pathlib.Path(sys.prefix).resolve()), here; \
	    from pyrnode import julia_setup; \
	    julia = julia_setup.sources(); \
	    assert julia.is_relative_to(here.parent) and 'Lux' in julia_setup.needs(), julia; \
	    print('pyrnode', pyrnode.__version__, 'from', here, 'with', len(list(julia.iterdir())), 'Julia files')"; \
	venv/bin/python -m pyrnode train 8gaussians --preset toy --set max_steps=20 --out run; \
	test -s run/config.toml && test -s run/report.json; \
	venv/bin/pyrnode --help >/dev/null; \
	echo "The wheel installs, trains and writes its run directory"

# The files of a release in dist/, checked, with its notes and conda-forge's recipe. Publishing them is for a person.
release: .venv/installed-dev
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*.tar.gz dist/*.whl
	$(BIN)/python .ci/release.py dist

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
	find pyrnode tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
