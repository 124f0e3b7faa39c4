"""The selective scan on a GPU, in Gluon: what a piece of time hands on. `triton_gpu` starts it.

Where rows and channels are few, their time is cut into pieces, each a program of its own. This
kernel goes first: it finds what a piece adds to the state, or to its cotangent, that leaves it, and
what it leaves of the one that enters. `pieces.join` makes of these what enters each piece.

No step waits for the one before: with c_t the sum of the step sizes between token t and the edge
that the walk began at, token t adds exp(c_t A) of its own there. Letters as in `triton_forward`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ssm_moe.ops.selective_scan.triton_forward import FORGET
from ssm_moe.ops.selective_scan.triton_tiles import (
  channel_row,
  copy_tile,
  exp2,
  from_variables,
  sigmoid,
  state_row,
  step_sizes,
  to_variables,
)


@gluon.jit
def carry(
  values_ptr, dt_ptr, z_ptr, A_ptr, vectors_ptr, bias_ptr, starts_ptr,
  carry_ptr, decay_ptr,
  L: gl.constexpr, D: gl.constexpr, N: gl.constexpr, T: gl.constexpr, BD: gl.constexpr,
  NT: gl.constexpr, W: gl.constexpr, STAGES: gl.constexpr, SOFTPLUS: gl.constexpr,
  PIECE: gl.constexpr, BACK: gl.constexpr, LEAST: gl.constexpr,
):  # fmt: skip
  """Walks from the edge where a piece is left into it, until nothing that is left counts.

    forward: from the last token, sum_t exp(A sum_{s > t} dt_s) dt_t x_t B_t;
    back:    from the first,      sum_t exp(A sum_{s <= t} dt_s) dy_t C_t, dy_t before the gate.

  Args, beside those of `forward`:
    values_ptr: [B, L, D]: x; if BACK dy, of y after the gate.
    z_ptr: None but if BACK.
    vectors_ptr: [B, L, N]: B; if BACK C.
    carry_ptr, decay_ptr: [B, P - 1, D, N], float32, P being ceil(L / PIECE): what a piece adds, and
      the factor by which it multiplies what enters it; of all pieces but the last, if BACK but the
      first.
    LEAST: Tokens count until each decay is below 2**-LEAST. Only with SOFTPLUS, where no later
      token can make it larger.
  """
  S: gl.constexpr = N // NT
  states: gl.constexpr = gl.BlockedLayout([1, 1], [32 // NT, NT], [W, 1], [0, 1])
  vectors: gl.constexpr = gl.BlockedLayout([1, S], [32 // NT, NT], [W, 1], [0, 1])
  V: gl.constexpr = 8 if BD >= 8 else BD
  tile: gl.constexpr = gl.BlockedLayout([1, V], [32 * V // BD, BD // V], [W, 1], [1, 0])
  tile_n: gl.constexpr = gl.BlockedLayout([1, 8], [256 // N, N // 8], [W, 1], [1, 0])
  flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])

  PASSED: gl.constexpr = (L + PIECE - 1) // PIECE - 1
  row = gl.program_id(1)
  piece = row % PASSED
  if BACK:
    piece += 1
  first = piece * (PIECE // T)
  count = gl.minimum((L + T - 1) // T - first, PIECE // T)
  b = (row // PASSED).to(gl.int64)
  d0 = gl.program_id(0) * BD
  tokens = b * (L * D) + d0
  values_ptr += tokens
  dt_ptr += tokens
  if z_ptr is not None:
    z_ptr += tokens
  vectors_ptr += b * (L * N)
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
  channel = gl.arange(0, BD, layout=gl.SliceLayout(0, tile))
  if bias_ptr is not None:
    bias = gl.load(bias_ptr + d0 + channel, mask=channel < D - d0, other=0.0)

  values_in = gl.allocate_shared_memory(values_ptr.dtype.element_ty, [STAGES, T, BD], flat)
  dt_in = gl.allocate_shared_memory(dt_ptr.dtype.element_ty, [STAGES, T, BD], flat)
  vectors_in = gl.allocate_shared_memory(vectors_ptr.dtype.element_ty, [STAGES, T, N], flat)
  if z_ptr is not None:
    z_in = gl.allocate_shared_memory(z_ptr.dtype.element_ty, [STAGES, T, BD], flat)
  decay_rows = gl.allocate_shared_memory(gl.float32, [T, BD], flat)
  value_rows = gl.allocate_shared_memory(gl.float32, [T, BD], flat)
  vector_rows = gl.allocate_shared_memory(gl.float32, [T, N], flat)

  near = first if BACK else first + count - 1
  for early in gl.static_range(STAGES - 1):
    t_early = (near + (early if BACK else -early)) * T
    copy_tile(values_in, early, values_ptr, t_early, L, D, column, mask, T)
    copy_tile(dt_in, early, dt_ptr, t_early, L, D, column, mask, T)
    copy_tile(vectors_in, early, vectors_ptr, t_early, L, N, column_n, mask_n, T)
    if z_ptr is not None:
      copy_tile(z_in, early, z_ptr, t_early, L, D, column, mask, T)
    async_copy.commit_group()

  # -1 where there is no channel, so that none of these is waited for.
  A = to_variables(gl.load(A_ptr + of_block, mask=mine, other=-1.0), S, states)
  slowest = A[0]
  for s in gl.static_range(1, S):
    slowest = gl.maximum(slowest, A[s])
  h = to_variables(gl.zeros([BD, N], gl.float32, layout=vectors), S, states)
  c = gl.zeros([BD, 1], gl.float32, layout=states)

  k = 0
  going = count > 0
  while going:
    t0 = (near + (k if BACK else -k)) * T
    slot = k % STAGES
    async_copy.wait_group(STAGES - 2)
    later = k + STAGES - 1
    t_later = (near + (later if BACK else -later)) * T
    free = later % STAGES
    copy_tile(values_in, free, values_ptr, t_later, L, D, column, mask, T)
    copy_tile(dt_in, free, dt_ptr, t_later, L, D, column, mask, T)
    copy_tile(vectors_in, free, vectors_ptr, t_later, L, N, column_n, mask_n, T)
    if z_ptr is not None:
      copy_tile(z_in, free, z_ptr, t_later, L, D, column, mask, T)
    async_copy.commit_group()

    there = t0 + t_tile < L
    dt = step_sizes(dt_in.index(slot).load(tile).to(gl.float32), bias, there, SOFTPLUS)
    values = values_in.index(slot).load(tile).to(gl.float32)
    if not BACK:
      values = values * dt
    if z_ptr is not None:
      z = z_in.index(slot).load(tile).to(gl.float32)
      values = values * z * sigmoid(z)
    if starts_ptr is not None:
      starts = gl.load(starts_ptr + t0 + t_tile, mask=there, other=0)
      dt = gl.where(starts != 0, FORGET, dt)
    decay_rows.store(dt)
    value_rows.store(values)
    vector_rows.store(vectors_in.index(slot).load(tile_n).to(gl.float32))

    for i in gl.static_range(T):
      t = i if BACK else T - 1 - i
      decay = channel_row(decay_rows, t, states)
      value = channel_row(value_rows, t, states)
      vector = state_row(vector_rows, t, S, states, vectors)
      if BACK:
        c = c + decay
      h_after = ()
      for s in gl.static_range(S):
        h_after = h_after + (gl.fma(exp2(c * A[s]), value * vector[s], h[s]),)
      h = h_after
      if not BACK:
        c = c + decay
    k += 1
    going = k < count
    if SOFTPLUS:
      going = going & (gl.max(gl.max(c * slowest, 1), 0) > -LEAST)

  async_copy.wait_group(0)
  decays = ()
  for s in gl.static_range(S):
    decays = decays + (exp2(c * A[s]),)
  place = row.to(gl.int64) * (D * N) + of_block
  gl.store(carry_ptr + place, from_variables(h, vectors), mask=mine)
  gl.store(decay_ptr + place, from_variables(decays, vectors), mask=mine)
