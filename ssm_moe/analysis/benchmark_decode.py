"""Timing of generation: milliseconds of a token by batch and context, and tokens/s of prompts.

A context is there as a state: of random tokens, other ones in each row, that the model has read by
the scan of training. Attention's cache is as long as the context, and full. The loop over tokens is
one program; the likeliest token is taken. A run starts it and waits for its end.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ssm_moe.analysis import benchmark_profile, benchmark_records, benchmark_steps
from ssm_moe.config import ModelConfig
from ssm_moe.inference import decoder, loop, prefill
from ssm_moe.inference.sampling import Sampling, row_keys
from ssm_moe.models import lm
from ssm_moe.shapes import Array, Int, PyTree

_GREEDY = Sampling(temperature=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What is measured, and how often.

  Attributes:
    batch_sizes, contexts: Every pair of them.
    repeats: Timed runs of each.
    num_tokens: Of a run, each row's.
    prefill_tokens: How many are read at once; of more, some rows come after the others.
    unroll: Tokens that are one pass of the loop.
  """

  batch_sizes: tuple[int, ...]
  contexts: tuple[int, ...]
  repeats: int
  num_tokens: int
  prefill_tokens: int
  unroll: int


class Model:
  """A model with random parameters, ready to be timed."""

  def __init__(self, name: str, config: ModelConfig, *, seed: int = 0):
    self.name = name
    # In a loop over layers a prompt takes about as long, and compiles in a fraction of the time.
    self._config = lm.without_drops(dataclasses.replace(config, scan_periods=True))
    init = jax.jit(
      lambda key: nn.unbox(lm.LM(self._config).init(key, jnp.zeros((1, 2), jnp.int32)))
    )
    self._params = init(jax.random.key(seed))['params']
    self._weights = decoder.make_weights(self._params, config=self._config)
    self._numbers = np.random.default_rng(seed)

  def error(self, length: int = 256) -> float:
    """Returns how far the logits of a step are from those of a sequence, of the largest.

    In float32: in bfloat16 routers decide near-ties by rounding, and then differ altogether.
    """
    config = dataclasses.replace(self._config, dtype='float32')
    tokens = self._tokens(1, length)
    with jax.default_matmul_precision('highest'):
      expected, _ = prefill.read(self._params, tokens, config=config)
      _, state = prefill.read(self._params, tokens[:, :-1], config=config)
      one = jax.jit(functools.partial(decoder.step, config=config))
      weights = decoder.make_weights(self._params, config=config)
      actual, _ = one(weights, tokens[:, -1], decoder.apart(state, config))
    return float(jnp.max(jnp.abs(actual - expected)) / jnp.max(jnp.abs(expected)))

  def measure(self, settings: Settings) -> Iterator[dict[str, Any] | str]:
    """Yields a record for each batch and context, or why there is none."""
    for context in settings.contexts:
      config = self._of_context(context)
      for batch in settings.batch_sizes:
        try:
          yield from self._measure(config, batch, context, settings)
        except jax.errors.JaxRuntimeError as error:
          if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
          size = f'{state_bytes(config, batch) / 2**30:.1f} GiB'
          yield f'{self.name}, batch {batch}, context {context}: no memory; the state is {size}'

  def profile(self, batch: int, context: int, settings: Settings) -> list[benchmark_profile.Kernel]:
    """Returns the kernels of a run."""
    config = self._of_context(context)
    position, _ = self._position(config, batch, context, settings)
    options = benchmark_profile.COMPILER_OPTIONS if jax.default_backend() == 'gpu' else None
    compiled = self._lower(position, config, settings).compile(compiler_options=options)

    def step(position, weights):
      return compiled(weights, position)[::-1]

    return benchmark_profile.trace(step, position, self._weights, hlo=compiled.as_text())

  def program(self, batch: int, context: int, settings: Settings) -> str:
    """Returns the compiled loop over tokens, as text."""
    config = self._of_context(context)
    return self._lower(self._empty(config, batch), config, settings).compile().as_text()

  def _measure(
    self, config: ModelConfig, batch: int, context: int, settings: Settings
  ) -> Iterator[dict[str, Any]]:
    position, prompt = self._position(config, batch, context, settings)
    compiled = self._lower(position, config, settings).compile()
    times = []
    for repeat in range(settings.repeats + 1):
      start = time.perf_counter()
      tokens, position = compiled(self._weights, position)
      jax.block_until_ready((tokens, position))
      if repeat:  # the first is the warm-up
        times.append(1e3 * (time.perf_counter() - start) / settings.num_tokens)
    described = {
      'name': self.name,
      'shape': f'{shape_of(config)}, B {batch}, context {context}',
      'dtype': config.dtype,
      'implementation': 'ssm_moe',
    }
    more = {'batch_size': batch, 'context': context}
    record = benchmark_records.make_record(
      times, pass_='decode', tokens=batch, **described, **benchmark_steps.program_bytes(compiled)
    )
    more_decode = {
      'num_tokens': settings.num_tokens,
      'unroll': settings.unroll,
      'state_bytes': state_bytes(config, batch),
    }
    yield record.as_dict() | more | more_decode
    record = benchmark_records.make_record(
      prompt, pass_='prefill', tokens=batch * context, **described
    )
    yield record.as_dict() | more

  def _of_context(self, context: int) -> ModelConfig:
    if 'A' not in self._config.layers:
      return self._config
    attention = dataclasses.replace(self._config.attention, cache_length=context)
    return dataclasses.replace(self._config, attention=attention)

  def _position(
    self, config: ModelConfig, batch: int, context: int, settings: Settings
  ) -> tuple[loop.Position, list[float]]:
    """Returns where rows are after so many tokens, and the milliseconds of reading them."""
    rows = min(max(settings.prefill_tokens // context, 1), batch)
    while batch % rows:
      rows -= 1
    tokens = self._tokens(batch, context)
    position, times = self._empty(config, batch), []
    for repeat in range(-1, settings.repeats if batch == rows else 1):
      start = time.perf_counter()
      for row in range(0, batch, rows):
        logits, state = prefill.read(self._params, tokens[row : row + rows], config=config)
        position = _put(position, logits, state, row, config=config)
        # Else the states of several groups would be there at once.
        jax.block_until_ready(position)
      if repeat >= 0:  # the first compiles
        times.append(1e3 * (time.perf_counter() - start))
    return position, times

  def _empty(self, config: ModelConfig, batch: int) -> loop.Position:
    return loop.Position(
      token=jnp.zeros(batch, jnp.int32),
      state=jax.jit(lambda: decoder.initial_state(config, batch))(),
      keys=row_keys(jax.random.key(0), jnp.arange(batch)),
      drawn=jnp.zeros(batch, jnp.int32),
    )

  def _tokens(self, batch: int, length: int) -> Int[Array, 'B L']:
    return jnp.asarray(
      self._numbers.integers(self._config.vocab_size, size=(batch, length)), 'int32'
    )

  def _lower(self, position: loop.Position, config: ModelConfig, settings: Settings):
    return loop.advance.lower(
      self._weights,
      position,
      config=config,
      sampling=_GREEDY,
      num_tokens=settings.num_tokens,
      unroll=settings.unroll,
    )


@functools.partial(jax.jit, static_argnames='config', donate_argnums=0)
def _put(
  position: loop.Position, logits: Array, state: PyTree, row: int, *, config: ModelConfig
) -> loop.Position:
  """Puts the states of some rows in their place among all."""

  def put(whole, part):
    return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), row, axis=0)

  token = put(position.token, jnp.argmax(logits, axis=-1))
  state = jax.tree.map(put, position.state, decoder.apart(state, config))
  return position.replace(token=token, state=state)


