"""Tokens go to the devices that have their experts, and come back.

Inside `jax.shard_map`: each device along a mesh axis has some of the experts, the first the first,
and a plan for tokens of its own.

With a capacity what devices send each other has a fixed size: each has so many rows for each
expert. Without one, rows go in rounds, as many as it takes, of fixed size (`padded_exchange`) or in
the sizes that they have (`ragged_exchange`).
"""

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from ssm_moe.config import ConfigError
from ssm_moe.config.routing import Exchange
from ssm_moe.layers import dispatch, padded_exchange, ragged_exchange
from ssm_moe.ops import implementation
from ssm_moe.shapes import Array, Float


def apply(
  plan: dispatch.SparsePlan,
  x: Float[Array, 'T M'],
  matrices: Sequence[Any],
  weights: Float[Array, 'T K'] | None,
  *,
  axis_name: str,
  exchange: Exchange = 'padded',
  between: dispatch.Between = dispatch.as_it_is,
  whole: dispatch.Whole | None = None,
) -> Float[Array, 'T ...']:
  """Runs `dispatch.RowPlan.apply`, where this device has the matrices of some experts only.

  Args:
    plan: For this device's tokens, over all experts.
    x: This device's tokens.
    matrices: Of this device's experts.
    weights: Of each token's experts; 1 if None.
    axis_name: Of the mesh axis that experts are split over.
    exchange: How rows are sent where there is no capacity.
    between, whole: As there.

  Raises:
    ConfigError: ragged, on a backend that has no such collective.
  """
  if plan.expert_capacity is not None:
    rows = _to_owners(plan.dispatch(x), plan, axis_name)
    rows = plan.matmuls(rows, matrices, between, whole)
    return plan.combine(_to_sources(rows, plan, axis_name), weights)
  if whole is not None:
    matrices = [whole(matrix) for matrix in matrices]
  chosen = _all_rounds(_ways(exchange), axis_name, between, plan, x, list(matrices))
  return dispatch.sum_choices(chosen, weights)


def _to_owners(rows: Array, plan: dispatch.SparsePlan, axis_name: str) -> Array:
  """Sends rows [E C] of all experts, and returns rows of this device's: [E / X, X C] flattened."""
  num_experts = plan.group_sizes.shape[0]
  by_expert = rows.reshape(num_experts, plan.expert_capacity, *rows.shape[1:])
  ours = jax.lax.all_to_all(by_expert, axis_name, split_axis=0, concat_axis=1, tiled=True)
  return ours.reshape(-1, *rows.shape[1:])


def _to_sources(rows: Array, plan: dispatch.SparsePlan, axis_name: str) -> Array:
  """Undoes `_to_owners`."""
  num_experts = plan.group_sizes.shape[0]
  num_devices = jax.lax.axis_size(axis_name)
  ours = rows.reshape(num_experts // num_devices, -1, *rows.shape[1:])
  by_expert = jax.lax.all_to_all(ours, axis_name, split_axis=1, concat_axis=0, tiled=True)
  return by_expert.reshape(-1, *rows.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _all_rounds(
  ways: ModuleType,
  axis_name: str,
  between: dispatch.Between,
  plan: dispatch.SparsePlan,
  x: Float[Array, 'T M'],
  matrices: list[Float[Array, '...']],
) -> Float[Array, 'T K ...']:
  """Returns what the experts of each token make of it, in as many rounds as it takes."""
  one_round = functools.partial(ways.one_round, axis_name, between, plan)
  first = one_round(jnp.zeros((), jnp.int32), x, matrices)
  return _later_rounds(
    ways, plan, axis_name, lambda i, chosen: chosen + one_round(i, x, matrices), first
  )


def _all_rounds_forward(ways, axis_name, between, plan, x, matrices):
  one_round = functools.partial(ways.one_round, axis_name, between, plan)
  # Most of the time there is but one. Of the others, of which nobody knows how many there are,
  # nothing is kept for the backward pass: they are run again.
  first, pull = jax.vjp(functools.partial(one_round, jnp.zeros((), jnp.int32)), x, matrices)
  chosen = _later_rounds(
    ways, plan, axis_name, lambda i, chosen: chosen + one_round(i, x, matrices), first
  )
  return chosen, (plan, x, matrices, pull)


def _all_rounds_backward(ways, axis_name, between, residuals, d_chosen):
  plan, x, matrices, pull_first = residuals

  def add_round(i, sums):
    one_round = functools.partial(ways.one_round, axis_name, between, plan, i)
    _, pull = jax.vjp(one_round, x, matrices)
    return jax.tree.map(jnp.add, sums, pull(d_chosen))

  return None, *_later_rounds(ways, plan, axis_name, add_round, pull_first(d_chosen))


_all_rounds.defvjp(_all_rounds_forward, _all_rounds_backward)


def _later_rounds(
  ways: ModuleType,
  plan: dispatch.SparsePlan,
  axis_name: str,
  add_round: Callable[[Array, Any], Any],
  first: Any,
) -> Any:
  """Adds to what the first round gave what all others give."""
  rounds = ways.num_rounds(plan, axis_name)
  return first if isinstance(rounds, int) else jax.lax.fori_loop(1, rounds, add_round, first)


def _ways(exchange: Exchange) -> ModuleType:
  """Returns what sends rows in rounds."""
  if exchange == 'padded':
    return padded_exchange
  if implementation.platform() == 'cpu':
    raise ConfigError('moe.exchange is ragged, for which CPUs have no collective; padded would do')
  return ragged_exchange
