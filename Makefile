# make live   train a small model and watch it in a browser
# make test   install what is missing and run every test
# make lint   check style and format
# make clean  remove what the above made in this folder
#
# Python 3.11 or newer is all that has to be there. On Linux the torch of PyPI brings CUDA along (gigabytes); where
# there is no GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu takes the small build instead.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
comma := ,
WORKERS ?= 2

.PHONY: live test lint clean
.DEFAULT_GOAL := live

live: $(VENV)/installed
	@exec $(BIN)/workbench live $(LIVE)

test: $(VENV)/installed-test
	@.ci/install-browser
	@OMP_NUM_THREADS=1 WORKBENCH_REQUIRE_BROWSER=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope $(TESTS)

lint: $(VENV)/installed-test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

clean:
	rm -rf .venv build dist out .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "clean: runs and cached data stay in $${WORKBENCH_HOME:-~/.workbench}"

# Installed once, and again when pyproject.toml changes. With what the tests need, everything else is there too.
$(VENV)/installed: pyproject.toml
	$(call install,.)

$(VENV)/installed-test: pyproject.toml
	$(call install,.[test$(comma)hf])
	@touch $(VENV)/installed

define install
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  f"workbench needs Python 3.11 or newer and this is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	@echo "install: $(1) into $(VENV); the first time this takes a few minutes"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check -e '$(1)'
	@touch $@
	@echo "install: done"
endef
