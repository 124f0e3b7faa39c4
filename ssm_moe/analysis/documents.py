"""Whole documents in windows, for a model that carries its state through each of them.

Each document goes, in turn, to the lane with the fewest tokens; a window is the next L tokens of
every lane. Unlike the windows of an evaluation, nothing is cut off from what came before it in its
document, so that what is said of a token is what the model would say of it in use. A lane that has
ended is padded, in segment 0.

A document t1..tn is read as `data.packing` says: position 0 holds the end-of-text that every
document starts from, position i holds t_i, and the target at position n is end-of-text.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from ssm_moe.data.tokenizer import Tokenizer


class Documents:
  """Tokenised documents.

  Attributes:
    tokens: Of each, its end-of-text included unless it was cut.
    starts: [documents + 1], where each begins if they are laid end to end, and their length.
    num_bytes: UTF-8 bytes of what was taken.
    cut: Whether the last one was cut short.
    sha256: Tells two lists of documents apart.
  """

  def __init__(self, texts: Iterable[str], tokenizer: Tokenizer, *, max_tokens: int | None = None):
    """Tokenises documents until there are `max_tokens` tokens; the last is cut there."""
    self.tokens: list[np.ndarray] = []
    self.num_bytes, self.cut = 0, False
    self._end_of_text = tokenizer.end_of_text
    digest = hashlib.sha256()
    left = max_tokens
    for text in texts:
      if left == 0:
        break
      encoded = tokenizer.encode(text).astype(np.int32)
      tokens = np.append(encoded, np.int32(tokenizer.end_of_text))
      if left is not None and len(tokens) > left:
        tokens, self.cut = tokens[:left], True
        text = tokenizer.decode(tokens)
      self.num_bytes += len(text.encode())
      self.tokens.append(tokens)
      digest.update(len(tokens).to_bytes(8, 'little') + tokens.tobytes())
      left = None if left is None else left - len(tokens)
    self.starts = np.cumsum([0, *map(len, self.tokens)])
    self.sha256 = digest.hexdigest()

  def __len__(self) -> int:
    return len(self.tokens)

  @property
  def num_tokens(self) -> int:
    return int(self.starts[-1])

  def inputs(self, document: int) -> Int[np.ndarray, '_']:
    """Returns what the model reads: the tokens moved right by one, end-of-text in front."""
    return np.append(np.int32(self._end_of_text), self.tokens[document][:-1])


class Window(NamedTuple):
  """The next tokens of every lane.

  Attributes:
    index: Of the window.
    inputs, targets: What is read, and what comes next.
    segment_ids: The document, counted from 1; 0 is padding.
    position: Of the token in its document.
    continues: Whether a lane's first token belongs to the document of the window before.
  """

  index: int
  inputs: Int[np.ndarray, 'B L']
  targets: Int[np.ndarray, 'B L']
  segment_ids: Int[np.ndarray, 'B L']
  position: Int[np.ndarray, 'B L']
  continues: Bool[np.ndarray, 'B']

  @property
  def real(self) -> Bool[np.ndarray, 'B L']:
    """What is not padding."""
    return self.segment_ids > 0


class Windows:
  """Windows of documents, the same at each iteration.

  Args:
    documents: At least one.
    lanes: B.
    length: L.
  """

  def __init__(self, documents: Documents, *, lanes: int, length: int):
    self.documents, self.lanes, self.length = documents, lanes, length
    self._of_lane: list[list[int]] = [[] for _ in range(lanes)]
    filled = np.zeros(lanes, np.int64)
    for document, tokens in enumerate(documents.tokens):
      lane = int(np.argmin(filled))
      self._of_lane[lane].append(document)
      filled[lane] += len(tokens)
    self._count = -(-int(filled.max()) // length)

  def __len__(self) -> int:
    return self._count

  def __iter__(self) -> Iterator[Window]:
    lanes = [self._lane(documents) for documents in self._of_lane]
    for index in range(self._count):
      part = slice(index * self.length, (index + 1) * self.length)
      inputs, targets, segment_ids, position = np.stack([lane[:, part] for lane in lanes], axis=1)
      yield Window(index, inputs, targets, segment_ids, position, position[:, 0] > 0)

  def _lane(self, documents: list[int]) -> Int[np.ndarray, '4 _']:
    lane = np.zeros((4, self._count * self.length), np.int32)
    start = 0
    for document in documents:
      tokens = self.documents.tokens[document]
      part = slice(start, start + len(tokens))
      lane[0, part], lane[1, part] = self.documents.inputs(document), tokens
      lane[2, part], lane[3, part] = document + 1, np.arange(len(tokens))
      start += len(tokens)
    return lane
