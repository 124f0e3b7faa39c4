"""The Mamba-2 mixer, dense and routed: the published block, split, step, causality, documents."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ssm_moe.config import Mamba2Config, RoMConfig
from ssm_moe.layers import initializers
from ssm_moe.layers import mamba2 as mamba2_lib
from tests import tolerances

_BATCH, _LENGTH, _D_MODEL = 2, 11, 8
_D_INNER, _HEAD_DIM, _HEADS, _GROUPS, _D_STATE, _WIDTH = 16, 4, 4, 2, 3, 4

_ALL = ('conv', 'gate', 'out', 'x', 'dt')
_KINDS = {
  'dense': RoMConfig(),
  'rom': RoMConfig(kind='shared', num_experts=4, expert_projections=_ALL),
  # Every projection has a router of its own.
  'inner': RoMConfig(kind='independent', num_experts=4, expert_projections=_ALL, weight_at='each'),
}


def _mixer(rom, dtype='float32', **fields):
  config = Mamba2Config(head_dim=_HEAD_DIM, d_state=_D_STATE, num_groups=_GROUPS, rom=rom, **fields)
  return mamba2_lib.Mamba2(
    config,
    _D_MODEL,
    router_init=initializers.linear,
    output_scale=1.0,
    dtype=jnp.dtype(dtype),
  )


@functools.partial(jax.jit, static_argnums=0)
def _apply(module, variables, x, **options):
  return module.apply(variables, x, **options)


@functools.cache
def _built(kind):
  key = jax.random.key(0)
  module = _mixer(_KINDS[kind])
  x = jax.random.normal(key, (_BATCH, _LENGTH, _D_MODEL))
  return module, jax.jit(module.init)(key, x), x


@pytest.fixture(params=[pytest.param(k, marks=[pytest.mark.slow] * (k == 'inner')) for k in _KINDS])
def mixer(request):
  return _built(request.param)


def _silu(v):
  return v / (1 + np.exp(-v))


def _published_block(u, params):
  """The block as published, on packed weights (z, x, B, C, dt), one token at a time, in float64."""
  zxBCdt = u @ params['in_proj'] + params['in_proj.bias']
  z, xBC, dt = np.split(zxBCdt, [_D_INNER, zxBCdt.shape[-1] - _HEADS], axis=-1)
  padded = np.pad(xBC, ((_WIDTH - 1, 0), (0, 0)))
  xBC = np.stack(
    [np.sum(padded[t : t + _WIDTH] * params['conv1d.weight'], axis=0) for t in range(len(u))]
  )
  xBC = _silu(xBC + params['conv1d.bias'])
  x, B, C = np.split(xBC, [_D_INNER, _D_INNER + _GROUPS * _D_STATE], axis=-1)
  dt = np.log1p(np.exp(dt + params['dt_bias']))
  A = -np.exp(params['A_log'])
  h = np.zeros((_HEADS, _HEAD_DIM, _D_STATE))
  outputs = []
  for t in range(len(u)):
    x_t = x[t].reshape(_HEADS, _HEAD_DIM)
    B_t, C_t = (v[t].reshape(_GROUPS, _D_STATE) for v in (B, C))
    y = np.zeros((_HEADS, _HEAD_DIM))
    for i in range(_HEADS):
      group = i // (_HEADS // _GROUPS)
      h[i] = np.exp(dt[t, i] * A[i]) * h[i] + dt[t, i] * np.outer(x_t[i], B_t[group])
      y[i] = h[i] @ C_t[group] + params['D'][i] * x_t[i]
    gated = (y.reshape(-1) * _silu(z[t])).reshape(_GROUPS, -1)
    normed = gated / np.sqrt(np.mean(gated**2, axis=-1, keepdims=True) + _EPSILON)
    normed = normed.reshape(-1) * params['norm.weight']
    outputs.append(normed @ params['out_proj'] + params['out_proj.bias'])
  return np.stack(outputs)


def _packed(params):
  """Returns our parameters in the published block's layout."""

  def in_proj(name, *lead):
    xz, BC, dt = (params[module][name] for module in ('in_proj', 'x_proj', 'dt_proj'))
    x, z = np.moveaxis(xz, len(lead), 0)
    return np.concatenate([part.reshape(*lead, -1) for part in (z, x, BC, dt)], axis=-1)

  conv = {
    name: np.concatenate([params[conv][name].reshape(*lead, -1) for conv in _CONVS], axis=-1)
    for name, lead in (('kernel', (_WIDTH,)), ('bias', ()))
  }
  return {
    'in_proj': in_proj('kernel', _D_MODEL),
    'in_proj.bias': in_proj('bias'),
    'conv1d.weight': conv['kernel'],
    'conv1d.bias': conv['bias'],
    'dt_bias': params['dt_bias'],
    'A_log': params['A_log'],
    'D': params['D'],
    'norm.weight': params['norm']['scale'],
    'out_proj': params['out_proj']['kernel'],
    'out_proj.bias': params['out_proj']['bias'],
  }


