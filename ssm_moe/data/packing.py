"""Documents laid end to end, and windows cut out of that stream.

The stream is every document's tokens, each followed by end-of-text. Targets are the stream; inputs
are the stream moved right by one, with end-of-text in front. So a document t1..tn is read as

  inputs   EOT t1 .. tn
  targets  t1 t2 .. EOT

its first token is predicted from end-of-text, and every token of the stream, end-of-text included,
is predicted exactly once. The segment id of a position tells which document its target belongs to,
counted from 1 inside a window; a model resets its state where the id changes.
"""

import functools

import numpy as np
from jaxtyping import Int

from ssm_moe.data.token_files import TokenFolder

Row = dict[str, np.ndarray]


class DocumentStream:
  """The documents of a folder in some order, as one stream.

  Attributes:
    starts: int64 [documents + 1], where each document begins in this stream, and its length.
  """

  def __init__(self, folder: TokenFolder, order: Int[np.ndarray, 'documents'] | None = None):
    """Lays out the documents `order` of `folder`; all of them, as they lie, if None."""
    self._folder = folder
    self._order = order
    if order is None:
      self.starts = folder.document_offsets
    else:
      lengths = folder.document_offsets[1:][order] - folder.document_offsets[:-1][order]
      self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])

  def __len__(self) -> int:
    return int(self.starts[-1])

  def is_document_start(self, position: int) -> bool:
    """Says whether the token at `position` is the first of its document."""
    return bool(self.starts[np.searchsorted(self.starts, position)] == position)

  def window(self, start: int, stop: int) -> Row:
    """Returns `inputs`, `targets`, `segment_ids`, each int32 [stop - start], and a mask of ones."""
    # One token more, in front: the input at which the first target is predicted.
    tokens = np.empty(stop - start + 1, np.int32)
    tokens[0] = self._folder.end_of_text
    before = max(start - 1, 0)
    self._read(before, stop, out=tokens[before - start + 1 :])
    first = np.searchsorted(self.starts, start, side='right')
    last = np.searchsorted(self.starts, stop, side='left')
    changes = np.zeros(stop - start, np.int32)
    changes[self.starts[first:last] - start] = 1
    return {
      'inputs': tokens[:-1],
      'targets': tokens[1:],
      'segment_ids': 1 + np.cumsum(changes, dtype=np.int32),
      'loss_mask': np.ones(stop - start, np.float32),
    }

  def _read(self, start: int, stop: int, *, out: Int[np.ndarray, '_']) -> None:
    if self._order is None:
      out[:] = self._folder.tokens[start:stop]
      return
    document = int(np.searchsorted(self.starts, start, side='right')) - 1
    position = start
    while position < stop:
      end = min(int(self.starts[document + 1]), stop)
      # Where this stream's document begins in the folder's.
      shift = int(self._folder.document_offsets[self._order[document]] - self.starts[document])
      out[position - start : end - start] = self._folder.tokens[position + shift : end + shift]
      position, document = end, document + 1


class Windows:
  """The windows [k L, (k + 1) L) of a folder's stream; the partial last one is left out."""

  def __init__(self, folder: TokenFolder, length: int):
    self._stream = DocumentStream(folder)
    self._length = length

  def __len__(self) -> int:
    return len(self._stream) // self._length

  def __getitem__(self, index: int) -> Row:
    return self._stream.window(index * self._length, (index + 1) * self._length)


class Lanes:
  """Consecutive windows, for a model that carries its state from one to the next.

  In each epoch the documents are permuted anew, laid end to end and cut in as many equal lanes as a
  batch has rows; row i of the epoch's step s is window s of lane i. What the lanes leave over, less
  than a batch, is left out of that epoch.
  """

  def __init__(self, folder: TokenFolder, *, num_lanes: int, length: int, seed: int):
    self._folder = folder
    self._length = length
    self._seed = seed
    self.steps_per_epoch = folder.num_tokens // (num_lanes * length)
    # The batch that is read ahead may already be in the next epoch.
    self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

  def row(self, step: int, lane: int) -> tuple[Row, bool]:
    """Returns a window, and whether it begins inside the document that the last one ended in."""
    epoch, step = divmod(step, self.steps_per_epoch)
    stream = self._epoch(epoch)
    start = (lane * self.steps_per_epoch + step) * self._length
    continues = step > 0 and not stream.is_document_start(start)
    return stream.window(start, start + self._length), continues

  def _make_epoch(self, epoch: int) -> DocumentStream:
    random = np.random.default_rng(np.random.SeedSequence((self._seed, epoch)))
    return DocumentStream(self._folder, random.permutation(self._folder.num_documents))


def pad(row: Row, length: int, end_of_text: int) -> Row:
  """Fills `row` up to `length` with end-of-text that is not scored, in segment 0."""
  missing = length - len(row['inputs'])
  if not missing:
    return row
  fill = {'inputs': end_of_text, 'targets': end_of_text, 'segment_ids': 0, 'loss_mask': 0}
  return {
    name: np.concatenate([values, np.full(missing, fill[name], values.dtype)])
    for name, values in row.items()
  }


def empty_row() -> Row:
  """Returns a row of no tokens, which `pad` makes a row that is not scored."""
  integers = np.zeros(0, np.int32)
  return {
    'inputs': integers,
    'targets': integers,
    'segment_ids': integers,
    'loss_mask': np.zeros(0, np.float32),
  }
