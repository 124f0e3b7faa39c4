"""The causal convolution on a GPU, in Gluon: one kernel each way. `triton_gpu` starts them.

Memory bounds them, so each array is read once and in whole lines: a program owns a block of
channels and G runs of R tokens, one for each of its warps. A warp walks through its run U tokens at
a time and keeps the W - 1 tokens before in registers. The next U tokens are asked for before the
present ones are worked on: what is stored meanwhile may lie anywhere, for all that the compiler
knows, and no load is moved before it.

Letters beside those of `shapes`: G warps of a program; R tokens of a run; U tokens at a time; V
channels of a thread.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ssm_moe.ops.selective_scan.triton_tiles import sigmoid


@gluon.jit
def conv_forward(
  x_ptr, kernel_ptr, bias_ptr, reach_ptr, state_ptr, y_ptr,
  L: gl.constexpr, D: gl.constexpr, W: gl.constexpr, G: gl.constexpr, R: gl.constexpr,
  U: gl.constexpr, V: gl.constexpr, SILU: gl.constexpr,
):  # fmt: skip
  """Convolves G runs of a block of channels.

  Args:
    x_ptr, y_ptr: [B, L, D].
    kernel_ptr, bias_ptr: [W, D] and [D], float32.
    reach_ptr: [B, L], int32: how many tokens a token may look back.
    state_ptr: [B, W - 1, D], the tokens before the first.
  """
  layout: gl.constexpr = gl.BlockedLayout([1, V], [1, 32], [G, 1], [1, 0])
  b, first, column, mask = _place(D, G, R, V, layout)
  x_ptr += b * (L * D)
  y_ptr += b * (L * D)
  if reach_ptr is not None:
    reach_ptr += b * L
  if state_ptr is not None:
    state_ptr += b * ((W - 1) * D)
  filters = _filters(kernel_ptr, bias_ptr, D, W, column, mask)

  end = gl.minimum(first + R, L)
  taps = _before(x_ptr, state_ptr, first, L, D, W, column, mask)
  x_next = _rows(x_ptr, first, end, D, column, mask, U)
  reach_next = _reaches(reach_ptr, first, end, U)
  for k in range(R // U):
    t0 = first + k * U
    x_rows = x_next
    reaches = reach_next
    x_next = _rows(x_ptr, t0 + U, end, D, column, mask, U)
    reach_next = _reaches(reach_ptr, t0 + U, end, U)
    y_rows = y_ptr + (t0 * D + column)
    for i in gl.static_range(U):
      window = _within_reach(taps, reaches, i, W) + (x_rows[i].to(gl.float32),)
      taps = _without_first(window)
      y = _convolve(window, filters)
      if SILU:
        y = y * sigmoid(y)
      gl.store(y_rows + i * D, y.to(y_ptr.dtype.element_ty), mask=(t0 + i < end) & mask)


@gluon.jit
def conv_backward(
  x_ptr, kernel_ptr, bias_ptr, reach_ptr, state_ptr, dy_ptr,
  dx_ptr, parts_ptr, dstate_ptr,
  L: gl.constexpr, D: gl.constexpr, W: gl.constexpr, G: gl.constexpr, R: gl.constexpr,
  U: gl.constexpr, V: gl.constexpr, SILU: gl.constexpr,
):  # fmt: skip
  """Finds the gradients of G runs of a block of channels, making y before SiLU again.

  A token's gradient is whole when the W - 1 tokens after it have added to it, so a warp goes W - 1
  tokens beyond its run. R and U are not less than W - 1.

  Args:
    dy_ptr, dx_ptr: [B, L, D].
    parts_ptr: [B, programs of a row, W + 1, D], float32: sums over the tokens of a program for the
      gradients of the kernel, and of the bias.
    dstate_ptr: [B, W - 1, D].
  """
  layout: gl.constexpr = gl.BlockedLayout([1, V], [1, 32], [G, 1], [1, 0])
  b, first, column, mask = _place(D, G, R, V, layout)
  x_ptr += b * (L * D)
  dy_ptr += b * (L * D)
  dx_ptr += b * (L * D)
  if reach_ptr is not None:
    reach_ptr += b * L
  if state_ptr is not None:
    state_ptr += b * ((W - 1) * D)
    dstate_ptr += b * ((W - 1) * D)
  filters = _filters(kernel_ptr, bias_ptr, D, W, column, mask)

  end = gl.minimum(first + R, L)
  beyond = gl.minimum(first + (R + W - 1), L)
  taps = _before(x_ptr, state_ptr, first, L, D, W, column, mask)
  x_next = _rows(x_ptr, first, beyond, D, column, mask, U)
  dy_next = _rows(dy_ptr, first, beyond, D, column, mask, U)
  reach_next = _reaches(reach_ptr, first, beyond, U)
  zero = gl.full([G, 32 * V], 0.0, gl.float32, layout)
  sums = ()
  dx = ()  # of the W - 1 tokens before, as far as it is known
  for _ in gl.static_range(W + 1):
    sums = sums + (zero,)
  for _ in gl.static_range(W - 1):
    dx = dx + (zero,)
  for k in range(R // U):
    t0 = first + k * U
    x_rows = x_next
    dy_rows = dy_next
    reaches = reach_next
    x_next = _rows(x_ptr, t0 + U, beyond, D, column, mask, U)
    dy_next = _rows(dy_ptr, t0 + U, beyond, D, column, mask, U)
    reach_next = _reaches(reach_ptr, t0 + U, beyond, U)
    t0 -= W - 1
    dx_rows = dx_ptr + (t0 * D + column)
    for i in gl.static_range(U):
      window = _within_reach(taps, reaches, i, W) + (x_rows[i].to(gl.float32),)
      taps = _without_first(window)
      da = _activation_gradient(window, filters, dy_rows[i].to(gl.float32), SILU)
      dx = _add_to_window(dx + (zero,), filters, da, reaches, i, W)
      t = t0 + i
      value = dx[0].to(dx_ptr.dtype.element_ty)
      gl.store(dx_rows + i * D, value, mask=(t >= first) & (t < end) & mask)
      if dstate_ptr is not None:
        gl.store(dstate_ptr + (t + (W - 1)) * D + column, value, mask=(t < 0) & mask)
      dx = _without_first(dx)
      added = ()
      for w in gl.static_range(W):
        added = added + (sums[w] + da * window[w],)
      sums = added + (sums[W] + da,)
  t0 = first + (R - (W - 1))
  dx_rows = dx_ptr + (t0 * D + column)
  for i in gl.static_range(W - 1):
    window = _within_reach(taps, reach_next, i, W) + (x_next[i].to(gl.float32),)
    taps = _without_first(window)
    da = _activation_gradient(window, filters, dy_next[i].to(gl.float32), SILU)
    dx = _add_to_window(dx + (zero,), filters, da, reach_next, i, W)
    value = dx[0].to(dx_ptr.dtype.element_ty)
    gl.store(dx_rows + i * D, value, mask=(t0 + i < end) & mask)
    dx = _without_first(dx)

  parts_ptr += (b * gl.num_programs(1) + gl.program_id(1)) * ((W + 1) * D)
  of_block = gl.program_id(0) * (32 * V)
  channel = of_block + gl.arange(0, 32 * V, layout=gl.SliceLayout(0, layout))
  for w in gl.static_range(W + 1):
    gl.store(parts_ptr + w * D + channel, gl.sum(sums[w], 0), mask=channel < D)


@gluon.jit
def _place(
  D: gl.constexpr, G: gl.constexpr, R: gl.constexpr, V: gl.constexpr, layout: gl.constexpr
):
  """Returns the row of the batch, each warp's first token, the channels, and which there are."""
  warp = gl.arange(0, G, layout=gl.SliceLayout(1, layout))[:, None]
  first = gl.program_id(1) * (G * R) + warp * R
  of_block = gl.program_id(0) * (32 * V)
  column = of_block + gl.arange(0, 32 * V, layout=gl.SliceLayout(0, layout))[None, :]
  return gl.program_id(2).to(gl.int64), first, column, column < D