_CONVS = ('conv1d', 'BC_conv1d')
_EPSILON = 1e-3  # not the default


def test_equals_the_published_block_in_parameters_and_function(rng):
  module = _mixer(RoMConfig(), bias=True, norm_epsilon=_EPSILON)
  x = jax.random.normal(rng, (_BATCH, _LENGTH, _D_MODEL))
  params = nn.unbox(jax.jit(module.init)(rng, x))['params']
  # Away from the initial values, where D, scale and decays would hide a mistake.
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(rng, len(leaves))
  leaves = [v + 0.5 * jax.random.normal(key, v.shape) for key, v in zip(keys, leaves)]
  params = jax.tree.unflatten(tree, leaves)
  in_float64 = jax.tree.map(lambda v: np.asarray(v, np.float64), params)
  packed = _packed(in_float64)
  assert packed['in_proj'].shape[1] == 2 * _D_INNER + 2 * _GROUPS * _D_STATE + _HEADS
  assert sum(v.size for v in packed.values()) == sum(v.size for v in leaves)
  expected = np.stack([_published_block(np.asarray(row, np.float64), packed) for row in x])
  y, *_ = _apply(module, {'params': params}, x)
  tolerances.assert_close(y, expected, rtol=tolerances.FLOAT32_REORDERED)


def test_sequence_equals_steps(mixer):
  module, variables, x = mixer
  whole, last, *_ = _apply(module, variables, x)
  state = mamba2_lib.initial_state(
    module.config, d_model=_D_MODEL, batch=_BATCH, dtype=jnp.dtype('float32')
  )
  outputs = []
  step = jax.jit(lambda x, state: module.apply(variables, x, state, method='step'))
  for t in range(_LENGTH):
    y, state, _ = step(x[:, t], state)
    outputs.append(y)
  tolerances.assert_close(
    (jnp.stack(outputs, axis=1), state), (whole, last), rtol=tolerances.FLOAT32_REORDERED
  )


@pytest.mark.parametrize('cut', [pytest.param(1, marks=pytest.mark.extended), 3])
def test_any_split_equals_the_whole(mixer, cut):
  module, variables, x = mixer
  whole, last, *_ = _apply(module, variables, x)
  first, middle, *_ = _apply(module, variables, x[:, :cut])
  second, end, *_ = _apply(module, variables, x[:, cut:], state=middle)
  tolerances.assert_close(
    (jnp.concatenate([first, second], axis=1), end),
    (whole, last),
    rtol=tolerances.FLOAT32_REORDERED,
  )


def test_no_gradient_from_later_tokens(mixer):
  module, variables, x = mixer
  gradient = jax.jit(jax.grad(lambda x: _apply(module, variables, x)[0][:, 5].sum()))(x)
  reached = np.abs(gradient).sum(axis=(0, 2)) > 0
  np.testing.assert_array_equal(reached, np.arange(_LENGTH) <= 5)


