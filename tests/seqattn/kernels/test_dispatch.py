"""Which implementation runs, and what is said of it: with kernels that only count and refuse."""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.attention import attend
from seqattn.coordinates import Coordinates
from seqattn.kernels import dispatch, reference
from seqattn.kernels.dispatch import IMPLEMENTATIONS, TINY_PAIRS, Implementation, explain
from seqattn.masks import Causal, SameSegment, SlidingWindow
from seqattn.score_mods import Alibi, SoftCap

X = jnp.ones((2, 7, 3, 5))


@pytest.fixture
def ran(monkeypatch):
    """Two kernels beside the reference, `odd` (only without a mask) and `noisy`; which ones ran, in order."""
    ran = []

    def no_mask(call):
        if call.mask is not None:
            raise NotImplementedError(f"it knows no mask, and got {type(call.mask).__name__}")

    def no_cap(call):
        if isinstance(call.score_mod, SoftCap):
            raise NotImplementedError("it has no cap")

    def kernel(name, refuse):
        def attend(call):
            refuse(call)
            ran.append(name)
            return reference.attend(call)

        return attend

    def note(call):
        return None if call.mask is None else "the mask becomes a dense bias: nothing is skipped"

    def order(platform, query, key):
        return ("absent", "odd", "noisy", "reference")

    monkeypatch.setitem(IMPLEMENTATIONS, "odd", Implementation(kernel("odd", no_mask), no_mask))
    monkeypatch.setitem(IMPLEMENTATIONS, "noisy", Implementation(kernel("noisy", no_cap), no_cap, note))
    monkeypatch.setattr(dispatch, "order", order)
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


def test_a_kernel_that_refuses_as_it_computes_is_passed_over_and_explained(ran, monkeypatch):
    """One function is enough for a kernel: what it raises while JAX traces it is its refusal."""

    def late(call):
        if call.mask is not None:
            raise NotImplementedError("it computes without a mask")
        return reference.attend(call)

    monkeypatch.setitem(IMPLEMENTATIONS, "odd", Implementation(late))
    told = explain(X, X, X, mask=Causal())
    assert told.chosen == "noisy"
    assert told.refusals["odd"] == "it computes without a mask"
    for call in (jax.jit(attend, static_argnames="mask"), attend):
        ran.clear()
        call(X, X, X, mask=Causal())
        assert ran == ["noisy"]


@jax.custom_jvp
def _chosen(table, index):
    return table[index]


_chosen.defjvp(lambda primals, tangents: (_chosen(*primals), tangents[0][primals[1]]))


@pytest.mark.parametrize(
    "fn",
    [
        lambda table, distance: jax.random.uniform(jax.random.fold_in(jax.random.key(3), distance)),
        lambda table, distance: jax.lax.cond(distance > 0, lambda x, y: x, lambda x, y: y, table, 2 * table)[0],
        _chosen,
    ],
    ids=["random", "branches_of_arrays", "rule_of_an_array"],
)
def test_what_no_device_kernel_takes_runs_here_inside_jit(fn):
    """A traced call asks the kernels of every platform, whose refusals must be refusals."""
    x = jax.ShapeDtypeStruct((1, 128, 2, 8), jnp.float32)
    table = jnp.ones(3)

    def score(score, query, key, head):
        return score + fn(table, query.position - key.position)

    assert jax.eval_shape(lambda x: attend(x, x, x, score_mod=score), x).shape == x.shape


# Long enough for tiles on the CPU, of the dtype and head dim of cuDNN, and of the lengths of splash attention.
ANYWHERE = jnp.ones((1, 128, 2, 8), jnp.bfloat16)
PROGRAMS = {"cpu": [], "cuda": ["__cudnn$fmha"], "tpu": ["tpu_custom_call"]}
CHOSEN = {"cpu": "chunked", "gpu": "cudnn", "tpu": "tpu"}