@gluon.jit
def _filters(kernel_ptr, bias_ptr, D: gl.constexpr, W: gl.constexpr, column, mask):
  """Returns the W rows of the kernel, and last the bias if there is one."""
  filters = ()
  for w in gl.static_range(W):
    filters = filters + (gl.load(kernel_ptr + w * D + column, mask=mask, other=0.0),)
  if bias_ptr is not None:
    filters = filters + (gl.load(bias_ptr + column, mask=mask, other=0.0),)
  return filters


@gluon.jit
def _rows(pointer, t0, end, D: gl.constexpr, column, mask, U: gl.constexpr):
  """Loads the U rows from t0 on; zeros from `end` on."""
  pointers = pointer + (t0 * D + column)
  rows = ()
  for i in gl.static_range(U):
    rows = rows + (gl.load(pointers + i * D, mask=(t0 + i < end) & mask, other=0.0),)
  return rows


@gluon.jit
def _reaches(pointer, t0, end, U: gl.constexpr):
  """Loads how far each of U tokens may look back; an empty tuple if no pointer."""
  reaches = ()
  if pointer is not None:
    pointers = pointer + t0
    for i in gl.static_range(U):
      reaches = reaches + (gl.load(pointers + i, mask=t0 + i < end, other=0),)
  return reaches


