r"""Routing Mamba: number of experts, top_k, weights, sharing and balance; 115M parameters if top-1.

python experiments/train.py --config=experiments/configs/rom/experts.py:experts_16_top_2 \
  --config.data.valid="('VALID',)"

Inferred: the paper's own sweeps are unknown here, as are renormalisation, where the weight applies
and whether the load is balanced, which the named rows try. Recipe: ssm_moe/recipes.py.
Result: not yet run.
"""

from ssm_moe import recipes

_VARIANTS = {
  'renormalized': {'top_k': 2, 'weights': 'renormalized'},
  'weight_at_each': {'weight_at': 'each'},
  'straight_through': {'weight_at': 'straight_through'},
  'balance_loss': {'load_balancing_coefficient': 0.01},
  'selection_bias': {'score': 'sigmoid', 'selection_bias_rate': 1e-3},
  'one_router_for_two_layers': {'kind': 'period'},
}
_SWEEP = tuple(f'experts_{n}_top_{k}' for n in (1, 2, 4, 8, 16, 32) for k in (1, 2) if k <= n)
ROWS = (*_SWEEP, *_VARIANTS)


def get_config(row: str = 'experts_8_top_1'):
  if row not in ROWS:
    raise ValueError(f'there is no row {row!r}; there are: {", ".join(ROWS)}')
  config = recipes.rom()
  config.model.mamba.rom.update(kind='shared', num_experts=8)
  if row in _VARIANTS:
    config.model.mamba.rom.update(_VARIANTS[row])
  else:
    _, num_experts, _, top_k = row.split('_')
    config.model.mamba.rom.update(num_experts=int(num_experts), top_k=int(top_k))
  if config.model.mamba.rom.kind == 'period':
    config.model.update(pattern='M M', num_periods=12)
  return config
