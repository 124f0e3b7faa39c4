r"""Prints a model's parameters and FLOPs as JSON, or how its training lies on a mesh.

python experiments/account.py --config=experiments/configs/rom_115m.py
python experiments/account.py --config=experiments/configs/rom_115m.py --config.mesh.fsdp=8 --layout

With --layout: every parameter, the optimizer's moments, the batch, the carried state and the main
activations, each with its shape, dtype, logical axes, the mesh axes that split it and the bytes
that a device holds. The last line is a JSON object: the mesh, and bytes per device by kind. No
device is needed.
"""

import json

import jax
from absl import flags
from jax.sharding import PartitionSpec
from ml_collections import config_flags

from ssm_moe import command_line, config, sharding
from ssm_moe.errors import UserError
from ssm_moe.models import accounting

_CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)
_LAYOUT = flags.DEFINE_bool('layout', False, 'Print how every array lies on the mesh.')
_NUM_DEVICES = flags.DEFINE_integer(
  'num_devices', None, 'Of the mesh; as many as the axes of config.mesh need if not given.'
)


def main():
  experiment = config.from_flag(_CONFIG.value)
  if _LAYOUT.value:
    _print_layout(experiment)
    return
  if _NUM_DEVICES.value is not None:
    raise UserError('--num_devices goes with --layout')
  account = accounting.account(experiment.model, experiment.train.sequence_length)
  print(json.dumps(account, indent=2))


def _print_layout(experiment: config.ExperimentConfig) -> None:
  with command_line.loading():
    from ssm_moe.analysis import layout, memory
    from ssm_moe.training import mesh_checks
    from ssm_moe.training.program import Program

  # What runs where is not asked, and a device may be in use.
  jax.config.update('jax_platforms', 'cpu')
  if _NUM_DEVICES.value is not None and _NUM_DEVICES.value < 1:
    raise UserError(f'--num_devices is {_NUM_DEVICES.value}; it must be at least 1')
  mesh = sharding.abstract_mesh(experiment.mesh, _NUM_DEVICES.value)
  mesh_checks.check_fits(experiment, mesh)
  program = Program(experiment, mesh)
  state, axes = program.template, program.logical_axes
  parameters = layout.rows_of(state.params, axes.params)
  adapters = layout.rows_of(state.adapters, axes.adapters)
  moments, others = layout.follow(
    layout.rows_of(state.opt_state, axes.opt_state), parameters + adapters
  )
  tokens, carried = PartitionSpec('batch', 'sequence'), PartitionSpec('layers', 'batch')
  sections = {
    'parameters': parameters,
    'adapters': adapters,
    'optimizer, besides moments': others,
    'batch': layout.rows_of(program.batch_template, tokens),
    'carried state': layout.rows_of(state.model_state, carried),
    'activations, of one layer of each kind': layout.activations(experiment, mesh),
  }
  print('\n'.join(layout.table({title: rows for title, rows in sections.items() if rows})))
  held = sum(row.num_bytes for row in moments)
  print(
    f'\nThe {len(moments)} other arrays of the optimizer are moments, laid out as their '
    f'parameters: {held:,} bytes per device.'
  )
  if experiment.train.accumulation_steps > 1:
    print(
      f'A batch goes in {experiment.train.accumulation_steps} parts: activations are those of one, '
      'and gradients are there twice, of a part and their sum so far.'
    )
  totals = memory.train_step_bytes(experiment, mesh, state, program.batch_template)
  totals['sum'] = sum(totals.values())
  print(json.dumps({'mesh': dict(mesh.shape), 'bytes_per_device': totals}))


if __name__ == '__main__':
  command_line.run(main)
