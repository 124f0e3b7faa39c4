"""The selective scan by chunks of time: the portable default, with a backward pass of its own.

The forward pass keeps the inputs and the state before each chunk, nothing of size L x N x D. The
backward pass walks the chunks in reverse: it recomputes the states of a chunk, then runs the
recurrence of the cotangents backwards through it. With g_t the cotangent of h_t and
u_t = A_bar_t g_t that of h_{t-1} through the decay,

  g_t = C_t dy_t + u_{t+1}             u_t = A_bar_t g_t
  d(dt_t x_t) = sum_n B_t g_t          dB_t = sum_d dt_t x_t g_t
  d(dt_t A) = h_{t-1} u_t              dC_t = sum_d h_t dy_t

so the stacks of h_t and u_{t+1} over a chunk give every gradient, by whole-chunk operations.

Measured on two CPU cores (AVX-512, jax 0.10.2), forward and backward at B 2, L 4096, D 512, N 16 in
float32; interleaved runs on a machine with other work, median (least to most) of 9:

  this file                          204 ms (179 to 296), 15 MiB of temporaries
  autodiff of one lax.scan          1280 ms (985 to 1353, 3 runs), 834 MiB
  chunks of 8, 16                    300, 215 ms
  chunks of 64, 128, 256             283, 450, 484 ms; perhaps as three stacks outgrow the caches
  inner scans unrolled by 4          478 ms (398 to 603)
  a plain sum in `_over_time`        290 ms (283 to 319)
  a plain sum in `_over_states`      258 ms (191 to 325): no clear difference
  exp inside the steps               237 ms (212 to 374): no clear difference
  outputs time first, as on TPU      316 ms (266 to 554), and 258 ms (228 to 327) as here beside it

On a TPU the outputs that the loops carry are time first: with batch first, and one row, the
compiler copies them whole for each chunk, 18.3 GB in place of 0.9 GB for one row of 4096 tokens and
4096 channels on a v5e (experiments/estimate_scan.py).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ssm_moe.ops import implementation
from ssm_moe.ops.selective_scan.reference import compute_dtype, segment_starts
from ssm_moe.shapes import Array, Bool, Float, Int

CHUNK_SIZE = 32


class _Inputs(NamedTuple):
  """The differentiable arguments, padded to whole chunks, and where the state is reset."""

  x: Float[Array, 'B L D']
  dt: Float[Array, 'B L D']
  A: Float[Array, 'D N']
  B: Float[Array, 'B L N']
  C: Float[Array, 'B L N']
  D: Float[Array, 'D'] | None
  z: Float[Array, 'B L D'] | None
  dt_bias: Float[Array, 'D'] | None
  starts: Bool[Array, 'B L'] | None
  h0: Float[Array, 'B D N']


class _Chunk(NamedTuple):
  """One chunk in the compute dtype, time first and channels last.

  Channels are last because there are many and they do not interact: sums over the states are then
  sums of whole vectors.
  """

  x: Float[Array, 'Q B D']
  dt_logits: Float[Array, 'Q B D']  # before the softplus
  dt: Float[Array, 'Q B D']
  A_bar: Float[Array, 'Q B N D']
  B: Float[Array, 'Q B N']
  C: Float[Array, 'Q B N']
  z: Float[Array, 'Q B D'] | None


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
  chunk_size: int = CHUNK_SIZE,
) -> tuple[Float[Array, 'B L D'], Float[Array, 'B D N']]:
  """Runs the recurrence in chunks of `chunk_size` steps; see `api.selective_scan`.

  Temporaries are a small multiple of the inputs plus (L/Q + 3 Q) B D N floats for chunks of Q.
  Differentiable in reverse mode only.
  """
  batch, length, d_inner = x.shape
  dtype = compute_dtype(x, dt, A, B, C, D, z, dt_bias, h0)
  if h0 is None:
    h0 = jnp.zeros((batch, d_inner, A.shape[1]), dtype)
  if dt_bias is not None and not dt_softplus:
    # Added here, so that the zero that a step is padded with stays zero.
    dt, dt_bias = dt.astype(dtype) + dt_bias.astype(dtype)[None, None, :], None
  starts = None if segment_ids is None else segment_starts(segment_ids)
  chunk_size = min(chunk_size, length)
  padding = -length % chunk_size

  def pad(v, value=0):
    if v is None or padding == 0:
      return v
    return jnp.pad(v, ((0, 0), (0, padding)) + ((0, 0),) * (v.ndim - 2), constant_values=value)

  # dt = 0 makes a padded step the identity: A_bar = 1 and nothing enters the state.
  inputs = _Inputs(
    x=pad(x),
    dt=pad(dt, -jnp.inf if dt_softplus else 0),
    A=A,
    B=pad(B),
    C=pad(C),
    D=D,
    z=pad(z),
    dt_bias=dt_bias,
    starts=pad(starts, False),
    h0=h0,
  )
  time_first = implementation.platform() == 'tpu'
  y, h = _scan(inputs, chunk_size, dt_softplus, dtype, time_first)
  return y[:, :length], h


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _scan(inputs: _Inputs, chunk_size: int, dt_softplus: bool, dtype: jnp.dtype, time_first: bool):
  outputs, _ = _scan_forward(inputs, chunk_size, dt_softplus, dtype, time_first)
  return outputs


def _scan_forward(
  inputs: _Inputs, chunk_size: int, dt_softplus: bool, dtype: jnp.dtype, time_first: bool
):
  """Returns (y, last state) and what the backward pass needs: inputs, state before each chunk."""

  def run_chunk(carry, index):
    h_start, y = carry
    chunk = _load(inputs, A, index, chunk_size, dt_softplus)

    def step(h, inputs_t):
      A_bar, dt_x, B, C = inputs_t
      h = A_bar * h + dt_x[:, None, :] * B[:, :, None]
      return h, jnp.sum(h * C[:, :, None], axis=1)

    h, y_chunk = jax.lax.scan(step, h_start, (chunk.A_bar, chunk.dt * chunk.x, chunk.B, chunk.C))
    y_chunk = _skip(y_chunk, chunk, inputs.D)
    if chunk.z is not None:
      y_chunk = y_chunk * jax.nn.silu(chunk.z)
    return (h, _store(y, y_chunk, index, time_first)), h_start

  A = inputs.A.T.astype(dtype)
  h0 = jnp.swapaxes(inputs.h0, 1, 2).astype(dtype)
  num_chunks = inputs.x.shape[1] // chunk_size
  y = jnp.zeros_like(_carried(inputs.x, time_first))
  (h, y), h_starts = jax.lax.scan(run_chunk, (h0, y), jnp.arange(num_chunks))
  return (_carried(y, time_first), jnp.swapaxes(h, 1, 2)), (inputs, h_starts)


def _scan_backward(
  chunk_size: int,
  dt_softplus: bool,
  dtype: jnp.dtype,
  time_first: bool,
  residuals,
  cotangents,
):
  """Returns the cotangent of `inputs`, None for where the state is reset."""
  inputs, h_starts = residuals
  dy, dh = cotangents
  A = inputs.A.T.astype(dtype)
  D = inputs.D

  def run_chunk(carry, index_and_state):
    u, grads = carry
    index, h_start = index_and_state
    chunk = _load(inputs, A, index, chunk_size, dt_softplus)
    dy_chunk = _take(dy, index, chunk_size, dtype)
    dt_x = chunk.dt * chunk.x
    h = _states(chunk, h_start)

    if chunk.z is not None:
      y = jnp.einsum('qbnd,qbn->qbd', h, chunk.C, precision='highest')
      y = _skip(y, chunk, D)
      sigmoid = jax.nn.sigmoid(chunk.z)
      dz = dy_chunk * y * sigmoid * (1 + chunk.z * (1 - sigmoid))
      grads = grads._replace(z=_store(grads.z, dz, index, time_first))
      dy_chunk = dy_chunk * chunk.z * sigmoid

    u, u_next = _state_cotangents(chunk, dy_chunk, u)

    # d(dt_t A) pairs h_{t-1} with u_t, which the stacks hold at index t - 1: they give it for every
    # token of the chunk but the first, whose pair is the state before the chunk.
    first = u * h_start
    ddt = jnp.concatenate([_over_states(first[None], A), _over_states(u_next * h, A)[:-1]])
    dt_next = jnp.concatenate([chunk.dt[1:], jnp.zeros_like(chunk.dt[:1])])
    dA = _over_time(first * chunk.dt[0, :, None, :], u_next, h, dt_next)

    # g_t = C_t dy_t + u_{t+1} is never formed: its first term has N and D apart.
    ddt_x = jnp.einsum('qbnd,qbn->qbd', u_next, chunk.B, precision='highest')
    ddt_x += dy_chunk * jnp.sum(chunk.B * chunk.C, axis=2, keepdims=True)
    dB = jnp.einsum('qbnd,qbd->qbn', u_next, dt_x, precision='highest')
    dB += chunk.C * jnp.sum(dy_chunk * dt_x, axis=2, keepdims=True)
    dC = jnp.einsum('qbnd,qbd->qbn', h, dy_chunk, precision='highest')

    dx = ddt_x * chunk.dt
    ddt += ddt_x * chunk.x
    if D is not None:
      dx += dy_chunk * D.astype(dtype)[None, None, :]
      grads = grads._replace(D=grads.D + jnp.sum(dy_chunk * chunk.x, axis=(0, 1)))
    if dt_softplus:
      ddt *= jax.nn.sigmoid(chunk.dt_logits)
    if inputs.dt_bias is not None:
      grads = grads._replace(dt_bias=grads.dt_bias + jnp.sum(ddt, axis=(0, 1)))
    grads = grads._replace(
      x=_store(grads.x, dx, index, time_first),
      dt=_store(grads.dt, ddt, index, time_first),
      A=grads.A + dA,
      B=_store(grads.B, dB, index, time_first),
      C=_store(grads.C, dC, index, time_first),
    )
    return (u, grads), None

  dh = jnp.swapaxes(dh, 1, 2).astype(dtype)
  tokens = {name: getattr(inputs, name) for name in ('x', 'dt', 'B', 'C', 'z')}
  tokens = {name: _carried(v, time_first) for name, v in tokens.items()}
  zeros = jax.tree.map(jnp.zeros_like, inputs._replace(starts=None, h0=None, **tokens))
  zeros = zeros._replace(
    A=jnp.zeros_like(dh),  # summed over the batch once, at the end
    D=None if D is None else jnp.zeros(D.shape, dtype),
    dt_bias=None if inputs.dt_bias is None else jnp.zeros(inputs.dt_bias.shape, dtype),
  )
  indices = jnp.arange(len(h_starts))
  (u, grads), _ = jax.lax.scan(run_chunk, (dh, zeros), (indices, h_starts), reverse=True)
  tokens = {name: _carried(getattr(grads, name), time_first) for name in tokens}
  grads = grads._replace(A=jnp.sum(grads.A, axis=0).T, h0=jnp.swapaxes(u, 1, 2), **tokens)
  return (
    jax.tree.map(
      lambda gradient, primal: gradient.astype(primal.dtype), grads, inputs._replace(starts=None)
    ),
  )


_scan.defvjp(_scan_forward, _scan_backward)


def _states(chunk: _Chunk, h_start: Float[Array, 'B N D']) -> Float[Array, 'Q B N D']:
  """Returns the state after each step of the chunk."""

  def step(h, inputs_t):
    A_bar, dt_x, B = inputs_t
    h = A_bar * h + dt_x[:, None, :] * B[:, :, None]
    return h, h

  _, h = jax.lax.scan(step, h_start, (chunk.A_bar, chunk.dt * chunk.x, chunk.B))
  return h


def _state_cotangents(
  chunk: _Chunk, dy: Float[Array, 'Q B D'], u: Float[Array, 'B N D']
) -> tuple[Float[Array, 'B N D'], Float[Array, 'Q B N D']]:
  """Returns the cotangent of the state before the chunk, and u_{t+1} for each step t."""

  def step(u_next, inputs_t):
    A_bar, C, dy = inputs_t
    return A_bar * (C[:, :, None] * dy[:, None, :] + u_next), u_next

  return jax.lax.scan(step, u, (chunk.A_bar, chunk.C, dy), reverse=True)


def _load(
  inputs: _Inputs, A: Float[Array, 'N D'], index: Array, chunk_size: int, dt_softplus: bool
) -> _Chunk:
  """Returns chunk number `index`, discretised, in the dtype of `A`.

  A_bar is computed for the whole chunk before the steps, and the backward pass uses it twice.
  """
  dtype = A.dtype
  x, dt, B, C, z = (
    None if v is None else _take(v, index, chunk_size, dtype)
    for v in (inputs.x, inputs.dt, inputs.B, inputs.C, inputs.z)
  )
  if inputs.dt_bias is not None:
    dt = dt + inputs.dt_bias.astype(dtype)[None, None, :]
  dt_logits = dt
  if dt_softplus:
    dt = jax.nn.softplus(dt)
  A_bar = jnp.exp(dt[:, :, None, :] * A[None, None, :, :])
  if inputs.starts is not None:
    # A decay to zero is a reset, and stops both the state and its cotangent.
    starts = _take(inputs.starts, index, chunk_size, jnp.dtype('bool'))
    A_bar = jnp.where(starts[:, :, None, None], 0, A_bar)
  return _Chunk(x=x, dt_logits=dt_logits, dt=dt, A_bar=A_bar, B=B, C=C, z=z)


def _skip(y: Float[Array, 'Q B D'], chunk: _Chunk, D: Float[Array, 'D'] | None):
  return y if D is None else y + D.astype(y.dtype)[None, None, :] * chunk.x


def _take(v: Array, index: Array, chunk_size: int, dtype: jnp.dtype) -> Array:
  """Returns chunk number `index` of a [B, L, ...] array, time first."""
  v = jax.lax.dynamic_slice_in_dim(v, index * chunk_size, chunk_size, axis=1)
  return jnp.swapaxes(v, 0, 1).astype(dtype)


def _carried(v: Array | None, time_first: bool) -> Array | None:
  """Returns a [B, L, ...] array as the loops carry it, or one that they carried as it was."""
  return v if v is None or not time_first else jnp.swapaxes(v, 0, 1)


def _store(v: Array, chunk: Array, index: Array, time_first: bool) -> Array:
  """Writes a time-first chunk into an array that a loop carries, in place."""
  chunk, start = _carried(chunk, not time_first).astype(v.dtype), index * len(chunk)
  return jax.lax.dynamic_update_slice_in_dim(v, chunk, start, axis=0 if time_first else 1)


def _over_states(v: Float[Array, 'T B N D'], A: Float[Array, 'N D']) -> Float[Array, 'T B D']:
  """Returns sum_n A v, written out slice by slice.

  In isolation, on a CPU, this is 12 ms for 67M products, and `jnp.sum(v * A, axis=2)` 208 ms.
  """
  return functools.reduce(jnp.add, [v[:, :, n] * A[n][None, None] for n in range(len(A))])


def _over_time(
  start: Float[Array, 'B N D'],
  u_next: Float[Array, 'Q B N D'],
  h: Float[Array, 'Q B N D'],
  dt_next: Float[Array, 'Q B D'],
) -> Float[Array, 'B N D']:
  """Returns start + sum_t u_{t+1} h_t dt_{t+1}; a loop was the fastest form on a CPU."""

  def step(total, inputs_t):
    u_next, h, dt_next = inputs_t
    return total + u_next * h * dt_next[:, None, :], None

  total, _ = jax.lax.scan(step, start, (u_next, h, dt_next))
  return total
