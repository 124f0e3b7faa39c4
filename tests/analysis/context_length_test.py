"""Losses by context length and position are those of each window on its own, or of one long one."""

import math

import numpy as np
import pytest

from ssm_moe.analysis import context_length
from ssm_moe.analysis.context_length import ByPosition, LongDocuments
from ssm_moe.data.sources import TextSource
from ssm_moe.data.synthetic import SyntheticTask
from ssm_moe.data.token_files import TokenFolder
from ssm_moe.data.tokenizer import ByteTokenizer
from ssm_moe.errors import UserError
from tests import tolerances
from tests.models import small_model

LONGEST = 16
# One is too short; three are cut to 32, 48 and 16 tokens.
SIZES = (37, 5, 50, 20)
END = ByteTokenizer.end_of_text


def source(*sizes):
  """Documents of random bytes; each size counts its end-of-text."""
  random = np.random.default_rng(0)
  texts = [random.integers(97, 123, size - 1) for size in sizes]
  tokens = np.concatenate([np.append(text, END) for text in texts]).astype(np.uint16)
  folder = TokenFolder(
    name='memory',
    source='memory',
    vocab_size=257,
    end_of_text=END,
    tokenizer_name='bytes',
    tokenizer_sha256=ByteTokenizer.sha256,
    tokens=tokens,
    document_offsets=np.cumsum([0, *sizes]),
    document_bytes=np.array(sizes) - 1,
  )
  return TextSource('memory', folder, ByteTokenizer())


def window_nats(tokens, start, stop):
  """-log p of each token of a window that is read on its own, in float64."""
  inputs = [tokens[start - 1] if start else END, *tokens[start : stop - 1]]
  scores = small_model.logits(inputs)
  chosen = scores[np.arange(stop - start), tokens[start:stop].astype(int)]
  return np.log(np.exp(scores).sum(axis=-1)) - chosen


def measure(length, carry_state):
  documents = LongDocuments([source(*SIZES)], LONGEST)
  # Two rows, so that one has two documents; the last batch is not full.
  return context_length.measure(
    small_model.params(),
    small_model.CONFIG,
    documents,
    length,
    carry_state=carry_state,
    batch_tokens=2 * length,
  )


@pytest.mark.parametrize('length', [7, LONGEST])
def test_each_window_is_read_from_nothing(length):
  result = measure(length, carry_state=False)
  nats, tokens = np.zeros(length), np.zeros(length, int)
  for document in LongDocuments([source(*SIZES)], LONGEST).tokens:
    for start in range(0, len(document), length):
      of_window = window_nats(document, start, min(start + length, len(document)))
      nats[: len(of_window)] += of_window
      tokens[: len(of_window)] += 1
  assert result.length == length
  np.testing.assert_array_equal(result.tokens, tokens)
  tolerances.assert_close(result.nats, nats, rtol=tolerances.FLOAT32_REORDERED)


def test_with_carried_state_windows_are_one_long_window():
  result = measure(7, carry_state=True)
  nats, tokens = np.zeros(48), np.zeros(48, int)
  for document in LongDocuments([source(*SIZES)], LONGEST).tokens:
    nats[: len(document)] += window_nats(document, 0, len(document))
    tokens[: len(document)] += 1
  np.testing.assert_array_equal(result.tokens, tokens)
  tolerances.assert_close(result.nats, nats, rtol=tolerances.FLOAT32_REORDERED)


def test_documents_are_cut_to_the_longest_length_and_short_ones_left_out():
  sources = [source(*SIZES), source(16)]
  documents = LongDocuments(sources, LONGEST)
  assert [len(tokens) for tokens in documents.tokens] == [32, 48, 16, 16]
  assert (documents.skipped, documents.num_tokens) == (1, 112)
  assert documents.num_bytes == 111  # one end-of-text is in what is left of the documents
  assert LongDocuments(sources, LONGEST, max_tokens=80).num_tokens == 80
  assert LongDocuments(sources, LONGEST, max_tokens=79).num_tokens == 32
  assert LongDocuments(sources, LONGEST, max_tokens=1).num_tokens == 32


@pytest.mark.parametrize('positions', [1, 2, 3, 8, 11])
def test_a_report_gathers_positions_in_buckets_that_double(positions):
  random = np.random.default_rng(0)
  nats, tokens = random.random(positions), random.integers(1, 5, positions)
  report = context_length.report(ByPosition(positions, nats, tokens), bytes_per_token=0.5)
  # Position p is in bucket number p.bit_length().
  numbers = np.array([position.bit_length() for position in range(positions)])
  assert report['loss'] == pytest.approx(nats.sum() / tokens.sum())
  assert report['perplexity'] == pytest.approx(math.exp(report['loss']))
  assert len(report['positions']) == numbers.max() + 1
  for number, bucket in enumerate(report['positions']):
    inside = numbers == number
    assert list(range(bucket['from'], bucket['to'])) == np.flatnonzero(inside).tolist()
    assert bucket['tokens'] == tokens[inside].sum()
    assert bucket['loss'] == pytest.approx(nats[inside].sum() / tokens[inside].sum())
    assert bucket['bits_per_byte'] == pytest.approx(2 * bucket['loss'] / math.log(2))


def test_what_is_not_finite_is_none():
  report = context_length.report(ByPosition(2, np.array([1.0, np.inf]), np.ones(2, int)), 1.0)
  assert report['loss'] is report['perplexity'] is report['bits_per_byte'] is None
  assert [part['loss'] for part in report['positions']] == [1.0, None]
  report = context_length.report(ByPosition(1, np.array([1e4]), np.ones(1, int)), 1.0)
  assert (report['loss'], report['perplexity']) == (1e4, None)


def test_no_document_that_is_long_enough_is_one_line():
  with pytest.raises(UserError, match='no document has 64 tokens; the longest has 50'):
    LongDocuments([source(*SIZES)], 64)
  with pytest.raises(UserError, match='induction_heads has no documents'):
    LongDocuments([SyntheticTask('induction_heads')], 64)


@pytest.mark.parametrize('asked', ['', '0', '64,x', '64,64', '128,64', '-1', '1.5', '64,,128'])
def test_lengths_that_do_not_increase_are_one_line(asked):
  with pytest.raises(UserError, match='must be positive numbers of tokens that increase'):
    context_length.parse_lengths(asked.split(','))
  assert context_length.parse_lengths(['64', ' 128']) == (64, 128)
