"""How far a run is, and the steps that it has not yet counted."""

import dataclasses
import time

import jax
import numpy as np

from ssm_moe.training import step as step_lib


class NotFiniteError(Exception):
  """Which loss is not finite, and at which step."""


@dataclasses.dataclass
class Progress:
  """How far a run is; kept in its checkpoints.

  Attributes:
    step: Steps done; also the position in the data, whose every row is a function of it.
    tokens: Trained on.
    seconds: Spent on training steps: without compilation, evaluation and saving.
    train_loss: Of the last row of metrics: the mean over the steps since the row before.
    losses: Of the steps since the last row.
    row_seconds: `seconds` at the last row.
    best_step: Of the evaluation of lowest loss; None before the first.
    best_valid_loss: That loss.
    evaluations_since_best: Those after it, none of which had a lower one.
  """

  step: int = 0
  tokens: int = 0
  seconds: float = 0.0
  train_loss: float | None = None
  losses: list[float] = dataclasses.field(default_factory=list)
  row_seconds: float = 0.0
  best_step: int | None = None
  best_valid_loss: float | None = None
  evaluations_since_best: int = 0

  def rate(self, valid_loss: float) -> None:
    """Takes note of the loss of an evaluation."""
    if self.best_valid_loss is None or valid_loss < self.best_valid_loss:
      self.best_step, self.best_valid_loss = self.step, valid_loss
      self.evaluations_since_best = 0
    else:
      self.evaluations_since_best += 1
      if valid_loss == self.best_valid_loss:  # of equals, the newest checkpoint is kept
        self.best_step = self.step

  def has_run_out(self, patience: int | None) -> bool:
    """Whether so many evaluations in a row have not brought a lower loss."""
    return patience is not None and self.evaluations_since_best >= patience


class Window:
  """The steps since the last row of metrics: their losses and their time."""

  def __init__(self, write_row, progress: Progress, train):
    self._write_row, self._progress, self._train = write_row, progress, train
    self._tokens_per_step = train.batch_size * train.sequence_length
    self._waiting: step_lib.StepMetrics | None = None
    self._clock = time.perf_counter()

  @property
  def pending(self) -> int:
    """Steps dispatched whose metrics have not been fetched."""
    return int(self._waiting is not None)

  def add(self, metrics: step_lib.StepMetrics) -> None:
    """Takes the metrics of a step just dispatched, and fetches those of the step before."""
    self.flush()
    self._waiting = metrics

  def flush(self) -> None:
    """Waits for the step in flight, counts it, and writes a row if one is due."""
    if self._waiting is None:
      return
    metrics, self._waiting = jax.device_get(self._waiting), None
    progress = self._progress
    if not (np.isfinite(metrics.loss) and np.isfinite(metrics.gradient_norm)):
      raise NotFiniteError(
        f'step {progress.step + 1}: the loss is {metrics.loss} and the gradient norm '
        f'{metrics.gradient_norm}'
      )
    now = time.perf_counter()
    progress.seconds += now - self._clock
    self._clock = now
    progress.step += 1
    progress.tokens += self._tokens_per_step
    progress.losses.append(float(metrics.loss))
    if progress.step % self._train.log_every == 0 or progress.step == self._train.num_steps:
      progress.train_loss = float(np.mean(progress.losses))
      seconds = progress.seconds - progress.row_seconds
      speed = len(progress.losses) * self._tokens_per_step / seconds
      progress.losses, progress.row_seconds = [], progress.seconds
      self._write_row(progress, metrics, speed)

  def restart_clock(self) -> None:
    """Leaves out the time since the last step."""
    self._clock = time.perf_counter()
