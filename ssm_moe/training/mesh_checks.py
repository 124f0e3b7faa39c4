"""Whether an experiment fits a mesh: what has to divide is checked before anything is written.

What need not divide, such as the vocabulary over `tensor`, is whole on every device instead.
"""

import math

from jax.sharding import AbstractMesh, Mesh

from ssm_moe import sharding
from ssm_moe.config import ConfigError, ExperimentConfig


def check_fits(config: ExperimentConfig, mesh: Mesh | AbstractMesh) -> None:
  """Checks the rows of a batch, its length, the router groups and the experts.

  Raises:
    ConfigError: something does not divide; the message has values that would.
  """
  train, devices = config.train, sharding.batch_divisor(mesh)
  rows = train.batch_size // train.accumulation_steps
  if rows % devices:
    multiple = devices * train.accumulation_steps
    parts = train.accumulation_steps
    times = f', times {parts} for config.train.accumulation_steps' if parts > 1 else ''
    below = train.batch_size // multiple * multiple
    sizes = sharding.one_of([size for size in (below, below + multiple) if size])
    raise ConfigError(
      f'config.train.batch_size is {train.batch_size}; it must be a multiple of the {devices} '
      f'devices that rows are split over{times}: {sizes} would do'
    )
  length, pieces = train.sequence_length, mesh.shape['sequence']
  if length % pieces:
    sizes = sharding.divisors(math.gcd(length, mesh.size))
    raise ConfigError(
      f'config.mesh.sequence is {pieces}, which does not divide config.train.sequence_length, '
      f'{length}; {sharding.one_of(sizes)} would'
    )
  tokens = rows * length
  for name, routing in config.model.routings().items():
    if tokens % routing.router_groups:
      raise ConfigError(
        f'config.model.{name}.router_groups is {routing.router_groups}; it must divide the '
        f'{tokens} tokens routed together'
      )
    if routing.num_experts % mesh.shape['expert']:
      sizes = sharding.divisors(math.gcd(routing.num_experts, mesh.size))
      raise ConfigError(
        f'config.mesh.expert is {mesh.shape["expert"]}, which does not divide the '
        f'{routing.num_experts} experts of config.model.{name}; {sharding.one_of(sizes)} would'
      )
