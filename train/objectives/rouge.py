"""ROUGE-L (Lin 2004) by Google's package `rouge-score`: the overlap of an output and a reference in the same order.

There are two variants because `rouge-score` by itself drops all letters except a to z. `rouge_l` works in every script.
`english_rouge_l` uses the words of `rouge-score`, so its values can be compared with published ones.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

_ASCII = re.compile(r"[A-Za-z]")
_JOINERS = "\u200c\u200d"
_SHARE = 0.99


def rouge_l(output: str, reference: str) -> float:
    """Computes the F-measure of the longest common subsequence of words, 0 to 1.

    See Lin 2004, equations 2 to 4, with beta 1. `words` defines the words, in any script.

    >>> round(rouge_l("Return the open file", "Return an open file object."), 4)
    0.6667
    """
    return _measured(_by_words(), output, reference)


def english_rouge_l(output: str, reference: str, *, stemmed: bool) -> float:
    """Computes ROUGE-L as papers on English report it, 0 to 1.

    Words are runs of the letters a to z and digits, in lower case.

    Args:
        output: the text of the model.
        reference: the correct text.
        stemmed: if True, Porter's stemmer is applied to words of four letters or more.

    >>> [round(english_rouge_l("opened files", "opens a file", stemmed=stemmed), 4) for stemmed in (False, True)]
    [0.0, 0.8]
    """
    return _measured(_english(stemmed), output, reference)


def is_english(texts: Sequence[str]) -> bool:
    """Whether at least 99 % of the letters are a to z; `english_rouge_l` ignores all others.

    >>> is_english(["Return the file.", "Größe"]), is_english(["Return the file."])
    (False, True)
    """
    letters = "".join(filter(str.isalpha, "".join(texts)))
    return len(_ASCII.findall(letters)) >= _SHARE * len(letters)


def words(text: str) -> list[str]:
    r"""Splits a text into runs of letters, digits and underscores with their combining marks, in lower case and NFC.

    A combining mark or a zero-width joiner belongs to the word around it, and is dropped outside words. In a script
    without spaces, each run of letters is one word.

    >>> words("Returns the OPEN_FILE, u\u0308ber 2!")
    ['returns', 'the', 'open_file', 'über', '2']
    """
    shown, inside = [], False
    # NFC twice, as lower-casing can undo it.
    for letter in unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower()):
        inside = letter.isalnum() or letter == "_" or (inside and _is_mark(letter))
        shown.append(letter if inside else " ")
    return "".join(shown).split()


def _is_mark(letter: str) -> bool:
    return letter in _JOINERS or unicodedata.category(letter).startswith("M")


class _Words:
    """A tokenizer with the interface of `rouge-score`."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def _measured(scorer: Any, output: str, reference: str) -> float:
    return float(scorer.score(reference, output)["rougeL"].fmeasure)


@cache
def _by_words() -> Any:
    return _scorer(tokenizer=_Words())


@cache
def _english(stemmed: bool) -> Any:
    return _scorer(use_stemmer=stemmed)


def _scorer(**settings: Any) -> Any:
    # Imported here because it is slow: it imports nltk, though ROUGE-L needs none of its data.
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"], **settings)
