import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_moe.ops import gpu_kernels, implementation
from tests import hopper


@pytest.fixture
def with_triton(monkeypatch):
  """As if jax-triton were there, whatever this Python has."""
  monkeypatch.setattr(gpu_kernels, '_missing_package', lambda: None)


def test_elsewhere_than_on_a_gpu_there_is_none():
  assert gpu_kernels.unavailable() == 'its kernels are for GPUs, and this is for cpu'
  with implementation.compiling_for('tpu'):
    assert 'this is for tpu' in gpu_kernels.unavailable()


def test_on_one_gpu_there_are_and_over_several_not(with_triton):
  with implementation.compiling_for('gpu'), implementation.on_devices(1):
    assert gpu_kernels.unavailable() is None
  with implementation.compiling_for('gpu'), implementation.on_devices(8):
    assert 'implementation.on_devices(1)' in gpu_kernels.unavailable()


@pytest.mark.parametrize(
  ('capability', 'any_gpu', 'hopper_only'),
  [
    ((9, 0), None, None),
    ((8, 6), None, 'capability 9.0, and this GPU has 8.6'),
    ((7, 5), '8.0 and later, and this GPU has 7.5', 'capability 9.0, and this GPU has 7.5'),
    (None, 'GPUs by NVIDIA', 'GPUs by NVIDIA'),
  ],
)
def test_the_compute_capability_decides(monkeypatch, with_triton, capability, any_gpu, hopper_only):
  monkeypatch.setattr(gpu_kernels, 'compute_capability', lambda: capability)
  with implementation.compiling_for('gpu'), implementation.on_devices(1):
    for exactly, expected in ((None, any_gpu), (gpu_kernels.HOPPER, hopper_only)):
      reason = gpu_kernels.unavailable(exactly=exactly)
      assert reason is None if expected is None else expected in reason


def test_a_package_that_is_missing_or_old_is_named(monkeypatch):
  versions = {'jax-triton': '0.4.1', 'triton': '3.9.0'}

  def version(package):
    if package not in versions:
      raise importlib.metadata.PackageNotFoundError(package)
    return versions[package]

  monkeypatch.setattr(importlib.metadata, 'version', version)
  missing = gpu_kernels._missing_package.__wrapped__
  assert missing() is None
  versions['triton'] = '3.6.0'
  assert missing() == 'it needs triton 3.7 or later, and here is 3.6.0'
  del versions['jax-triton']
  assert missing() == (
    "it needs jax-triton 0.4 or later, hence Python 3.12: pip install 'ssm_moe[gpu]'"
  )


@hopper.needs_triton
def test_gluon_keeps_the_layouts_of_its_author():
  """Triton's own passes would take the layout of the load, and with it move rows between lanes."""
  from triton.experimental import gluon
  from triton.experimental.gluon import language as gl

  @gluon.jit
  def kernel(x_ptr, y_ptr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    place = gl.arange(0, 128, layout=layout)
    gl.store(y_ptr + place, gl.load(x_ptr + place))

  def run(x):
    return gpu_kernels.call(
      x, kernel=kernel, out_type=jax.ShapeDtypeStruct(x.shape, x.dtype), grid=1,
      options={'num_warps': 1},
    )  # fmt: skip

  (compiled,) = hopper.compile_kernels(run, jnp.asarray(np.zeros(128, np.float32)))
  # A lane has elements 32 apart, one load each; coalesced anew, it would have four in a row.
  assert 'ld.global.v4' not in compiled.ptx
  assert compiled.ptx.count('ld.global.b32') == 4
