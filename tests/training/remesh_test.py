"""A run goes on on another mesh: the same parameters, bit for bit, and the same next losses."""

import contextlib
import dataclasses
import itertools

import chex
import jax
import numpy as np
import pytest

from ssm_moe import sharding
from ssm_moe.config import (
  DataConfig,
  ExperimentConfig,
  MambaConfig,
  MeshConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  RoMConfig,
  SampleConfig,
  TrainConfig,
  to_dict,
)
from ssm_moe.training import loop
from ssm_moe.training.checkpoint import Checkpointer
from ssm_moe.training.program import Program
from tests import tolerances
from tests.training import small_run

_STEPS = 2  # on each mesh
# Devices, and the axes of the mesh besides data.
_FEWER = [(8, {'fsdp': 8}), (4, {'fsdp': 2}), (1, {}), (2, {})]
_EXPERTS = [(8, {'expert': 8}), (2, {'expert': 2})]
_TENSOR = [(1, {}), (4, {'tensor': 4})]
_MIXED = [(8, {'expert': 4, 'fsdp': 2}), (2, {'tensor': 2})]


def _config(text, *, mesh, steps=1, **mamba):
  return ExperimentConfig(
    model=ModelConfig(
      vocab_size=264,
      d_model=8,
      pattern='M E',
      num_periods=1,
      mamba=MambaConfig(d_state=4, **mamba),
      # Groups of tokens, not of devices: the same are dropped on every mesh.
      moe=MoEConfig(num_experts=8, d_ff=16, router_groups=8, dispatch='capacity'),
    ),
    data=DataConfig(train=(text,), valid=(text,), carry_state=True),
    optimizer=OptimizerConfig(schedule='constant', warmup_fraction=0.0),
    train=TrainConfig(
      num_steps=steps, batch_size=8, sequence_length=16, log_every=1, eval_tokens=300
    ),
    mesh=MeshConfig(**mesh),
    sample=SampleConfig(num_tokens=0),
  )


@contextlib.contextmanager
def _devices(count):
  make_mesh = sharding.make_mesh
  with jax.numpy_dtype_promotion('standard'), pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop.sharding, 'make_mesh', lambda mesh: make_mesh(mesh, jax.devices()[:count]))
    yield


@pytest.mark.slow
def test_every_array_is_the_same_on_every_mesh(tmp_path):
  rom = RoMConfig(kind='shared', num_experts=8)
  there = None
  for step, (count, axes) in enumerate([*_FEWER, *_EXPERTS, *_TENSOR]):
    config = _config('text', mesh=axes, rom=rom)
    with (
      _devices(count),
      Checkpointer(tmp_path, config=to_dict(config), keep_last=1) as checkpointer,
    ):
      program = Program(config, sharding.make_mesh(config.mesh))
      if there is None:
        state = jax.tree.map(_arbitrary, program.template)
        there = jax.device_get(state)
      else:
        state = checkpointer.restore(program.template).state
      chex.assert_trees_all_equal(jax.device_get(state), there)  # exact: no tolerance
      layouts = jax.tree.map(lambda leaf: leaf.sharding, state)
      assert layouts == program.state_shardings
      checkpointer.save(step, state, metadata={})


def _arbitrary(leaf):
  values = np.random.default_rng(leaf.size).integers(0, 1000, leaf.shape).astype(leaf.dtype)
  return jax.device_put(values, leaf.sharding)


@pytest.mark.parametrize(
  'meshes',
  [
    pytest.param(_MIXED, marks=pytest.mark.slow, id='mixed'),
    pytest.param(_FEWER, marks=pytest.mark.extended, id='fewer'),
    pytest.param(_EXPERTS, marks=pytest.mark.extended, id='experts'),
    pytest.param(_TENSOR, marks=pytest.mark.extended, id='tensor'),
  ],
)
def test_a_run_goes_on_with_the_same_losses(tmp_path, meshes, capfd):
  text = small_run.write_text(tmp_path)
  for i, (count, axes) in enumerate(meshes, 1):
    with _devices(count):
      loop.train_and_evaluate(_config(text, mesh=axes, steps=_STEPS * i), tmp_path / 'moved')
  told = capfd.readouterr().err
  for (_, before), (_, after) in itertools.pairwise(meshes):
    for axis in before | after:
      if before.get(axis, 1) != after.get(axis, 1):
        assert (
          f'changed  mesh.{axis} is {before.get(axis, 1)} in the checkpoint and '
          f'{after.get(axis, 1)} now' in told
        )

  with _devices(1):
    config = _config(text, mesh={}, steps=_STEPS * len(meshes))
    train = dataclasses.replace(config.train, eval_every=_STEPS)
    loop.train_and_evaluate(dataclasses.replace(config, train=train), tmp_path / 'stayed')
  rows, expected = (small_run.rows(tmp_path / name) for name in ('moved', 'stayed'))
  assert [row['step'] for row in rows] == [row['step'] for row in expected]
  for key in ('train_loss', 'valid_loss'):
    losses, expected_losses = (
      np.array([row[key] for row in some if key in row]) for some in (rows, expected)
    )
    tolerances.assert_close(losses, expected_losses, rtol=tolerances.FLOAT32_REORDERED)
