r"""A small Routing Mamba on the source code of Python's standard library, by bytes.

python experiments/train.py --config=experiments/configs/quickstart.py

Result: not yet run.
"""

from ssm_moe import config as config_lib


def get_config():
  config = config_lib.defaults()
  config.model.update(d_model=128, num_periods=4)
  config.model.mamba.rom.update(kind='shared', num_experts=8, top_k=1)
  config.train.update(num_steps=300, batch_size=8, sequence_length=512)
  return config
