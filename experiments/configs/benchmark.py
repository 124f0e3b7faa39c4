r"""The models whose training steps are timed, at the sizes of the published measurements of Mamba.

python experiments/benchmark_model.py --models=mamba_130m
python experiments/train.py --config=experiments/configs/benchmark.py:mamba_130m

Beside each sparse model stands the dense Mamba that has as many active parameters: `rom` and
`mamba_rom`, `moe_mamba` and `mamba_512`. `transformer` has as many as `mamba_130m`, but for 4 %.
Result: docs/performance.md.
"""

from ssm_moe import config as config_lib

# Pattern, periods, d_model, vocabulary, B, L.
_SIZES = {
  'mamba_130m': ('M', 24, 768, 50_277, 16, 2048),
  'mamba_512': ('M', 16, 512, 50_277, 64, 1024),
  'mamba_rom': ('M', 24, 768, 32_000, 16, 2048),
  'rom': ('M', 24, 768, 32_000, 16, 2048),
  'moe_mamba': ('M E', 8, 512, 50_277, 64, 1024),
  'transformer': ('A F', 12, 768, 50_277, 16, 2048),
}
ROWS = tuple(_SIZES)
# The dense model that a sparse one is measured against.
DENSE = {'rom': 'mamba_rom', 'moe_mamba': 'mamba_512'}


def get_config(row: str = 'mamba_130m'):
  if row not in ROWS:
    raise ValueError(f'there is no row {row!r}; there are: {", ".join(ROWS)}')
  config = config_lib.defaults()
  pattern, num_periods, d_model, vocab_size, batch_size, length = _SIZES[row]
  config.model.update(
    pattern=pattern,
    num_periods=num_periods,
    d_model=d_model,
    vocab_size=vocab_size,
    dtype='bfloat16',
    # As one program: in a loop over layers XLA copies what is kept for the backward pass.
    scan_periods=False,
  )
  if row == 'rom':
    config.model.mamba.rom.update(kind='shared', num_experts=8, top_k=1, dispatch='dropless')
  config.model.attention.num_heads = 12
  config.model.moe.update(num_experts=32, d_ff=3 * d_model, dispatch='dropless')
  # Nothing is to be learned from random tokens, and within ten steps the routers send nearly all of
  # them to one expert; without learning the fullest has 1.2 times its share.
  config.optimizer.peak_learning_rate = 1e-9
  config.train.update(batch_size=batch_size, sequence_length=length, num_steps=10_000)
  return config
