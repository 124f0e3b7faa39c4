r"""Checks and times the ops: python experiments/benchmark_ops.py --output=benchmark.json

Prints a table: milliseconds as median, least and most over the repeats, temporaries in MiB, and the
largest relative error against the float32 reference on the data of this very run. Stops with
status 1, and no time, at a result that is wrong.
"""

import json
import pathlib
import re
import secrets
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from ssm_moe import command_line
from ssm_moe.analysis import benchmark
from ssm_moe.errors import UserError
from ssm_moe.layers import dispatch
from ssm_moe.ops.selective_scan import associative, cases, chunked, reference

_OUTPUT = flags.DEFINE_string('output', None, 'Write the records there, as a JSON list.')
_FILTER = flags.DEFINE_string('filter', '', 'Run the "op/implementation" that this regex is in.')
_REPEATS = flags.DEFINE_integer('repeats', 7, 'Timed calls of each pass.', lower_bound=1)
_SEED = flags.DEFINE_integer('seed', None, 'Of the data; a new one at each run if not given.')


def selective_scan_benchmarks() -> list[benchmark.OpBenchmark]:
  case = cases.BENCHMARK_CASE

  def make_arguments(key):
    arguments = cases.make_inputs(case, key)
    return {name: arguments[name] for name in ('x', 'dt', 'A', 'B', 'C')}, None

  def implementation(function):
    return lambda inputs, constants: function(**inputs)

  return [
    benchmark.OpBenchmark(
      name='selective_scan',
      shape=case.shape,
      dtype=case.dtype,
      implementations={
        'lax.scan': implementation(reference.selective_scan),
        'associative': implementation(associative.selective_scan),
        'chunked': implementation(chunked.selective_scan),
      },
      oracle=implementation(reference.selective_scan),
      make_arguments=make_arguments,
    )
  ]


# Of layer 03 of `quickstart.py:moe_mamba` after its 350 steps, as audit_routing.py reports it on a
# module of the standard library: the fullest expert has 1.5 times its share.
TRAINED_LOAD = (0.185, 0.117, 0.118, 0.170, 0.077, 0.119, 0.084, 0.130)


def feed_forward_benchmarks() -> list[benchmark.OpBenchmark]:
  """A Switch layer, from the routes to the combined output, beside one dense expert."""
  tokens, d_model, d_ff, num_experts = 4096, 512, 1536, len(TRAINED_LOAD)

  def make_arguments(key):
    keys = jax.random.split(key, 5)
    inputs = {
      'x': jax.random.normal(keys[0], (tokens, d_model)),
      'weights': jax.random.uniform(keys[1], (tokens, 1)),
      'wi': jax.random.normal(keys[2], (num_experts, d_model, d_ff)) / d_model**0.5,
      'wo': jax.random.normal(keys[3], (num_experts, d_ff, d_model)) / d_ff**0.5,
    }
    ends = np.round(np.cumsum(TRAINED_LOAD) * tokens)
    routes = np.searchsorted(ends, np.arange(tokens), side='right').clip(max=num_experts - 1)
    return inputs, jax.random.permutation(keys[4], jnp.asarray(routes, jnp.int32))[:, None]

  def planned(make_plan):
    def run(inputs, expert_index):
      plan = make_plan(expert_index, num_experts)
      rows = jax.nn.relu(plan.matmul(plan.dispatch(inputs['x']), inputs['wi']))
      return plan.combine(plan.matmul(rows, inputs['wo']), inputs['weights'])

    return run

  def dense(inputs, _):
    return jax.nn.relu(inputs['x'] @ inputs['wi']) @ inputs['wo']

  def one_expert(inputs):
    return {'x': inputs['x'], 'wi': inputs['wi'][0], 'wo': inputs['wo'][0]}

  return [
    benchmark.OpBenchmark(
      name='feed_forward',
      shape=f'T {tokens}, M {d_model}, F {d_ff}, E {num_experts}',
      dtype='float32',
      implementations={
        'dense, 1 expert': dense,
        'dropless, 8 experts': planned(dispatch.dropless_plan),
      },
      oracle=planned(dispatch.dense_plan),
      make_arguments=make_arguments,
      yardsticks={'dense, 1 expert': one_expert},
    )
  ]


def all_benchmarks() -> list[benchmark.OpBenchmark]:
  return [*selective_scan_benchmarks(), *feed_forward_benchmarks()]


def main():
  try:
    pattern = re.compile(_FILTER.value)
  except re.error as error:
    raise UserError(f'--filter={_FILTER.value}: not a regular expression: {error}') from error
  ops = all_benchmarks()
  chosen = [[n for n in op.implementations if pattern.search(f'{op.name}/{n}')] for op in ops]
  if not any(chosen):
    names = ', '.join(f'{op.name}/{name}' for op in ops for name in op.implementations)
    raise UserError(f'--filter={_FILTER.value} fits none of: {names}')
  if _OUTPUT.value is not None:
    command_line.check_output('output', _OUTPUT.value)
  seed = secrets.randbelow(2**31) if _SEED.value is None else _SEED.value
  print(f'seed {seed}, {_REPEATS.value} repeats')
  records = []
  for op, names in zip(ops, chosen):
    if not names:
      continue
    try:
      of_op = benchmark.run(op, names=names, repeats=_REPEATS.value, seed=seed)
    except benchmark.CheckError as error:
      print(f'benchmark_ops.py: seed {seed}: {error}', file=sys.stderr)
      sys.exit(1)
    print(benchmark.table(of_op), flush=True)
    records += of_op
  if _OUTPUT.value is not None:
    text = json.dumps([record.as_dict() for record in records], indent=2)
    pathlib.Path(_OUTPUT.value).write_text(text + '\n')


if __name__ == '__main__':
  command_line.run(main)
