"""Starts the kernels for Hopper."""

import dataclasses

import jax
import jax_triton
from triton.experimental.gluon import language as gl

from ssm_moe.ops import gpu_kernels
from ssm_moe.ops.grouped_matmul.hopper_gradient import gradient_kernel
from ssm_moe.ops.grouped_matmul.hopper_product import product_kernel
from ssm_moe.ops.grouped_matmul.hopper_tiles import Tiling
from ssm_moe.shapes import Array, Float, Int

_MULTIPROCESSORS = 132


def multiply(
  rows: Float[Array, 'T M'],
  weights: Float[Array, 'E M F'],
  group_sizes: Int[Array, 'E'],
  blocks,
  *,
  from_row: Int[Array, 'S'] | None = None,
  top_k: int = 1,
  to_row: Int[Array, 'S'] | None = None,
  transposed: bool = False,
  relu: bool = False,
  scales: Float[Array, 'S'] | None = None,
) -> Float[Array, 'S F']:
  """Multiplies each row with the matrix of its group, or with the matrix `transposed`.

  Args:
    rows: bfloat16 or float16; its last axis, as that of `weights`, a multiple of 8.
    weights: In the dtype of `rows`.
    group_sizes: int32.
    blocks: `blocks.Blocks`.
    from_row: If given, row s is row from_row[s] // top_k of `rows`, which can have any number.
    top_k: See from_row.
    to_row: Which row of the result each product becomes, a permutation; the same if None.
    transposed: The last axes of `rows` and `weights` are summed over.
    relu: Products below zero become zero.
    scales: float32. What each row of the result is multiplied with, before it is rounded.
  """
  inputs = rows.shape[1]
  num_rows = _length(rows, from_row)
  if blocks.warps == 4 and from_row is not None and to_row is None:
    blocks = _in_small_parts(blocks)
  outputs = weights.shape[1 if transposed else 2]
  tiling = _tiling(
    blocks,
    num_groups=weights.shape[0],
    num_rows=num_rows,
    row_tiles=0,
    inputs=inputs,
    outputs=outputs,
    steps=-(-inputs // blocks.inner),
    transposed=transposed,
    gathered=from_row is not None,
    dy_gathered=False,
    top_k=top_k,
    scattered=to_row is not None,
    relu=relu,
    weighted=scales is not None,
  )
  inner = (blocks.columns, blocks.inner) if transposed else (blocks.inner, blocks.columns)
  return _call(
    product_kernel,
    tiling,
    blocks,
    _rows(rows, from_row, (blocks.rows, blocks.inner)),
    _describe(weights, (1, *inner)),
    group_sizes,
    _pointer(from_row, group_sizes),
    _pointer(to_row, group_sizes),
    group_sizes if scales is None else scales.astype('float32'),
    out_type=jax.ShapeDtypeStruct((num_rows, outputs), rows.dtype),
  )


def sum_outer_products(
  rows: Float[Array, 'T M'],
  dy: Float[Array, '_ F'],
  group_sizes: Int[Array, 'E'],
  blocks,
  *,
  from_row: Int[Array, 'S'] | None = None,
  top_k: int = 1,
  dy_from_row: Int[Array, 'S'] | None = None,
) -> Float[Array, 'E M F']:
  """Returns, for each group, the sum over its rows of the outer product of row and cotangent.

  Args:
    rows: As those of `multiply`, like `group_sizes`, `blocks`, `from_row` and `top_k`.
    dy: In the dtype of `rows`.
    dy_from_row: If given, which of the rows of `dy` is that of row s.
  """
  num_groups = group_sizes.shape[0]
  inputs, outputs = rows.shape[1], dy.shape[1]
  if blocks.warps == 4 or (from_row is None) != (dy_from_row is None):
    blocks = _in_small_parts(blocks)
  tiling = _tiling(
    blocks,
    num_groups=num_groups,
    num_rows=_length(rows, from_row),
    row_tiles=-(-inputs // blocks.rows),
    inputs=inputs,
    outputs=outputs,
    steps=0,
    transposed=False,
    gathered=from_row is not None,
    dy_gathered=dy_from_row is not None,
    top_k=top_k,
    scattered=False,
    relu=False,
    weighted=False,
  )
  return _call(
    gradient_kernel,
    tiling,
    blocks,
    _rows(rows, from_row, (blocks.inner, blocks.rows)),
    _rows(dy, dy_from_row, (blocks.inner, blocks.columns)),
    group_sizes,
    _pointer(from_row, group_sizes),
    _pointer(dy_from_row, group_sizes),
    out_type=jax.ShapeDtypeStruct((num_groups, inputs, outputs), rows.dtype),
  )


def _tiling(blocks, *, num_groups, outputs, **others) -> Tiling:
  return Tiling(
    num_groups=num_groups,
    padded_groups=max(32, 1 << (num_groups - 1).bit_length()),
    outputs=outputs,
    column_tiles=-(-outputs // blocks.columns),
    block_rows=blocks.rows,
    block_columns=blocks.columns,
    block_inner=blocks.inner,
    stages=blocks.stages,
    band=blocks.band,
    parts=blocks.parts,
    **others,
  )


def _in_small_parts(blocks):
  """Has a tile written in as many parts as can be, for kernels that would run out of registers."""
  return dataclasses.replace(blocks, parts=min(4, blocks.columns // 32))


def _length(rows: Array, from_row: Array | None) -> int:
  return rows.shape[0] if from_row is None else from_row.shape[0]


def _rows(array: Array, from_row: Array | None, block: tuple[int, int]):
  return _describe(array, block) if from_row is None else array


def _pointer(index: Array | None, other: Array) -> Array:
  """Returns `index`, or another pointer, which is not read."""
  return other if index is None else index.astype('int32')


def _describe(array: Array, block: tuple[int, ...]) -> jax_triton.TensorDescriptor:
  layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(block))
  return jax_triton.TensorDescriptor.from_array(array, block, layout)


def _call(kernel, tiling, blocks, *operands, out_type) -> Array:
  return gpu_kernels.call(
    *operands,
    kernel=kernel,
    out_type=out_type,
    grid=(_MULTIPROCESSORS * blocks.programs,),
    options={'num_warps': blocks.warps},
    T=tiling,
  )
