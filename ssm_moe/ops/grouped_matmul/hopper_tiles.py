"""What the kernels for Hopper share: tiles of the output, and stages of shared memory.

Each kernel keeps one program on each multiprocessor, which goes from tile to tile of the output.
Blocks of the operands come through the tensor memory accelerator (TMA), several stages ahead and
across the border of tiles, and are multiplied by asynchronous warpgroup instructions out of shared
memory. While the tensor cores work, the same warps start the next copies, so nothing waits but for
the epilogue: rounding, and writing out of registers.
"""

import dataclasses

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@dataclasses.dataclass(frozen=True)
class Tiling:
  """What a kernel is compiled for.

  Attributes:
    num_groups: E.
    padded_groups: The same, rounded up to a power of two.
    num_rows: S.
    row_tiles: Tiles of the gradient of a matrix in its first axis.
    inputs: Rows of that gradient.
    outputs: Columns of the output.
    column_tiles: Tiles of the output in its last axis.
    steps: Blocks to sum over; for the gradient, the group's rows decide.
    transposed: The matrices are [E, N, K], not [E, K, N].
    block_rows: Of a tile of the output.
    block_columns: Of a tile of the output.
    block_inner: Of the axis that is summed over, in a stage.
    stages: Blocks of each operand in shared memory.
      band: Tiles of rows to go through before the next tile of columns.
  """

  num_groups: int
  padded_groups: int
  num_rows: int
  row_tiles: int
  inputs: int
  outputs: int
  column_tiles: int
  steps: int
  transposed: bool
  block_rows: int
  block_columns: int
  block_inner: int
  stages: int
  band: int


@gluon.constexpr_function
def _written_layout(T, warps):
  """Returns a layout of a tile in which a thread has 16 bytes side by side.

  A warp has the rows that it has of the product, so values change between its lanes only.
  """
  columns = T.block_columns.bit_length() - 1
  registers = [[0, 1], [0, 2], [0, 4], [8, 0]] + [[0, 1 << i] for i in range(5, columns)]
  lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
  warp_rows = [[16 << i, 0] for i in range(warps.bit_length() - 1)]
  more_rows = 16 * warps
  while more_rows < T.block_rows:
    registers.append([more_rows, 0])
    more_rows *= 2
  shape = [T.block_rows, T.block_columns]
  return gl.DistributedLinearLayout(registers, lanes, warp_rows, [], shape)


@gluon.constexpr_function
def product_layout(T, warps):
  return gl.NVMMADistributedLayout(
    version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, T.block_columns, 16]
  )


@gluon.constexpr_function
def _in_stages(shape, T):
  return [T.stages, *shape]


@gluon.jit
def allocate_stages(array, T: gl.constexpr):
  shape: gl.constexpr = _in_stages(array.block_type.shape, T)
  return gl.allocate_shared_memory(array.dtype, shape, array.layout)


@gluon.jit
def next_stage(stage, phase, T: gl.constexpr):
  last = stage == T.stages - 1
  return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def write_tile(tile, y_ptr, row, count, column, T: gl.constexpr):
  """Writes the first `count` rows of a tile from y[row, column] on."""
  layout: gl.constexpr = _written_layout(T, gl.num_warps())
  values = gl.convert_layout(tile, layout)
  rows = gl.arange(0, T.block_rows, layout=gl.SliceLayout(1, layout))[:, None]
  columns = gl.arange(0, T.block_columns, layout=gl.SliceLayout(0, layout))[None, :]
  # What the compiler must know for writes of 16 bytes.
  column = gl.multiple_of(column, 8)
  mask = rows < count
  if T.outputs % T.block_columns != 0:
    mask = mask & (columns < T.outputs - column)
  first = y_ptr + row.to(gl.int64) * T.outputs + column
  gl.store(first + (rows * T.outputs + columns), values, mask=mask)


@gluon.jit
def write_zeros(y_ptr, row, count, column, T: gl.constexpr):
  layout: gl.constexpr = _written_layout(T, gl.num_warps())
  shape: gl.constexpr = [T.block_rows, T.block_columns]
  zeros = gl.zeros(shape, y_ptr.dtype.element_ty, layout=layout)
  write_tile(zeros, y_ptr, row, count, column, T)
