"""Compiling for a slice of chips that is not at hand, and what to say of it."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from ssm_moe.analysis import compiled, memory, roofline
from ssm_moe.analysis.chips import Chip
from ssm_moe.errors import UserError


class CompilerError(UserError):
  """The compiler refused a program, for another reason than that it does not fit."""

  exit_status = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compilation:
  """What became of a function.

  Attributes:
    step: What the compiled program does; None if it does not fit.
    bytes_by_kind: That it takes on each device, as the compiler says; None likewise.
    required_bytes: That the compiler says it would take, if it does not fit and the compiler says.
    trace_seconds, compile_seconds: Time taken on this machine.
  """

  step: compiled.Step | None
  bytes_by_kind: dict[str, int] | None
  required_bytes: int | None
  trace_seconds: float
  compile_seconds: float

  @property
  def num_bytes(self) -> int | None:
    """Of a device, in use or required; None if it is not known."""
    if self.bytes_by_kind is None:
      return self.required_bytes
    return self.bytes_by_kind['peak'] + self.bytes_by_kind['code']


def compile_function(lower: Callable[..., jax.stages.Lowered], *arguments: Any) -> Compilation:
  """Traces and compiles.

  Args:
    lower: Of a jitted function.
    arguments: Shapes with layouts.

  Raises:
    CompilerError: the compiler refuses, not for want of main memory.
  """
  start = time.perf_counter()
  lowered = lower(*arguments)
  traced = time.perf_counter()
  step, bytes_by_kind, required = None, None, None
  try:
    executable = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    message = str(error)
    if 'RESOURCE_EXHAUSTED' not in message or 'hbm' not in message.lower():
      raise CompilerError(f'the TPU compiler refuses: {message.splitlines()[0]}') from error
    required = memory.required_bytes(message)
  else:
    step = compiled.read_step(executable.as_text())
    bytes_by_kind = _bytes_by_kind(executable.memory_analysis())
  return Compilation(
    step=step,
    bytes_by_kind=bytes_by_kind,
    required_bytes=required,
    trace_seconds=traced - start,
    compile_seconds=time.perf_counter() - traced,
  )


def _bytes_by_kind(analysis: Any) -> dict[str, int]:
  return {
    'arguments': analysis.argument_size_in_bytes,
    # What takes the place of a donated argument needs no room.
    'results': analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
    # These share room, and some are in faster memory: the peak is what counts.
    'temporaries': analysis.temp_size_in_bytes,
    'peak': analysis.peak_memory_in_bytes,
    'code': analysis.generated_code_size_in_bytes,
  }


def describe(
  compilation: Compilation,
  chip: Chip,
  *,
  num_devices: int,
  tokens: int,
  model_flops: int,
  closed_form_bytes: dict[str, int],
) -> dict[str, Any]:
  """Returns the figures of a compilation, as JSON holds them; null for what is not known.

  Args:
    compilation: What became of the function.
    chip: That it was compiled for.
    num_devices: How many of them.
    tokens: Of one step.
    model_flops: Closed form, of all tokens.
    closed_form_bytes: Per device, by kind; their sum stands in where the compiler says nothing.
  """
  step = compilation.step
  closed_form = sum(closed_form_bytes.values())
  figures = {
    'fits': step is not None,
    'bytes_per_device': compilation.num_bytes or closed_form,
    'chip_bytes': chip.hbm_bytes,
    'flops_closed_form': model_flops,
    'flops_compiled': None,
    'collectives': None,
    'estimated_step_seconds': None,
    'estimated_mfu': None,
  }
  detail = {
    'bytes_compiled': compilation.bytes_by_kind,
    'bytes_closed_form': closed_form_bytes | {'sum': closed_form},
    'tokens_per_step': tokens,
    'trace_seconds': compilation.trace_seconds,
    'compile_seconds': compilation.compile_seconds,
  }
  if step is not None:
    estimate = roofline.estimate(
      step, chip, num_devices=num_devices, tokens=tokens, model_flops=model_flops
    )
    figures |= {
      'flops_compiled': step.flops * num_devices,
      'collectives': step.by_kind(),
      'estimated_step_seconds': estimate.seconds,
      'estimated_mfu': estimate.mfu,
    }
    detail |= {
      'estimate': dataclasses.asdict(estimate),
      'hbm_traffic_bytes_per_device': step.hbm_bytes,
      'loops_of_unknown_length': step.unknown_loops,
      'kernels_without_flops': step.kernels_without_flops,
    }
  return {**figures, 'detail': detail}
