"""Batches to train on: row i of step s is a function of (seed, s, i) alone.

Windows of each source are shuffled anew in every epoch, and the sources are interleaved by their
weights, in a Grain `MapDataset`: an endless list of rows that is indexed, not iterated. Step s
holds its rows [s B, (s + 1) B), and of these a process takes its contiguous share. So the global
batch does not depend on the number of processes, and resuming a run is a matter of naming the step.

With `carry_state` the rows come from lanes instead (`packing.Lanes`), with the same guarantee.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np

from ssm_moe.config import DataConfig
from ssm_moe.data import DataError
from ssm_moe.data.packing import Lanes, Row, Windows
from ssm_moe.data.sources import Source, TextSource, open_sources
from ssm_moe.data.synthetic import SyntheticTask
from ssm_moe.data.tokenizer import Tokenizer

# [B, L]: int32 inputs, targets and segment_ids, float32 loss_mask (1 where a target is scored);
# [B]: bool continues, where the state of the same row of the step before is to be kept.
Batch = dict[str, np.ndarray]

# The length that Grain sees of a source without end: more rows than a run reads, and few enough for
# sums of such lengths to fit in 64 bits.
_ENDLESS = 1 << 48


class TrainBatches:
  """Batches of the sources of `config.train`.

  Attributes:
    sources: The open sources, in the order of `config.train`.
    tokenizer: Of the text sources; None if all sources are synthetic.
    num_tokens_per_epoch: Tokens in all windows of all text sources; None if there is no text.
  """

  def __init__(
    self,
    config: DataConfig,
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    vocab_size: int,
    cache_dir: str | os.PathLike,
    rows: Sequence[int] | None = None,
  ):
    """Opens the sources, tokenising those that need it.

    Args:
      config: The sources and how to mix them.
      batch_size: Rows of the global batch.
      sequence_length: Tokens of a row.
      seed: Decides the order of the windows and the synthetic examples.
      vocab_size: Of the model.
      cache_dir: Where folders of tokens are kept, unless `config` says.
      rows: Which rows of each batch this process reads; all of them if None.

    Raises:
      DataError: a source cannot be opened, or is shorter than one window (with `carry_state`, than
        one batch); the mixture has no weights.
    """
    self._rows_of_process = range(batch_size) if rows is None else rows
    self._batch_size = batch_size
    self._length = sequence_length
    self._prefetch = config.prefetch
    self.sources = open_sources(config, 'train', vocab_size=vocab_size, cache_dir=cache_dir)
    self.tokenizer: Tokenizer | None = find_tokenizer(self.sources)
    self._weights = _normalise_weights(config, self.sources)
    if config.carry_state:
      self._lanes = self._make_lanes(seed)
      tokens = self._lanes.steps_per_epoch * batch_size * sequence_length
    else:
      self._lanes = None
      self._rows = self._make_rows(seed)
      tokens = sum(
        source.folder.num_tokens // sequence_length * sequence_length
        for source in self.sources
        if isinstance(source, TextSource)
      )
    self.num_tokens_per_epoch: int | None = tokens or None

  @property
  def bytes_per_token(self) -> float | None:
    """Raw UTF-8 bytes that a token stands for, on average over the mixture; None without text."""
    if any(isinstance(source, SyntheticTask) for source in self.sources):
      return None
    folders = [source.folder for source in self.sources]
    ratios = [folder.num_bytes / folder.num_tokens for folder in folders]
    return sum(weight * ratio for weight, ratio in zip(self._weights, ratios))

  def _make_rows(self, seed: int) -> grain.MapDataset:
    parts = []
    for i, source in enumerate(self.sources):
      # Grain adds the epoch to the seed, so seeds 0 and 1 would share all epochs but one; hashed,
      # the seeds of runs and of sources lie far apart.
      part_seed = int(np.random.SeedSequence((seed, i)).generate_state(1)[0])
      if isinstance(source, SyntheticTask):
        source.check_length(self._length)
        parts.append(grain.MapDataset.source(_Examples(source, self._length, part_seed)))
        continue
      windows = Windows(source.folder, self._length)
      if not len(windows):
        raise DataError(
          f'{source.name} has {source.folder.num_tokens} tokens; sequence_length is '
          f'{self._length}, and it must have at least that many'
        )
      parts.append(grain.MapDataset.source(windows).shuffle(seed=part_seed).repeat())
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights=self._weights)

  def _make_lanes(self, seed: int) -> Lanes:
    (source,) = self.sources
    if not isinstance(source, TextSource):
      raise DataError(f'carry_state reads documents in order; {source.name} has none')
    lanes = Lanes(source.folder, num_lanes=self._batch_size, length=self._length, seed=seed)
    if not lanes.steps_per_epoch:
      raise DataError(
        f'{source.name} has {source.folder.num_tokens} tokens; with carry_state it must have '
        f'batch_size * sequence_length, {self._batch_size * self._length}'
      )
    return lanes

  def batch(self, step: int) -> Batch:
    """Returns this process' rows of the batch of `step`, counted from 0."""
    rows, continues = [], []
    for i in self._rows_of_process:
      if self._lanes is None:
        row, carried = self._rows[step * self._batch_size + i], False
      else:
        row, carried = self._lanes.row(step, i)
      rows.append(row)
      continues.append(carried)
    return stack_rows(rows, continues)

  def iterate(self, first_step: int = 0) -> Iterator[Batch]:
    """Yields the batches from `first_step` on, without end, reading ahead in a thread.

    An error in the thread is raised here. The thread ends when the iterator is closed or dropped.
    """
    with ThreadPoolExecutor(1, thread_name_prefix='train_batches') as reader:
      ahead = deque(reader.submit(self.batch, first_step + i) for i in range(self._prefetch))
      step = first_step + self._prefetch
      try:
        while True:
          batch = ahead.popleft().result()
          ahead.append(reader.submit(self.batch, step))
          step += 1
          yield batch
      finally:
        for future in ahead:
          future.cancel()

  def describe(self) -> str:
    """Returns one line a source, for people."""
    lines = []
    for source, weight in zip(self.sources, self._weights):
      share = f', weight {weight:.3f}' if len(self.sources) > 1 else ''
      lines.append(describe_source(source) + share)
    return '\n'.join(lines)


