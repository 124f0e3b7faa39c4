"""The kernel, compiled for a Hopper GPU on a machine without one."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from ssm_moe.ops import gpu_kernels, implementation
from ssm_moe.ops.softmax_cross_entropy import softmax_cross_entropy, triton_gpu
from ssm_moe.training.losses import cross_entropy_sum
from tests import hopper

# A block of threads gets no more of an H100's or H200's 228 KB; the system keeps 1 KB of each.
_SHARED_BYTES = 227 * 1024
_REGISTERS = 65536


def _shapes(tokens, columns):
  return (
    jax.ShapeDtypeStruct((tokens, columns), jnp.float32),
    jax.ShapeDtypeStruct((tokens,), jnp.int32),
    jax.ShapeDtypeStruct((tokens,), jnp.float32),
  )


@hopper.needs_triton
@pytest.mark.parametrize('dtype', [None, jnp.bfloat16, jnp.float32], ids=str)
@pytest.mark.parametrize(
  ('columns', 'vocab_size'), [(50304, 50277), (32000, 32000), (57344, 57001)]
)
def test_real_sizes_compile(columns, vocab_size, dtype):
  """Shown: nothing is spilled, as many programs as are started fit on a multiprocessor, and all

  that is read, and what is kept meanwhile, moves 16 bytes a thread at a time.
  """
  function = functools.partial(softmax_cross_entropy, vocab_size=vocab_size, gradient_dtype=dtype)
  (kernel,) = hopper.compile_kernels(function, *_shapes(4096, columns))
  sizes = triton_gpu.default_block_sizes(columns)
  assert kernel.spilled_bytes == 0
  assert kernel.registers * 32 * sizes.warps * sizes.programs <= _REGISTERS
  assert (kernel.shared_bytes + 1024) * sizes.programs <= _SHARED_BYTES + 1024
  copies = re.findall(r'cp\.async\.\S+ .*?, .*?, (0x\w+|\d+)', kernel.ptx)
  assert copies and all(int(size, 0) == 16 for size in copies)
  assert 'ld.shared.v4' in kernel.ptx
  if dtype is not None:
    assert f'st.global.v{2 if dtype == jnp.bfloat16 else 4}.b32' in kernel.ptx


@hopper.needs_triton
@pytest.mark.parametrize(('tokens', 'columns', 'vocab_size'), [(1, 4, 1), (77, 2052, 2049)])
def test_other_sizes_compile(tokens, columns, vocab_size):
  function = functools.partial(
    softmax_cross_entropy, vocab_size=vocab_size, gradient_dtype=jnp.float16
  )
  (kernel,) = hopper.compile_kernels(function, *_shapes(tokens, columns))
  assert kernel.spilled_bytes == 0


@pytest.mark.parametrize(
  ('columns', 'dtype', 'reason'),
  [
    (8, jnp.bfloat16, None),
    (8, None, None),
    (8, jnp.float64, 'at most 32 bits, not float64'),
    (10, None, 'a multiple of 4 columns, not 10'),
    (57348, None, 'up to 57344 columns, not 57348'),
    (0, None, 'no empty arrays'),
  ],
)
def test_says_why_it_cannot_run(columns, dtype, reason, monkeypatch):
  monkeypatch.setattr(gpu_kernels, '_missing_package', lambda: None)
  logits = jnp.zeros((2, columns))
  dtype = None if dtype is None else jnp.dtype(dtype)
  assert 'this is for cpu' in triton_gpu.supports(logits, dtype)
  with implementation.compiling_for('gpu'), implementation.on_devices(1):
    said = triton_gpu.supports(logits, dtype)
  assert said is None if reason is None else reason in said


@hopper.needs_triton
def test_the_loss_takes_it_and_hands_the_gradient_to_the_products_as_it_is():
  """One kernel a chunk; what comes between it and matrix products only gives an array a shape."""
  tokens, d_model = 64, 32

  def loss(hidden, head):
    targets = jnp.zeros((2, tokens), jnp.int32)
    return cross_entropy_sum(hidden, head, targets, jnp.ones((2, tokens)), chunk=32)

  hidden = jax.ShapeDtypeStruct((2, tokens, d_model), jnp.bfloat16)
  head = jax.ShapeDtypeStruct((d_model, 77), jnp.float32)
  with implementation.compiling_for('gpu'), implementation.on_devices(1):
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, head)
  (scan,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == 'scan')
  eqns = scan.params['jaxpr'].jaxpr.eqns
  (kernel,) = (eqn for eqn in eqns if 'triton_kernel_call' in str(eqn))
  gradient = kernel.outvars[1]
  assert gradient.aval.dtype == jnp.bfloat16
  users = []
  while pending := [eqn for eqn in eqns if gradient in eqn.invars]:
    users = [eqn.primitive.name for eqn in pending]
    if pending[0].primitive.name != 'reshape':
      break
    (gradient,) = pending[0].outvars
  assert users == ['dot_general', 'dot_general']