def shape_of(config: ModelConfig) -> str:
  """Returns the sizes of a model, for people."""
  return f'{config.num_periods} x ({config.pattern}), M {config.d_model}, V {config.vocab_size}'


def state_bytes(config: ModelConfig, batch: int) -> int:
  """Returns the bytes of a state."""
  state = jax.eval_shape(functools.partial(lm.initial_state, config, batch))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def table(records: list[dict[str, Any]]) -> str:
  """Returns the records of generation as lines: a row a model and batch, a column a context."""
  decodes = [record for record in records if record['pass'] == 'decode']
  contexts = sorted({record['context'] for record in decodes})
  head = ['model', 'batch', *(f'ms a token, {context}' for context in contexts)]
  head += ['tokens/s', 'state, MiB', 'prompt, tokens/s']
  rows = [head]
  for name, batch in dict.fromkeys((r['name'], r['batch_size']) for r in decodes):
    of_row = {
      (r['context'], r['pass']): r for r in records if (r['name'], r['batch_size']) == (name, batch)
    }
    times = [of_row.get((context, 'decode')) for context in contexts]
    last = next(record for record in reversed(times) if record is not None)
    prompt = of_row[last['context'], 'prefill']
    rows.append(
      [
        name,
        str(batch),
        *('-' if record is None else f'{record["median_ms"]:.3f}' for record in times),
        f'{last["tokens_per_second"]:,.0f}',
        f'{last["state_bytes"] / 2**20:,.1f}',
        f'{prompt["tokens_per_second"]:,.0f}',
      ]
    )
  widths = [max(map(len, column)) for column in zip(*rows)]
  return '\n'.join('  '.join(cell.rjust(n) for cell, n in zip(row, widths)) for row in rows)
