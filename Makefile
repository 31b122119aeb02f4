# Each target sets up everything it needs in .venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# The second environment, with the newest TransformerLens 4, in which there is no HookedTransformer.
BIN4 := .venv-tl4/bin
READY4 := .venv-tl4/.ready

# SmolLM2-135M, from PyPI.
REAL := $(BIN)/python experiments/real_model.py

.PHONY: demo real real-short real-graph test test-tl4 check check-js docs clean

demo: $(READY)
	$(BIN)/circuits compare --task ioi --methods acdc,eap,eap-ig,random --out runs

real: $(READY)
	$(REAL)

real-short: $(READY)
	$(REAL) short --out runs/real-short

real-graph: $(READY)
	$(REAL) graph

test: $(READY)
	$(BIN)/python -m pytest -n 2

# Pages are the same under both; two places are for the class that 4 does not have.
test-tl4: $(READY4)
	$(BIN4)/python -m pytest -n 2 -m "not browser" \
		--ignore circuits/models/hooked_transformer --ignore circuits/models/loading/conversion.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The scripts of the pages; needs Node.js.
check-js:
	npm install --no-audit --no-fund --no-package-lock --silent
	npm run --silent check

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	touch $(READY)

$(READY4): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-tl4
	grep -v '^transformer-lens' constraints.txt > .venv-tl4/constraints.txt
	$(BIN4)/python -m pip install --quiet --constraint .venv-tl4/constraints.txt 'transformer-lens>=4,<5' --editable '.[dev]'
	touch $(READY4)

clean:
	rm -rf .venv .venv-tl4 build site node_modules *.egg-info .pytest_cache .mypy_cache .ruff_cache
