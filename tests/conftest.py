"""Strict numerics and eight virtual devices for every test; a compilation cache between runs."""

import gc
import importlib.metadata
import os
import pathlib
import signal

# Tests run small shapes once: the time is in compiling them. Set before JAX reads it. Up to 0.10
# there is an older generator of code for fusions too, which takes half the time; later jaxlibs
# would stop at a flag that they do not know. Functions are small: in one piece they compile faster.
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '')
  + ' --xla_backend_optimization_level=0'
  + ' --xla_cpu_parallel_codegen_split_count=1'
  + ' --xla_cpu_use_fusion_emitters=false' * (importlib.metadata.version('jaxlib') < '0.11')
)

import jax
import pytest

jax.config.update('jax_platforms', os.environ.get('JAX_PLATFORMS') or 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_numpy_dtype_promotion', 'strict')
# On a GPU or TPU a float32 matmul would else round its inputs to 10 bits or less.
jax.config.update('jax_default_matmul_precision', 'highest')
# A shell that starts the tests in the background has them ignore Ctrl-C, and all that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)
# Each worker compiles the same functions: the cache lets the second one, and the next run, load.
_CACHE = pathlib.Path(os.environ.get('JAX_COMPILATION_CACHE_DIR') or '.jax_cache')
jax.config.update('jax_compilation_cache_dir', str(_CACHE.absolute()))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
# A trace makes and keeps many objects, which the collector would go through again and again.
gc.set_threshold(100_000, 20, 20)


@pytest.fixture
def rng():
  """A fixed key: a test that needs luck is a wrong test."""
  return jax.random.key(0)
