"""The mixer, dense and routed: split, step, causality, documents, initial values."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_moe.config import MambaConfig, RoMConfig
from ssm_moe.layers import initializers
from ssm_moe.layers import mamba as mamba_lib
from tests import tolerances

_BATCH, _LENGTH, _D_MODEL = 2, 11, 8

_KINDS = {
  'dense': RoMConfig(),
  'rom': RoMConfig(kind='shared', num_experts=4),
  'rom_top2': RoMConfig(kind='shared', num_experts=4, top_k=2),
}


def _mixer(rom, dtype='float32'):
  return mamba_lib.Mamba(
    MambaConfig(d_state=4, rom=rom),
    _D_MODEL,
    router_init=initializers.linear(_D_MODEL),
    output_scale=1.0,
    dtype=jnp.dtype(dtype),
  )


@functools.partial(jax.jit, static_argnums=0)
def _apply(module, variables, x, **options):
  return module.apply(variables, x, **options)


@pytest.fixture(params=list(_KINDS))
def mixer(request, rng):
  module = _mixer(_KINDS[request.param])
  x = jax.random.normal(rng, (_BATCH, _LENGTH, _D_MODEL))
  return module, jax.jit(module.init)(rng, x), x


def test_sequence_equals_steps(mixer):
  module, variables, x = mixer
  whole, last, _ = _apply(module, variables, x)
  state = mamba_lib.initial_state(
    module.mamba, d_model=_D_MODEL, batch=_BATCH, dtype=jnp.dtype('float32')
  )
  outputs = []
  step = jax.jit(lambda x, state: module.apply(variables, x, state, method='step'))
  for t in range(_LENGTH):
    y, state = step(x[:, t], state)
    outputs.append(y)
  tolerances.assert_close(
    (jnp.stack(outputs, axis=1), state), (whole, last), rtol=tolerances.FLOAT32_REORDERED
  )


@pytest.mark.parametrize('cut', [1, pytest.param(3, marks=pytest.mark.slow), 8])
def test_any_split_equals_the_whole(mixer, cut):
  module, variables, x = mixer
  whole, last, _ = _apply(module, variables, x)
  first, middle, _ = _apply(module, variables, x[:, :cut])
  second, end, _ = _apply(module, variables, x[:, cut:], state=middle)
  tolerances.assert_close(
    (jnp.concatenate([first, second], axis=1), end),
    (whole, last),
    rtol=tolerances.FLOAT32_REORDERED,
  )


def test_no_gradient_from_later_tokens(mixer):
  module, variables, x = mixer
  gradient = jax.grad(lambda x: _apply(module, variables, x)[0][:, 5].sum())(x)
  reached = np.abs(gradient).sum(axis=(0, 2)) > 0
  np.testing.assert_array_equal(reached, np.arange(_LENGTH) <= 5)


def test_packed_documents_equal_each_alone(mixer):
  module, variables, x = mixer
  ids = jnp.broadcast_to(jnp.where(jnp.arange(_LENGTH) < 4, 1, 2), (_BATCH, _LENGTH))
  packed, last, _ = _apply(module, variables, x, segment_ids=ids)
  first, _, _ = _apply(module, variables, x[:, :4])
  second, end, _ = _apply(module, variables, x[:, 4:])
  tolerances.assert_close(
    (packed, last),
    (jnp.concatenate([first, second], axis=1), end),
    rtol=tolerances.FLOAT32_REORDERED,
  )


@pytest.mark.parametrize('top_k', [pytest.param(1, marks=pytest.mark.slow), 2])
def test_dropless_equals_the_dense_oracle(rng, top_k):
  x = jax.random.normal(rng, (_BATCH, _LENGTH, _D_MODEL))
  sparse = _mixer(RoMConfig(kind='shared', num_experts=4, top_k=top_k))
  oracle = _mixer(RoMConfig(kind='shared', num_experts=4, top_k=top_k, dispatch='dense'))
  variables = sparse.init(rng, x)

  def run(module):
    def loss(variables, x):
      y, _, aux = _apply(module, variables, x)
      return jnp.sum(jnp.sin(y)) + aux.load_balancing_loss, y

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(variables, x)

  tolerances.assert_close(run(sparse), run(oracle), rtol=tolerances.FLOAT32_REORDERED)


def test_equal_experts_are_the_dense_mixer_times_the_router_weight(rng):
  # papers: with one set of weights in every expert, the routed layer is the dense one, its output
  # scaled by the probability of the chosen expert.
  x = jax.random.normal(rng, (_BATCH, _LENGTH, _D_MODEL))
  dense = _mixer(_KINDS['dense'])
  routed = _mixer(_KINDS['rom'])
  variables = dense.init(rng, x)
  routed_params = routed.init(rng, x)['params']
  params = dict(variables['params'])
  for name in ('in_proj', 'out_proj'):
    kernel = params.pop(name).unbox()
    params[f'{name}_experts'] = {'kernel': jnp.stack([kernel] * 4)}
  params['router'] = routed_params['router']
  y, _, _ = routed.apply({'params': params}, x)
  logits = x @ routed_params['router']['kernel'].unbox()
  weight = jax.nn.softmax(logits).max(axis=-1, keepdims=True)
  expected = _apply(dense, variables, x)[0] * weight
  tolerances.assert_close(y, expected, rtol=tolerances.FLOAT32_REORDERED)


def test_one_sort_serves_all_projections(rng):
  x = jax.random.normal(rng, (_BATCH, _LENGTH, _D_MODEL))
  module = _mixer(_KINDS['rom'])
  variables = jax.jit(module.init)(rng, x)
  jaxpr = str(jax.make_jaxpr(lambda x: _apply(module, variables, x)[0])(x))
  assert jaxpr.count('sort[') == 1


def test_initial_values_are_mambas(rng):
  module = _mixer(_KINDS['dense'])
  config = module.mamba
  x = jnp.zeros((_BATCH, _LENGTH, _D_MODEL))
  params = jax.tree.map(np.asarray, jax.jit(module.init)(rng, x)['params'])
  params = {name: box.unbox() for name, box in params.items()}
  np.testing.assert_allclose(params['A_log'], np.log([[1, 2, 3, 4]] * 16), rtol=1e-6)
  np.testing.assert_array_equal(params['D'], np.ones(16))
  dt = np.log1p(np.exp(params['dt_bias']))
  assert (dt >= config.dt_min * (1 - 1e-3)).all() and (dt <= config.dt_max * (1 + 1e-3)).all()
  for name, fan_in in {'in_proj': 8, 'x_proj': 16, 'dt_proj': 1, 'out_proj': 16}.items():
    bound = fan_in**-0.5
    assert 0.5 * bound < np.abs(params[name]).max() <= bound, name


def test_bfloat16_keeps_parameters_and_state_in_float32(rng):
  module = _mixer(_KINDS['rom'], dtype='bfloat16')
  x = jax.random.normal(rng, (_BATCH, _LENGTH, _D_MODEL)).astype(jnp.bfloat16)
  variables = jax.jit(module.init)(rng, x)
  chex.assert_tree_all_finite(variables)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  y, state, _ = _apply(module, variables, x)
  assert y.dtype == jnp.bfloat16
  assert state.ssm_state.dtype == jnp.float32
