"""Causal attention over all tokens before or a window of them, with a cache as its state."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ssm_moe import sharding
from ssm_moe.config import AttentionConfig
from ssm_moe.ops import implementation as implementation_lib
from ssm_moe.shapes import Array, Bool, Float, Int

Implementation = Literal['auto', 'cudnn', 'xla']


class AttentionState(NamedTuple):
  """What the mixer remembers of the tokens before: S slots, the last token in the last of them.

  Keys are kept after their rotation. So a step rotates one key instead of S, and `rope_angles` is
  exact at any position.

  All zeros mean "nothing before".

  Attributes:
    keys, values: In the dtype of the matrix work; what stands in a slot that is not valid has no
      effect, as long as it is finite.
    valid: Whether the slot holds a token of the document that goes on.
    position: How many tokens came before, int32. Only differences enter the output.
  """

  keys: Float[Array, 'B S J P']
  values: Float[Array, 'B S J P']
  valid: Bool[Array, 'B S']
  position: Int[Array, 'B']


def num_slots(config: AttentionConfig, window: int | None) -> int:
  """Returns S: the tokens before the present one that a layer can see."""
  return config.cache_length if window is None else window - 1


def initial_state(
  config: AttentionConfig, *, window: int | None, d_model: int, batch: int, dtype: jnp.dtype
) -> AttentionState:
  """Returns the state before any token."""
  shape = (batch, num_slots(config, window), config.kv_heads, config.head_size(d_model))
  return AttentionState(
    keys=jnp.zeros(shape, dtype),
    values=jnp.zeros(shape, dtype),
    valid=jnp.zeros(shape[:2], bool),
    position=jnp.zeros(batch, jnp.int32),
  )


class Attention(nn.Module):
  """Grouped-query attention with rotary positions, without biases.

  y = out(softmax(q k^T / sqrt(P)) v), the softmax in float32, over the tokens t - window + 1 .. t
  (all up to t if `window` is None) that belong to the document of token t. Query head h reads
  key-value head h // (H / J). https://arxiv.org/abs/2305.13245.

  Note: without a window, the state holds the last `attention.cache_length` tokens. A sequence given
  in one call is seen in full, whatever its length; given in parts, or step by step, a token sees
  the part that it stands in and the `cache_length` tokens before that part: older ones are
  forgotten.

  Attributes:
    attention: Its config; its field `window` is not read here.
    d_model: M.
    window: Tokens that a token sees, itself among them; all before it if None.
    kernel_init: Initialises q, k and v, of fan-in M.
    out_init: Initialises the output projection, of fan-in H P.
    dtype: Of the matrix work. Softmax and rotation are float32.
    implementation: cudnn: flash attention on NVIDIA GPUs, in bfloat16; on an H200, 4 x 4096 tokens,
      16 heads, 4 of keys, P 64, window 2048, forward and backward, 1.7 ms and 130 MiB, with
      documents 2.6 ms and 258 MiB. xla: anywhere, scores in memory: 25 ms and 10 GiB. auto: cudnn
      where it can run and there is one device, since it refuses some shardings.
  """

  attention: AttentionConfig
  d_model: int
  window: int | None
  kernel_init: nn.initializers.Initializer
  out_init: nn.initializers.Initializer
  dtype: jnp.dtype
  implementation: Implementation = 'auto'

  def setup(self):
    config = self.attention
    head_dim = config.head_size(self.d_model)
    queries = (self.d_model, config.num_heads, head_dim)
    keys = (self.d_model, config.kv_heads, head_dim)
    outputs = (config.num_heads, head_dim, self.d_model)
    self.q = self._kernel('q', self.kernel_init, ('embed', 'heads', 'head_dim'), queries)
    self.k = self._kernel('k', self.kernel_init, ('embed', 'kv_heads', 'head_dim'), keys)
    self.v = self._kernel('v', self.kernel_init, ('embed', 'kv_heads', 'head_dim'), keys)
    self.out = self._kernel('out', self.out_init, ('heads', 'head_dim', 'embed'), outputs)

  def __call__(
    self,
    x: Float[Array, 'B L M'],
    *,
    segment_ids: Int[Array, 'B L'] | None = None,
    mask: Bool[Array, 'B L'] | None = None,
    state: AttentionState | None = None,
    routes: object = None,
  ) -> tuple[Float[Array, 'B L M'], AttentionState, dict]:
    """Runs over a sequence.

    Args:
      x: Input.
      segment_ids: Document of each token; a document ends where the number changes. The first
        position continues the document that `state` comes from.
      mask: Unused: there is no routing to count tokens in.
      state: What came before the first token; nothing if None.
      routes: Unused: there is no routing to decide.

    Returns:
      The output, the state after the last token, and no routing statistics.

    Raises:
      NotImplementedError: `implementation` is cudnn, and it cannot run here; the message says why.
    """
    del mask, routes
    length = x.shape[1]
    slots = num_slots(self.attention, self.window)
    q, k, v = self._project(x, 0 if state is None else state.position)
    document = None if segment_ids is None else _document_index(segment_ids)
    valid = jnp.ones(x.shape[:2], bool) if document is None else document == document[:, -1:]
    if state is None:
      y = self._attend_within(q, k, v, document)
      position = jnp.full(x.shape[:1], length, jnp.int32)
      k, v, valid = (_pad_front(part, slots - length) for part in (k, v, valid))
    else:
      # cuDNN wants an even number of keys, and S is odd for the usual windows.
      odd = (slots + length) % 2
      cached = _pad_front(state.valid.astype(bool), odd)
      k = jnp.concatenate([_pad_front(state.keys.astype(k.dtype), odd), k], axis=1)
      v = jnp.concatenate([_pad_front(state.values.astype(v.dtype), odd), v], axis=1)
      y = self._attend_with_cache(q, k, v, document, cached)
      position = state.position + length
      if document is not None:
        cached &= document[:, -1:] == 0
      valid = jnp.concatenate([cached, valid], axis=1)
    new_state = AttentionState(
      *(part[:, part.shape[1] - slots :] for part in (k, v, valid)), position
    )
    return jnp.einsum('blhp,hpm->blm', y, self.out.astype(self.dtype)), new_state, {}

  def step(
    self, x: Float[Array, 'B M'], state: AttentionState
  ) -> tuple[Float[Array, 'B M'], AttentionState]:
    """Runs over one more token. Equal to `__call__`, at a cost that S alone enters."""
    y, state, _ = self(x[:, None], state=state)
    return y[:, 0], state

  def _project(self, x: Array, start: Array | int) -> tuple[Array, Array, Array]:
    """Returns queries, keys, both rotated, and values; `start` is the position of token 0."""
    x = x.astype(self.dtype)
    kernels = (kernel.astype(self.dtype) for kernel in (self.q, self.k, self.v))
    q, k, v = (jnp.einsum('blm,mhp->blhp', x, kernel) for kernel in kernels)
    if self.attention.rope:
      start = jnp.asarray(start, jnp.int32).reshape(-1, 1)
      position = start + jnp.arange(x.shape[1], dtype=jnp.int32)[None, :]
      angles = rope_angles(position, q.shape[-1], self.attention.rope_theta)
      q, k = rotate(q, angles), rotate(k, angles)
    if jax.sharding.get_abstract_mesh().shape.get('sequence', 1) > 1:
      # Queries stay where they are, and see keys of all of time.
      k, v = (sharding.constrain(part, 'batch', None, 'kv_heads', None) for part in (k, v))
    return q, k, v

  def _attend_within(self, q: Array, k: Array, v: Array, document: Array | None) -> Array:
    """Attends from each token to those of the same call."""
    same = None if document is None else document[:, None, :, None] == document[:, None, None, :]
    # A window as long as the sequence hides nothing.
    windowed = self.window is not None and self.window < q.shape[1]
    return self._dot_product_attention(
      q,
      k,
      v,
      mask=same,
      is_causal=True,
      local_window_size=(self.window - 1, 0) if windowed else None,
    )

  def _attend_with_cache(
    self, q: Array, k: Array, v: Array, document: Array | None, valid: Array
  ) -> Array:
    """Attends from each token to the slots of the cache and to those of the same call."""
    length, slots = q.shape[1], valid.shape[1]
    query = jnp.arange(length)[:, None]
    key = jnp.arange(-slots, length)[None, :]
    visible = key <= query
    if self.window is not None:
      visible &= query - key < self.window
    of_cache = jnp.broadcast_to(valid[:, None, :], (*q.shape[:2], slots))
    of_call = jnp.ones((*q.shape[:2], length), bool)
    if document is not None:
      of_cache &= (document == 0)[:, :, None]
      of_call = document[:, :, None] == document[:, None, :]
    visible = visible[None] & jnp.concatenate([of_cache, of_call], axis=2)
    return self._dot_product_attention(q, k, v, mask=visible[:, None])

  def _dot_product_attention(self, q: Array, k: Array, v: Array, **options) -> Array:
    name = implementation_lib.select(
      'attention',
      self.implementation,
      {
        'cudnn': lambda: _why_not_cudnn(q, k, self.implementation),
        'xla': implementation_lib.always,
      },
    )
    # Inside, JAX promotes bfloat16 with float32 on its own account.
    with jax.numpy_dtype_promotion('standard'):
      return jax.nn.dot_product_attention(q, k, v, implementation=name, **options)

  def _kernel(self, name, init, axes, shape):
    return self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


def rope_angles(
  position: Int[Array, 'B L'], head_dim: int, theta: float
) -> Float[Array, 'B L half']:
  """Returns the angles, in [-pi, pi), by which rotary embedding turns each pair of channels.

  angle_i = position * theta^(-2 i / P) mod 2 pi. RoFormer, section 3.2.2
  (https://arxiv.org/abs/2104.09864).

  A float32 product loses what matters in a long stream: at position 10^6 it is off by up to 0.03.
  Here a turn is 2^32, frequencies are whole numbers of such units, and the unsigned product drops
  whole turns by overflow. So the angle between two tokens depends on their distance alone, at any
  position, also past 2^31; rounding the frequency costs less than 10^-9 radians for each token of
  distance.

  Args:
    position: Of each token, int32.
    head_dim: P, even.
    theta: Base of the frequencies.
  """
  frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
  units = np.round(frequency / (2 * math.pi) * 2.0**32) % 2.0**32
  phase = position.astype(jnp.uint32)[:, :, None] * jnp.asarray(units.astype(np.uint32))[None, None]
  return phase.astype(jnp.int32).astype(jnp.float32) * (2 * math.pi / 2.0**32)


def rotate(
  x: Float[Array, 'B L H P'], angles: Float[Array, '#B L half']
) -> Float[Array, 'B L H P']:
  """Turns the pairs of channels (i, i + P / 2) of every head, in float32.

  The pairing of GPT-NeoX and Llama; RoFormer pairs (2 i, 2 i + 1). One row of angles may serve all
  rows of `x`.
  """
  cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x.dtype)


def _why_not_cudnn(q: Array, k: Array, implementation: Implementation) -> str | None:
  """Returns why cuDNN cannot attend from `q` to `k` here, or None."""
  if jax.default_backend() != 'gpu' or 'cuda' not in jax.devices()[0].client.platform_version:
    return 'it needs an NVIDIA GPU'
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f'it computes in bfloat16 or float16, and dtype is {q.dtype}'
  if q.shape[-1] % 8 or q.shape[-1] > 128:
    return f'head_dim is {q.shape[-1]}; it must be a multiple of 8, and at most 128'
  if q.shape[1] % 2 or k.shape[1] % 2:
    return f'it needs an even number of tokens; there are {q.shape[1]}, and {k.shape[1]} keys'
  if implementation == 'auto' and jax.device_count() > 1:
    return 'on several devices it must be named: it refuses queries sharded otherwise than keys'
  return None


def _document_index(segment_ids: Array) -> Array:
  """Counts the documents of each row from 0, so that a number used again is another document."""
  changes = segment_ids[:, 1:] != segment_ids[:, :-1]
  return jnp.pad(jnp.cumsum(changes, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def _pad_front(part: Array, count: int) -> Array:
  """Puts `count` zeros in front of axis 1; none if it is negative."""
  return jnp.pad(part, ((0, 0), (max(count, 0), 0)) + ((0, 0),) * (part.ndim - 2))
