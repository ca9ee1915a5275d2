# make train   environment (first time: a few minutes, 8 GB) and the embedded run on the CPU
# make test    environment if absent, and every test that needs no GPU
# make matrix  the slower cases of what `make test` covers: about half an hour
# make fast    the tests that take seconds

RECIPE ?= tiny_cpu.yaml
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12), (3, 13)))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
WORKERS ?= 3
READY := $(VENV)/ready

.PHONY: train test matrix fast clean

train: $(READY)
	$(VENV)/bin/apo-lora train --recipe $(RECIPE) $(ARGS)

test: $(READY)
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not gpu and not matrix" $(ARGS)

matrix: $(READY)
	$(VENV)/bin/python -m pytest -m matrix $(ARGS)
	$(VENV)/bin/python -m tests.faults.kill_matrix --kills 100 --seed 0
	$(VENV)/bin/python -m tests.faults.endurance --steps 2000

fast: $(READY)
	$(VENV)/bin/python -m pytest -m "not gpu and not slow and not matrix" $(ARGS)

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "apo-lora needs Python 3.11, 3.12 or 3.13, and none was found: install one, or make PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --constraint constraints.txt --editable ".[test,gguf-test]"
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info
