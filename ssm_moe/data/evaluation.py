"""Batches to evaluate on: whole documents, each token scored once, their raw bytes known.

Of every source the first documents are taken, as many as fit in the tokens asked for. Their stream
is cut in windows of L tokens, one a row. A document that goes over the end of a window goes on in
the next row, where the model starts from a zero state: no state is carried, so the loss depends on
L, and a reported number must come with it. The last window of a source is padded, and the last
batch filled up with rows that are not scored.
"""

import os
from collections.abc import Iterator, Sequence

import numpy as np

from ssm_moe.config import DataConfig
from ssm_moe.data import DataError
from ssm_moe.data.packing import DocumentStream, Row, empty_row, pad
from ssm_moe.data.pipeline import Batch, describe_source, find_tokenizer, stack_rows
from ssm_moe.data.sources import TextSource, open_sources
from ssm_moe.data.synthetic import SyntheticTask
from ssm_moe.data.tokenizer import Tokenizer

# Validation examples are the same whatever the seed of the run, so that runs can be compared.
_SYNTHETIC_SEED = 0
_SYNTHETIC_ROWS = 256  # if no number of tokens is asked for


class EvalBatches:
  """Batches of the sources of `config.valid`, the same at each iteration.

  Attributes:
    sources: The open sources, in the order of `config.valid`.
    tokenizer: Of the text sources; None if all sources are synthetic.
    num_tokens: Scored targets in all batches, of all processes.
    num_bytes: UTF-8 bytes of the documents in all batches; None if a source is synthetic, where
      bits per byte mean nothing.
    num_documents: Documents in all batches; synthetic examples are not counted.
    num_batches: Batches of one iteration, the same in every process.
  """

  def __init__(
    self,
    config: DataConfig,
    *,
    batch_size: int,
    sequence_length: int,
    vocab_size: int,
    cache_dir: str | os.PathLike,
    eval_tokens: int | None = None,
    rows: Sequence[int] | None = None,
  ):
    """Opens the sources, tokenising those that need it.

    Args:
      config: The sources.
      batch_size: Rows of the global batch.
      sequence_length: Tokens of a row.
      vocab_size: Of the model.
      cache_dir: Where folders of tokens are kept, unless `config` says.
      eval_tokens: At most this many tokens in whole documents, but at least one document of each
        source; shared among the sources by their size. All if None.
      rows: Which rows of each batch this process reads; all of them if None.

    Raises:
      DataError: a source cannot be opened, or all documents are
        empty.
    """
    self._rows_of_process = range(batch_size) if rows is None else rows
    self._batch_size = batch_size
    self._length = sequence_length
    self.sources = open_sources(config, 'valid', vocab_size=vocab_size, cache_dir=cache_dir)
    self.tokenizer: Tokenizer | None = find_tokenizer(self.sources)
    self.num_tokens = self.num_documents = 0
    self.num_bytes: int | None = 0
    texts = [source.folder for source in self.sources if isinstance(source, TextSource)]
    all_tokens = sum(folder.num_tokens for folder in texts)
    # Of each source: how many rows it has, and the function that gives a row.
    self._parts = []
    for source in self.sources:
      if isinstance(source, SyntheticTask):
        self._parts.append(self._synthetic_part(source, eval_tokens))
        self.num_bytes = None
        continue
      folder = source.folder
      count = folder.num_documents
      if eval_tokens is not None:
        share = eval_tokens * folder.num_tokens / all_tokens
        count = int(np.searchsorted(folder.document_offsets, share, side='right')) - 1
      count = min(max(count, 1), folder.num_documents)
      self.num_documents += count
      self.num_tokens += int(folder.document_offsets[count])
      if self.num_bytes is not None:
        self.num_bytes += int(folder.document_bytes[:count].sum())
      self._parts.append(self._text_part(source, int(folder.document_offsets[count])))
    if self.num_bytes == 0:
      raise DataError('config.data.valid: the documents to evaluate on are all empty')
    num_rows = sum(count for count, _ in self._parts)
    self.num_batches = -(-num_rows // batch_size)

  def _text_part(self, source: TextSource, num_tokens: int):
    stream = DocumentStream(source.folder)

    def row(index: int) -> Row:
      start = index * self._length
      window = stream.window(start, min(start + self._length, num_tokens))
      return pad(window, self._length, source.folder.end_of_text)

    return -(-num_tokens // self._length), row

  def _synthetic_part(self, task: SyntheticTask, eval_tokens: int | None):
    task.check_length(self._length)
    count = _SYNTHETIC_ROWS if eval_tokens is None else max(eval_tokens // self._length, 1)

    def row(index: int) -> Row:
      return task.example(index, self._length, seed=_SYNTHETIC_SEED, split='valid')

    self.num_tokens += count * int(row(0)['loss_mask'].sum())
    return count, row

  def __iter__(self) -> Iterator[Batch]:
    for batch in range(self.num_batches):
      rows = [self._row(batch * self._batch_size + i) for i in self._rows_of_process]
      yield stack_rows(rows, [False] * len(rows))

  def _row(self, index: int) -> Row:
    for count, row in self._parts:
      if index < count:
        return row(index)
      index -= count
    return pad(empty_row(), self._length, 0)

  def describe(self) -> str:
    """Returns one line a source, for people."""
    return '\n'.join(describe_source(source) for source in self.sources)
