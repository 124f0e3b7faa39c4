"""The scans on a mesh equal themselves on one device, and add up over devices once."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from ssm_moe import sharding
from ssm_moe.config import MeshConfig
from ssm_moe.ops import implementation, selective_scan, ssd
from ssm_moe.ops.per_device import per_device
from ssm_moe.ops.selective_scan import cases as scan_cases
from ssm_moe.ops.ssd import cases as ssd_cases
from tests import tolerances

if jax.device_count() < 8:
  pytest.skip('needs eight devices', allow_module_level=True)

_MESH = sharding.make_mesh(MeshConfig(fsdp=2, tensor=4), jax.devices()[:8])


def _scan_inputs(**sizes):
  case = scan_cases.Case(
    name='mesh',
    length=40,
    **({'batch': 4, 'd_inner': 8} | sizes),
    **dict.fromkeys(('D', 'z', 'dt_bias', 'dt_softplus', 'h0'), True),
    segments=3,
  )
  return scan_cases.make_inputs(case, jax.random.key(0))


def _ssd_inputs(groups):
  case = ssd_cases.Case(
    name='mesh',
    batch=4,
    length=40,
    num_heads=8,
    num_groups=groups,
    **dict.fromkeys(('D', 'dt_bias', 'dt_softplus', 'h0'), True),
    segments=3,
  )
  return ssd_cases.make_inputs(case, jax.random.key(0))


_OPS = {
  'selective_scan': (selective_scan.selective_scan, _scan_inputs),
  'ssd_one_group': (ssd.ssd, lambda: _ssd_inputs(1)),
  'ssd_four_groups': (ssd.ssd, lambda: _ssd_inputs(4)),
}


def _lowered(op, mesh, inputs):
  """Value and gradients of the float32 inputs, lowered for a mesh, and these inputs on it."""
  arrays, options = _split(inputs)

  def loss(arrays):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      y, h = op(**arrays, **options)
    return jnp.sum(jnp.sin(y)) + jnp.sum(h**2), (y, h)

  placed = jax.device_put(arrays, sharding.replicated(mesh))
  return jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(placed), placed


def _assert_equal_to_one_device(op, inputs):
  results = []
  for mesh in (_MESH, sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
    lowered, placed = _lowered(op, mesh, inputs)
    results.append(jax.device_get(lowered.compile()(placed)))
  tolerances.assert_close(*results, rtol=tolerances.FLOAT32_REORDERED)


def _split(inputs):
  arrays = {n: v for n, v in inputs.items() if getattr(v, 'dtype', None) == jnp.float32}
  return arrays, {n: v for n, v in inputs.items() if n not in arrays}


@pytest.mark.parametrize('name', _OPS)
def test_values_and_gradients_equal_those_of_one_device(name):
  op, make_inputs = _OPS[name]
  _assert_equal_to_one_device(op, make_inputs())


def test_nothing_is_sent_within_a_loop():
  # Else each of the steps over chunks would add dB and dC up over the devices of `tensor`.
  lowered, _ = _lowered(selective_scan.selective_scan, _MESH, _scan_inputs(d_inner=16))
  text = lowered.compile().as_text()
  bodies = set(re.findall(r'body=%?([\w.\-]+)', text))
  computations = re.split(r'\n(?=%|ENTRY)', text)
  sent = [c.split(' ')[0] for c in computations if re.search(r' all-(reduce|gather|to-all)', c)]
  assert bodies and sent == ['ENTRY']


def test_kernels_see_one_device(monkeypatch):
  seen = []

  def function(x):
    seen.append((x.shape, implementation.on_one_device()))
    return (x,)

  with jax.sharding.use_abstract_mesh(_MESH.abstract_mesh):
    x = jax.ShapeDtypeStruct((4, 3, 8), jnp.float32)
    axes = ('batch', None, 'inner')
    (y,) = jax.eval_shape(lambda x: per_device(function, {'x': x}, {'x': axes}, (axes,)), x)
  assert seen == [((2, 3, 2), True)] and y.shape == (4, 3, 8)


def test_an_op_has_a_piece_of_time_where_it_says_how():
  seen = []

  def function(x):
    seen.append((x.shape, implementation.on_one_device()))
    return (x,)

  mesh = sharding.make_mesh(MeshConfig(data=2, sequence=4))
  axes = ('batch', 'sequence', 'inner')
  for length in (8, 4, 10):
    for pieces in (None, function):
      with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        run = functools.partial(
          per_device, function, axes={'x': axes}, outputs=(axes,), in_pieces=pieces, least_piece=2
        )
        x = jax.ShapeDtypeStruct((4, length, 8), jnp.float32)
        jax.eval_shape(lambda x, run=run: run(arrays={'x': x}), x)
  # 4 tokens would be pieces of one, and 10 tokens do not divide.
  assert [shape[1] for shape, _ in seen] == [8, 2, 4, 4, 10, 10]
  assert all(shape[0] == 2 and on_one for shape, on_one in seen)


@pytest.mark.parametrize('sizes', [{'batch': 3}, {'d_inner': 6}])
def test_what_a_mesh_does_not_divide_is_left_to_the_compiler(sizes):
  _assert_equal_to_one_device(selective_scan.selective_scan, _scan_inputs(**sizes))
