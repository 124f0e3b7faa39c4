"""Log-likelihoods are those of the logits, whatever is in the batch; how text is split."""

import numpy as np
import pytest

from ssm_moe.config import ConfigError, ModelConfig, MoEConfig
from ssm_moe.data.tokenizer import ByteTokenizer
from ssm_moe.errors import UserError
from ssm_moe.interop import decoding, likelihood
from ssm_moe.interop.likelihood import Pair
from tests import tolerances
from tests.models import small_model

END = ByteTokenizer.end_of_text
# Contexts and continuations: shorter than a row, longer than a piece, empty, of one token.
SIZES = ((1, 1), (3, 2), (3, 0), (40, 1), (1, 40), (30, 30), (16, 1), (17, 16), (5, 4), (5, 4))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
  monkeypatch.setattr(likelihood, 'PIECE', 16)
  monkeypatch.setattr(likelihood, '_SHORTEST', 8)


class Merging(ByteTokenizer):
  """Bytes, but 'ab' is one token, and so is a space with a letter behind it."""

  vocab_size = 1000
  _parts = ('abc', 'ab', *(f' {letter}' for letter in 'abc'))

  def encode(self, text):
    ids = []
    while text:
      part = next((part for part in self._parts if text.startswith(part)), text[0])
      ids.append(300 + self._parts.index(part) if part in self._parts else ord(part))
      text = text[len(part) :]
    return np.array(ids, np.uint32)


def pairs():
  random = np.random.default_rng(0)
  found = [Pair(*(random.integers(0, 257, n, np.int32) for n in sizes)) for sizes in SIZES]
  context = found[3].context
  found.append(Pair(context, np.array(small_model.greedy(context, 2), np.int32)))
  return found


def score(pairs, **options):
  found = dict(likelihood.likelihoods(small_model.params(), small_model.CONFIG, pairs, **options))
  return [found[index] for index in range(len(pairs))]


def test_likelihoods_are_those_of_the_logits_in_any_order_and_batch():
  asked = pairs()
  expected = [
    small_model.likelihood(*pair) if len(pair.continuation) else (0.0, True) for pair in asked
  ]
  assert [greedy for _, greedy in expected].count(True) >= 2
  order = np.random.default_rng(1).permutation(len(asked))
  in_order = score(asked, batch_tokens=32)
  shuffled = score([asked[i] for i in order], batch_tokens=32)
  for found, which in ((in_order, range(len(asked))), (shuffled, order)):
    values, flags = zip(*(expected[i] for i in which))
    assert [greedy for _, greedy in found] == list(flags)
    actual = np.array([value for value, _ in found])
    tolerances.assert_close(actual, np.array(values), rtol=tolerances.FLOAT32_REORDERED)


@pytest.mark.parametrize('batch_tokens', [1, 64, 200])
def test_batches_hold_everything_once_in_few_shapes(batch_tokens):
  lengths = np.random.default_rng(0).integers(0, 100, 200)
  found = list(likelihood.batches(lengths.tolist(), batch_tokens, most_rows=8))
  assert sorted(index for batch, _, _ in found for index in batch) == list(range(200))
  for batch, rows, columns in found:
    assert len(batch) <= rows <= 8 and rows.bit_count() == 1
    assert columns % 16 == 0 or columns == 8
    assert all(lengths[index] <= columns for index in batch)
    assert rows * min(columns, 16) <= batch_tokens or rows == 1
    if columns > 16:
      assert all(lengths[index] > columns - 16 for index in batch)
  assert len({(rows, columns) for _, rows, columns in found}) <= 4 * 8
  columns = [columns for _, _, columns in found]
  assert columns == sorted(columns, reverse=True)


@pytest.mark.parametrize(
  ('context', 'continuation', 'expected'),
  [
    ('xy', 'z', ([120, 121], [122])),
    ('x ', 'b', ([120], [303])),  # white space counts to the continuation
    ('x \n ', 'b', ([120], [32, 10, 303])),
    ('', 'xy', ([END], [120, 121])),
    ('  ', 'x', ([END], [32, 32, 120])),
    ('xa', 'bx', ([120, 97], [120])),  # a and b merge: the continuation is what is left
    ('a', 'b', ([END], [301])),  # nothing would be left
    ('xab', 'c', ([120], [300])),
    ('x', '', ([120], [])),
    ('', '', ([END], [])),
  ],
)
def test_text_is_split_where_the_context_ends(context, continuation, expected):
  found = likelihood.encode_pair(Merging(), context, continuation)
  assert tuple(part.tolist() for part in found) == expected
  assert {part.dtype for part in found} == {np.dtype(np.int32)}


@pytest.mark.parametrize('size', [1, 4, 9, 10, 11, None])
def test_rolling_pairs_ask_about_each_token_once_with_all_the_context_there_is_room_for(size):
  text = 'abcdefghij'
  found = likelihood.rolling_pairs(ByteTokenizer(), text, size)
  assert bytes(np.concatenate([pair.continuation for pair in found]).tolist()) == text.encode()
  assert found[0].context.tolist() == [END]
  for context, continuation in found:
    assert size is None or len(context) + len(continuation) - 1 <= size
    joined = bytes(token for token in [*context, *continuation] if token != END).decode()
    assert joined in text
  if size == 4:
    assert [len(context) for context, _ in found] == [1, 1, 3]
  assert likelihood.rolling_pairs(ByteTokenizer(), '', size) == []


def test_a_context_that_is_too_long_loses_its_beginning():
  pair = Pair(np.arange(5, dtype=np.int32), np.arange(5, 8, dtype=np.int32))
  assert likelihood.shorten(pair, None) is likelihood.shorten(pair, 7) is pair
  assert likelihood.shorten(pair, 4).context.tolist() == [3, 4]
  assert likelihood.shorten(pair, 3).context.tolist() == [4]
  with pytest.raises(UserError, match='--max_length=2: a continuation has 3 tokens'):
    likelihood.shorten(pair, 2)


@pytest.mark.slow
def test_prompts_of_any_length_are_continued_together_as_each_is_alone():
  random = np.random.default_rng(0)
  prompts = [random.integers(1, 257, n, np.int32) for n in (1, 2, 3, 5, 6, 7, 2)]
  found = dict(
    decoding.continuations(
      small_model.params(),
      small_model.CONFIG,
      prompts,
      is_done=lambda index, tokens: len(tokens) >= index + 3,
      temperatures=[0.0] * 6 + [1.0],
      batch_tokens=64,
    )
  )
  expected = [small_model.greedy(prompt, index + 3) for index, prompt in enumerate(prompts)]
  for index in range(6):
    assert found[index][: index + 3] == expected[index]
  # Drawn, not the likeliest of each.
  assert found[6][:9] != expected[6]


def test_experts_that_look_ahead_are_refused():
  config = ModelConfig(pattern='E', moe=MoEConfig(choice='expert'))
  with pytest.raises(ConfigError, match='a log-likelihood would not be autoregressive'):
    list(likelihood.likelihoods({}, config, [], batch_tokens=8))
