"""The portable production path: expert after expert, in tiles of rows.

The work follows the group sizes themselves, not the largest of them, so a trained router's uneven
load costs what an even one does. Loops rather than conditionals: a loop updates its carry in place,
while a conditional around the output array copies it (on jax 0.10).

A group's rows, rounded up to a multiple of 32, are cut in tiles of 512, then at most one each of
256, 128, 64 and 32: few calls, because each reads and repacks the whole matrix, and at most 31 rows
a group computed in vain.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ssm_moe.shapes import Array, Float, Int

_TILE_SIZES = (512, 256, 128, 64, 32)
# Gradients of matrices contract over rows. Long slabs, because each further slab reads and writes
# the whole gradient once more; the rest of a group is rounded up to 64 rows.
_SLAB = 512
_SLAB_STEP = 64


@jax.custom_vjp
def grouped_matmul(
  rows: Float[Array, 'S M'], weights: Float[Array, 'E M *F'], group_sizes: Int[Array, 'E']
) -> Float[Array, 'S *F']:
  """Runs `api.grouped_matmul`."""

  def multiply(tile, matrix):
    return jax.lax.dot_general(
      tile, matrix, (((1,), (0,)), ((), ())), preferred_element_type=_accumulator(tile.dtype)
    ).astype(tile.dtype)

  return _map_tiles(multiply, rows, weights, group_sizes, weights.shape[2:])


def _forward(rows, weights, group_sizes):
  return grouped_matmul(rows, weights, group_sizes), (rows, weights, group_sizes)


def _backward(residuals, dy):
  rows, weights, group_sizes = residuals
  outputs = tuple(range(1, dy.ndim))

  def multiply_transposed(tile, matrix):
    return jax.lax.dot_general(
      tile, matrix, ((outputs, outputs), ((), ())), preferred_element_type=_accumulator(tile.dtype)
    ).astype(tile.dtype)

  d_rows = _map_tiles(multiply_transposed, dy, weights, group_sizes, rows.shape[1:])
  return d_rows, _weight_gradient(rows, dy, group_sizes), None


grouped_matmul.defvjp(_forward, _backward)


def _accumulator(dtype: jnp.dtype) -> jnp.dtype:
  return jnp.dtype(jnp.float32) if dtype.itemsize < 4 else dtype


def _map_tiles(
  multiply: Callable[[Array, Array], Array],
  rows: Array,
  weights: Array,
  group_sizes: Array,
  output_shape: tuple[int, ...],
) -> Array:
  """Applies `multiply(tile of rows, matrix of its group)` to all rows."""
  num_rows = rows.shape[0]
  sizes = [size for size in _TILE_SIZES if size <= num_rows] or [num_rows]

  def put_tile(y, matrix, start, end, size):
    # Near the end of the array a tile moves back over rows of earlier groups, and keeps them.
    moved = jnp.clip(start, 0, num_rows - size)
    position = moved + jnp.arange(size)
    ours = (position >= start) & (position < end)
    tile = multiply(jax.lax.dynamic_slice_in_dim(rows, moved, size), matrix)
    there = jax.lax.dynamic_slice_in_dim(y, moved, size)
    ours = ours.reshape(ours.shape + (1,) * len(output_shape))
    return jax.lax.dynamic_update_slice_in_dim(y, jnp.where(ours, tile, there), moved, axis=0)

  def one_group(y, group):
    matrix, start, count = group
    end = start + count
    left = -(-count // sizes[-1]) * sizes[-1]
    for size in sizes:
      repeats = left // size

      def one_tile(i, y, start=start, size=size):
        return put_tile(y, matrix, start + i * size, end, size)

      y = jax.lax.fori_loop(0, repeats, one_tile, y)
      start, left = start + repeats * size, left - repeats * size
    return y, None

  y = jnp.zeros((num_rows, *output_shape), rows.dtype)
  starts = jnp.cumsum(group_sizes) - group_sizes
  return jax.lax.scan(one_group, y, (weights, starts, group_sizes))[0]


def _weight_gradient(rows: Array, dy: Array, group_sizes: Array) -> Array:
  """Returns, for each group, the sum over its rows of the outer product of row and cotangent."""
  num_rows = rows.shape[0]
  shape = (rows.shape[1], *dy.shape[1:])
  accumulator = _accumulator(rows.dtype)
  slab = min(_SLAB, num_rows)
  rest_sizes = [*range(_SLAB_STEP, slab, _SLAB_STEP), slab]

  def contract(start, end, size):
    moved = jnp.clip(start, 0, num_rows - size)
    position = moved + jnp.arange(size)
    ours = (position >= start) & (position < end)
    left = jax.lax.dynamic_slice_in_dim(rows, moved, size)
    left = jnp.where(ours[:, None], left, 0)
    right = jax.lax.dynamic_slice_in_dim(dy, moved, size)
    return jax.lax.dot_general(
      left, right, (((0,), (0,)), ((), ())), preferred_element_type=accumulator
    )

  def one_group(_, group):
    start, count = group
    end = start + count
    num_slabs = count // slab
    rest = count - num_slabs * slab
    branches = [lambda: jnp.zeros(shape, accumulator)]
    for size in rest_sizes:
      branches.append(lambda size=size: contract(start + num_slabs * slab, end, size))
    branch = jnp.searchsorted(jnp.array([0, *rest_sizes]), rest)
    gradient = jax.lax.switch(branch, branches)
    gradient = jax.lax.fori_loop(
      0, num_slabs, lambda i, sum_: sum_ + contract(start + i * slab, end, slab), gradient
    )
    return None, gradient.astype(rows.dtype)

  starts = jnp.cumsum(group_sizes) - group_sizes
  return jax.lax.scan(one_group, None, (starts, group_sizes))[1]
