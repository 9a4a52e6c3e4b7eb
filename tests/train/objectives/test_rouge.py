"""ROUGE-L against hand cases and every subsequence there is."""

import itertools
import re
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.objectives.rouge import english_rouge_l, is_english, rouge_l, words

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


# Vowel signs and the virama are marks: without them the words of each row are the same letters.
HINDI = [("कल", "काल"), ("दिन", "दीन"), ("पता", "पत्ता"), ("सुख", "सूखा")]


@pytest.mark.parametrize(("first", "second"), HINDI)
def test_different_hindi_words_are_different(first, second):
    assert rouge_l(first, second) == 0
    assert rouge_l(first, first) == 1
    assert words(f"{first}, {second}।") == [first, second]


@pytest.mark.parametrize("text", ["über größere Häuser", "क़लम ज़रूर", "한국어 문장", "été naïve", "Ångström", "בְּרֵאשִׁית"])
def test_the_same_words_in_two_normalisations_are_the_same(text):
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
    assert forms[0] != forms[1] or text == forms[0]
    assert rouge_l(*forms) == rouge_l(*reversed(forms)) == 1
    assert words(forms[0]) == words(forms[1])
    assert len(words(text)) == len(text.split())


@given(st.text(st.characters(codec="utf-8"), max_size=12))
def test_words_do_not_depend_on_the_normalisation(text):
    assert words(unicodedata.normalize("NFC", text)) == words(unicodedata.normalize("NFD", text))


def test_a_mark_is_a_part_of_the_word_that_it_stands_in_and_no_word():
    assert words("a \u2764\ufe0f b\u0308! \u0308") == ["a", "b\u0308"]
    assert words("می\u200cخواهم") == ["می\u200cخواهم"]
    assert words("क्\u200dष") == ["क्\u200dष"]


@given(st.text(st.characters(codec="ascii"), max_size=30))
def test_words_of_ascii_are_runs_of_letters_digits_and_underscores(text):
    assert words(text) == re.findall(r"\w+", text.lower())


@pytest.mark.parametrize(
    ("output", "reference", "scores"),
    [
        # Plain and stemmed, worked out by hand.
        ("the cats are running", "the cat runs", (2 * 1 / 4 * 1 / 3 / (1 / 4 + 1 / 3), 6 / 7)),
        ("file_name", "file name", (1.0, 1.0)),
        ("Returns 2 files.", "returns two files", (2 / 3, 2 / 3)),
        ("größe", "gr", (2 / 3, 2 / 3)),  # its other letters are none, and "e" is a word
        ("कल", "कल", (0.0, 0.0)),
        ("", "a", (0.0, 0.0)),
    ],
)
def test_english_figures_are_those_of_rouge_score(output, reference, scores):
    from rouge_score.rouge_scorer import RougeScorer

    for stemmed, score in zip((False, True), scores, strict=True):
        assert english_rouge_l(output, reference, stemmed=stemmed) == pytest.approx(score)
        theirs = RougeScorer(["rougeL"], use_stemmer=stemmed).score(reference, output)
        assert english_rouge_l(output, reference, stemmed=stemmed) == theirs["rougeL"].fmeasure


@pytest.mark.parametrize(
    ("texts", "english"),
    [
        (["a" * 99 + "é"], True),
        (["a" * 98 + "é"], False),
        (["कल"], False),
        (["1 + 1", "…"], True),
        (["a", "कल"], False),
    ],
)
def test_texts_are_english_where_99_of_a_hundred_letters_are(texts, english):
    assert is_english(texts) == english


def test_rouge_score_is_imported_where_it_is_used_alone():
    script = (
        "import sys, train.objectives.rouge, train.objectives\n"
        "sys.exit('rouge_score' in sys.modules or 'nltk' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
