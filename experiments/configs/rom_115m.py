r"""Routing Mamba, 24 x 768, 8 experts top-1: 115M of 710M parameters active, 20B tokens.

python experiments/train.py --config=experiments/configs/rom_115m.py \
  --config.data.valid="('VALID',)"

Routing Mamba (https://arxiv.org/abs/2506.18145): experts on the conv, gate and output projections,
one router a layer, no balance loss. Its recipe is inferred from the code of Samba, on which it
builds; the data are made as mamba_115m.py says. 32 accumulation steps fit one GPU of 80 GB.
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
  config.model.mamba.rom.update(kind='shared', num_experts=8, top_k=1)
  config.data.update(train=('data/slimpajama',), tokenizer='llama2/tokenizer.json')
  config.optimizer.update(peak_learning_rate=4e-4, decay_mask='all', warmup_fraction=0.01)
  config.train.update(
    seed=3407, num_steps=9_536, batch_size=512, sequence_length=4096, accumulation_steps=32
  )
  return config
