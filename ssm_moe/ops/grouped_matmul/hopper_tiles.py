"""What the kernels for Hopper share: tiles of the output, and stages of shared memory.

Each kernel keeps one program on each multiprocessor, which goes from tile to tile of the output.
Blocks of the operands come through the tensor memory accelerator (TMA), several stages ahead and
across the border of tiles, and are multiplied by asynchronous warpgroup instructions out of shared
memory. While the tensor cores work, the same warps start the next copies.

A tile that is done is rounded to registers of its own, and written after the first steps of the
next have started: the tensor cores do not wait for it, and the multiprocessors do not all write at
once.
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
    inputs: Columns of the operand; for the gradient, its rows.
    outputs: Columns of the output.
    column_tiles: Tiles of the output in its last axis.
    steps: Blocks to sum over; for the gradient, the group's rows decide.
    transposed: The matrices are [E, N, K], not [E, K, N].
    gathered: Each row of the operand has its own place, which is read from an array.
    dy_gathered: The same of the cotangents, for the gradient of a matrix.
    top_k: By which the places of `gathered` rows are divided.
    scattered: Each row of the output has its own place, which is read from an array.
    relu: Products below zero become zero.
    weighted: Each product is multiplied with the number that stands at its place in an array.
    block_rows: Of a tile of the output.
    block_columns: Of a tile of the output.
    block_inner: Of the axis that is summed over, in a stage.
    stages: Blocks of each operand in shared memory.
    band: Tiles of rows to go through before the next tile of columns.
    parts: Parts of a tile's columns, each written while the next tile is multiplied; 1, 2 or 4.
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
  gathered: bool
  dy_gathered: bool
  top_k: int
  scattered: bool
  relu: bool
  weighted: bool
  block_rows: int
  block_columns: int
  block_inner: int
  stages: int
  band: int
  parts: int

  @property
  def first_steps(self) -> int:
    """Steps of a tile in whose time the tile before is written."""
    return min(self.parts + 1, self.steps)


@gluon.constexpr_function
def _written_layout(shape, warps):
  """Returns a layout of words of a tile: a thread has four, 16 bytes, side by side.

  A warp has the rows that it has of the product, so values change between its lanes only.
  """
  rows, columns = shape
  registers = [[0, 1], [0, 2], [8, 0]] + [[0, 1 << i] for i in range(4, columns.bit_length() - 1)]
  lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
  warp_rows = [[16 << i, 0] for i in range(warps.bit_length() - 1)]
  more_rows = 16 * warps
  while more_rows < rows:
    registers.append([more_rows, 0])
    more_rows *= 2
  return gl.DistributedLinearLayout(registers, lanes, warp_rows, [], [rows, columns])


@gluon.constexpr_function
def product_layout(T, warps):
  return gl.NVMMADistributedLayout(
    version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, T.block_columns, 16]
  )


@gluon.constexpr_function
def stages_of(shape, T):
  return [T.stages, *shape]


@gluon.jit
def allocate_stages(array, T: gl.constexpr):
  shape: gl.constexpr = stages_of(array.block_type.shape, T)
  return gl.allocate_shared_memory(array.dtype, shape, array.layout)


@gluon.jit
def next_stage(stage, phase, T: gl.constexpr):
  last = stage == T.stages - 1
  return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def to_words(values, dtype: gl.constexpr):
  """Rounds float32 to 16 bits, and puts two columns in one word of 32.

  By name, as the compiler would spend a register on each 16 bits.
  """
  low, high = values.reshape([values.shape[0], values.shape[1] // 2, 2]).split()
  if dtype == gl.bfloat16:
    instruction: gl.constexpr = 'cvt.rn.bf16x2.f32 $0, $2, $1;'
  else:
    instruction: gl.constexpr = 'cvt.rn.f16x2.f32 $0, $2, $1;'
  return gl.inline_asm_elementwise(
    instruction, '=r,r,r', [low, high], dtype=gl.int32, is_pure=False, pack=1
  )


@gluon.jit
def _pointer_to_words(y_ptr):
  return y_ptr.to(gl.pointer_type(gl.int32), bitcast=True)


@gluon.constexpr_function
def _row_layout(rows, columns, warps):
  return gl.SliceLayout(1, _written_layout([rows, columns], warps))


@gluon.jit
def find_places(places_ptr, row, count, COLUMNS: gl.constexpr, T: gl.constexpr):
  """Returns where a tile's rows go: its first row or, if scattered, the place of each row.

  Args:
    places_ptr: int32 [S].
    row: First of the tile.
    count: Rows to write.
    COLUMNS: How many words of a row are written at a time.
  """
  places = row
  if T.scattered:
    layout: gl.constexpr = _row_layout(T.block_rows, COLUMNS, gl.num_warps())
    rows = gl.arange(0, T.block_rows, layout=layout)
    places = gl.load(places_ptr + row + rows, mask=rows < count, other=0)
  return places


@gluon.jit
def write_tile(words, y_ptr, places, count, column, T: gl.constexpr):
  """Writes the first `count` rows of a tile, or of part of its columns, to their places in y."""
  layout: gl.constexpr = _written_layout(words.shape, gl.num_warps())
  OUTPUTS: gl.constexpr = T.outputs // 2
  words = gl.convert_layout(words, layout)
  rows = gl.arange(0, words.shape[0], layout=gl.SliceLayout(1, layout))[:, None]
  columns = gl.arange(0, words.shape[1], layout=gl.SliceLayout(0, layout))[None, :]
  # What the compiler must know for writes of 16 bytes.
  column = gl.multiple_of(column // 2, 4)
  mask = rows < count
  if T.outputs % T.block_columns != 0:
    mask = mask & (columns < OUTPUTS - column)
  first = _pointer_to_words(y_ptr) + column
  if T.scattered:
    gl.store(first + (places.to(gl.int64) * OUTPUTS)[:, None] + columns, words, mask=mask)
  else:
    first += places.to(gl.int64) * OUTPUTS
    gl.store(first + (rows * OUTPUTS + columns), words, mask=mask)


@gluon.jit
def _halves(words):
  shape: gl.constexpr = [words.shape[0], 2, words.shape[1] // 2]
  return words.reshape(shape).permute((0, 2, 1)).split()


@gluon.jit
def cut_columns(words, PARTS: gl.constexpr):
  """Returns `words` in 1, 2 or 4 parts, which moves nothing."""
  parts = (words,)
  if PARTS > 1:
    left, right = _halves(words)
    parts = (left, right)
    if PARTS > 2:
      first, second = _halves(left)
      third, fourth = _halves(right)
      parts = (first, second, third, fourth)
  return parts


@gluon.jit
def write_parts(
  words, START: gl.constexpr, END: gl.constexpr, y_ptr, places, count, column, T: gl.constexpr
):
  for part in gl.static_range(START, END):
    first = column + part * (T.block_columns // T.parts)
    write_tile(words[part], y_ptr, places, count, first, T)


@gluon.jit
def write_zeros(y_ptr, places, count, column, T: gl.constexpr):
  shape: gl.constexpr = [T.block_rows, T.block_columns // 2]
  layout: gl.constexpr = _written_layout(shape, gl.num_warps())
  write_tile(gl.zeros(shape, gl.int32, layout=layout), y_ptr, places, count, column, T)
