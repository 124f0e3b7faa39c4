"""Depthwise causal convolution over the length axis, with state and segment resets."""

import jax.numpy as jnp

from ssm_moe.shapes import Array, Float, Int


def causal_conv1d(
  x: Float[Array, 'B L D'],
  kernel: Float[Array, 'W D'],
  bias: Float[Array, 'D'] | None = None,
  *,
  segment_ids: Int[Array, 'B L'] | None = None,
  state: Float[Array, 'B W-1 D'] | None = None,
) -> tuple[Float[Array, 'B L D'], Float[Array, 'B W-1 D']]:
  """Convolves every channel with its own filter, looking back only.

  y_t = bias + sum_w kernel_w x_{t - (W - 1) + w}

  Written as W shifted multiply-adds, which XLA fuses into one pass: on an H200, 16 times faster
  than `lax.conv_general_dilated` with feature groups (0.077 ms against 1.25 ms at 8 x 2048 x 2048,
  W 4).

  Args:
    x: Input.
    kernel: Filters; the last row meets the present token.
    bias: Added to every position.
    segment_ids: Document of each position; a document ends where the id changes, and inputs before
      its start count as zero. The first position continues the document that `state` comes from.
    state: The W - 1 inputs before the first position; zeros if None.

  Returns:
    y in the dtype of `x`, and the state after the last position: its last W - 1 inputs, those of
    documents before the last one set to zero. Gradients flow through both.

  Raises:
    ValueError: a shape that does not fit the others, or no token, or no row in `kernel`.
    TypeError: a dtype that is not floating, or segment ids that are not integers.
  """
  x, kernel = jnp.asarray(x), jnp.asarray(kernel)
  bias, segment_ids, state = (
    None if v is None else jnp.asarray(v) for v in (bias, segment_ids, state)
  )
  arrays = {'x': x, 'kernel': kernel, 'bias': bias, 'segment_ids': segment_ids, 'state': state}
  _check_shapes(arrays)
  _check_dtypes(arrays)
  batch, length, channels = x.shape
  past = kernel.shape[0] - 1
  if state is None:
    state = jnp.zeros((batch, past, channels), x.dtype)
  padded = jnp.concatenate([state.astype(x.dtype), x], axis=1)
  kernel = kernel.astype(x.dtype)
  if segment_ids is not None:
    continues = segment_ids[:, 1:] == segment_ids[:, :-1]
    # Entry past + t: whether position t is in the document of the position before it.
    continues = jnp.pad(continues, ((0, 0), (past + 1, 0)), constant_values=True)
    same = jnp.ones((batch, length), bool)
    kept = [same[:, -1]]

  y = x * kernel[past][None, None, :]
  for back in range(1, past + 1):
    start = past - back
    term = padded[:, start : start + length] * kernel[start][None, None, :]
    if segment_ids is not None:
      same &= continues[:, start + 1 : start + 1 + length]
      kept.append(same[:, -1])
      term = jnp.where(same[:, :, None], term, 0)
    y = y + term
  if bias is not None:
    y = y + bias.astype(x.dtype)[None, None, :]

  last_state = padded[:, length:]
  if segment_ids is not None and past:
    last_state = jnp.where(jnp.stack(kept[past - 1 :: -1], axis=1)[:, :, None], last_state, 0)
  return y, last_state


def _check_shapes(arrays: dict[str, Array | None]) -> None:
  x, kernel = arrays['x'], arrays['kernel']
  if x.ndim != 3:
    raise ValueError(f'causal_conv1d: x has shape {x.shape}; it must be [B, L, D]')
  if kernel.ndim != 2:
    raise ValueError(f'causal_conv1d: kernel has shape {kernel.shape}; it must be [W, D]')
  batch, length, channels = x.shape
  width = kernel.shape[0]
  if length < 1:
    raise ValueError('causal_conv1d: x has length 0; it must have at least one token')
  if width < 1:
    raise ValueError('causal_conv1d: kernel has width 0; it must have at least one row')
  expected = {
    'kernel': ('[W, D]', (width, channels)),
    'bias': ('[D]', (channels,)),
    'segment_ids': ('[B, L]', (batch, length)),
    'state': ('[B, W - 1, D]', (batch, width - 1, channels)),
  }
  for name, (axes, shape) in expected.items():
    array = arrays[name]
    if array is not None and array.shape != shape:
      raise ValueError(
        f'causal_conv1d: {name} has shape {array.shape}; it must be {axes} = {shape}, '
        f'as x is {x.shape} and kernel is {kernel.shape}'
      )


def _check_dtypes(arrays: dict[str, Array | None]) -> None:
  for name, array in arrays.items():
    kind, word = (
      (jnp.integer, 'integer') if name == 'segment_ids' else (jnp.floating, 'floating point')
    )
    if array is not None and not jnp.issubdtype(array.dtype, kind):
      raise TypeError(f'causal_conv1d: {name} is {array.dtype}; it must be {word}')
