r"""Dense Mamba, 16 x 512, the baseline of MoE-Mamba's ablations at 1B tokens.

python experiments/train.py --config=experiments/configs/mamba_26m.py \
  --config.data.valid="('C4_VALID',)"

MoE-Mamba (https://arxiv.org/abs/2401.04081): sizes and learning rate of table 5, tokens of table 4,
where its log-perplexity is 3.72 (a running mean of the training loss, in nats a token). The data
are made as ssm_moe/recipes.py says.
Result: not yet run.
"""

from ssm_moe import recipes


def get_config():
  config = recipes.moe_mamba()
  config.model.update(pattern='M', num_periods=16)
  config.optimizer.peak_learning_rate = 1e-3
  return config
