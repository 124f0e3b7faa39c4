"""How well a model predicts long documents, by how much of them it has read.

Of every document of at least the longest length asked for, the first tokens are taken, in whole
multiples of that length; shorter documents are left out. So all lengths are compared on the same
tokens. For a length L they are cut, document by document, in windows of L tokens.

Without carried state each window is read from nothing: position p of a window is predicted from
p + 1 tokens, which are those before it in the window and the one before these (at a document's
start end-of-text). The loss at L is the mean over all positions, as in papers that speak of
perplexity at a context of 16K.

With carried state each window goes on from where the one before it ended, and positions count from
the document's start. To a recurrent model a document is then one window, and L says only how much
of it is in memory at one time; attention sees what its cache holds.

Positions are gathered in [0, 1), [1, 2), [2, 4), [4, 8) and so on. Where L is a power of two, the
last of these is the second half of the windows: the tokens with the most context.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ssm_moe.analysis import perplexity
from ssm_moe.config import ModelConfig
from ssm_moe.data.sources import Source, TextSource
from ssm_moe.errors import UserError
from ssm_moe.models import lm, scoring
from ssm_moe.shapes import Bool, Float, Int, PyTree


def parse_lengths(asked: Sequence[str]) -> tuple[int, ...]:
  """Reads --context_lengths.

  Raises:
    UserError: one is not a positive number, or they do not increase.
  """
  words = [word.strip() for word in asked]
  lengths = tuple(int(word) if word.isdecimal() else 0 for word in words)
  increasing = all(one < following for one, following in itertools.pairwise(lengths))
  if not lengths or min(lengths) < 1 or not increasing:
    raise UserError(
      f'--context_lengths={",".join(words)}: it must be positive numbers of tokens that increase, '
      'such as 1024,2048,4096'
    )
  return lengths


class LongDocuments:
  """Documents that are long enough, each cut to a multiple of a length.

  Attributes:
    tokens: Of each.
    num_tokens: Of all of them.
    num_bytes: UTF-8 bytes that they stand for.
    skipped: Documents that are too short.
    end_of_text: What a document starts from.
  """

  def __init__(self, sources: Sequence[Source], length: int, *, max_tokens: int | None = None):
    """Looks through the sources.

    Args:
      sources: Of text.
      length: The longest length asked for.
      max_tokens: At most so many, in whole documents as they are cut; but at least one document.

    Raises:
      UserError: no document is long enough, or a source has no documents.
    """
    self.tokens: list[np.ndarray] = []
    self.num_tokens = self.num_bytes = self.skipped = 0
    longest, full = 0, False
    for source in sources:
      if not isinstance(source, TextSource):
        raise UserError(f'--context_lengths: {source.name} has no documents; give text')
      folder = source.folder
      self.end_of_text = folder.end_of_text
      starts, sizes = folder.document_offsets[:-1], np.diff(folder.document_offsets)
      longest = max(longest, int(sizes.max()))
      enough = np.flatnonzero(sizes >= length)
      self.skipped += len(sizes) - len(enough)
      for start, size in zip(starts[enough].tolist(), sizes[enough].tolist()):
        size = size // length * length
        full |= max_tokens is not None and self.num_tokens + size > max_tokens
        if full and self.tokens:
          break
        self.tokens.append(folder.tokens[start : start + size])
        self.num_tokens += size
        self.num_bytes += source.tokenizer.num_bytes(self.tokens[-1])
    if not self.tokens:
      raise UserError(
        f'--context_lengths: no document has {length} tokens; the longest has {longest}'
      )

  @property
  def bytes_per_token(self) -> float:
    return self.num_bytes / self.num_tokens


class ByPosition(NamedTuple):
  """Sums by position, over all windows of a length.

  Attributes:
    length: L.
    nats: Of the tokens there.
    tokens: How many there are.
  """

  length: int
  nats: Float[np.ndarray, 'positions']
  tokens: Int[np.ndarray, 'positions']


def compare(
  params: PyTree,
  config: ModelConfig,
  documents: LongDocuments,
  lengths: Sequence[int],
  *,
  carry_state: bool,
  batch_tokens: int,
  progress: Callable[..., Iterable] = lambda batches, desc: batches,
) -> dict[str, Any]:
  """Returns the `report` of each length, and what they are of; arguments as of `measure`."""
  reports = []
  for length in lengths:
    measured = measure(
      params,
      config,
      documents,
      length,
      carry_state=carry_state,
      batch_tokens=batch_tokens,
      progress=functools.partial(progress, desc=f'Windows of {length}'),
    )
    reports.append(report(measured, documents.bytes_per_token))
  return {
    'carry_state': carry_state,
    'documents': len(documents.tokens),
    'documents_skipped': documents.skipped,
    'tokens': documents.num_tokens,
    'bytes': documents.num_bytes,
    'context_lengths': reports,
  }


def measure(
  params: PyTree,
  config: ModelConfig,
  documents: LongDocuments,
  length: int,
  *,
  carry_state: bool,
  batch_tokens: int,
  progress: Callable[[Iterable], Iterable] = iter,
) -> ByPosition:
  """Runs a model over all windows of a length.

  Args:
    params: Of the model, on one device.
    config: Of the model. No token is dropped, whatever the dispatch of training.
    documents: To be cut in windows.
    length: L.
    carry_state: Whether windows go on from the one before.
    batch_tokens: About so many are in memory at one time, but at least one window.
    progress: Wraps the batches, to show how far it is.

  Raises:
    ConfigError: experts choose tokens, so that losses depend on later tokens.
  """
  lm.check_causal(config, 'evaluation')
  lanes = _lanes(documents, length, max(batch_tokens // length, 1), carry_state)
  state = lm.initial_state(config, len(lanes)) if carry_state else None
  positions = max(map(len, documents.tokens)) if carry_state else length
  result = ByPosition(length, np.zeros(positions), np.zeros(positions, np.int64))
  for step in progress(range(max(map(len, lanes)))):
    windows = [lane[step] if step < len(lane) else None for lane in lanes]
    inputs, targets, mask, continues = _batch(documents, windows, length)
    scores, state = scoring.score_window(
      params, state, inputs, targets, mask, continues, config=config
    )
    for window, nats, real in zip(windows, np.asarray(scores.nats, np.float64), mask):
      if window is not None:
        first = window.start if carry_state else 0
        there = slice(first, first + int(real.sum()))
        result.nats[there] += nats[real]
        result.tokens[there] += 1
  return result


def report(measured: ByPosition, bytes_per_token: float) -> dict[str, Any]:
  """Returns the means of a length, and of its positions, as `perplexity.summary`.

  Args:
    measured: Of the length.
    bytes_per_token: Of all documents; that of single positions is taken to be the same.
  """

  def means(start: int, stop: int) -> dict[str, Any]:
    nats, tokens = measured.nats[start:stop].sum(), int(measured.tokens[start:stop].sum())
    return perplexity.summary(float(nats), tokens, bytes_per_token)

  edges = bucket_edges(len(measured.tokens))
  return {
    'context_length': measured.length,
    **means(0, edges[-1]),
    'positions': [
      {'from': start, 'to': stop, 'tokens': int(measured.tokens[start:stop].sum())}
      | means(start, stop)
      for start, stop in itertools.pairwise(edges)
    ],
  }


def bucket_edges(positions: int) -> list[int]:
  """Returns 0, 1, 2, 4, 8 and so on, below the number of positions, and it."""
  edges = [0]
  while edges[-1] < positions:
    edges.append(min(max(2 * edges[-1], 1), positions))
  return edges


class _Window(NamedTuple):
  document: int
  start: int  # in the document


def _lanes(
  documents: LongDocuments, length: int, most: int, carry_state: bool
) -> list[list[_Window]]:
  """Deals windows to the rows of the batches; with carried state, each document to one of them."""
  windows = [
    [_Window(document, start) for start in range(0, len(tokens), length)]
    for document, tokens in enumerate(documents.tokens)
  ]
  if not carry_state:
    alone = [window for of_document in windows for window in of_document]
    count = min(most, len(alone))
    return [alone[lane::count] for lane in range(count)]
  lanes: list[list[_Window]] = [[] for _ in range(min(most, len(windows)))]
  for of_document in windows:
    min(lanes, key=len).extend(of_document)
  return lanes


def _batch(
  documents: LongDocuments, windows: Sequence[_Window | None], length: int
) -> tuple[
  Int[np.ndarray, 'B L'],
  Int[np.ndarray, 'B L'],
  Bool[np.ndarray, 'B L'],
  Bool[np.ndarray, 'B'],
]:
  """Returns inputs, targets, where there is a token, and rows that go on from the last batch."""
  inputs, targets = np.zeros((2, len(windows), length), np.int32)
  mask = np.zeros(inputs.shape, bool)
  for row, window in enumerate(windows):
    if window is None:
      continue
    tokens, start = documents.tokens[window.document], window.start
    part = tokens[start : start + length]
    targets[row, : len(part)] = part
    inputs[row, 0] = tokens[start - 1] if start else documents.end_of_text
    inputs[row, 1 : len(part)] = part[:-1]
    mask[row, : len(part)] = True
  return inputs, targets, mask, np.array([bool(w and w.start) for w in windows])
