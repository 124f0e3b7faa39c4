"""megablox without a TPU: its kernels run as Python, its tiles, and when it is chosen."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata
from jax.sharding import PartitionSpec

from ssm_moe.ops import implementation
from ssm_moe.ops.grouped_matmul import grouped_matmul, megablox
from tests import tolerances

_interpreted = functools.partial(megablox.grouped_matmul, interpret=True)
_reference = functools.partial(grouped_matmul, implementation='reference')


def _value_and_gradients(function, rows, weights, sizes, cotangent):
  value, pull = jax.vjp(lambda rows, weights: function(rows, weights, sizes), rows, weights)
  return value, *pull(cotangent)


_run = jax.jit(_value_and_gradients, static_argnums=0)


def _inputs(num_rows, inputs, outputs, num_groups, dtype='float32'):
  keys = jax.random.split(jax.random.key(5), 3)
  shapes = (num_rows, inputs), (num_groups, inputs, *outputs), (num_rows, *outputs)
  return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes)]


def _assert_equals_the_reference(rows, weights, cotangent, sizes):
  dtype = rows.dtype.name
  sizes = jnp.array(sizes, jnp.int32)
  actual = _run(_interpreted, rows, weights, sizes, cotangent)
  assert {leaf.dtype.name for leaf in actual} == {dtype}
  rows, weights, cotangent, *actual = (
    x.astype(jnp.float32) for x in (rows, weights, cotangent, *actual)
  )
  expected = _run(_reference, rows, weights, sizes, cotangent)
  rtol = tolerances.BY_DTYPE[dtype]
  tolerances.assert_close(actual, list(expected), rtol=rtol, what=str(sizes))


_ROWS = 200


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, _ROWS), min_size=5, max_size=5))
@example([0, 0, 0, 0, 0])  # no row is in any group
@example([40, 80, 120, 160, 200])
@example([0, 128, 128, 128, 128])
@example([0, 131, 131, 150, 150])
@example([0, 0, 0, 0, 200])
def test_equals_the_reference_for_any_groups(ends):
  _assert_equals_the_reference(*_inputs(_ROWS, 12, (2, 5), 5), np.diff(sorted(ends), prepend=0))


@pytest.mark.parametrize(
  'case',
  [
    pytest.param((600, 16, (24,), 1, 'bfloat16', (600,)), marks=pytest.mark.slow),
    (300, 16, (24,), 3, 'bfloat16', (170, 0, 90)),
    (7, 16, (24,), 20, 'float32', (1, 0, 2) + (0,) * 15 + (3, 0)),
    (64, 600, (700,), 3, 'float32', (20, 0, 30)),
  ],
  ids=['one_group', 'several_tiles', 'few_rows', 'wide'],
)
def test_equals_the_reference_in_shape(case, monkeypatch):
  # So little memory splits 600 into five blocks; the gradient's 700 are split anyway.
  monkeypatch.setattr(megablox, '_VMEM_BYTES', 2**19)
  *shape, sizes = case
  _assert_equals_the_reference(*_inputs(*shape), sizes)


def test_the_most_tiles_of_rows_are_told_apart():
  # What limits the number of rows: with 5000 tiles megablox would lose the last but one.
  tiles, rows = 1024, 128
  assert megablox.row_tile(tiles * rows, 512) == rows
  ends = rows * np.arange(tiles - 511, tiles + 1) - (np.arange(512) < 511)
  metadata = functools.partial(
    make_group_metadata, m=tiles * rows, tm=rows, start_group=0, num_nonzero_groups=512
  )
  with jax.numpy_dtype_promotion('standard'):
    sizes = jnp.array(np.diff(ends, prepend=0), jnp.int32)
    (_, groups, tile_ids), steps = jax.jit(lambda sizes: metadata(group_sizes=sizes))(sizes)
  visits = list(zip(groups[:steps].tolist(), tile_ids[:steps].tolist()))
  starts = [0, *ends[:-1].tolist()]
  expected = [
    (group, tile)
    for group, (start, end) in enumerate(zip(starts, ends.tolist()))
    for tile in range(start // rows, -(-end // rows))
  ]
  assert visits == expected


@pytest.mark.parametrize('num_groups', [1, 8, 512])
@pytest.mark.parametrize('num_rows', [8, 200, 4096, 100_000, 512 * 1024])
def test_tiles_bound_the_work_and_the_memory(num_rows, num_groups):
  tile = megablox.row_tile(num_rows, num_groups)
  assert -(-num_rows // tile) <= 1024
  # Each group adds at most one tile. Where groups have 512 rows, that is at most a quarter more,
  # unless so many tiles would be too many.
  if num_rows >= 512 * num_groups and num_rows <= 128 * 1024:
    assert tile * num_groups <= num_rows / 4
  for inputs, outputs, itemsize in [(4096, 14336, 2), (8192, 8192, 4), (3, 5, 4), (1000, 700, 2)]:
    tiles = megablox.gmm_tiles(tile, inputs, outputs, itemsize)
    blocks = tile * tiles.inputs + tiles.inputs * tiles.outputs + tile * tiles.outputs
    assert blocks * 2 * itemsize + tile * tiles.outputs * 4 <= 10 * 2**20
    for size, piece in [(inputs, tiles.inputs), (outputs, tiles.outputs)]:
      assert piece == size or piece % 128 == 0


def _runs_megablox(function=grouped_matmul, num_rows=64):
  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((num_rows, 8), (4, 8, 8))]
  sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
  # A new function each time: a trace is remembered, with the choice made in it.
  return 'pallas_call' in str(jax.make_jaxpr(lambda *args: function(*args))(*shapes, sizes))


def test_auto_takes_it_where_the_rows_are_on_one_tpu():
  assert not _runs_megablox()
  with implementation.on_devices(1):
    assert not _runs_megablox()
  with implementation.compiling_for('tpu'):
    assert not _runs_megablox()  # who knows for how many
    with implementation.on_devices(1):
      assert _runs_megablox()
    with implementation.on_devices(4):
      assert not _runs_megablox()


@pytest.mark.parametrize(
  ('shape', 'manual', 'expected'),
  [((2, 2), ('data', 'tensor'), True), ((2, 2), ('data',), False), ((1, 1), ('data',), False)],
)
def test_auto_takes_it_in_a_shard_map_over_all_axes(shape, manual, expected):
  mesh = jax.make_mesh(
    shape,
    ('data', 'tensor'),
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
    devices=jax.devices()[: math.prod(shape)],
  )
  function = jax.shard_map(
    grouped_matmul,
    mesh=mesh,
    in_specs=(PartitionSpec('data'), PartitionSpec(), PartitionSpec()),
    out_specs=PartitionSpec('data'),
    axis_names=set(manual),
    check_vma=False,
  )
  with implementation.compiling_for('tpu'), implementation.on_devices(math.prod(shape)):
    assert _runs_megablox(function) == expected


def test_auto_follows_the_ambient_mesh():
  for number in (1, 4):
    mesh = jax.make_mesh(
      (number,), ('data',), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:number]
    )
    with implementation.compiling_for('tpu'), jax.set_mesh(mesh):
      assert _runs_megablox() == (number == 1)


@pytest.mark.parametrize(
  ('num_rows', 'dtype', 'platform', 'devices', 'reason'),
  [
    (8, 'float32', 'cpu', 1, 'for TPUs, and this is compiled for cpu'),
    (8, 'float16', 'tpu', 1, 'take bfloat16 or float32, not float16'),
    (0, 'float32', 'tpu', 1, 'take no empty arrays'),
    (2**20, 'float32', 'tpu', 1, 'take at most 524288 rows, not 1048576'),
    (8, 'float32', 'tpu', 4, 'not split over devices'),
  ],
)
def test_says_why_it_cannot_run(num_rows, dtype, platform, devices, reason):
  shapes = (num_rows, 8), (2, 8, 8)
  rows, weights = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
  sizes = jax.ShapeDtypeStruct((2,), jnp.int32)
  with (
    implementation.compiling_for(platform),
    implementation.on_devices(devices),
    pytest.raises(NotImplementedError, match=f"cannot run 'megablox' here: .*{reason}"),
  ):
    jax.eval_shape(
      functools.partial(grouped_matmul, implementation='megablox'), rows, weights, sizes
    )
