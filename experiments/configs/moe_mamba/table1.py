r"""MoE-Mamba, table 1: dense and sparse Mamba and Transformer, 25M and 100M active parameters.

python experiments/train.py --config=experiments/configs/moe_mamba/table1.py:moe_mamba_25m \
  --config.data.valid="('C4_VALID',)"

Sizes, steps and learning rates of tables 5 and 6. Log-perplexity in the paper: transformer_25m
3.43, mamba_25m 3.34, transformer_moe_25m 3.23, moe_mamba_25m 3.19; mamba_100m 2.99,
transformer_moe_100m 2.88, moe_mamba_100m 2.81 (2.35 times fewer steps than mamba_100m).
Result: not yet run.
"""

from ssm_moe import recipes

# Pattern, periods, peak learning rate of each row; experts in the text above.
_MODELS = {
  'transformer_25m': ('A F', 8, 5e-4),
  'mamba_25m': ('M', 16, 1e-3),
  'transformer_moe_25m': ('A E', 8, 5e-4),
  'moe_mamba_25m': ('M E', 8, 5e-4),
  'mamba_100m': ('M', 32, 1e-3),
  'transformer_moe_100m': ('A E', 16, 2.5e-4),
  'moe_mamba_100m': ('M E', 16, 5e-4),
}
ROWS = tuple(_MODELS)


def get_config(row: str = 'moe_mamba_25m'):
  if row not in ROWS:
    raise ValueError(f'there is no row {row!r}; there are: {", ".join(ROWS)}')
  config = recipes.moe_mamba()
  pattern, num_periods, config.optimizer.peak_learning_rate = _MODELS[row]
  config.model.update(pattern=pattern, num_periods=num_periods)
  if row.endswith('100m'):
    config.model.d_model = 768
    config.train.update(num_steps=30_000, batch_size=1024, accumulation_steps=16)
  else:
    config.train.num_steps = 150_000
  d_model = config.model.d_model
  config.model.attention.num_heads = 8 if d_model == 512 else 12
  if pattern == 'A E':
    config.model.moe.update(num_experts=32, d_ff=4 * d_model)
  else:
    config.model.moe.update(num_experts=42, d_ff=3 * d_model)
  return config
