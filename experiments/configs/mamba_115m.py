r"""Dense Mamba, 24 x 768, 115M parameters: the smallest of Routing Mamba's ladder, 20B tokens.

python experiments/tokenize.py --input=SLIMPAJAMA/*.jsonl.gz --tokenizer=llama2/tokenizer.json \
  --output=data/slimpajama
python experiments/train.py --config=experiments/configs/mamba_115m.py \
  --config.data.valid="('VALID',)"

Routing Mamba (https://arxiv.org/abs/2506.18145); its recipe is inferred from the code of Samba, on
which it builds. 32 accumulation steps fit one GPU of 80 GB; fewer, where there are more.
Result: not yet run.
"""

from ssm_moe import config as config_lib


def get_config():
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
