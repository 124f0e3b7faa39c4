"""The selective scan on a GPU, in Gluon: the backward kernel. `triton_gpu` starts it.

The work is split as in `triton_forward`, with the same letters; U are the tokens whose states a
thread holds at once.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ssm_moe.ops.selective_scan.triton_forward import FORGET
from ssm_moe.ops.selective_scan.triton_lane_sums import sum_over_lanes, sum_over_neighbours
from ssm_moe.ops.selective_scan.triton_tiles import (
  channel_row,
  copy_tile,
  dot,
  from_variables,
  part_of,
  sigmoid,
  stack,
  state_row,
  step,
  step_sizes,
  tiles_of_piece,
  to_variables,
)

_LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _store_tokens(pointer, values, mask, layout: gl.constexpr):
  """Stores what a lane has of some tokens, next to each other."""
  U: gl.constexpr = len(values)
  stacked = gl.reshape(stack(values), [values[0].shape[0], values[0].shape[1], U])
  stacked = gl.convert_layout(stacked, layout)
  pointer = gl.convert_layout(pointer, gl.SliceLayout(2, layout))[:, :, None]
  mask = gl.convert_layout(mask, gl.SliceLayout(2, layout))[:, :, None]
  i = gl.arange(0, U, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
  gl.store(pointer + i, stacked.to(pointer.dtype.element_ty), mask=mask)


@gluon.jit
def backward(
  x_ptr, dt_ptr, z_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, starts_ptr, saved_ptr, ungated_ptr,
  dy_ptr, dh_ptr,
  dx_ptr, ddt_ptr, dz_ptr, dA_ptr, dBC_ptr, dD_ptr, dbias_ptr, dh0_ptr,
  L: gl.constexpr, D: gl.constexpr, N: gl.constexpr, T: gl.constexpr, BD: gl.constexpr,
  NT: gl.constexpr, W: gl.constexpr, STAGES: gl.constexpr, SOFTPLUS: gl.constexpr,
  PIECE: gl.constexpr,
):  # fmt: skip
  """Walks back through time with the cotangent of the state.

  With g_t the cotangent of h_t and v_t = A_bar_t g_t that of h_{t-1} through the decay,

    g_t = C_t dy_t + v_{t+1}             d(dt_t x_t) = sum_n B_t g_t    dB_t = sum_d dt_t x_t g_t
    d(dt_t A) = h_{t-1} v_t                                             dC_t = sum_d h_t dy_t

  From the state before a tile, the states before each U of its steps are made first; then, from the
  last U steps to the first, their states and decays are made again and held in registers.

  Args, beside those of `forward`:
    saved_ptr: As `forward` left it, with SAVE = T.
    dy_ptr, dx_ptr, ddt_ptr, dz_ptr: [B, L, D].
    dh_ptr: [B, P, D, N], float32, P being ceil(L / PIECE): of the state after each piece.
    dh0_ptr: [B, D, N], float32: of the first state.
    dA_ptr: [B, P, D, N]; dD_ptr, dbias_ptr: [B, P, D]: float32, to be added up over B and P.
    dBC_ptr: [B, ceil(D / BD) W, ceil(L / T) T / U, 2, N, U]: to be added up over the second axis.
  """
  U: gl.constexpr = 4
  S: gl.constexpr = N // NT
  states: gl.constexpr = gl.BlockedLayout([1, 1], [32 // NT, NT], [W, 1], [0, 1])
  vectors: gl.constexpr = gl.BlockedLayout([1, S], [32 // NT, NT], [W, 1], [0, 1])
  V: gl.constexpr = 8 if BD >= 8 else BD
  tile: gl.constexpr = gl.BlockedLayout([1, V], [32 * V // BD, BD // V], [W, 1], [1, 0])
  tile_n: gl.constexpr = gl.BlockedLayout([1, 8], [256 // N, N // 8], [W, 1], [1, 0])
  flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
  # U tokens at a time, after the recurrence.
  VU: gl.constexpr = BD // (8 * W) if BD >= 8 * W else 1
  some: gl.constexpr = gl.BlockedLayout([1, VU], [4, 8], [1, W], [1, 0])
  by_token: gl.constexpr = gl.BlockedLayout([1, VU, 2], [4, 8, 1], [1, W, 1], [2, 1, 0])
  tokens_of_lane: gl.constexpr = gl.BlockedLayout(
    [1, 1, U], [32 // NT, NT, 1], [W, 1, 1], [2, 0, 1]
  )
  swizzled: gl.constexpr = gl.SwizzledSharedLayout(
    4, 32 // N if N < 32 else 1, N // 4 if N < 32 else 8, [1, 0]
  )
  EXACT: gl.constexpr = B_ptr.dtype.element_ty == gl.float32

  row, first, count = tiles_of_piece(L, T, PIECE)
  b = row // ((L + PIECE - 1) // PIECE)
  pd = gl.program_id(0)
  d0 = pd * BD
  tokens = b * (L * D) + d0
  x_ptr += tokens
  dt_ptr += tokens
  dy_ptr += tokens
  dx_ptr += tokens
  ddt_ptr += tokens
  if z_ptr is not None:
    z_ptr += tokens
    dz_ptr += tokens
    ungated_ptr += tokens
  B_ptr += b * (L * N)
  C_ptr += b * (L * N)
  if starts_ptr is not None:
    starts_ptr += b * L
  K: gl.constexpr = (L + T - 1) // T

  column = gl.arange(0, BD, layout=gl.SliceLayout(0, tile))[None, :]
  column_n = gl.arange(0, N, layout=gl.SliceLayout(0, tile_n))[None, :]
  mask = column < D - d0
  mask_n = column_n < N
  t_tile = gl.arange(0, T, layout=gl.SliceLayout(1, tile))[:, None]
  d = gl.arange(0, BD, layout=gl.SliceLayout(1, vectors))[:, None]
  n = gl.arange(0, N, layout=gl.SliceLayout(0, vectors))[None, :]
  of_block = (d0 + d) * N + n
  mine = (d < D - d0) & (n < N)
  channel = gl.arange(0, BD, layout=gl.SliceLayout(0, tile))
  t_some = gl.arange(0, U, layout=gl.SliceLayout(1, some))[:, None]
  channel_some = gl.arange(0, BD, layout=gl.SliceLayout(0, some))
  mask_some = channel_some < D - d0

  # After `sum_over_lanes` a thread holds one state of dB or dC, of one warp's 32 / NT channels.
  channel_of_lane = gl.arange(0, BD, layout=gl.SliceLayout(1, states))[:, None]
  lane = gl.arange(0, NT, layout=gl.SliceLayout(0, states))[None, :] * (32 // NT)
  lane = lane + channel_of_lane % (32 // NT)
  warp = pd * W + channel_of_lane // (32 // NT)
  n_of_lane = lane % 4 * NT // 4 * S + lane // 4 % S
  dBC_ptr += (b * gl.num_programs(0) * W + warp) * (K * T * 2 * N)
  dBC_ptr += (lane // 4 // S * N + n_of_lane) * U
  is_first = lane % (4 // NT) == 0

  bias = None
  bias_some = None
  skip = None
  if bias_ptr is not None:
    bias = gl.load(bias_ptr + d0 + channel, mask=channel < D - d0, other=0.0)
    bias_some = gl.load(bias_ptr + d0 + channel_some, mask=mask_some, other=0.0)
  if D_ptr is not None:
    skip = gl.load(D_ptr + d0 + channel_some, mask=mask_some, other=0.0)

  x_in = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [STAGES, T, BD], flat)
  dt_in = gl.allocate_shared_memory(dt_ptr.dtype.element_ty, [STAGES, T, BD], flat)
  dy_in = gl.allocate_shared_memory(dy_ptr.dtype.element_ty, [STAGES, T, BD], flat)
  B_in = gl.allocate_shared_memory(B_ptr.dtype.element_ty, [STAGES, T, N], flat)
  C_in = gl.allocate_shared_memory(C_ptr.dtype.element_ty, [STAGES, T, N], flat)
  if z_ptr is not None:
    z_in = gl.allocate_shared_memory(z_ptr.dtype.element_ty, [STAGES, T, BD], flat)
    y_in = gl.allocate_shared_memory(ungated_ptr.dtype.element_ty, [STAGES, T, BD], flat)
  dt_rows = gl.allocate_shared_memory(gl.float32, [T, BD], flat)
  decay_rows = dt_rows
  if starts_ptr is not None:
    decay_rows = gl.allocate_shared_memory(gl.float32, [T, BD], flat)
  u_rows = gl.allocate_shared_memory(gl.float32, [T, BD], flat)
  dy_rows = gl.allocate_shared_memory(gl.float32, [T, BD], flat)
  B_rows = gl.allocate_shared_memory(gl.float32, [T, N], flat)
  C_rows = gl.allocate_shared_memory(gl.float32, [T, N], flat)
  h_before = gl.allocate_shared_memory(gl.float32, [T // U, BD, N], swizzled)
  token_sums = gl.allocate_shared_memory(
    gl.float32, [U, BD, 2], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
  )

  for early in gl.static_range(STAGES - 1):
    t_early = (first + count - 1 - early) * T
    copy_tile(x_in, early, x_ptr, t_early, L, D, column, mask, T)
    copy_tile(dt_in, early, dt_ptr, t_early, L, D, column, mask, T)
    copy_tile(dy_in, early, dy_ptr, t_early, L, D, column, mask, T)
    copy_tile(B_in, early, B_ptr, t_early, L, N, column_n, mask_n, T)
    copy_tile(C_in, early, C_ptr, t_early, L, N, column_n, mask_n, T)
    if z_ptr is not None:
      copy_tile(z_in, early, z_ptr, t_early, L, D, column, mask, T)
      copy_tile(y_in, early, ungated_ptr, t_early, L, D, column, mask, T)
    async_copy.commit_group()

  A = to_variables(gl.load(A_ptr + of_block, mask=mine, other=0.0), S, states)
  zero = gl.zeros([BD, N], gl.float32, layout=vectors)
  g = zero
  if dh_ptr is not None:
    g = gl.load(dh_ptr + row * (D * N) + of_block, mask=mine, other=0.0)
  g = to_variables(g, S, states)
  dA = to_variables(zero, S, states)
  dD = gl.zeros([U, BD], gl.float32, layout=some)
  dbias = gl.zeros([U, BD], gl.float32, layout=some)
  saved_ptr += b * K * (D * N)
  h_next = gl.load(saved_ptr + (first + count - 1) * (D * N) + of_block, mask=mine, other=0.0)

  for back in range(count):
    k = first + count - 1 - back
    t0 = k * T
    slot = back % STAGES
    h_tile = h_next
    async_copy.wait_group(STAGES - 2)
    later = t0 - (STAGES - 1) * T
    free = (back + STAGES - 1) % STAGES
    copy_tile(x_in, free, x_ptr, later, L, D, column, mask, T)
    copy_tile(dt_in, free, dt_ptr, later, L, D, column, mask, T)
    copy_tile(dy_in, free, dy_ptr, later, L, D, column, mask, T)
    copy_tile(B_in, free, B_ptr, later, L, N, column_n, mask_n, T)
    copy_tile(C_in, free, C_ptr, later, L, N, column_n, mask_n, T)
    if z_ptr is not None:
      copy_tile(z_in, free, z_ptr, later, L, D, column, mask, T)
      copy_tile(y_in, free, ungated_ptr, later, L, D, column, mask, T)
    async_copy.commit_group()
    h_next = gl.load(saved_ptr + gl.maximum(k - 1, 0) * (D * N) + of_block, mask=mine, other=0.0)

    there = t0 + t_tile < L
    x = x_in.index(slot).load(tile).to(gl.float32)
    dt = step_sizes(dt_in.index(slot).load(tile).to(gl.float32), bias, there, SOFTPLUS)
    dt_rows.store(dt)
    u_rows.store(dt * x)
    if starts_ptr is not None:
      starts = gl.load(starts_ptr + t0 + t_tile, mask=there, other=0)
      decay_rows.store(gl.where(starts != 0, FORGET, dt))
    dy = dy_in.index(slot).load(tile).to(gl.float32)
    if z_ptr is not None:
      z = z_in.index(slot).load(tile).to(gl.float32)
      dy = dy * z * sigmoid(z)
    dy_rows.store(dy)
    B_rows.store(B_in.index(slot).load(tile_n).to(gl.float32))
    C_rows.store(C_in.index(slot).load(tile_n).to(gl.float32))

    starts_of_parts = (to_variables(h_tile, S, states),)
    for part in gl.static_range(T // U - 1):
      h = starts_of_parts[part]
      for i in gl.static_range(U):
        h, _unused = step(h, A, decay_rows, u_rows, B_rows, part * U + i, S, states, vectors)
      starts_of_parts = starts_of_parts + (h,)
    for part in gl.static_range(T // U):
      h_before.index(part).store(from_variables(starts_of_parts[part], vectors))

    for j_back in range(T // U):
      j = T // U - 1 - j_back
      hs = (to_variables(h_before.index(j).load(vectors), S, states),)
      decays = ()
      for i in gl.static_range(U):
        t = j * U + i
        h_after, A_bar = step(hs[i], A, decay_rows, u_rows, B_rows, t, S, states, vectors)
        hs = hs + (h_after,)
        decays = decays + (A_bar,)
      of_token = ()  # from the last of the U tokens to the first
      dBs = ()
      dCs = ()
      for i in gl.static_range(U - 1, -1, -1):
        t = j * U + i
        dy_t = channel_row(dy_rows, t, states)
        u_t = channel_row(u_rows, t, states)
        decay_t = channel_row(decay_rows, t, states)
        B_t = state_row(B_rows, t, S, states, vectors)
        C_t = state_row(C_rows, t, S, states, vectors)
        v = ()
        through_decay = ()
        dA_t = ()
        g_t = ()
        for s in gl.static_range(S):
          g_s = gl.fma(dy_t, C_t[s], g[s])
          g_t = g_t + (g_s,)
          v_s = g_s * decays[i][s]
          v = v + (v_s,)
          through_s = v_s * hs[i][s]
          through_decay = through_decay + (through_s,)
          dA_t = dA_t + (gl.fma(through_s, decay_t, dA[s]),)
        du = gl.sum(dot(g_t, B_t), 1, keep_dims=True)
        ddt = gl.sum(dot(through_decay, A), 1, keep_dims=True)
        g = v
        dA = dA_t
        if S == 8:
          dB_t = sum_over_neighbours(sum_over_lanes(g_t, u_t, u_t, lane, EXACT), NT)
          dC_t = sum_over_neighbours(sum_over_lanes(hs[i + 1], dy_t, dy_t, lane, EXACT), NT)
          dCs = (dC_t,) + dCs
        else:
          dB_t = sum_over_lanes(g_t + hs[i + 1], u_t, dy_t, lane, EXACT)
          dB_t = sum_over_neighbours(dB_t, NT)
        dBs = (dB_t,) + dBs
        of_token = (du, ddt) + of_token

      token_sums.store(gl.permute(gl.reshape(stack(of_token), [BD, U, 2]), [1, 0, 2]))
      place = dBC_ptr + (t0 + j * U) * (2 * N)
      _store_tokens(place, dBs, is_first, tokens_of_lane)
      if S == 8:
        _store_tokens(place + N * U, dCs, is_first, tokens_of_lane)

      sums = gl.split(token_sums.load(by_token))
      du_u = gl.convert_layout(sums[0], some)
      ddt_u = gl.convert_layout(sums[1], some) * _LN_2
      there_some = (t0 + j * U + t_some < L) & mask_some[None, :]
      place_some = (t0 + j * U + t_some) * D + channel_some[None, :]
      x_u = part_of(x_in, slot * (T // U) + j, U, some)
      dt_u = part_of(dt_rows, j, U, some)
      dy_u = part_of(dy_rows, j, U, some)
      dx_u = du_u * dt_u
      ddt_u = ddt_u + du_u * x_u
      if D_ptr is not None:
        dx_u = dx_u + dy_u * skip[None, :]
        dD = dD + dy_u * x_u
      if SOFTPLUS:
        logits = part_of(dt_in, slot * (T // U) + j, U, some)
        if bias_ptr is not None:
          logits = logits + bias_some[None, :]
        ddt_u = ddt_u * sigmoid(logits)
      if bias_ptr is not None:
        dbias = dbias + gl.where(there_some, ddt_u, 0.0)
      gl.store(dx_ptr + place_some, dx_u.to(dx_ptr.dtype.element_ty), mask=there_some)
      gl.store(ddt_ptr + place_some, ddt_u.to(ddt_ptr.dtype.element_ty), mask=there_some)
      if z_ptr is not None:
        y_u = part_of(y_in, slot * (T // U) + j, U, some)
        z_u = part_of(z_in, slot * (T // U) + j, U, some)
        given = part_of(dy_in, slot * (T // U) + j, U, some)
        sigmoid_u = sigmoid(z_u)
        dz_u = given * y_u * sigmoid_u * (1.0 + z_u * (1.0 - sigmoid_u))
        gl.store(dz_ptr + place_some, dz_u.to(dz_ptr.dtype.element_ty), mask=there_some)

  async_copy.wait_group(0)
  gl.store(dA_ptr + row * (D * N) + of_block, from_variables(dA, vectors), mask=mine)
  if dh0_ptr is not None:
    if PIECE < L:
      mine = mine & (first == 0)
    gl.store(dh0_ptr + b * (D * N) + of_block, from_variables(g, vectors), mask=mine)
  of_row = row * D + d0 + channel_some
  if D_ptr is not None:
    gl.store(dD_ptr + of_row, gl.sum(dD, 0), mask=mask_some)
  if bias_ptr is not None:
    gl.store(dbias_ptr + of_row, gl.sum(dbias, 0), mask=mask_some)


@gluon.jit
def add_parts(
  parts_ptr, dB_ptr, dC_ptr,
  PARTS: gl.constexpr, SIZE: gl.constexpr, L: gl.constexpr, N: gl.constexpr, U: gl.constexpr,
  SLAB: gl.constexpr, AT_ONCE: gl.constexpr,
):  # fmt: skip
  """Adds the partial sums of `backward` up over its programs, SLAB of them each, in their order.

  Args:
    parts_ptr: [B, PARTS, SIZE], the last axis being [L / U, 2, N, U].
    dB_ptr, dC_ptr: [B, L, N].
  """
  layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
  b = gl.program_id(1).to(gl.int64)
  place = gl.program_id(0) * SLAB + gl.arange(0, SLAB, layout=layout)
  there = place < SIZE
  parts_ptr += b * (PARTS * SIZE)
  total = gl.zeros([SLAB], gl.float32, layout=layout)
  for first in range(0, PARTS, AT_ONCE):
    values = ()
    for i in gl.static_range(AT_ONCE):
      part = parts_ptr + (first + i).to(gl.int64) * SIZE
      values = values + (gl.load(part + place, mask=there & (first + i < PARTS), other=0.0),)
    for i in gl.static_range(AT_ONCE):
      total += values[i].to(gl.float32)
  t = place // (2 * N * U) * U + place % U
  n = place // U % N
  of_C = place // (N * U) % 2 == 1
  there = there & (t < L)
  out = b * (L * N) + t * N + n
  gl.store(dB_ptr + out, total.to(dB_ptr.dtype.element_ty), mask=there & (of_C == 0))
  gl.store(dC_ptr + out, total.to(dC_ptr.dtype.element_ty), mask=there & of_C)
