"""The selective scan on a GPU, in Gluon: the forward kernel. `triton_gpu` starts it.

A program owns one row of the batch, or a piece of its time where rows are few (`triton_carry`), and
a block of channels, and walks through time in tiles of T tokens. Of a tile, everything that is
elementwise in token and channel (softplus, gate, skip and their gradients) is done once, by all
threads side by side, before and after the recurrence; between the two the values pass through
shared memory. The next tiles arrive by asynchronous copies meanwhile: they take no registers.

Letters beside those of `shapes`: T tokens in a tile; BD channels of a program; NT threads that
share the states of a channel, S of them each.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ssm_moe.ops.selective_scan.triton_tiles import (
  copy_tile,
  dot,
  from_variables,
  sigmoid,
  stack,
  state_row,
  step,
  step_sizes,
  tiles_of_piece,
  to_variables,
)

# A step of this size leaves nothing of the state: exp2(1e38 A) is 0 for all A below -2e-36.
FORGET = gl.constexpr(1e38)


@gluon.jit
def forward(
  x_ptr, dt_ptr, z_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, starts_ptr, h0_ptr,
  y_ptr, h_ptr, saved_ptr, ungated_ptr,
  L: gl.constexpr, D: gl.constexpr, N: gl.constexpr, T: gl.constexpr, BD: gl.constexpr,
  NT: gl.constexpr, W: gl.constexpr, STAGES: gl.constexpr, SOFTPLUS: gl.constexpr,
  PIECE: gl.constexpr, SAVE: gl.constexpr,
):  # fmt: skip
  """Runs the recurrence over one piece of a row, PIECE tokens of it, and BD channels.

  Args:
    x_ptr, dt_ptr, z_ptr, y_ptr: [B, L, D].
    A_ptr: [D, N], float32, times log2(e).
    B_ptr, C_ptr: [B, L, N].
    D_ptr, bias_ptr: [D], float32.
    starts_ptr: [B, L], int32: not zero where the state is reset before the step.
    h0_ptr: [B, ceil(L / PIECE), D, N], float32: the state before each piece.
    h_ptr: [B, D, N], float32: the last state.
    saved_ptr: [B, ceil(L / SAVE), D, N], float32: for the backward pass, the state before each SAVE
      tokens, of which a tile has a whole number.
    ungated_ptr: [B, L, D]: for the backward pass, y before the gate.
  """
  S: gl.constexpr = N // NT
  states: gl.constexpr = gl.BlockedLayout([1, 1], [32 // NT, NT], [W, 1], [0, 1])
  vectors: gl.constexpr = gl.BlockedLayout([1, S], [32 // NT, NT], [W, 1], [0, 1])
  V: gl.constexpr = 8 if BD >= 8 else BD
  tile: gl.constexpr = gl.BlockedLayout([1, V], [32 * V // BD, BD // V], [W, 1], [1, 0])
  tile_n: gl.constexpr = gl.BlockedLayout([1, 8], [256 // N, N // 8], [W, 1], [1, 0])
  flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])

  row, first, count = tiles_of_piece(L, T, PIECE)
  b = row // ((L + PIECE - 1) // PIECE)
  d0 = gl.program_id(0) * BD
  tokens = b * (L * D) + d0
  x_ptr += tokens
  dt_ptr += tokens
  y_ptr += tokens
  if ungated_ptr is not None:
    ungated_ptr += tokens
  if z_ptr is not None:
    z_ptr += tokens
  B_ptr += b * (L * N)
  C_ptr += b * (L * N)
  if starts_ptr is not None:
    starts_ptr += b * L

  column = gl.arange(0, BD, layout=gl.SliceLayout(0, tile))[None, :]
  column_n = gl.arange(0, N, layout=gl.SliceLayout(0, tile_n))[None, :]
  mask = column < D - d0
  mask_n = column_n < N
  t_tile = gl.arange(0, T, layout=gl.SliceLayout(1, tile))[:, None]
  d = gl.arange(0, BD, layout=gl.SliceLayout(1, vectors))[:, None]
  n = gl.arange(0, N, layout=gl.SliceLayout(0, vectors))[None, :]
  of_block = (d0 + d) * N + n
  mine = (d < D - d0) & (n < N)

  bias = None
  skip = None
  channel = gl.arange(0, BD, layout=gl.SliceLayout(0, tile))
  if bias_ptr is not None:
    bias = gl.load(bias_ptr + d0 + channel, mask=channel < D - d0, other=0.0)
  if D_ptr is not None:
    skip = gl.load(D_ptr + d0 + channel, mask=channel < D - d0, other=0.0)

  x_in = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [STAGES, T, BD], flat)
  dt_in = gl.allocate_shared_memory(dt_ptr.dtype.element_ty, [STAGES, T, BD], flat)
  B_in = gl.allocate_shared_memory(B_ptr.dtype.element_ty, [STAGES, T, N], flat)
  C_in = gl.allocate_shared_memory(C_ptr.dtype.element_ty, [STAGES, T, N], flat)
  if z_ptr is not None:
    z_in = gl.allocate_shared_memory(z_ptr.dtype.element_ty, [STAGES, T, BD], flat)
  decay_rows = gl.allocate_shared_memory(gl.float32, [T, BD], flat)
  u_rows = gl.allocate_shared_memory(gl.float32, [T, BD], flat)
  B_rows = gl.allocate_shared_memory(gl.float32, [T, N], flat)
  C_rows = gl.allocate_shared_memory(gl.float32, [T, N], flat)

  for early in gl.static_range(STAGES - 1):
    copy_tile(x_in, early, x_ptr, (first + early) * T, L, D, column, mask, T)
    copy_tile(dt_in, early, dt_ptr, (first + early) * T, L, D, column, mask, T)
    copy_tile(B_in, early, B_ptr, (first + early) * T, L, N, column_n, mask_n, T)
    copy_tile(C_in, early, C_ptr, (first + early) * T, L, N, column_n, mask_n, T)
    if z_ptr is not None:
      copy_tile(z_in, early, z_ptr, (first + early) * T, L, D, column, mask, T)
    async_copy.commit_group()

  A = to_variables(gl.load(A_ptr + of_block, mask=mine, other=0.0), S, states)
  if h0_ptr is not None:
    h = gl.load(h0_ptr + row * (D * N) + of_block, mask=mine, other=0.0)
  else:
    h = gl.zeros([BD, N], gl.float32, layout=vectors)
  h = to_variables(h, S, states)

  SAVES: gl.constexpr = (L + SAVE - 1) // SAVE
  for k in range(count):
    t0 = (first + k) * T
    slot = k % STAGES
    async_copy.wait_group(STAGES - 2)
    later = k + STAGES - 1
    free = later % STAGES
    copy_tile(x_in, free, x_ptr, (first + later) * T, L, D, column, mask, T)
    copy_tile(dt_in, free, dt_ptr, (first + later) * T, L, D, column, mask, T)
    copy_tile(B_in, free, B_ptr, (first + later) * T, L, N, column_n, mask_n, T)
    copy_tile(C_in, free, C_ptr, (first + later) * T, L, N, column_n, mask_n, T)
    if z_ptr is not None:
      copy_tile(z_in, free, z_ptr, (first + later) * T, L, D, column, mask, T)
    async_copy.commit_group()
    there = t0 + t_tile < L
    x = x_in.index(slot).load(tile).to(gl.float32)
    dt = step_sizes(dt_in.index(slot).load(tile).to(gl.float32), bias, there, SOFTPLUS)
    u_rows.store(dt * x)
    if starts_ptr is not None:
      starts = gl.load(starts_ptr + t0 + t_tile, mask=there, other=0)
      dt = gl.where(starts != 0, FORGET, dt)
    decay_rows.store(dt)
    B_rows.store(B_in.index(slot).load(tile_n).to(gl.float32))
    C_rows.store(C_in.index(slot).load(tile_n).to(gl.float32))

    ys = ()
    for i in gl.static_range(T):
      if saved_ptr is not None and i % SAVE == 0:
        saved = saved_ptr + (b * SAVES + (t0 + i) // SAVE) * (D * N)
        gl.store(saved + of_block, from_variables(h, vectors), mask=mine & (t0 + i < L))
      h, _unused = step(h, A, decay_rows, u_rows, B_rows, i, S, states, vectors)
      ys = ys + (gl.sum(dot(h, state_row(C_rows, i, S, states, vectors)), 1, keep_dims=True),)
    y = gl.permute(gl.reshape(stack(ys), [BD, T]), [1, 0])
    y = gl.convert_layout(y, tile)
    if D_ptr is not None:
      y = y + skip[None, :] * x_in.index(slot).load(tile).to(gl.float32)
    place = (t0 + t_tile) * D + column
    if ungated_ptr is not None:
      gl.store(ungated_ptr + place, y.to(ungated_ptr.dtype.element_ty), mask=there & mask)
    if z_ptr is not None:
      z = z_in.index(slot).load(tile).to(gl.float32)
      y = y * z * sigmoid(z)
    gl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=there & mask)
  async_copy.wait_group(0)
  if PIECE < L:
    mine = mine & ((first + count) * T >= L)
  gl.store(h_ptr + b * (D * N) + of_block, from_variables(h, vectors), mask=mine)