def test_packed_documents_equal_each_alone(mixer):
  module, variables, x = mixer
  ids = jnp.broadcast_to(jnp.where(jnp.arange(_LENGTH) < 4, 1, 2), (_BATCH, _LENGTH))
  packed, last, *_ = _apply(module, variables, x, segment_ids=ids)
  first, *_ = _apply(module, variables, x[:, :4])
  second, end, *_ = _apply(module, variables, x[:, 4:])
  tolerances.assert_close(
    (packed, last),
    (jnp.concatenate([first, second], axis=1), end),
    rtol=tolerances.FLOAT32_REORDERED,
  )


def test_no_gradient_crosses_a_document_boundary():
  module, variables, x = _built('dense')
  ids = jnp.broadcast_to(jnp.where(jnp.arange(_LENGTH) < 4, 1, 2), (_BATCH, _LENGTH))

  def later(x):
    return jnp.sum(_apply(module, variables, x, segment_ids=ids)[0][:, 4:])

  gradient = jax.grad(later)(x)
  np.testing.assert_array_equal(gradient[:, :4], 0)
  assert (np.abs(gradient[:, 4:]).sum(axis=2) > 0).all()


_ROUTED = {
  'all_projections': {'top_k': 2, 'expert_projections': _ALL, 'weight_at': 'each'},
  'conv_and_x': {'expert_projections': ('conv', 'x')},
  'gate': {'expert_projections': ('gate',)},
  'dt': {'expert_projections': ('dt',), 'weight_at': 'straight_through'},
  'independent': {'kind': 'independent', 'weight_at': 'each', 'expert_projections': _ALL},
  'bottleneck': {'kind': 'independent', 'weight_at': 'each', 'bottleneck': 6},
}


def _routed(**fields):
  return _mixer(RoMConfig(**({'kind': 'shared', 'num_experts': 4} | fields)))


# The others are parts of these.
_HARD = ('all_projections', 'dt', 'independent', 'bottleneck')


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=pytest.mark.slow if name in _HARD else pytest.mark.extended)
    for name in _ROUTED
  ],
)
def test_equals_the_dense_oracle(rng, name):
  x = jax.random.normal(rng, (_BATCH, _LENGTH, _D_MODEL))
  sparse = _routed(**_ROUTED[name])
  oracle = _routed(**_ROUTED[name] | {'dispatch': 'dense'})
  variables = nn.unbox(jax.jit(sparse.init)(rng, x))

  def run(module):
    def loss(variables, x):
      y, _, aux, _ = _apply(module, variables, x)
      balance = sum(reported.load_balancing_loss for reported in aux.values())
      return jnp.sum(jnp.sin(y)) + balance, y

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(variables, x)

  (gradient, *_), _ = actual = run(sparse)
  tolerances.assert_close(actual, run(oracle), rtol=tolerances.FLOAT32_REORDERED)
  # Every router learns, wherever its weight applies.
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient['params']['routing']))


@pytest.mark.parametrize('name', ['conv_and_x', 'out', 'dt'])
def test_equal_experts_are_the_dense_mixer_times_the_router_weight(rng, name):
  # With one set of weights in every expert the routed layer is the dense one, its output scaled
  # once by the probability of the chosen expert; not at all with a forward value of 1.
  dense, variables, x = _built('dense')
  params = {**nn.unbox(variables)['params']}
  routed = _routed(**_ROUTED.get(name, {}))
  own = nn.unbox(jax.jit(routed.init)(rng, x))['params']
  if 'conv_proj' in own:
    in_proj = params.pop('in_proj')['kernel']
    params |= {'conv_proj': {'kernel': in_proj[:, 0]}, 'gate_proj': {'kernel': in_proj[:, 1]}}
  params['routing'] = own['routing']
  copied = jax.tree.map(lambda theirs, mine: jnp.broadcast_to(theirs, mine.shape), params, own)
  y = _apply(routed, {'params': copied}, x)[0]
  expected = _apply(dense, variables, x)[0]
  if name != 'dt':
    logits = x @ own['routing']['router']['kernel']
    expected = expected * jax.nn.softmax(logits).max(axis=-1, keepdims=True)
  tolerances.assert_close(y, expected, rtol=tolerances.FLOAT32_REORDERED)


