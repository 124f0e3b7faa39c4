"""The public function: checks its arguments and selects an implementation."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from ssm_moe.ops import implementation as implementation_lib
from ssm_moe.ops.grouped_matmul import megablox, reference, tiled, triton_gpu
from ssm_moe.ops.grouped_matmul.order import RowOrder
from ssm_moe.shapes import Array, Float, Int

Implementation = Literal['auto', 'reference', 'tiled', 'megablox', 'triton_gpu']


def grouped_matmul(
  rows: Float[Array, 'R M'],
  weights: Float[Array, 'E M *F'],
  group_sizes: Int[Array, 'E'],
  *,
  take: RowOrder | None = None,
  put: RowOrder | None = None,
  relu: bool = False,
  implementation: Implementation = 'auto',
) -> Float[Array, 'S *F'] | Float[Array, 'T K *F']:
  """Multiplies each row with the matrix of its group.

  y_s = rows_s weights_{e(s)},    e(s) the group of row s.

  The output axes of the weights may be several; they stay apart, so that each can be sharded.

  Args:
    rows: [S, M], sorted by group: the first group_sizes[0] rows belong to group 0, and so on. With
      `take`, tokens [T, M].
    weights: One matrix for each group, in the dtype of `rows`.
    group_sizes: Rows of each group; any may be zero. They add up to S or less; what is left of the
      rows belongs to no group, and its products are zero.
    take: Rows are first taken from `rows` in this order, which has all T * K = S assignments.
    put: Products are put where their assignment is: [T, K, F]. A kernel that can writes them there
      by itself, here and, with `take`, in the gradient of `rows`; else a gather does.
    relu: Products below zero become zero, by a kernel that can before it writes them.
    implementation: 'auto' selects by backend, and on a TPU or GPU by whether the rows are known to
      be on one device (`ops.implementation.on_one_device`); a name never falls back to another.

  Returns:
    The products in the dtype of `rows`, accumulated in float32 or better. Gradients flow to `rows`
    and `weights`.

  Raises:
    ValueError: shapes or dtypes that do not fit, or an implementation that does not exist.
    TypeError: rows that are not floating point, or group sizes that are not integers.
    NotImplementedError: the named implementation cannot run these arguments.
  """
  rows, weights, group_sizes = (jnp.asarray(v) for v in (rows, weights, group_sizes))
  _check(rows, weights, group_sizes)
  _check_orders(rows, take, put)
  candidates = {
    'megablox': functools.partial(megablox.supports, rows, weights),
    'triton_gpu': functools.partial(triton_gpu.supports, rows, weights),
    'tiled': implementation_lib.always,
    'reference': implementation_lib.always,
  }
  name = implementation_lib.select('grouped_matmul', implementation, candidates)
  if name == 'triton_gpu':
    return triton_gpu.grouped_matmul(rows, weights, group_sizes, take=take, put=put, relu=relu)
  multiply = {
    'megablox': megablox.grouped_matmul,
    'tiled': tiled.grouped_matmul,
    'reference': reference.grouped_matmul,
  }[name]
  products = multiply(rows if take is None else take.take(rows), weights, group_sizes)
  if relu:
    products = jax.nn.relu(products)
  return products if put is None else put.put(products)


def _check(rows: Array, weights: Array, group_sizes: Array) -> None:
  if rows.ndim != 2:
    raise ValueError(f'grouped_matmul: rows has shape {rows.shape}; it must be [S, M]')
  if weights.ndim < 3:
    raise ValueError(
      f'grouped_matmul: weights has shape {weights.shape}; it must be [E, M, F], where F may be '
      'several axes'
    )
  if group_sizes.ndim != 1:
    raise ValueError(f'grouped_matmul: group_sizes has shape {group_sizes.shape}; it must be [E]')
  if rows.shape[1] != weights.shape[1]:
    raise ValueError(
      f'grouped_matmul: rows have {rows.shape[1]} columns and weights {weights.shape[1]} rows'
    )
  if weights.shape[0] != group_sizes.shape[0]:
    raise ValueError(
      f'grouped_matmul: {weights.shape[0]} matrices for {group_sizes.shape[0]} group sizes'
    )
  if not jnp.issubdtype(rows.dtype, jnp.floating):
    raise TypeError(f'grouped_matmul: rows is {rows.dtype}; it must be floating point')
  if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
    raise TypeError(f'grouped_matmul: group_sizes is {group_sizes.dtype}; it must be integer')
  if rows.dtype != weights.dtype:
    raise ValueError(
      f'grouped_matmul: rows are {rows.dtype} and weights {weights.dtype}; give both in one dtype'
    )


def _check_orders(rows: Array, take: RowOrder | None, put: RowOrder | None) -> None:
  for name, order in (('take', take), ('put', put)):
    if order is None:
      continue
    if not isinstance(order, RowOrder):
      raise TypeError(f'grouped_matmul: {name} is {type(order).__name__}; it must be RowOrder')
    for field, axes in (('row_assignment', '[S]'), ('assignment_row', '[T, K]')):
      array = getattr(order, field)
      if array.ndim != axes.count(',') + 1:
        raise ValueError(
          f'grouped_matmul: {name}.{field} has shape {array.shape}; it must be {axes}'
        )
      if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f'grouped_matmul: {name}.{field} is {array.dtype}; it must be integer')
  num_rows = rows.shape[0] if take is None else take.row_assignment.shape[0]
  for name, order in (('take', take), ('put', put)):
    if order is not None and not num_rows == order.row_assignment.size == order.assignment_row.size:
      raise ValueError(
        f'grouped_matmul: {name} has {order.row_assignment.size} rows for '
        f'{order.assignment_row.size} assignments, and there are {num_rows} rows; all must be one '
        'number'
      )
  if take is not None and rows.shape[0] != take.assignment_row.shape[0]:
    raise ValueError(
      f'grouped_matmul: rows has {rows.shape[0]} tokens and take '
      f'{take.assignment_row.shape[0]}; they must be as many'
    )
