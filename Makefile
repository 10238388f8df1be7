# make demo, make test and so on: make alone lists them. They need python3 (3.11 or later) with venv, and make.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_VENV := .venv-bench
BENCH_STAMP := $(BENCH_VENV)/.installed

# Root can have test hosts: then a test that leaves them out has failed. Others are told which were not run.
HOSTS := $(if $(filter 0,$(shell id -u)),--onehop-require-hosts)

.DEFAULT_GOAL := help
.PHONY: help demo test test-oslo lint soak compare fuzz storms explore bench bench-quick bench-simulator clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

demo: $(STAMP)  ## a small Nova without a broker: ten processes, two of them killed, a ledger at the end
	@$(BIN)/onehop demo

test: $(STAMP)  ## everything: lint, our tests in three processes, oslo.messaging's own tests
	@bash tests/system_packages.sh
	@$(MAKE) --no-print-directory lint
	@echo "== tests"
	@$(BIN)/python -m pytest -n 3 -m "not alone" $(HOSTS)
	@echo "== tests that compare times, with nothing beside them"
	@$(BIN)/python -m pytest -m alone
	@echo "== the core's own tests cover each of its branches (the long search through interleavings adds nothing here)"
	@$(BIN)/python -m pytest -n 2 tests/protocol -k "not interleaving" --cov --cov-config=tests/protocol/coverage.ini
	@$(MAKE) --no-print-directory test-oslo

test-oslo: $(STAMP)  ## oslo.messaging's own test-suite over zmq://
	@echo "== oslo.messaging's own tests"
	@$(BIN)/python tests/oslo/run_suite.py

lint: $(STAMP)  ## ruff and mypy
	@echo "== lint"
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy --strict src

# Shorter with SECONDS=60, say; all else becomes shorter with it.
SECONDS ?= 1800

soak: $(STAMP)  ## half an hour of load and churn, then the long forms of what must be survived: build/soak
	@$(BIN)/python -m tests.system.soak --seconds $(SECONDS) --out build/soak

compare: $(STAMP)  ## the same kills over rabbit:// and over zmq://, about 20 min: the table that opens docs/reliability
	@bash tests/system_packages.sh
	@$(BIN)/python -m tests.system.compared --seconds 30 --rounds 3 --write docs/reliability/index.md

fuzz: $(STAMP)  ## a million fuzzed frames, 10 MB/s of garbage, a million requests that come up to three times; 15 min
	@$(BIN)/python tests/fuzz/flood.py --frames 1000000 --seconds 60
	@$(BIN)/python tests/system/disturbed.py --requests 1000000

storms: $(STAMP)  ## a thousand forks beside 32 threads; ten million calls of 64 threads and a loop; 15 min
	@$(BIN)/python tests/system/forks.py --forks 1000
	@$(BIN)/python tests/system/stress.py --calls 10000000

bench: $(BENCH_STAMP)  ## measure onehop beside its peers and limits, about an hour: docs/performance
	@bash benchmarks/packages.sh
	@$(BENCH_VENV)/bin/python -m benchmarks --out docs/performance

bench-quick: $(BENCH_STAMP)  ## a short form of it: build/benchmarks
	@bash benchmarks/packages.sh
	@$(BENCH_VENV)/bin/python -m benchmarks --quick

bench-simulator: $(STAMP)  ## rates over zmq:// and over rabbit://, interleaved
	@$(BIN)/python benchmarks/simulator/run.py

explore: $(STAMP)  ## simulated worlds from 10,000 seeds, with faults of all kinds: what breaks, and its shortest trace
	@$(BIN)/onehop simulate --explore 10000 --nodes 50 --seconds 10

clean:  ## remove the environment and what tools left behind
	rm -rf $(VENV) $(BENCH_VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache .stestr .coverage .coverage.* htmlcov src/*.egg-info
	rm -f src/onehop/transport/_native.*.so
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

BUILT_FROM := pyproject.toml setup.py src/onehop/transport/_native.c

$(STAMP): $(BUILT_FROM)
	$(call environment,$(VENV),--editable '.[dev]')

$(BENCH_STAMP): $(BUILT_FROM) benchmarks/requirements.txt
	$(call environment,$(BENCH_VENV),--editable '.[oslo]' --requirement benchmarks/requirements.txt)

# A virtual environment (1), and what pip is to install into it (2).
define environment
@python= ; for each in python3 python3.13 python3.12 python3.11; do \
	if $$each -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$each; break; fi; \
done; \
if [ -z "$$python" ]; then \
	echo "onehop needs Python 3.11 or later, and none of python3, python3.13, python3.12, python3.11 on PATH is one: install it, for instance with 'apt-get install python3.11-venv'." >&2; \
	exit 1; \
fi; \
echo "== making $(1) with $$($$python --version); once, a minute or two"; \
$$python -m venv --clear $(1)
@$(1)/bin/python -m pip install --disable-pip-version-check $(2)
@touch $@
endef
