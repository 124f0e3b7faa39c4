"""The selective scan as a Pallas kernel for TPUs: time in the grid, the state in VMEM.

A program of the grid runs one block of time of one row and up to 512 channels. Blocks of time come
in order, and the state goes from each to the next in scratch memory, while Pallas loads the next
block and stores the last. Channels lie along the 128 lanes of a vector register and states along
its sublanes, so that a step is whole-register arithmetic: rows of x and dt are spread over the
sublanes, columns of B and C over the lanes. B, C and the marks of document starts are one array
with time along the lanes, of which a step picks its column.

The forward pass saves the state before each block, L/128 x N x D floats. The backward pass walks
the blocks from the last to the first: it recomputes the states of a block into scratch memory, then
runs the recurrence of the cotangents back through them (the equations are in `chunked`). Sums over
time are outputs that stay in VMEM from block to block; sums over channels are written per block of
channels and added up by XLA. Nothing depends on the order in which programs run.

Time is padded with steps of dt = 0, channels and states with zeros, none of which touches the
state. For one device, or inside jax.shard_map: XLA does not split kernels over a mesh.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ssm_moe.ops import implementation
from ssm_moe.ops.selective_scan.reference import segment_starts
from ssm_moe.shapes import Array, Float, Int

# A block of time fills the lanes of the registers that hold B and C; shorter ones would waste them.
BLOCK_LENGTH = 128
# Blocks of this many states times channels: the states of a block of time then take 4 MiB of VMEM.
_BLOCK_STATES = 512 * 16
# Steps that the compiler schedules together: the sums over lanes of one, which take long, then run
# beside the arithmetic of others.
_UNROLL = 8
_LANES, _SUBLANES = 128, 8
_PACKED_SUBLANES = 16  # of bfloat16
_LOG2_E = math.log2(math.e)


class _Inputs(NamedTuple):
  """What both kernels read: whole blocks in every axis.

  N is a multiple of 8. BCK holds B, C and, in a last group of 8 rows if there are documents, 1
  where the state is kept and 0 where a document starts.
  """

  x: Float[Array, 'B L D']
  dt: Float[Array, 'B L D']
  z: Float[Array, 'B L D'] | None
  BCK: Float[Array, 'B R L']
  A: Float[Array, 'N D']
  D: Float[Array, '1 D'] | None
  dt_bias: Float[Array, '1 D'] | None


class _Gradients(NamedTuple):
  """What the backward kernel writes; sums over rows and groups of channels are left to XLA."""

  x: Float[Array, 'B L D']
  dt: Float[Array, 'B L D']
  z: Float[Array, 'B L D'] | None
  BC: Float[Array, 'B G R L']
  A: Float[Array, 'B N D']
  D: Float[Array, 'B 1 D'] | None
  dt_bias: Float[Array, 'B 1 D'] | None
  h0: Float[Array, 'B N D']


class _Settings(NamedTuple):
  """What is known before tracing.

  Attributes:
    length, channels: Of a block.
    dt_softplus: Whether dt is a logit.
    has_documents: Whether the state is reset at document starts.
    interpret: Whether to run by XLA operations on any machine, as tests do.
  """

  length: int
  channels: int
  dt_softplus: bool
  has_documents: bool
  interpret: bool


def supports(*arrays: Array | None) -> str | None:
  """Returns why the kernel cannot run with these arguments here, or None."""
  if implementation.platform() != 'tpu':
    return f'it needs a TPU, and this is for {implementation.platform()}'
  for array in arrays:
    if array is not None and array.dtype in (jnp.float64, jnp.float16):
      return f'TPUs have no {array.dtype}'
  return None


def selective_scan(
  x: Float[Array, 'B L D'],
  dt: Float[Array, 'B L D'],
  A: Float[Array, 'D N'],
  B: Float[Array, 'B L N'],
  C: Float[Array, 'B L N'],
  *,
  D: Float[Array, 'D'] | None = None,
  z: Float[Array, 'B L D'] | None = None,
  dt_bias: Float[Array, 'D'] | None = None,
  dt_softplus: bool = False,
  segment_ids: Int[Array, 'B L'] | None = None,
  h0: Float[Array, 'B D N'] | None = None,
  interpret: bool = False,
) -> tuple[Float[Array, 'B L D'], Float[Array, 'B D N']]:
  """Runs the recurrence in one kernel each way; see `api.selective_scan`.

  Differentiable in reverse mode only. `interpret` runs it without a TPU, for tests.
  """
  batch, length, d_inner = x.shape
  d_state = A.shape[1]
  states = _round_up(d_state, _SUBLANES)
  block_length = min(BLOCK_LENGTH, _round_up(length, _PACKED_SUBLANES))
  block_channels = _block_channels(d_inner, states)
  settings = _Settings(
    block_length, block_channels, dt_softplus, segment_ids is not None, interpret
  )
  more_time = -length % block_length
  more_channels = -d_inner % block_channels
  more_states = states - d_state
  if dt_bias is not None and not dt_softplus:
    # Added here, so that the zero that a step is padded with stays zero.
    dt, dt_bias = dt.astype(jnp.float32) + dt_bias.astype(jnp.float32)[None, None, :], None

  def pad(v, *widths, value=0):
    if v is None or not any(widths):
      return v
    return jnp.pad(v, [(0, width) for width in widths], constant_values=value)

  def row(v):
    return None if v is None else pad(v.astype(jnp.float32)[None, :], 0, more_channels)

  def time_last(v):
    return jnp.swapaxes(pad(v.astype(jnp.float32), 0, more_time, more_states), 1, 2)

  columns = [time_last(B), time_last(C)]
  if segment_ids is not None:
    keep = pad(1 - segment_starts(segment_ids).astype(jnp.float32), 0, more_time, value=1)
    columns.append(jnp.broadcast_to(keep[:, None, :], (batch, _SUBLANES, keep.shape[1])))
  if h0 is None:
    h0 = jnp.zeros((batch, d_inner, d_state), jnp.float32)
  inputs = _Inputs(
    x=pad(x, 0, more_time, more_channels),
    dt=pad(dt, 0, more_time, more_channels, value=-jnp.inf if dt_softplus else 0),
    z=pad(z, 0, more_time, more_channels),
    BCK=jnp.concatenate(columns, axis=1),
    A=pad(A.astype(jnp.float32).T, more_states, more_channels),
    D=row(D),
    dt_bias=row(dt_bias),
  )
  h0 = pad(jnp.swapaxes(h0.astype(jnp.float32), 1, 2), 0, more_states, more_channels)
  y, h = _scan(inputs, h0, settings)
  return y[:, :length, :d_inner], jnp.swapaxes(h[:, :d_state, :d_inner], 1, 2)


def _round_up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple


def _block_channels(d_inner: int, states: int) -> int:
  """Returns a number of channels, whole registers, that leaves as little as possible to padding."""
  most = max(_BLOCK_STATES // states // _LANES, 1)
  registers = -(-d_inner // _LANES)
  blocks = -(-registers // most)
  return -(-registers // blocks) * _LANES


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scan(inputs: _Inputs, h0: Float[Array, 'B N D'], settings: _Settings):
  return _scan_forward(inputs, h0, settings)[0]


def _scan_forward(inputs: _Inputs, h0: Float[Array, 'B N D'], settings: _Settings):
  """Returns (y, last state) and what the backward pass needs."""
  batch, length, channels = inputs.x.shape
  states = inputs.A.shape[0]
  specs = _specs(inputs, settings, reverse=False)
  num_blocks = length // settings.length
  h_starts = jax.ShapeDtypeStruct((batch, num_blocks, states, channels), jnp.float32)
  y, h, h_starts = _call(
    functools.partial(_forward_kernel, settings=settings),
    settings,
    grid=(batch, channels // settings.channels, num_blocks),
    in_specs=(specs.inputs, specs.state),
    out_specs=(specs.tokens, specs.state, specs.h_starts),
    out_shape=(jax.ShapeDtypeStruct(inputs.x.shape, inputs.x.dtype), _shape(h0), h_starts),
    scratch_shapes=[
      pltpu.VMEM((states, settings.channels), jnp.float32),
      *[pltpu.VMEM((settings.length, settings.channels), jnp.float32)] * 3,
    ],
    states_in_scratch=1,
  )(inputs, h0)
  return (y, h), (inputs, h_starts)


def _scan_backward(settings: _Settings, residuals, cotangents):
  inputs, h_starts = residuals
  dy, dh = cotangents
  batch, length, channels = inputs.x.shape
  states = inputs.A.shape[0]
  specs = _specs(inputs, settings, reverse=True)
  groups = channels // settings.channels
  num_blocks = length // settings.length

  def per_row(v):
    return None if v is None else jax.ShapeDtypeStruct((batch, *v.shape), jnp.float32)

  shapes = _Gradients(
    x=_shape(inputs.x),
    dt=_shape(inputs.dt),
    z=None if inputs.z is None else _shape(inputs.z),
    BC=jax.ShapeDtypeStruct((batch, groups, 2 * states, length), jnp.float32),
    A=per_row(inputs.A),
    D=per_row(inputs.D),
    dt_bias=per_row(inputs.dt_bias),
    h0=_shape(dh),
  )
  (grads,) = _call(
    functools.partial(_backward_kernel, settings=settings),
    settings,
    grid=(batch, groups, num_blocks),
    in_specs=(specs.inputs, specs.h_starts, specs.tokens, specs.state),
    out_specs=(specs.gradients,),
    out_shape=(shapes,),
    scratch_shapes=[
      pltpu.VMEM((settings.length, states, settings.channels), jnp.float32),
      *[pltpu.VMEM((settings.length, settings.channels), jnp.float32)] * 6,
    ],
    states_in_scratch=settings.length,
  )(inputs, h_starts, dy, dh)
  marks = inputs.BCK.shape[1] - 2 * states
  dBC = jnp.sum(grads.BC, axis=1)
  return (
    _Inputs(
      x=grads.x,
      dt=grads.dt,
      z=grads.z,
      BCK=jnp.pad(dBC, ((0, 0), (0, marks), (0, 0))),
      A=jnp.sum(grads.A, axis=0),
      D=None if grads.D is None else jnp.sum(grads.D, axis=0),
      dt_bias=None if grads.dt_bias is None else jnp.sum(grads.dt_bias, axis=0),
    ),
    grads.h0,
  )


_scan.defvjp(_scan_forward, _scan_backward)


def _shape(v: Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(v.shape, v.dtype)


class _Specs(NamedTuple):
  """Which block of each array a program sees."""

  inputs: _Inputs
  gradients: _Gradients
  tokens: pl.BlockSpec
  state: pl.BlockSpec
  h_starts: pl.BlockSpec


def _specs(inputs: _Inputs, settings: _Settings, *, reverse: bool) -> _Specs:
  length, channels = settings.length, settings.channels
  states, rows = inputs.A.shape[0], inputs.BCK.shape[1]
  last = inputs.x.shape[1] // length - 1

  def at(t):
    return last - t if reverse else t

  tokens = pl.BlockSpec((None, length, channels), lambda b, d, t: (b, at(t), d))
  state = pl.BlockSpec((None, states, channels), lambda b, d, t: (b, 0, d))
  row = pl.BlockSpec((1, channels), lambda b, d, t: (0, d))
  row_of_batch = pl.BlockSpec((None, 1, channels), lambda b, d, t: (b, 0, d))

  def if_there(v, spec):
    return None if v is None else spec

  return _Specs(
    inputs=_Inputs(
      x=tokens,
      dt=tokens,
      z=if_there(inputs.z, tokens),
      BCK=pl.BlockSpec((None, rows, length), lambda b, d, t: (b, 0, at(t))),
      A=pl.BlockSpec((states, channels), lambda b, d, t: (0, d)),
      D=if_there(inputs.D, row),
      dt_bias=if_there(inputs.dt_bias, row),
    ),
    gradients=_Gradients(
      x=tokens,
      dt=tokens,
      z=if_there(inputs.z, tokens),
      BC=pl.BlockSpec((None, None, 2 * states, length), lambda b, d, t: (b, d, 0, at(t))),
      A=state,
      D=if_there(inputs.D, row_of_batch),
      dt_bias=if_there(inputs.dt_bias, row_of_batch),
      h0=state,
    ),
    tokens=tokens,
    state=state,
    h_starts=pl.BlockSpec((None, None, states, channels), lambda b, d, t: (b, at(t), 0, d)),
  )


def _call(kernel, settings: _Settings, *, states_in_scratch: int, **options):
  """Returns `kernel` as a function of arrays, with as much VMEM as its blocks take."""
  states = options['scratch_shapes'][0].shape[-2]
  block = 4 * settings.channels * settings.length
  # Scratch of states, and at most 20 blocks of inputs, outputs (both twice) and scratch.
  needed = 4 * settings.channels * states * (states_in_scratch + 8) + 20 * block
  spilled = 8 * 2**20  # registers that do not suffice: more than was seen
  return pl.pallas_call(
    kernel,
    interpret=settings.interpret,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary'),
      vmem_limit_bytes=needed + spilled,
    ),
    **options,
  )


def _forward_kernel(inputs, h0, y, h_last, h_starts, h, dt, dt_x, y_rows, *, settings):
  @pl.when(pl.program_id(2) == 0)
  def _():
    h[...] = h0[...]

  h_starts[...] = h[...]
  _prepare(inputs, dt, dt_x, settings)
  states = inputs.A.shape[0]
  A_log2 = inputs.A[...] * _LOG2_E

  def step(t, h):
    column = _column(inputs.BCK, t)
    A_bar = _decay(A_log2, _row(dt, t), column, settings)
    h = A_bar * h + _row(dt_x, t) * column[:states]
    y_rows[pl.ds(t, 1), :] = jnp.sum(column[states : 2 * states] * h, axis=0, keepdims=True)
    return h

  h[...] = h_last[...] = _loop(step, settings, h[...])
  out = _skip(y_rows[...], inputs)
  if inputs.z is not None:
    out *= jax.nn.silu(_float32(inputs.z))
  y[...] = out.astype(y.dtype)


def _backward_kernel(
  inputs, h_starts, dy, dh, grads, h_before, dt, dt_x, dy_rows, y_rows, ddt, ddt_x, *, settings
):
  states = inputs.A.shape[0]
  A_log2 = inputs.A[...] * _LOG2_E
  lanes = jax.lax.broadcasted_iota(jnp.int32, (states, settings.length), 1)
  u = grads.h0  # which holds the cotangent of the state after the block, block by block

  @pl.when(pl.program_id(2) == 0)
  def _():
    u[...] = dh[...]
    for total in (grads.A, grads.D, grads.dt_bias):
      if total is not None:
        total[...] = jnp.zeros_like(total)

  _prepare(inputs, dt, dt_x, settings)
  dy_ungated = _float32(dy)
  if inputs.z is not None:
    dy_ungated *= jax.nn.silu(_float32(inputs.z))
  dy_rows[...] = dy_ungated

  def recompute(t, carry):
    h, dC = carry
    column = _column(inputs.BCK, t)
    h_before[t] = h
    A_bar = _decay(A_log2, _row(dt, t), column, settings)
    h = A_bar * h + _row(dt_x, t) * column[:states]
    if inputs.z is not None:
      y_rows[pl.ds(t, 1), :] = jnp.sum(column[states : 2 * states] * h, axis=0, keepdims=True)
    dC_t = jnp.sum(h * _row(dy_rows, t), axis=1, keepdims=True)
    return h, jnp.where(lanes == t, dC_t, dC)

  zeros = jnp.zeros((states, settings.length), jnp.float32)
  _, dC = _loop(recompute, settings, (h_starts[...], zeros))
  grads.BC[states:, :] = dC

  def step_back(i, carry):
    u, dA, dB = carry
    t = settings.length - 1 - i
    column = _column(inputs.BCK, t)
    g = column[states : 2 * states] * _row(dy_rows, t) + u
    u = _decay(A_log2, _row(dt, t), column, settings) * g
    through_decay = u * h_before[t]
    ddt[pl.ds(t, 1), :] = jnp.sum(through_decay * inputs.A[...], axis=0, keepdims=True)
    ddt_x[pl.ds(t, 1), :] = jnp.sum(g * column[:states], axis=0, keepdims=True)
    dB_t = jnp.sum(g * _row(dt_x, t), axis=1, keepdims=True)
    return u, dA + through_decay * _row(dt, t), jnp.where(lanes == t, dB_t, dB)

  u[...], grads.A[...], dB = _loop(step_back, settings, (u[...], grads.A[...], zeros))
  grads.BC[:states, :] = dB

  x = _float32(inputs.x)
  dx = ddt_x[...] * dt[...]
  if inputs.D is not None:
    dx += dy_rows[...] * inputs.D[...]
    grads.D[...] += jnp.sum(dy_rows[...] * x, axis=0, keepdims=True)
  grads.x[...] = dx.astype(grads.x.dtype)
  d_logits = ddt[...] + ddt_x[...] * x
  if settings.dt_softplus:
    d_logits *= jax.nn.sigmoid(_logits(inputs))
  if inputs.dt_bias is not None:
    grads.dt_bias[...] += jnp.sum(d_logits, axis=0, keepdims=True)
  grads.dt[...] = d_logits.astype(grads.dt.dtype)
  if inputs.z is not None:
    z = _float32(inputs.z)
    sigmoid = jax.nn.sigmoid(z)
    dz = _float32(dy) * _skip(y_rows[...], inputs) * sigmoid * (1 + z * (1 - sigmoid))
    grads.z[...] = dz.astype(grads.z.dtype)


def _float32(ref) -> Array:
  return ref[...].astype(jnp.float32)


def _logits(inputs) -> Float[Array, 'T D']:
  logits = _float32(inputs.dt)
  return logits if inputs.dt_bias is None else logits + inputs.dt_bias[...]


def _prepare(inputs, dt, dt_x, settings: _Settings) -> None:
  """Writes the step sizes of a block, and their products with x, to scratch memory."""
  steps = _logits(inputs)
  if settings.dt_softplus:
    # max(s, 0) + log(1 + exp(-|s|)): neither overflows.
    steps = jnp.maximum(steps, 0) + jnp.log1p(jnp.exp(-jnp.abs(steps)))
  dt[...] = steps
  dt_x[...] = steps * _float32(inputs.x)


def _column(columns, t: Array) -> Float[Array, 'R 1']:
  """Returns what B, C and the marks are at step t: lanes cannot be indexed by a variable."""
  values = columns[...]
  lanes = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
  return jnp.sum(jnp.where(lanes == t, values, 0), axis=1, keepdims=True)


def _loop(step, settings: _Settings, carry):
  unroll = 1 if settings.interpret else _UNROLL
  return jax.lax.fori_loop(0, settings.length, step, carry, unroll=unroll)


def _row(rows, t: Array) -> Float[Array, '1 D']:
  return rows[pl.ds(t, 1), :]


def _decay(
  A_log2: Float[Array, 'N D'], dt: Float[Array, '1 D'], column, settings: _Settings
) -> Float[Array, 'N D']:
  """Returns A_bar, zero where a document starts."""
  A_bar = jnp.exp2(dt * A_log2)  # what the chip has; of exp it would make a product and exp2
  if settings.has_documents:
    mark = 2 * A_log2.shape[0]
    A_bar *= column[mark : mark + 1]
  return A_bar


def _skip(y: Float[Array, 'T D'], inputs) -> Float[Array, 'T D']:
  return y if inputs.D is None else y + inputs.D[...] * _float32(inputs.x)
