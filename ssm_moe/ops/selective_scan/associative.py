"""The selective scan by `jax.lax.associative_scan`.

Logarithmic depth, but every state of the sequence is held, several times over in the backward pass:
on a CPU it is slower than the sequential loop and takes four times its memory. It is here because
it parallelises over time on any backend, and as a second opinion on the other implementations.
"""

import jax
import jax.numpy as jnp

from ssm_moe.ops.selective_scan.reference import compute_dtype, segment_starts
from ssm_moe.shapes import Array, Float, Int


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
) -> tuple[Float[Array, 'B L D'], Float[Array, 'B D N']]:
  """Combines the steps pairwise; see `api.selective_scan` for the arguments.

  A step is the affine map h -> A_bar h + b. Two steps compose to one of the same form:
  (A_2, b_2) after (A_1, b_1) is (A_2 A_1, A_2 b_1 + b_2). Section 1.4.1 of Blelloch
  (https://www.cs.cmu.edu/~guyb/papers/Ble93.pdf); a reset is a step with A_bar = 0.
  """
  dtype = compute_dtype(x, dt, A, B, C, D, z, dt_bias, h0)
  out_dtype = x.dtype
  x, dt, A, B, C = (v.astype(dtype) for v in (x, dt, A, B, C))
  if dt_bias is not None:
    dt = dt + dt_bias.astype(dtype)[None, None, :]
  if dt_softplus:
    dt = jax.nn.softplus(dt)

  A_bar = jnp.exp(dt[:, :, :, None] * A[None, None, :, :])
  if segment_ids is not None:
    A_bar = jnp.where(segment_starts(segment_ids)[:, :, None, None], 0, A_bar)
  b = (dt * x)[:, :, :, None] * B[:, :, None, :]
  if h0 is not None:
    b = b.at[:, 0].add(A_bar[:, 0] * h0.astype(dtype))

  def compose(first, second):
    A_1, b_1 = first
    A_2, b_2 = second
    return A_2 * A_1, A_2 * b_1 + b_2

  _, h = jax.lax.associative_scan(compose, (A_bar, b), axis=1)
  y = jnp.einsum('bldn,bln->bld', h, C, precision='highest')
  if D is not None:
    y = y + D.astype(dtype)[None, None, :] * x
  if z is not None:
    y = y * jax.nn.silu(z.astype(dtype))
  return y.astype(out_dtype), h[:, -1]
