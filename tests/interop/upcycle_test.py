"""A model that has grown experts is the model it was, until it is trained."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ssm_moe.config import (
  AttentionConfig,
  ConfigError,
  Mamba2Config,
  MambaConfig,
  ModelConfig,
  MoEConfig,
  RoMConfig,
)
from ssm_moe.interop import upcycle
from ssm_moe.models import accounting, lm
from tests.tolerances import FLOAT32_REORDERED, assert_close

TOKENS = jnp.arange(40, dtype=jnp.int32).reshape(2, 20) * 5 % 11
KEY = jax.random.key(1)
ALL = ('conv', 'gate', 'out', 'x', 'dt')

MAMBA = MambaConfig(d_state=4, scan_implementation='reference')
MAMBA2 = Mamba2Config(d_state=4, head_dim=8, num_groups=2, scan_implementation='reference')


def dense(pattern='M', num_periods=2, **fields):
  own = {'mamba': MAMBA, 'mamba2': MAMBA2, 'attention': AttentionConfig(num_heads=2)}
  return ModelConfig(
    vocab_size=11, d_model=16, pattern=pattern, num_periods=num_periods, **(own | fields)
  )


def rom(**fields):
  return RoMConfig(**({'kind': 'shared', 'num_experts': 3, 'weights': 'uniform'} | fields))


@functools.cache
def params_of(config):
  params = nn.unbox(jax.jit(lm.LM(config).init)(jax.random.key(0), TOKENS)['params'])
  # Norms and skips start at one: values of their own, so that none is taken for another's.
  random = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: (leaf + 0.1 * random.standard_normal(leaf.shape)).astype(np.float32),
    jax.device_get(params),
  )


@functools.cache
def _program(config):
  model = lm.LM(config)

  def run(params):
    output = model.apply({'params': params}, TOKENS)
    return model.apply({'params': params}, output.hidden, method='logits'), output.aux

  return jax.jit(run)


def logits(config, params):
  return _program(config)(params)[0]


def _check_fits(config, params):
  """The parameters are those that the model of `config` has, as accounting counts them."""
  expected = jax.eval_shape(lm.LM(config).init, jax.random.key(0), TOKENS)['params']
  shapes = jax.tree.map(lambda leaf: leaf.shape, params)
  assert shapes == jax.tree.map(lambda leaf: leaf.shape, nn.unbox(expected))
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert count == accounting.account(config, 20)['total_params']


_ROM = {
  # name: the dense model, how it routes, which layers, the pattern that comes of it
  'all_top1': (dense(), rom(), None, ('M', 2)),
  'second_layers_top2': (dense(num_periods=4), rom(top_k=2), (0, 2), ('M m', 2)),
  'out': (dense(), rom(expert_projections=('out',)), None, ('M', 2)),
  'uneven': (
    dense(num_periods=3, scan_periods=False),
    rom(top_k=3, weight_at='each', expert_projections=('gate', 'x')),
    [1],
    ('m M m', 1),
  ),
  'independent': (dense(), rom(kind='independent', weight_at='each'), None, ('M', 2)),
  'mamba2': (dense('S'), rom(top_k=2, expert_projections=ALL), None, ('S', 2)),
  'hybrid': (dense('M+F S W'), rom(), (0, 2, 6), ('M+F S W m+F S W', 1)),
}


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(
      n,
      marks=[pytest.mark.extended] * (n != 'second_layers_top2'),
    )
    for n in _ROM
  ],
)
def test_routing_mamba_of_copies_is_the_dense_model(name):
  config, routing, layers, (pattern, num_periods) = _ROM[name]
  params = params_of(config)
  grown, grown_params = upcycle.to_rom(config, params, routing, KEY, layers=layers)
  assert (grown.pattern, grown.num_periods) == (pattern, num_periods)
  _check_fits(grown, grown_params)
  expected = logits(config, params)
  assert_close(logits(grown, grown_params), expected, rtol=FLOAT32_REORDERED)
  # Tokens do not all take the same experts.
  _, aux = _program(grown)(grown_params)
  for reported in aux.values():
    assert (reported.expert_load < 1).all()


_MOE = {
  'all': (dense(), MoEConfig(num_experts=3, d_ff=8, num_shared_experts=1), None, ('M E', 2)),
  'some': (
    dense('S A', num_periods=3),
    MoEConfig(num_experts=4, top_k=2, activation='swiglu', choice='token', dispatch='dropless'),
    [0, 4],
    ('S E A S A S E A', 1),
  ),
}


@pytest.mark.parametrize('name', ['all', pytest.param('some', marks=pytest.mark.extended)])
def test_layers_that_are_put_in_add_zero(name):
  config, moe, layers, (pattern, num_periods) = _MOE[name]
  params = params_of(config)
  grown, grown_params = upcycle.to_moe_mamba(config, params, moe, KEY, layers=layers)
  assert (grown.pattern, grown.num_periods) == (pattern, num_periods)
  _check_fits(grown, grown_params)
  np.testing.assert_array_equal(logits(grown, grown_params), logits(config, params))
  _, aux = _program(grown)(grown_params)
  for reported in aux.values():
    assert (reported.expert_load < 1).all()


@pytest.mark.slow
def test_step_by_step_is_as_exact():
  # First the output projections of one layer, then of all, then other projections too.
  config = dense('S')
  params = params_of(config)
  first = rom(top_k=2, expert_projections=('out',))
  step = upcycle.to_rom(config, params, first, KEY, layers=[1], expert_noise=0.1)
  expected = logits(*step)
  more = rom(top_k=2, expert_projections=('gate', 'out'))
  for routing in (first, more):
    before, step = step, upcycle.to_rom(*step, routing, KEY)
    assert (step[0].pattern, step[0].num_periods) == ('S', 2)
    _check_fits(*step)
    assert_close(logits(*step), expected, rtol=FLOAT32_REORDERED)
  # What had experts has kept them.
  kept = step[1]['periods']['layer_mamba2_0']['out_proj']['kernel']
  np.testing.assert_array_equal(kept, before[1]['periods']['layer_mamba2_0']['out_proj']['kernel'])


@pytest.mark.extended
def test_noise_is_relative_and_of_each_expert():
  config = dense(num_periods=1)
  params = params_of(config)
  _, grown = upcycle.to_rom(config, params, rom(), KEY, expert_noise=0.1)
  kernel = params['periods']['layer_mamba_0']['out_proj']['kernel'][0]
  added = grown['periods']['layer_mamba_0']['out_proj']['kernel'][0] - kernel[None]
  root_mean_square = np.sqrt(np.mean(np.square(kernel)))
  # 512 elements an expert: a standard deviation is known to 1 / sqrt(1024) = 3 %.
  np.testing.assert_allclose(added.std(axis=(1, 2)), 0.1 * root_mean_square, rtol=0.15)
  assert np.abs(np.corrcoef(added.reshape(3, -1)) - np.eye(3)).max() < 0.2


_MISTAKES = [
  (dense(), rom(weights='raw'), {}, r'rom.weights is raw; .* with uniform only'),
  (dense(), rom(dispatch='capacity'), {}, r'rom.dispatch is capacity; .* dropless or dense only'),
  (dense(), rom(kind='period'), {}, r'rom.kind is period; .* shared or independent only'),
  (dense(), rom(), {'layers': [0, 2]}, r'layers has 2; Mamba .* of this model are 0, 1$'),
  (dense('A M'), rom(), {'layers': [0]}, r'layers has 0; Mamba .* of this model are 1, 3$'),
  (dense(), rom(), {'layers': []}, r'layers is empty'),
  (dense('A'), rom(), {}, r"the pattern 'A' has no Mamba or Mamba-2 layer"),
  (dense(), rom(), {'expert_noise': float('nan')}, r'expert_noise is nan; it must be finite'),
  (
    dense(mamba=dataclasses.replace(MAMBA, rom=rom())),
    rom(),
    {},
    r'every chosen layer has experts on these projections already',
  ),
  (
    dense('M m', mamba=dataclasses.replace(MAMBA, rom=rom())),
    rom(num_experts=4),
    {},
    r'mamba.rom must be as in the layers that route: num_experts is 3 there, not 4',
  ),
]


@pytest.mark.parametrize(('config', 'routing', 'options', 'message'), _MISTAKES)
def test_what_cannot_grow_is_said_in_one_line(config, routing, options, message):
  with pytest.raises(ConfigError, match=message) as caught:
    upcycle.to_rom(config, {}, routing, KEY, **options)
  assert '\n' not in str(caught.value)


@pytest.mark.slow
def test_periods_that_share_a_decision_are_kept():
  config = dense('M M', mamba=dataclasses.replace(MAMBA, rom=rom(kind='period')))
  grown = []

  def grow(params):
    made, params = upcycle.to_moe_mamba(config, params, MoEConfig(num_experts=2), KEY)
    grown.append(made)
    return params

  jax.eval_shape(grow, jax.eval_shape(lm.LM(config).init, KEY, TOKENS)['params'])
  assert (grown[0].pattern, grown[0].num_periods) == ('M E M E', 2)


def test_feed_forward_layers_are_all_alike():
  config = dense('M E', moe=MoEConfig(num_experts=2))
  with pytest.raises(ConfigError, match=r'num_experts is 2 there, not 4'):
    upcycle.to_moe_mamba(config, {}, MoEConfig(num_experts=4), KEY)
  with pytest.raises(ConfigError, match=r'moe.routing is mixer; .* own'):
    upcycle.to_moe_mamba(dense(), {}, MoEConfig(routing='mixer'), KEY)


@pytest.mark.extended
def test_feed_forward_layers_are_put_in_step_by_step():
  config = dense(num_periods=2)
  step = config, params_of(config)
  expected = logits(*step)
  step = upcycle.to_moe_mamba(*step, MoEConfig(num_experts=2, d_ff=4), KEY, layers=[0])
  step = upcycle.to_moe_mamba(*step, step[0].moe, KEY, layers=[2])
  assert (step[0].pattern, step[0].num_periods) == ('M E', 2)
  np.testing.assert_array_equal(logits(*step), expected)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['rom', pytest.param('moe_mamba', marks=pytest.mark.extended)])
def test_training_begins_at_the_same_loss_and_parts_the_experts(kind):
  if kind == 'rom':
    config, routing, *_ = _ROM['all_top1']
    start = upcycle.to_rom(config, params_of(config), routing, KEY)
  else:
    config, routing, *_ = _MOE['all']
    start = upcycle.to_moe_mamba(config, params_of(config), routing, KEY)
  before = _losses((config, params_of(config)), 1)[0][0]
  losses, params = _losses(start, 2)
  np.testing.assert_allclose(losses[0], before, rtol=FLOAT32_REORDERED)
  assert losses[1] < losses[0]
  experts = {'rom': ('in_proj', 'out_proj'), 'moe_mamba': ('wi', 'wo')}[kind]
  layer = params['periods'][{'rom': 'layer_mamba_0', 'moe_mamba': 'layer_moe_1'}[kind]]
  for name in experts:
    for kernel in jax.tree.leaves(layer[name]):
      for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (np.abs(kernel[:, one] - kernel[:, other]).max(axis=(1, 2)) > 1e-4).all(), name
  # Routers learn, though they weigh by 1.
  router = layer['routing']['router'] if kind == 'rom' else layer['router']
  initial = start[1]['periods']['layer_mamba_0' if kind == 'rom' else 'layer_moe_1']
  initial = initial['routing']['router'] if kind == 'rom' else initial['router']
  assert np.abs(router['kernel'] - initial['kernel']).max() > 0


def _losses(model, steps):
  """Trains by gradient descent, always on the same tokens."""
  config, params = model
  module = lm.LM(config)

  def loss(params):
    hidden = module.apply({'params': params}, TOKENS).hidden
    scores = module.apply({'params': params}, hidden, method='logits')
    log_probs = jax.nn.log_softmax(scores[:, :-1])
    return -jnp.take_along_axis(log_probs, TOKENS[:, 1:, None], axis=2).mean()

  @jax.jit
  def step(params):
    value, gradients = jax.value_and_grad(loss)(params)
    return value, jax.tree.map(lambda p, g: p - 0.3 * g, params, gradients)

  losses = []
  for _ in range(steps):
    value, params = step(params)
    losses.append(float(value))
  return losses, params
