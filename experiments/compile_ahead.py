r"""Compiles a config's training step and decode step for a TPU slice, without a TPU.

python experiments/compile_ahead.py --config=experiments/configs/quickstart.py --topology=v5e:1x1

The last line on standard output is a JSON object: whether it fits, bytes per device, FLOPs,
collectives by kind with the bytes that a device sends, and a roofline estimate of a step's time; in
`detail` the rest, with the assumptions; in `decode` the same for one more token of a batch. Exit
status 3 if the training step does not fit: a closed form then stands in for what the compiler would
have said, or null.
"""

import json

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import config_flags

from ssm_moe import command_line, config, sharding
from ssm_moe.analysis import ahead, chips, memory, roofline
from ssm_moe.config import ConfigError
from ssm_moe.errors import UserError
from ssm_moe.models import accounting, lm
from ssm_moe.ops import implementation
from ssm_moe.training import mesh_checks
from ssm_moe.training.program import Program, for_mesh

_CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)
_TOPOLOGY = flags.DEFINE_string('topology', None, 'A chip and the shape of a slice, as v5e:4x4.')
_DECODE_BATCH = flags.DEFINE_integer(
  'decode_batch', None, 'Sequences of the decode step; config.train.batch_size if not given.'
)


class _DoesNotFit(UserError):
  exit_status = 3


def main():
  # The compiler needs no device, and where there is one it may be in use.
  jax.config.update('jax_platforms', 'cpu')
  experiment = config.from_flag(_CONFIG.value)
  if _TOPOLOGY.value is None:
    raise UserError('--topology is missing; give a chip and the shape of a slice, such as v5e:4x4')
  train, chip = experiment.train, chips.chip_of(_TOPOLOGY.value)
  mesh = sharding.make_mesh(experiment.mesh, chips.devices(_TOPOLOGY.value))
  mesh_checks.check_fits(experiment, mesh)
  decode_batch = train.batch_size if _DECODE_BATCH.value is None else _DECODE_BATCH.value
  devices = sharding.batch_divisor(mesh)
  if decode_batch <= 0 or decode_batch % devices:
    raise UserError(
      f'--decode_batch is {decode_batch}; it must be a positive multiple of the {devices} devices '
      'of the mesh that rows are split over'
    )

  account = accounting.account(experiment.model, train.sequence_length)
  with implementation.compiling_for('tpu'):
    program = Program(experiment, mesh)
    shapes = (program.template, program.batch_template)
    bytes_by_kind = memory.train_step_bytes(experiment, mesh, *shapes)
    tokens = train.batch_size * train.sequence_length
    report = ahead.describe(
      ahead.compile_function(program.lower_train_step, *shapes),
      chip,
      num_devices=mesh.size,
      tokens=tokens,
      model_flops=tokens * account['flops_per_token_train'],
      closed_form_bytes=bytes_by_kind,
    )
    decode = _decode(experiment, program, mesh, decode_batch, chip, account)
  report['detail'] |= {'mesh': dict(mesh.shape), 'assumptions': roofline.ASSUMPTIONS}
  print(json.dumps({'topology': _TOPOLOGY.value, **report, 'decode': decode}))
  if not report['fits']:
    needed, there = (report[key] / 2**30 for key in ('bytes_per_device', 'chip_bytes'))
    raise _DoesNotFit(
      f'the training step does not fit: it takes about {needed:.1f} GiB on each device, and '
      f'{chip.name} has {there:.0f} GiB; try {memory.remedy(experiment, mesh, bytes_by_kind)}'
    )


def _decode(experiment, program, mesh, batch, chip, account) -> dict:
  """Returns the figures of the step that takes a token of each sequence, or why there are none."""
  try:
    lm.check_causal(experiment.model, 'decoding')
  except ConfigError as error:
    return {'batch': batch, 'not_compiled': str(error)}
  model = lm.LM(experiment.model)
  rows, state_rows = sharding.batch_sharding(mesh), sharding.carried_state_sharding(mesh)
  tokens = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=rows)
  state = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=state_rows),
    jax.eval_shape(lambda: lm.initial_state(experiment.model, batch)),
  )

  def step(params, tokens, state):
    return model.apply({'params': params}, tokens, state, method='step')

  step = jax.jit(for_mesh(step, mesh), donate_argnums=2, out_shardings=(rows, state_rows))
  params = program.template.params
  figures = ahead.describe(
    ahead.compile_function(step.lower, params, tokens, state),
    chip,
    num_devices=mesh.size,
    tokens=batch,
    model_flops=batch * account['flops_per_token_forward'],
    closed_form_bytes={
      'parameters': memory.device_bytes(params),
      'state': memory.device_bytes(state),
    },
  )
  return {'batch': batch, **figures}


if __name__ == '__main__':
  command_line.run(main)
