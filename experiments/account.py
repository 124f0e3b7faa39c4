"""Prints a model's parameters and FLOPs as JSON.

python experiments/account.py --config=experiments/configs/rom_115m.py
"""

import json

from ml_collections import config_flags

from ssm_moe import command_line, config
from ssm_moe.models import accounting

_CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)


def main():
  experiment = config.from_flag(_CONFIG.value)
  account = accounting.account(experiment.model, experiment.train.sequence_length)
  print(json.dumps(account, indent=2))


if __name__ == '__main__':
  command_line.run(main)
