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
  """What the mixer remembers of the tokens before: S slots, written in turn and then again.

  Token g of a document stands in slot g modulo S, so that one more token is written in place; in
  which order the slots are read does not matter. Keys are kept after their rotation. So a step
  rotates one key instead of S, and `rope_angles` is exact at any position.

  All zeros mean "nothing before".

  Attributes:
    keys, values: In the dtype of the matrix work; what stands in a slot that is not filled has no
      effect, as long as it is finite.
    filled: How many tokens of the document that goes on were written, int32; from 2 S on, less a
      multiple of S that leaves S or more.
    position: How many tokens of it came before, int32. Only differences enter the output.
  """

  keys: Float[Array, 'B J S P']
  values: Float[Array, 'B J S P']
  filled: Int[Array, 'B']
  position: Int[Array, 'B']


def num_slots(config: AttentionConfig, window: int | None) -> int:
  """Returns S: the tokens that a layer can see step by step, the present one among them."""
  return config.cache_length if window is None else window


def initial_state(
  config: AttentionConfig, *, window: int | None, d_model: int, batch: int, dtype: jnp.dtype
) -> AttentionState:
  """Returns the state before any token."""
  slots = num_slots(config, window)
  shape = (batch, config.kv_heads, slots, config.head_size(d_model))
  return AttentionState(
    keys=jnp.zeros(shape, dtype),
    values=jnp.zeros(shape, dtype),
    filled=jnp.zeros(batch, jnp.int32),
    position=jnp.zeros(batch, jnp.int32),
  )


