"""Timing of whole training steps, of any function from (state, batch) to (state, metrics)."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from ssm_moe.config import ExperimentConfig

Step = Callable[[Any, Any], tuple[Any, Any]]


class StepTimes(NamedTuple):
  """What steps took.

  Attributes:
    times: Milliseconds from the end of a step to that of the next.
    metrics: Of every step, those of the warm-up too.
    state: After the last.
  """

  times: list[float]
  metrics: list[Any]
  state: Any


def synthetic_batch(config: ExperimentConfig, seed: int) -> dict[str, np.ndarray]:
  """Returns a batch of random tokens, each row one document, every token scored."""
  rows, length = config.train.batch_size, config.train.sequence_length
  tokens = np.random.default_rng(seed).integers(
    config.model.vocab_size, size=(rows, length + 1), dtype=np.int32
  )
  return {
    'inputs': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'segment_ids': np.ones((rows, length), np.int32),
    'loss_mask': np.ones((rows, length), np.float32),
    'continues': np.zeros(rows, bool),
  }


def time_steps(step: Step, state: Any, batch: Any, *, warmup: int, repeats: int) -> StepTimes:
  """Runs steps as training does: the next one is started before the last one is waited for.

  Args:
    step: Compiled; may take its state's memory.
    state: Before the first step.
    batch: On the device; each step has the same.
    warmup: Steps that are not timed; at least 1.
    repeats: Steps that are.
  """
  metrics = []
  for _ in range(warmup):
    state, new = step(state, batch)
    metrics.append(new)
  # So that the times add up to what all steps took: the host may be late to see the end of one.
  jax.block_until_ready(state)
  ends = [time.perf_counter()]
  for i in range(repeats):
    state, new = step(state, batch)
    metrics.append(new)
    if i > 0:
      jax.block_until_ready(metrics[-2])
      ends.append(time.perf_counter())
  jax.block_until_ready(state)
  ends.append(time.perf_counter())
  times = list(1e3 * np.diff(ends))
  return StepTimes(times=times, metrics=jax.device_get(metrics), state=state)


def program_bytes(compiled: Any) -> dict[str, int]:
  """Returns what a compiled step takes: all of it, and the temporaries alone."""
  analysis = compiled.memory_analysis()
  temporaries = analysis.temp_size_in_bytes
  whole = analysis.argument_size_in_bytes + analysis.output_size_in_bytes + temporaries
  # Donated arguments are results too.
  return {'peak_bytes': whole - analysis.alias_size_in_bytes, 'temp_bytes': temporaries}


def device_peak_bytes(before: int | None = None) -> int | None:
  """Returns the most that this process has had in use on its device; None where none counts.

  Args:
    before: What this said before a run; None is returned if the run did not go beyond it.
  """
  statistics = jax.devices()[0].memory_stats()
  peak = None if statistics is None else statistics.get('peak_bytes_in_use')
  return None if peak == before else peak
