"""ROUGE-L, how much of a reference an output says in the same order (Lin 2004), by Google's package `rouge-score`."""

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

_ASCII = re.compile(r"[A-Za-z]")
_JOINERS = "\u200c\u200d"
_SHARE = 0.99


def rouge_l(output: str, reference: str) -> float:
    """The F measure of the longest common subsequence of words (Lin 2004, equations 2 to 4 with beta 1), 0 to 1.

    What a word is says `words`, in any script.

    >>> round(rouge_l("Return the open file", "Return an open file object."), 4)
    0.6667
    """
    return _measured(_by_words(), output, reference)


def english_rouge_l(output: str, reference: str, *, stemmed: bool) -> float:
    """ROUGE-L as papers on English report it, 0 to 1: words are runs of the letters a to z and digits, in lower case.

    Args:
        output: what was said.
        reference: what was wanted.
        stemmed: Porter's stemmer cuts the ends of words of four letters or more.

    >>> [round(english_rouge_l("opened files", "opens a file", stemmed=stemmed), 4) for stemmed in (False, True)]
    [0.0, 0.8]
    """
    return _measured(_english(stemmed), output, reference)


def is_english(texts: Sequence[str]) -> bool:
    """Whether of a hundred letters at least 99 are a to z: `english_rouge_l` does not see any other.

    >>> is_english(["Return the file.", "Größe"]), is_english(["Return the file."])
    (False, True)
    """
    letters = "".join(filter(str.isalpha, "".join(texts)))
    return len(_ASCII.findall(letters)) >= _SHARE * len(letters)


def words(text: str) -> list[str]:
    r"""Runs of letters, digits and underscores with their combining marks, in lower case and NFC.

    A mark or a joiner is a part of the word that it stands in, and of none elsewhere. Texts of a script without spaces
    have a word for each run of its letters.

    >>> words("Returns the OPEN_FILE, u\u0308ber 2!")
    ['returns', 'the', 'open_file', 'über', '2']
    """
    shown, inside = [], False
    for letter in unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower()):
        inside = letter.isalnum() or letter == "_" or (inside and _is_mark(letter))
        shown.append(letter if inside else " ")
    return "".join(shown).split()


def _is_mark(letter: str) -> bool:
    return letter in _JOINERS or unicodedata.category(letter).startswith("M")


class _Words:
    """The tokenizer that `rouge-score` asks for."""

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
    from rouge_score import rouge_scorer  # slow to import, as it brings nltk, whose data it does not need

    return rouge_scorer.RougeScorer(["rougeL"], **settings)
