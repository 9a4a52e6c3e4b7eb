#!/usr/bin/env bash
# transformers writes that the logits of a T5 1.1 are tied to its token table, beside the table of their own that it
# writes for them; and the field that its warning advises to set is overwritten when a config is read.
#
# Versions: transformers 5.24.0, torch 2.13.0, Python 3.11 and newer.
#
# Expected: a checkpoint whose config says tie_word_embeddings false, and which holds its own lm_head.weight (as those
#   of T5 1.1, Flan-T5 and mT5 do), is saved again with false; and with false there is nothing to warn of.
# Seen: T5Config and MT5Config set tie_word_embeddings to true whatever the file says. The model keeps both tables,
#   as they differ, and warns: "You should update the config with `tie_word_embeddings=False` to silence this warning",
#   though the config that it has just read says false. Saved again, the config says true beside two different tables.
#   A reader that believes the config computes other logits.
#
# Output:
#   in the file: tie_word_embeddings False
#   in memory: tie_word_embeddings True, tables equal: False, advises to set it to False: True
#   saved again: tie_word_embeddings True, tables equal: False
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'torch==2.13.0' 'numpy==2.4.6'
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'transformers==5.24.0'

cd "$folder"
"$folder/venv/bin/python" -I - <<'PYTHON'
import json
import logging
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration
from transformers.utils import logging as hf_logging

heard = []


class Heard(logging.Handler):
    def emit(self, record):
        heard.append(record.getMessage())


hf_logging.disable_progress_bar()
hf_logging.disable_default_handler()
hf_logging.add_handler(Heard())

# A checkpoint in the form of T5 1.1: gated, with a table of its own for the logits, and a config that says so.
torch.manual_seed(0)
sizes = dict(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
first = Path("first")
T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(first)
arrays = load_file(first / "model.safetensors")
arrays["lm_head.weight"] = torch.randn(11, 8)
save_file(arrays, first / "model.safetensors", metadata={"format": "pt"})
config = json.loads((first / "config.json").read_text())
config.pop("scale_decoder_outputs", None)
config["tie_word_embeddings"] = False
(first / "config.json").write_text(json.dumps(config))
print("in the file: tie_word_embeddings", config["tie_word_embeddings"])

heard.clear()
model = T5ForConditionalGeneration.from_pretrained(first)
advised = any("tie_word_embeddings=False" in message for message in heard)
in_memory = model.config.tie_word_embeddings, torch.equal(model.shared.weight, model.lm_head.weight), advised
print(f"in memory: tie_word_embeddings {in_memory[0]}, tables equal: {in_memory[1]},", end=" ")
print(f"advises to set it to False: {in_memory[2]}")

model.save_pretrained("second")
arrays = load_file("second/model.safetensors")
config = json.loads(Path("second/config.json").read_text())
saved = config["tie_word_embeddings"], torch.equal(arrays["shared.weight"], arrays["lm_head.weight"])
print(f"saved again: tie_word_embeddings {saved[0]}, tables equal: {saved[1]}")

if (in_memory, saved) != ((True, False, True), (True, False)):
    raise SystemExit(f"changed: in memory {in_memory}, saved again {saved}")
PYTHON
