# make demo   train a real small model on this machine, and see what it learned
# make test   everything that the project promises
# make soak   every fault a hundred times: what is lost, what is wrong, how long an adoption takes; 10,000 hostile requests
# make bench  how fast it starts, trains, answers, rests, grows and fans out, each beside a limit of the same run
#
# Both install into .venv first. PYTHON=... chooses the Python (3.11 or newer).

PYTHON ?= python3
BIN := .venv/bin
SHELL := /bin/bash

.PHONY: install demo demo-pretrain test soak bench lint types audit proto docs clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "finetuned needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; say make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# MODEL=/folder/of/a/model DATA=/chats.jsonl train your own instead.
demo: install
	@$(BIN)/python client/examples/howto/demo.py $(if $(MODEL),--model '$(MODEL)') $(if $(DATA),--data '$(DATA)')

demo-pretrain: install
	@$(BIN)/python client/examples/howto/demo.py --pretrain $(if $(MODEL),--model '$(MODEL)') $(if $(DATA),--data '$(DATA)')

test: install
	$(BIN)/python -m pytest -n 2 $(ARGS)

# ROUNDS=100 of each fault, EXAMPLES=10000 hostile requests, SEED=... of an earlier soak, ONLY=part of the name of a fault (then no requests).
soak: install
	$(BIN)/python tests/faults/soak.py --rounds $(or $(ROUNDS),100) $(if $(SEED),--seed $(SEED)) $(if $(ONLY),--only '$(ONLY)') $(ARGS)
	$(if $(ONLY),,$(BIN)/python tests/hostile/soak.py --examples $(or $(EXAMPLES),10000) $(if $(SEED),--seed $(SEED)))

# PARTS="start api" of the parts that tests/bench/README.md describes, ROUNDS=3 of each measurement, JSON=file for all that was measured,
# QUICK=1 to see that it works; LLAMAFACTORY=/path/to/llamafactory-cli adds that one.
bench: install
	@$(BIN)/python tests/bench/bench.py --rounds $(or $(ROUNDS),3) $(if $(PARTS),--parts '$(PARTS)') $(if $(QUICK),--quick) $(if $(JSON),--json '$(JSON)') $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy
	$(BIN)/pyright

# Known advisories on what is installed with us, and secrets in the files of the project.
audit: install
	$(BIN)/python .ci/audit.py

proto: install
	$(BIN)/python proto/generate.py

# The pages that are made from code: parameters and API.
docs: install
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build dist
