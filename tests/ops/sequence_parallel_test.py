"""A sequence in pieces on several devices equals itself on one: values and all gradients."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ssm_moe import sharding
from ssm_moe.analysis import compiled
from ssm_moe.config import MeshConfig
from ssm_moe.ops import implementation, selective_scan, ssd
from ssm_moe.ops.selective_scan import cases as scan_cases
from ssm_moe.ops.selective_scan import hand_on
from ssm_moe.ops.ssd import cases as ssd_cases
from tests import tolerances
from tests.ops.gradients import value_and_gradients

if jax.device_count() < 8:
  pytest.skip('needs eight devices', allow_module_level=True)

_ALL = dict.fromkeys(('D', 'dt_bias', 'dt_softplus', 'h0'), True)
_SCAN = functools.partial(scan_cases.Case, name='scan', batch=2, d_inner=4)
_SSD = functools.partial(ssd_cases.Case, name='ssd', batch=2)
_MESHES = {'sequence': {'sequence': 8}, 'product': {'sequence': 2, 'tensor': 2, 'data': 2}}

_slow = functools.partial(pytest.param, marks=pytest.mark.slow)
_extended = functools.partial(pytest.param, marks=pytest.mark.extended)


def _op_and_inputs(case):
  module, op = (
    (scan_cases, selective_scan.selective_scan)
    if isinstance(case, scan_cases.Case)
    else (ssd_cases, ssd.ssd)
  )
  return (
    op,
    module.make_inputs(case, jax.random.key(1)),
    module.make_cotangents(case, jax.random.key(2)),
  )


def _run(case, mesh_sizes, inputs=None):
  op, made, cotangents = _op_and_inputs(case)
  mesh = sharding.make_mesh(MeshConfig(**mesh_sizes), None if mesh_sizes else jax.devices()[:1])

  def on_mesh(**arguments):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return op(**arguments)

  whole = sharding.replicated(mesh)
  arguments = {
    name: jax.device_put(v, whole) if isinstance(v, jax.Array) else v
    for name, v in (made | (inputs or {})).items()
  }
  return jax.device_get(value_and_gradients(on_mesh, arguments, jax.device_put(cotangents, whole)))


def _check(case, mesh_sizes, inputs=None):
  actual, expected = (_run(case, sizes, inputs) for sizes in (mesh_sizes, {}))
  tolerances.assert_close(actual, expected, rtol=tolerances.BY_DTYPE[case.dtype])


@pytest.mark.parametrize(
  ('case', 'mesh'),
  [
    # A piece is a whole number of chunks of 64 and a few tokens more.
    (_SCAN(length=8 * 70, segments=9, z=True, **_ALL), 'sequence'),
    (_SSD(length=40, segments=5, **_ALL), 'product'),
    _slow(_SSD(length=40, num_groups=1, segments=3, dtype='bfloat16', **_ALL), 'sequence'),
    _extended(_SCAN(length=1040, segments=4, dtype='bfloat16', z=True, **_ALL), 'product'),
    _extended(_SCAN(length=1040, segments=7, z=True, **_ALL), 'sequence'),
    _extended(_SCAN(length=40), 'sequence'),
    # Without the softplus a step may be negative, and its state grow.
    _extended(_SCAN(length=40, segments=9, dt_bias=True), 'product'),
    _extended(_SSD(length=1040, num_groups=1, segments=3, **_ALL), 'sequence'),
    _extended(_SSD(length=40), 'product'),
    _extended(_SCAN(length=39, h0=True), 'product'),  # which two devices do not divide
  ],
)
def test_pieces_equal_the_whole(case, mesh):
  _check(case, _MESHES[mesh])


@pytest.mark.parametrize(
  ('make_case', 'tokens'),
  # As long as a piece, and as two; and tokens that are documents each.
  [_slow(_SCAN, 5), *(_extended(case, tokens) for case in (_SCAN, _SSD) for tokens in (1, 10))],
)
def test_documents_that_begin_where_a_piece_does(make_case, tokens):
  # An id comes back in the next document but one.
  segment_ids = jnp.broadcast_to(jnp.arange(40) // tokens % 2, (2, 40))
  case = make_case(length=40, **_ALL)
  _check(case, _MESHES['sequence'], {'segment_ids': segment_ids})


@pytest.mark.extended
@pytest.mark.parametrize('make_case', [_SCAN, _SSD])
def test_what_is_sent_does_not_depend_on_the_length(make_case):
  mesh = sharding.make_mesh(MeshConfig(sequence=8))
  time = NamedSharding(mesh, PartitionSpec(None, 'sequence'))
  whole, sent = sharding.replicated(mesh), []
  for length in (32, 64):
    op, arguments, cotangents = _op_and_inputs(make_case(length=length, segments=3, **_ALL))
    arrays = {
      name: jax.device_put(v, time if v.ndim > 1 and v.shape[1] == length else whole)
      for name, v in arguments.items()
      if isinstance(v, jax.Array)
    }

    def run(arrays, op=op, cotangents=cotangents):
      ids = arrays['segment_ids']
      with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        floating = {name: v for name, v in arrays.items() if name != 'segment_ids'}
        function = functools.partial(op, dt_softplus=True, segment_ids=ids)
        return jax.vjp(lambda floating: function(**floating), floating)[1](cotangents)

    layouts = jax.tree.map(lambda v: v.sharding, arrays)
    step = compiled.read_step(
      jax.jit(run, in_shardings=(layouts,)).lower(arrays).compile().as_text()
    )
    sent.append(sorted((c.kind, c.times, c.operand_bytes) for c in step.collectives))
  assert sent[0] == sent[1]
  kinds = {kind for kind, _, _ in sent[0]}
  # Sums of the gradients of parameters; ids of neighbours; states and times.
  assert kinds == {'all-reduce', 'collective-permute', 'all-gather'}


@pytest.mark.parametrize('direction', ['forward', 'backward'])
def test_what_a_piece_hands_on_takes_no_memory_for_all_states(direction):
  arguments = scan_cases.make_inputs(_SCAN(length=4096, d_state=64), jax.random.key(1))
  arrays = {name: arguments[name] for name in ('x', 'dt', 'A', 'B', 'C', 'z', 'dt_bias')}
  starts = jnp.zeros((2, 4096), bool)
  function = functools.partial(getattr(hand_on, direction), dt_softplus=False)
  given = (arrays, starts) if direction == 'forward' else (arrays, arrays['x'], starts)
  memory = jax.jit(function).lower(*given).compile().memory_analysis()
  all_states = arguments['x'].size * 64 * 4
  assert memory.temp_size_in_bytes < all_states / 16


@pytest.mark.parametrize('numbers', [1, 10**9])
def test_what_a_piece_hands_on_does_not_depend_on_the_chunk(numbers, monkeypatch):
  monkeypatch.setattr(hand_on, '_GPU_NUMBERS', numbers)
  arguments = scan_cases.make_inputs(_SCAN(length=150), jax.random.key(1))
  arrays = {name: arguments.get(name) for name in ('x', 'dt', 'A', 'B', 'C', 'z', 'dt_bias')}
  starts = jnp.zeros((2, 150), bool).at[0, 70].set(True)
  results = []
  for platform in ('cpu', 'gpu'):
    with implementation.compiling_for(platform):
      added, time = hand_on.forward(arrays, starts, dt_softplus=False)
      results.append((added, jnp.where(jnp.isinf(time), -1, time)))
  tolerances.assert_close(*reversed(results), rtol=tolerances.FLOAT32_REORDERED)
