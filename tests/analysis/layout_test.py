"""What is said of an array's layout is how it lies: on devices, and in the compiled program."""

import dataclasses
import math

import jax
import pytest
from jax.sharding import PartitionSpec

from ssm_moe import sharding
from ssm_moe.analysis import layout, memory
from ssm_moe.config import (
  DataConfig,
  ExperimentConfig,
  MambaConfig,
  MeshConfig,
  ModelConfig,
  MoEConfig,
  TrainConfig,
)
from ssm_moe.training.program import Program

# No two sizes are alike, so that a shape in a program says which array it is of.
_CONFIG = ExperimentConfig(
  model=ModelConfig(
    vocab_size=96,
    d_model=20,
    pattern='M E',
    num_periods=1,
    mamba=MambaConfig(d_state=4, d_inner=56),
    moe=MoEConfig(num_experts=4, d_ff=44),
  ),
  data=DataConfig(carry_state=True),
  train=TrainConfig(batch_size=16, sequence_length=24, loss_chunk=48, accumulation_steps=2),
  mesh=MeshConfig(data=2, fsdp=2, tensor=2),
)


@pytest.fixture(autouse=True)
def _standard_promotion():
  with jax.numpy_dtype_promotion('standard'):  # optax
    yield


def _rows(mesh):
  program = Program(_CONFIG, mesh)
  state, axes = program.template, program.logical_axes
  return program, {
    'parameters': layout.rows_of(state.params, axes.params),
    'optimizer': layout.rows_of(state.opt_state, axes.opt_state),
    'carried_state': layout.rows_of(state.model_state, PartitionSpec('layers', 'batch')),
    'batch': layout.rows_of(program.batch_template, PartitionSpec('batch', 'sequence')),
  }


def test_a_mesh_without_devices_says_what_arrays_on_devices_do():
  program, rows = _rows(sharding.make_mesh(_CONFIG.mesh))
  mesh = sharding.abstract_mesh(_CONFIG.mesh)
  assert _rows(mesh)[1] == rows
  shapes = (program.template, program.batch_template)
  kinds = memory.train_step_bytes(_CONFIG, mesh, *shapes)
  for kind, of_kind in rows.items():
    assert sum(row.num_bytes for row in of_kind) == kinds[kind]
  by_name = {row.name: row for row in rows['parameters']}
  for path, leaf in jax.tree.leaves_with_path(program.init_state().params):
    row = by_name.pop(jax.tree_util.keystr(path, simple=True, separator='/'))
    (shape,) = {shard.data.shape for shard in leaf.addressable_shards}
    sizes = (math.prod(mesh.shape[name] for name in names) for names in row.mesh_axes)
    assert shape == tuple(size // parts for size, parts in zip(row.shape, sizes))
    assert leaf.addressable_shards[0].data.nbytes == row.num_bytes
  assert not by_name


def test_moments_lie_as_their_parameters_and_what_does_not_is_told():
  _, rows = _rows(sharding.abstract_mesh(_CONFIG.mesh))
  parameters, optimizer = rows['parameters'], rows['optimizer']
  moments, others = layout.follow(optimizer, parameters)
  assert len(moments) == 2 * len(parameters)
  assert {row.name.rpartition('/')[2] for row in others} == {'count'}
  moved = moments[0]._replace(mesh_axes=((), ()))
  assert layout.follow([moved, *moments[1:]], parameters) == (moments[1:], [moved])


@pytest.mark.slow
def test_activations_are_in_the_program_as_they_are_said_to_lie():
  mesh = sharding.make_mesh(_CONFIG.mesh)
  program = Program(_CONFIG, mesh)
  compiled = program.lower_train_step(program.template, program.batch_template).compile()
  text = compiled.as_text()
  for row in layout.activations(_CONFIG, mesh):
    sizes = (math.prod(mesh.shape[name] for name in names) for names in row.mesh_axes)
    shape = [size // parts for size, parts in zip(row.shape, sizes)]
    assert f'f32[{",".join(map(str, shape))}]' in text, row


def test_an_axis_that_does_not_divide_is_whole():
  config = dataclasses.replace(_CONFIG, mesh=MeshConfig(tensor=5))
  rows = layout.activations(config, sharding.abstract_mesh(config.mesh))
  assert {axes for row in rows for axes in row.mesh_axes} == {()}


def test_the_table_has_every_array_once():
  rows = layout.activations(_CONFIG, sharding.abstract_mesh(_CONFIG.mesh))
  head, *lines = layout.table({'activations': rows})
  assert len({len(line) for line in (head, *lines) if line.startswith('  ')}) == 1
  (stream,) = (line for line in lines if line.startswith('  stream'))
  told = 'stream 8 x 24 x 20 float32 batch, sequence, - data*fsdp, -, - 3,840'
  assert ' '.join(stream.split()) == told
  assert [line.split()[0] for line in lines[2:]] == [row.name.split()[0] for row in rows]
