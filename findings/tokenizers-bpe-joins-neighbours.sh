#!/usr/bin/env bash
# A BPE tokenizer without an unknown token drops an unknown character and merges what stood on both sides of it.
#
# Versions: tokenizers 0.23.3.
#
# Expected: without unk_token, an error for a character that is not in the vocabulary, or at least separate tokens for
#   the text before and after it: no merge may reach over what is not there.
# Seen: the character is removed first and merges are applied to what remains, so "1.5" becomes the one token "15",
#   exactly as the text "15" does. Its offsets are those of "1.", so they miss the "5" too. With unk_token, the
#   neighbours stay apart.
#
# Output:
#   without unk_token  '15'  -> ['15'] [(0, 2)]
#   without unk_token  '1.5' -> ['15'] [(0, 2)]
#   with unk_token     '1.5' -> ['1', '?', '5'] [(0, 1), (1, 2), (2, 3)]
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'tokenizers==0.23.3'

"$folder/venv/bin/python" -I - <<'PYTHON'
from tokenizers import Tokenizer, models, trainers


def trained(unknown):
    """A tokenizer trained on numbers without a point."""
    tokenizer = Tokenizer(models.BPE(unk_token=unknown))
    trainer = trainers.BpeTrainer(vocab_size=10, show_progress=False, special_tokens=[unknown] if unknown else [])
    tokenizer.train_from_iterator(["15"] * 20, trainer)
    return tokenizer


found = {}
for unknown, text in ((None, "15"), (None, "1.5"), ("?", "1.5")):
    encoding = trained(unknown).encode(text)
    found[unknown, text] = encoding.tokens, encoding.offsets
    print(f"{'with' if unknown else 'without'} unk_token".ljust(18), repr(text).ljust(5), "->", *found[unknown, text])

if found[None, "1.5"] != (["15"], [(0, 2)]) or found[None, "15"] != (["15"], [(0, 2)]):
    raise SystemExit(f"changed: without unk_token, '1.5' is now {found[None, '1.5']}, and '15' {found[None, '15']}")
if found["?", "1.5"][0] != ["1", "?", "5"]:
    raise SystemExit(f"changed: with unk_token, '1.5' is now {found['?', '1.5']}")
PYTHON
