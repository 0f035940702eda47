# Every target makes its own virtual environment first (VENV, .venv unless told) and installs the project into it.
PYTHON ?= python3
VENV ?= .venv
OUT ?= out/demo
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check types format docs clean

demo: $(STAMP)  ## the main job on real input, offline once installed: writes $(OUT)/demo.png and the table
	$(BIN)/vlmq demo --out $(OUT)

test: check  ## all tests and lint

check: $(STAMP) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python -p build/types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest  # tiny tensors: threads only wait for each other

# Type checkers know no package-dir: a tree of links shows them the package as it is installed.
types:
	@rm -rf build/types && mkdir -p $(addprefix build/types/,vlmq calib kernels eval)
	@for path in vlmq/* calib kernels eval; do ln -sfn ../../../$$path build/types/vlmq/$${path##*/}; done
	@ln -sfn ../../pyproject.toml build/types/pyproject.toml

docs: $(STAMP)  ## tutorials and API reference: build/docs/index.html
	$(BIN)/python docs/build_site.py build/docs

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) out build dist .pytest_cache .ruff_cache

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard kernels/csrc/*)
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit(f"vlmq needs Python 3.11 or newer, got {v}: run make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	@touch $@