@pytest.mark.parametrize("gradient", [False, True])
def test_the_choice_follows_the_platform_that_a_program_is_lowered_for(monkeypatch, gradient):
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)

    def loss(x):
        return attend(x, x, x, mask=Causal()).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss) if gradient else loss).trace(ANYWHERE)
    programs = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in PROGRAMS}
    vendors = [*PROGRAMS["cuda"], *PROGRAMS["tpu"]]
    assert {name: [each for each in vendors if each in text] for name, text in programs.items()} == PROGRAMS
    chosen = {name: explain(ANYWHERE, ANYWHERE, ANYWHERE, mask=Causal(), platform=name).chosen for name in CHOSEN}
    assert chosen == CHOSEN


def test_what_is_exported_for_several_platforms_holds_each_and_runs_here():
    exported = jax.export.export(jax.jit(lambda x: attend(x, x, x, mask=Causal())), platforms=("cpu", "tpu"))(ANYWHERE)
    np.testing.assert_array_equal(exported.call(ANYWHERE), attend(ANYWHERE, ANYWHERE, ANYWHERE, mask=Causal()))
    assert "tpu_custom_call" in exported.mlir_module()


def test_named_ones_are_chosen_by_platform_too_and_refused_where_this_one_has_none():
    traced = jax.jit(lambda x: attend(x, x, x, implementation=("splash", "reference"))).trace(ANYWHERE)
    assert "splash" in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "splash" not in traced.lower(lowering_platforms=("cpu",)).as_text()
    with pytest.raises(NotImplementedError, match="splash attention runs on a tpu, and this is a cpu"):
        jax.jit(lambda x: attend(x, x, x, implementation="splash")).trace(ANYWHERE)


def test_what_another_platform_would_compute_changes_nothing_here():
    """The kernel for TPUs is traced beside that for the CPU: in gradients, under `jax.vmap`, strict dtypes, a mesh."""

    def loss(x):
        return attend(x, x, x, mask=Causal()).astype(jnp.float32).sum()

    expected = jax.grad(lambda x: attend(x, x, x, mask=Causal(), implementation="chunked").astype(jnp.float32).sum())
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(ANYWHERE), expected(ANYWHERE))
    np.testing.assert_array_equal(jax.jit(jax.vmap(jax.grad(loss)))(ANYWHERE[None])[0], expected(ANYWHERE))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.PartitionSpec("data")
    mapped = jax.shard_map(lambda x: attend(x, x, x, mask=Causal()), mesh=mesh, in_specs=split, out_specs=split)
    np.testing.assert_array_equal(
        jax.jit(jax.grad(lambda x: mapped(x).astype(jnp.float32).sum()))(ANYWHERE), expected(ANYWHERE)
    )


KERNEL = '''"""Every query gets the mean of all values."""

import jax.numpy as jnp


def attend(call):
    if call.mask is not None:
        raise NotImplementedError("a mean knows no mask")
    group = call.query.shape[2] // call.value.shape[2]
    mean = jnp.repeat(call.value.mean(axis=1, keepdims=True), group, axis=2)
    output = jnp.broadcast_to(mean, (*call.query.shape[:3], mean.shape[-1]))
    return output.astype(call.query.dtype), jnp.zeros(call.query.shape[:3], call.high)
'''


