"""The flag that makes XLA compute rightly on the CPU: where it is set, and that it works in this very process."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import environment

FLAG = "--xla_cpu_experimental_ynn_fusion_type=-reduce"


@pytest.mark.parametrize("jaxlib", ["0.10.2", "0.11.0", "0.11.2", "0.12.0.1", "0.12.1.dev20261101+abc"])
def test_affected_versions_get_the_flag(jaxlib):
    assert environment.xla_flags("", jaxlib) == FLAG


@pytest.mark.parametrize("jaxlib", ["0.4.38", "0.10.1", "0.13.0", "1.0"])
def test_other_versions_do_not_as_xla_aborts_on_unknown_flags(jaxlib):
    assert environment.xla_flags("", jaxlib) == ""


def test_what_the_user_set_stays():
    other, own = "--xla_dump_to=/tmp/hlo", "--xla_cpu_experimental_ynn_fusion_type=dot"
    assert environment.xla_flags(other, "0.10.2") == f"{other} {FLAG}"
    assert environment.xla_flags(own, "0.10.2") == own


def test_configuring_twice_sets_the_flag_once(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.10.2")
    monkeypatch.setenv("XLA_FLAGS", "")
    environment.configure()
    environment.configure()
    assert os.environ["XLA_FLAGS"] == FLAG


@pytest.mark.parametrize("size", [32, 64, 128])
def test_a_product_followed_by_a_reduction_is_right_in_this_process(size):
    """A version of jaxlib that fails here is affected too: widen the range in train/environment.py."""
    left, right = np.full((5, size, size), 2, np.float32), np.ones((size, size), np.float32)
    norms = jax.jit(jax.vmap(lambda matrix: jnp.sum((matrix @ right) ** 2)))(left)
    np.testing.assert_allclose(norms, np.full(5, (2.0 * size) ** 2 * size**2), rtol=1e-5)
