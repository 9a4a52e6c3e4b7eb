"""Files of vectors as they are published, damaged ones, and what a model then sees."""

import gzip
import logging
import unicodedata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.nn import TokenEmbedding
from train.data.word_vectors import as_rows, load_table

GLOVE = "the 0.5 -1 2e-3\nchat 1 2 3\n. . 4 5 6\n"
TOKENS = ["[PAD]", "chat", ". .", "dog", "the"]
TABLE = [[0, 0, 0], [1, 2, 3], [4, 5, 6], [0, 0, 0], [0.5, -1, 2e-3]]
FOUND = [False, True, True, False, True]


@pytest.fixture
def written(tmp_path):
    def write(text, name="vectors.txt"):
        path = tmp_path / name
        data = text.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


@pytest.mark.parametrize("name", ["glove.txt", "glove.txt.gz"])
def test_glove_has_no_first_line_and_words_with_spaces(written, name):
    table, found = load_table(written(GLOVE, name), TOKENS, 3)
    np.testing.assert_array_equal(table, np.array(TABLE, np.float32), strict=True)
    np.testing.assert_array_equal(found, FOUND)


def test_word2vec_has_a_first_line_and_spaces_at_the_ends_of_lines(written):
    path = written("2 3\nthe 0.5 -1 2e-3 \nchat 1 2 3 \n")
    table, found = load_table(path, ["chat", "2", "the"], 3)
    np.testing.assert_array_equal(table, np.array([TABLE[1], TABLE[0], TABLE[4]], np.float32))
    np.testing.assert_array_equal(found, [True, False, True])


def test_words_are_told_apart_by_the_plain_space_alone(written):
    table, _ = load_table(written("a\u00a0b 1 2\n\u0085 3 4\n"), ["\u0085", "a\u00a0b"], 2)
    np.testing.assert_array_equal(table, [[3, 4], [1, 2]])


@pytest.mark.parametrize(("file", "token"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_words_are_compared_after_normalisation(file, token, written):
    word = [unicodedata.normalize(form, "größer") for form in (file, token)]
    table, found = load_table(written(f"a 1 2\n{word[0]} 3 4\n"), ["b", word[1]], 2)
    np.testing.assert_array_equal(table, [[0, 0], [3, 4]])
    assert found.tolist() == [False, True]


def test_of_a_word_that_occurs_twice_the_first_line_counts(written, caplog):
    with caplog.at_level(logging.WARNING):
        table, _ = load_table(written("a 1 2\nb 3 4\na 5 6\na 7 8\nc 0 0\nc 0 0\n"), ["a", "b"], 2)
    np.testing.assert_array_equal(table, [[1, 2], [3, 4]])
    assert "ignored 2 lines of repeated words" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a 1 2 3\nb 1 2\n", r"txt:2: 2 values, not dim \(3\): 'b 1 2'"),
        ("a 1 2 3\nb 1 2 3 4\n", r"txt:2: 4 values, not dim \(3\)"),
        ("a 1 2 3 4\n", r"txt:1: 4 values, not dim \(3\)"),
        ("1 3\na b 1 2 3\n", r"txt:2: 4 values, not dim \(3\)"),
        ("a 1 2 3\n\n", r"txt:2: 0 values, not dim \(3\)"),
        ("7 5\na 1 2 3\n", r"txt:1: the vectors of the file have 5 values, not dim \(3\)"),
        ("2 3\na 1 2 3\n", r"txt:2: the file ends after 1 words, not 2"),
        ("1 3\na 1 2 3\nb 1 2 3\n", r"txt:3: the file ends after 2 words, not 1"),
        ("", r"txt:0: the file ends after 0 words, not one or more"),
        ("b 1 2 3\na 1 x 3\n", r"txt:2: 'x' in the vector of 'a' is not a finite number"),
        ("a 1 nan 3\n", r"txt:1: 'nan' in the vector of 'a' is not a finite number"),
        ("a 1 2 -inf\n", r"txt:1: '-inf' in the vector of 'a' is not a finite number"),
        ("a 1 2 1e39\n", r"txt:1: '1e39' in the vector of 'a' is not a finite number"),
        ("a 1  3\n", r"txt:1: '' in the vector of 'a' is not a finite number"),
    ],
)
def test_damage_names_file_and_line(written, text, message):
    with pytest.raises(ValueError, match=message):
        load_table(written(text), ["a"], 3)


def test_equal_tokens_get_the_same_vector(written):
    table, found = load_table(written(GLOVE), ["chat", "the", "chat"], 3)
    np.testing.assert_array_equal(table, np.array([TABLE[1], TABLE[4], TABLE[1]], np.float32))
    assert found.all()


def test_vectors_without_values_are_refused(written):
    with pytest.raises(ValueError, match=r"dim \(0\) must be an integer of at least 1"):
        load_table(written(GLOVE), ["a"], 0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_the_model_sees_the_vectors_of_the_file(written, dtype, tolerance):
    embedding = TokenEmbedding(5, 3, param_dtype=dtype, rngs=nnx.Rngs(0))
    before = np.asarray(embedding(jnp.arange(5)))
    table = embedding.table[...]
    rows, found = as_rows(*load_table(written(GLOVE), TOKENS, 3), table)
    embedding.table[...] = jnp.where(found[:, None], rows, table)
    seen = embedding(jnp.arange(5))
    assert seen.dtype == dtype
    expected = np.where(np.array(FOUND)[:, None], TABLE, before.astype(np.float32))
    np.testing.assert_allclose(seen.astype(jnp.float32), expected, rtol=tolerance)


def test_vectors_that_do_not_fit_are_refused():
    like = jax.ShapeDtypeStruct((5, 3), jnp.float32)
    with pytest.raises(ValueError, match=r"vectors \[5, 2\] and found \[5\] must fit the model's table \[5, 3\]"):
        as_rows(np.zeros((5, 2), np.float32), np.zeros(5, bool), like)
