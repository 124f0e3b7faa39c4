"""A trace of a few training steps by JAX's profiler, for TensorBoard, Perfetto or XProf.

Process 0 writes it, with its own devices and threads; the other processes do the same steps.
"""

import contextlib
import pathlib
import re
from collections.abc import Callable

import jax

from ssm_moe.errors import UserError


class ProfileError(UserError):
  """Steps that cannot be traced."""


def parse_steps(text: str | None, num_steps: int) -> range:
  """Returns the steps that START:STOP names, half open and counted from 1; none for None.

  Args:
    text: '10:15' stands for steps 10 to 14, as metrics.jsonl counts them.
    num_steps: Of the whole run.

  Raises:
    ProfileError: it is no such range, is empty, or goes beyond the run.
  """
  if text is None:
    return range(0)
  match = re.fullmatch(r'(\d+):(\d+)', text.strip())
  if not match:
    raise ProfileError(f'--profile_steps={text}: it must be START:STOP, two numbers, such as 10:15')
  start, stop = int(match[1]), int(match[2])
  if start < 1:
    raise ProfileError(f'--profile_steps={text}: the first step is 1')
  if stop <= start:
    raise ProfileError(
      f'--profile_steps={text}: no step is in it; STOP is left out, so it must be beyond START'
    )
  if stop > num_steps + 1:
    raise ProfileError(
      f'--profile_steps={text}: the run has {num_steps} steps, so STOP may be at most '
      f'{num_steps + 1}'
    )
  return range(start, stop)


class StepProfile:
  """Traces the steps of a range; the caller says where it is, and has nothing in flight then.

  Args:
    folder: Where the trace goes, as TensorBoard looks for it: plugins/profile/TIME/HOST.xplane.pb.
    steps: Which; those that an earlier run has done are left out.
    first_step: The first step that this run does.
    say: Tells the user.

  Raises:
    ProfileError: the folder cannot be made.
  """

  def __init__(
    self, folder: pathlib.Path, steps: range, *, first_step: int, say: Callable[[str], None]
  ):
    self._folder, self._say = folder, say
    self._steps = range(max(steps.start, first_step), steps.stop)
    self._started: int | None = None
    if not steps:
      return
    if not self._steps:
      say(f'profile  steps {steps[0]} to {steps[-1]} are done already: there is no trace of them')
      return
    try:
      folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise ProfileError(f'{folder}: the trace cannot be written ({error.strerror})') from None

  def starts_before(self, step: int) -> bool:
    return bool(self._steps) and step == self._steps[0]

  def ends_after(self, step: int) -> bool:
    return bool(self._steps) and step == self._steps[-1]

  def start(self) -> None:
    self._started = self._steps[0]
    jax.profiler.start_trace(str(self._folder))

  def step(self, number: int) -> contextlib.AbstractContextManager:
    """Marks the step in the trace."""
    if self._started is None:
      return contextlib.nullcontext()
    return jax.profiler.StepTraceAnnotation('train', step_num=number)

  def stop(self, step: int) -> None:
    """Writes the trace, if one is being taken; `step` is the last one in it.

    A trace that cannot be written is no reason to end a run.
    """
    if self._started is None:
      return
    started, self._started, self._steps = self._started, None, range(0)
    try:
      jax.profiler.stop_trace()
    except (OSError, RuntimeError) as error:
      self._say(f'profile  cannot be written to {self._folder}: {str(error).splitlines()[0]}')
    else:
      self._say(f'profile  of steps {started} to {step} is in {self._folder}')