def test_a_new_kernel_is_one_file_and_one_line(tmp_path, monkeypatch):
    (tmp_path / "mean_kernel.py").write_text(KERNEL, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(IMPLEMENTATIONS, "mean", Implementation(importlib.import_module("mean_kernel").attend))
    value = jax.random.normal(jax.random.key(0), (2, 5, 3, 7))
    for call in (attend, jax.jit(attend, static_argnames="implementation")):
        found = call(jnp.ones((2, 4, 6, 2)), jnp.ones((2, 5, 3, 2)), value, implementation="mean")
        np.testing.assert_allclose(found, jnp.broadcast_to(value.mean(1)[:, None].repeat(2, 2), found.shape), rtol=1e-6)
    with pytest.raises(NotImplementedError, match="mean: a mean knows no mask"):
        attend(X, X, X, mask=Causal(), implementation="mean")
    told = explain(X, X, X, mask=Causal(), implementation=("mean", "reference"))
    assert told.refusals["mean"] == "a mean knows no mask"
    assert told.chosen == "reference"


def test_an_explanation_tells_of_each(ran):
    told = explain(X, X, X, mask=Causal(), sinks=jnp.ones(3), return_lse=True)
    lines = dict(zip(IMPLEMENTATIONS, str(told).splitlines(), strict=True))
    assert lines["reference"] == "   reference      would run"
    assert lines["odd"] == "   odd            refuses: it knows no mask, and got Causal"
    assert lines["noisy"] == "-> noisy          would run (the mask becomes a dense bias: nothing is skipped)"
    assert told.refusals["odd"] == "it knows no mask, and got Causal"
    assert told.refusals["reference"] is None
    assert told.notes["noisy"] == "the mask becomes a dense bias: nothing is skipped"
    assert not {"reference", "odd"} & told.notes.keys()


def test_an_explanation_tells_the_tiles_that_a_mask_leaves():
    x, narrow = jax.ShapeDtypeStruct((1, 2048, 2, 8), jnp.float32), Causal() & SlidingWindow(512)
    for name, platform in (("chunked", "cpu"), ("tpu", "tpu")):
        notes = [explain(x, x, x, mask=mask, platform=platform).notes[name] for mask in (None, Causal(), narrow)]
        shares = [float(re.search(r"visits ([\d.]+)% of the tiles", note)[1]) for note in notes]
        assert shares[0] == 100 > shares[1] > shares[2]
    # To list all tiles of a very long text would take long, and much memory.
    long = jax.ShapeDtypeStruct((1, 2**21, 2, 8), jnp.float32)
    assert "chunked" not in explain(long, long, long, platform="tpu").notes
    # An array would have to be read.
    assert not {"chunked", "tpu"} & explain(x, x, x, mask=jnp.ones((2048, 2048), bool), platform="tpu").notes.keys()
    # Segments that only the program knows say nothing of the tiles yet.
    segment = jax.ShapeDtypeStruct((1, 2048), jnp.int32)

    def noted(segment):
        at = Coordinates.from_segments(segment)
        return explain(x, x, x, mask=SameSegment(), q_at=at, kv_at=at, platform="tpu").notes["tpu"]

    told = []
    jax.eval_shape(lambda segment: told.append(noted(segment)), segment)
    assert told == ["finds out at run time which tiles of 512 queries and 512 keys to visit"]


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
    with pytest.raises(TypeError, match="takes the arguments of attend, which has no foo"):
        explain(X, X, X, foo=1)
    with pytest.raises(ValueError, match=r"sinks \(5,\) must be \[N\], one logit for each head \(3,\)"):
        explain(X, X, X, sinks=jnp.ones(5))


def test_the_order_of_each_device():
    tiny, long = jnp.ones((1, 1, 1)), jnp.ones((TINY_PAIRS + 1, 1, 1))
    assert dispatch.order("cpu", tiny, tiny)[:2] == ("xla", "reference")
    assert dispatch.order("cpu", long, tiny)[0] == "chunked"
    assert dispatch.order("gpu", tiny, tiny)[:2] == ("cudnn", "xla")
    assert dispatch.order("gpu", long, tiny)[:2] == ("cudnn", "chunked")
    assert dispatch.order("tpu", tiny, tiny) == dispatch.order("cpu", tiny, tiny)
    assert dispatch.order("tpu", long, tiny)[:3] == ("tpu", "splash", "chunked")
    everywhere = dispatch.order("gpu", long, tiny) + dispatch.order("tpu", long, tiny)
    assert set(everywhere) == set(IMPLEMENTATIONS) - {"cached", "tpu_cached", "hopper", "hopper_cached", "tokamax"}
    for platform in ("cpu", "gpu", "tpu"):
        assert dispatch.order(platform, long, long)[-1] == "reference"


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


def test_explain_refuses_a_platform_that_it_does_not_know():
    with pytest.raises(ValueError, match=r"platform \('cuda'\) must be one of cpu, gpu, tpu"):
        explain(*[jnp.ones((3, 1, 2))] * 3, platform="cuda")
