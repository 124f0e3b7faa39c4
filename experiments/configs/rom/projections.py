r"""Routing Mamba: which projections have experts, and who decides; 115M active parameters.

python experiments/train.py --config=experiments/configs/rom/projections.py:conv_out \
  --config.data.valid="('VALID',)"

`_independent` has a router for each projection, the naive design that the paper argues against. The
paper studies the subsets; its numbers are unknown here, and the recipe is inferred
(ssm_moe/recipes.py).
Result: not yet run.
"""

from ssm_moe import recipes

_SUBSETS = (
  'conv',
  'gate',
  'out',
  'conv_gate',
  'conv_out',
  'gate_out',
  'conv_gate_out',
  'conv_gate_out_x',
  'conv_gate_out_dt',
  'conv_gate_out_x_dt',
)
ROWS = (*_SUBSETS, 'conv_gate_out_independent', 'conv_gate_out_x_dt_independent')


def get_config(row: str = 'conv_gate_out'):
  if row not in ROWS:
    raise ValueError(f'there is no row {row!r}; there are: {", ".join(ROWS)}')
  config = recipes.rom()
  independent = row.endswith('_independent')
  config.model.mamba.rom.update(
    kind='independent' if independent else 'shared',
    weight_at='each' if independent else 'out',
    expert_projections=tuple(row.removesuffix('_independent').split('_')),
    num_experts=8,
  )
  return config
