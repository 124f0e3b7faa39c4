r"""MoE-Mamba, table 4: the number of experts, 1B tokens.

python experiments/train.py --config=experiments/configs/moe_mamba/table4.py:experts_8 \
  --config.data.valid="('C4_VALID',)"

Log-perplexity in the paper: dense Mamba 3.72; 1 expert 3.75, 4 3.72, 8 3.70, 16 3.67, 32 3.67.
Result: not yet run.
"""

from ssm_moe import recipes

ROWS = ('mamba', 'experts_1', 'experts_4', 'experts_8', 'experts_16', 'experts_32', 'experts_42')


def get_config(row: str = 'experts_32'):
  if row not in ROWS:
    raise ValueError(f'there is no row {row!r}; there are: {", ".join(ROWS)}')
  config = recipes.moe_mamba()
  if row == 'mamba':
    config.model.update(pattern='M', num_periods=16)
    config.optimizer.peak_learning_rate = 1e-3
  else:
    config.model.update(pattern='M E', num_periods=8)
    config.model.moe.num_experts = int(row.removeprefix('experts_'))
  return config
