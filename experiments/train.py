"""Trains a model: python experiments/train.py --config=experiments/configs/quickstart.py

Progress goes to standard error; the last line on standard output is a JSON object with final_step,
train_loss, valid_loss, valid_bits_per_byte, tokens_per_second and workdir. The same command goes on
with a run that was stopped, and evaluates a finished one again.
"""

import json

from absl import flags
from ml_collections import config_flags

from ssm_moe import command_line, config
from ssm_moe.training import loop

_CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where logs and checkpoints go; runs/<config name> if not given.'
)


def main():
  experiment = config.from_flag(_CONFIG.value)
  name = command_line.run_name(config_flags.get_config_filename(flags.FLAGS['config']))
  summary = loop.train_and_evaluate(experiment, _WORKDIR.value or f'runs/{name}')
  if summary is not None:
    print(json.dumps(summary))


if __name__ == '__main__':
  command_line.run(main)
