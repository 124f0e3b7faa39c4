"""Which sizes of blocks make the kernels of the grouped matmul fastest."""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ssm_moe.analysis.benchmark import DEFAULT_TOLERANCE, relative_error
from ssm_moe.analysis.benchmark_matmuls import GROUPED_SIZES, group_by_group, grouped_inputs
from ssm_moe.analysis.benchmark_timing import Timing, measure, milliseconds
from ssm_moe.errors import UserError
from ssm_moe.ops import gpu_kernels, implementation
from ssm_moe.ops.grouped_matmul.blocks import Blocks, by_rule, shape_name

# The products of a Routing Mamba layer: in and out, 16 x 2048 tokens.
SIZES = (*GROUPED_SIZES, (32768, 768, 3072, 8), (32768, 1536, 768, 8))
# Sizes that a kernel cannot have are passed over.
CANDIDATES = (
  Blocks(),
  Blocks(parts=4),
  Blocks(band=4),
  Blocks(band=8, parts=4),
  Blocks(inner=128, stages=2),
  Blocks(columns=128, stages=6),
  Blocks(columns=128, warps=4, stages=3, programs=2),
  Blocks(rows=64, columns=256, warps=4),
)
# Rows of a table.
_KEPT = 3
# The rule's own sizes stay first unless others are faster by more: so far timings of one kernel,
# over and over, are from those in a step.
_GAIN = 1.06


class _Compiled:
  def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]):
    with implementation.on_devices(1):
      self._function = jax.jit(function).lower(*arguments).compile()
    self._arguments = arguments

  def __call__(self) -> Any:
    return self._function(*self._arguments)

  def run(self, calls: int) -> float:
    return milliseconds(self._function, [self._arguments], calls)


def grouped_matmuls(
  seed: int, timing: Timing, candidates: Sequence[Blocks] = CANDIDATES
) -> Iterator[tuple[str, dict[str, list[dict[str, Any]]]]]:
  """Yields each shape with, by kernel, what the sizes took that gave the right result.

  Each of these is the fields of `Blocks`, `milliseconds` (median) and `tflops`, in tera-operations
  a second; the best first, which is the rule's unless another is clearly faster.

  Raises:
    UserError: the kernels cannot run here.
  """
  with implementation.on_devices(1):
    reason = gpu_kernels.unavailable(exactly=gpu_kernels.HOPPER)
  if reason is not None:
    raise UserError(f'--tune: the grouped matmul has no kernel here: {reason}')
  from ssm_moe.ops.grouped_matmul import hopper_kernels

  for num_rows, columns, features, num_groups in SIZES:
    key, key_dy = jax.random.split(jax.random.key(seed))
    inputs, group_sizes = grouped_inputs(key, num_rows, columns, features, num_groups)
    rows, weights = inputs['rows'], inputs['weights']
    dy = jax.random.normal(key_dy, (num_rows, features), rows.dtype)
    kernels = {
      'product': (hopper_kernels.multiply, (rows, weights, group_sizes), {}),
      'd_rows': (hopper_kernels.multiply, (dy, weights, group_sizes), {'transposed': True}),
      'd_weights': (hopper_kernels.sum_outer_products, (rows, dy, group_sizes), {}),
    }
    expected = _expected(inputs, group_sizes, dy)
    rule = by_rule(num_rows, columns, features, num_groups)
    flops = 2 * num_rows * columns * features
    yield (
      shape_name(num_rows, columns, features, num_groups),
      {
        name: _best(
          kernel, expected[name], _with_first(getattr(rule, name), candidates), timing, flops
        )
        for name, kernel in kernels.items()
      },
    )


def _with_first(blocks: Blocks, candidates: Sequence[Blocks]) -> list[Blocks]:
  return [blocks, *(other for other in candidates if other != blocks)]


def _expected(inputs, group_sizes, dy) -> dict[str, Any]:
  with jax.default_matmul_precision('highest'):
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (inputs, dy))
    run = jax.jit(lambda inputs, dy: _with_gradients(inputs, group_sizes, dy))
    y, gradients = run(*wide)
  return {'product': y, 'd_rows': gradients['rows'], 'd_weights': gradients['weights']}


def _with_gradients(inputs, group_sizes, dy):
  y, pullback = jax.vjp(lambda inputs: group_by_group(inputs, group_sizes), inputs)
  return y, pullback(dy)[0]


def _best(kernel, expected, candidates, timing, flops) -> list[dict[str, Any]]:
  """Returns rows of the table: the first candidate's, if it is not much slower, then by time."""
  function, arguments, options = kernel

  def compile_for(blocks):
    return _Compiled(lambda *a: function(*a, blocks, **options), arguments)

  compiled = {}
  with concurrent.futures.ThreadPoolExecutor() as pool:
    calls = {blocks: pool.submit(compile_for, blocks) for blocks in candidates}
  for blocks, call in calls.items():
    try:
      call = call.result()
      error = relative_error(call(), expected)
    except Exception as error:  # of the compiler, in many forms
      print(f'{blocks} is passed over: {(str(error).splitlines() or [""])[0][:120]}')
      continue
    if not error <= DEFAULT_TOLERANCE['bfloat16']:
      print(f'{blocks} is passed over: relative error {error:.3g}')
      continue
    compiled[blocks] = call
  times = {blocks: sorted(found) for blocks, found in measure(compiled, timing).items()}
  rows = [
    dataclasses.asdict(blocks)
    | {'milliseconds': (ms := found[len(found) // 2]), 'tflops': flops / ms / 1e9}
    for blocks, found in times.items()
  ]
  return in_order(rows)[:_KEPT]


def in_order(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns the rows by time, but the first of `rows` first, if it is not much slower."""
  ordered = sorted(rows, key=lambda row: row['milliseconds'])
  if rows and rows[0]['milliseconds'] <= _GAIN * ordered[0]['milliseconds']:
    ordered.remove(rows[0])
    ordered.insert(0, rows[0])
  return ordered


def table(shape: str, kernels: dict[str, list[dict[str, Any]]], *, most: int = 3) -> str:
  """Returns the best sizes as lines."""
  lines = [shape]
  for name, rows in kernels.items():
    for row in rows[:most]:
      sizes = ' '.join(f'{k} {v}' for k, v in row.items() if k not in ('milliseconds', 'tflops'))
      lines.append(f'  {name:9} {row["milliseconds"]:.3f} ms {row["tflops"]:4.0f} TFLOP/s  {sizes}')
  return '\n'.join(lines)
