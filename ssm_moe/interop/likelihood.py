"""Log-likelihoods of continuations, in batches of few shapes.

Pairs of a context and its continuation are sorted by length, and what is in a batch is filled up
behind its last token to a power of two, in length as in rows: so a few compiled programs serve any
list. What is longer than a piece is read piece by piece, the state carried from each to the next:
memory does not grow with the length. To a recurrent model it is still one sequence; attention over
all tokens sees of earlier pieces what its cache holds.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ssm_moe.config import ModelConfig
from ssm_moe.data.tokenizer import Tokenizer
from ssm_moe.errors import UserError
from ssm_moe.models import lm, scoring
from ssm_moe.shapes import Int, PyTree

PIECE = 2048  # tokens that are read at one time
_SHORTEST = 32  # tokens that a row is filled up to


class Pair(NamedTuple):
  """What is given, at least one token, and what is asked about; it may be empty."""

  context: Int[np.ndarray, '_']
  continuation: Int[np.ndarray, '_']


class Likelihood(NamedTuple):
  """Of a continuation.

  Attributes:
    log_likelihood: Sum of log p over its tokens, in nats.
    greedy: Whether each of them is the likeliest.
  """

  log_likelihood: float
  greedy: bool


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
  """Splits the tokens of a text between context and continuation, as lm-evaluation-harness does.

  White space at the end of the context counts to the continuation, where most tokenizers have it.
  Both are then encoded together, and the continuation is what is left of them behind as many tokens
  as the context has alone: a token may have come to be across the boundary. An empty context is
  end-of-text, from which documents start.

  Note: where so many tokens merge that nothing is left, the continuation is the last token, and the
  context all others; the harness would stop.
  """
  stripped = context.rstrip()
  continuation = context[len(stripped) :] + continuation
  whole = _encode(tokenizer, stripped + continuation)
  alone = _encode(tokenizer, stripped)
  if len(whole) <= len(alone) and continuation:
    alone, whole = whole[:-1], whole
  continuation = whole[len(alone) :]
  start = np.array([tokenizer.end_of_text], np.int32)
  return Pair(alone if len(alone) else start, continuation)


def encode_prompt(
  tokenizer: Tokenizer, context: str, max_length: int | None = None
) -> Int[np.ndarray, '_']:
  """Returns the last `max_length` tokens of a context; end-of-text if it is empty."""
  tokens = _encode(tokenizer, context)
  if not len(tokens):
    tokens = np.array([tokenizer.end_of_text], np.int32)
  return tokens if max_length is None else tokens[-max_length:]


def rolling_pairs(tokenizer: Tokenizer, text: str, max_length: int | None) -> list[Pair]:
  """Returns pairs whose continuations are, together, the whole text: each token is in one of them.

  Args:
    tokenizer: Of the model.
    text: A document.
    max_length: Tokens that may be read at one time: of each piece of so many the last has as much
      context as there is room for, the others one token. If None, there is a single pair.
  """
  tokens = np.append(np.int32(tokenizer.end_of_text), _encode(tokenizer, text))
  size = max_length or max(len(tokens) - 1, 1)
  pairs = []
  for start in range(1, len(tokens), size):
    stop = min(start + size, len(tokens))
    before = max(stop - size - 1, 0) if start > 1 else 0
    pairs.append(Pair(tokens[before:start], tokens[start:stop]))
  return pairs


def shorten(pair: Pair, max_length: int | None) -> Pair:
  """Cuts the context from its front, so that at most `max_length` tokens are read.

  Raises:
    UserError: the continuation alone is longer.
  """
  context, continuation = pair
  if max_length is None or len(context) + len(continuation) - 1 <= max_length:
    return pair
  if len(continuation) > max_length:
    raise UserError(
      f'--max_length={max_length}: a continuation has {len(continuation)} tokens; it must be at '
      'least that long'
    )
  return Pair(context[len(context) + len(continuation) - 1 - max_length :], continuation)


def likelihoods(
  params: PyTree, config: ModelConfig, pairs: Sequence[Pair], *, batch_tokens: int
) -> Iterator[tuple[int, Likelihood]]:
  """Yields the index of each pair and what the model thinks of it, the longest pairs first.

  Args:
    params: Of the model, on one device.
    config: Of the model. No token is dropped, whatever the dispatch of training, so that nothing
      depends on what else is in a batch.
    pairs: In any order.
    batch_tokens: About so many are read at one time, but at least one piece.

  Raises:
    ConfigError: experts choose tokens, so that a likelihood would depend on later tokens.
  """
  lm.check_causal(config, 'a log-likelihood')
  for batch, rows, length in batches([len(c) + len(x) - 1 for c, x in pairs], batch_tokens):
    inputs, targets = np.zeros((2, rows, length), np.int32)
    mask, asked = np.zeros((2, rows, length), bool)
    for row, index in enumerate(batch):
      context, continuation = pairs[index]
      tokens = np.concatenate([context, continuation])
      read = len(tokens) - 1
      inputs[row, :read], targets[row, :read] = tokens[:-1], tokens[1:]
      mask[row, :read] = True
      asked[row, len(context) - 1 : read] = True
    nats, greedy = np.zeros(rows), np.ones(rows, bool)
    state = lm.initial_state(config, rows) if length > PIECE else None
    for start in range(0, length, PIECE):
      part = slice(start, start + PIECE)
      scores, state = scoring.score_window(
        params, state, inputs[:, part], targets[:, part], mask[:, part], config=config
      )
      there = asked[:, part]
      nats += np.where(there, np.asarray(scores.nats, np.float64), 0).sum(axis=1)
      greedy &= (np.asarray(scores.likeliest) | ~there).all(axis=1)
    for row, index in enumerate(batch):
      # Not -nats, which is -0 for an empty continuation.
      yield index, Likelihood(float(0 - nats[row]), bool(greedy[row]))


def batches(
  lengths: Iterable[int], batch_tokens: int, most_rows: int | None = None
) -> Iterator[tuple[list[int], int, int]]:
  """Yields batches of sequences of like lengths, the longest first.

  Args:
    lengths: Of the sequences.
    batch_tokens: About so many, filled up, are in a batch, but at least one piece.
    most_rows: Of a batch; a power of two.

  Yields:
    Indices of the sequences; how many rows, a power of two, and how many columns, a power of two or
    a multiple of `PIECE`, they are to be filled up to.
  """
  of_length: dict[int, list[int]] = {}
  for index, length in enumerate(lengths):
    of_length.setdefault(_filled_up(length), []).append(index)
  for length in sorted(of_length, reverse=True):
    fit = max(batch_tokens // min(length, PIECE), 1)
    most = 1 << (fit.bit_length() - 1)
    most = min(most, most_rows or most)
    indices = of_length[length]
    for start in range(0, len(indices), most):
      batch = indices[start : start + most]
      yield batch, _power_of_two(len(batch)), length


def _filled_up(length: int) -> int:
  if length > PIECE:
    return -(-length // PIECE) * PIECE
  return max(_power_of_two(length), _SHORTEST)


def _power_of_two(number: int) -> int:
  """Returns the least that is no smaller."""
  return 1 << max(number - 1, 0).bit_length()


def _encode(tokenizer: Tokenizer, text: str) -> Int[np.ndarray, '_']:
  return tokenizer.encode(text).astype(np.int32)
