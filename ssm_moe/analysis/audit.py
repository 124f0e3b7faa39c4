"""Passes over documents beside a model's own: recorded routes given back, wrong ones injected.

And what an audit says of each layer.
"""

import math
from typing import Any, NamedTuple

from ssm_moe.analysis import routing
from ssm_moe.analysis.balance import routing_statistics
from ssm_moe.analysis.documents import Documents, Windows
from ssm_moe.analysis.replay import Record
from ssm_moe.config import ExperimentConfig
from ssm_moe.errors import UserError


class Injection(NamedTuple):
  """What one --inject asks for."""

  layer: str
  rate: float


def parse_injection(asked: str) -> Injection:
  """Reads LAYER:RATE; what LAYER may be, the model says.

  Raises:
    UserError: the rate is missing or no fraction.
  """
  layer, _, number = asked.rpartition(':')
  try:
    rate = float(number)
  except ValueError:
    rate = math.nan
  if not layer or not 0 <= rate <= 1:
    raise UserError(f'--inject={asked}: it must be LAYER:RATE, with a RATE from 0 to 1')
  return Injection(layer, rate)


def find_layers(asked: str, layers: list[routing.Layer]) -> list[routing.Layer]:
  """Returns the layers that a number, a name, a router or 'all' stands for.

  Raises:
    UserError: there is none, or one whose decisions cannot be changed.
  """
  found = [
    layer
    for layer in layers
    if asked in ('all', layer.name, layer.router)
    or (asked.isdecimal() and int(asked) == layer.depth)
  ]
  if not found:
    names = ', '.join(layer.name for layer in layers)
    raise UserError(f'--inject={asked}: there is no such layer; there are: {names}')
  for layer in found:
    if layer.experts_choose:
      raise UserError(f'--inject={asked}: in layer {layer.name} experts choose tokens')
    if layer.num_experts == 1:
      raise UserError(f'--inject={asked}: layer {layer.name} has one expert only')
  return found


class Replay:
  """A pass under recorded decisions, beside the model's own."""

  def __init__(self, tracer: routing.Tracer, record: Record):
    self._tracer, self._record, self._pass = tracer, record, tracer.start()
    self._difference, self._differing = 0.0, 0

  def add(self, window, own: routing.Traced) -> None:
    routes, differing = self._record.routes(window, own)
    replayed = self._pass.run(window, routes)
    difference = self._tracer.difference(window, own, replayed)
    if not math.isfinite(difference):
      raise UserError(f'--replay={self._record.path}: the logits under it are not finite')
    self._difference = max(self._difference, difference)
    self._differing += differing

  def result(self) -> dict[str, Any]:
    return {
      'record': self._record.path,
      'max_abs_difference': self._difference,
      'decisions_that_differ': self._differing,
    }

  def sentence(self, before: routing.Totals) -> str:
    del before
    return (
      f'replay of {self._record.path}: {self._differing} decisions differ, logits by at most '
      f'{self._difference:.3g}'
    )


class Injected:
  """A pass under the model's own decisions but for those that an injection changes."""

  def __init__(self, tracer: routing.Tracer, asked: Injection, *, seed: int):
    self._seed = seed
    self._asked, self._layers = asked, find_layers(asked.layer, tracer.layers)
    self._pass, self._totals = tracer.start(), routing.Totals(tracer.layers)
    self._tokens = self._routes = 0

  def add(self, window, own: routing.Traced) -> None:
    routes, changed = routing.inject(
      own.routes, self._layers, window, rate=self._asked.rate, seed=self._seed
    )
    self._totals.add(window, self._pass.run(window, routes))
    self._tokens += int(changed.any(axis=0).sum())
    self._routes += int(changed.sum())

  def result(self, before: routing.Totals) -> dict[str, Any]:
    nats = self._totals.nats - before.nats
    return {
      'layers': [layer.name for layer in self._layers],
      'rate': self._asked.rate,
      'tokens_changed': self._tokens,
      'routes_changed': self._routes,
      'loss_before': before.loss,
      'loss_after': self._totals.loss,
      'loss_rise': nats / before.tokens,
      'nats_per_changed_token': nats / self._tokens if self._tokens else None,
    }

  def sentence(self, before: routing.Totals) -> str:
    found = self.result(before)
    return (
      f'wrong routes for {found["tokens_changed"]} of {before.tokens} tokens '
      f'({self._asked.layer}, rate {self._asked.rate:g}): loss {before.loss:.4f} becomes '
      f'{found["loss_after"]:.4f}'
    )


def make_windows(experiment: ExperimentConfig, documents: Documents) -> Windows:
  """Returns windows of the size that the model was trained with, no more lanes than documents."""
  model, train = experiment.model, experiment.train
  # Router groups divide the tokens of a whole batch.
  grouped = 'E' in model.layers and model.moe.router_groups > 1
  lanes = train.batch_size if grouped else min(train.batch_size, len(documents))
  return Windows(documents, lanes=lanes, length=train.sequence_length)


def summaries(totals: routing.Totals) -> list[dict[str, Any]]:
  """Returns for each layer its loads, the statistics that training logs, and means over tokens."""
  statistics = routing_statistics(totals.loads())
  return [
    summary | {key: values[i] for key, values in statistics.items()}
    for i, summary in enumerate(totals.summary())
  ]


def table(layers: list[dict[str, Any]]) -> str:
  """Returns `summaries` as lines of text."""
  width = max(len(layer['name']) for layer in layers)
  lines = [
    f'{"layer":{width}}  experts  balance  most loaded   dead  dropped  fallback  top weight',
  ]
  for layer in layers:
    experts = len(layer['expert_load'])
    most = f'{max(layer["expert_load"]) * experts:.2f}/{experts}'
    lines.append(
      f'{layer["name"]:{width}}  {experts:7d}  {layer["expert_load_entropy"]:7.1%}  {most:>11}  '
      f'{layer["dead_experts"]:5d}  {layer["dropped_fraction"]:7.2%}  '
      f'{layer["fallback_fraction"]:8.2%}  {layer["top_weight"]:10.3f}'
    )
  return '\n'.join(lines)
