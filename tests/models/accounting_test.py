"""The closed form against the papers' counts, the real tree, and counted matmuls."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.extend import core as jex_core

from ssm_moe.config import (
  AttentionConfig,
  Mamba2Config,
  MambaConfig,
  MLPConfig,
  ModelConfig,
  MoEConfig,
  RoMConfig,
)
from ssm_moe.models import accounting, lm
from tests import config_files


def _shapes(config: ModelConfig):
  tokens = jnp.zeros((1, 2), jnp.int32)
  return nn.unbox(jax.eval_shape(lm.LM(config).init, jax.random.key(0), tokens)['params'])


def _size(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _account(config):
  return accounting.account(config, sequence_length=1024)


def _moe_mamba(num_experts):
  config = config_files.load('moe_mamba_26m').model
  return dataclasses.replace(config, moe=dataclasses.replace(config.moe, num_experts=num_experts))


def test_moe_mamba_counts_of_the_paper():
  account = _account(_moe_mamba(32))
  assert account['non_embedding_params'] == 416_358_400
  assert account['active_non_embedding_params'] == 26_288_128
  assert _account(_moe_mamba(42))['non_embedding_params'] == 542_228_480


# Non-embedding parameters and active ones as the paper prints them in tables 1, 2, 4 and 5, in
# millions; its ratio rows compute to what their sizes say.
_MOE_MAMBA = {
  'table1:transformer_25m': (25, 25),
  'table1:mamba_25m': (27, 27),
  'table1:transformer_moe_25m': (545, 25),
  'table1:moe_mamba_25m': (542, 26),
  'table1:mamba_100m': (121, 121),
  'table1:transformer_moe_100m': (2454, 114),
  'table1:moe_mamba_100m': (2439, 118),
  'table2:ratio_1_5': (403, 26),
  'table2:ratio_5_1': (426, 27),
  'table2:ratio_6_0': (27, 27),
  'table4:mamba': (27, 27),
  'table4:experts_1': (26, 26),
  'table4:experts_4': (64, 26),
  'table4:experts_8': (114, 26),
  'table4:experts_16': (215, 26),
}


@pytest.mark.parametrize('row', _MOE_MAMBA)
def test_counts_of_moe_mambas_tables(row):
  account = _account(config_files.load(f'moe_mamba/{row}').model)
  counts = [account[f'{kind}non_embedding_params'] for kind in ('', 'active_')]
  assert [round(count / 1e6) for count in counts] == list(_MOE_MAMBA[row])


def test_parallel_has_one_norm_a_block_less():
  serial, parallel = (
    _account(config_files.load(f'moe_mamba/table7:{kind}_8').model)['total_params']
    for kind in ('serial', 'parallel')
  )
  assert serial - parallel == 8 * 2 * 512  # scale and bias


# Total parameters of Routing Mamba's sizes and of Samba's, in millions to a tenth.
_ROM = {
  'ladder:mamba_353m': 352.8,
  'ladder:rom_353m': 2467.1,
  'ladder:mamba_765m': 765.1,
  'ladder:rom_765m': 5522.1,
  'ladder:mamba_1300m': 1334.7,
  'ladder:rom_1300m': 9791.2,
  'projections:conv_out': 511.6,
  'projections:out': 313.4,
  'samba:samba': 421.8,
  'samba:samba_rom': 1016.4,
  'samba:samba_expand_4': 511.3,
  'samba:samba_rom_expand_4': 1700.4,
}


@pytest.mark.parametrize('row', _ROM)
def test_counts_of_routing_mambas_sizes(row):
  total = _account(config_files.load(f'rom/{row}').model)['total_params']
  assert round(total / 1e6, 1) == _ROM[row]


def test_mamba_and_rom_counts_of_the_ladder():
  dense = _account(config_files.load('mamba_115m').model)
  assert dense['total_params'] == dense['active_params'] == 115_096_320
  routed = _account(config_files.load('rom_115m').model)
  assert routed['total_params'] == 709_786_368
  assert routed['active_params'] == 115_243_776


@pytest.mark.parametrize('name', config_files.FIRST_FAST)
def test_equals_the_tree_of_every_config(name):
  config = config_files.load(name).model
  assert _account(config)['total_params'] == _size(_shapes(config))


def _matmul_flops(jaxpr):
  """Counts 2 m n k of every dot, times the length of the loops around it."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      (contracted, _), _ = equation.params['dimension_numbers']
      left = equation.invars[0].aval.shape
      total += 2 * equation.outvars[0].aval.size * _product(left[axis] for axis in contracted)
    length = equation.params.get('length', 1) if equation.primitive.name == 'scan' else 1
    for inner in jex_core.jaxprs_in_params(equation.params):
      total += length * _matmul_flops(inner)
  return total


