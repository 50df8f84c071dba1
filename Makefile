# `make up` and `make test` set up all they need the first time.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 5
STAMP := $(VENV)/.set-up

.DEFAULT_GOAL := help
.PHONY: help setup up test test-unit test-faults test-deep bench-quick architecture lint format lock definitions openapi clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv with the pinned packages; find or install RabbitMQ and PostgreSQL

$(STAMP): requirements/dev.txt requirements/embedded.txt pyproject.toml deploy/bootstrap.sh
	@sh deploy/bootstrap.sh "$(PYTHON)" "$(VENV)" >&2

up: $(STAMP) ## Run the whole system on this machine until Ctrl-C; options: make up ARGS="--once -o json"
	@$(BIN)/chiffon up $(ARGS)

test: $(STAMP) ## Run all tests, on real servers that the tests start themselves; ARGS are pytest's
	@$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-unit: $(STAMP) ## Run the tests that need no server
	@$(BIN)/python -m pytest tests/unit $(ARGS)

test-faults: $(STAMP) ## Break a whole system, one fault an actor, and print what each fault did
	@$(BIN)/python -m pytest tests/faults -m essential -n 2 $(ARGS)

test-deep: $(STAMP) ## Every fault, long waits, many rounds: eight minutes
	@$(BIN)/python -m pytest tests/unit tests/integration tests/system tests/faults \
	  -m "deep or faults" -n 2 $(ARGS)

bench-quick: $(STAMP) ## Print the main ratios of the benchmarks, in under a minute
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes \
	  -r requirements/bench.txt
	@$(BIN)/python -m benchmarks.quick

lint: $(STAMP) ## Check style, types and import directions
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(STAMP) ## Mend what can be mended by itself
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

definitions: $(STAMP) ## Write deploy/rabbitmq/definitions.json from the topology
	@$(BIN)/python deploy/rabbitmq/write_definitions.py

architecture: $(STAMP) ## Write docs/architecture.md from the code
	@$(BIN)/python docs/draw_architecture.py

openapi: $(STAMP) ## Write docs/openapi.json from the gateway
	@$(BIN)/chiffon schema openapi > docs/openapi.json

lock: ## Pin the newest packages that pyproject.toml allows (needs uv)
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-annotate --no-header pyproject.toml -o requirements/agent.txt
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-annotate --no-header --extra all pyproject.toml -o requirements/runtime.txt
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-annotate --no-header --extra dev pyproject.toml -o requirements/dev.txt
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-annotate --no-header --extra embedded -c requirements/dev.txt pyproject.toml \
	  -o requirements/embedded.txt
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-annotate --no-header --extra bench -c requirements/dev.txt pyproject.toml \
	  -o requirements/bench.txt

clean: ## Remove .venv and caches; the state folder stays
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
