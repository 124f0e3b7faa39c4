r"""Small models of Python's standard library by bytes: minutes on two CPU cores.

python experiments/train.py --config=experiments/configs/quickstart.py

Routing Mamba with 8 experts; `quickstart.py:mamba` and `quickstart.py:moe_mamba` are the dense
Mamba and the MoE-Mamba of the same active size.
"""

from ssm_moe import config as config_lib

ROWS = ('rom', 'mamba', 'moe_mamba')


def get_config(row: str = 'rom'):
  config = config_lib.defaults()
  config.model.update(d_model=128, pattern='M', num_periods=4)
  if row == 'rom':
    config.model.mamba.rom.update(kind='shared', num_experts=8, top_k=1)
  elif row == 'moe_mamba':
    # Two Mamba layers give way to experts, wide enough that as many parameters are active.
    config.model.update(pattern='M E', num_periods=2)
    config.model.moe.update(num_experts=8, top_k=1, d_ff=464, dispatch='dropless')
  elif row != 'mamba':
    raise config_lib.ConfigError(f'there is no row {row!r}; there are: {", ".join(ROWS)}')
  config.optimizer.update(peak_learning_rate=4e-3, warmup_fraction=0.05)
  config.train.update(
    num_steps=350, batch_size=8, sequence_length=256, eval_every=175, checkpoint_every=175
  )
  return config
