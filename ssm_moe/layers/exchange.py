"""Tokens go to the devices that have their experts, and come back.

Inside `jax.shard_map`: each device along a mesh axis has some of the experts, the first the first,
and a plan for tokens of its own. What devices send each other has a fixed size, so that it needs no
more than an all-to-all, which every backend has.

With a capacity that is natural: each device has so many rows for each expert. Without one, rows are
sent in rounds. In each, every device sends every other a fixed number of rows, and there are as
many rounds as it takes; so nothing overflows, and the cost follows the fullest pair of devices.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ssm_moe.layers import dispatch
from ssm_moe.ops.grouped_matmul import RowOrder
from ssm_moe.shapes import Array, Float, Int

# Rows that a device has for another in a round, over those it has if all have equally many. More
# sends more padding; less needs a second round for less uneven routing.
_ROOM = 1.25


def apply(
  plan: dispatch.SparsePlan,
  x: Float[Array, 'T M'],
  matrices: Sequence[Any],
  weights: Float[Array, 'T K'] | None,
  *,
  axis_name: str,
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
    between, whole: As there.
  """
  if plan.expert_capacity is not None:
    rows = _to_owners(plan.dispatch(x), plan, axis_name)
    rows = plan.matmuls(rows, matrices, between, whole)
    return plan.combine(_to_sources(rows, plan, axis_name), weights)
  if whole is not None:
    matrices = [whole(matrix) for matrix in matrices]
  chosen = _all_rounds(axis_name, between, plan, x, list(matrices))
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _all_rounds(
  axis_name: str,
  between: dispatch.Between,
  plan: dispatch.SparsePlan,
  x: Float[Array, 'T M'],
  matrices: list[Float[Array, '...']],
) -> Float[Array, 'T K ...']:
  """Returns what the experts of each token make of it, in as many rounds as it takes."""
  one_round = functools.partial(_one_round, axis_name, between, plan)
  first = one_round(jnp.zeros((), jnp.int32), x, matrices)
  return _later_rounds(plan, axis_name, lambda i, chosen: chosen + one_round(i, x, matrices), first)


def _all_rounds_forward(axis_name, between, plan, x, matrices):
  one_round = functools.partial(_one_round, axis_name, between, plan)
  # Most of the time there is but one. Of the others, of which nobody knows how many there are,
  # nothing is kept for the backward pass: they are run again.
  first, pull = jax.vjp(functools.partial(one_round, jnp.zeros((), jnp.int32)), x, matrices)
  chosen = _later_rounds(
    plan, axis_name, lambda i, chosen: chosen + one_round(i, x, matrices), first
  )
  return chosen, (plan, x, matrices, pull)


def _all_rounds_backward(axis_name, between, residuals, d_chosen):
  plan, x, matrices, pull_first = residuals

  def add_round(i, sums):
    one_round = functools.partial(_one_round, axis_name, between, plan, i)
    _, pull = jax.vjp(one_round, x, matrices)
    return jax.tree.map(jnp.add, sums, pull(d_chosen))

  return None, *_later_rounds(plan, axis_name, add_round, pull_first(d_chosen))


_all_rounds.defvjp(_all_rounds_forward, _all_rounds_backward)


def _later_rounds(
  plan: dispatch.SparsePlan, axis_name: str, add_round: Callable[[Array, Any], Any], first: Any
) -> Any:
  """Adds to what the first round gave what all others give."""
  return jax.lax.fori_loop(1, _num_rounds(plan, axis_name), add_round, first)


def _room(plan: dispatch.SparsePlan, num_devices: int) -> int:
  """Returns the rows that a device has for another in a round."""
  num_rows = plan.order.row_assignment.shape[0]
  return min(math.ceil(_ROOM * num_rows / num_devices), num_rows)


def _runs(plan: dispatch.SparsePlan, num_devices: int) -> tuple[Array, Array]:
  """Returns where the rows of each device's experts start and end, [X, E / X]."""
  ends = jnp.cumsum(plan.group_sizes)
  starts = ends - plan.group_sizes
  return starts.reshape(num_devices, -1), ends.reshape(num_devices, -1)


def _num_rounds(plan: dispatch.SparsePlan, axis_name: str) -> Int[Array, '']:
  """Returns in how many rounds all rows of all devices are sent."""
  num_devices = jax.lax.axis_size(axis_name)
  starts, ends = _runs(plan, num_devices)
  room = _room(plan, num_devices)
  rounds = (jnp.max(ends[:, -1] - starts[:, 0]) + room - 1) // room
  # The same everywhere, not only among those who exchange: all run one program.
  return jax.lax.pmax(rounds, tuple(jax.sharding.get_abstract_mesh().manual_axes))


def _one_round(
  axis_name: str,
  between: dispatch.Between,
  plan: dispatch.SparsePlan,
  i: Int[Array, ''],
  x: Float[Array, 'T M'],
  matrices: list[Float[Array, '...']],
) -> Float[Array, 'T K ...']:
  """Returns what comes back of the rows that are sent in round `i`; zero for the others."""
  num_devices = jax.lax.axis_size(axis_name)
  send = functools.partial(
    jax.lax.all_to_all, axis_name=axis_name, split_axis=0, concat_axis=0, tiled=True
  )
  starts, ends = _runs(plan, num_devices)
  room = _room(plan, num_devices)
  start = starts[:, :1] + i * room
  order = _order_of_round(plan.order, start, ends[:, -1:], room)
  sizes = jnp.maximum(jnp.minimum(ends, start + room) - jnp.maximum(starts, start), 0)
  received_ends = jnp.cumsum(send(sizes), axis=1)
  # Rows come sorted by expert from each device; what fills up the room has no expert.
  expert = jnp.sum(jnp.arange(room)[None, :, None] >= received_ends[:, None, :], axis=2)
  ours = dispatch.dropless_plan(expert.reshape(-1, 1), received_ends.shape[1])
  products = ours.apply(send(order.take(x)), matrices, between=between)
  return order.put(send(products))


def _order_of_round(
  order: RowOrder, start: Int[Array, 'X 1'], end: Int[Array, 'X 1'], room: int
) -> RowOrder:
  """Returns the order of the rows of a round: `room` for each device, empty after its last."""
  num_assignments = order.assignment_row.size
  row = start + jnp.arange(room)[None, :]
  assignment = order.row_assignment.at[row].get(mode='fill', fill_value=num_assignments)
  row_assignment = jnp.where(row < end, assignment, num_assignments).reshape(-1)
  num_rows = row_assignment.shape[0]
  assignment_row = jnp.full((num_assignments,), num_rows, jnp.int32)
  assignment_row = assignment_row.at[row_assignment].set(
    jnp.arange(num_rows, dtype=jnp.int32), mode='drop'
  )
  return RowOrder(row_assignment, assignment_row.reshape(order.assignment_row.shape))
