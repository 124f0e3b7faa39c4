"""What stands between the matrix products of a step, at the sizes that are timed on a GPU."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ssm_moe.analysis.benchmark import OpBenchmark, by_implementation
from ssm_moe.analysis.benchmark_limits import Work, passes
from ssm_moe.config import NormConfig
from ssm_moe.layers.norm import make_norm
from ssm_moe.ops import causal_conv1d as conv

# B, L, D.
_CONVOLUTION_SIZES = (8, 2048, 2048)
# T, M.
_NORM_SIZES = ((16 * 2048, 768), (64 * 1024, 512))
# T, M, V.
_VOCABULARY_SIZES = ((32768, 768, 50277), (65536, 512, 50277))


def convolutions() -> list[OpBenchmark]:
  """The causal convolution and SiLU, on a GPU; with the segments that training has, and without."""
  return [_convolution(*_CONVOLUTION_SIZES, segments) for segments in (False, True)]


def _convolution(batch: int, length: int, channels: int, segments: bool) -> OpBenchmark:
  width = 4

  def make_arguments(key):
    keys = jax.random.split(key, 4)
    inputs = {
      'x': jax.random.normal(keys[0], (batch, length, channels), jnp.bfloat16),
      'kernel': jax.random.normal(keys[1], (width, channels)) / 2,
      'bias': jax.random.normal(keys[2], (channels,)) / 2,
    }
    starts = jax.random.bernoulli(keys[3], 0.005, (batch, length))
    return inputs, jnp.cumsum(starts, axis=1, dtype=jnp.int32) if segments else None

  def run(inputs, segment_ids, implementation):
    return conv.causal_conv1d(
      **inputs, activation='silu', segment_ids=segment_ids, implementation=implementation
    )[0]

  def lax_conv(inputs, _):
    x = inputs['x']
    y = jax.lax.conv_general_dilated(
      x,
      inputs['kernel'].astype(x.dtype)[:, None],
      window_strides=(1,),
      padding=((width - 1, 0),),
      dimension_numbers=('NWC', 'WIO', 'NWC'),
      feature_group_count=channels,
    )
    return jax.nn.silu(y + inputs['bias'].astype(x.dtype)[None, None])

  elements = batch * length * channels
  return OpBenchmark(
    name='causal_conv1d_silu',
    shape=f'B {batch}, L {length}, D {channels}, W {width}' + (', segments' if segments else ''),
    dtype='bfloat16',
    implementations=by_implementation(conv, run, {}) | ({} if segments else {'lax.conv': lax_conv}),
    oracle=functools.partial(run, implementation='shifted') if segments else lax_conv,
    oracle_name='the same in float32' if segments else "XLA's convolution in float32",
    make_arguments=make_arguments,
    tokens=batch * length,
    work=passes(Work(num_bytes=4 * elements), Work(num_bytes=6 * elements)),
  )


def norms() -> list[OpBenchmark]:
  """A layer's output added to the float32 residual stream, then RMSNorm, on a GPU."""
  return [_norm(*sizes) for sizes in _NORM_SIZES]


def _norm(tokens: int, d_model: int) -> OpBenchmark:
  norm = make_norm(NormConfig())

  def make_arguments(key):
    keys = jax.random.split(key, 3)
    return {
      'x': jax.random.normal(keys[0], (tokens, d_model)),
      'y': jax.random.normal(keys[1], (tokens, d_model), jnp.bfloat16),
      'scale': 1 + 0.1 * jax.random.normal(keys[2], (d_model,)),
    }, None

  def xla(inputs, _):
    x = inputs['x'] + inputs['y'].astype(jnp.float32)
    normed = norm.apply({'params': {'scale': inputs['scale']}}, x)
    return x, normed.astype(inputs['y'].dtype)

  def formula(inputs, _):
    x = inputs['x'] + inputs['y']
    mean = jnp.mean(x**2, axis=1, keepdims=True)
    return x, x * jax.lax.rsqrt(mean + NormConfig().epsilon) * inputs['scale'][None]

  elements = tokens * d_model
  return OpBenchmark(
    name='residual_rms_norm',
    shape=f'T {tokens}, M {d_model}',
    dtype='bfloat16',
    implementations={'xla': xla},
    oracle=formula,
    oracle_name='the formula in float32',
    make_arguments=make_arguments,
    tokens=tokens,
    # Read x and y, write both results; read their cotangents and the sum, write both gradients.
    work=passes(Work(num_bytes=12 * elements), Work(num_bytes=16 * elements)),
  )


def cross_entropies(cross_entropy_sum: Callable) -> list[OpBenchmark]:
  """On a GPU.

  Args:
    cross_entropy_sum: That of `training`, which this room cannot import.
  """
  return [_cross_entropy(cross_entropy_sum, *sizes) for sizes in _VOCABULARY_SIZES]


def _cross_entropy(
  cross_entropy_sum: Callable, tokens: int, d_model: int, vocab_size: int
) -> OpBenchmark:
  def make_arguments(key):
    keys = jax.random.split(key, 3)
    inputs = {
      'hidden': jax.random.normal(keys[0], (16, tokens // 16, d_model), jnp.bfloat16),
      'head': 0.02 * jax.random.normal(keys[1], (d_model, vocab_size)),
    }
    return inputs, jax.random.randint(keys[2], (16, tokens // 16), 0, vocab_size)

  def chunked(implementation, chunk):
    def run(inputs, targets):
      weights = jnp.ones(targets.shape, jnp.float32)
      return cross_entropy_sum(
        inputs['hidden'],
        inputs['head'],
        targets,
        weights,
        chunk=chunk,
        implementation=implementation,
      )

    return run

  def at_once(inputs, targets):
    hidden, head = inputs['hidden'], inputs['head'].astype(inputs['hidden'].dtype)
    logits = jnp.einsum('blm,mv->blv', hidden, head, preferred_element_type=jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - chosen)

  flops = 2 * tokens * d_model * vocab_size
  num_bytes = 2 * tokens * d_model + 4 * d_model * vocab_size
  work = passes(Work(num_bytes=num_bytes, flops=flops), Work(num_bytes=num_bytes, flops=2 * flops))
  return OpBenchmark(
    name='cross_entropy',
    shape=f'T {tokens}, M {d_model}, V {vocab_size}',
    dtype='bfloat16',
    implementations={
      f'{name}, chunks of {chunk}': chunked(name, chunk)
      for name in ('triton_gpu', 'xla')
      for chunk in (2048, 4096, 8192, 16384)
    }
    | {'at once, by autodiff': at_once},
    oracle=at_once,
    oracle_name='all logits at once in float32',
    make_arguments=make_arguments,
    tokens=tokens,
    # When a gradient is asked for, the chunked forms make it in the forward pass.
    work={name: value for name, value in work.items() if name != 'backward'},
  )
