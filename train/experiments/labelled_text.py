r"""Labels of your own texts, or of each of their characters, by a Transformer encoder.

Each line of the file is a text, a tab and its label. Labels of characters are a string as long as the text.

Commands: `python -m train labelled_text --task.train topics.tsv`, and with a label for each character
`python -m train labelled_text --task.train words.tsv --task.labels character tokenizer:characters
model.head:token-labels --steps 600 --optimizer.schedule.peak 4e-3 --run runs/labelled_text_words`.
Time: 3 min 6 s and 2 min 7 s on 2 CPU cores (AVX2, float32); other work took more than half of the CPU time.
Result: 83.5 % accuracy on 115 held-out texts (seed 0, at most 200 updates), and 93.1 % on the characters of 1,572
held-out lines (600 updates). The texts are docstrings of five packages of the Python 3.11 standard library, and the
label is the package. The lines are docstring lines of the other files without their spaces, and the labels mark the
ends of words, which are 18.3 % of the characters. This program writes both files::

    import ast, pathlib, sysconfig
    library, kinds = pathlib.Path(sysconfig.get_path("stdlib")), ast.FunctionDef | ast.ClassDef | ast.Module
    def docs(file):
        return [ast.get_docstring(n) or "" for n in ast.walk(ast.parse(file.read_bytes())) if isinstance(n, kinds)]
    topics = [(doc, topic) for topic in ("asyncio", "email", "importlib", "unittest", "xml")
              for file in sorted(library.glob(f"{topic}/**/*.py")) for doc in docs(file) if doc]
    pathlib.Path("topics.tsv").write_text("".join(" ".join(doc.split()) + f"\t{topic}\n" for doc, topic in topics))
    lines = {line for file in library.glob("*.py") for doc in docs(file) for line in doc.splitlines()}
    shown = sorted(" ".join(line.split()) for line in lines if line.isascii() and line.strip())
    words = [(line.replace(" ", ""), ["." * (len(word) - 1) + "|" for word in line.split()]) for line in shown]
    pathlib.Path("words.tsv").write_text("".join(f"{line}\t{''.join(ends)}\n" for line, ends in words))
"""

from pathlib import Path

from seqattn.models import EncoderConfig, Rotary, TextLabels
from seqattn.nn import BlockConfig
from train.config import FROM_DATA, FROM_TOKENIZER, Experiment
from train.data.batches import Batches
from train.data.tokenizer import ByteLevelBPE
from train.tasks import LabelledFiles
from train.update.optimizer import Optimizer
from train.update.schedules import Cosine

LABELLED_TEXT = Experiment(
    task=LabelledFiles(),
    model=EncoderConfig(
        FROM_TOKENIZER,
        num_layers=2,
        block=BlockConfig(model_dim=64, hidden_dim=256, num_heads=4, norm_first=True, dropout_rate=0.2),
        positions=Rotary(),
        head=TextLabels(FROM_DATA),
    ),
    run=Path("runs/labelled_text"),
    tokenizer=ByteLevelBPE(vocab_size=1000),
    batches=Batches(tokens=4096, max_length=512, buckets=2),
    optimizer=Optimizer(schedule=Cosine(peak=2e-3, warmup_steps=50)),
    steps=200,
    evaluate_every=50,
    patience=2,
    keep_checkpoints=3,
)
