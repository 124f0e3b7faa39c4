"""Attention: an oracle written out, splits, steps, documents, positions, what reaches what."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_moe.config import AttentionConfig
from ssm_moe.layers import attention as attention_lib
from ssm_moe.layers import initializers
from tests import tolerances

_BATCH, _LENGTH, _D_MODEL = 2, 12, 8
_HEADS, _KV_HEADS, _HEAD_DIM = 4, 2, 6

# All before, a window that ends inside the sequence, one of a single token (no state but the
# position), and one longer than the sequence.
_WINDOWS = {'full': None, 'window_4': 4, 'window_1': 1, 'window_20': 20}
_OFTEN = ('full', 'window_4')
_F32 = tolerances.FLOAT32_REORDERED


# Modules with initializers of their own are never equal: made once, each compiles once.
@functools.cache
def _attention(window, dtype='float32', **fields):
  settings = {'num_heads': _HEADS, 'num_kv_heads': _KV_HEADS, 'head_dim': _HEAD_DIM}
  config = AttentionConfig(**{**settings, 'cache_length': 16, 'rope_theta': 100.0, **fields})
  return attention_lib.Attention(
    config,
    _D_MODEL,
    window,
    # Three times the usual scale: a flat softmax would hide a wrong key.
    kernel_init=initializers.linear(_D_MODEL, 3.0),
    out_init=initializers.linear(_HEADS * _HEAD_DIM),
    dtype=jnp.dtype(dtype),
  )


@functools.partial(jax.jit, static_argnums=0)
def _apply(module, variables, x, **options):
  return module.apply(variables, x, **options)


@functools.cache
def _init(module):
  x = jnp.zeros((_BATCH, _LENGTH, _D_MODEL), module.dtype)
  return jax.jit(module.init)(jax.random.key(0), x)


@pytest.fixture
def x(rng):
  return jax.random.normal(rng, (_BATCH, _LENGTH, _D_MODEL))


@pytest.fixture(
  params=[
    name if name in _OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in _WINDOWS
  ]
)
def mixer(request, x):
  module = _attention(_WINDOWS[request.param])
  return module, _init(module), x


def _initial_state(module, dtype='float32'):
  return attention_lib.initial_state(
    module.attention,
    window=module.window,
    d_model=_D_MODEL,
    batch=_BATCH,
    dtype=jnp.dtype(dtype),
  )


def _params(variables):
  return {name: np.asarray(box.unbox(), np.float64) for name, box in variables['params'].items()}


def _oracle(params, x, *, window, theta, documents=None):
  """Loops over rows, heads and tokens, in float64; rotates by complex numbers."""
  x = np.asarray(x, np.float64)
  batch, length, _ = x.shape
  _, heads, head_dim = params['q'].shape
  repeats = heads // params['k'].shape[1]
  documents = np.zeros((batch, length)) if documents is None else np.asarray(documents)
  half = head_dim // 2
  turn = np.exp(
    1j * np.arange(length)[:, None] * theta ** (-2 * np.arange(half) / head_dim)[None, :]
  )
  y = np.zeros_like(x)
  for b in range(batch):
    for h in range(heads):
      q = x[b] @ params['q'][:, h]
      k = x[b] @ params['k'][:, h // repeats]
      v = x[b] @ params['v'][:, h // repeats]
      q, k = ((part[:, :half] + 1j * part[:, half:]) * turn for part in (q, k))
      for t in range(length):
        seen = [
          s
          for s in range(t + 1)
          if (window is None or s > t - window) and documents[b, s] == documents[b, t]
        ]
        scores = np.real(k[seen] @ np.conj(q[t])) / np.sqrt(head_dim)
        weights = np.exp(scores - scores.max())
        y[b, t] += (weights / weights.sum()) @ v[seen] @ params['out'][h]
  return y


# Of row 0: three documents; of row 1: one cut elsewhere, and a number used a second time.
_DOCUMENTS = np.array([[1] * 4 + [2] * 5 + [3] * 3, [1] * 2 + [2] * 7 + [1] * 3])
_DOCUMENT_INDEX = np.array([[0] * 4 + [1] * 5 + [2] * 3, [0] * 2 + [1] * 7 + [2] * 3])


@pytest.mark.parametrize('documents', [False, True], ids=['one_document', 'documents'])
def test_equals_the_oracle(mixer, documents):
  module, variables, x = mixer
  options = {'segment_ids': jnp.asarray(_DOCUMENTS)} if documents else {}
  expected = _oracle(
    _params(variables),
    x,
    window=module.window,
    theta=module.attention.rope_theta,
    documents=_DOCUMENT_INDEX if documents else None,
  )
  actual, _, aux = _apply(module, variables, x, **options)
  tolerances.assert_close(actual, expected, rtol=_F32)
  assert aux == {}


def test_grouped_queries_are_repeated_key_and_value_heads(x):
  grouped = _attention(5)
  variables = _init(grouped)
  params = _params(variables)
  for name in ('k', 'v'):
    params[name] = np.repeat(params[name], _HEADS // _KV_HEADS, axis=1)
  params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
  alone = _attention(5, num_kv_heads=None)
  tolerances.assert_close(
    _apply(grouped, variables, x)[0], _apply(alone, {'params': params}, x)[0], rtol=_F32
  )


class WithAndWithoutJit(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_calls_agree(self):
    module = _attention(4)
    key = jax.random.key(0)
    x = jax.random.normal(key, (_BATCH, _LENGTH, _D_MODEL))
    variables = _init(module)
    state = _apply(module, variables, x)[1]
    call = self.variant(lambda x, state: module.apply(variables, x, state=state))
    expected = _apply(module, variables, jnp.concatenate([x, x], axis=1))
    actual = call(x, state)
    tolerances.assert_close(
      actual[:2], (expected[0][:, _LENGTH:], expected[1]), rtol=tolerances.FLOAT32_REORDERED
    )


def test_sequence_equals_steps(mixer):
  module, variables, x = mixer
  whole, last, _ = _apply(module, variables, x)
  step = jax.jit(lambda x, state: module.apply(variables, x, state, method='step'))
  state, outputs = _initial_state(module), []
  for t in range(_LENGTH):
    y, state = step(x[:, t], state)
    outputs.append(y)
  tolerances.assert_close((jnp.stack(outputs, axis=1), state), (whole, last), rtol=_F32)


def _in_parts(module, variables, x, cuts, segment_ids=None):
  """Runs over the parts between `cuts`, each from the state that the one before left."""
  state, outputs = None, []
  for start, stop in zip((0, *cuts), (*cuts, x.shape[1])):
    ids = {} if segment_ids is None else {'segment_ids': segment_ids[:, start:stop]}
    y, state, _ = _apply(module, variables, x[:, start:stop], state=state, **ids)
    outputs.append(y)
  return jnp.concatenate(outputs, axis=1), state


# Parts shorter than the window of 4, longer than it, and both.
@pytest.mark.parametrize(
  'cuts',
  [(2, 4, 6, 8, 10), *(pytest.param(c, marks=pytest.mark.slow) for c in ((7,), (1, 3, 9, 10)))],
  ids=str,
)
def test_any_split_equals_the_whole(mixer, cuts):
  module, variables, x = mixer
  whole, last, _ = _apply(module, variables, x)
  tolerances.assert_close(_in_parts(module, variables, x, cuts), (whole, last), rtol=_F32)


# Documents end after 4 and 9 tokens in row 0, after 2 and 9 in row 1: cuts inside a document with
# an end in the part before, and one just before an end.
@pytest.mark.parametrize(
  'cuts', [(3, 8), *(pytest.param(c, marks=pytest.mark.slow) for c in ((6,), (5, 7, 11)))], ids=str
)
def test_split_documents_equal_the_whole(mixer, cuts):
  module, variables, x = mixer
  ids = jnp.asarray(_DOCUMENTS)
  whole, last, _ = _apply(module, variables, x, segment_ids=ids)
  y, end = _in_parts(module, variables, x, cuts, ids)
  tolerances.assert_close(y, whole, rtol=_F32)
  tolerances.assert_close(end, last, rtol=_F32)
  # What is left behind continues the last document.
  more = [_apply(module, variables, x[:, :3], state=state)[0] for state in (end, last)]
  tolerances.assert_close(*more, rtol=_F32)


def test_packed_documents_equal_each_alone(mixer):
  module, variables, x = mixer
  ids = jnp.broadcast_to(jnp.where(jnp.arange(_LENGTH) < 5, 7, 3)[None], (_BATCH, _LENGTH))
  packed, packed_end, _ = _apply(module, variables, x, segment_ids=ids)
  first, _, _ = _apply(module, variables, x[:, :5])
  second, end, _ = _apply(module, variables, x[:, 5:])
  tolerances.assert_close(packed, jnp.concatenate([first, second], axis=1), rtol=_F32)
  tolerances.assert_close(packed_end, end, rtol=_F32)


def test_a_zeroed_row_starts_anew(mixer):
  # As the training loop does where a document ends exactly at the cut: row 0 goes on, row 1 starts.
  module, variables, x = mixer
  _, state, _ = _apply(module, variables, x)
  goes_on = _apply(module, variables, x, state=state)[0]
  keep = jnp.array([True, False])
  state = jax.tree.map(
    lambda leaf: leaf * keep.reshape((-1,) + (1,) * (leaf.ndim - 1)).astype(leaf.dtype), state
  )
  y, end, _ = _apply(module, variables, x, state=state)
  alone, alone_end, _ = _apply(module, variables, x)
  tolerances.assert_close(y[0], goes_on[0], rtol=_F32)
  tolerances.assert_close(y[1], alone[1], rtol=_F32)
  # The second row has read nothing but its own tokens, of which the state speaks too.
  row = functools.partial(jax.tree.map, lambda leaf: leaf[1])
  tolerances.assert_close(row(end), row(alone_end), rtol=_F32)


def test_the_initial_state_is_no_state(mixer):
  module, variables, x = mixer
  state = _initial_state(module)
  assert all(not leaf.any() for leaf in jax.tree.leaves(state))
  slots = 16 if module.window is None else module.window
  chex.assert_shape((state.keys, state.values), (_BATCH, _KV_HEADS, slots, _HEAD_DIM))
  with_state = _apply(module, variables, x, state=state)
  without = _apply(module, variables, x)
  chex.assert_trees_all_equal_shapes_and_dtypes(with_state, without)
  chex.assert_trees_all_equal_shapes_and_dtypes(state, without[1])
  tolerances.assert_close(with_state, without, rtol=_F32)


def test_slots_that_are_not_filled_have_no_effect(mixer):
  module, variables, x = mixer
  state = _initial_state(module)
  noise = state._replace(keys=state.keys + 1e3, values=state.values - 1e3)
  np.testing.assert_array_equal(*(_apply(module, variables, x, state=s)[0] for s in (state, noise)))
  step = jax.jit(lambda state: module.apply(variables, x[:, 0], state, method='step')[0])
  np.testing.assert_array_equal(step(state), step(noise))


def _reached(module, variables, x, token, **options):
  """Returns which inputs, of which rows, have a gradient from the output at `token` of row 0."""

  def loss(x):
    return jnp.sin(_apply(module, variables, x, **options)[0][0, token]).sum()

  return np.abs(jax.jit(jax.grad(loss))(x)).sum(axis=2) > 0


def test_gradient_reaches_the_window_before_and_nothing_else(mixer):
  module, variables, x = mixer
  position = np.arange(_LENGTH)
  window = module.window or _LENGTH
  expected = np.stack([(position <= 8) & (position > 8 - window), np.zeros(_LENGTH, bool)])
  np.testing.assert_array_equal(_reached(module, variables, x, 8), expected)


def test_gradient_stays_in_its_document(mixer):
  module, variables, x = mixer
  position = np.arange(_LENGTH)
  window = module.window or _LENGTH
  for state in (None, _initial_state(module)):
    reached = _reached(module, variables, x, 8, segment_ids=jnp.asarray(_DOCUMENTS), state=state)
    np.testing.assert_array_equal(
      reached[0], (position >= 4) & (position <= 8) & (position > 8 - window)
    )


def test_gradient_flows_through_the_state_as_through_the_whole(mixer):
  module, variables, x = mixer
  weights = jax.random.normal(jax.random.key(1), x.shape)

  def loss(cuts, variables, x):
    y, _ = _in_parts(module, variables, x, cuts)
    return jnp.sum(weights * y)

  whole, parts = (
    jax.jit(jax.grad(functools.partial(loss, cuts), argnums=(0, 1)))(variables, x)
    for cuts in [(), (5,)]
  )
  tolerances.assert_close(parts, whole, rtol=_F32)


def test_a_full_cache_forgets_the_oldest(x):
  module = _attention(None, cache_length=3)
  variables = _init(module)
  theta = module.attention.rope_theta
  expected = _oracle(_params(variables), x, window=3, theta=theta)
  y, state = _in_parts(module, variables, x, range(1, _LENGTH))
  tolerances.assert_close(y, expected, rtol=_F32)
  assert state.keys.shape[2] == 3
  whole = _oracle(_params(variables), x, window=None, theta=theta)
  tolerances.assert_close(_apply(module, variables, x)[0], whole, rtol=_F32)


def test_only_relative_positions_matter(mixer):
  module, variables, x = mixer
  state = _initial_state(module)
  expected = _apply(module, variables, x, state=state)[0]
  for shift in (1, 12_345, 2_000_000_000, 2**31 - 7):  # the last wraps inside the sequence
    shifted = state._replace(position=state.position + jnp.int32(shift))
    y = _apply(module, variables, x, state=shifted)[0]
    tolerances.assert_close(y, expected, rtol=_F32, what=f'shift {shift}')


def test_angles_are_position_times_frequency():
  # Up to distances that a cache spans, with the bases of Llama 1 and 3.
  for theta in (1e4, 5e5):
    position = np.array([[0, 1, 2, 1000, 8191]])
    angles = np.asarray(attention_lib.rope_angles(jnp.asarray(position), 64, theta), np.float64)
    expected = position[:, :, None] * theta ** (-2 * np.arange(32) / 64)[None, None]
    error = np.abs(np.exp(1j * angles) - np.exp(1j * expected)).max()
    assert error < tolerances.FLOAT32_REORDERED, error


def test_without_rope_order_within_the_window_does_not_matter(x):
  variables = None
  for rope, same in [(False, True), (True, False)]:
    module = _attention(None, rope=rope)
    variables = _init(module)
    order = np.array([3, 0, 2, 1])
    swapped = x.at[:, :4].set(x[:, order])
    last = [_apply(module, variables, value)[0][:, 4:] for value in (x, swapped)]
    assert np.allclose(*last, atol=1e-5) == same


def test_bfloat16_stays_near_float32(x):
  ids = jnp.asarray(_DOCUMENTS)
  for window in (None, 4):
    module, rounded = _attention(window), _attention(window, dtype='bfloat16')
    variables = _init(rounded)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
    low = x.astype(jnp.bfloat16)
    y, state, _ = _apply(rounded, variables, low, segment_ids=ids)
    assert y.dtype == state.keys.dtype == state.values.dtype == jnp.bfloat16
    y, _, _ = _apply(rounded, variables, low, state=state)
    _, exact_state, _ = _apply(module, variables, low.astype(jnp.float32), segment_ids=ids)
    exact, _, _ = _apply(module, variables, low.astype(jnp.float32), state=exact_state)
    tolerances.assert_close(y.astype(jnp.float32), exact, rtol=tolerances.BFLOAT16)


def test_softmax_is_float32(x):
  module = _attention(4, dtype='bfloat16')
  variables = _init(module)
  for state in (None, _initial_state(module, 'bfloat16')):
    jaxpr = str(jax.make_jaxpr(lambda x: module.apply(variables, x, state=state)[0])(x))  # noqa: B023
    exponentials = [line.split(' = ')[0] for line in jaxpr.splitlines() if ' = exp' in line]
    assert exponentials and all(':f32[' in line for line in exponentials)


def test_without_documents_and_state_no_mask_is_an_argument(x, monkeypatch):
  # Fast kernels know causal and windowed attention; a mask would keep them out, or cost L^2.
  calls = []
  real = jax.nn.dot_product_attention
  monkeypatch.setattr(
    jax.nn, 'dot_product_attention', lambda *a, **k: calls.append(k) or real(*a, **k)
  )
  for window, local in [(None, None), (4, (3, 0)), (_LENGTH, None)]:
    module = _attention(window)
    jax.eval_shape(module.apply, _init(module), x)
    expected = {'mask': None, 'is_causal': True, 'local_window_size': local}
    assert calls[-1] == {**expected, 'implementation': 'xla'}


def test_a_kernel_that_cannot_run_is_refused_by_name(x):
  module = _attention(None).clone(implementation='cudnn')
  with pytest.raises(NotImplementedError, match=r'NVIDIA|computes in bfloat16'):
    jax.eval_shape(module.apply, _init(_attention(None)), x)


def test_parameters():
  module = _attention(None)
  params = _init(module)['params']
  heads, kv_heads = ('embed', 'heads', 'head_dim'), ('embed', 'kv_heads', 'head_dim')
  assert {name: (box.names, box.value.shape) for name, box in params.items()} == {
    'q': (heads, (8, 4, 6)),
    'k': (kv_heads, (8, 2, 6)),
    'v': (kv_heads, (8, 2, 6)),
    'out': (('heads', 'head_dim', 'embed'), (4, 6, 8)),
  }
