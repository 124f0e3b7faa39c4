"""Training on a mesh is training on one device, and sends no activations but those that it must."""

import functools
import math

import jax
import numpy as np
import pytest

from ssm_moe import sharding
from ssm_moe.analysis import compiled
from ssm_moe.config import (
  AttentionConfig,
  ExperimentConfig,
  Mamba2Config,
  MambaConfig,
  MeshConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  RoMConfig,
  TrainConfig,
)
from ssm_moe.training.program import Program
from tests import tolerances

# 31 tokens are no multiple of any axis. A piece of time has eleven tokens or a multiple, as no axis
# of a parameter.
_ROWS, _LENGTH, _VOCAB = 8, 88, 31
_PIECE = 11
_STEPS = 5

_MODELS = {
  'mamba': {},
  # Whole router groups lie on a device, and some tokens are dropped.
  'moe_mamba': {'pattern': 'M E', 'moe': MoEConfig(num_experts=8, router_groups=8)},
  'dropless': {
    'pattern': 'M E',
    'moe': MoEConfig(
      num_experts=8,
      top_k=2,
      dispatch='dropless',
      activation='swiglu',
      num_shared_experts=1,
      selection_bias_rate=0.01,
    ),
  },
  'rom': {'mamba': MambaConfig(d_state=4, rom=RoMConfig(kind='shared', num_experts=8))},
  'hybrid': {
    'pattern': 'S+E W',
    'mamba2': Mamba2Config(
      head_dim=8,
      d_state=4,
      rom=RoMConfig(kind='shared', num_experts=8, selection_bias_rate=0.01),
    ),
    'attention': AttentionConfig(num_heads=2, window=4, cache_length=32),
    'moe': MoEConfig(num_experts=8, dispatch='dropless', num_shared_experts=1),
  },
}

_MESHES = {
  8: (
    {'data': 8},
    {'fsdp': 8},
    {'expert': 8},
    {'data': 2, 'tensor': 4},
    {'sequence': 8},
    {'fsdp': 2, 'expert': 4},
    {'data': 2, 'tensor': 2, 'sequence': 2},
    {'data': 2, 'fsdp': 2, 'tensor': 2},
  ),
  2: tuple({name: 2} for name in sharding.MESH_AXES),
}
_HERE = _MESHES.get(jax.device_count(), ())
# Of all, these run where time is short: each model and each axis.
_SHORT = {
  'mamba': {'data': 2, 'tensor': 2, 'sequence': 2},
  'moe_mamba': {'sequence': 8},
  'dropless': {'fsdp': 2, 'expert': 4},
  'rom': {'data': 2, 'fsdp': 2, 'tensor': 2},
  'hybrid': {'data': 8},
}


def _label(axes):
  return '_'.join(f'{name}{size}' for name, size in axes.items())


def _config(name):
  model = {'vocab_size': _VOCAB, 'd_model': 16, 'num_periods': 1, 'mamba': MambaConfig(d_state=4)}
  return ExperimentConfig(
    model=ModelConfig(**(model | _MODELS[name])),
    # Adam divides by the gradient's own size: without epsilon, rounding would move a parameter that
    # has no gradient as far as any other.
    optimizer=OptimizerConfig(peak_learning_rate=1e-2, epsilon=1e-2),
    train=TrainConfig(batch_size=_ROWS, sequence_length=_LENGTH, num_steps=50, loss_chunk=64),
  )


def _batch(seed):
  random = np.random.default_rng(seed)
  tokens = random.integers(_VOCAB, size=(_ROWS, _LENGTH + 1), dtype=np.int32)
  documents = 1 + np.cumsum(random.random((_ROWS, _LENGTH)) < 0.1, axis=1)
  return {
    'inputs': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'segment_ids': documents.astype(np.int32),
    'loss_mask': (random.random((_ROWS, _LENGTH)) < 0.8).astype(np.float32),
    'continues': np.zeros(_ROWS, bool),
  }


def _program(name, axes):
  devices = jax.devices()[: math.prod(axes.values())]
  return Program(_config(name), sharding.make_mesh(MeshConfig(**axes), devices))


@functools.cache
def _train(name, **axes):
  """Returns state and metrics of each of some steps, and by what collectives activations go."""
  program = _program(name, axes)
  state, batch = program.init_state(), program.put(_batch(0))
  step, metrics = program.compile_train_step(state, batch), []
  for i in range(_STEPS):
    state, new = step(state, program.put(_batch(i)))
    metrics.append(new)
  kinds = {
    collective.kind
    for collective in compiled.read_step(step.as_text()).collectives
    for array in collective.results
    if any(size and size % _PIECE == 0 for size in array.shape)
  }
  return *jax.device_get((state, metrics)), kinds


_CASES = [
  pytest.param(
    name,
    axes,
    id=f'{name}-{_label(axes)}',
    marks=pytest.mark.slow if _SHORT[name] == axes else pytest.mark.extended,
  )
  for name in _MODELS
  for axes in _MESHES[8]
]


def _assert_equal_to_one_device(name, axes):
  (one_state, one_metrics, _), (state, metrics, _) = _train(name, data=1), _train(name, **axes)
  tolerances.assert_close(metrics, one_metrics, rtol=tolerances.FLOAT32_REORDERED)
  tolerances.assert_close(
    (state.params, state.opt_state),
    (one_state.params, one_state.opt_state),
    rtol=tolerances.FLOAT32_REORDERED,
  )
  if name == 'moe_mamba':
    assert all(aux.dropped_fraction.min() > 0 for each in metrics for aux in each.aux.values())


@pytest.mark.skipif(jax.device_count() < 8, reason='needs eight devices')
@pytest.mark.parametrize(('name', 'axes'), _CASES)
def test_eight_devices_equal_one(name, axes):
  _assert_equal_to_one_device(name, axes)


# Otherwise only parameters, gradients, statistics, states and halos are sent.
_SENT_ACTIVATIONS = {
  'tensor': {'all-reduce'},  # sums over channels
  'expert': {'all-to-all'},  # tokens to their experts
  'sequence': {'all-gather', 'all-reduce'},  # keys and values, if there is attention
}


@pytest.mark.skipif(jax.device_count() < 8, reason='needs eight devices')
@pytest.mark.parametrize(('name', 'axes'), _CASES)
def test_activations_are_sent_where_the_layout_needs_it(name, axes):
  needed = {axis: set(_SENT_ACTIVATIONS.get(axis, ())) for axis in axes}
  if name in ('mamba', 'rom'):
    needed |= {'expert': set()}
  if name != 'hybrid':
    needed |= {'sequence': set()}
  assert _train(name, **axes)[2] <= set().union(*needed.values())


@pytest.mark.gpu
@pytest.mark.skipif(jax.device_count() != 2, reason='needs two devices')
@pytest.mark.parametrize('axes', _MESHES[2], ids=_label)
@pytest.mark.parametrize('name', _MODELS)
def test_two_gpus_equal_one(name, axes):
  _assert_equal_to_one_device(name, axes)