class _Examples:
  """A synthetic task as a Grain source."""

  def __init__(self, task: SyntheticTask, length: int, seed: int):
    self._task, self._length, self._seed = task, length, seed

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, index: int) -> Row:
    return self._task.example(index, self._length, seed=self._seed, split='train')


def _normalise_weights(config: DataConfig, sources: tuple[Source, ...]) -> list[float]:
  weights = list(config.weights)
  if not weights:
    if len(sources) > 1 and any(isinstance(source, SyntheticTask) for source in sources):
      raise DataError('config.data.weights is empty, and a synthetic source has no size: give one')
    weights = [
      source.folder.num_tokens if isinstance(source, TextSource) else 1 for source in sources
    ]
  return [weight / sum(weights) for weight in weights]


def stack_rows(rows: list[Row], continues: list[bool]) -> Batch:
  """Returns rows as one batch."""
  batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  return batch | {'continues': np.array(continues, bool)}


def find_tokenizer(sources: tuple[Source, ...]) -> Tokenizer | None:
  """Returns the tokenizer that all text sources share; None if there is none."""
  return next((source.tokenizer for source in sources if isinstance(source, TextSource)), None)


def describe_source(source: Source) -> str:
  """Returns one line about a source, for people."""
  if isinstance(source, SyntheticTask):
    return f'{source.name}: made on the fly, {source.vocab_size} token ids'
  folder = source.folder
  return (
    f'{source.name}: {folder.num_documents:,} documents, {folder.num_tokens:,} tokens, '
    f'{folder.num_bytes / folder.num_tokens:.2f} bytes a token'
  )
