"""A recurrence over time that is cut into pieces, one on each device along a mesh axis.

A piece takes the state that enters it to h_out = exp(A t) h_in + added, with t its time (the sum of
its step sizes) and `added` the state that it ends in when it begins from zero. Neither needs any
other piece, nor the steps of its own one after the other: token s adds exp(A t_s) of its own, t_s
being the time from there to the end. So each device finds both, all tell each other, and each makes
of them what enters its piece: then the op runs on the piece as on a sequence of its own.

The cotangents of states go the same way from right to left. The backward pass is that of the op on
each piece, from the cotangent of what leaves it, which is found likewise.

A reset inside a piece, or at its first token, makes its time infinite. What is sent does not depend
on the length: a state and a time for each piece, once forward and once backward.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssm_moe.shapes import Array, Bool, Float, Int

AXIS = 'sequence'

# Arguments of an op by name, those that gradients flow to.
Arrays = dict[str, Array | None]


class Recurrence(NamedTuple):
  """What the pieces of an op hand on.

  Attributes:
    run: The op: of `segment_ids`, `h0` and its arrays by name, to y and the last state.
    forward: Of the arrays and of where the state is reset, to `added` and the time of the piece.
    backward: Of the arrays, dy and the resets, to what y adds to the cotangent of the state that
      enters the piece.
    decay: Of A and times, to the factor of the state.
  """

  run: Callable[..., tuple[Array, Array]]
  forward: Callable[[Arrays, Bool[Array, 'B L']], tuple[Array, Array]]
  backward: Callable[[Arrays, Array, Bool[Array, 'B L']], Array]
  decay: Callable[[Array, Array], Array]


def run_piece(
  op: Recurrence, *, segment_ids: Int[Array, 'B L'] | None, h0: Array | None, **arrays: Array | None
) -> tuple[Array, Array]:
  """Returns y of this device's piece, and the state after the last piece, on every device.

  Args:
    op: The recurrence.
    segment_ids: Of the piece.
    h0: State before the first piece; zeros if None.
    **arrays: Of the piece.
  """
  batch, length = arrays['x'].shape[:2]
  starts = jnp.zeros((batch, length), bool) if segment_ids is None else _starts(segment_ids)
  return _run(op, arrays, h0, segment_ids, starts)


def from_left(x: Array) -> Array:
  """Returns what the device has whose piece comes before this one's; zeros if there is none."""
  size = jax.lax.axis_size(AXIS)
  return jax.lax.ppermute(x, AXIS, [(i, i + 1) for i in range(size - 1)])


def is_first() -> Bool[Array, '']:
  """Whether this device has the first piece."""
  return jax.lax.axis_index(AXIS) == 0


def of_last(x: Array) -> Array:
  """Returns what the device with the last piece has."""
  last = jax.lax.axis_index(AXIS) == jax.lax.axis_size(AXIS) - 1
  return jax.lax.psum(jnp.where(last, x, jnp.zeros_like(x)), AXIS)


def continues(segment_ids: Int[Array, 'B L']) -> Bool[Array, 'B']:
  """Returns whether the first token belongs to the document of the token before it.

  The first of the sequence does.
  """
  same = from_left(segment_ids[:, -1]) == segment_ids[:, 0]
  return same | is_first()


def _starts(segment_ids: Int[Array, 'B L']) -> Bool[Array, 'B L']:
  changes = segment_ids[:, 1:] != segment_ids[:, :-1]
  return jnp.concatenate([~continues(segment_ids)[:, None], changes], axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(
  op: Recurrence,
  arrays: Arrays,
  h0: Array | None,
  segment_ids: Int[Array, 'B L'] | None,
  starts: Bool[Array, 'B L'],
) -> tuple[Array, Array]:
  return _forward(op, arrays, h0, segment_ids, starts)[0]


def _forward(op, arrays, h0, segment_ids, starts):
  added, time = op.forward(arrays, starts)
  times = jax.lax.all_gather(time, AXIS)
  if h0 is not None:
    added = added.astype(jnp.promote_types(added.dtype, h0.dtype))
  first = jnp.zeros_like(added) if h0 is None else h0.astype(added.dtype)
  entering, last = _join(first, jax.lax.all_gather(added, AXIS), _decays(op, arrays, times))
  entering = jnp.where(_like(starts[:, 0], entering), 0, entering)

  def run(arrays, entering):
    # The last state is known from what the pieces told each other, and its cotangent as well.
    return op.run(**arrays, segment_ids=segment_ids, h0=entering)

  (y, _), pull = jax.vjp(run, arrays, entering)
  return (y, last), (_without(pull, arrays), arrays, h0, starts, times)


def _backward(op, residuals, cotangents):
  pull, arrays, h0, starts, times = residuals
  pull = pull(arrays)
  dy, d_last = cotangents
  # All devices have the last state, so each is handed a share of its cotangent; they are equal.
  d_last = d_last * jax.lax.axis_size(AXIS)
  added = op.backward(arrays, dy, starts).astype(d_last.dtype)
  leaving, _ = _join(
    d_last, jax.lax.all_gather(added, AXIS), _decays(op, arrays, times), from_right=True
  )
  d_arrays, d_entering = pull((dy, leaving))
  d_h0 = None if h0 is None else jnp.where(is_first(), d_entering, 0).astype(h0.dtype)
  return d_arrays, d_h0, None, None


_run.defvjp(_forward, _backward)


def _without(pull: Any, arrays: Arrays) -> Callable[[Arrays], Any]:
  """Returns `pull` as a function of the arrays that it holds, so that none is kept twice."""
  leaves, tree = jax.tree.flatten(pull)
  known = {id(array): i for i, array in enumerate(jax.tree.leaves(arrays))}
  places = [known.get(id(leaf)) for leaf in leaves]

  def join(others, arrays):
    others, arrays = iter(others), jax.tree.leaves(arrays)
    return tree.unflatten(next(others) if i is None else arrays[i] for i in places)

  others = [leaf for leaf, place in zip(leaves, places) if place is None]
  return jax.tree_util.Partial(join, others)


def _decays(op: Recurrence, arrays: Arrays, times: Float[Array, 'S ...']) -> Float[Array, 'S ...']:
  decays = op.decay(arrays['A'].astype(times.dtype), times)
  forgotten = jnp.isposinf(times).reshape(*times.shape, *(1,) * (decays.ndim - times.ndim))
  return jnp.where(forgotten, 0, decays)


def _join(
  first: Float[Array, '...'],
  added: Float[Array, 'S ...'],
  decays: Float[Array, 'S ...'],
  *,
  from_right: bool = False,
) -> tuple[Float[Array, '...'], Float[Array, '...']]:
  """Returns what enters this device's piece, and what comes out of the last one.

  Args:
    first: What enters the first piece, or the last one if `from_right`.
    added, decays: Of all pieces.
    from_right: Whether pieces are walked from right to left.
  """
  mine = jax.lax.axis_index(AXIS)
  entering = now = first
  order = range(added.shape[0])
  for piece in reversed(order) if from_right else order:
    now = decays[piece].astype(now.dtype) * now + added[piece]
    comes_later = mine < piece if from_right else mine > piece
    entering = jnp.where(comes_later, now, entering)
  return entering, now


def _like(rows: Bool[Array, 'B'], x: Array) -> Array:
  return rows.reshape(-1, *(1,) * (x.ndim - 1))
