"""Starts the kernels for Hopper."""

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
  rows: Float[Array, 'S M'],
  weights: Float[Array, 'E M F'],
  group_sizes: Int[Array, 'E'],
  blocks,
  *,
  to_row: Int[Array, 'S'] | None = None,
  transposed: bool = False,
) -> Float[Array, 'S F']:
  """Multiplies each row with the matrix of its group, or with the matrix `transposed`.

  Args:
    rows: bfloat16 or float16; its last axis, as that of `weights`, a multiple of 8.
    weights: In the dtype of `rows`.
    group_sizes: int32.
    blocks: `blocks.Blocks`.
    to_row: Which row of the result each product becomes, a permutation; the same if None.
    transposed: The last axes of `rows` and `weights` are summed over.
  """
  num_rows, inputs = rows.shape
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
    scattered=to_row is not None,
  )
  inner = (blocks.columns, blocks.inner) if transposed else (blocks.inner, blocks.columns)
  return _call(
    product_kernel,
    tiling,
    blocks,
    _describe(rows, (blocks.rows, blocks.inner)),
    _describe(weights, (1, *inner)),
    group_sizes,
    group_sizes if to_row is None else to_row.astype('int32'),  # a pointer, read only if scattered
    out_type=jax.ShapeDtypeStruct((num_rows, outputs), rows.dtype),
  )


def sum_outer_products(
  rows: Float[Array, 'S M'],
  dy: Float[Array, 'S F'],
  group_sizes: Int[Array, 'E'],
  blocks,
) -> Float[Array, 'E M F']:
  """Returns, for each group, the sum over its rows of the outer product of row and cotangent."""
  num_groups = group_sizes.shape[0]
  inputs, outputs = rows.shape[1], dy.shape[1]
  tiling = _tiling(
    blocks,
    num_groups=num_groups,
    num_rows=rows.shape[0],
    row_tiles=-(-inputs // blocks.rows),
    inputs=inputs,
    outputs=outputs,
    steps=0,
    transposed=False,
    scattered=False,
  )
  return _call(
    gradient_kernel,
    tiling,
    blocks,
    _describe(rows, (blocks.inner, blocks.rows)),
    _describe(dy, (blocks.inner, blocks.columns)),
    group_sizes,
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
