"""What a run tells its user: the banner, evaluations, routing statistics, plots, a sample."""

import math
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from ssm_moe.analysis import plots
from ssm_moe.analysis.balance import routing_statistics
from ssm_moe.config import ExperimentConfig, ModelConfig
from ssm_moe.data.evaluation import EvalBatches
from ssm_moe.data.pipeline import TrainBatches
from ssm_moe.data.tokenizer import Tokenizer
from ssm_moe.inference.generate import generate
from ssm_moe.models import accounting
from ssm_moe.models.block import PeriodAux, routers_by_depth
from ssm_moe.shapes import PyTree
from ssm_moe.training import durable
from ssm_moe.training.metrics import read_metrics
from ssm_moe.training.step import EvalSums

_STATISTICS = ('dropped_fraction', 'fallback_fraction', 'router_entropy', 'load_balancing_loss')
_LISTED_EXPERTS = 10


class Routing(NamedTuple):
  """The routed layers of a model, from the first to the last.

  Attributes:
    names: Depth and kind of each.
    expert_load: Fractions by expert of each.
    other: Further statistics by name, a number a layer.
  """

  names: list[str]
  expert_load: list[np.ndarray]
  other: dict[str, list[float]]

  @classmethod
  def from_aux(cls, aux: PeriodAux, config: ModelConfig) -> 'Routing':
    """Puts statistics that are stacked over periods in the order of depth."""
    names, loads = _by_depth({name: layer.expert_load for name, layer in aux.items()}, config)
    other = {}
    for key in _STATISTICS:
      stacked = {name: getattr(layer, key) for name, layer in aux.items()}
      other[key] = [float(value) for value in _by_depth(stacked, config)[1]]
    return cls(names, loads, other)

  def row(self) -> dict[str, Any]:
    return self.other | routing_statistics(self.expert_load)

  def loads(self) -> dict[str, list]:
    return {'expert_load': self.expert_load, 'layer_names': self.names}


class Evaluation(NamedTuple):
  """Of a model on the validation data.

  Attributes:
    loss: Mean nats a token.
    bits_per_byte: Of the raw UTF-8 bytes, end-of-text counted in the bits; None without text.
    names: Of the routed layers.
    expert_load: Fractions by expert of each routed layer, over all tokens.
  """

  loss: float
  bits_per_byte: float | None
  names: list[str]
  expert_load: list[np.ndarray]

  @classmethod
  def from_sums(cls, sums: EvalSums, config: ModelConfig, *, num_bytes: int | None):
    loads = {name: load / sums.tokens for name, load in sums.expert_load.items()}
    nats = float(sums.nats)
    return cls(
      nats / float(sums.scored),
      nats / math.log(2) / num_bytes if num_bytes else None,
      *_by_depth(loads, config),
    )

  def row(self) -> dict[str, Any]:
    row = {'valid_loss': self.loss}
    if self.bits_per_byte is not None:
      row['valid_bits_per_byte'] = self.bits_per_byte
    return row | (routing_statistics(self.expert_load) if self.expert_load else {})

  def loads(self) -> dict[str, list]:
    return {'expert_load': self.expert_load, 'layer_names': self.names}


class ExpertAlarm:
  """Says which experts get next to no tokens: less than 1/100 of an even share.

  Of each layer it says so once, until other experts are the ones.
  """

  def __init__(self):
    self._said: dict[str, list[int]] = {}

  def lines(self, evaluation: Evaluation, step: int) -> list[str]:
    """Returns a line for each layer in which that has changed since the last call."""
    lines = []
    for name, load in zip(evaluation.names, evaluation.expert_load, strict=True):
      least = 1 / (100 * len(load))
      starved = np.flatnonzero(load < least).tolist()
      if starved == self._said.get(name, []):
        continue
      self._said[name] = starved
      at = f'at step {step}'
      if not starved:
        lines.append(f'layer {name}: every expert gets its tokens again {at}')
        continue
      listed = ', '.join(map(str, starved[:_LISTED_EXPERTS]))
      if len(starved) > _LISTED_EXPERTS:
        listed += f' and {len(starved) - _LISTED_EXPERTS} more'
      one = len(starved) == 1
      lines.append(
        f'layer {name}: expert{"" if one else "s"} {listed} get{"s" if one else ""} less than '
        f'{100 * least:.2g} % of the assignments {at}'
      )
    return lines


