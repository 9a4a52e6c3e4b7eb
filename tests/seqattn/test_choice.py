"""Which implementation runs, and what is said of it: with kernels that only count and refuse."""

import functools

import jax
import jax.numpy as jnp
import pytest

from seqattn import choice
from seqattn.attention import attend
from seqattn.choice import IMPLEMENTATIONS, TINY_PAIRS, Implementation, explain
from seqattn.kernels import reference
from seqattn.masks import Causal
from seqattn.score_mods import Alibi, SoftCap

X = jnp.ones((2, 7, 3, 5))


@pytest.fixture
def ran(monkeypatch):
    """Two kernels beside the reference, `odd` (only without a mask) and `noisy`; which ones ran, in order."""
    ran = []

    def odd(call):
        if call.mask is not None:
            raise NotImplementedError(f"it knows no mask, and got {type(call.mask).__name__}")
        ran.append("odd")
        return reference.attend(call)

    def noisy(call):
        if isinstance(call.score_mod, SoftCap):
            raise NotImplementedError("it has no cap")
        ran.append("noisy")
        return reference.attend(call)

    def note(call):
        return None if call.mask is None else "the mask becomes a dense bias: nothing is skipped"

    def order(platform, query, key):
        return ("absent", "odd", "noisy", "reference")

    monkeypatch.setitem(IMPLEMENTATIONS, "odd", Implementation(odd))
    monkeypatch.setitem(IMPLEMENTATIONS, "noisy", Implementation(noisy, note))
    monkeypatch.setattr(choice, "order", order)
    return ran


def _attend(**options):
    return jax.eval_shape(functools.partial(attend, **options), X, X, X)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "odd"),
        ({"mask": Causal()}, "noisy"),
        ({"implementation": "noisy"}, "noisy"),
        ({"implementation": ["noisy", "odd"]}, "noisy"),
        ({"implementation": ["odd", "noisy"], "mask": Causal()}, "noisy"),
        ({"implementation": ("noisy", "odd"), "score_mod": SoftCap(2.0)}, "odd"),
    ],
    ids=str,
)
def test_the_first_able_one_runs_and_no_other(ran, options, expected):
    assert _attend(**options).shape == X.shape
    assert ran == [expected]
    ran.clear()
    assert explain(X, X, X, **options).chosen == expected


def test_a_named_one_that_refuses_says_why(ran):
    with pytest.raises(NotImplementedError, match=r"can serve this call: odd: it knows no mask, and got Causal"):
        _attend(implementation="odd", mask=Causal())
    assert ran == []


def test_a_list_whose_every_member_refuses_says_why_of_each(ran):
    with pytest.raises(NotImplementedError, match=r"odd: it knows no mask, .*; noisy: it has no cap"):
        _attend(implementation=["odd", "noisy"], mask=Causal(), score_mod=SoftCap(2.0))
    assert ran == []


def test_an_error_is_no_refusal(ran, monkeypatch):
    def broken(call):
        raise ValueError("broken")

    monkeypatch.setitem(IMPLEMENTATIONS, "odd", Implementation(broken))
    with pytest.raises(ValueError, match="broken"):
        _attend()
    assert ran == []


def test_an_explanation_tells_of_each(ran):
    told = explain(X, X, X, mask=Causal(), sinks=jnp.ones(3), return_lse=True)
    lines = dict(zip(IMPLEMENTATIONS, str(told).splitlines(), strict=True))
    assert lines["reference"] == "   reference  would run"
    assert lines["odd"] == "   odd        refuses: it knows no mask, and got Causal"
    assert lines["noisy"] == "-> noisy      would run (the mask becomes a dense bias: nothing is skipped)"
    assert told.refusals["odd"] == "it knows no mask, and got Causal"
    assert told.refusals["reference"] is None
    assert told.notes["noisy"] == "the mask becomes a dense bias: nothing is skipped"
    assert not {"reference", "odd"} & told.notes.keys()


def test_an_explanation_chooses_none_where_the_call_would_fail(ran):
    told = explain(X, X, X, mask=Causal(), implementation="odd")
    assert told.chosen is None
    assert "->" not in str(told)


def test_an_explanation_computes_nothing_and_takes_shapes():
    huge = jax.ShapeDtypeStruct((64, 2**15, 16, 128), jnp.bfloat16)
    told = explain(huge, huge, huge, mask=Causal(), score_mod=Alibi())
    assert told.refusals["reference"] is None


def test_an_explanation_refuses_what_attend_refuses():
    with pytest.raises(ValueError, match="must be"):
        explain(X, X, X, bias=jnp.ones((3, 3)))
    with pytest.raises(ValueError, match="'nothing' is not one of"):
        explain(X, X, X, implementation="nothing")
    with pytest.raises(TypeError, match="takes the arguments of attend, and foo is none of them"):
        explain(X, X, X, foo=1)
    with pytest.raises(ValueError, match=r"sinks \(5,\) must be \[N\], one logit for each head \(3,\)"):
        explain(X, X, X, sinks=jnp.ones(5))


def test_the_order_of_each_device():
    tiny, long = jnp.ones((1, 1, 1)), jnp.ones((TINY_PAIRS + 1, 1, 1))
    assert choice.order("cpu", tiny, tiny)[:2] == ("xla", "reference")
    assert choice.order("cpu", long, tiny)[0] == "chunked"
    assert choice.order("gpu", tiny, tiny)[:2] == ("cudnn", "chunked")
    assert choice.order("tpu", tiny, tiny)[:2] == ("splash", "chunked")
    assert set(choice.order("gpu", tiny, tiny) + choice.order("tpu", tiny, tiny)) == set(IMPLEMENTATIONS) - {"cached"}
    for platform in ("cpu", "gpu", "tpu"):
        assert choice.order(platform, long, long)[-1] == "reference"


def test_tiny_calls_on_the_cpu_go_to_jax_nn_and_those_that_it_refuses_to_the_reference():
    assert explain(X, X, X, mask=Causal()).chosen == "xla"
    assert explain(X, X, X, mask=Causal(), score_mod=SoftCap(2.0)).chosen == "reference"


def test_the_vendors_of_other_devices_say_so():
    told = explain(X, X, X, mask=Causal())
    assert told.refusals["cudnn"] == "cuDNN runs on a gpu, and this is a cpu"
    assert told.refusals["splash"] == "splash attention runs on a tpu, and this is a cpu"


@pytest.mark.usefixtures("as_users_call_it")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, r"Dropout\(rate, key\), or None; got 0.1"),
        ({"scale": "a"}, "scale must be a number .* got 'a'"),
    ],
)
def test_what_is_of_another_type_is_refused(options, message):
    with pytest.raises(TypeError, match=message):
        attend(X, X, X, **options)
