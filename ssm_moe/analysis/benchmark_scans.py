"""The two scans, at the sizes that are timed."""

import functools

import jax.numpy as jnp

from ssm_moe.analysis import benchmark_peers as peers
from ssm_moe.analysis.benchmark import OpBenchmark, by_implementation
from ssm_moe.analysis.benchmark_limits import Work, passes
from ssm_moe.ops import selective_scan as scan
from ssm_moe.ops import ssd as ssd_room
from ssm_moe.ops.selective_scan import cases as scan_cases
from ssm_moe.ops.ssd import cases as ssd_cases
from ssm_moe.ops.ssd import chunked as ssd_chunked
from ssm_moe.ops.ssd import reference as ssd_reference

_FUSED = {'D': True, 'z': True, 'dt_bias': True, 'dt_softplus': True}
_FUSED_SSD = {'D': True, 'dt_bias': True, 'dt_softplus': True}
# B, L, D.
_SCAN_SIZES = ((8, 2048, 2048), (32, 1024, 1024), (1, 16384, 4096))
# B, L, H.
_SSD_SIZES = ((8, 2048, 32), (4, 4096, 64), (1, 16384, 64))


def selective_scans(platform: str) -> list[OpBenchmark]:
  if platform == 'cpu':
    cases = [scan_cases.BENCHMARK_CASE]
  else:
    cases = [
      scan_cases.Case(
        name='all', batch=B, length=L, d_inner=D, d_state=16, dtype='bfloat16', **_FUSED
      )
      for B, L, D in _SCAN_SIZES
    ]
  return [_selective_scan(case) for case in cases]


def _selective_scan(case: scan_cases.Case) -> OpBenchmark:
  def make_arguments(key):
    arguments = scan_cases.make_inputs(case, key)
    arguments.pop('dt_softplus')
    return {name: value for name, value in arguments.items() if value is not None}, None

  def run(inputs, _, implementation):
    y, _ = scan.selective_scan(
      **inputs, dt_softplus=case.dt_softplus, implementation=implementation
    )
    return y

  elements = case.batch * case.length * case.d_inner
  tokens = case.batch * case.length
  itemsize = jnp.dtype(case.dtype).itemsize
  arrays, of_state = (3 + case.z) * elements, 2 * tokens * case.d_state
  # A decay for each channel and state; the backward pass makes it again. Multiply-adds: the decay's
  # exponent, the update and its input, the output; twice as many for the gradients.
  states = elements * case.d_state
  forward = Work(
    num_bytes=itemsize * (arrays + of_state), specials=states, multiply_adds=5 * states
  )
  backward = Work(
    num_bytes=itemsize * ((2 * arrays - elements) + 2 * of_state),
    specials=states,
    multiply_adds=10 * states,
  )
  left_out = {}
  if elements * case.d_state > 10**9:
    left_out['associative'] = 'its tree of products would take most of the memory'
  return OpBenchmark(
    name='selective_scan',
    shape=case.shape,
    dtype=case.dtype,
    implementations=by_implementation(scan, run, left_out),
    left_out=left_out,
    oracle=functools.partial(run, implementation='reference'),
    oracle_name='the loop over time in float32, and its gradient',
    make_arguments=make_arguments,
    peers=(peers.SELECTIVE_SCAN,) if case.dt_softplus else (),
    tokens=tokens,
    work=passes(forward, backward),
  )


def ssds() -> list[OpBenchmark]:
  """Mamba-2's scan, on a GPU."""
  return [
    _ssd(
      ssd_cases.Case(
        name='all',
        batch=B,
        length=L,
        num_heads=H,
        head_dim=64,
        num_groups=1,
        d_state=128,
        dtype='bfloat16',
        **_FUSED_SSD,
      )
    )
    for B, L, H in _SSD_SIZES
  ]


def _ssd(case: ssd_cases.Case) -> OpBenchmark:
  def make_arguments(key):
    arguments = ssd_cases.make_inputs(case, key)
    arguments.pop('dt_softplus')
    return {name: value for name, value in arguments.items() if value is not None}, None

  def run(inputs, _, implementation):
    y, _ = ssd_room.ssd(**inputs, dt_softplus=case.dt_softplus, implementation=implementation)
    return y

  def oracle(function):
    return lambda inputs, _: function(**inputs, dt_softplus=case.dt_softplus)[0]

  left_out = {'reference': 'its gradient keeps every state, and would take most of the memory'}
  tokens = case.batch * case.length
  channels, itemsize = case.num_heads * case.head_dim, jnp.dtype(case.dtype).itemsize
  num_bytes = itemsize * tokens * (2 * channels + case.num_heads + 2 * case.d_state)
  forward = Work(num_bytes=num_bytes, flops=4 * tokens * channels * case.d_state)
  return OpBenchmark(
    name='ssd',
    shape=case.shape,
    dtype=case.dtype,
    implementations=by_implementation(ssd_room, run, left_out),
    left_out=left_out,
    oracle=oracle(ssd_reference.ssd),
    gradient_oracle=oracle(ssd_chunked.ssd),
    oracle_name='the loop over time in float32, and for gradients the chunks in float32',
    make_arguments=make_arguments,
    peers=(peers.SSD,),
    tokens=tokens,
    work=passes(forward, forward + forward),
  )
