"""The convolution on a mesh equals itself on one device: a piece looks back into the one before."""

import functools

import jax
import pytest

from ssm_moe import sharding
from ssm_moe.config import MeshConfig
from ssm_moe.ops.causal_conv1d import causal_conv1d
from tests import tolerances
from tests.ops.causal_conv1d import cases

if jax.device_count() < 8:
  pytest.skip('needs eight devices', allow_module_level=True)

_ALL = {'state': True, 'segments': True}
_CASE = functools.partial(cases.Case, name='mesh', batch=4, channels=4)
_extended = functools.partial(pytest.param, marks=pytest.mark.extended)


@pytest.mark.parametrize(
  ('mesh_sizes', 'case'),
  [
    ({'sequence': 8}, _CASE(length=32, **_ALL)),
    pytest.param(
      {'sequence': 2, 'tensor': 2, 'data': 2},
      _CASE(length=32, dtype='bfloat16', **_ALL),
      marks=pytest.mark.slow,
    ),
    _extended({'sequence': 8}, _CASE(length=24, **_ALL)),  # a piece is as long as what it hands on
    _extended({'sequence': 8}, _CASE(length=16, **_ALL)),  # a piece would be too short
    _extended({'sequence': 8}, _CASE(length=32)),
    _extended({'sequence': 2, 'tensor': 4}, _CASE(length=32, width=1, **_ALL)),
    _extended({'sequence': 4, 'tensor': 2}, _CASE(length=31, width=8, **_ALL)),
    _extended({'fsdp': 2, 'tensor': 4}, _CASE(length=31, width=8, **_ALL)),
    _extended({'fsdp': 8}, _CASE(length=31, **_ALL)),  # which does not divide the rows
  ],
)
def test_a_mesh_equals_one_device(mesh_sizes, case):
  arguments, cotangents = cases.make_arguments(case, jax.random.key(1))
  results = []
  for sizes in (mesh_sizes, {}):
    mesh = sharding.make_mesh(MeshConfig(**sizes), None if sizes else jax.devices()[:1])

    def run(arguments, cotangents, mesh=mesh):
      with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return cases.value_and_gradients(causal_conv1d, case, arguments, cotangents)

    placed = jax.device_put((arguments, cotangents), sharding.replicated(mesh))
    results.append(jax.device_get(jax.jit(run)(*placed)))
  tolerances.assert_close(*results, rtol=tolerances.BY_DTYPE[case.dtype])
