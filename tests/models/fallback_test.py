"""The mean expert changes nothing until a threshold asks for it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ssm_moe.config import Mamba2Config, MambaConfig, ModelConfig, MoEConfig, RoMConfig
from ssm_moe.models import fallback, lm
from tests.tolerances import FLOAT32_REORDERED, assert_close

TOKENS = jnp.arange(24, dtype=jnp.int32).reshape(2, 12) % 7


def rom(**fields):
  return RoMConfig(num_experts=3, **({'kind': 'shared'} | fields))


def model_config(pattern='M', **fields):
  return ModelConfig(vocab_size=7, d_model=8, num_periods=2, pattern=pattern, **fields)


CONFIGS = {
  'shared': model_config(
    mamba=MambaConfig(d_state=4, scan_implementation='reference', bias=True, rom=rom(top_k=2))
  ),
  'independent': model_config(
    mamba=MambaConfig(
      d_state=4,
      scan_implementation='reference',
      rom=rom(kind='independent', weight_at='each', expert_projections=('conv', 'x', 'dt')),
    )
  ),
  'bottleneck': model_config(
    mamba=MambaConfig(
      d_state=4,
      scan_implementation='reference',
      rom=rom(bottleneck=6, dispatch='capacity', expert_projections=('gate', 'out')),
    )
  ),
  'mamba2': model_config(
    'S m',
    mamba=MambaConfig(d_state=4, scan_implementation='reference'),
    mamba2=Mamba2Config(d_state=4, head_dim=8, rom=rom()),
  ),
}


@functools.cache
def make_params(config):
  return nn.unbox(jax.jit(lm.LM(config).init)(jax.random.key(0), TOKENS)['params'])


@functools.cache
def program(config):
  model = lm.LM(config)

  def run(params):
    output = model.apply({'params': params}, TOKENS)
    return model.apply({'params': params}, output.hidden, method='logits'), output.aux

  return jax.jit(run)


def logits_of(params, config):
  return program(config)(params)


_FIRST, *_OTHERS = CONFIGS
_FIRST_FAST = [_FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in _OTHERS)]


@pytest.mark.parametrize('name', _FIRST_FAST)
def test_logits_stay_until_the_threshold_is_raised(name):
  config = CONFIGS[name]
  params = make_params(config)
  mean_params, mean_config = fallback.with_mean_expert(params, config)
  same, aux = logits_of(mean_params, mean_config)
  assert_close(same, logits_of(params, config)[0], rtol=FLOAT32_REORDERED)
  assert all(not reported.fallback_fraction.any() for reported in aux.values())


@pytest.mark.parametrize('name', _FIRST_FAST)
def test_at_threshold_1_every_projection_is_the_mean(name):
  config = CONFIGS[name]
  if name == 'bottleneck':  # tokens over capacity would be other ones
    dropless = dataclasses.replace(config.mamba.rom, dispatch='dropless')
    config = dataclasses.replace(config, mamba=dataclasses.replace(config.mamba, rom=dropless))
  params = make_params(config)
  mean_params, mean_config = fallback.with_mean_expert(params, config)
  fallen, aux = logits_of(mean_params, fallback.with_threshold(mean_config, 1.0))
  assert all((reported.fallback_fraction == 1).all() for reported in aux.values())

  def averaged(path, leaf):
    # No other axis has as many as there are experts.
    if leaf.ndim < 2 or leaf.shape[1] != 3:
      return leaf
    names = [key.key for key in path]
    if names[-1] not in ('kernel', 'up', 'down') or 'routing' in names:
      return leaf
    return jnp.broadcast_to(leaf.mean(axis=1, keepdims=True), leaf.shape)

  expected, _ = logits_of(jax.tree.map_with_path(averaged, params), config)
  assert_close(fallen, expected, rtol=FLOAT32_REORDERED)


def test_a_model_that_has_the_matrix_keeps_it():
  config = CONFIGS['shared']
  once = fallback.with_mean_expert(make_params(config), config)
  twice = fallback.with_mean_expert(*once)
  assert once[1] == twice[1]
  assert jax.tree.map(np.shape, once[0]) == jax.tree.map(np.shape, twice[0])


def test_threshold_is_set_where_there_is_something_to_fall_back_to():
  config = model_config(
    'M E', mamba=CONFIGS['shared'].mamba, moe=MoEConfig(num_experts=3, d_ff=8, num_shared_experts=1)
  )
  raised = fallback.with_threshold(config, 0.5)
  assert raised.mamba.rom.fallback_threshold == raised.moe.fallback_threshold == 0.5
  without = model_config('M E', mamba=config.mamba, moe=MoEConfig(num_experts=3, d_ff=8))
  assert fallback.with_threshold(without, 0.5).moe.fallback_threshold == 0
  assert not fallback.can_fall_back(without, 'E') and fallback.can_fall_back(config, 'E')
