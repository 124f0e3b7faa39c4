"""Estimates the selective scan on a TPU that is not at hand: python experiments/estimate_scan.py

For each implementation, counts what one call moves and computes, and how long each part of a chip
would take for it at its published rate: main memory, vector units, transcendental unit, matrix
units. The longest is a bound from below: no part waits for another, and starting an operation costs
nothing. Operations are counted in the traced function, bytes in what the compiler for that chip
makes of it. The last line on standard output is a JSON object.
"""

import json

from absl import flags

from ssm_moe import command_line

with command_line.loading():
  import jax

  from ssm_moe.analysis import chips, compiled, operations
  from ssm_moe.errors import UserError
  from ssm_moe.ops import implementation
  from ssm_moe.ops.selective_scan import cases, selective_scan

_SIZES = {
  name: flags.DEFINE_integer(name, default, text, lower_bound=1)
  for name, default, text in (
    ('batch', 1, 'Rows.'),
    ('length', 4096, 'Tokens of a row.'),
    ('d_inner', 4096, 'Channels.'),
    ('d_state', 16, 'States of a channel.'),
  )
}
_IMPLEMENTATIONS = ('chunked', 'associative', 'pallas_tpu')
# Google Cloud's page on v5e: one core, four 128 x 128 matrix units, 197 TFLOP/s; hence the clock.
_CLOCK = 197e12 / (4 * 128 * 128 * 2)
# How To Scale Your Model (https://jax-ml.github.io/scaling-book/tpus): 8 x 128 lanes with four
# arithmetic units each. Of the transcendental unit, one result a lane and cycle is assumed.
_LANES, _UNITS = 8 * 128, 4


def measure(name: str, case: cases.Case, chip: chips.Chip) -> list[dict]:
  """Returns a row for the forward pass of an implementation, and one with the backward pass."""

  def arrays(key):
    found = cases.make_inputs(case, key)
    return {k: v for k, v in found.items() if k != 'dt_softplus' and v is not None}

  def forward(arguments, cotangents):
    del cotangents
    return selective_scan(**arguments, dt_softplus=True, implementation=name)

  def forward_backward(arguments, cotangents):
    ids = arguments['segment_ids']
    floating = {k: v for k, v in arguments.items() if v is not ids}
    outputs, pullback = jax.vjp(
      lambda floating: forward({**floating, 'segment_ids': ids}, None), floating
    )
    return outputs, pullback(cotangents)

  layout = jax.sharding.SingleDeviceSharding(chips.devices('v5e:1x1')[0])
  key = jax.random.key(0)
  arguments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout),
    (jax.eval_shape(arrays, key), jax.eval_shape(lambda k: cases.make_cotangents(case, k), key)),
  )
  rows = []
  for function in (forward, forward_backward):
    with implementation.compiling_for('tpu'):
      counted = operations.count(function, *arguments)
      lowered = jax.jit(function).lower(*arguments)
    try:
      hbm_bytes = compiled.read_step(lowered.compile().as_text()).hbm_bytes
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      rows.append({'implementation': name, 'pass': function.__name__, 'fits': False})
      continue
    seconds = {
      'memory': hbm_bytes / chip.hbm_bandwidth,
      'vector': counted.vector / (_CLOCK * _LANES * _UNITS),
      'transcendental': counted.transcendental / (_CLOCK * _LANES),
      # float32 products are six passes of bfloat16.
      'matrix': 6 * counted.matrix / chip.peak_flops,
    }
    rows.append(
      {
        'implementation': name,
        'pass': function.__name__,
        'fits': True,
        'hbm_bytes': hbm_bytes,
        'vector_operations': counted.vector,
        'transcendental_operations': counted.transcendental,
        'matrix_operations': counted.matrix,
        'seconds': seconds,
        'bound_seconds': max(seconds.values()),
      }
    )
  return rows


def main() -> None:
  sizes = {name: flag.value for name, flag in _SIZES.items()}
  if sizes['length'] < 2:
    raise UserError(f'--length={sizes["length"]}: it must be at least 2')
  fused = {'D': True, 'z': True, 'dt_bias': True, 'dt_softplus': True, 'h0': True}
  case = cases.Case(name='estimate', dtype='bfloat16', segments=2, **sizes, **fused)
  chip = chips.chip_of('v5e:1x1')
  print(f'v5e, {case.shape}, bfloat16, all fusions; milliseconds of each part of the chip')
  print('| Implementation | Pass | Bytes | Memory | Vector | Transcendental | Matrix |')
  print('|---|---|---:|---:|---:|---:|---:|')
  rows = []
  for name in _IMPLEMENTATIONS:
    for row in measure(name, case, chip):
      rows.append(row)
      cells = ['does not fit', *4 * '-']
      if row['fits']:
        times = [f'{1e3 * value:.2f}' for value in row['seconds'].values()]
        cells = [f'{row["hbm_bytes"] / 1e9:.2f} GB', *times]
      label = row['pass'].replace('_', ' and ')
      print(f'| `{name}` | {label} | ' + ' | '.join(cells) + ' |', flush=True)
  print(json.dumps({'chip': chip.name, 'sizes': sizes, 'rows': rows}))


if __name__ == '__main__':
  command_line.run(main)
