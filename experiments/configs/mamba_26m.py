r"""Dense Mamba, 16 x 512, the baseline of MoE-Mamba's ablations at 1B tokens.

python experiments/tokenize.py --input=C4/*.jsonl.gz --tokenizer=gpt2/tokenizer.json \
  --output=data/c4
python experiments/train.py --config=experiments/configs/mamba_26m.py \
  --config.data.valid="('C4_VALID',)"

MoE-Mamba (https://arxiv.org/abs/2401.04081): sizes and learning rate of table 5, tokens of table 4,
where its log-perplexity is 3.72 (a running mean of the training loss, in nats a token).
Result: not yet run.
"""

from ssm_moe import config as config_lib


def get_config():
  config = config_lib.defaults()
  config.model.update(
    vocab_size=50257,  # GPT-2's
    d_model=512,
    pattern='M',
    num_periods=16,
    final_norm=False,
    tie_embeddings=False,
    initialization='moe_mamba',
    dtype='bfloat16',
  )
  config.model.norm.kind = 'layer'
  config.data.update(train=('data/c4',), tokenizer='gpt2/tokenizer.json')
  config.optimizer.update(
    peak_learning_rate=1e-3, beta2=0.999, clip_norm=0.5, decay_mask='all', warmup_fraction=0.01
  )
  config.train.update(num_steps=15_000, batch_size=64, sequence_length=1024)
  return config
