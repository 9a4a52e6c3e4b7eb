"""Products are counted as they run."""

import jax
import jax.numpy as jnp
import pytest

from train.reports import flops
from train.reports.flops import peak, products

X, Y = jnp.ones((2, 3)), jnp.ones((3, 5))
ONCE = 2 * 2 * 3 * 5


def test_nothing_but_products_counts():
    assert products(lambda x: jnp.exp(x + 1).sum(), X) == 0


def test_a_batch_of_products_counts_each():
    assert products(jax.vmap(jnp.dot), jnp.ones((7, 2, 3)), jnp.ones((7, 3, 5))) == 7 * ONCE


def test_a_convolution_is_the_products_of_its_windows():
    image, kernel = jnp.ones((1, 2, 11, 13)), jnp.ones((5, 2, 3, 3))

    def convolve(image, kernel):
        return jax.lax.conv(image, kernel, (1, 1), "VALID")

    assert products(convolve, image, kernel) == 2 * (9 * 11) * 5 * (2 * 3 * 3)


def test_a_grouped_convolution_reads_its_group_alone():
    image, kernel = jnp.ones((1, 4, 11, 13)), jnp.ones((6, 2, 3, 3))

    def convolve(image, kernel):
        numbers = ("NCHW", "OIHW", "NCHW")
        return jax.lax.conv_general_dilated(
            image, kernel, (1, 1), "VALID", dimension_numbers=numbers, feature_group_count=2
        )

    assert products(convolve, image, kernel) == 2 * (9 * 11) * 6 * (2 * 3 * 3)


def test_a_loop_counts_as_often_as_it_runs():
    def loop(x, y):
        return jax.lax.scan(lambda carry, _: (carry, jax.jit(jnp.dot)(carry, y)), x, length=7)

    assert products(loop, X, Y) == 7 * ONCE


def test_of_branches_the_largest_counts():
    def either(x, y):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ y, lambda: jnp.zeros((2, 5)))

    assert products(either, X, Y) == ONCE


def test_the_derivative_of_a_function_is_not_counted_beside_it():
    @jax.custom_vjp
    def own(x, y):
        return x @ y

    own.defvjp(lambda x, y: (x @ y, (x, y)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    assert products(own, X, Y) == ONCE
    assert products(jax.grad(lambda x, y: own(x, y).sum(), argnums=(0, 1)), X, Y) == 3 * ONCE


def test_a_checkpoint_computes_forward_once_more():
    def loss(x, y):
        return jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ y)))(x).sum()

    plain = products(jax.grad(lambda x, y: jnp.sin(jnp.sin(x @ y)).sum()), X, Y)
    assert products(jax.grad(loss), X, Y) == plain + ONCE


def test_a_known_device_has_the_peak_of_its_data_sheet(monkeypatch):
    class Device:
        device_kind = "NVIDIA H100 80GB HBM3"

    figure, source = peak(Device())
    assert figure == flops._PEAKS["NVIDIA H100"]
    assert source == "989 TFLOP/s of the data sheet of NVIDIA H100"


def test_the_peak_of_an_unknown_device_is_timed():
    figure, source = peak(jax.devices()[0])
    assert figure > 1e8
    assert source.endswith("as timed here")


@pytest.mark.parametrize("name", ["TPU v5 lite", "TPU v5p", "TPU v4"])
def test_the_longer_name_wins(name):
    class Device:
        device_kind = name

    expected = {"TPU v5 lite": 197e12, "TPU v5p": 459e12, "TPU v4": 275e12}[name]
    assert peak(Device())[0] == expected
