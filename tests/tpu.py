"""Compiles for TPU slices on a machine without a TPU, by the compiler in the package libtpu."""

import contextlib
import functools
import importlib.util

import jax
import pytest

from ssm_moe.analysis import chips
from ssm_moe.ops import implementation

# For all tests of a module: pytestmark = tpu.MARKS
MARKS = [
  pytest.mark.tpu_aot,
  pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason='libtpu has no wheel for this Python'
  ),
]


def needs_compiler(test):
  """Marks one test, where others of its module need no compiler for TPUs."""
  for mark in MARKS:
    test = mark(test)
  return test


@functools.cache
def devices(name: str = 'v5e:2x2') -> tuple[jax.Device, ...]:
  """Returns the devices of a slice; they can be compiled for, and hold no data."""
  return tuple(chips.devices(name))


def compile_for_one(function, *arguments, name: str = 'v5e:2x2') -> jax.stages.Compiled:
  """Compiles `function` for one chip; `arguments` are arrays or their shapes."""
  layout = jax.sharding.SingleDeviceSharding(devices(name)[0])
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), arguments
  )
  with implementation.compiling_for('tpu'), implementation.on_devices(1), without_cache():
    return jax.jit(function).lower(*shapes).compile()


@contextlib.contextmanager
def without_cache():
  """Compiled code for a TPU can be written to the cache, but not read without one."""
  before = jax.config.jax_enable_compilation_cache
  jax.config.update('jax_enable_compilation_cache', False)
  try:
    yield
  finally:
    jax.config.update('jax_enable_compilation_cache', before)
