"""Rows are sent to where their expert is, by collectives of fixed size, in rounds.

Inside `jax.shard_map`, on any backend. In a round every device sends every other equally many rows;
what fills them up belongs to no expert. There are as many rounds as it takes; so nothing overflows,
and the cost follows the fullest pair of devices.
"""

import functools
import math

import jax
import jax.numpy as jnp

from ssm_moe.layers import dispatch
from ssm_moe.ops.grouped_matmul import RowOrder
from ssm_moe.shapes import Array, Float, Int

# Rows that a device has for another in a round, over those it has if all have equally many. More
# sends more padding; less needs a second round for less uneven routing.
_ROOM = 1.25


def _room(plan: dispatch.SparsePlan, num_devices: int) -> int:
  """Returns the rows that a device has for another in a round."""
  num_rows = plan.order.row_assignment.shape[0]
  return min(math.ceil(_ROOM * num_rows / num_devices), num_rows)


def _runs(plan: dispatch.SparsePlan, num_devices: int) -> tuple[Array, Array]:
  """Returns where the rows of each device's experts start and end, [X, E / X]."""
  ends = jnp.cumsum(plan.group_sizes)
  starts = ends - plan.group_sizes
  return starts.reshape(num_devices, -1), ends.reshape(num_devices, -1)


def num_rounds(plan: dispatch.SparsePlan, axis_name: str) -> Int[Array, '']:
  """Returns in how many rounds all rows of all devices are sent."""
  num_devices = jax.lax.axis_size(axis_name)
  starts, ends = _runs(plan, num_devices)
  room = _room(plan, num_devices)
  rounds = (jnp.max(ends[:, -1] - starts[:, 0]) + room - 1) // room
  # The same everywhere, not only among those who exchange: all run one program.
  return jax.lax.pmax(rounds, tuple(jax.sharding.get_abstract_mesh().manual_axes))


def one_round(
  axis_name: str,
  between: dispatch.Between,
  plan: dispatch.SparsePlan,
  i: Int[Array, ''],
  x: Float[Array, 'T M'],
  matrices: list[Float[Array, '...']],
) -> Float[Array, 'T K ...']:
  """Returns what comes back of the rows that are sent in round `i`; zero for the others.

  Args are those of `ragged_exchange.one_round`.
  """
  num_devices = jax.lax.axis_size(axis_name)
  send = functools.partial(
    jax.lax.all_to_all, axis_name=axis_name, split_axis=0, concat_axis=0, tiled=True
  )
  starts, ends = _runs(plan, num_devices)
  room = _room(plan, num_devices)
  start = starts[:, :1] + i * room
  order = _order_of_round(plan.order, start, ends[:, -1:], room)
  sizes = jnp.maximum(jnp.minimum(ends, start + room) - jnp.maximum(starts, start), 0)
  arrived = _arrived(send(sizes), room)
  products = arrived.apply(send(order.take(x)), matrices, between=between)
  return order.put(send(products))


def _arrived(sizes: Int[Array, 'X E'], room: int) -> dispatch.SparsePlan:
  """Returns the plan for rows that arrived: of each of X devices `room`, the first of them sorted.

  That one knows without sorting: by expert, then by device; what fills up the room comes last.

  Args:
    sizes: Rows of each device for each of this device's experts.
    room: Rows of each device, with or without an expert.
  """
  own = jnp.sum(sizes, axis=0)
  sizes = jnp.concatenate([sizes, room - jnp.sum(sizes, axis=1, keepdims=True)], axis=1)
  ends = jnp.cumsum(sizes, axis=1)
  of_expert = jnp.sum(sizes, axis=0, keepdims=True)
  earlier = jnp.cumsum(of_expert, axis=1) - of_expert + jnp.cumsum(sizes, axis=0) - sizes
  row = jnp.arange(room)[None, :]
  expert = jnp.sum(row[:, :, None] >= ends[:, None, :-1], axis=2)
  # By the place of the first row of a device and expert, and its place among those that arrived.
  place = jnp.take_along_axis(earlier - (ends - sizes), expert, axis=1) + row
  place = place.reshape(-1)
  num_rows = place.shape[0]
  row_assignment = jnp.zeros_like(place).at[place]
  row_assignment = row_assignment.set(jnp.arange(num_rows, dtype=place.dtype), unique_indices=True)
  order = RowOrder(row_assignment, place.reshape(-1, 1))
  return dispatch.SparsePlan(order, group_sizes=own, dropped=None, expert_capacity=None)


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
