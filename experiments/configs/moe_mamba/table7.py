r"""MoE-Mamba, table 7: Mamba and MoE in series or in parallel, 1B tokens.

python experiments/train.py --config=experiments/configs/moe_mamba/table7.py:parallel_8 \
  --config.data.valid="('C4_VALID',)"

Log-perplexity in the paper with 1, 2, 4, 8, 16, 32 experts: serial 3.76, 3.74, 3.71, 3.69, 3.67,
3.66; parallel 3.79, 3.77, 3.74, 3.72, 3.70, 3.69.
Result: not yet run.
"""

from ssm_moe import recipes

ROWS = tuple(f'{kind}_{n}' for kind in ('serial', 'parallel') for n in (1, 2, 4, 8, 16, 32))


def get_config(row: str = 'parallel_32'):
  if row not in ROWS:
    raise ValueError(f'there is no row {row!r}; there are: {", ".join(ROWS)}')
  config = recipes.moe_mamba()
  kind, num_experts = row.split('_')
  config.model.update(pattern='M E' if kind == 'serial' else 'M+E', num_periods=8)
  config.model.moe.num_experts = int(num_experts)
  return config
