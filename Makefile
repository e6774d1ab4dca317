# weft: everything a clone needs is python3 >= 3.11, pip and make.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
NEW    := import sys; sys.exit(sys.version_info < (3, 11))
WORKERS ?= 2

# Workers share the cores: each keeps to one thread.
ONE := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
CHROMIUM := { { command -v chromium || command -v chromium-browser || command -v google-chrome; } && command -v chromedriver; } >/dev/null 2>&1
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint docs prove compositions bench bench-peers fuzz test-browser browser clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | awk -F'\t' '{ printf "  make %-14s %s\n", $$1, $$2 }'

venv: $(READY) ## install weft and what its tests need into .venv

$(READY): pyproject.toml
	@rm -f $@
	@$(BIN)/python -c '$(NEW)' 2>/dev/null || { \
	  $(PYTHON) -c '$(NEW)' 2>/dev/null || { \
	    echo "weft needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1 || true)."; \
	    echo "Install one and say which: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }; \
	  $(PYTHON) -m venv --clear $(VENV) || { echo "This Python cannot make environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }; }
	@echo "installing weft into $(VENV) (PyTorch is large; the first time takes minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

demo: $(READY) ## compress and tune the shipped model to three budgets; prints a table and the report's path
	@$(BIN)/weft fit ref-lm --data cpp --budget 14% --budget 27% --budget 51% --out out/demo --quick --replace

test: lint browser ## lint, types, every test, fresh proofs, docs
	@if $(CHROMIUM); then $(ONE) WEFT_BROWSER=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal; \
	else $(ONE) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal; fi
	@$(MKDOCS)
	@$(CHROMIUM) || echo "SKIPPED: the browser tests, as there is no chromium (make test-browser says how)."

lint: $(READY) ## ruff and pyright
	@$(BIN)/ruff check .
	@$(BIN)/pyright

# Chromium, where it is missing and may be installed; never fails.
browser: $(READY)
	@$(CHROMIUM) || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1 || \
	  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y chromium chromium-driver; } >/dev/null 2>&1 || true

test-browser: browser ## the tests that open the report in a browser
	@$(CHROMIUM) || { echo "No chromium: install the packages chromium and chromium-driver, or Chrome."; exit 1; }
	@$(ONE) WEFT_BROWSER=1 $(BIN)/python -m pytest tests/browser

docs: $(READY) ## write docs/methods.md and build the site into site/
	@$(BIN)/python scripts/docs.py
	@$(MKDOCS)

prove: $(READY) ## try every method's claim again (an hour) and write the verdicts into docs/methods.md
	@$(BIN)/weft prove --known --all --jobs $(WORKERS)
	@$(BIN)/python scripts/docs.py

compositions: $(READY) ## what composes with what: try it all, into docs/composition.md and docs/adapters.md (minutes)
	@$(ONE) $(BIN)/python scripts/composition.py & first=$$!; \
	  $(ONE) $(BIN)/python scripts/adapters.py; second=$$?; wait $$first && exit $$second

fuzz: $(READY) ## ten minutes of fuzzing what reads files from elsewhere
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'atheris>=2.3' 2>/dev/null || echo "atheris does not install here."
	@$(BIN)/python scripts/fuzz.py

bench: $(READY) ## run every benchmark
	@set -e; for f in benchmarks/*.py; do [ -e "$$f" ] || continue; echo "== $$f"; $(BIN)/python "$$f"; done

# On top of .venv, which it leaves as it is: what is installed here alone are the backends that a peer has layers for.
PEERS := .venv-peers
bench-peers: $(READY) ## PEFT's adapters on dense and quantized bases, beside weft's, into docs/peers.md (minutes)
	@[ -x $(PEERS)/bin/python ] || $(BIN)/python -m venv $(PEERS)
	@$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > "$$($(PEERS)/bin/python -c 'import site; print(site.getsitepackages()[0])')/weft.pth"
	@for p in 'bitsandbytes>=0.50' 'hqq>=0.2.8'; do \
	  $(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check "$$p" || echo "$$p does not install here."; done
	@$(ONE) $(PEERS)/bin/python benchmarks/peers.py --write docs/peers.md

clean: ## remove what the other targets made, but not the environment
	@rm -rf out site dist .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
