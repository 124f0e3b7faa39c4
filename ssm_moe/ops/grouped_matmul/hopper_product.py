"""A kernel in Gluon for Hopper: products of rows with the matrix of their group."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from ssm_moe.ops.grouped_matmul.hopper_gather import (
  allocate_gathered,
  copy_rows,
  load_index,
  wait_for_copies,
)
from ssm_moe.ops.grouped_matmul.hopper_tiles import (
  allocate_stages,
  cut_columns,
  find_places,
  next_stage,
  product_layout,
  to_words,
  write_parts,
  write_zeros,
)


@gluon.jit
def _find_tile(sizes_ptr, tile, group, first_tile, first_row, size, T: gl.constexpr):
  """Walks on to the group that holds `tile`; to the number of groups, if none does."""
  tiles = gl.cdiv(size, T.block_rows) * T.column_tiles
  while (group < T.num_groups) & (tile >= first_tile + tiles):
    first_tile += tiles
    first_row += size
    group += 1
    size = gl.load(sizes_ptr + group, mask=group < T.num_groups, other=0)
    tiles = gl.cdiv(size, T.block_rows) * T.column_tiles
  return group, first_tile, first_row, size


@gluon.jit
def _place(tile, size, T: gl.constexpr):
  """Returns the first row, the number of rows and the first column of a group's tile.

  Tiles run down a band of rows, then go to its next column: what all programs work on at a time is
  near to a square, so that they read the same blocks, out of the level 2 cache.
  """
  row_tiles = gl.cdiv(size, T.block_rows)
  band = tile // (T.band * T.column_tiles)
  in_band = tile - band * (T.band * T.column_tiles)
  height = gl.maximum(gl.minimum(row_tiles - band * T.band, T.band), 1)
  column = in_band // height
  row = (band * T.band + in_band - column * height) * T.block_rows
  return row, gl.minimum(size - row, T.block_rows), column * T.block_columns


@gluon.jit
def _find_rows(index_ptr, row, T: gl.constexpr):
  """Returns which rows a tile reads: its first or, if gathered, the index of each."""
  found = row
  if T.gathered:
    found = load_index(index_ptr, row, T.num_rows - row, T.block_rows)
  return found


@gluon.jit
def _load_for_product(state, rows, weights, sizes_ptr, index_ptr, a, b, ready, T: gl.constexpr):
  """Starts the next copy to shared memory, for this tile or the next, unless there is none left.

  Rows that are gathered are copied even then, as no step that waits for them must be left out.
  """
  tile, group, first_tile, first_row, size, found, column, step, stage = state
  some = group < T.num_groups
  bar = ready.index(stage)
  inner = step * T.block_inner
  if T.gathered:
    mbarrier.expect(bar, weights.block_type.nbytes, pred=some)
    copy_rows(a.index(stage), rows, found, inner, T.inputs, T.top_k)
    async_copy.commit_group()
  else:
    mbarrier.expect(bar, rows.block_type.nbytes + weights.block_type.nbytes, pred=some)
    tma.async_load(rows, [found, inner], bar, a.index(stage), pred=some)
  if T.transposed:
    tma.async_load(weights, [group, column, inner], bar, b.index(stage), pred=some)
  else:
    tma.async_load(weights, [group, inner, column], bar, b.index(stage), pred=some)
  stage, _ = next_stage(stage, 0, T)
  step += 1
  if step == T.steps:
    step = 0
    tile += gl.num_programs(0)
    group, first_tile, first_row, size = _find_tile(
      sizes_ptr, tile, group, first_tile, first_row, size, T
    )
    row, _, column = _place(tile - first_tile, size, T)
    found = _find_rows(index_ptr, first_row + row, T)
  return tile, group, first_tile, first_row, size, found, column, step, stage


@gluon.jit
def _multiply(acc, a, b, ready, stage, phase, add, weights, T: gl.constexpr):
  """Starts the multiplication of a stage, when it has come."""
  mbarrier.wait(ready.index(stage), phase)
  if T.gathered:
    wait_for_copies(T)
  b_block = b.index(stage).reshape(weights.block_type.shape[1:])
  if T.transposed:
    b_block = b_block.permute((1, 0))
  return hopper.warpgroup_mma(a.index(stage), b_block, acc, use_acc=add, is_async=True)


@gluon.jit
def _find_scales(scales_ptr, places_ptr, row, count, T: gl.constexpr):
  """Returns what each product of a tile is multiplied with, if weighted."""
  scales = row
  if T.weighted:
    acc_layout: gl.constexpr = product_layout(T, gl.num_warps())
    rows = gl.arange(0, T.block_rows, layout=gl.SliceLayout(1, acc_layout))
    places = row + rows
    if T.scattered:
      places = gl.load(places_ptr + places, mask=rows < count, other=0)
    scales = gl.load(scales_ptr + places, mask=rows < count, other=0.0)
  return scales


@gluon.jit
def _finish(acc, scales, T: gl.constexpr):
  """Does in float32, before they are rounded, what is asked of products."""
  if T.relu:
    acc = gl.maximum(acc, 0.0)
  if T.weighted:
    acc = acc * gl.expand_dims(scales, 1)
  return acc


@gluon.jit
def product_kernel(
  rows, weights, sizes_ptr, index_ptr, places_ptr, scales_ptr, y_ptr, T: gl.constexpr
):
  """Multiplies each row with the matrix of its group; zeros for rows of no group.

  A tile that ends beyond its group multiplies rows of the next, which it does not write.

  Arrays and their blocks: rows [S, K], [block_rows, block_inner]; weights [E, K, N],
  [1, block_inner, block_columns], or if transposed [E, N, K], [1, block_columns, block_inner];
  sizes [E] int32; index [S] int32, if gathered: row s is row index[s] // top_k of `rows`, which is
  then a pointer; places [S] int32, if scattered, of each row in y; scales [S] float32, if weighted,
  of each row of y; y [S, N].
  """
  acc_layout: gl.constexpr = product_layout(T, gl.num_warps())
  if T.gathered:
    a = allocate_gathered(rows, T.block_rows, T.block_inner, T)
  else:
    a = allocate_stages(rows, T)
  b = allocate_stages(weights, T)
  ready = gl.allocate_shared_memory(gl.int64, [T.stages, 1], mbarrier.MBarrierLayout())
  STAGES: gl.constexpr = T.stages
  for i in gl.static_range(STAGES):
    mbarrier.init(ready.index(i), count=1)

  zero = gl.to_tensor(0)
  tile = gl.program_id(0)
  group, first_tile, first_row, size = _find_tile(
    sizes_ptr, tile, zero, zero, zero, gl.load(sizes_ptr), T
  )
  row, _, column = _place(tile - first_tile, size, T)
  # What is loaded is ahead of what is multiplied, and has a state of its own.
  found = _find_rows(index_ptr, first_row + row, T)
  ahead = (tile, group, first_tile, first_row, size, found, column, zero, zero)
  for _ in gl.static_range(STAGES - 1):
    ahead = _load_for_product(ahead, rows, weights, sizes_ptr, index_ptr, a, b, ready, T)

  stage = zero
  phase = zero
  acc = gl.zeros([T.block_rows, T.block_columns], gl.float32, layout=acc_layout)
  PARTS: gl.constexpr = T.parts
  FIRST_STEPS: gl.constexpr = T.first_steps
  PART_WORDS: gl.constexpr = T.block_columns // 2 // T.parts
  # Of the tile before, and there is none yet.
  write_places = find_places(places_ptr, zero, zero, PART_WORDS, T)
  write_count = zero
  write_column = zero
  scales = _find_scales(scales_ptr, places_ptr, zero, zero, T)
  while group < T.num_groups:
    words = cut_columns(to_words(_finish(acc, scales, T), weights.dtype), PARTS)
    for step in gl.static_range(FIRST_STEPS):
      acc = _multiply(acc, a, b, ready, stage, phase, step > 0, weights, T)
      if step > 0:
        # Two steps are started now, so that the second is there when the first is done.
        write_parts(words, step - 1, step, y_ptr, write_places, write_count, write_column, T)
        acc = hopper.warpgroup_mma_wait(1, deps=(acc,))
      stage, phase = next_stage(stage, phase, T)
      # Free is now the stage that was read one step before.
      ahead = _load_for_product(ahead, rows, weights, sizes_ptr, index_ptr, a, b, ready, T)
    # None are left, unless there are few steps.
    write_parts(words, FIRST_STEPS - 1, PARTS, y_ptr, write_places, write_count, write_column, T)
    if T.steps > FIRST_STEPS:
      for _step in range(FIRST_STEPS, T.steps):
        acc = _multiply(acc, a, b, ready, stage, phase, True, weights, T)
        acc = hopper.warpgroup_mma_wait(1, deps=(acc,))
        stage, phase = next_stage(stage, phase, T)
        ahead = _load_for_product(ahead, rows, weights, sizes_ptr, index_ptr, a, b, ready, T)
    # Before the wait, while the tensor cores still work.
    row, count, write_column = _place(tile - first_tile, size, T)
    write_row = first_row + row
    # Sizes that add up to more than there are rows must not write outside.
    write_count = gl.minimum(count, T.num_rows - write_row)
    write_places = find_places(places_ptr, write_row, write_count, PART_WORDS, T)
    scales = _find_scales(scales_ptr, places_ptr, write_row, write_count, T)
    tile += gl.num_programs(0)
    group, first_tile, first_row, size = _find_tile(
      sizes_ptr, tile, group, first_tile, first_row, size, T
    )
    acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
  if T.gathered:
    # Nobody reads what still comes, but its place in shared memory serves for other things now.
    async_copy.wait_group(0)
  words = cut_columns(to_words(_finish(acc, scales, T), weights.dtype), PARTS)
  write_parts(words, 0, PARTS, y_ptr, write_places, write_count, write_column, T)

  # All groups are passed: first_row is the first row of no group, and in the tile first_tile.
  rest = T.num_rows - first_row
  place = tile - first_tile
  while place < gl.cdiv(rest, T.block_rows) * T.column_tiles:
    row, count, column = _place(place, rest, T)
    places = find_places(places_ptr, first_row + row, count, T.block_columns // 2, T)
    write_zeros(y_ptr, places, count, column, T)
    place += gl.num_programs(0)
