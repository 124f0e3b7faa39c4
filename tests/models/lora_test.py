"""Adapters start as nothing, and merged they are the parameters of a plain model."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import linen as nn

from ssm_moe.config import (
  AttentionConfig,
  ConfigError,
  LoRAConfig,
  Mamba2Config,
  MambaConfig,
  ModelConfig,
  MoEConfig,
  RoMConfig,
)
from ssm_moe.models import lm, lora
from tests.tolerances import FLOAT32_REORDERED, assert_close

CONFIG = ModelConfig(
  vocab_size=11,
  d_model=16,
  pattern='M S A E F',
  num_periods=2,
  mamba=MambaConfig(d_state=4, rom=RoMConfig(kind='shared', num_experts=3)),
  mamba2=Mamba2Config(d_state=4, head_dim=8),
  attention=AttentionConfig(num_heads=2),
  moe=MoEConfig(num_experts=2, d_ff=6, activation='swiglu'),
)
LORA = LoRAConfig(rank=1, alpha=3.0, targets=('periods/*',))


@functools.cache
def _boxed(config=CONFIG):
  return jax.eval_shape(lambda key: lm.boxed_params(config, key), jax.random.key(0))


def _random(tree, seed=0):
  """Values for a tree of boxed shapes."""
  random = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: random.standard_normal(leaf.shape).astype(np.float32), nn.unbox(tree)
  )


def _adapters(config=LORA, model=CONFIG):
  return jax.eval_shape(lambda key: lora.init(key, _boxed(model), config), jax.random.key(0))


def _names(tree):
  return [lora.path_name(path) for path, _ in jax.tree.leaves_with_path(nn.unbox(tree))]


def test_every_matrix_of_a_layer_can_have_one_and_nothing_else():
  adapted = {name.rpartition('/')[0].removeprefix('periods/') for name in _names(_adapters())}
  assert adapted == {
    *(f'layer_mamba_0/{name}_proj/kernel' for name in ('in', 'x', 'dt', 'out')),
    'layer_mamba_0/routing/router/kernel',
    *(f'layer_mamba2_1/{name}_proj/kernel' for name in ('in', 'x', 'dt', 'out')),
    *(f'layer_attention_2/{name}' for name in 'qkv'),
    'layer_attention_2/out',
    *(f'layer_moe_3/{name}' for name in ('router/kernel', 'wi', 'wo')),
    *(f'layer_mlp_4/{name}' for name in ('wi', 'wo')),
  }


def test_by_default_they_are_at_the_projections_of_mixers():
  adapted = {name.split('/')[-3] for name in _names(_adapters(LoRAConfig(rank=1)))}
  assert adapted == {'in_proj', 'x_proj', 'dt_proj', 'out_proj'}


@pytest.mark.slow
def test_they_start_as_nothing():
  params = _random(_boxed())
  adapters = jax.jit(lambda key: nn.unbox(lora.init(key, _boxed(), LORA)))(jax.random.key(0))
  merged = jax.jit(lambda *trees: lora.merged(*trees, LORA))(params, adapters)
  jax.tree.map(np.testing.assert_array_equal, merged, params)
  assert all(
    np.abs(leaf).max() > 0
    for path, leaf in jax.tree.leaves_with_path(adapters)
    if path[-1].key == 'down'
  )


def test_merged_is_the_sum_of_both_paths():
  # A matrix of inputs x outputs: x W' is x W + alpha / rank (x down) up, for each that is stacked.
  params, adapters = _random(_boxed()), _random(_adapters(), seed=1)
  merged = jax.jit(lambda *trees: lora.merged(*trees, LORA))(params, adapters)
  places = {
    ('layer_mamba_0', 'in_proj', 'kernel'): 3,  # [periods, experts, inputs, ...]
    ('layer_mamba2_1', 'x_proj', 'kernel'): 2,
    ('layer_moe_3', 'wi'): 3,
  }
  random = np.random.default_rng(2)
  for path, axis in places.items():
    plain, adapter, sum_of = params['periods'], adapters['periods'], merged['periods']
    for name in path:
      plain, adapter, sum_of = plain[name], adapter[name], sum_of[name]
    inputs, stacked = plain.shape[axis - 1], np.prod(plain.shape[: axis - 1])
    x = random.standard_normal((stacked, 1, inputs))
    flat = plain.reshape(stacked, inputs, -1)
    down, up = adapter['down'].reshape(stacked, inputs, 1), adapter['up'].reshape(stacked, 1, -1)
    expected = x @ flat + 3.0 * (x @ down) @ up
    assert_close(x @ np.asarray(sum_of).reshape(stacked, inputs, -1), expected, rtol=1e-5)
  heads = np.einsum(
    'bhpr,brm->bhpm', *(adapters['periods']['layer_attention_2']['out'][n] for n in ('down', 'up'))
  )
  changed = merged['periods']['layer_attention_2']['out']
  expected = params['periods']['layer_attention_2']['out'] + 3.0 * heads
  assert_close(changed, expected, rtol=FLOAT32_REORDERED)


def test_no_rank_is_above_that_of_the_matrix():
  adapters = nn.unbox(_adapters(LoRAConfig(rank=4)))['periods']['layer_mamba_0']
  assert adapters['dt_proj']['kernel']['down'].shape == (2, 1, 1)  # dt has rank 1
  assert adapters['x_proj']['kernel']['up'].shape == (2, 4, 9)


def test_they_lie_as_what_they_adapt():
  adapter = _adapters()['periods']['layer_mamba_0']['out_proj']['kernel']
  assert adapter['down'].names == ('layers', 'expert', 'inner', 'adapter')
  assert adapter['up'].names == ('layers', 'expert', 'adapter', 'embed')


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'targets': ('*/in_prj/*',)}, r"lora.targets: '\*/in_prj/\*' is the path of no matrix; .*wi"),
    ({'targets': ('*', '*/A_log')}, r"lora.targets: '\*/A_log' is the path of no matrix"),
  ],
)
def test_what_cannot_be_is_one_line(fields, message):
  config = dataclasses.replace(LORA, **fields)
  with pytest.raises(ConfigError, match=message) as caught:
    _adapters(config, dataclasses.replace(CONFIG, pattern='M F'))
  assert '\n' not in str(caught.value)
