r"""MoE-Mamba with 32 experts, 8 x (Mamba, MoE), 26M of 416M parameters active, 1B tokens.

python experiments/train.py --config=experiments/configs/moe_mamba_26m.py \
  --config.data.valid="('C4_VALID',)"

MoE-Mamba (https://arxiv.org/abs/2401.04081), table 4, where its log-perplexity is 3.67; the data
are made as ssm_moe/recipes.py says. The paper counts capacity on each device; here in one router
group.
Result: not yet run.
"""

from ssm_moe import recipes


def get_config():
  config = recipes.moe_mamba()
  config.model.update(pattern='M E', num_periods=8)
  return config
