"""Sizes of the blocks that the kernels for Hopper work on, from a table of measurements.

`experiments/benchmark_ops.py --tune=ssm_moe/ops/grouped_matmul/hopper_blocks.json` writes it.
"""

import dataclasses
import functools
import json
import math
import pathlib
import re
from typing import Any

TABLE = pathlib.Path(__file__).parent / 'hopper_blocks.json'
# Of two shapes, the sum of doublings between their axes, above which one says nothing of the other.
_FARTHEST = 2.0


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Sizes for one kernel.

  Attributes:
    rows: Of a tile of the output, 64 or 128; for the gradient of the weights, of its M axis.
    columns: Of a tile of the output, 64 to 256.
    inner: Of the axis that is summed over, in a stage.
    stages: Blocks of each operand in shared memory.
    warps: 4 or 8. A warpgroup, 4 warps, has 64 of the rows or a multiple.
    programs: On each multiprocessor.
    band: Tiles of rows to go through before the next tile of columns.
    parts: 1, 2 or 4: a tile is written in so many, while the next is multiplied.
  """

  rows: int = 128
  columns: int = 256
  inner: int = 64
  stages: int = 4
  warps: int = 8
  programs: int = 1
  band: int = 16
  parts: int = 2


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """Sizes for the products, and for the gradients of rows and of weights."""

  product: Blocks = Blocks()
  d_rows: Blocks = Blocks()
  d_weights: Blocks = Blocks()


def default_block_sizes(num_rows: int, inputs: int, outputs: int, num_groups: int) -> BlockSizes:
  """Returns sizes for S rows of M inputs times E matrices of F outputs.

  What was measured to be best, if the nearest shape in the table is within a factor of 4 over all
  its axes; else what a rule says.
  """
  shape = (num_rows, inputs, outputs, num_groups)
  distance, nearest = min(
    ((_distance(shape, other), sizes) for other, sizes in _table()),
    key=lambda found: found[0],
    default=(math.inf, None),
  )
  return nearest if distance <= _FARTHEST else by_rule(*shape)


def shape_name(num_rows: int, inputs: int, outputs: int, num_groups: int) -> str:
  """Returns the name of a shape in the table."""
  return f'S {num_rows}, M {inputs}, F {outputs}, E {num_groups}'


def by_rule(num_rows: int, inputs: int, outputs: int, num_groups: int) -> BlockSizes:
  """Returns the sizes that are taken where nothing near has been measured."""
  few_rows = num_rows <= 64 * num_groups
  product = _tile(few_rows, outputs)
  return BlockSizes(
    # 1 to 3 % faster than in 2 parts.
    product=Blocks(parts=4) if product == Blocks() else product,
    d_rows=_tile(few_rows, inputs),
    d_weights=_tile(inputs <= 64, outputs),
  )


def _tile(few_rows: bool, columns: int) -> Blocks:
  if few_rows:
    return Blocks(rows=64, columns=256 if columns > 128 else 128, warps=4)
  if columns <= 128:
    return Blocks(columns=128)
  return Blocks()


def _distance(shape: tuple[int, ...], other: tuple[int, ...]) -> float:
  return sum(abs(math.log2(a / b)) for a, b in zip(shape, other))


@functools.cache
def _table() -> list[tuple[tuple[int, ...], BlockSizes]]:
  return parse_table(json.loads(TABLE.read_text()))


def parse_table(
  shapes: dict[str, dict[str, list[dict[str, Any]]]],
) -> list[tuple[tuple[int, ...], BlockSizes]]:
  """Returns (S, M, F, E) and the fastest sizes of each shape that has been tuned.

  Raises:
    ValueError: this is no such table.
  """
  return [(_parse_name(name), _parse_kernels(name, kernels)) for name, kernels in shapes.items()]


def _parse_name(name: str) -> tuple[int, ...]:
  match = re.fullmatch(r'S ([1-9]\d*), M ([1-9]\d*), F ([1-9]\d*), E ([1-9]\d*)', name)
  if match is None:
    raise ValueError(f'{name!r} is no shape; it must be like {shape_name(4096, 512, 1024, 8)!r}')
  return tuple(map(int, match.groups()))


def _parse_kernels(name: str, kernels: dict[str, list[dict[str, Any]]]) -> BlockSizes:
  fields = [field.name for field in dataclasses.fields(Blocks)]
  sizes = {}
  for kernel in dataclasses.fields(BlockSizes):
    try:
      fastest = {field: kernels[kernel.name][0][field] for field in fields}
    except (LookupError, TypeError) as error:
      raise ValueError(f'{name}: {kernel.name} lacks {error}') from error
    if not all(isinstance(size, int) for size in fastest.values()):
      raise ValueError(f'{name}: {kernel.name} has {fastest}; all must be integers')
    sizes[kernel.name] = Blocks(**fastest)
  return BlockSizes(**sizes)
