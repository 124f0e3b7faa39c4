"""A trained model on text: its loss, perplexity and bits per byte, as training evaluates."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from ssm_moe import sharding
from ssm_moe.analysis import perplexity
from ssm_moe.config import ExperimentConfig, MeshConfig
from ssm_moe.data import DataError
from ssm_moe.data.evaluation import EvalBatches
from ssm_moe.errors import UserError
from ssm_moe.shapes import PyTree
from ssm_moe.training.program import Program

# What messages about data say of a config, and what is its like where flags say it.
_FLAG_WORDS = {
  'config.data.valid: ': '--data: ',
  'config.data.tokenizer is': '--tokenizer is',
  'config.model.vocab_size is': "the model's vocabulary is",
}


def with_data(
  experiment: ExperimentConfig,
  data: Sequence[str],
  tokenizer: str | None = None,
  batch_size: int | None = None,
) -> ExperimentConfig:
  """Returns an experiment that evaluates on other data, all of it, with another tokenizer.

  Args:
    experiment: As the run's folder has it.
    data: Names of sources; those of the experiment, and as much of them as it says, if empty.
    tokenizer: Of the data; that of the experiment if None.
    batch_size: Windows at one time; those of a training step if None.
  """
  settings, train = experiment.data, experiment.train
  if data:
    settings = dataclasses.replace(settings, valid=tuple(data))
    train = dataclasses.replace(train, eval_tokens=None)
  if tokenizer is not None:
    settings = dataclasses.replace(settings, tokenizer=tokenizer)
  if batch_size is not None:
    train = dataclasses.replace(train, batch_size=batch_size, accumulation_steps=1)
  return dataclasses.replace(experiment, data=settings, train=train)


def batch_tokens(experiment: ExperimentConfig) -> int:
  """Returns how many tokens a step of training has in memory at one time."""
  train = experiment.train
  return train.batch_size // train.accumulation_steps * train.sequence_length


def open_batches(
  experiment: ExperimentConfig, *, cache_dir: str | os.PathLike, max_tokens: int | None = None
) -> EvalBatches:
  """Opens what `evaluate` reads: rows and windows are those of the training.

  Args:
    experiment: Of the model, and with the data.
    cache_dir: Where folders of tokens are kept, unless `experiment` says.
    max_tokens: In whole documents, but at least one; as many as `experiment` says if None.

  Raises:
    DataError: a source is missing, damaged, or does not fit the model or the tokenizer.
  """
  train = experiment.train
  return EvalBatches(
    experiment.data,
    batch_size=train.batch_size,
    sequence_length=train.sequence_length,
    vocab_size=experiment.model.vocab_size,
    cache_dir=cache_dir,
    eval_tokens=train.eval_tokens if max_tokens is None else max_tokens,
  )


def evaluate(
  experiment: ExperimentConfig,
  params: PyTree,
  batches: EvalBatches,
  *,
  progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, Any]:
  """Returns what the model makes of every token of `batches`.

  Each window is read from an empty state, so the numbers depend on `sequence_length`.

  Args:
    experiment: Of the model.
    params: On one device.
    batches: As `open_batches` opens them.
    progress: Wraps the batches, to show how far it is.

  Returns:
    loss, perplexity, bits_per_byte: As `analysis.perplexity`; end-of-text counts as a token.
    tokens: Scored targets.
    bytes: UTF-8 bytes of the documents; None if a source is synthetic.

  Raises:
    UserError: the loss is not finite.
  """
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  program = Program(experiment, mesh)
  nats = scored = 0.0
  for batch in progress(batches):
    sums = program.eval_step(params, program.put(batch))
    # Here and not on the device: sums in float32 would lose counts beyond 2^24.
    nats, scored = nats + float(sums.nats), scored + float(sums.scored)
  if not math.isfinite(nats):
    raise UserError(f'the loss is {nats}: the parameters of this checkpoint are of no use')
  tokens, num_bytes = int(scored), batches.num_bytes
  summary = perplexity.summary(nats, tokens, num_bytes and num_bytes / tokens)
  return summary | {'tokens': tokens, 'bytes': num_bytes}


def in_flags(error: DataError) -> DataError:
  """Returns the error in the words of a script that has --data and --tokenizer, and no config."""
  message = str(error)
  for words, flag in _FLAG_WORDS.items():
    message = message.replace(words, flag)
  return DataError(message)
