r"""The config of a folder that train.py or convert.py wrote, to train on from it.

python experiments/train.py --config=experiments/configs/of_workdir.py:runs/imported \
  --workdir=runs/imported --config.train.num_steps=1000

Fields are overridden as in any other config; those of the model stay, since the parameters are of
it.
Result: that of the run.
"""

import pathlib

from ssm_moe import config as config_lib
from ssm_moe.errors import UserError


def get_config(workdir: str | None = None):
  if workdir is None:
    raise UserError('give the folder after a colon: --config=.../of_workdir.py:WORKDIR')
  return config_lib.to_config_dict(config_lib.from_json(pathlib.Path(workdir) / 'config.json'))
