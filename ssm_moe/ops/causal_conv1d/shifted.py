"""Any platform: the causal convolution as shifted multiply-adds."""

import jax
import jax.numpy as jnp

from ssm_moe.shapes import Array, Bool, Float, Int


def causal_conv1d(
  x: Float[Array, 'B L D'],
  kernel: Float[Array, 'W D'],
  bias: Float[Array, 'D'] | None = None,
  *,
  activation: str | None = None,
  segment_ids: Int[Array, 'B L'] | None = None,
  state: Float[Array, 'B W-1 D'] | None = None,
) -> tuple[Float[Array, 'B L D'], Float[Array, 'B W-1 D']]:
  """Convolves by W shifted multiply-adds, which XLA fuses into one pass; see `api.causal_conv1d`.

  On an H200, 16 times faster than `lax.conv_general_dilated` with feature groups (0.077 ms against
  1.25 ms at 8 x 2048 x 2048, W 4).
  """
  batch, length, channels = x.shape
  past = kernel.shape[0] - 1
  kernel = kernel.astype(x.dtype)
  if state is None:
    state = jnp.zeros((batch, past, channels), x.dtype)
  padded = jnp.concatenate([state.astype(x.dtype), x], axis=1)
  same = None if segment_ids is None else same_document(segment_ids, past)

  y = x * kernel[past][None, None, :]
  for back in range(1, past + 1):
    start = past - back
    term = padded[:, start : start + length] * kernel[start][None, None, :]
    if same is not None:
      term = jnp.where(same[back - 1][:, :, None], term, 0)
    y = y + term
  if bias is not None:
    y = y + bias.astype(x.dtype)[None, None, :]
  if activation == 'silu':
    y = jax.nn.silu(y)
  return y, _last_state(padded[:, length:], same)


def same_document(segment_ids: Int[Array, 'B L'], past: int) -> list[Bool[Array, 'B L']]:
  """Returns whether the input 1, 2, ... `past` positions back belongs to a position's document.

  What is before the first position does, if all between does.
  """
  length = segment_ids.shape[1]
  continues = segment_ids[:, 1:] == segment_ids[:, :-1]
  # Entry past + t: whether position t is in the document of the position before it.
  continues = jnp.pad(continues, ((0, 0), (past + 1, 0)), constant_values=True)
  found = []
  same = jnp.ones(segment_ids.shape, bool)
  for back in range(1, past + 1):
    start = past + 1 - back
    same = same & continues[:, start : start + length]
    found.append(same)
  return found


def last_state(
  x: Float[Array, 'B L D'],
  width: int,
  *,
  segment_ids: Int[Array, 'B L'] | None = None,
  state: Float[Array, 'B past D'] | None = None,
) -> Float[Array, 'B past D']:
  """Returns the state after the last position."""
  batch, length, channels = x.shape
  past = width - 1
  inputs = x[:, max(length - past, 0) :]
  if length < past:
    if state is None:
      state = jnp.zeros((batch, past, channels), x.dtype)
    inputs = jnp.concatenate([state.astype(x.dtype)[:, length:], inputs], axis=1)
  same = None if segment_ids is None else same_document(segment_ids[:, -width:], past)
  return _last_state(inputs, same)


def _last_state(
  inputs: Float[Array, 'B past D'], same: list[Bool[Array, 'B L']] | None
) -> Float[Array, 'B past D']:
  """Sets inputs of documents before the last one to zero. The oldest comes first."""
  if not same:
    return inputs
  # The newest input, back by 0 positions from the last one, is always of its document.
  kept = [jnp.ones_like(same[0][:, -1]), *(each[:, -1] for each in same[:-1])]
  return jnp.where(jnp.stack(kept[::-1], axis=1)[:, :, None], inputs, 0)
