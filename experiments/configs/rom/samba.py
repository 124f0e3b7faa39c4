r"""Samba 421M (Mamba, SwiGLU, windowed attention, SwiGLU), with and without Routing Mamba.

python experiments/train.py --config=experiments/configs/rom/samba.py:samba_rom \
  --config.data.valid="('VALID',)"

Samba (https://arxiv.org/abs/2406.07522) has validation perplexity 10.06 at 4K after 20B tokens;
RoM claims 23 % fewer FLOPs than a wider dense Mamba of its quality. `expand_4` is that wider model;
`ffn_moe` has 8 SwiGLU experts after the mixers, which in `rom_ffn_moe` take over the decision of
the Mamba layer before (inferred). Recipe (inferred): ssm_moe/recipes.py.
Result: not yet run.
"""

from ssm_moe import recipes

ROWS = (
  'samba',
  'samba_rom',
  'samba_expand_4',
  'samba_rom_expand_4',
  'samba_ffn_moe',
  'samba_rom_ffn_moe',
)


def get_config(row: str = 'samba_rom'):
  if row not in ROWS:
    raise ValueError(f'there is no row {row!r}; there are: {", ".join(ROWS)}')
  config = recipes.rom()
  experts = 'ffn_moe' in row
  config.model.update(d_model=1536, pattern='M E W E' if experts else 'M F W F', num_periods=6)
  config.model.attention.update(num_heads=12, window=2048)
  config.model.mlp.update(d_ff=4096, activation='swiglu')
  config.model.mamba.expand = 4 if 'expand_4' in row else 2
  if 'rom' in row:
    config.model.mamba.rom.update(kind='shared', num_experts=8)
  config.model.moe.update(
    num_experts=8,
    d_ff=4096,
    activation='swiglu',
    dispatch='dropless',
    routing='mixer' if 'rom' in row else 'own',
  )
  return config
