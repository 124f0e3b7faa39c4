r"""Routing Mamba, 24 x 768, 8 experts top-1: 115M of 710M parameters active, 20B tokens.

python experiments/train.py --config=experiments/configs/rom_115m.py \
  --config.data.valid="('VALID',)"

Routing Mamba (https://arxiv.org/abs/2506.18145): experts on the conv, gate and output projections,
one router a layer, no balance loss; recipe (inferred) and data as ssm_moe/recipes.py says.
Result: not yet run.
"""

from ssm_moe import recipes


def get_config():
  config = recipes.rom()
  config.model.mamba.rom.update(kind='shared', num_experts=8, top_k=1)
  return config