class Attention(nn.Module):
  """Grouped-query attention with rotary positions, without biases.

  y = out(softmax(q k^T / sqrt(P)) v), the softmax in float32, over the tokens t - window + 1 .. t
  (all up to t if `window` is None) that belong to the document of token t. Query head h reads
  key-value head h // (H / J). https://arxiv.org/abs/2305.13245.

  Note: without a window, the state holds the last `attention.cache_length` tokens. A sequence given
  in one call is seen in full, whatever its length; given in parts, or step by step, a token sees
  the part that it stands in and, before that part, what is less than `cache_length` tokens back:
  older ones are forgotten.

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
    document = None if segment_ids is None else _document_index(segment_ids)
    position = _positions(x.shape[1], document, None if state is None else state.position)
    q, k, v = self._project(x, position)
    if state is None:
      y = self._attend_within(q, k, v, document)
    else:
      y = self._attend_with_cache(q, k, v, document, state)
    return self._out(y), self._cached(k, v, position, document, state), {}

  def step(
    self, x: Float[Array, 'B M'], state: AttentionState
  ) -> tuple[Float[Array, 'B M'], AttentionState]:
    """Runs over one more token. Equal to `__call__`, at a cost that S alone enters."""
    q, k, v = (part[:, 0] for part in self._project(x[:, None], state.position[:, None]))
    slots = state.keys.shape[2]
    # Written first and then read: the other way round, XLA would copy all that is kept.
    keys, values = (
      _written(kept, new.astype(kept.dtype), state.filled % slots)
      for kept, new in ((state.keys, k), (state.values, v))
    )
    seen = jnp.arange(slots)[None, :] <= state.filled[:, None]
    y = _attend_to_slots(q, keys.astype(self.dtype), values.astype(self.dtype), seen)
    filled = _wrapped(state.filled + 1, slots)
    return self._out(y[:, None])[:, 0], AttentionState(keys, values, filled, state.position + 1)

  def _out(self, y: Array) -> Array:
    return jnp.einsum('blhp,hpm->blm', y, self.out.astype(self.dtype))

  def _project(self, x: Array, position: Array) -> tuple[Array, Array, Array]:
    """Returns queries, keys, both rotated, and values."""
    x = x.astype(self.dtype)
    kernels = (kernel.astype(self.dtype) for kernel in (self.q, self.k, self.v))
    q, k, v = (jnp.einsum('blm,mhp->blhp', x, kernel) for kernel in kernels)
    if self.attention.rope:
      angles = rope_angles(position, q.shape[-1], self.attention.rope_theta)
      q, k = rotate(q, angles), rotate(k, angles)
    if jax.sharding.get_abstract_mesh().shape.get('sequence', 1) > 1:
      # Queries stay where they are, and see keys of all of time.
      k, v = (sharding.constrain(part, 'batch', None, 'kv_heads', None) for part in (k, v))
    return q, k, v

  def _cached(
    self,
    k: Array,
    v: Array,
    position: Array,
    document: Array | None,
    state: AttentionState | None,
  ) -> AttentionState:
    """Returns the state after a call: each slot has the last of its tokens."""
    batch, length = k.shape[:2]
    slots = num_slots(self.attention, self.window)
    before = jnp.zeros(batch, jnp.int32) if state is None else state.filled
    own = jnp.full(batch, length, jnp.int32)
    if document is not None:
      before = jnp.where(document[:, -1] == 0, before, 0)
      own = jnp.sum(document == document[:, -1:], axis=1, dtype=jnp.int32)
    end = before + own
    # Tokens of the last document are counted; those of the call are at the end of the row.
    token = _token_of_slot(end, slots)
    of_call = jnp.clip(length - end[:, None] + token, 0, length - 1)

    def kept(new, old):
      new = jnp.take_along_axis(new.swapaxes(1, 2), of_call[:, None, :, None], axis=2)
      if old is not None:
        new = jnp.where((token >= before[:, None])[:, None, :, None], new, old.astype(new.dtype))
      return jnp.where((token >= 0)[:, None, :, None], new, 0)

    old = (None, None) if state is None else (state.keys, state.values)
    position = jnp.broadcast_to(position[:, -1] + 1, (batch,))
    return AttentionState(kept(k, old[0]), kept(v, old[1]), _wrapped(end, slots), position)

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
    self, q: Array, k: Array, v: Array, document: Array | None, state: AttentionState
  ) -> Array:
    """Attends from each token to the slots of the cache and to those of the same call."""
    length, slots = q.shape[1], state.keys.shape[2]
    query, key = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    visible = key <= query
    if self.window is not None:
      visible &= query - key < self.window
    of_call = jnp.broadcast_to(visible[None], (q.shape[0], length, length))
    token = _token_of_slot(state.filled, slots)[:, None, :]
    back = state.filled[:, None, None] + query[None] - token
    of_cache = (token >= 0) & (back < slots)
    if document is not None:
      of_cache &= (document == 0)[:, :, None]
      of_call &= document[:, :, None] == document[:, None, :]
    # cuDNN wants an even number of keys.
    odd = (slots + length) % 2
    visible = jnp.pad(jnp.concatenate([of_cache, of_call], axis=2), ((0, 0), (0, 0), (odd, 0)))

    def joined(cached, own):
      cached = cached.swapaxes(1, 2).astype(own.dtype)
      return jnp.concatenate([_pad_front(cached, odd), own], axis=1)

    k, v = joined(state.keys, k), joined(state.values, v)
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


def _positions(length: int, document: Array | None, start: Array | None) -> Array:
  """Counts the tokens of each document, from `start` in the one that a row begins with.

  One row where all are the same.
  """
  index = jnp.arange(length, dtype=jnp.int32)[None]
  first = index if start is None else index + start[:, None]
  if document is None:
    return first
  begins = jnp.pad(document[:, 1:] != document[:, :-1], ((0, 0), (1, 0)))
  begin = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
  return jnp.where(document == 0, first, index - begin)


def _token_of_slot(end: Array, slots: int) -> Array:
  """Returns which token each slot has of a document of `end` tokens; less than 0 for none."""
  last = end[:, None] - 1
  return last - (last - jnp.arange(slots)[None, :]) % slots


def _wrapped(filled: Array, slots: int) -> Array:
  return jnp.where(filled < 2 * slots, filled, slots + filled % slots)


def _written(kept: Array, new: Array, slot: Array) -> Array:
  """Puts each row of `new`, [B, J, P], in its slot of `kept`, [B, J, S, P]."""
  if slot.shape[0] == 1:
    # XLA makes a scatter to one place a choice between two arrays, and copies both.
    return jax.lax.dynamic_update_slice_in_dim(kept, new[:, :, None], slot[0], axis=2)
  row = jnp.arange(slot.shape[0])
  return kept.at[row, :, slot].set(new, unique_indices=True, mode='promise_in_bounds')


def _attend_to_slots(q: Array, keys: Array, values: Array, seen: Array) -> Array:
  """Attends from one token of each row, [B, H, P], to slots [B, J, S, P]; softmax in float32."""
  batch, heads, head_dim = q.shape
  q = q.reshape(batch, keys.shape[1], -1, head_dim)
  options = {'preferred_element_type': jnp.float32}
  scores = jnp.einsum('bjgp,bjsp->bjgs', q, keys, **options) * head_dim**-0.5
  scores = jnp.where(seen[:, None, None, :], scores, -jnp.inf)
  weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
  return jnp.einsum('bjgs,bjsp->bjgp', weights, values).reshape(batch, heads, head_dim)


def _pad_front(part: Array, count: int) -> Array:
  """Puts `count` zeros in front of axis 1."""
  return jnp.pad(part, ((0, 0), (count, 0)) + ((0, 0),) * (part.ndim - 2))
