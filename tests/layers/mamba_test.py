"""The mixer, dense and routed: split, step, causality, documents, initial values."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.extend import core as jex_core

from ssm_moe.config import MambaConfig, RoMConfig
from ssm_moe.layers import initializers
from ssm_moe.layers import mamba as mamba_lib
from tests import tolerances

_BATCH, _LENGTH, _D_MODEL = 2, 11, 8

_KINDS = {
  'dense': RoMConfig(),
  'rom': RoMConfig(kind='shared', num_experts=4),
  'rom_top2': RoMConfig(kind='shared', num_experts=4, top_k=2),
  # Every projection has a router of its own.
  'inner': RoMConfig(
    kind='independent',
    num_experts=4,
    expert_projections=('conv', 'gate', 'out', 'x', 'dt'),
    weight_at='each',
  ),
}


def _mixer(rom, dtype='float32', **fields):
  return mamba_lib.Mamba(
    MambaConfig(d_state=4, rom=rom, **fields),
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


_MARKS = {'rom': [pytest.mark.extended], 'inner': [pytest.mark.slow]}


@pytest.fixture(params=[pytest.param(kind, marks=_MARKS.get(kind, [])) for kind in _KINDS])
def mixer(request):
  return _built(request.param)


def test_sequence_equals_steps(mixer):
  module, variables, x = mixer
  whole, last, *_ = _apply(module, variables, x)
  state = mamba_lib.initial_state(
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


@pytest.mark.parametrize('cut', [1, *(pytest.param(n, marks=pytest.mark.extended) for n in (3, 8))])
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


_ALL = ('conv', 'gate', 'out', 'x', 'dt')
_ROUTED = {
  'top2': {'top_k': 2},
  'renormalized': {'top_k': 2, 'weights': 'renormalized'},
  'all_projections': {'top_k': 2, 'expert_projections': _ALL, 'weight_at': 'each'},
  'conv_and_x': {'expert_projections': ('conv', 'x')},
  'straight_through': {'weight_at': 'straight_through'},
  'independent': {'kind': 'independent', 'weight_at': 'each', 'expert_projections': _ALL},
  'bottleneck': {'kind': 'independent', 'weight_at': 'each', 'bottleneck': 6},
  'capacity': {'dispatch': 'capacity', 'capacity_factor': 4.0},
  'fallback': {'fallback_threshold': 0.3},
}


def _routed(bias=False, **fields):
  return _mixer(RoMConfig(**({'kind': 'shared', 'num_experts': 4} | fields)), bias=bias)


_SLOW = ('renormalized', 'straight_through', 'independent', 'bottleneck', 'capacity')
_EXTENDED = ('top2', 'conv_and_x')


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(
      name,
      marks=[pytest.mark.slow] * (name in _SLOW) + [pytest.mark.extended] * (name in _EXTENDED),
    )
    for name in _ROUTED
  ],
)
def test_equals_the_dense_oracle(rng, name):
  x = jax.random.normal(rng, (_BATCH, _LENGTH, _D_MODEL))
  sparse = _routed(**_ROUTED[name])
  oracle = _routed(**_ROUTED[name] | {'dispatch': 'dense'})
  variables = jax.jit(sparse.init)(rng, x)

  def run(module):
    def loss(variables, x):
      y, _, aux, _ = _apply(module, variables, x)
      balance = sum(reported.load_balancing_loss for reported in aux.values())
      return jnp.sum(jnp.sin(y)) + balance, y

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(variables, x)

  (gradient, *_), _ = actual = run(sparse)
  tolerances.assert_close(actual, run(oracle), rtol=tolerances.FLOAT32_REORDERED)
  # Every router learns, wherever its weight applies.
  routers = gradient['params']['routing']
  assert all(np.abs(box.unbox()).max() > 0 for box in jax.tree.leaves(routers, is_leaf=_is_box))


def _is_box(leaf):
  return isinstance(leaf, nn.Partitioned)


def _of_equal_experts(dense, routed, rng, x):
  """Parameters of both, every expert of the routed one a copy of the dense matrix."""
  variables = nn.unbox(jax.jit(dense.init)(rng, x))
  params = {**variables['params']}
  for name in ('in_proj', 'out_proj') if dense.config.bias else ():
    bias = jax.random.normal(rng, params[name]['bias'].shape)  # which is zero at first
    params[name] = params[name] | {'bias': bias}
  variables = {'params': {**params}}
  own = nn.unbox(jax.jit(routed.init)(rng, x))['params']
  params['routing'] = own['routing']
  if 'conv_proj' in own:
    in_proj = params.pop('in_proj')['kernel']
    params |= {
      'conv_proj': {'kernel': in_proj[:, 0]},
      'gate_proj': {'kernel': in_proj[:, 1]},
    }
  copied = jax.tree.map(
    lambda theirs, mine: jnp.broadcast_to(theirs, mine.shape), params, {k: own[k] for k in params}
  )
  return variables, {'params': copied}


@pytest.mark.parametrize('name', ['conv_and_x', 'out', 'straight_through'])
def test_equal_experts_are_the_dense_mixer_times_the_router_weight(rng, name):
  # With one set of weights in every expert the routed layer is the dense one, its output scaled
  # once by the probability of the chosen expert; not at all with a forward value of 1.
  x = jax.random.normal(rng, (_BATCH, _LENGTH, _D_MODEL))
  # A bias is added once, whatever the experts.
  bias = name == 'straight_through'
  dense, routed = _mixer(_KINDS['dense'], bias=bias), _routed(bias, **_ROUTED.get(name, {}))
  variables, params = _of_equal_experts(dense, routed, rng, x)
  y = _apply(routed, params, x)[0]
  logits = x @ params['params']['routing']['router']['kernel']
  weight = jax.nn.softmax(logits).max(axis=-1, keepdims=True)
  expected = _apply(dense, variables, x)[0]
  if name != 'straight_through':
    expected = expected * weight
  tolerances.assert_close(y, expected, rtol=tolerances.FLOAT32_REORDERED)


@pytest.mark.parametrize(
  ('fields', 'sorts'),
  [
    ({}, 1),
    ({'expert_projections': _ALL}, 1),
    ({'kind': 'independent', 'weight_at': 'each', 'expert_projections': _ALL}, 5),
  ],
)
def test_one_sort_serves_all_projections_of_a_decision(rng, fields, sorts):
  x = jax.random.normal(rng, (_BATCH, _LENGTH, _D_MODEL))
  module = _routed(**fields)
  variables = jax.jit(module.init)(rng, x)
  jaxpr = jax.make_jaxpr(lambda x: _apply(module, variables, x)[0])(x)
  assert _count_sorts(jaxpr.jaxpr) == sorts


def _count_sorts(jaxpr):
  total = 0
  for equation in jaxpr.eqns:
    total += equation.primitive.name == 'sort'
    total += sum(_count_sorts(inner) for inner in jex_core.jaxprs_in_params(equation.params))
  return total


def test_a_decision_given_or_replayed_is_taken(rng):
  x = jax.random.normal(rng, (_BATCH, _LENGTH, _D_MODEL))
  module = _routed(top_k=2).clone(record_routes=True)
  variables = jax.jit(module.init)(rng, x)
  y, _, aux, routing = _apply(module, variables, x)
  given, _, none, _ = _apply(module, variables, x, given=routing)
  assert none == {}  # who decides reports
  replayed, _, again, _ = _apply(module, variables, x, routes={'': aux[''].routes})
  chex.assert_trees_all_equal(given, y, replayed)
  chex.assert_trees_all_equal(again[''].routes, aux[''].routes)
  others = aux[''].routes.replace(expert_index=(aux[''].routes.expert_index + 1) % 4)
  assert not np.allclose(_apply(module, variables, x, routes={'': others})[0], y)


def test_an_unsure_token_takes_the_expert_that_stands_in_for_all(rng):
  x = jax.random.normal(rng, (_BATCH, _LENGTH, _D_MODEL))
  never, always = _routed(), _routed(fallback_threshold=1.0)
  variables = nn.unbox(jax.jit(always.init)(rng, x))
  kernels = {
    name: {'kernel': variables['params'][name]['kernel'].at[4].set(0.0)}
    for name in ('in_proj', 'out_proj')
  }
  y, _, aux, _ = _apply(always, {'params': variables['params'] | kernels}, x)
  np.testing.assert_array_equal(y, 0)
  assert aux[''].fallback_fraction == 1
  kernels = {name: {'kernel': kernel['kernel'][:4]} for name, kernel in kernels.items()}
  logits = x @ variables['params']['routing']['router']['kernel']
  best = jax.nn.softmax(logits).max(axis=-1)
  threshold = float(jnp.median(best))
  sometimes = _routed(fallback_threshold=threshold)
  y, _, aux, _ = _apply(sometimes, variables, x)
  sure = _apply(never, {'params': variables['params'] | kernels}, x)[0]
  assert 0 < aux[''].fallback_fraction < 1
  # The first token that is unsure changes; those before it do not.
  unsure = best < threshold
  assert int(unsure.sum()) == round(float(aux[''].fallback_fraction) * unsure.size)
  for row in range(_BATCH):
    first = int(jnp.argmax(unsure[row])) if unsure[row].any() else _LENGTH
    tolerances.assert_close(y[row, :first], sure[row, :first], rtol=tolerances.FLOAT32_REORDERED)


def test_initial_values_are_mambas(rng):
  module = _mixer(_KINDS['dense'])
  config = module.config
  x = jnp.zeros((_BATCH, _LENGTH, _D_MODEL))
  params = nn.unbox(jax.jit(module.init)(rng, x)['params'])
  np.testing.assert_allclose(params['A_log'], np.log([[1, 2, 3, 4]] * 16), rtol=1e-6)
  np.testing.assert_array_equal(params['D'], np.ones(16))
  dt = np.log1p(np.exp(params['dt_bias']))
  assert (dt >= config.dt_min * (1 - 1e-3)).all() and (dt <= config.dt_max * (1 + 1e-3)).all()
  for name, fan_in in {'in_proj': 8, 'x_proj': 16, 'dt_proj': 1, 'out_proj': 16}.items():
    bound = fan_in**-0.5
    assert 0.5 * bound < np.abs(params[name]['kernel']).max() <= bound, name


def test_bfloat16_keeps_parameters_and_state_in_float32(rng):
  module = _mixer(_KINDS['rom'], dtype='bfloat16')
  x = jax.random.normal(rng, (_BATCH, _LENGTH, _D_MODEL)).astype(jnp.bfloat16)
  variables = jax.jit(module.init)(rng, x)
  chex.assert_tree_all_finite(variables)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  y, state, *_ = _apply(module, variables, x)
  assert y.dtype == jnp.bfloat16
  assert state.ssm_state.dtype == jnp.float32
