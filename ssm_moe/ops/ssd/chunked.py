"""Mamba-2's scan by chunks of time, as matrix products: the portable default.

With a_t = dt_t A, and a_{s:t} the sum of a over the steps after s up to t, a chunk of Q steps that
starts from the state h is (section 6 of https://arxiv.org/abs/2405.21060)

  y_t = sum_{s <= t} exp(a_{s:t}) (C_t . B_s) dt_s x_s + exp(a_{0:t}) h C_t
  h' = exp(a_{0:Q}) h + sum_s exp(a_{s:Q}) dt_s x_s B_s^T

The chunks follow each other in a loop that keeps the state before each for the backward pass, which
computes everything else of a chunk again: nothing of size L x P x N or L x Q outlives its chunk.

Measured, forward and backward with random inputs, median (least to most), and temporaries; "all at
once" is a form without the loop over chunks:

  two CPU cores, float32, B 2, L 2048, H 16, P 64, G 1, N 128 (7 runs beside other work, jax 0.10.2)
    chunks of 64                404 ms (341 to 515), 102 MiB
    chunks of 128               484 ms (420 to 565), 86 MiB
    chunks of 256               664 ms (616 to 1169), 105 MiB
    autodiff of one lax.scan    5700 ms (5330 to 7340, 4 runs), 4245 MiB
  H200, bfloat16, B 8, L 2048, H 32, P 64, G 1, N 128 (20 runs, jax 0.11.2)
    chunks of 64                5.4 ms (5.2 to 6.1), 425 MiB
    chunks of 128               4.6 ms (4.3 to 4.8), 350 MiB
    chunks of 256               4.6 ms (4.1 to 5.0), 409 MiB
    128, all at once            4.1 ms (3.7 to 4.4, 10 runs), 1318 MiB
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ssm_moe.ops.selective_scan.reference import compute_dtype, segment_starts
from ssm_moe.shapes import Array, Float, Int

CHUNK_SIZE = 128

# Sums of log-decays are differences of running sums, which would round to the size of the whole sum
# and not of the difference. So a running sum is kept in two parts: multiples of this grid, which
# float32 adds and subtracts without rounding up to 2**24 / 64 = 2**18, and small remainders.
_GRID = 64.0
# A step that decays by more is taken for this: exp is 0 either way, in float64 too, and a chunk of
# such steps sums to 2**17.
_LEAST_LOG_DECAY = -1024.0


class _Chunk(NamedTuple):
  """One chunk, heads by group, time after them; x, B and C in the dtype of the products.

  Attributes:
    document: Number of documents that began in the chunk up to a step; None without segments.
  """

  x: Float[Array, 'B G heads Q P']
  dt: Float[Array, 'B G heads Q']
  B: Float[Array, 'B G Q N']
  C: Float[Array, 'B G Q N']
  document: Int[Array, 'B Q'] | None


def ssd(
  x: Float[Array, 'B L H P'],
  dt: Float[Array, 'B L H'],
  A: Float[Array, 'H'],
  B: Float[Array, 'B L G N'],
  C: Float[Array, 'B L G N'],
  *,
  D: Float[Array, 'H'] | None = None,
  dt_bias: Float[Array, 'H'] | None = None,
  dt_softplus: bool = False,
  segment_ids: Int[Array, 'B L'] | None = None,
  h0: Float[Array, 'B H P N'] | None = None,
  chunk_size: int = CHUNK_SIZE,
) -> tuple[Float[Array, 'B L H P'], Float[Array, 'B H P N']]:
  """Runs the recurrence in chunks of `chunk_size` steps; see `api.ssd` for the arguments.

  Temporaries are a small multiple of the inputs, plus L/Q states, plus a few B H Q Q floats.
  """
  batch, length, num_heads, head_dim = x.shape
  num_groups, d_state = B.shape[2:]
  groups = (num_groups, num_heads // num_groups)
  dtype = compute_dtype(x, dt, A, B, C, D, dt_bias, h0)
  out_dtype = x.dtype
  is_bfloat16 = all(v.dtype == jnp.bfloat16 for v in (x, B, C))
  x, B, C = (v.astype(jnp.bfloat16 if is_bfloat16 else dtype) for v in (x, B, C))
  dt = dt.astype(dtype)
  if dt_bias is not None:
    dt = dt + dt_bias.astype(dtype)[None, None, :]
  if dt_softplus:
    dt = jax.nn.softplus(dt)
  starts = None if segment_ids is None else segment_starts(segment_ids)
  A = A.astype(dtype).reshape(groups)
  D = None if D is None else D.astype(dtype).reshape(groups)
  h_shape = (batch, *groups, head_dim, d_state)
  h = jnp.zeros(h_shape, dtype) if h0 is None else h0.astype(dtype).reshape(h_shape)
  chunk_size = min(chunk_size, length)

  def cut(v, *features):
    """Cuts [B, L, ...] into [L/Q, B, L, ...], padded with zeros and `features` split apart."""
    v = jnp.pad(v, ((0, 0), (0, -length % chunk_size)) + ((0, 0),) * (v.ndim - 2))
    return jnp.moveaxis(v.reshape(batch, -1, chunk_size, *features), 1, 0)

  # Zeros make a padded step the identity: with dt = 0 nothing decays and nothing enters.
  chunks = _Chunk(
    x=jnp.moveaxis(cut(x, *groups, head_dim), 2, 4),
    dt=jnp.moveaxis(cut(dt, *groups), 2, 4),
    B=jnp.moveaxis(cut(B, num_groups, d_state), 2, 3),
    C=jnp.moveaxis(cut(C, num_groups, d_state), 2, 3),
    document=None if starts is None else jnp.cumsum(cut(starts), axis=2, dtype=jnp.int32),
  )

  # A loop already keeps XLA from merging the second computation with the first.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def run_chunk(h, chunk):
    h, y = _run_chunk(h, chunk, A)
    if D is not None:
      y = y + D[None, :, :, None, None] * chunk.x.astype(dtype)
    return h, y.astype(out_dtype)

  h, y = jax.lax.scan(run_chunk, h, chunks)
  y = jnp.moveaxis(y, (1, 0, 4), (0, 1, 2)).reshape(batch, -1, num_heads, head_dim)
  return y[:, :length], h.reshape(batch, num_heads, head_dim, d_state)


def _run_chunk(
  h: Float[Array, 'B G heads P N'], chunk: _Chunk, A: Float[Array, 'G heads']
) -> tuple[Float[Array, 'B G heads P N'], Float[Array, 'B G heads Q P']]:
  """Returns the state after the chunk and y without the skip, both in the dtype of `h`."""
  log_decay = jnp.maximum(chunk.dt * A[None, :, :, None], _LEAST_LOG_DECAY)
  steps = jnp.arange(chunk.dt.shape[3])
  reaches = (steps[:, None] >= steps[None, :])[None]
  from_start = to_end = jnp.ones((1, 1), bool)
  if chunk.document is not None:
    document = chunk.document
    reaches = reaches & (document[:, :, None] == document[:, None, :])
    from_start = document == 0
    to_end = document == document[:, -1:]

  # The sums start anew with each document. Over the whole chunk, the gradient of a later document's
  # decays would cancel in dt to rounding only, and not to zero.
  starts_anew = jnp.swapaxes(reaches, 1, 2)[:, None].astype(h.dtype)
  # Rounding is flat, so the remainder alone carries the gradient of log_decay.
  on_grid = jnp.round(log_decay * _GRID) / _GRID
  sums = [
    jnp.matmul(part, starts_anew, precision='highest') for part in (on_grid, log_decay - on_grid)
  ]
  decay = _decay(sum(v[..., :, None] - v[..., None, :] for v in sums), reaches)
  decay_from_start = _decay(sum(sums), from_start)
  decay_to_end = _decay(sum(v[..., -1:] - v for v in sums), to_end)

  product = functools.partial(_product, dtype=chunk.B.dtype, sum_dtype=h.dtype)
  dt_x = chunk.dt[..., None] * chunk.x.astype(h.dtype)
  scores = product('bgin,bgjn->bgij', chunk.C, chunk.B)
  y = product('bgrij,bgrjp->bgrip', scores[:, :, None] * decay, dt_x)
  y += decay_from_start[..., None] * product('bgin,bgrpn->bgrip', chunk.C, h)
  entered = product('bgrjp,bgjn->bgrpn', decay_to_end[..., None] * dt_x, chunk.B)
  return decay_from_start[..., -1, None, None] * h + entered, y


def _decay(log_decay: Array, allowed: Array) -> Array:
  """Returns exp(log_decay), and zero where not allowed: between documents or back in time.

  Back in time the exponent is positive and exp would overflow, so it is masked before exp; then
  its gradient is zero too, where 0 * inf would be NaN.
  """
  # `allowed` has a batch axis and time; `log_decay` has groups and heads between them.
  return jnp.exp(jnp.where(allowed[:, None, None], log_decay, -jnp.inf))


def _product(spec: str, a: Array, b: Array, *, dtype: jnp.dtype, sum_dtype: jnp.dtype) -> Array:
  """Multiplies in `dtype` and sums in `sum_dtype`."""
  # Float32 means float32: without 'highest' a TPU would multiply in bfloat16 and a GPU in TF32.
  precision = None if dtype == jnp.bfloat16 else 'highest'
  return jnp.einsum(
    spec, a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=sum_dtype
  )
