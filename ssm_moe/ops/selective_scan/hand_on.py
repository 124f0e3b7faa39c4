"""The selective scan in pieces on several devices: what a piece hands on. See `sequence_parallel`.

  forward:  sum_t exp(A sum_{s > t} dt_s) dt_t x_t B_t     to the state after the piece
  backward: sum_t exp(A sum_{s <= t} dt_s) dy_t C_t        to the cotangent of the state before it

dy is that of y before the gate. Both are sums over tokens, with no step that waits for another;
they are taken chunk by chunk, so that no more than a chunk of B L D N numbers exists.
"""

import jax
import jax.numpy as jnp

from ssm_moe.ops import implementation
from ssm_moe.ops.selective_scan.reference import compute_dtype
from ssm_moe.shapes import Array, Bool, Float

_CHUNK = 64
# On a GPU each chunk costs the start of several kernels: so many of the B L D N numbers at a time.
_GPU_NUMBERS = 2**25

Arrays = dict[str, Array | None]


def forward(
  arrays: Arrays, starts: Bool[Array, 'B L'], *, dt_softplus: bool
) -> tuple[Float[Array, 'B D N'], Float[Array, 'B D']]:
  """Returns what the piece adds to the state after it, and its time: infinite after a reset.

  Args:
    arrays: Of the scan, by name.
    starts: Where the state is set to zero before the step.
    dt_softplus: As in the scan.
  """
  changes = starts.astype(jnp.int32)
  last_document = jax.lax.cumsum(changes, axis=1, reverse=True) == changes
  added, time = _sum(
    arrays, arrays['x'], arrays['B'], last_document, dt_softplus=dt_softplus, to_end=True
  )
  return added, jnp.where(jnp.any(starts, axis=1)[:, None], jnp.inf, time)


def backward(
  arrays: Arrays, dy: Float[Array, 'B L D'], starts: Bool[Array, 'B L'], *, dt_softplus: bool
) -> Float[Array, 'B D N']:
  """Returns what the piece adds to the cotangent of the state before it."""
  first_document = jnp.cumsum(starts, axis=1, dtype=jnp.int32) == 0
  return _sum(arrays, dy, arrays['C'], first_document, dt_softplus=dt_softplus, to_end=False)[0]


def decay(A: Float[Array, 'D N'], time: Float[Array, '*S B D']) -> Float[Array, '*S B D N']:
  """Returns the factor by which the state decays in a time."""
  return jnp.exp(time[..., None] * A.reshape((1,) * (time.ndim - 1) + A.shape))


def _sum(
  arrays: Arrays,
  values: Float[Array, 'B L D'],
  vectors: Float[Array, 'B L N'],
  counts: Bool[Array, 'B L'],
  *,
  dt_softplus: bool,
  to_end: bool,
) -> tuple[Float[Array, 'B D N'], Float[Array, 'B D']]:
  """Sums decayed products of values and vectors over the tokens that count.

  Args:
    to_end: Decays are those from after a token to the end of the piece, and values are times dt;
      else those from before the piece to after a token, and values are of y after the gate.

  Returns:
    The sum, and that of dt.
  """
  x, dt, A, z, dt_bias = (arrays[name] for name in ('x', 'dt', 'A', 'z', 'dt_bias'))
  dtype = compute_dtype(*arrays.values(), values)
  batch, length, d_inner = x.shape
  A = A.astype(dtype).T
  chunk = _CHUNK
  if implementation.platform() == 'gpu':
    chunk = max(chunk, _GPU_NUMBERS // (batch * A.size))
  chunk = min(chunk, length)
  num_chunks = -(-length // chunk)

  def load(v, i):
    # The last chunk begins earlier if it would be cut short: what was there before counts once.
    return jax.lax.dynamic_slice_in_dim(v, jnp.minimum(i * chunk, length - chunk), chunk, axis=1)

  def add_chunk(k, sums):
    total, time = sums
    i = num_chunks - 1 - k if to_end else k
    again = i * chunk - jnp.minimum(i * chunk, length - chunk)
    here = load(counts, i) & (jnp.arange(chunk) >= again)[None, :]
    steps = load(dt, i).astype(dtype)
    if dt_bias is not None:
      steps = steps + dt_bias.astype(dtype)[None, None, :]
    if dt_softplus:
      steps = jax.nn.softplus(steps)
    # A token that does not count is no step: its own may be negative, and its decay infinite.
    steps = jnp.where(here[:, :, None], steps, 0)
    value = jnp.where(here[:, :, None], load(values, i).astype(dtype), 0)
    if to_end:
      value = value * steps
      elapsed = jax.lax.cumsum(steps, axis=1, reverse=True) - steps
    else:
      if z is not None:
        value = value * jax.nn.silu(load(z, i).astype(dtype))
      elapsed = jax.lax.cumsum(steps, axis=1)
    elapsed = elapsed + time[:, None, :]
    vector = load(vectors, i).astype(dtype)
    # Channels last, as in `chunked`.
    products = jnp.exp(elapsed[:, :, None, :] * A[None, None]) * value[:, :, None, :]
    total = total + jnp.sum(products * vector[:, :, :, None], axis=1)
    return total, time + jnp.sum(steps, axis=1)

  zeros = (jnp.zeros((batch, *A.shape), dtype), jnp.zeros((batch, d_inner), dtype))
  total, time = jax.lax.fori_loop(0, num_chunks, add_chunk, zeros)
  return jnp.swapaxes(total, 1, 2), time