@gluon.jit
def _before(
  x_ptr, state_ptr, first, L: gl.constexpr, D: gl.constexpr, W: gl.constexpr, column, mask
):
  """Loads the W - 1 tokens before the first, from the state where they are before the row."""
  taps = ()
  for i in gl.static_range(W - 1):
    t = first + (i - (W - 1))
    tap = gl.load(x_ptr + t * D + column, mask=(t >= 0) & (t < L) & mask, other=0.0)
    if state_ptr is not None:
      place = (t + (W - 1)) * D + column
      tap += gl.load(state_ptr + place, mask=(t < 0) & mask, other=0.0)
    taps = taps + (tap.to(gl.float32),)
  return taps


@gluon.jit
def _within_reach(taps, reaches, i: gl.constexpr, W: gl.constexpr):
  """Sets what token i may not look back at to zero: no later token may either."""
  if len(reaches) > 0:
    kept = ()
    for w in gl.static_range(W - 1):
      kept = kept + (gl.where(reaches[i] >= W - 1 - w, taps[w], 0.0),)
    taps = kept
  return taps


@gluon.jit
def _convolve(window, filters):
  W: gl.constexpr = len(window)
  total = window[0] * filters[0]
  if len(filters) > W:
    total += filters[W]
  for w in gl.static_range(1, W):
    total = gl.fma(window[w], filters[w], total)
  return total


@gluon.jit
def _activation_gradient(window, filters, dy, SILU: gl.constexpr):
  """Returns the gradient of what the activation was taken of."""
  da = dy
  if SILU:
    a = _convolve(window, filters)
    s = sigmoid(a)
    da = dy * s * (1.0 + a * (1.0 - s))
  return da


@gluon.jit
def _add_to_window(dx, filters, da, reaches, i: gl.constexpr, W: gl.constexpr):
  """Adds what token i gives to each input in its window."""
  added = ()
  for w in gl.static_range(W):
    given = da
    if len(reaches) > 0 and w < W - 1:
      given = gl.where(reaches[i] >= W - 1 - w, da, 0.0)
    added = added + (dx[w] + given * filters[w],)
  return added


@gluon.jit
def _without_first(values):
  rest = ()
  for i in gl.static_range(1, len(values)):
    rest = rest + (values[i],)
  return rest
