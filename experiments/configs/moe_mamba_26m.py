r"""MoE-Mamba with 32 experts, 8 x (Mamba, MoE), 26M of 416M parameters active, 1B tokens.

python experiments/train.py --config=experiments/configs/moe_mamba_26m.py \
  --config.data.valid="('C4_VALID',)"

MoE-Mamba (https://arxiv.org/abs/2401.04081), table 4, where its log-perplexity is 3.67; the data
are made as mamba_26m.py says. The paper counts capacity on each device; here in one router group.
Result: not yet run.
"""

from ssm_moe import config as config_lib


def get_config():
  config = config_lib.defaults()
  config.model.update(
    vocab_size=50257,  # GPT-2's
    d_model=512,
    pattern='M E',
    num_periods=8,
    final_norm=False,
    tie_embeddings=False,
    initialization='moe_mamba',
    dtype='bfloat16',
  )
  config.model.norm.kind = 'layer'
  config.model.moe.update(
    num_experts=32,
    d_ff=1536,
    dispatch='capacity',
    capacity_factor=1.0,
    capacity_rounding='down',
    load_balancing_coefficient=0.01,
  )
  config.data.update(train=('data/c4',), tokenizer='gpt2/tokenizer.json')
  config.optimizer.update(
    peak_learning_rate=5e-4, beta2=0.999, clip_norm=0.5, decay_mask='all', warmup_fraction=0.01
  )
  config.train.update(num_steps=15_000, batch_size=64, sequence_length=1024)
  return config
