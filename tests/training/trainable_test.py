"""What is not trained does not move and has no moments; dropout is of training alone."""

import dataclasses
import functools

import chex
import jax
import numpy as np
import pytest
from flax import linen as nn

from ssm_moe import sharding
from ssm_moe.config import (
  ConfigError,
  ExperimentConfig,
  LoRAConfig,
  MambaConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  RoMConfig,
  TrainConfig,
)
from ssm_moe.models import lora
from ssm_moe.training import step as step_lib
from ssm_moe.training import trainable
from ssm_moe.training.optimizer import make_optimizer
from ssm_moe.training.program import Program
from tests.tolerances import FLOAT32_REORDERED, assert_close

_ROWS, _LENGTH, _VOCAB = 8, 8, 13
_ROUTED = RoMConfig(kind='shared', num_experts=2, selection_bias_rate=0.1)


def _config(optimizer=None, lora=None, **train):
  return ExperimentConfig(
    model=ModelConfig(
      vocab_size=_VOCAB, d_model=8, num_periods=2, mamba=MambaConfig(d_state=2, rom=_ROUTED)
    ),
    optimizer=OptimizerConfig(peak_learning_rate=1e-2, **(optimizer or {})),
    lora=LoRAConfig(**(lora or {})),
    train=TrainConfig(batch_size=_ROWS, sequence_length=_LENGTH, num_steps=9, **train),
  )


def _batch():
  tokens = np.arange(_ROWS * (_LENGTH + 1)).reshape(_ROWS, -1) * 5 % _VOCAB
  return {
    'inputs': tokens[:, :-1].astype(np.int32),
    'targets': tokens[:, 1:].astype(np.int32),
    'segment_ids': np.ones((_ROWS, _LENGTH), np.int32),
    'loss_mask': np.ones((_ROWS, _LENGTH), np.float32),
    'continues': np.zeros(_ROWS, bool),
  }


@functools.cache
def _train_step(config):
  optimizer = make_optimizer(config.optimizer, config.train.num_steps)
  return jax.jit(step_lib.make_train_step(config, optimizer))


def _start(config):
  """A state before the first step; by NumPy, which compiles nothing."""
  optimizer = make_optimizer(config.optimizer, config.train.num_steps)
  init = functools.partial(step_lib.init_train_state, config, optimizer)
  random = np.random.default_rng(0)

  def value(path, leaf):
    of_model = path[0].name in ('params', 'adapters') and path[-1] != jax.tree_util.DictKey('up')
    drawn = 0.3 * random.standard_normal(leaf.shape) if of_model else np.zeros(leaf.shape)
    return drawn.astype(leaf.dtype)

  return jax.tree.map_with_path(value, nn.unbox(jax.eval_shape(init, jax.random.key(0))))


def _train(config, steps=2):
  """Returns the states before and after, and the metrics of the last step."""
  start = state = _start(config)
  for _ in range(steps):
    state, metrics = _train_step(config)(state, _batch())
  return start, state, metrics


def _moved(before, after):
  """Paths of parameters that have changed."""
  pairs = zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True)
  return {lora.path_name(path) for (path, old), new in pairs if (old != new).any()}


def _paths(tree):
  return {lora.path_name(path) for path, _ in jax.tree.leaves_with_path(tree)}


def _moments(state):
  """Paths of parameters that have moments."""
  return {path for path in _paths(state.opt_state) if path}


def test_frozen_parameters_stay_and_have_no_moments():
  # Of the router also the selection bias, which is moved by the load and not by a gradient.
  patterns = {'train_only': ('*_proj/*', '*/routing/*'), 'freeze': ('*/out_proj/*', '*/router/*')}
  start, state, metrics = _train(_config(patterns), 1)
  trained = {f'periods/layer_mamba_0/{name}_proj/kernel' for name in ('in', 'x', 'dt')}
  assert _moved(start.params, state.params) == _moments(state) == trained
  # The norm is that of what is trained, of which the first moments have a tenth.
  kept = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim][: len(trained)]
  norm = np.sqrt(sum(np.square(leaf).sum() for leaf in kept))
  assert_close(norm, 0.1 * min(np.float32(1), metrics.gradient_norm), rtol=FLOAT32_REORDERED)


