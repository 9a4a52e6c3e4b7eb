"""All implementations compute the same, where torch and transformers are installed, by the extra `bench`."""

from dataclasses import asdict, replace

import pytest

from benchmarks.bench.marian import Sizes
from benchmarks.bench.record import CHECKED
from benchmarks.training.case import TrainingCase
from benchmarks.training.implementations import FORWARD, GRADIENT, NAMES, PARTS, PEERS, UPDATE
from benchmarks.training.measurement import TrainingPlan, measure

SIZES = Sizes(num_layers=1, model_dim=12, hidden_dim=7, num_heads=2, vocab_size=53, source_length=5)
CASE = TrainingCase("tiny", SIZES, target_length=8, rows=11, dropout_rate=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_parts_compute_what_updates_do(name):
    for module in {"transformers": ("torch", "transformers"), "torch": ("torch",)}.get(name, ()):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install -e .[test,bench]")
    case, weights = replace(CASE, dropout_rate=0.0), CASE.weights()
    programs = {part: NAMES[name](case, weights, part) for part in PARTS}
    (wanted, _), found = programs[UPDATE].arrays(programs[UPDATE].run()), programs[FORWARD].run()
    assert float(found) == pytest.approx(float(wanted))
    assert float(programs[FORWARD].run()) == float(found), "nothing is updated"
    losses = [programs[GRADIENT].run() for _ in range(2)]
    assert [float(x[0] if name == "seqattn" else x) for x in losses] == pytest.approx([float(wanted)] * 2)


@pytest.mark.slow
def test_real_peers_compute_the_same():
    """Where they are installed, by the extra `bench`."""
    for module in PEERS:
        pytest.importorskip(module, reason=f"{module} is not installed: pip install -e .[test,bench]")
    (rows,) = measure(TrainingPlan([CASE], tuple(NAMES), rounds=0, memory=False))
    assert {row.implementation: row.status for row in rows} == dict.fromkeys(NAMES, CHECKED)
    assert [asdict(row.beginning) for row in rows] == [pytest.approx(asdict(rows[0].beginning), rel=1e-5)] * 3


@pytest.mark.slow
def test_torch_drops_where_ours_does():
    """Embeddings, and two sublayers of the encoder's layer and three of the decoder's."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e .[test,bench]")
    from benchmarks.training.torch_transformer import torch_transformer

    network = torch_transformer(CASE.config, CASE.weights())
    dropouts = [module.p for module in network.modules() if isinstance(module, torch.nn.Dropout) and module.p]
    assert dropouts == [CASE.dropout_rate] * (1 + 2 + 3)
    attentions = [module for module in network.modules() if isinstance(module, torch.nn.MultiheadAttention)]
    assert [module.dropout for module in attentions] == [0, 0, 0]
