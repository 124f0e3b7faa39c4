"""megablox compiled for TPUs, without one: what the compiled programs say they do."""

import functools
import importlib.metadata
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ssm_moe.ops import implementation
from ssm_moe.ops.grouped_matmul import grouped_matmul, megablox
from tests import tpu

pytestmark = list(tpu.MARKS)

_S, _M, _F, _E = 4096, 256, 384, 8
_ONE_PRODUCT = 2 * _S * _M * _F  # FLOPs of every row with one matrix
_ROWS_OF_ALL_EXPERTS = rf'\w+\[{_E},{_S}[^]]*\]'
_SHAPES = (
  jax.ShapeDtypeStruct((_S, _M), jnp.bfloat16),
  jax.ShapeDtypeStruct((_E, _M, _F), jnp.bfloat16),
  jax.ShapeDtypeStruct((_E,), jnp.int32),
  jax.ShapeDtypeStruct((_S, _F), jnp.bfloat16),
)


def _value_and_gradients(function, rows, weights, sizes, cotangent):
  value, pull = jax.vjp(lambda rows, weights: function(rows, weights, sizes), rows, weights)
  return value, *pull(cotangent)


def _compile(function, *shapes, chip='v5e:2x2'):
  with implementation.on_devices(1):
    return tpu.compile_for_one(
      functools.partial(_value_and_gradients, function), *shapes, name=chip
    )


def _every_expert(rows, weights, sizes):
  group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows.shape[0]), side='right')
  products = jnp.einsum('sm,emf->esf', rows, weights)
  return jnp.take_along_axis(products, group[None, :, None], axis=0)[0]


def _kernel_calls(text):
  return [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]


def test_forward_and_backward_do_the_work_of_one_expert():
  """Shown, of value and gradients for bfloat16 rows of 8 experts, compiled for v5e:

  - XLA counts 3 products of every row with one matrix, to 1 %: forward, rows, weights. Of a kernel
    it counts what the kernel says of itself; of a loop, one turn. Hence the rest:
  - Nothing is multiplied outside three kernels, megablox's, in loops or not; and no array has both
    the axis of experts and that of rows.
  - The steps of a kernel over rows are as many as its input has room for: a tile for each, and one
    more at each border of groups, 22 % more in the worst case.

  Not shown: the time, on which no chip was asked.
  """
  compiled = _compile(grouped_matmul, *_SHAPES)
  text = compiled.as_text()
  assert compiled.cost_analysis()['flops'] == pytest.approx(3 * _ONE_PRODUCT, rel=0.01)
  assert not re.findall(r' (?:convolution|dot)\(', text)
  assert not re.findall(_ROWS_OF_ALL_EXPERTS, text)

  kernels = _kernel_calls(text)
  names = [re.search(r'jit\((t?gmm)\)', line).group(1) for line in kernels]
  assert sorted(names) == ['gmm', 'gmm', 'tgmm']
  for line in kernels:
    assert re.search(r'"flops":"(\d+)"', line).group(1) == str(_ONE_PRODUCT)
    # The number of steps, where groups start, and the group and the tile of rows of each step.
    steps = re.search(r'constraints={s32\[\], s32\[9\]\{0\}, s32\[(\d+)\]\{0\}', line).group(1)
    assert int(steps) * megablox.row_tile(_S, _E) < 1.25 * _S


@pytest.mark.parametrize(
  ('function', 'products'),
  [
    pytest.param(_every_expert, 3 * _E, id='every_expert'),
    # Since libtpu 0.0.42 at the latest it has a kernel forward and for the rows; until 0.0.50, not
    # for the weights.
    pytest.param(
      jax.lax.ragged_dot,
      2 + _E,
      marks=pytest.mark.skipif(
        importlib.metadata.version('jax') >= '0.11', reason='1x by a kernel of the compiler'
      ),
      id='ragged_dot',
    ),
  ],
)
def test_the_count_tells_the_work_of_every_expert(function, products):
  with jax.default_matmul_precision('default'):  # else ragged_dot's kernel refuses bfloat16
    compiled = _compile(function, *_SHAPES)
  assert compiled.cost_analysis()['flops'] == pytest.approx(products * _ONE_PRODUCT, rel=0.01)
  assert re.findall(r' (?:convolution|dot)\(', compiled.as_text())
  assert re.findall(_ROWS_OF_ALL_EXPERTS, compiled.as_text())


@pytest.mark.parametrize(
  ('chip', 'shape'),
  [
    pytest.param('v5e:2x2', (4096, 1024, (2048,), 8, 'float32'), marks=pytest.mark.slow),
    pytest.param('v5e:2x2', (2048, 256, (384,), 512, 'bfloat16'), marks=pytest.mark.slow),
    ('v5e:2x2', (7, 100, (60,), 5, 'float32')),
    ('v6e:2x2', (200, 100, (2, 30), 5, 'bfloat16')),
  ],
  ids=['float32', '512_experts', 'few_rows', 'no_multiples'],
)
def test_compiles(chip, shape):
  # With matmuls at 'highest', as for all tests: megablox alone would not, in bfloat16.
  num_rows, inputs, outputs, num_groups, dtype = shape
  shapes = (
    jax.ShapeDtypeStruct((num_rows, inputs), dtype),
    jax.ShapeDtypeStruct((num_groups, inputs, *outputs), dtype),
    jax.ShapeDtypeStruct((num_groups,), jnp.int32),
    jax.ShapeDtypeStruct((num_rows, *outputs), dtype),
  )
  compiled = _compile(grouped_matmul, *shapes, chip=chip)
  assert len(_kernel_calls(compiled.as_text())) == 3


@pytest.mark.parametrize('manual', [False, True])
def test_on_a_mesh_it_needs_a_shard_map(manual):
  mesh = jax.make_mesh((4,), ('data',), (jax.sharding.AxisType.Auto,), devices=tpu.devices())
  split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec('data'), PartitionSpec()))
  layouts = (split, whole, whole)
  shapes = [x.update(sharding=layout) for x, layout in zip(_SHAPES, layouts)]

  def compile_(function):
    if manual:
      specs = [layout.spec for layout in layouts]
      function = jax.shard_map(
        function, mesh=mesh, in_specs=tuple(specs), out_specs=split.spec, check_vma=False
      )
    with implementation.compiling_for('tpu'), implementation.on_devices(mesh.size):
      return jax.jit(function).lower(*shapes).compile()

  compiled = compile_(grouped_matmul)
  if manual:
    assert len(_kernel_calls(compiled.as_text())) == 1
    assert compiled.cost_analysis()['flops'] == pytest.approx(_ONE_PRODUCT / 4, rel=0.01)
  else:
    assert not _kernel_calls(compiled.as_text())
    with pytest.raises(NotImplementedError, match='cannot be automatically partitioned'):
      compile_(megablox.grouped_matmul)
