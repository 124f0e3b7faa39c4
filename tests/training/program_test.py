"""Batches are laid out by rows and time; a sequence that does not divide is one line."""

import dataclasses

import numpy as np
import pytest

from ssm_moe import sharding
from ssm_moe.config import ConfigError, ExperimentConfig, MeshConfig, ModelConfig, TrainConfig
from ssm_moe.training.program import Program

_CONFIG = ExperimentConfig(
  model=ModelConfig(vocab_size=32, d_model=8, num_periods=1),
  train=TrainConfig(batch_size=4, sequence_length=12),
)


def test_a_device_has_its_rows_and_its_piece_of_time():
  mesh = sharding.make_mesh(MeshConfig(data=2, sequence=4))
  program = Program(_CONFIG, mesh)
  tokens = np.arange(48, dtype=np.int32).reshape(4, 12)
  batch = program.put({'inputs': tokens, 'continues': np.zeros(4, bool)})
  assert batch['inputs'].sharding == program.batch_template['inputs'].sharding
  np.testing.assert_array_equal(batch['inputs'].addressable_shards[6].data, tokens[2:, 6:9])
  assert batch['continues'].addressable_shards[0].data.shape == (2,)


@pytest.mark.parametrize(
  ('length', 'choices'), [(12, '1, 2 or 4'), (7, '1')], ids=['several', 'one']
)
def test_a_sequence_that_does_not_divide_is_refused_with_the_choices(length, choices):
  train = dataclasses.replace(_CONFIG.train, sequence_length=length)
  config = dataclasses.replace(_CONFIG, train=train)
  mesh = sharding.make_mesh(MeshConfig(sequence=8))
  with pytest.raises(ConfigError, match=f'sequence_length, {length}; {choices} would$'):
    Program(config, mesh)
