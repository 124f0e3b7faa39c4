r"""Which design is better, at a size for CPUs: equal active parameters, equal tokens, by bytes.

for row in mamba moe_1 moe_4 moe_16 parallel_16 inner rom_shared rom_independent; do
  for seed in 0 1 2; do
    python experiments/train.py --config=experiments/configs/ordering.py:$row \
      --config.train.seed=$seed --workdir=runs/ordering/${row}_$seed
  done
done
python experiments/compare.py mamba='runs/ordering/mamba_*' 'runs/ordering/*' \
  --plot=ordering.png

The orders to look for are MoE-Mamba's (more experts are better, one is worse than dense Mamba,
serial is better than parallel, inner MoE is worse) and Routing Mamba's (shared is better than
independent). The result is in the README.
Result: in the README.
"""

from ssm_moe import config as config_lib

_MOE = {'top_k': 1, 'd_ff': 464, 'dispatch': 'dropless'}
_INDEPENDENT = {'kind': 'independent', 'weight_at': 'each', 'num_experts': 8}
ROWS = (
  'mamba',
  'moe_1',
  'moe_4',
  'moe_16',
  'parallel_16',
  'inner',
  'rom_shared',
  'rom_independent',
)


def get_config(row: str = 'mamba'):
  if row not in ROWS:
    raise ValueError(f'there is no row {row!r}; there are: {", ".join(ROWS)}')
  config = config_lib.defaults()
  config.model.update(d_model=128, pattern='M', num_periods=4)
  kind, _, argument = row.partition('_')
  if kind in ('moe', 'parallel'):
    # Two Mamba layers give way to experts, wide enough that as many parameters are active.
    config.model.update(pattern='M E' if kind == 'moe' else 'M+E', num_periods=2)
    config.model.moe.update(num_experts=int(argument), **_MOE)
  elif kind == 'inner':
    # As MoE-Mamba's better placement: every second layer, 48 experts over three projections.
    config.model.update(pattern='M m', num_periods=2)
    config.model.mamba.rom.update(_INDEPENDENT | {'num_experts': 16})
    config.model.mamba.rom.load_balancing_coefficient = 0.01
  elif argument == 'shared':
    config.model.mamba.rom.update(kind='shared', num_experts=8)
  elif argument == 'independent':
    config.model.mamba.rom.update(_INDEPENDENT)
  config.optimizer.update(peak_learning_rate=4e-3, warmup_fraction=0.05)
  config.train.update(
    num_steps=400, batch_size=8, sequence_length=256, eval_every=40, eval_tokens=30_000
  )
  config.train.update(checkpoint_every=400)
  config.sample.num_tokens = 0
  return config
