r"""MoE-Mamba, table 3: experts inside the Mamba block, a router for each projection, 1B tokens.

python experiments/train.py --config=experiments/configs/moe_mamba/table3.py:conv_gate_half \
  --config.data.valid="('C4_VALID',)"

16 Mamba layers; `all` of them or every second (`half`) have experts, 24 or 48 a layer, split over
the projections. `_paper` is the setting of its code: experts of two matrices with 352 between, and
dropping at capacity 1; the others are linear and dropless. Log-perplexity in the paper (all, half):
conv 3.79, 3.71; gate 3.89, 3.70; out 4.05, 3.70; conv_gate 3.95, 3.72; conv_out 4.17, 3.76;
gate_out 4.16, 3.88; conv_gate_out 4.39, 3.88; dense Mamba 3.72.
Result: not yet run.
"""

from ssm_moe import recipes

_PROJECTIONS = (
  'conv',
  'gate',
  'out',
  'conv_gate',
  'conv_out',
  'gate_out',
  'conv_gate_out',
)
ROWS = tuple(
  f'{projections}_{placement}{setting}'
  for projections in _PROJECTIONS
  for placement in ('all', 'half')
  for setting in ('', '_paper')
)


def get_config(row: str = 'conv_gate_out_all'):
  if row not in ROWS:
    raise ValueError(f'there is no row {row!r}; there are: {", ".join(ROWS)}')
  config = recipes.moe_mamba()
  paper = row.endswith('_paper')
  *projections, placement = row.removesuffix('_paper').split('_')
  in_all = placement == 'all'
  config.model.update(pattern='M' if in_all else 'M m', num_periods=16 if in_all else 8)
  config.model.mamba.rom.update(
    kind='independent',
    expert_projections=tuple(projections),
    num_experts=(24 if in_all else 48) // len(projections),
    weight_at='each',
    load_balancing_coefficient=0.01,
  )
  if paper:
    config.model.mamba.rom.update(bottleneck=352, dispatch='capacity', capacity_rounding='down')
  return config
