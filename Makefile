# What a person types. `make demo` and `make test` set up what they need.
PYTHON ?= python3
DATA ?= emoji
DEMO ?= demo
VENV := .venv
BIN := $(VENV)/bin
# Headers that our decoder (libjpeg) and FFCV (the others) are compiled against.
APT := libjpeg-dev libturbojpeg0-dev libopencv-dev pkg-config gcc g++ python3-dev

.PHONY: help setup demo test check tests faults clean
help:
	@echo "make setup   .venv with everything in requirements.txt; afterwards .venv/bin/daae is there"
	@echo "make demo    fetch, convert, profile, train MAE and DAAE equally long, report (DATA=emoji|synthetic|/my/images)"
	@echo "make test    lint, types and tests, offline once set up"
	@echo "make faults  the long fault tests: kills, full disk, damaged files"

# Looks at everything again; the others take what is there, and need no network once it is.
setup:
	PYTHON="$(PYTHON)" VENV="$(VENV)" APT="$(APT)" sh tools/setup.sh
	@touch $(VENV)/.installed

$(VENV)/.installed: requirements.txt pyproject.toml tools/setup.sh
	@$(MAKE) --no-print-directory setup

demo: $(VENV)/.installed
	@$(BIN)/python -m tools.demo --data "$(DATA)" --out "$(DEMO)"

test: check tests

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

tests: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

faults: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow --timeout 900

clean:
	rm -rf "$(VENV)" "$(DEMO)" *.egg-info