def _by_depth(stacked: dict[str, Any], config: ModelConfig) -> tuple[list[str], list[np.ndarray]]:
  """Turns arrays by router of a period, stacked over periods, into a list by depth with names."""
  places = routers_by_depth(stacked, config)
  values = [np.asarray(stacked[place.router][place.period]) for place in places]
  return [place.name for place in places], values


def banner(
  config: ExperimentConfig,
  mesh: jax.sharding.Mesh,
  workdir: pathlib.Path,
  train_data: TrainBatches,
  eval_data: EvalBatches,
  first_step: int,
  num_trained: int,
) -> str:
  """Returns what will be trained, on what, and where it goes."""
  account = accounting.account(config.model, config.train.sequence_length)
  train = config.train
  tokens_per_step = train.batch_size * train.sequence_length
  axes = ', '.join(f'{name} {size}' for name, size in mesh.shape.items() if size > 1)
  processes = f', {jax.process_count()} processes' if jax.process_count() > 1 else ''
  device = mesh.devices.flat[0]
  epochs = train_data.num_tokens_per_epoch
  passes = f', {tokens_per_step * train.num_steps / epochs:.2f} epochs' if epochs else ''
  lines = [
    f'model    {config.model.num_periods} x {config.model.pattern!r}, d_model '
    f'{config.model.d_model}: {account["total_params"]:,} parameters, '
    f'{account["active_params"]:,} active',
    *_trained(config, num_trained, account['total_params']),
    f'compute  {account["flops_per_token_train"]:,} FLOPs per token, forward and backward; '
    f'{config.model.dtype}',
    f'steps    {first_step} done of {train.num_steps}, {train.batch_size} x '
    f'{train.sequence_length} tokens each: {tokens_per_step * train.num_steps:,} tokens{passes}',
    f'devices  {mesh.devices.size} x {device.device_kind}{processes}'
    + (f' ({axes})' if axes else ''),
    *(f'train    {line}' for line in train_data.describe().splitlines()),
    *(f'valid    {line}' for line in eval_data.describe().splitlines()),
    f'workdir  {workdir}',
  ]
  return '\n'.join(lines)


def _trained(config: ExperimentConfig, num_trained: int, num_params: int) -> list[str]:
  """Returns the line that says what is trained, if that is not the whole model."""
  if config.lora.rank:
    matrices = ', '.join(config.lora.targets)
    return [f'trained  {num_trained:,} parameters of adapters of {matrices}, and nothing else']
  if num_trained == num_params:
    return []
  return [f'trained  {num_trained:,} of the {num_params:,} parameters; the others are frozen']


def draw(workdir: pathlib.Path, config: ModelConfig, evaluation: Evaluation) -> None:
  """Draws loss.png and, for a routed model, expert_load.png."""
  with durable.naming(workdir / 'loss.png'):
    plots.plot_loss(read_metrics(workdir / 'metrics.jsonl'), workdir / 'loss.png')
  if evaluation.expert_load:
    with durable.naming(workdir / 'expert_load.png'):
      plots.plot_expert_load(evaluation.expert_load, workdir / 'expert_load.png', evaluation.names)


def sample(config: ExperimentConfig, params: PyTree, tokenizer: Tokenizer | None) -> str | None:
  """Returns the prompt and what the model makes of it; None if there is nothing to write."""
  settings = config.sample
  if tokenizer is None or not settings.num_tokens:
    return None
  prompt = [tokenizer.end_of_text, *tokenizer.encode(settings.prompt)]
  tokens = generate(
    params,
    jnp.asarray([prompt], jnp.int32),
    jax.random.key(config.train.seed),
    config=config.model,
    num_tokens=settings.num_tokens,
    temperature=settings.temperature,
  )
  # Every process wrote it, but no device need have all of it.
  written = multihost_utils.process_allgather(tokens, tiled=True)[0].tolist()
  if tokenizer.end_of_text in written:
    written = written[: written.index(tokenizer.end_of_text)]
  return _printable(settings.prompt + tokenizer.decode(written))


def _printable(text: str) -> str:
  """Returns what any terminal can show: no control sequence, no letter that it cannot encode."""
  shown = ''.join(c if c.isprintable() or c in '\n\t' else '\ufffd' for c in text)
  # There is no standard output if whoever started this closed it.
  encoding = getattr(sys.stdout, 'encoding', None) or 'utf-8'
  return shown.encode(encoding, errors='replace').decode(encoding)
