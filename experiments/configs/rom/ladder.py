r"""Routing Mamba's ladder: dense Mamba and RoM (8 experts on conv, gate and out), 115M to 1.3B.

python experiments/train.py --config=experiments/configs/rom/ladder.py:rom_353m \
  --config.data.valid="('VALID',)"

The ends are the paper's (1.3B active, 10B total, as a dense Mamba of 2.3 times the size); the sizes
between are inferred, as is the recipe (ssm_moe/recipes.py). Trained at 4K tokens; for 8K or 16K set
config.train.sequence_length and divide batch_size.
Result: not yet run.
"""

from ssm_moe import recipes

# Layers, d_model.
_SIZES = {'115m': (24, 768), '353m': (48, 1024), '765m': (48, 1536), '1300m': (48, 2048)}
ROWS = tuple(f'{kind}_{size}' for size in _SIZES for kind in ('mamba', 'rom'))


def get_config(row: str = 'rom_115m'):
  if row not in ROWS:
    raise ValueError(f'there is no row {row!r}; there are: {", ".join(ROWS)}')
  config = recipes.rom()
  kind, size = row.split('_')
  config.model.num_periods, config.model.d_model = _SIZES[size]
  if kind == 'rom':
    config.model.mamba.rom.update(kind='shared', num_experts=8)
  return config
