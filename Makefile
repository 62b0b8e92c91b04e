# Everything here needs Python (3.11 or newer) and make, and installs the rest into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
AZURITE := 3.37.0
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Processes share the tests; all that uses Ray runs in two of them (tests/conftest.py). Four, since
# with two the cores wait a third of the time, for faults to be noticed.
PYTEST := $(BIN)/python -m pytest -n 4 --dist loadgroup --no-loadscope-reorder

# Else each of the hundreds of processes that tests start would compile all of resfeat again, and
# each that collects all tests, where whoever runs this has forbidden Python to keep what it compiled.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-more lint style types tests slow soak bench scale parity gpu clean

demo: $(VENV)/demo.done ## embed a few hundred real photographs, and a page of what comes of it
	$(BIN)/python pipelines/demo.py demo

# mypy takes one core for most of a minute, and the tests do not keep two busy.
test: style ## ruff, and then mypy and the tests, side by side
	$(MAKE) --no-print-directory -j2 types tests

# Else torch's idle threads spin, and take the cores from the other processes: up to five times slower.
tests test-more: export OMP_WAIT_POLICY := PASSIVE

tests: $(VENV)/dev.done
	$(PYTEST)

test-more: $(VENV)/dev.done ## the second tier: faults once more in another way, and what takes long; CI runs these too
	$(PYTEST) -m more

lint: style types

style: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.done
	$(BIN)/mypy

slow: $(VENV)/dev.done ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

soak: $(VENV)/dev.done ## an hour of runs that are killed at random moments (SOAK_MINUTES=60)
	$(BIN)/python -m pytest -m soak -s

bench: $(VENV)/dev.done ## the peers on the same images, printed as ratios
	$(BIN)/python tests/benchmarks/bench.py

scale: $(VENV)/dev.done ## one driver and millions of invented images
	$(BIN)/python tests/benchmarks/scale.py

parity: $(VENV)/dev.done ## compare with torchvision and with fp32 on torch; writes tests/benchmarks/PARITY.md
	$(BIN)/python tests/benchmarks/parity.py

gpu: $(VENV)/dev.done ## all that is to be known of a machine with one GPU
	$(BIN)/python tests/benchmarks/gpu.py

clean:
	rm -rf $(VENV) demo build *.egg-info

$(VENV)/python.done:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "resfeat needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "$(PYTHON) has no venv module: on Debian, apt install python3-venv"; exit 1; }
	@touch $@

# Azure's emulator, for tests that are skipped without it: where there is npm.
$(VENV)/azurite.done: $(VENV)/python.done
	@if command -v npm >/dev/null; then \
		npm install --prefix $(VENV) --no-audit --no-fund --no-save --silent azurite@$(AZURITE); \
	else echo "no npm: tests with Azure's emulator are skipped"; fi
	@touch $@

$(VENV)/dev.done: $(VENV)/azurite.done

$(VENV)/%.done: pyproject.toml constraints.txt $(VENV)/python.done
	@echo "installing resfeat[$*] into $(VENV): several GB with torch, minutes the first time"
	$(INSTALL) -e '.[$*]'
	@touch $@
