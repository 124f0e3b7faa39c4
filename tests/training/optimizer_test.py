import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from ssm_moe.config import MambaConfig, ModelConfig, NormConfig, OptimizerConfig, RoMConfig
from ssm_moe.models import lm
from ssm_moe.training.optimizer import decay_mask, make_optimizer, make_schedule


def _params():
  config = ModelConfig(
    d_model=8,
    pattern='ME',
    num_periods=1,
    tie_embeddings=False,
    norm=NormConfig(kind='layer'),
    mamba=MambaConfig(rom=RoMConfig(kind='shared', num_experts=2, selection_bias_rate=0.1)),
  )
  tokens = jnp.zeros((1, 2), jnp.int32)
  return jax.eval_shape(lm.LM(config).init, jax.random.key(0), tokens)['params']


def test_what_decays_is_named_by_parameter():
  mask = decay_mask(nn.unbox(_params()))
  decays = {path[-1].key for path, value in jax.tree.leaves_with_path(mask) if value}
  assert decays == {'embedding', 'head', 'kernel', 'conv1d_kernel', 'wi', 'wo'}
  kept = {path[-1].key for path, value in jax.tree.leaves_with_path(mask) if not value}
  assert kept == {'A_log', 'D', 'dt_bias', 'conv1d_bias', 'scale', 'bias', 'selection_bias'}


def test_what_is_not_learnt_never_decays():
  mask = decay_mask(nn.unbox(_params()), 'all')
  kept = {path[-1].key for path, value in jax.tree.leaves_with_path(mask) if not value}
  assert kept == {'selection_bias'}


def test_boxes_do_not_change_the_mask():
  boxed = _params()
  assert jax.tree.leaves(decay_mask(boxed)) == jax.tree.leaves(decay_mask(nn.unbox(boxed)))


@pytest.mark.parametrize(('setting', 'expected'), [('matrices', 1.0), ('all', 0.95)])
def test_decay_of_a_parameter_without_gradient(setting, expected):
  params = {'A_log': jnp.ones(3), 'x_proj': jnp.ones((2, 2))}
  optimizer = make_optimizer(
    OptimizerConfig(
      peak_learning_rate=0.5,
      weight_decay=0.1,
      decay_mask=setting,
      schedule='constant',
      warmup_fraction=0.0,
    ),
    10,
  )
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  after = optax.apply_updates(params, updates)
  # A step takes learning rate times decay, 0.5 * 0.1, off the parameter.
  np.testing.assert_allclose(after['x_proj'], np.full((2, 2), 0.95), rtol=1e-6)
  np.testing.assert_allclose(after['A_log'], np.full(3, expected), rtol=1e-6)


def test_gradients_are_clipped_by_their_global_norm():
  params = {'x_proj': jnp.zeros(4)}
  config = OptimizerConfig(clip_norm=1.0, schedule='constant', warmup_fraction=0.0)
  optimizer = make_optimizer(config, 10)
  _, state = optimizer.update({'x_proj': jnp.full(4, 50.0)}, optimizer.init(params), params)
  # A norm of 100 becomes 1: each of the four elements 0.5, of which Adam's mean keeps a tenth.
  moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (4,)]
  np.testing.assert_allclose(moments[0], np.full(4, 0.05), rtol=1e-6)


@pytest.mark.parametrize(
  ('schedule', 'points'),
  [
    # 10 steps of warm-up, then half a cosine from 1 down to 0.1: its middle is their mean.
    ('cosine', {0: 0.1, 5: 0.55, 10: 1.0, 55: 0.55, 100: 0.1}),
    # The last 20 steps fall linearly.
    ('wsd', {0: 0.1, 10: 1.0, 79: 1.0, 90: 0.55, 100: 0.1}),
    ('constant', {0: 0.1, 10: 1.0, 100: 1.0}),
  ],
)
def test_schedules(schedule, points):
  config = OptimizerConfig(peak_learning_rate=1.0, schedule=schedule, warmup_fraction=0.1)
  rate = make_schedule(config, 100)
  for step, expected in points.items():
    np.testing.assert_allclose(rate(step), expected, rtol=1e-5, err_msg=str(step))


def test_no_warmup_starts_at_the_peak():
  rate = make_schedule(OptimizerConfig(peak_learning_rate=1.0, warmup_fraction=0.0), 100)
  assert rate(0) == 1.0
