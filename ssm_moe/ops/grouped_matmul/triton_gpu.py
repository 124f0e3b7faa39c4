"""NVIDIA Hopper: kernels in Gluon that keep the tensor cores fed, forward and for both gradients.

Work follows the sizes of the groups, which stay on the device: each program of a kernel walks over
them, and finds its tiles. Nothing is added up by atomics, so results repeat bit by bit.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from ssm_moe.ops import gpu_kernels
from ssm_moe.ops.grouped_matmul.blocks import BlockSizes, default_block_sizes
from ssm_moe.ops.grouped_matmul.order import RowOrder
from ssm_moe.shapes import Array, Float, Int

# Groups are sorted in shared memory, beside the blocks.
_MAX_GROUPS = 1024
# A row of what TMA reads begins at a multiple of 16 bytes.
_MULTIPLE = 8
# Smaller weights count as this, so that a product can be found again from what it was weighted to.
_LEAST_WEIGHT = 1e-18


@dataclasses.dataclass(frozen=True)
class Gathers:
  """What the kernels gather themselves; the rest is gathered before, by a pass over memory.

  Neither is faster on an H200 (docs/performance.md): what the pass took, kernels lose that read
  through an index and not by TMA.

  Attributes:
    rows: Those that are taken, for the products and for the gradient of the weights. What is kept
      for the backward pass is then the tokens: less, where they are several layers' or top_k is 2.
    dy: Cotangents of products that are put, for both gradients.
  """

  rows: bool = False
  dy: bool = False


def supports(rows: Array, weights: Array) -> str | None:
  """Returns why the kernels cannot multiply these, or None."""
  if (reason := gpu_kernels.unavailable(exactly=gpu_kernels.HOPPER)) is not None:
    return reason
  if rows.dtype not in (jnp.bfloat16, jnp.float16):
    return f'its kernels take bfloat16 or float16, not {rows.dtype}'
  if 0 in (*rows.shape, *weights.shape):
    return 'its kernels take no empty arrays'
  if weights.shape[0] > _MAX_GROUPS:
    return f'its kernels take at most {_MAX_GROUPS} groups, not {weights.shape[0]}'
  return None


def grouped_matmul(
  rows: Float[Array, 'R M'],
  weights: Float[Array, 'E M *F'],
  group_sizes: Int[Array, 'E'],
  *,
  take: RowOrder | None = None,
  put: RowOrder | None = None,
  relu: bool = False,
  combine_weights: Float[Array, 'T K'] | None = None,
  block_sizes: BlockSizes | None = None,
  gathers: Gathers = Gathers(),
) -> Float[Array, 'S *F'] | Float[Array, 'T K *F']:
  """Runs `api.grouped_matmul`; several output axes are made one.

  Besides, `gathers` says what the kernels gather themselves, and `combine_weights`, with `put`,
  what each product is multiplied with before it is rounded and written; XLA can as well join that
  to the sum over a token's experts (docs/performance.md).

  Axes that are no multiple of 8 are padded, which copies the array.

  Raises:
    NotImplementedError: weights without `put`, with `relu`, or for float16.
  """
  if combine_weights is not None and (put is None or relu or rows.dtype != jnp.bfloat16):
    raise NotImplementedError(
      'combine_weights are for bfloat16 products that are put, without relu'
    )
  inputs = rows.shape[1]
  num_groups, _, *output_shape = weights.shape
  matrices = weights.reshape(num_groups, inputs, -1)
  outputs = matrices.shape[2]
  if block_sizes is None:
    num_rows = rows.shape[0] if take is None else take.row_assignment.shape[0]
    block_sizes = default_block_sizes(num_rows, inputs, outputs, num_groups)
  more_inputs, more_outputs = -inputs % _MULTIPLE, -outputs % _MULTIPLE
  if more_inputs:
    rows = jnp.pad(rows, ((0, 0), (0, more_inputs)))
  if more_inputs or more_outputs:
    matrices = jnp.pad(matrices, ((0, 0), (0, more_inputs), (0, more_outputs)))
  group_sizes = group_sizes.astype(jnp.int32)
  weighting = None if combine_weights is None else combine_weights.astype(jnp.float32)
  y = _multiply(block_sizes, gathers, relu, rows, matrices, group_sizes, take, put, weighting)
  first_axes = y.shape[:1] if put is None else put.assignment_row.shape
  return y[:, :outputs].reshape(*first_axes, *output_shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _multiply(
  block_sizes: BlockSizes,
  gathers: Gathers,
  relu: bool,
  rows: Float[Array, 'T M'],
  weights: Float[Array, 'E M F'],
  group_sizes: Int[Array, 'E'],
  take: RowOrder | None,
  put: RowOrder | None,
  weighting: Float[Array, 'T K'] | None,
) -> Float[Array, 'S F']:
  return _forward(block_sizes, gathers, relu, rows, weights, group_sizes, take, put, weighting)[0]


def _forward(block_sizes, gathers, relu, rows, weights, group_sizes, take, put, weighting):
  # Not at the top: it imports Triton.
  from ssm_moe.ops.grouped_matmul import hopper_kernels

  from_row = None
  if take is not None:
    if _can_read(rows, gathers.rows):
      from_row = take.row_assignment
    else:
      rows = _gather(rows, take.row_assignment // take.top_k)
  y = hopper_kernels.multiply(
    rows,
    weights,
    group_sizes,
    block_sizes.product,
    from_row=from_row,
    top_k=1 if from_row is None else take.top_k,
    to_row=None if put is None else put.row_assignment,
    relu=relu,
    scales=None if weighting is None else _not_zero(weighting).reshape(-1),
  )
  kept = y if relu or weighting is not None else None
  return y, (rows, from_row, weights, group_sizes, take, put, weighting, kept)


def _backward(block_sizes, gathers, relu, residuals, dy):
  from ssm_moe.ops.grouped_matmul import hopper_kernels

  rows, from_row, weights, group_sizes, take, put, weighting, y = residuals
  d_weighting = None
  if relu:
    dy = jnp.where(y > 0, dy, jnp.zeros((), dy.dtype))
  if weighting is not None:
    wide, scales = dy.astype(jnp.float32), _not_zero(weighting)
    # y is the product times its weight.
    d_weighting = jnp.sum(wide * y.astype(jnp.float32), axis=1).reshape(scales.shape) / scales
    dy = (wide * scales.reshape(-1, 1)).astype(dy.dtype)
  dy_from_row = None
  if put is not None:
    if _can_read(dy, gathers.dy):
      dy_from_row = put.row_assignment
    else:
      dy = _gather(dy, put.row_assignment)
  d_rows = hopper_kernels.multiply(
    dy,
    weights,
    group_sizes,
    block_sizes.d_rows,
    from_row=dy_from_row,
    to_row=None if take is None else take.row_assignment,
    transposed=True,
  )
  if take is not None:
    d_rows = d_rows.reshape(*take.assignment_row.shape, -1).sum(axis=1)
  d_weights = hopper_kernels.sum_outer_products(
    rows,
    dy,
    group_sizes,
    block_sizes.d_weights,
    from_row=from_row,
    top_k=1 if from_row is None else take.top_k,
    dy_from_row=dy_from_row,
  )
  return d_rows, d_weights, None, None, None, d_weighting


def _not_zero(weighting: Float[Array, 'T K']) -> Float[Array, 'T K']:
  small = jnp.abs(weighting) < _LEAST_WEIGHT
  return jnp.where(small, jnp.float32(_LEAST_WEIGHT), weighting)


def _can_read(rows: Array, wanted: bool) -> bool:
  """Returns whether kernels gather rows themselves: they count numbers in 32 bits."""
  return wanted and rows.size < 2**32


def _gather(rows: Array, index: Int[Array, 'S']) -> Array:
  return rows.at[index].get(mode='promise_in_bounds')


_multiply.defvjp(_forward, _backward)
