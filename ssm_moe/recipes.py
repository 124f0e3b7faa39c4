"""What the experiments of a paper have in common: the config files of its tables start from here.

A leaf like `config`: data only. Each returns a `ConfigDict` to be changed further.
"""

from ml_collections import config_dict

from ssm_moe import config as config_lib


def moe_mamba() -> config_dict.ConfigDict:
  """The ablations of MoE-Mamba (https://arxiv.org/abs/2401.04081): d_model 512, 1B tokens of C4.

  Appendix A and section 4.1: AdamW with weight decay on every parameter, cosine to a tenth, 1 % of
  warm-up, clipping at 0.5; LayerNorm without a last one before an untied head. The data:

  python experiments/tokenize.py --input=C4/*.jsonl.gz --tokenizer=gpt2/tokenizer.json \\
    --output=data/c4
  """
  config = config_lib.defaults()
  config.model.update(
    vocab_size=50257,  # GPT-2's
    d_model=512,
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


def rom() -> config_dict.ConfigDict:
  """Routing Mamba's main comparisons (https://arxiv.org/abs/2506.18145): 20B tokens of SlimPajama.

  Inferred: its recipe is that of the Samba code base (https://arxiv.org/abs/2406.07522), on which
  it builds; its text gives no other. 32 accumulation steps fit the smallest models on one GPU of
  80 GB; fewer, where there are more. The data:

  python experiments/tokenize.py --input=SLIMPAJAMA/*.jsonl.gz --tokenizer=llama2/tokenizer.json \\
    --output=data/slimpajama
  """
  config = config_lib.defaults()
  config.model.update(
    vocab_size=32_000,  # Llama 2's
    d_model=768,
    pattern='M',
    num_periods=24,
    dtype='bfloat16',
    remat='period',
  )
  config.data.update(train=('data/slimpajama',), tokenizer='llama2/tokenizer.json')
  config.optimizer.update(peak_learning_rate=4e-4, decay_mask='all', warmup_fraction=0.01)
  config.train.update(
    seed=3407, num_steps=9_536, batch_size=512, sequence_length=4096, accumulation_steps=32
  )
  return config
