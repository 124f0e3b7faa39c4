"""Rows are sent straight to where their expert is, by a collective of uneven sizes.

Inside `jax.shard_map`, on backends that have `jax.lax.ragged_all_to_all`: GPU and TPU. All rows for
the experts of a device, whoever sends them, make a line there: by expert, then by sender. The
device has room for a window of that line, and there are as many rounds as windows. What arrives is
in order, so nothing is sorted or gathered there, and no padding is sent.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ssm_moe.layers import dispatch
from ssm_moe.shapes import Array, Float, Int

# Rows that a device has room for, over those it gets if all get equally many. Two devices then
# never need a second round, and that is known before: a loop whose end is not makes the host wait.
_ROOM = 2.0


class Chunks(NamedTuple):
  """The rows of each sender for each expert that go in one round.

  Attributes:
    sender_row: The first of them, among the rows of the sender.
    owner_row: Where it goes, among the rows of the device that has the expert.
    size: How many there are.
  """

  sender_row: Int[Array, 'X E']
  owner_row: Int[Array, 'X E']
  size: Int[Array, 'X E']

  def of_owner(self, axis_name: str) -> 'Chunks':
    """Returns those for this device's experts."""
    num_senders, num_experts = self.size.shape
    own = num_experts // num_senders
    first = jax.lax.axis_index(axis_name) * own
    return Chunks(*(jax.lax.dynamic_slice_in_dim(field, first, own, axis=1) for field in self))

  def of_sender(self, axis_name: str) -> 'Chunks':
    """Returns those of this device's rows."""
    return Chunks(*(field[jax.lax.axis_index(axis_name)] for field in self))


def make_chunks(counts: Int[Array, 'X E'], i: Int[Array, ''], room: int) -> Chunks:
  """Returns what is sent in round `i`.

  Args:
    counts: Rows of each sender for each expert; a sender's are sorted by expert.
    i: Number of the round.
    room: Rows of a window.
  """
  num_devices, num_experts = counts.shape
  of_expert = jnp.sum(counts, axis=0).reshape(num_devices, -1)
  experts_before = (jnp.cumsum(of_expert, axis=1) - of_expert).reshape(1, num_experts)
  place = experts_before + jnp.cumsum(counts, axis=0) - counts
  sender_row = jnp.cumsum(counts, axis=1) - counts
  window = i * room
  low = jnp.clip(place, window, window + room)
  size = jnp.clip(place + counts, window, window + room) - low
  return Chunks(
    sender_row=jnp.where(size > 0, sender_row + low - place, 0),
    owner_row=jnp.where(size > 0, low - window, 0),
    size=size,
  )


def num_rounds(plan: dispatch.SparsePlan, axis_name: str) -> Int[Array, ''] | int:
  """Returns in how many rounds all rows of all devices are sent; a number if it is known now."""
  room, num_devices = _room(plan, axis_name), jax.lax.axis_size(axis_name)
  if room == num_devices * plan.order.row_assignment.shape[0]:
    return 1
  counts = jax.lax.all_gather(plan.group_sizes, axis_name)
  longest = jnp.max(jnp.sum(counts, axis=0).reshape(num_devices, -1).sum(axis=1))
  # The same everywhere, not only among those who exchange: all run one program.
  axes = tuple(jax.sharding.get_abstract_mesh().manual_axes)
  return jax.lax.pmax((longest + room - 1) // room, axes)


def one_round(
  axis_name: str,
  between: dispatch.Between,
  plan: dispatch.SparsePlan,
  i: Int[Array, ''],
  x: Float[Array, 'T M'],
  matrices: Sequence[Float[Array, '...']],
) -> Float[Array, 'T K ...']:
  """Returns what comes back of the rows that are sent in round `i`; zero for the others.

  Args:
    axis_name: Of the mesh axis that experts are split over.
    between: As in `dispatch.Plan.apply`.
    plan: For this device's tokens, over all experts.
    i: Number of the round.
    x: This device's tokens.
    matrices: Of this device's experts.
  """
  room = _room(plan, axis_name)
  chunks = make_chunks(jax.lax.all_gather(plan.group_sizes, axis_name), i, room)
  rows = plan.order.take(x)
  lengths = _Lengths(rows.shape[0], room)
  arrived = _to_owners(axis_name, lengths, rows, chunks)
  sizes = jnp.sum(chunks.of_owner(axis_name).size, axis=0)
  products = dispatch.multiply_rows(arrived, matrices, sizes, between)
  return plan.order.put(_to_senders(axis_name, lengths, products, chunks))


def _room(plan: dispatch.SparsePlan, axis_name: str) -> int:
  num_rows = plan.order.row_assignment.shape[0]
  return min(math.ceil(_ROOM * num_rows), jax.lax.axis_size(axis_name) * num_rows)


class _Lengths(NamedTuple):
  """Rows of a device as a sender, and of a window."""

  sender: int
  window: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _to_owners(axis_name: str, lengths: _Lengths, rows: Array, chunks: Chunks) -> Array:
  """Sends rows to the devices of their experts; returns this device's window, the rest zero."""
  sent, arriving = chunks.of_sender(axis_name), chunks.of_owner(axis_name)
  return jax.lax.ragged_all_to_all(
    rows,
    jnp.zeros((lengths.window, *rows.shape[1:]), rows.dtype),
    sent.sender_row,
    sent.size,
    sent.owner_row,
    arriving.size.reshape(-1),
    axis_name=axis_name,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _to_senders(axis_name: str, lengths: _Lengths, rows: Array, chunks: Chunks) -> Array:
  """Undoes `_to_owners`; zero where nothing was sent."""
  sent, arriving = chunks.of_owner(axis_name), chunks.of_sender(axis_name)
  return jax.lax.ragged_all_to_all(
    rows,
    jnp.zeros((lengths.sender, *rows.shape[1:]), rows.dtype),
    sent.owner_row.reshape(-1),
    sent.size.reshape(-1),
    sent.sender_row.reshape(-1),
    arriving.size,
    axis_name=axis_name,
  )


# Each is the other's transpose.
_to_owners.defvjp(
  lambda *args: (_to_owners(*args), args[-1]),
  lambda axis_name, lengths, chunks, d: (_to_senders(axis_name, lengths, d, chunks), None),
)
_to_senders.defvjp(
  lambda *args: (_to_senders(*args), args[-1]),
  lambda axis_name, lengths, chunks, d: (_to_owners(axis_name, lengths, d, chunks), None),
)
