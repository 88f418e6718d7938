# make live            train a small model and watch it in a browser
# make test            install what is missing and run every test; TESTS=tests/lib/routing runs those
# make test-versions   test the oldest and the newest versions that pyproject.toml allows, and say what broke;
#                      HOLD=torch==2.13.0 keeps one where it is
# make lint            check style and format
# make clean           remove what the above made in this folder
#
# The versions installed are those of constraints.txt; with CONSTRAINTS= they are the newest, and what VENV has already
# stays as it is.
#
# Python 3.11 or newer is all that has to be there. On Linux the torch of PyPI brings CUDA along (gigabytes); where
# there is no GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu takes the small build instead.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
comma := ,
WORKERS ?= 2
CONSTRAINTS ?= constraints.txt

.PHONY: live test test-versions lint clean
.DEFAULT_GOAL := live

live: $(VENV)/installed
	@exec $(BIN)/workbench live $(LIVE)

test: $(VENV)/installed-test
	@.ci/install-browser
	@OMP_NUM_THREADS=1 WORKBENCH_REQUIRE_BROWSER=1 $(BIN)/python -m pytest -p no:nbval -n $(WORKERS) --dist loadgroup $(TESTS)
	@echo "test: passed"

test-versions:
	@$(PYTHON) .ci/versions.py $(addprefix --hold ,$(HOLD))

lint: $(VENV)/installed-test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

clean:
	rm -rf .venv build dist out .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "clean: runs and cached data stay in $${WORKBENCH_HOME:-~/.workbench}"

# Installed once, and again when pyproject.toml or the constraints change. With what the tests need, everything else is there too.
$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(call install,.)

$(VENV)/installed-test: pyproject.toml $(CONSTRAINTS)
	$(call install,.[test$(comma)hf])
	@touch $(VENV)/installed

define install
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  f"workbench needs Python 3.11 or newer and this is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	@echo "install: $(1) into $(VENV); the first time this takes a few minutes"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS)) -e '$(1)'
	@touch $@
	@echo "install: done"
endef
