"""Other libraries' implementations are checked and timed as the project's own are."""

import jax
import jax.numpy as jnp
import pytest

from ssm_moe.analysis.benchmark_peers import Peer
from ssm_moe.analysis.benchmark_timing import Timing
from tests import tolerances

pytest.importorskip('torch')


def test_values_and_gradients_of_all_passes_in_torch():
  keys = jax.random.split(jax.random.key(0), 3)
  x, w = jax.random.normal(keys[0], (2, 5, 3)), jax.random.normal(keys[1], (3, 3))
  cotangent = jax.random.normal(keys[2], (2, 5, 3))
  peer = Peer(
    name='torch',
    function=lambda inputs, scale: (inputs['w'].T @ inputs['x']) * scale,
    channels_first=('x',),
  )
  scale = jnp.float32(2)
  found = {
    name: (times, actual)
    for name, times, actual, _ in peer.run(
      {'x': x, 'w': w, 'none': None}, scale, cotangent, Timing.on('cpu', 2)
    )
  }
  value, pull = jax.vjp(lambda x, w: (x @ w) * scale, x, w)
  gradients = dict(zip('xw', pull(cotangent))) | {'none': None}
  assert list(found) == ['forward', 'backward', 'forward_backward']
  for times, _ in found.values():
    assert len(times) == 2 and all(time > 0 for time in times)
  expected = [value, gradients, (value, gradients)]
  for (_, actual), right in zip(found.values(), expected):
    tolerances.assert_close(actual, right, rtol=tolerances.FLOAT32_REORDERED)
