"""A kernel in Gluon for Hopper: sums of outer products by group."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from ssm_moe.ops.grouped_matmul.hopper_gather import (
  allocate_gathered,
  copy_some_rows,
  load_index,
  wait_for_copies,
)
from ssm_moe.ops.grouped_matmul.hopper_tiles import (
  allocate_stages,
  cut_columns,
  next_stage,
  product_layout,
  to_words,
  write_parts,
  write_zeros,
)


@gluon.jit
def _sort_groups(sizes_ptr, order, T: gl.constexpr):
  """Writes size, first row and index of each group to `order`, the largest first.

  Each thread ranks a group or two, by comparing it with all.
  """
  CHUNK: gl.constexpr = 32
  layout: gl.constexpr = gl.BlockedLayout([1, CHUNK], [32, 1], [gl.num_warps(), 1], [1, 0])
  group = gl.arange(0, T.padded_groups, layout=gl.SliceLayout(1, layout))
  size = gl.load(sizes_ptr + group, mask=group < T.num_groups, other=-1)
  rank = gl.zeros_like(group)
  first_row = gl.zeros_like(group)
  for start in range(0, T.num_groups, CHUNK):
    other = start + gl.arange(0, CHUNK, layout=gl.SliceLayout(0, layout))
    other_size = gl.load(sizes_ptr + other, mask=other < T.num_groups, other=0)[None, :]
    earlier = other[None, :] < group[:, None]
    larger = other_size > size[:, None]
    rank += gl.sum((larger | (earlier & (other_size == size[:, None]))).to(gl.int32), axis=1)
    first_row += gl.sum(gl.where(earlier, other_size, 0), axis=1)
  # Groups that are none rank behind all others, in their own order.
  rank = gl.where(group < T.num_groups, rank, group)
  order.index(0).scatter(size, rank, axis=0)
  order.index(1).scatter(first_row, rank, axis=0)
  order.index(2).scatter(group, rank, axis=0)


@gluon.jit
def _read_scalar(memory, index):
  layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
  return gl.sum(memory.gather(gl.full([1], index, gl.int32, layout=layout), axis=0), axis=0)


@gluon.jit
def _place_gradient(tile, order, T: gl.constexpr):
  """Returns size, first row and index of the group of a tile, and the tile's row and column."""
  TILES: gl.constexpr = T.row_tiles * T.column_tiles
  rank = tile // TILES
  place = tile - rank * TILES
  known = gl.minimum(rank, T.padded_groups - 1)
  size = gl.where(rank < T.num_groups, _read_scalar(order.index(0), known), 0)
  first_row = _read_scalar(order.index(1), known)
  group = _read_scalar(order.index(2), known)
  column = place // T.row_tiles
  row = place - column * T.row_tiles
  return size, first_row, group, row * T.block_rows, column * T.block_columns


@gluon.jit
def _next_tile(tile):
  """Returns a program's next tile: programs come in turn, and the other way round the next time.

  Tiles come by size of their group. In the same order each time, the same programs would get the
  larger ones.
  """
  programs = gl.num_programs(0)
  turn = tile // programs
  return (turn + 1) * programs + programs - 1 - (tile - turn * programs)


@gluon.jit
def _find_rows(index_ptr, row, end, GATHERED: gl.constexpr, T: gl.constexpr):
  """Returns which rows a block reads: its first or, if gathered, the index of each."""
  found = row
  if GATHERED:
    # Sizes that add up to more than there are rows must not read outside.
    found = load_index(index_ptr, row, gl.minimum(end, T.num_rows) - row, T.block_inner)
  return found


@gluon.jit
def _load_for_gradient(
  state, rows, dy, index_ptr, dy_index_ptr, order, a, b, ready, T: gl.constexpr
):
  """Starts the next copy to shared memory, for this tile or the next, unless there is none left.

  Of rows that are gathered, those after the group's last become zero, also when there is none left.
  """
  tile, size, row, end, a_column, b_column, stage, a_found, b_found = state
  some = size > 0
  bar = ready.index(stage)
  count = gl.minimum(end, T.num_rows) - row
  if not T.gathered and not T.dy_gathered:
    mbarrier.expect(bar, rows.block_type.nbytes + dy.block_type.nbytes, pred=some)
  elif not T.gathered:
    mbarrier.expect(bar, rows.block_type.nbytes, pred=some)
  elif not T.dy_gathered:
    mbarrier.expect(bar, dy.block_type.nbytes, pred=some)
  if not T.gathered:
    tma.async_load(rows, [row, a_column], bar, a.index(stage), pred=some)
  if not T.dy_gathered:
    tma.async_load(dy, [row, b_column], bar, b.index(stage), pred=some)
  if T.gathered:
    copy_some_rows(a.index(stage), rows, a_found, a_column, count, T.inputs, T.top_k)
  if T.dy_gathered:
    copy_some_rows(b.index(stage), dy, b_found, b_column, count, T.outputs, 1)
  if T.gathered or T.dy_gathered:
    async_copy.commit_group()
  stage, _ = next_stage(stage, 0, T)
  row += T.block_inner
  # Groups without rows are the last.
  if some & (row >= end):
    tile = _next_tile(tile)
    size, row, _, a_column, b_column = _place_gradient(tile, order, T)
    end = row + size
  a_found = _find_rows(index_ptr, row, end, T.gathered, T)
  b_found = _find_rows(dy_index_ptr, row, end, T.dy_gathered, T)
  return tile, size, row, end, a_column, b_column, stage, a_found, b_found


