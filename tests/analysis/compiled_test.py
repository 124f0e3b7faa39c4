"""FLOPs, memory traffic and collectives of compiled programs, against counts made by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from ssm_moe.analysis import compiled


def _step(function, *shapes, dtype=jnp.float32):
  arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
  return compiled.read_step(jax.jit(function).lower(*arguments).compile().as_text())


def test_a_product_counts_two_operations_a_multiply_and_add():
  step = _step(lambda x, w: jnp.einsum('bsm,mf->bsf', x, w), (2, 3, 64), (64, 32))
  assert step.flops == 2 * 2 * 3 * 64 * 32


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('padding', [(0, 0), (2, 1)])
@pytest.mark.parametrize(('lhs_dilate', 'rhs_dilate'), [(1, 1), (2, 1), (1, 3), (3, 2)])
def test_a_convolution_counts_what_xla_counts(stride, padding, lhs_dilate, rhs_dilate):
  def function(x, w):
    return jax.lax.conv_general_dilated(
      x,
      w,
      (stride,),
      (padding,),
      lhs_dilation=(lhs_dilate,),
      rhs_dilation=(rhs_dilate,),
      dimension_numbers=('NWC', 'WIO', 'NWC'),
    )

  shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 19, 5), (3, 5, 7))]
  executable = jax.jit(function).lower(*shapes).compile()
  step = compiled.read_step(executable.as_text())
  assert step.flops == executable.cost_analysis()['flops']


def test_products_in_a_loop_count_each_time():
  def function(x, w):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=7)[0]

  assert _step(function, (64, 64), (64, 64)).flops == 7 * 2 * 64**3


def _over_devices(function, *, in_specs, out_specs):
  mesh = jax.make_mesh((8,), ('x',), axis_types=(AxisType.Auto,))
  specs = {'in_specs': in_specs, 'out_specs': out_specs, 'check_vma': False}
  return jax.shard_map(function, mesh=mesh, **specs)


_SPLIT, _WHOLE = PartitionSpec('x'), PartitionSpec()


@pytest.mark.parametrize(
  ('kind', 'function', 'in_spec', 'out_spec', 'sent'),
  [
    # Of a [64, 4] float32 array a device has 8 rows, 128 bytes, which 7 others want.
    ('all-gather', lambda x: jax.lax.all_gather(x, 'x', tiled=True), _SPLIT, _WHOLE, 7 * 128),
    # Each adds up an eighth of the 1024 bytes, from 7 others, and sends 7 others the sum.
    ('all-reduce', lambda x: jax.lax.psum(x, 'x'), _WHOLE, _WHOLE, 2 * 7 * 128),
    (
      'reduce-scatter',
      lambda x: jax.lax.psum_scatter(x, 'x', tiled=True),
      _WHOLE,
      _SPLIT,
      7 * 128,
    ),
    # Of its 128 bytes a device keeps an eighth.
    (
      'all-to-all',
      lambda x: jax.lax.all_to_all(x, 'x', 0, 0, tiled=True),
      _SPLIT,
      _SPLIT,
      7 * 16,
    ),
    (
      'collective-permute',
      lambda x: jax.lax.ppermute(x, 'x', [(i, (i + 1) % 8) for i in range(8)]),
      _SPLIT,
      _SPLIT,
      128,
    ),
  ],
)
def test_collectives_say_what_a_device_sends(kind, function, in_spec, out_spec, sent):
  step = _step(_over_devices(function, in_specs=in_spec, out_specs=out_spec), (64, 4))
  assert step.by_kind() == {kind: {'count': 1, 'bytes': sent}}


def test_a_collective_in_a_loop_counts_each_time():
  def function(x):
    def body(x, _):
      return jnp.sin(jax.lax.psum(x, 'x')), None

    return jax.lax.scan(body, x, length=5)[0]

  step = _step(_over_devices(function, in_specs=_WHOLE, out_specs=_WHOLE), (64, 4))
  assert step.by_kind() == {'all-reduce': {'count': 5, 'bytes': 5 * 2 * 7 * 128}}


def _program(*lines, computations=''):
  body = '\n'.join(f'  {line}' for line in lines)
  entry = f'ENTRY %main (p: f32[4]) -> f32[4] {{\n{body}\n}}\n'
  return f'HloModule m, num_partitions=8\n\n{computations}{entry}'


@pytest.mark.parametrize(
  ('groups', 'size'),
  [
    ('{{0,1},{2,3},{4,5},{6,7}}', 2),
    ('{}', 8),
    ('[2,4]<=[8]', 4),
    ('[4,2]<=[2,4]T(1,0)', 2),
    ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
    ("mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", 8),
    ("mesh['axis_0'=8] {'axis_0':(1)2}", 2),
  ],
)
def test_every_way_to_write_groups_is_read(groups, size):
  text = _program(
    '%p = f32[4]{0} parameter(0)',
    f'ROOT %r = f32[4]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%add',
  )
  (collective,) = compiled.read_step(text).collectives
  assert collective.group_size == size


def test_a_start_and_its_done_are_one_collective():
  text = _program(
    '%p = f32[4]{0} parameter(0)',
    '%s = (f32[4]{0}, f32[32]{0}) all-gather-start(%p), replica_groups={}, dimensions={0}',
    'ROOT %d = f32[32]{0} all-gather-done(%s)',
  )
  (collective,) = compiled.read_step(text).collectives
  assert (collective.kind, collective.sent_bytes) == ('all-gather', 7 * 16)
  assert [array.shape for array in collective.results] == [(32,)]


_PART = """%part{i} (p.{i}: f32[4]) -> f32[32] {{
  %p.{i} = f32[4]{{0}} parameter(0)
  ROOT %g.{i} = f32[32]{{0}} all-gather(%p.{i}), {attributes}
}}

