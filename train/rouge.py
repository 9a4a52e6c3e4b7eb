"""ROUGE-L, how much of a reference an output says in the same order (Lin 2004)."""

import re

_WORD = re.compile(r"\w+")


def rouge_l(output: str, reference: str) -> float:
    """The F measure of the longest common subsequence of words (Lin 2004, equations 2 to 4 with beta 1), 0 to 1.

    Words are runs of letters, digits and underscores, in lower case.

    >>> rouge_l("Return the open file", "Return an open file object.")
    0.6666666666666666
    """
    said, wanted = (_WORD.findall(text.lower()) for text in (output, reference))
    common = _longest_common(said, wanted)
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def _longest_common(first: list[str], second: list[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for column, other in enumerate(second, 1):
            above = row[column]
            row[column] = diagonal + 1 if word == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]
