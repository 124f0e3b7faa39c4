"""What the scan's GPU kernels are made of: tiles in shared memory, and states in registers.

The states of one channel that a thread owns are S variables of one element a thread each, tensors
of [channels, threads that share a channel]: so every product and sum over them is one instruction.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

_LOG2_E = gl.constexpr(1.4426950408889634)
_LN_2 = gl.constexpr(0.6931471805599453)


@gluon.constexpr_function
def _in_twos(first, size):
  """Shape of [first, size] with the last axis, a power of two, as axes of 2."""
  return [first] + [2] * (size.bit_length() - 1)


@gluon.constexpr_function
def _bits(size):
  return size.bit_length() - 1


# The instructions themselves: what stands around them for results below 1e-38 would cost as much
# again, or, for the division, several times that.
@gluon.jit
def exp2(x):
  return gl.inline_asm_elementwise(
    'ex2.approx.ftz.f32 $0, $1;', '=f,f', [x], dtype=gl.float32, is_pure=True, pack=1
  )


@gluon.jit
def _log2(x):
  return gl.inline_asm_elementwise(
    'lg2.approx.ftz.f32 $0, $1;', '=f,f', [x], dtype=gl.float32, is_pure=True, pack=1
  )


@gluon.jit
def _reciprocal(x):
  return gl.inline_asm_elementwise(
    'rcp.approx.ftz.f32 $0, $1;', '=f,f', [x], dtype=gl.float32, is_pure=True, pack=1
  )


@gluon.jit
def _softplus(x):
  """max(x, 0) + log(1 + exp(-|x|)): neither overflows, and small results keep their digits."""
  e = exp2(-gl.abs(x) * _LOG2_E)
  series = e * (1.0 - e * (0.5 - e * (0.33333333 - e * 0.25)))
  return gl.maximum(x, 0.0) + gl.where(e < 0.015625, series, _log2(1.0 + e) * _LN_2)


@gluon.jit
def sigmoid(x):
  return _reciprocal(1.0 + exp2(-x * _LOG2_E))


@gluon.jit
def tiles_of_piece(L: gl.constexpr, T: gl.constexpr, PIECE: gl.constexpr):
  """Returns the number of this program's piece, over all rows, its first tile and their number."""
  TILES: gl.constexpr = (L + T - 1) // T
  PIECES: gl.constexpr = (L + PIECE - 1) // PIECE
  row = gl.program_id(1)
  first = 0
  count = TILES
  if PIECES > 1:
    first = row % PIECES * (PIECE // T)
    count = gl.minimum(TILES - first, PIECE // T)
  return row.to(gl.int64), first, count


@gluon.jit
def copy_tile(buffer, slot, pointer, t0, length, ROW: gl.constexpr, column, mask, T: gl.constexpr):
  """Starts the copy of rows t0 to t0 + T of a [L, ROW] array; rows outside of it become zero."""
  t = t0 + gl.arange(0, T, layout=gl.SliceLayout(1, column.type.layout))
  there = (t >= 0) & (t < length)
  async_copy.async_load(
    buffer.index(slot),
    pointer + t[:, None] * ROW + column,
    mask=there[:, None] & mask,
  )


@gluon.jit
def stack(values):
  """Joins 2**k tensors along k new last axes of 2: index bits from high to low."""
  for _ in gl.static_range(_bits(len(values))):
    if len(values) > 1:
      joined = ()
      for i in gl.static_range(len(values) // 2):
        joined = joined + (gl.join(values[i], values[i + len(values) // 2]),)
      values = joined
  return values[0]


@gluon.jit
def unstack(value, AXES: gl.constexpr):
  """Takes the last AXES axes, of 2 each, apart: the inverse of `stack`."""
  values = (value,)
  for _ in gl.static_range(AXES):
    low = ()
    high = ()
    for i in gl.static_range(len(values)):
      first, second = gl.split(values[i])
      low = low + (first,)
      high = high + (second,)
    values = low + high
  return values


@gluon.jit
def channel_row(tile, i, states: gl.constexpr):
  """Reads row i of a [T, BD] tile in shared memory, as [BD, 1]."""
  flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
  rows = tile.reinterpret(gl.float32, [tile.shape[0], tile.shape[1]], flat)
  return rows.index(i).load(gl.SliceLayout(1, states))[:, None]


@gluon.jit
def state_row(tile, i, S: gl.constexpr, states: gl.constexpr, vectors: gl.constexpr):
  """Reads row i of a [T, N] tile in shared memory, as S variables [1, NT]."""
  flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
  rows = tile.reinterpret(gl.float32, [tile.shape[0], tile.shape[1]], flat)
  row = rows.index(i).load(gl.SliceLayout(0, vectors))
  parts = unstack(gl.reshape(row, _in_twos(tile.shape[1] // S, S)), _bits(S))
  values = ()
  for s in gl.static_range(S):
    values = values + (gl.convert_layout(parts[s], gl.SliceLayout(0, states))[None, :],)
  return values


@gluon.jit
def to_variables(v, S: gl.constexpr, states: gl.constexpr):
  """Takes [BD, N] apart into S variables [BD, NT]."""
  shape: gl.constexpr = [v.shape[0]] + _in_twos(v.shape[1] // S, S)
  parts = unstack(gl.reshape(v, shape), _bits(S))
  values = ()
  for s in gl.static_range(S):
    values = values + (gl.convert_layout(parts[s], states),)
  return values


@gluon.jit
def from_variables(values, vectors: gl.constexpr):
  """Puts S variables [BD, NT] together to [BD, N]."""
  N: gl.constexpr = values[0].shape[1] * len(values)
  return gl.convert_layout(gl.reshape(stack(values), [values[0].shape[0], N]), vectors)


@gluon.jit
def part_of(buffer, i, U: gl.constexpr, layout: gl.constexpr):
  """Reads the i-th U rows of a buffer in shared memory, whatever tiles it is made of."""
  rank: gl.constexpr = len(buffer.shape)
  rows: gl.constexpr = buffer.shape[0] if rank == 2 else buffer.shape[0] * buffer.shape[1]
  flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
  parts = buffer.reinterpret(buffer.dtype, [rows // U, U, buffer.shape[rank - 1]], flat)
  return parts.index(i).load(layout).to(gl.float32)


@gluon.jit
def dot(a, b):
  """Adds up the products of S pairs of variables."""
  total = a[0] * b[0]
  for s in gl.static_range(1, len(a)):
    total = gl.fma(a[s], b[s], total)
  return total


@gluon.jit
def step_sizes(logits, bias, there, SOFTPLUS: gl.constexpr):
  """Step sizes of a tile; 0, which changes no state, where there is no token."""
  if bias is not None:
    logits = logits + bias[None, :]
  dt = _softplus(logits) if SOFTPLUS else logits
  return gl.where(there, dt, 0.0)


@gluon.jit
def step(h, A, decay_rows, u_rows, B_rows, i, S: gl.constexpr, states: gl.constexpr,
          vectors: gl.constexpr):  # fmt: skip
  """Takes the state over row i of a tile. Returns it, and its decay."""
  decay = channel_row(decay_rows, i, states)
  u = channel_row(u_rows, i, states)
  B = state_row(B_rows, i, S, states, vectors)
  h_after = ()
  decays = ()
  for s in gl.static_range(S):
    A_bar = exp2(decay * A[s])
    decays = decays + (A_bar,)
    h_after = h_after + (gl.fma(A_bar, h[s], u * B[s]),)
  return h_after, decays
