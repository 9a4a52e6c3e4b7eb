"""All families that can be converted, by their `model_type`."""

from collections.abc import Mapping

from seqattn.interop.huggingface.bart import BART
from seqattn.interop.huggingface.bert import BERT
from seqattn.interop.huggingface.distilbert import DISTILBERT
from seqattn.interop.huggingface.family import Family
from seqattn.interop.huggingface.gemma2 import GEMMA2
from seqattn.interop.huggingface.gpt2 import GPT2
from seqattn.interop.huggingface.llama import LLAMA
from seqattn.interop.huggingface.m2m_100 import M2M_100
from seqattn.interop.huggingface.marian import MARIAN
from seqattn.interop.huggingface.mbart import MBART
from seqattn.interop.huggingface.mistral import MISTRAL
from seqattn.interop.huggingface.pegasus import PEGASUS
from seqattn.interop.huggingface.qwen import QWEN2, QWEN3
from seqattn.interop.huggingface.roberta import ROBERTA
from seqattn.interop.huggingface.t5 import MT5, T5

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        *(BART, MARIAN, MBART, M2M_100, PEGASUS, T5, MT5),
        *(BERT, DISTILBERT, ROBERTA),
        *(GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2),
    )
}
"""The families, each a file of its own."""
