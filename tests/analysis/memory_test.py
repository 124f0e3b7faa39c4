"""Bytes per device: exact where an array has a layout, and what autodiff keeps elsewhere."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from ssm_moe import sharding
from ssm_moe.analysis import memory
from ssm_moe.config import (
  ExperimentConfig,
  MambaConfig,
  MeshConfig,
  ModelConfig,
  MoEConfig,
  TrainConfig,
)
from ssm_moe.training.program import Program

_MODEL = ModelConfig(
  vocab_size=64,
  d_model=32,
  pattern='M E',
  num_periods=4,
  mamba=MambaConfig(d_state=4),
  moe=MoEConfig(num_experts=4),
)
_TRAIN = TrainConfig(batch_size=32, sequence_length=64, loss_chunk=64)


@functools.cache
def _bytes(remat='none', tensor=1, **train):
  config = ExperimentConfig(
    model=dataclasses.replace(_MODEL, pattern='M', remat=remat),
    train=dataclasses.replace(_TRAIN, **train),
    mesh=MeshConfig(tensor=tensor),
  )
  mesh = sharding.make_mesh(config.mesh)
  program = Program(config, mesh)
  return memory.train_step_bytes(config, mesh, program.template, program.batch_template)


def test_parameters_moments_and_batch_are_those_of_the_arrays():
  config = ExperimentConfig(model=_MODEL, train=_TRAIN, mesh=MeshConfig(fsdp=2, expert=2))
  mesh = sharding.make_mesh(config.mesh)
  program = Program(config, mesh)
  kinds = memory.train_step_bytes(config, mesh, program.template, program.batch_template)
  state = jax.tree.map(
    lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), program.template
  )

  def held(tree):
    first = jax.devices()[0]
    shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == first)

  assert kinds['parameters'] == held(state.params)
  assert kinds['optimizer'] == held(state.opt_state)
  assert kinds['gradients'] == held(state.params)
  # int32 inputs, targets and segment_ids, a float32 mask, a bool: of 4 rows of 64.
  assert kinds['batch'] == 4 * (64 * 16 + 1)


def test_activations_follow_rows_and_rematerialisation():
  whole = _bytes()
  parts = _bytes(accumulation_steps=2)
  # What does not follow the rows, such as positions, is small.
  assert 0.45 < parts['activations'] / whole['activations'] < 0.55
  assert parts['gradients'] == 2 * whole['gradients']
  kept = _bytes(remat='period')
  # Hardly more than the residual stream of each period, [4, 64, 32] in float32.
  assert 1 < kept['activations'] / (4 * 4 * 64 * 32 * 4) < 2
  assert 0 < kept['recomputed_activations'] < whole['activations'] / 3


def test_channels_are_shared_over_tensor():
  alone, shared = _bytes(), _bytes(tensor=2, batch_size=16)
  # The same rows on a device; the residual stream is not shared, the inner channels are.
  assert 0.4 < shared['activations'] / alone['activations'] < 0.9


@pytest.mark.parametrize(
  ('message', 'gib'),
  [
    # jax 0.10
    (
      'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries '
      '(34.25G) exceeds available HBM (15.75G).',
      34.25,
    ),
    # jax 0.12
    (
      'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory '
      'required for HLO temporaries (25.5G) exceeds available HBM (15.75G). HLO module: jit_f.',
      25.5,
    ),
    (
      'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.50G of 15.75G hbm.',
      18.5,
    ),
    ('RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.', None),
  ],
)
def test_the_compilers_message_is_read(message, gib):
  expected = None if gib is None else gib * 2**30
  assert memory.required_bytes(message) == expected


def test_what_helps_most_comes_first():
  config = ExperimentConfig(model=_MODEL, train=_TRAIN)
  mesh = sharding.make_mesh(config.mesh)
  kinds = dict.fromkeys(('parameters', 'optimizer', 'gradients', 'activations'), 1)
  of_state = memory.remedy(config, mesh, kinds)
  assert of_state.startswith('more config.mesh.fsdp')
  of_activations = memory.remedy(config, mesh, kinds | {'activations': 10})
  assert of_activations.startswith('--config.model.remat=period')
  assert of_activations.endswith('more config.mesh.fsdp')
