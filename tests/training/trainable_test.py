"""What is not trained does not move and has no moments; dropout is of training alone."""

import dataclasses
import functools

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
def _functions(config):
  optimizer = make_optimizer(config.optimizer, config.train.num_steps)
  init = jax.jit(lambda key: nn.unbox(step_lib.init_train_state(config, optimizer, key)))
  return init, jax.jit(step_lib.make_train_step(config, optimizer))


def _train(config, steps=2):
  """Returns the states before and after, and the metrics of the last step."""
  init, train_step = _functions(config)
  start = state = init(jax.random.key(0))
  for _ in range(steps):
    state, metrics = train_step(state, _batch())
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
  config = _config({'train_only': ('*_proj/kernel', '*/router/*'), 'freeze': ('*/out_proj/*',)})
  start, state, metrics = _train(config, 1)
  names = ('in_proj/kernel', 'x_proj/kernel', 'dt_proj/kernel')
  trained = {f'periods/layer_mamba_0/{name}' for name in names}
  trained |= {f'periods/layer_mamba_0/routing/router/{n}' for n in ('kernel', 'selection_bias')}
  assert _moved(start.params, state.params) == trained
  assert _moments(state) == trained
  # The norm is that of what is trained, of which the moments have a tenth.
  kept = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim][: len(trained)]
  norm = np.sqrt(sum(np.square(leaf).sum() for leaf in kept))
  assert_close(norm, 0.1 * min(np.float32(1), metrics.gradient_norm), rtol=FLOAT32_REORDERED)


@pytest.mark.slow
def test_a_frozen_router_keeps_its_selection_bias():
  start, state, _ = _train(_config({'freeze': ('*/routing/*',)}), 1)
  expected = {name for name in _paths(start.params) if 'routing' not in name}
  assert _moved(start.params, state.params) == _moments(state) == expected


@pytest.mark.slow
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


@pytest.mark.slow
def test_accumulation_and_a_mesh_change_nothing():
  config = _config(lora={'rank': 2})
  _, whole, _ = _train(config, 1)
  _, parts, _ = _train(dataclasses.replace(config, train=_config(accumulation_steps=2).train), 1)
  program = Program(config, sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
  batch = program.put(_batch())
  split, _ = program.compile_train_step(program.template, batch)(program.init_state(), batch)
  for state in (parts, split):
    moved, expected = (
      jax.tree.map(np.subtract, of.adapters, jax.tree.map(np.zeros_like, of.adapters))
      for of in (state, whole)
    )
    # Adam's first step is the sign of the gradient: a rounding that turns one is a whole step.
    assert_close(moved, expected, rtol=1e-2)
  layout = split.adapters['periods']['layer_mamba_0']['out_proj']['kernel']['down'].sharding
  assert layout.spec[2] == 'tensor'


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
  plain, dropped = _config(), _config(dropout=0.3)
  init, _ = _functions(plain)
  state = init(jax.random.key(0))
  one, again, later = (
    _functions(dropped)[1](state.replace(step=np.int32(step)), _batch())[1].loss
    for step in (0, 0, 1)
  )
  assert one == again != later  # a function of the step
  assert _functions(plain)[1](state, _batch())[1].loss != one
  sums = (jax.jit(step_lib.make_eval_step(c))(state.params, _batch()) for c in (plain, dropped))
  jax.tree.map(np.testing.assert_array_equal, *sums)
