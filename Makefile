# Everything runs from the checkout, in a virtual environment of its own: .venv, made with $(PYTHON).
PYTHON ?= python3
python := .venv/bin/python

.PHONY: train bench bench-decoding bench-training test test-all lint types docs clean
.DELETE_ON_ERROR:

train: .venv/train  ## the default experiment; for another one: .venv/bin/python -m train EXPERIMENT
	@exec $(python) -m train dates $(ARGS)

# About 5 minutes on two cores. On a machine without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves
# gigabytes when PyTorch is installed.
bench: .venv/tokamax  ## attention against other libraries
	@exec $(python) -m benchmarks.attention --short $(ARGS)

bench-decoding: .venv/bench  ## greedy and beam search beside Hugging Face and CTranslate2, with the same weights
	@exec $(python) -m benchmarks.decoding --short $(ARGS)

bench-training: .venv/bench  ## updates beside Hugging Face and torch.nn.Transformer, of the same weights
	@exec $(python) -m benchmarks.training --short $(ARGS)

test: .venv/test  ## what .ci/run tests
	@exec $(python) -m pytest -n auto --dist loadfile $(ARGS)

test-all: .venv/test  ## the slow tests too
	@exec $(python) -m pytest -n auto --dist loadfile -m "not gpu" $(ARGS)

lint: .venv/test
	$(python) -m ruff check
	$(python) -m ruff format --check

types: .venv/test
	$(python) -m mypy

docs: .venv/docs  ## the site, with every example executed, in docs/_build/html
	@exec $(python) -m sphinx --builder html --fail-on-warning --keep-going --fresh-env --quiet docs docs/_build/html $(ARGS)

clean:
	rm -rf .venv dist build docs/_build docs/_generated .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find seqattn train benchmarks tests -name __pycache__ -exec rm -rf {} +

# A stamp is newer than pyproject.toml where its extra is installed. Plain jax computes on the CPU; on an NVIDIA GPU,
# `.venv/bin/pip install -e .[cuda]` once.
.venv/train .venv/bench .venv/test .venv/docs: .venv/%: pyproject.toml | .venv/bin/python
	@echo "Installing seqattn[$*] into .venv; the first time takes minutes."
	@$(python) -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@

# pip refuses tokamax beside tyro: each pins another typeguard. benchmarks/attention/jax_calls.py does without it.
.venv/tokamax: .venv/bench
	@$(python) -m pip install --quiet --disable-pip-version-check --no-deps tokamax
	@touch $@

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "seqattn needs Python 3.11 or newer, and $(PYTHON) is not: try make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv --clear .venv || { rm -rf .venv; \
		echo "$(PYTHON) could not make a virtual environment; on Debian and Ubuntu, install python3-venv" >&2; exit 1; }
