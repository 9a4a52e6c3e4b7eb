"""ROUGE-L against hand cases and every subsequence there is."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.rouge import rouge_l

TEXTS = st.lists(st.sampled_from("abc"), max_size=6).map(" ".join)


def brute_force(first, second):
    """The longest of all subsequences of the first that are one of the second."""

    def subsequences(words):
        return {chosen for size in range(len(words) + 1) for chosen in itertools.combinations(words, size)}

    return max(map(len, subsequences(first.split()) & subsequences(second.split())))


@pytest.mark.parametrize(
    ("output", "reference", "score"),
    [
        # Lin 2004, section 3.1: "police killed the gunman" against two candidates.
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("Returns the FILE, now!", "returns the file now", 1.0),
        ("a b c d e", "a c e", 2 * (3 / 5) * (3 / 3) / (3 / 5 + 3 / 3)),
        ("a_b c-d", "a_b c d", 1.0),
        ("größe", "Größe", 1.0),
        ("a b", "c d", 0.0),
        ("", "", 0.0),
        ("", "a", 0.0),
        ("...", "...", 0.0),
    ],
)
def test_hand_cases(output, reference, score):
    assert rouge_l(output, reference) == pytest.approx(score)


@given(TEXTS, TEXTS)
def test_it_is_the_f_measure_of_the_longest_common_subsequence(output, reference):
    common, sizes = brute_force(output, reference), (len(output.split()), len(reference.split()))
    if not common:
        assert rouge_l(output, reference) == 0
        return
    precision, recall = (common / size for size in sizes)
    assert rouge_l(output, reference) == pytest.approx(2 * precision * recall / (precision + recall))


@given(TEXTS, TEXTS)
def test_it_is_symmetric_and_one_for_equal_texts_alone(first, second):
    assert rouge_l(first, second) == rouge_l(second, first)
    assert (rouge_l(first, second) == 1) == (first == second != "")
