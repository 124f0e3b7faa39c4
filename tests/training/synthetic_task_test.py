"""A run on a synthetic task, which has no text."""

import math

from ssm_moe.config import DataConfig, ExperimentConfig, ModelConfig, TrainConfig
from ssm_moe.training.metrics import read_metrics
from tests.training import small_run


def test_a_synthetic_task_has_no_bits_per_byte_and_no_sample(tmp_path, capfd):
  config = ExperimentConfig(
    model=ModelConfig(vocab_size=16, d_model=8, num_periods=1, pattern='F'),
    data=DataConfig(train=('selective_copying',), valid=('selective_copying',)),
    train=TrainConfig(
      num_steps=4, batch_size=8, sequence_length=48, log_every=2, eval_every=2, eval_tokens=800
    ),
  )
  summary = small_run.run(config, tmp_path)
  assert summary['final_step'] == 4 and summary['valid_bits_per_byte'] is None
  # Untrained, one of 14 data tokens among 16 ids.
  assert abs(summary['valid_loss'] - math.log(16)) < 0.3
  rows = read_metrics(tmp_path / 'metrics.jsonl')
  assert not [key for row in rows for key in row if 'bits' in key]
  assert capfd.readouterr().out == ''
