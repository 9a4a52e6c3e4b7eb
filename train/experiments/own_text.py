r"""Your own text, by a decoder-only Transformer, a recurrent language model, or a masked-token encoder.

Each line or each paragraph is an example. One tenth of the examples is held out for validation and one for the test.

Commands: `python -m train own_text --task.train docs.txt --task.unit paragraph`, with a recurrent model
`python -m train own_text model:recurrent-language-model --task.train docs.txt --task.unit paragraph --run
runs/own_text_recurrent`, and with masked tokens `python -m train own_text model:encoder model.head:masked-tokens
--task.train docs.txt --task.unit paragraph --run runs/own_text_masked`.
To continue a text: `python -m train.complete runs/own_text "Return the "`.
Time: 4 min 22 s on 2 CPU cores (AVX2, float32); other work took more than half of the CPU time.
Result: with the first command, perplexity 107.3 and 2.68 bits per character on 784 held-out paragraphs (seed 0, 200
updates). The text is the docstrings of the Python 3.11 standard library. This program writes it::

    import ast, pathlib, sysconfig
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_bytes()))]
    documented = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module)]
    pathlib.Path("docs.txt").write_text("\n\n".join(ast.get_docstring(node) or "" for node in documented))
"""

from pathlib import Path

from seqattn.models import LanguageModelConfig, Rotary
from seqattn.nn import BlockConfig
from train.config import FROM_TOKENIZER, Experiment
from train.data.batches import Batches
from train.data.tokenizer import ByteLevelBPE
from train.tasks import TextFiles
from train.update.optimizer import Optimizer
from train.update.schedules import Cosine

OWN_TEXT = Experiment(
    task=TextFiles(),
    model=LanguageModelConfig(
        FROM_TOKENIZER,
        num_layers=2,
        block=BlockConfig(model_dim=96, hidden_dim=384, num_heads=4, norm_first=True, dropout_rate=0.1),
        positions=Rotary(),
    ),
    run=Path("runs/own_text"),
    tokenizer=ByteLevelBPE(vocab_size=1000),
    batches=Batches(tokens=4096, max_length=512, buckets=2),
    optimizer=Optimizer(schedule=Cosine(peak=3e-3, warmup_steps=50)),
    steps=200,
    evaluate_every=100,
)
