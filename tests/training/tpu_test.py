"""Training steps compile for TPU slices, and move what they should."""

import importlib.util
import math
import pathlib

import pytest

from ssm_moe import sharding
from ssm_moe.analysis import chips, compiled
from ssm_moe.config import from_config_dict
from ssm_moe.models import accounting
from ssm_moe.ops import implementation
from ssm_moe.training.program import Program
from tests import tpu

pytestmark = [*tpu.MARKS, pytest.mark.slow]

# XLA's O0. The collectives and the memory are those of its default level, in half of the time.
_LEAST_EFFORT = 9

_CONFIGS = pathlib.Path(__file__).parents[2] / 'experiments' / 'configs'


def _config(name, **changes):
  spec = importlib.util.spec_from_file_location(name, _CONFIGS / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  values = module.get_config()
  values.update_from_flattened_dict(changes)
  return from_config_dict(values)


def _compile(name, axis):
  """Returns a config over four chips along one mesh axis, and the compiled text and bytes."""
  config = _config(name, **{f'mesh.{axis}': 4})
  if axis == 'expert':
    # With as many groups as devices, what is sent has one size; else it goes in rounds.
    config = _config(name, **{'mesh.expert': 4, 'model.moe.router_groups': 4})
  if (name, axis) == ('moe_mamba_26m', 'tensor'):
    # Each chip has all rows: in one part they are 1 % too many.
    config = _config(name, **{'mesh.tensor': 4, 'train.accumulation_steps': 2})
  mesh = sharding.make_mesh(config.mesh, chips.devices('v5e:2x2'))
  with implementation.compiling_for('tpu'):
    program = Program(config, mesh)
    lowered = program.lower_train_step(program.template, program.batch_template)
    executable = lowered.compile({'optimization_level': _LEAST_EFFORT})
  return config, executable.as_text(), executable.memory_analysis().peak_memory_in_bytes


@pytest.mark.parametrize(
  ('name', 'axis'),
  [
    (name, axis)
    for name in ('quickstart', 'rom_115m', 'moe_mamba_26m')
    for axis in ('fsdp', 'tensor', 'expert')
    if (name, axis) != ('moe_mamba_26m', 'expert')  # that is the next test's
  ],
)
def test_a_training_step_compiles_and_fits_four_chips(name, axis):
  _, _, num_bytes = _compile(name, axis)
  assert 0 < num_bytes < chips.CHIPS['v5e'].hbm_bytes


def test_tokens_go_to_their_experts_and_no_expert_to_its_tokens():
  """In a step that fits, and whose matrix work is what the account says."""
  config, text, num_bytes = _compile('moe_mamba_26m', 'expert')
  assert 0 < num_bytes < chips.CHIPS['v5e'].hbm_bytes
  sizes = (config.model.d_model, config.model.moe.hidden_size(config.model.d_model))
  moved = [
    (collective.kind, array.shape)
    for collective in compiled.read_step(text).collectives
    for array in collective.results
  ]
  # All tokens of the step, whole or the part of a device, reach the experts by some collective.
  assert any(shape[-1:] == sizes[:1] and math.prod(shape) > 2**20 for _, shape in moved)
  # No matrix of an expert does, alone or in a stack, nor does its gradient.
  assert [entry for entry in moved if sorted(entry[1][-2:]) == sorted(sizes)] == []
  # Each device does a quarter of it; the scan and the convolution are elementwise.
  train = config.train
  per_token = sum(
    cost.flops_per_token
    for name, cost in accounting.by_component(config.model, train.sequence_length).items()
    if name not in ('mamba_scan', 'mamba_conv')
  )
  per_step = 3 * train.batch_size * train.sequence_length * per_token
  assert 4 * compiled.read_step(text).flops == pytest.approx(per_step, rel=0.01)