def _product(sizes):
  result = 1
  for size in sizes:
    result *= size
  return result


_ROMS = {
  'all': {'expert_projections': ('conv', 'gate', 'out', 'x', 'dt')},
  'bottleneck': {'kind': 'independent', 'weight_at': 'each', 'bottleneck': 6, 'top_k': 2},
  'bias_and_fallback': {'selection_bias_rate': 0.1, 'fallback_threshold': 0.1},
  'period': {'kind': 'period'},
}


@pytest.mark.parametrize('biases', [{}, {'bias': True, 'conv_bias': False}], ids=['usual', 'other'])
@pytest.mark.parametrize('name', _ROMS)
def test_equals_the_tree_of_every_kind_of_layer(name, biases):
  rom = RoMConfig(**({'kind': 'shared', 'num_experts': 4} | _ROMS[name]))
  config = ModelConfig(
    vocab_size=50,
    d_model=16,
    num_periods=2,
    pattern='M+E S F m A s W M E',
    mamba=MambaConfig(rom=rom, **biases),
    mamba2=Mamba2Config(head_dim=4, d_state=6, num_groups=2, rom=rom, **biases),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, window=4),
    mlp=MLPConfig(activation='swiglu'),
    moe=MoEConfig(num_experts=4, num_shared_experts=1, selection_bias_rate=0.1),
  )
  assert _account(config)['total_params'] == _size(_shapes(config))


def test_mean_context_is_counted():
  for length, window in ((7, None), (7, 3), (7, 7), (7, 9), (1, 3)):
    seen = [min(t + 1, window or length) for t in range(length)]
    assert accounting.mean_context(length, window) == pytest.approx(sum(seen) / length)


@pytest.mark.parametrize('num_experts', [1, 4])
def test_flops_equal_counted_matmuls(num_experts):
  # The dense dispatch computes every expert: with top_k = num_experts that is the closed form's
  # count. What is no matmul (scan, convolution) is taken off; combining is one more small matmul.
  rom = RoMConfig(kind='shared', num_experts=num_experts, top_k=num_experts, dispatch='dense')
  moe = MoEConfig(num_experts=num_experts, top_k=num_experts, dispatch='dense')
  config = ModelConfig(
    d_model=32, num_periods=2, pattern='ME', mamba=MambaConfig(rom=rom), moe=moe, vocab_size=50
  )
  costs = accounting.by_component(config, 24)
  tokens = 24
  expected = tokens * sum(
    cost.flops_per_token for name, cost in costs.items() if name not in ('mamba_scan', 'mamba_conv')
  )
  combined = tokens * 2 * num_experts * config.num_periods * (2 * 64 + 32 + 32)

  def forward(params, inputs):
    model = lm.LM(config)
    hidden = model.apply({'params': params}, inputs).hidden
    return model.apply({'params': params}, hidden, method='logits')

  jaxpr = jax.make_jaxpr(forward)(_shapes(config), jnp.zeros((1, tokens), jnp.int32)).jaxpr
  balance = 2 * 2 * num_experts * config.num_periods  # E f_e P_e of the balance losses
  assert _matmul_flops(jaxpr) == expected + combined + balance


def test_top_k_scales_the_expert_part_only():
  one, two = (
    accounting.by_component(
      ModelConfig(pattern='ME', moe=MoEConfig(num_experts=8, top_k=top_k)), 1024
    )
    for top_k in (1, 2)
  )
  assert two['moe_experts'].active_params == 2 * one['moe_experts'].active_params
  assert two['moe_experts'].flops_per_token == 2 * one['moe_experts'].flops_per_token
  assert {n: c for n, c in one.items() if n != 'moe_experts'} == {
    n: c for n, c in two.items() if n != 'moe_experts'
  }