@pytest.mark.extended
def test_adapters_alone_are_trained():
  config = _config(lora={'rank': 2, 'targets': ('*/in_proj/*', '*/out_proj/*')})
  start, state, metrics = _train(config)
  assert _moved(start.params, state.params) == set()
  adapters = {
    f'periods/layer_mamba_0/{name}_proj/kernel/{half}'
    for name in ('in', 'out')
    for half in ('down', 'up')
  }
  assert _moved(start.adapters, state.adapters) == _moments(state) == adapters
  # The first loss is that of the model without adapters.
  plain, _, of_plain = _train(_config(), 1)
  jax.tree.map(np.testing.assert_array_equal, plain.params, start.params)
  assert_close(_train(config, 1)[2].loss, of_plain.loss, rtol=FLOAT32_REORDERED)
  assert metrics.loss < of_plain.loss


@pytest.mark.extended
@pytest.mark.parametrize(
  'how',
  ['mesh', 'parts'],
)
def test_neither_a_mesh_nor_accumulation_changes_what_adapters_learn(how):
  config = _config(lora={'rank': 2})
  _, whole, _ = _train(config, 1)
  if how == 'parts':
    config = dataclasses.replace(
      config, train=dataclasses.replace(config.train, accumulation_steps=2)
    )
    _, other, _ = _train(config, 1)
  else:
    program = Program(config, sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    batch = program.put(_batch())
    state = jax.device_put(_start(config), program.state_shardings)
    other, _ = program.compile_train_step(program.template, batch)(state, batch)
    down = other.adapters['periods']['layer_mamba_0']['out_proj']['kernel']['down']
    assert down.sharding.spec[2] == 'tensor'
  assert_close(_first_moments(other), _first_moments(whole), rtol=FLOAT32_REORDERED)


def _first_moments(state):
  """Of the first step: a tenth of the gradients."""
  return [np.asarray(leaf) for leaf in jax.tree.leaves(state.opt_state[1][0].mu)]


def test_what_is_trained_is_counted():
  config = _config({'train_only': ('embedding',)})
  program = Program(config, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
  assert program.num_trained == _VOCAB * 8


@pytest.mark.parametrize(
  ('optimizer', 'lora', 'message'),
  [
    (
      {'freeze': ('*/A_lg',)},
      {},
      r"optimizer.freeze: '\*/A_lg' is the path of no parameter; .*_log",
    ),
    ({'train_only': ('embedding', 'x')}, {}, r"optimizer.train_only: 'x' is the path of no para"),
    ({'freeze': ('*',)}, {}, r'config.optimizer.freeze leaves no parameter to train'),
    ({}, {'rank': 1, 'targets': ('*/D',)}, r"lora.targets: '\*/D' is the path of no matrix"),
  ],
)
def test_a_mistake_is_one_line(optimizer, lora, message):
  with pytest.raises(ConfigError, match=message) as caught:
    trainable.check(_config(optimizer, lora))
  assert '\n' not in str(caught.value)


@pytest.mark.slow
def test_dropout_is_of_training_alone():
  plain, dropped = _config(), _config(dropout=0.9)
  state = _start(dropped)
  one, again, later = (
    _train_step(dropped)(state.replace(step=np.int32(step)), _batch())[1].loss for step in (0, 0, 1)
  )
  assert one == again != later  # a function of the step
  sums = [jax.jit(step_lib.make_eval_step(c))(state.params, _batch()) for c in (plain, dropped)]
  chex.assert_trees_all_equal(*sums)
  assert abs(sums[0].nats / sums[0].scored - one) > 1e-4
