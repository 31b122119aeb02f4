# Each target sets up everything it needs in .venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test check check-js docs clean

demo: $(READY)
	$(BIN)/circuits compare --task ioi --methods acdc,eap,eap-ig,random --out runs

test: $(READY)
	$(BIN)/python -m pytest -n 2

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

clean:
	rm -rf .venv build site node_modules *.egg-info .pytest_cache .mypy_cache .ruff_cache
