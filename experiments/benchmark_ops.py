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

from absl import flags

from ssm_moe import command_line
from ssm_moe.analysis import benchmark
from ssm_moe.errors import UserError
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


def all_benchmarks() -> list[benchmark.OpBenchmark]:
  return [*selective_scan_benchmarks()]


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
    path = pathlib.Path(_OUTPUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([record.as_dict() for record in records], indent=2) + '\n')


if __name__ == '__main__':
  command_line.run(main)
