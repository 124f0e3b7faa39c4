r"""Checks and times the ops: python experiments/benchmark_ops.py --output=benchmark.json

Prints a table: milliseconds as median, least and most over the repeats, temporaries in MiB, the
largest relative error against a float32 oracle on the data of this very run, and which part of the
speed is reached that the machine's memory, matrix units and arithmetic allow. An implementation
whose result is wrong gets no time; the status then is 1. On a CPU the sizes are small, on a GPU
those of training.
"""

import json
import pathlib
import re
import secrets
import sys

import jax
from absl import flags

from ssm_moe import command_line
from ssm_moe.analysis import (
  benchmark,
  benchmark_layers,
  benchmark_limits,
  benchmark_matmuls,
  benchmark_records,
  benchmark_scans,
  benchmark_tune,
)
from ssm_moe.analysis.benchmark_timing import Timing
from ssm_moe.errors import UserError
from ssm_moe.ops.grouped_matmul import blocks
from ssm_moe.training.losses import cross_entropy_sum

_OUTPUT = flags.DEFINE_string(
  'output', None, 'Put the records there, a JSON list; others that are there stay.'
)
_FILTER = flags.DEFINE_string(
  'filter', '', 'Run the "op/implementation shape" that this regex is in.'
)
_REPEATS = flags.DEFINE_integer('repeats', 7, 'Timings of each pass.', lower_bound=1)
_SEED = flags.DEFINE_integer(
  'seed', None, 'Of the data; a new one at each run if not given.', 0, 2**31 - 1
)
_TUNE = flags.DEFINE_string(
  'tune',
  None,
  'Only time sizes of blocks of the grouped matmul, and put them into the table there.',
)
_PEER = flags.DEFINE_bool('peer', False, 'Time mamba_ssm and torch too, where they are installed.')


def all_benchmarks(platform: str) -> list[benchmark.OpBenchmark]:
  """Returns the ops at the sizes that suit a platform."""
  if platform == 'cpu':
    return [*benchmark_scans.selective_scans(platform), *benchmark_matmuls.feed_forwards()]
  return [
    *benchmark_scans.selective_scans(platform),
    *benchmark_matmuls.grouped_matmuls(),
    *benchmark_matmuls.expert_layers(),
    *benchmark_layers.convolutions(),
    *benchmark_layers.norms(),
    *benchmark_layers.cross_entropies(cross_entropy_sum),
    *benchmark_scans.ssds(),
  ]


def chosen_names(ops: list[benchmark.OpBenchmark], pattern: str, peers: bool) -> list[list[str]]:
  """Returns which implementations of each op to run.

  Raises:
    UserError: none, or the pattern is no regular expression.
  """
  try:
    compiled = re.compile(pattern)
  except re.error as error:
    raise UserError(f'--filter={pattern}: not a regular expression: {error}') from error
  everything = [[f'{op.name}/{name} {op.shape}' for name in op.names] for op in ops]
  left_out = [set() if peers else {peer.name for peer in op.peers} for op in ops]
  chosen = [
    [name for name, title in zip(op.names, titles) if name not in out and compiled.search(title)]
    for op, titles, out in zip(ops, everything, left_out)
  ]
  if not any(chosen):
    titles = '; '.join(title for titles in everything for title in titles)
    raise UserError(f'--filter={pattern} fits none of: {titles}')
  return chosen


def tune(path: str, seed: int, timing: Timing) -> None:
  """Writes a table of block sizes, by shape and kernel the fastest first; other shapes stay."""
  command_line.check_output('tune', path)
  table = pathlib.Path(path)
  try:
    shapes = json.loads(table.read_text()) if table.exists() else {}
    blocks.parse_table(shapes)
  except (ValueError, AttributeError) as error:
    raise UserError(f'--tune={path}: there is a file that is no table of sizes: {error}') from error
  for shape, kernels in benchmark_tune.grouped_matmuls(seed, timing):
    shapes[shape] = kernels
    print(benchmark_tune.table(shape, kernels), flush=True)
    table.write_text(json.dumps(shapes, indent=1) + '\n')


def main():
  platform = jax.default_backend()
  ops = all_benchmarks(platform)
  chosen = chosen_names(ops, _FILTER.value, _PEER.value)
  earlier = benchmark_records.read('output', _OUTPUT.value)
  seed = secrets.randbelow(2**31) if _SEED.value is None else _SEED.value
  print(f'seed {seed}, {_REPEATS.value} repeats', flush=True)
  timing = Timing.on(platform, _REPEATS.value)
  if _TUNE.value is not None:
    tune(_TUNE.value, seed, timing)
    return
  records, failures, ceilings = [], 0, None
  if platform != 'cpu':
    ceilings, records = benchmark_limits.measure_ceilings(timing)
    records = list(records)
    print(
      f'copy {ceilings.bytes_per_second / 1e12:.2f} TB/s, '
      f'bfloat16 matrix product {ceilings.flops_per_second / 1e12:.0f} TFLOP/s'
    )
  for op, names in zip(ops, chosen):
    if not names:
      continue
    outcome = benchmark.run(op, names=names, seed=seed, timing=timing, ceilings=ceilings)
    if outcome.records:
      print(f'\n{benchmark_records.table(outcome.records)}\nchecked against {op.oracle_name}')
    for name, reason in outcome.skipped:
      print(f'{op.name} {op.shape}: {name} is left out: {reason}')
    for name, reason in outcome.failed:
      print(f'benchmark_ops.py: {op.name} {op.shape}: {name}: {reason}', file=sys.stderr)
    sys.stdout.flush()
    records += outcome.records
    failures += len(outcome.failed)
    # After each op: what was measured is kept if the run is cut short.
    benchmark_records.write(_OUTPUT.value, earlier, [record.as_dict() for record in records])
  if failures:
    print(f'benchmark_ops.py: seed {seed}: {failures} without a time', file=sys.stderr)
    sys.exit(1)


if __name__ == '__main__':
  command_line.run(main)
