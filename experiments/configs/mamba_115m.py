r"""Dense Mamba, 24 x 768, 115M parameters: the smallest of Routing Mamba's ladder, 20B tokens.

python experiments/train.py --config=experiments/configs/mamba_115m.py \
  --config.data.valid="('VALID',)"

Routing Mamba (https://arxiv.org/abs/2506.18145); recipe (inferred) and data as ssm_moe/recipes.py
says.
Result: not yet run.
"""

from ssm_moe import recipes


def get_config():
  return recipes.rom()