@pytest.mark.parametrize(('kind', 'sorts'), [('dense', 0), ('rom', 1), ('inner', 5)])
def test_one_sort_serves_all_projections_of_a_decision(kind, sorts):
  module, variables, x = _built(kind)
  jaxpr = jax.make_jaxpr(lambda x: _apply(module, variables, x)[0])(x)
  assert _count(jaxpr.jaxpr, 'sort') == sorts
  _, _, aux, routing = _apply(module, variables, x)
  assert set(aux) == {'dense': set(), 'rom': {''}, 'inner': set(_ALL)}[kind]
  assert (routing is not None) == (kind == 'rom')


def _count(jaxpr, primitive):
  """Counts the calls; in the printed form, functions that are called twice stand once."""
  total = 0
  for equation in jaxpr.eqns:
    total += equation.primitive.name == primitive
    for value in jax.tree.leaves(list(equation.params.values())):
      inner = getattr(value, 'jaxpr', value)
      total += _count(inner, primitive) if hasattr(inner, 'eqns') else 0
  return total


def test_a_decision_given_or_replayed_is_taken():
  module, variables, x = _built('rom')
  module = module.clone(record_routes=True)
  y, _, aux, routing = _apply(module, variables, x)
  given, _, none, _ = _apply(module, variables, x, given=routing)
  assert none == {}  # who decides reports
  replayed, *_ = _apply(module, variables, x, routes={'': aux[''].routes})
  chex.assert_trees_all_equal(given, y, replayed)
  others = aux[''].routes.replace(expert_index=(aux[''].routes.expert_index + 1) % 4)
  assert not np.allclose(_apply(module, variables, x, routes={'': others})[0], y)


def test_initial_values_are_mamba2s(rng):
  config = Mamba2Config(head_dim=1, d_state=_D_STATE)
  module = _built('dense')[0].clone(config=config, d_model=256)
  variables = jax.jit(module.init)(rng, jnp.zeros((1, 1, 256)))
  params = nn.unbox(variables)['params']
  decay = np.exp(params['A_log'])  # of 512 heads
  assert 1 <= decay.min() < 1.2 and 15.8 < decay.max() <= 16.001
  assert abs(decay.mean() - 8.5) < 1  # uniform; log-uniform would give 5.4
  np.testing.assert_array_equal(params['D'], np.ones(512))
  np.testing.assert_array_equal(params['norm']['scale'], np.ones(512))
  dt = np.log1p(np.exp(params['dt_bias']))
  assert (dt >= config.dt_min * (1 - 1e-3)).all() and (dt <= config.dt_max * (1 + 1e-3)).all()
  fan_ins = {'in_proj': 256, 'x_proj': 256, 'dt_proj': 256, 'out_proj': 512}
  for name, fan_in in {**fan_ins, 'conv1d': 4, 'BC_conv1d': 4}.items():
    bound = fan_in**-0.5
    assert 0.5 * bound < np.abs(params[name]['kernel']).max() <= bound, name


def test_bfloat16_keeps_parameters_and_state_in_float32(rng):
  module, variables, x = _built('rom')
  expected, *_, routing = _apply(module, variables, x)
  module = module.clone(dtype=jnp.dtype('bfloat16'))
  assert {leaf.dtype for leaf in jax.tree.leaves(jax.jit(module.init)(rng, x))} == {
    jnp.dtype('float32')
  }
  y, state, *_ = _apply(module, variables, x, given=routing)
  assert y.dtype == state.conv_state.dtype == state.BC_conv_state.dtype == jnp.bfloat16
  assert state.ssm_state.dtype == jnp.float32
  initial = mamba2_lib.initial_state(
    module.config, d_model=_D_MODEL, batch=_BATCH, dtype=module.dtype
  )
  chex.assert_trees_all_equal_shapes_and_dtypes(initial, state)
  tolerances.assert_close(y, expected, rtol=tolerances.BFLOAT16)
