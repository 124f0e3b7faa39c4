r"""Mamba-2 with Routing Mamba on all its main projections, 24 x 768.

python experiments/train.py --config=experiments/configs/rom/mamba2.py:all_projections \
  --config.data.valid="('VALID',)"

The paper finds experts on all main projections to work best with Mamba-2; sizes and recipe are
inferred (ssm_moe/recipes.py).
Result: not yet run.
"""

from ssm_moe import recipes

_PROJECTIONS = {
  'dense': (),
  'conv_gate_out': ('conv', 'gate', 'out'),
  'all_projections': ('conv', 'gate', 'out', 'x', 'dt'),
}
ROWS = tuple(_PROJECTIONS)


def get_config(row: str = 'all_projections'):
  if row not in ROWS:
    raise ValueError(f'there is no row {row!r}; there are: {", ".join(ROWS)}')
  config = recipes.rom()
  config.model.pattern = 'S'
  if _PROJECTIONS[row]:
    config.model.mamba2.rom.update(
      kind='shared', num_experts=8, expert_projections=_PROJECTIONS[row]
    )
  return config
