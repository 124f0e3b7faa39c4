"""Rows that a kernel for Hopper reads through an index, from wherever they are.

TMA reads boxes, and rows in any order are none. So each thread copies 16 bytes of some rows, into
the same stages and in the same swizzled order as TMA would: asynchronous copies, of which each
stage is a group.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ssm_moe.ops.grouped_matmul.hopper_tiles import stages_of


@gluon.constexpr_function
def _copy_layout(warps):
  """Returns a layout where 8 lanes have 128 bytes of a row, which is what is swizzled together.

  A thread's rows are 4 times `warps` apart, a multiple of 8: they are swizzled alike, so that one
  address serves for all of them.
  """
  return gl.BlockedLayout([1, 8], [4, 8], [warps, 1], [1, 0])


@gluon.constexpr_function
def _stages_layout():
  return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@gluon.jit
def allocate_gathered(source_ptr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, T: gl.constexpr):
  """Returns stages for blocks of rows that are read through an index."""
  shape: gl.constexpr = stages_of([ROWS, COLUMNS], T)
  layout: gl.constexpr = _stages_layout()
  return gl.allocate_shared_memory(source_ptr.dtype.element_ty, shape, layout)


@gluon.jit
def load_index(index_ptr, row, count, ROWS: gl.constexpr):
  """Returns the entries of the index from `row` on; zeros after the first `count`.

  To be called a step before `copy_rows`, so that nothing waits for it.
  """
  layout: gl.constexpr = gl.SliceLayout(1, _copy_layout(gl.num_warps()))
  rows = gl.arange(0, ROWS, layout=layout)
  return gl.load(index_ptr + row + rows, mask=rows < count, other=0)


@gluon.jit
def copy_rows(block, source_ptr, index, column, WIDTH: gl.constexpr, TOP_K: gl.constexpr):
  """Starts the copy of a block: of each row that `index` names, some columns from `column` on.

  Args:
    block: In shared memory.
    source_ptr: Rows of WIDTH numbers, fewer than 2**32 in all.
    index: TOP_K times the row, or less than TOP_K more.
    column: The first of the block; what is beyond WIDTH becomes zero.
  """
  layout: gl.constexpr = _copy_layout(gl.num_warps())
  columns = gl.arange(0, block.shape[1], layout=gl.SliceLayout(0, layout))[None, :]
  # What the compiler must know for copies of 16 bytes.
  column = gl.multiple_of(column, 8)
  # Without sign, and in 32 bits as long as can be, for the sake of registers.
  place = (index.to(gl.uint32) // TOP_K)[:, None] * WIDTH + columns.to(gl.uint32)
  mask = None
  if WIDTH % block.shape[1] != 0:
    mask = columns < WIDTH - column
  async_copy.async_load(block, (source_ptr + column) + place, mask=mask)


@gluon.jit
def copy_some_rows(
  block, source_ptr, index, column, count, WIDTH: gl.constexpr, TOP_K: gl.constexpr
):
  """Does as `copy_rows`, but for the first `count` rows: all others become zero.

  A block is wider than high here, so each row has an address, to which its columns are added.
  """
  layout: gl.constexpr = _copy_layout(gl.num_warps())
  columns = gl.arange(0, block.shape[1], layout=gl.SliceLayout(0, layout))[None, :]
  column = gl.multiple_of(column, 8)
  row = (index.to(gl.uint32) // TOP_K)[:, None]
  mask = gl.arange(0, block.shape[0], layout=gl.SliceLayout(1, layout))[:, None] < count
  if WIDTH % block.shape[1] != 0:
    mask = mask & (columns < WIDTH - column)
  async_copy.async_load(block, (source_ptr + column) + row * WIDTH + columns, mask=mask)


@gluon.jit
def wait_for_copies(T: gl.constexpr):
  """Waits for the stage that is multiplied next; those after it are still on their way.

  The tensor cores read by the asynchronous proxy, and threads copy by the other, so each thread
  fences what it has copied, before it says so to the others.
  """
  async_copy.wait_group(T.stages - 2)
  hopper.fence_async_shared()
  gl.barrier()
