"""The kernels for Hopper: compiled here, without a GPU; run where there is one."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from ssm_moe.ops import gpu_kernels, implementation
from ssm_moe.ops.grouped_matmul import grouped_matmul, triton_gpu
from tests import gpu, hopper, tolerances
from tests.ops.grouped_matmul import orders

# A block of threads gets no more of an H100's or H200's 228 KB.
_SHARED_BYTES = 227 * 1024


def _value_and_gradients(function, rows, weights, sizes, cotangent):
  value, pull = jax.vjp(lambda rows, weights: function(rows, weights, sizes), rows, weights)
  return value, *pull(cotangent)


def _shapes(num_rows, inputs, outputs, num_groups, dtype='bfloat16'):
  return (
    jax.ShapeDtypeStruct((num_rows, inputs), dtype),
    jax.ShapeDtypeStruct((num_groups, inputs, *outputs), dtype),
    jax.ShapeDtypeStruct((num_groups,), jnp.int32),
    jax.ShapeDtypeStruct((num_rows, *outputs), dtype),
  )


_SHAPES = {
  '8_experts': (65536, 1024, (4096,), 8),
  '64_experts': (65536, 768, (3072,), 64),
  '512_experts': (65536, 768, (3072,), 512),
  'few_rows': (7, 64, (128,), 3),
  'no_multiples': (200, 12, (2, 5), 4),
  'float16': (777, 1024, (40,), 3, 'float16'),
}


def _ordered(gathers, rows, weights, sizes, cotangent):
  order = orders.random_order(len(rows), 1)
  function = functools.partial(
    triton_gpu.grouped_matmul, take=order, put=order, gathers=triton_gpu.Gathers(*gathers)
  )
  cotangent = cotangent.reshape(len(rows), 1, *cotangent.shape[1:])
  return _value_and_gradients(function, rows, weights, sizes, cotangent)


_GATHERS = {'rows': (True, False), 'dy': (False, True), 'both': (True, True)}


@hopper.needs_triton
@pytest.mark.parametrize(
  ('case', 'gathers'),
  [
    ('8_experts', 'unordered'),
    *((case, 'none') for case in _SHAPES),
    ('64_experts', 'both'),
    # Half a minute of compilation: variations of these.
    *(
      pytest.param(case, gathers, marks=pytest.mark.slow)
      for case, gathers in [
        *((case, 'unordered') for case in _SHAPES if case != '8_experts'),
        *(('64_experts', gathers) for gathers in ('rows', 'dy')),
        *((case, 'both') for case in ('few_rows', 'no_multiples')),
      ]
    ),
  ],
)
def test_compiles_for_hopper(case, gathers):
  """Shown, of value and gradients: three kernels, which

  - keep everything in registers: not a byte is spilled,
  - fit into a multiprocessor's shared memory,
  - read by TMA what is in order, and the rest by copies of 16 bytes, which they wait for and fence
    before they multiply,
  - multiply by warpgroups, and write 16 bytes at a time, what a tile has beyond its group left out,
  - wait for all multiplications in one place only, the end of a tile: else they would come one
    after the other,
  - and then start on the next tile before they write.
  """
  rows, dy = _GATHERS.get(gathers, (False, False))
  function = functools.partial(_value_and_gradients, grouped_matmul)
  if gathers != 'unordered':
    function = functools.partial(_ordered, (rows, dy))
  kernels = hopper.compile_kernels(function, *_shapes(*_SHAPES[case]))
  assert [kernel.name for kernel in kernels] == [
    'product_kernel',
    'product_kernel',
    'gradient_kernel',
  ]
  gathered = (rows, dy, rows + dy)
  in_order = (1 + (not rows), 1 + (not dy), 2 - rows - dy)
  for kernel, copied, by_tma in zip(kernels, gathered, in_order):
    assert kernel.spilled_bytes == 0
    assert kernel.shared_bytes <= _SHARED_BYTES
    bulk = set(re.findall(r'cp\.async\.bulk\.tensor\.\dd[^\n]*?(%rd\d+)', kernel.ptx))
    assert len(bulk) == by_tma
    copies = re.findall(r'cp\.async\.c\w\.\S+ \[[^,]*\], \[[^,]*\], (\w+)', kernel.ptx)
    assert bool(copies) == bool(copied)
    assert all(size == '0x10' for size in copies)
    stores = re.findall(r'(\S+)\s+(st\.global\.\S+)', kernel.ptx)
    assert stores and all(p[0] == '@' and op == 'st.global.v4.b32' for p, op in stores)
    steps = kernel.ptx.split('wgmma.commit_group')[:-1]
    assert steps and all('wgmma.mma_async' in step for step in steps)
    ready = r'cp\.async\.wait_group[\s\S]*fence\.proxy\.async[\s\S]*bar\.sync[\s\S]*wgmma\.mma'
    assert all(bool(re.search(ready, step)) == bool(copied) for step in steps)
    parts = re.split(r'wgmma\.wait_group\S* +0;', kernel.ptx.replace('\t', ' '))
    assert len(parts) == 2
    assert re.search(r'wgmma\.mma_async|st\.global', parts[1])[0] == 'wgmma.mma_async'


def _with_epilogue(epilogue, rows, weights, sizes, cotangent):
  order = orders.random_order(len(rows), 1)
  options = {'relu': True} if epilogue == 'relu' else {'combine_weights': jnp.ones((len(rows), 1))}
  function = functools.partial(triton_gpu.grouped_matmul, take=order, put=order, **options)
  return _value_and_gradients(function, rows, weights, sizes, cotangent.reshape(len(rows), 1, -1))


@hopper.needs_triton
@pytest.mark.parametrize('epilogue', ['relu', 'combine_weights'])
def test_an_epilogue_compiles_for_hopper(epilogue):
  """Without a byte spilled; weights are read once a row, and nothing is added to gradients."""
  shapes = _shapes(*_SHAPES['8_experts'])
  kernels = hopper.compile_kernels(functools.partial(_with_epilogue, epilogue), *shapes)
  plain = hopper.compile_kernels(functools.partial(_ordered, (False, False)), *shapes)
  assert [kernel.spilled_bytes for kernel in kernels] == [0, 0, 0]
  assert kernels[0].ptx != plain[0].ptx
  assert [kernel.ptx for kernel in kernels[1:]] == [kernel.ptx for kernel in plain[1:]]
  instruction = {'relu': r'\bmax\.f32', 'combine_weights': r'\bmul\.\S*f32'}[epilogue]
  counts = [len(re.findall(instruction, each[0].ptx)) for each in (kernels, plain)]
  assert counts[0] > counts[1]


def _kernels_chosen(shapes, name='auto'):
  jaxpr = jax.make_jaxpr(lambda *args: grouped_matmul(*args, implementation=name))(*shapes[:3])
  return str(jaxpr).count('triton_kernel_call')


@hopper.needs_triton
def test_auto_takes_it_where_the_rows_are_on_one_hopper():
  shapes = _shapes(64, 8, (8,), 4)
  assert not _kernels_chosen(shapes)
  with implementation.compiling_for('gpu'):
    with implementation.on_devices(1):
      assert _kernels_chosen(shapes)
      assert not _kernels_chosen(_shapes(64, 8, (8,), 4, 'float32'))
    with implementation.on_devices(4):
      assert not _kernels_chosen(shapes)


@pytest.mark.parametrize(
  ('shape', 'platform', 'devices', 'reason'),
  [
    ((8, 8, (8,), 2, 'bfloat16'), 'cpu', 1, 'are for GPUs, and this is for cpu'),
    ((8, 8, (8,), 2, 'float32'), 'gpu', 1, 'take bfloat16 or float16, not float32'),
    ((0, 8, (8,), 2, 'bfloat16'), 'gpu', 1, 'take no empty arrays'),
    ((8, 8, (8,), 1025, 'bfloat16'), 'gpu', 1, 'take at most 1024 groups, not 1025'),
    ((8, 8, (8,), 2, 'bfloat16'), 'gpu', 4, 'not split over devices'),
  ],
)
def test_says_why_it_cannot_run(shape, platform, devices, reason, monkeypatch):
  monkeypatch.setattr(gpu_kernels, '_missing_package', lambda: None)
  with (
    implementation.compiling_for(platform),
    implementation.on_devices(devices),
    pytest.raises(NotImplementedError, match=f"cannot run 'triton_gpu' here: .*{reason}"),
  ):
    jax.eval_shape(
      functools.partial(grouped_matmul, implementation='triton_gpu'), *_shapes(*shape)[:3]
    )


def test_weights_are_refused_where_they_cannot_be_applied():
  order = orders.random_order(8, 1)
  rows, matrices, sizes = (
    jnp.ones(shape.shape, shape.dtype) for shape in _shapes(8, 8, (8,), 2)[:3]
  )
  for put, relu, dtype in [
    (None, False, 'bfloat16'),
    (order, True, 'bfloat16'),
    (order, False, 'float16'),
  ]:
    with pytest.raises(NotImplementedError, match='bfloat16 products that are put, without relu'):
      triton_gpu.grouped_matmul(
        rows.astype(dtype),
        matrices.astype(dtype),
        sizes,
        put=put,
        relu=relu,
        combine_weights=jnp.ones((8, 1)),
      )


def test_another_gpu_is_named(monkeypatch):
  monkeypatch.setattr(gpu_kernels, '_missing_package', lambda: None)
  monkeypatch.setattr(gpu_kernels, 'compute_capability', lambda: (8, 0))
  with implementation.compiling_for('gpu'), implementation.on_devices(1):
    rows, weights, *_ = _shapes(8, 8, (8,), 2)
    reason = triton_gpu.supports(rows, weights)
  assert reason == 'its kernels are for compute capability 9.0, and this GPU has 8.0'


_SIZES = {
  'even': (50, 50, 50, 50),
  'uneven': (129, 1, 3, 67),
  'empty': (0, 131, 0, 69, 0),
  'one': (0, 200),
  'single_group': (200,),
  'more_groups_than_rows': (1, 0, 1, 0, 0, 1),
  'over_a_tile': (700, 513, 31, 12),
  'none': (0, 0, 0),
  '512_experts': (9, 0, 1, 0) * 128,
}


def _on_gpu(*marked):
  def decorate(test):
    for mark in gpu.MARKS:
      test = mark(test)
    return test

  return decorate(*marked)


@_on_gpu
@pytest.mark.parametrize('rest', [0, 77], ids=['all_rows', 'rows_of_no_group'])
@pytest.mark.parametrize('axes', [(12, (10,)), (136, (2, 148)), (64, (512,))], ids=str)
@pytest.mark.parametrize('case', _SIZES)
def test_equals_the_reference(case, axes, rest):
  sizes = _SIZES[case]
  inputs, outputs = axes
  num_rows = max(sum(sizes) + rest, 1)
  keys = jax.random.split(jax.random.key(2), 3)
  shapes = _shapes(num_rows, inputs, outputs, len(sizes))
  rows, weights, cotangent = (
    jax.random.normal(key, shapes[i].shape).astype(jnp.bfloat16) for key, i in zip(keys, (0, 1, 3))
  )
  group_sizes = jnp.array(sizes, jnp.int32)
  run = functools.partial(grouped_matmul, implementation='triton_gpu')
  actual = _value_and_gradients(run, rows, weights, group_sizes, cotangent)
  assert {leaf.dtype.name for leaf in actual} == {'bfloat16'}
  rows, weights, cotangent = (x.astype(jnp.float32) for x in (rows, weights, cotangent))
  run = functools.partial(grouped_matmul, implementation='tiled')
  expected = _value_and_gradients(run, rows, weights, group_sizes, cotangent)
  tolerances.assert_close(
    [x.astype(jnp.float32) for x in actual], list(expected), rtol=tolerances.BFLOAT16, what=case
  )


_SIZES_OF_1400 = {
  'rows_of_no_group': (700, 513, 31, 12, 0),
  'empty': (0, 131, 0, 1269, 0),
  'single_group': (0, 0, 1400, 0, 0),
  'a_row': (1, 63, 65, 1, 1270),
  'none': (0, 0, 0, 0, 0),
}


def _tokens(top_k, take, put):
  num_rows, inputs, outputs = 1400, 136, 296
  shapes = [
    (num_rows // top_k if take else num_rows, inputs),
    (5, inputs, outputs),
    (num_rows // top_k, top_k, outputs) if put else (num_rows, outputs),
  ]
  keys = jax.random.split(jax.random.key(4), 3)
  arrays = (jax.random.normal(key, shape).astype(jnp.bfloat16) for key, shape in zip(keys, shapes))
  return orders.random_order(num_rows, top_k), *arrays


@_on_gpu
@pytest.mark.parametrize('top_k', [1, 2])
@pytest.mark.parametrize(('take', 'put'), [(True, False), (False, True), (True, True)])
def test_rows_are_taken_from_tokens_and_put_back(take, put, top_k):
  order, x, weights, cotangent = _tokens(top_k, take, put)
  for case, sizes in _SIZES_OF_1400.items():
    sizes = jnp.array(sizes, jnp.int32)
    actual = orders.value_and_gradients(
      'triton_gpu', order, take, put, x, weights, sizes, cotangent
    )
    wide = (x.astype(jnp.float32) for x in (x, weights))
    expected = orders.by_indexing(order, take, put, *wide, sizes, cotangent.astype(jnp.float32))
    tolerances.assert_close(
      [x.astype(jnp.float32) for x in actual], list(expected), rtol=tolerances.BFLOAT16, what=case
    )


@_on_gpu
@pytest.mark.parametrize('top_k', [1, 2])
@pytest.mark.parametrize('epilogue', ['relu', 'combine_weights'])
def test_an_epilogue_equals_the_same_done_afterwards(epilogue, top_k):
  order, x, weights, cotangent = _tokens(top_k, True, True)
  scales = jax.random.normal(jax.random.key(6), order.assignment_row.shape)
  scales = scales.at[:7].set(jnp.array([0.0, 1e-30, -0.0, 1.0, 1e-6, 30.0, -1.0])[:, None])

  def by_kernel(x, weights, scales, sizes):
    options = {'relu': True} if epilogue == 'relu' else {'combine_weights': scales}
    return triton_gpu.grouped_matmul(x, weights, sizes, take=order, put=order, **options)

  def afterwards(x, weights, scales, sizes):
    y = grouped_matmul(x, weights, sizes, take=order, put=order, implementation='tiled')
    return jax.nn.relu(y) if epilogue == 'relu' else y * scales[:, :, None]

  for case, sizes in _SIZES_OF_1400.items():
    sizes = jnp.array(sizes, jnp.int32)
    value, pull = jax.vjp(lambda *args, sizes=sizes: by_kernel(*args, sizes), x, weights, scales)
    actual = [leaf.astype(jnp.float32) for leaf in (value, *pull(cotangent))]
    wide = (x.astype(jnp.float32), weights.astype(jnp.float32), scales)
    expected, pull = jax.vjp(lambda *args, sizes=sizes: afterwards(*args, sizes), *wide)
    expected = [expected, *pull(cotangent.astype(jnp.float32))]
    tolerances.assert_close(actual, expected, rtol=tolerances.BFLOAT16, what=case)


@_on_gpu
def test_what_is_read_beyond_a_group_does_not_count():
  order, x, weights, cotangent = _tokens(1, True, True)
  sizes = jnp.array((0, 131, 1, 1001, 0), jnp.int32)
  of_no_group = order.row_assignment[1133:]

  function = functools.partial(
    triton_gpu.grouped_matmul, take=order, put=order, gathers=triton_gpu.Gathers(True, True)
  )

  def run(value):
    rows, dy = (array.at[of_no_group].set(value) for array in (x, cotangent))
    return _value_and_gradients(function, rows, weights, sizes, dy)

  for with_zeros, with_infinities in zip(run(0), run(jnp.inf)):
    assert (with_zeros == with_infinities).all()


@_on_gpu
@pytest.mark.parametrize(('rows', 'dy'), [(False, True), (True, False), (True, True)])
def test_gathered_before_or_by_the_kernel_is_the_same(rows, dy):
  order, x, weights, cotangent = _tokens(2, True, True)
  sizes = jnp.array(_SIZES_OF_1400['rows_of_no_group'], jnp.int32)

  def run(gathers):
    value, pull = jax.vjp(
      lambda x, weights: triton_gpu.grouped_matmul(
        x, weights, sizes, take=order, put=order, gathers=gathers
      ),
      x,
      weights,
    )
    return value, *pull(cotangent)

  before = run(triton_gpu.Gathers())
  for a, b in zip(before, run(triton_gpu.Gathers(rows=rows, dy=dy))):
    assert (a == b).all()


@_on_gpu
def test_repeats_bit_by_bit():
  keys = jax.random.split(jax.random.key(3), 3)
  shapes = _shapes(5000, 256, (384,), 7)
  rows, weights, cotangent = (
    jax.random.normal(key, shapes[i].shape).astype(jnp.bfloat16) for key, i in zip(keys, (0, 1, 3))
  )
  sizes = jnp.array((1000, 0, 2001, 3, 700, 900, 396), jnp.int32)
  run = jax.jit(functools.partial(_value_and_gradients, grouped_matmul))
  first, second = (run(rows, weights, sizes, cotangent) for _ in range(2))
  for a, b in zip(first, second):
    assert (a == b).all()