"""


def test_a_collective_spread_over_fusions_is_one():
  attributes = 'channel_id={}, replica_groups={{}}, frontend_attributes={{chain_id="0"}}'
  parts = ''.join(
    _PART.format(i=i, attributes=attributes.format(channel)) for i, channel in enumerate((5, 5, 6))
  )
  text = _program(
    '%p = f32[4]{0} parameter(0)',
    *(f'%f{i} = f32[32]{{0}} fusion(%p), kind=kCustom, calls=%part{i}' for i in range(3)),
    computations=parts,
  )
  assert compiled.read_step(text).by_kind() == {'all-gather': {'count': 2, 'bytes': 2 * 7 * 16}}


def test_a_slice_of_a_sum_over_devices_is_a_reduce_scatter():
  scatter = """%all-reduce-scatter (input: f32[32]) -> f32[4] {
  %input = f32[32]{0} parameter(0)
  %sum = f32[32]{0} all-reduce(%input), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %id = u32[] partition-id()
  ROOT %mine = f32[4]{0} dynamic-slice(%sum, %id), dynamic_slice_sizes={4}
}

"""
  text = _program(
    '%p = f32[32]{0} parameter(0)',
    'ROOT %f = f32[4]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter',
    computations=scatter,
  )
  (collective,) = compiled.read_step(text).collectives
  assert (collective.kind, collective.sent_bytes) == ('reduce-scatter', 7 * 16)
  assert [array.shape for array in collective.results] == [(4,)]


def test_a_slice_of_a_stack_is_read_and_written_as_a_slice():
  update = """%update (stack: f32[9,100], row: f32[1,100], i: s32[]) -> f32[9,100] {
  %stack = f32[9,100]{1,0} parameter(0)
  %row = f32[1,100]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %old = f32[1,100]{1,0} dynamic-slice(%stack, %i, %i), dynamic_slice_sizes={1,100}
  %new = f32[1,100]{1,0} add(%old, %row)
  ROOT %put = f32[9,100]{1,0} dynamic-update-slice(%stack, %new, %i, %i)
}

"""
  text = _program(
    '%p = f32[9,100]{1,0} parameter(0)',
    '%row.1 = f32[1,100]{1,0:S(1)} parameter(1)',
    '%i.1 = s32[]{:S(6)} parameter(2)',
    'ROOT %f = f32[9,100]{1,0} fusion(%p, %row.1, %i.1), kind=kLoop, calls=%update',
    computations=update,
  )
  # A row of the stack is read and one written; the other row is in fast memory.
  assert compiled.read_step(text).hbm_bytes == 400 + 400


def test_a_slice_on_its_way_to_fast_memory_is_read_once():
  text = _program(
    '%p = f32[9,100]{1,0} parameter(0)',
    '%s = (f32[9,100]{1,0}, f32[1,100]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[0:1]}',
    'ROOT %d = f32[1,100]{1,0:S(1)} slice-done(%s)',
  )
  assert compiled.read_step(text).hbm_bytes == 400


def test_a_product_of_float32_precision_takes_more_passes():
  def passes(precision):
    product = functools.partial(jnp.dot, precision=precision)
    (work,) = [w for w in _step(product, (64, 64), (64, 64)).work if w.flops]
    return work.passes_flops / work.flops

  assert [passes(p) for p in ('default', 'high', 'highest')] == [1, 3, 6]


def test_a_kernel_counts_what_it_declares():
  call = '%k = f32[4]{0} custom-call(%p), custom_call_target="tpu_custom_call"'
  declared = ', backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000"}}}'
  text = _program('%p = f32[4]{0} parameter(0)', call + declared, call.replace('%k', 'ROOT %l'))
  step = compiled.read_step(text)
  assert (step.flops, step.kernels_without_flops) == (1000, 1)