@gluon.jit
def _clear_rows(block, count):
  """Makes the rows of a block zero from the row `count` on."""
  layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
  rows = gl.arange(0, block.shape[0], layout=gl.SliceLayout(1, layout))[:, None]
  values = block.load(layout)
  block.store(gl.where(rows < count, values, gl.zeros_like(values)))


@gluon.jit
def _multiply(acc, a, b, ready, stage, phase, rest, add, T: gl.constexpr):
  """Starts the multiplication of a stage, when it has come, of which `rest` rows count."""
  if not (T.gathered and T.dy_gathered):
    mbarrier.wait(ready.index(stage), phase)
    if rest < T.block_inner:
      # What comes after is another group's. Both, as infinities times zero were none.
      if not T.gathered:
        _clear_rows(a.index(stage), rest)
      if not T.dy_gathered:
        _clear_rows(b.index(stage), rest)
      hopper.fence_async_shared()
      gl.barrier()
  if T.gathered or T.dy_gathered:
    wait_for_copies(T)
  a_block = a.index(stage).permute((1, 0))
  return hopper.warpgroup_mma(a_block, b.index(stage), acc, use_acc=add, is_async=True)


@gluon.jit
def gradient_kernel(rows, dy, sizes_ptr, index_ptr, dy_index_ptr, y_ptr, T: gl.constexpr):
  """Sums the outer products of rows and cotangents of each group.

  Arrays and their blocks: rows [S, M], [block_inner, block_rows]; dy [S, N], [block_inner,
  block_columns]; sizes [E] int32; index [S] int32, if gathered: row s is row index[s] // top_k of
  `rows`, which is then a pointer; dy_index [S] int32, if dy_gathered, as much for dy; y [E, M, N].
  """
  acc_layout: gl.constexpr = product_layout(T, gl.num_warps())
  if T.gathered:
    a = allocate_gathered(rows, T.block_inner, T.block_rows, T)
  else:
    a = allocate_stages(rows, T)
  if T.dy_gathered:
    b = allocate_gathered(dy, T.block_inner, T.block_columns, T)
  else:
    b = allocate_stages(dy, T)
  ready = gl.allocate_shared_memory(gl.int64, [T.stages, 1], mbarrier.MBarrierLayout())
  order = gl.allocate_shared_memory(
    gl.int32, [3, T.padded_groups], gl.SwizzledSharedLayout(1, 1, 1, [0])
  )
  STAGES: gl.constexpr = T.stages
  for i in gl.static_range(STAGES):
    mbarrier.init(ready.index(i), count=1)
  _sort_groups(sizes_ptr, order, T)

  zero = gl.to_tensor(0)
  tile = gl.program_id(0)
  size, first_row, group, row, column = _place_gradient(tile, order, T)
  # What is loaded is ahead of what is multiplied, and has a state of its own.
  a_found = _find_rows(index_ptr, first_row, first_row + size, T.gathered, T)
  b_found = _find_rows(dy_index_ptr, first_row, first_row + size, T.dy_gathered, T)
  ahead = (tile, size, first_row, first_row + size, row, column, zero, a_found, b_found)
  for _ in gl.static_range(STAGES - 1):
    ahead = _load_for_gradient(ahead, rows, dy, index_ptr, dy_index_ptr, order, a, b, ready, T)

  stage = zero
  phase = zero
  acc = gl.zeros([T.block_rows, T.block_columns], gl.float32, layout=acc_layout)
  PARTS: gl.constexpr = T.parts
  # Of the tile before, and there is none yet.
  write_row = zero
  write_count = zero
  write_column = zero
  while size > 0:
    words = cut_columns(to_words(acc, y_ptr.dtype.element_ty), PARTS)
    acc = _multiply(acc, a, b, ready, stage, phase, size, False, T)
    stage, phase = next_stage(stage, phase, T)
    # Free is now the stage that was read one step before.
    ahead = _load_for_gradient(ahead, rows, dy, index_ptr, dy_index_ptr, order, a, b, ready, T)
    write_parts(words, 0, PARTS, y_ptr, write_row, write_count, write_column, T)
    acc = hopper.warpgroup_mma_wait(1, deps=(acc,))  # for nothing, but its type
    for step in range(1, gl.cdiv(size, T.block_inner)):
      rest = size - step * T.block_inner
      acc = _multiply(acc, a, b, ready, stage, phase, rest, True, T)
      acc = hopper.warpgroup_mma_wait(1, deps=(acc,))
      stage, phase = next_stage(stage, phase, T)
      ahead = _load_for_gradient(ahead, rows, dy, index_ptr, dy_index_ptr, order, a, b, ready, T)
    write_row = group * T.inputs + row
    write_count = T.inputs - row
    write_column = column
    # Before the wait, while the tensor cores still work.
    tile = _next_tile(tile)
    size, first_row, group, row, column = _place_gradient(tile, order, T)
    acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
  if T.gathered or T.dy_gathered:
    # Nobody reads what still comes, but its place in shared memory serves for other things now.
    async_copy.wait_group(0)
  words = cut_columns(to_words(acc, y_ptr.dtype.element_ty), PARTS)
  write_parts(words, 0, PARTS, y_ptr, write_row, write_count, write_column, T)

  while tile < T.num_groups * T.row_tiles * T.column_tiles:
    size, first_row, group, row, column = _place_gradient(tile, order, T)
    write_zeros(y_ptr, group * T.inputs + row, T.inputs - row, column, T)
    tile = _next_tile(tile)
