r"""MoE-Mamba, table 2 and figure 5: active parameters in Mamba against those in experts, 1B tokens.

python experiments/train.py --config=experiments/configs/moe_mamba/table2.py:ratio_3_3 \
  --config.data.valid="('C4_VALID',)"

ratio_1_5 has 1 part of 6 in Mamba. The paper finds the loss to fall with Mamba's share, with little
to gain after 3:3, its default; ratio_6_0, eight wide Mamba layers, has log-perplexity 3.73.
Result: not yet run.
"""

from ssm_moe import recipes

# d_inner, d_ff, experts.
_SIZES = {
  'ratio_1_5': (341, 2560, 19),
  'ratio_2_4': (682, 2048, 24),
  'ratio_3_3': (1024, 1536, 32),
  'ratio_4_2': (1365, 1024, 48),
  'ratio_5_1': (1706, 512, 96),
}
ROWS = (*_SIZES, 'ratio_6_0')


def get_config(row: str = 'ratio_3_3'):
  if row not in ROWS:
    raise ValueError(f'there is no row {row!r}; there are: {", ".join(ROWS)}')
  config = recipes.moe_mamba()
  if row == 'ratio_6_0':
    config.model.update(pattern='M', num_periods=8)
    config.model.mamba.expand = 4
    return config
  d_inner, d_ff, num_experts = _SIZES[row]
  config.model.update(pattern='M E', num_periods=8)
  config.model.mamba.d_inner = d_inner
  config.model.moe.update(d_ff=d_ff, num_experts=num_experts)
  return config
