"""Trains a model from its config to its report: mesh, data, model, restore, steps, evaluations.

Who may use a folder is in `workdir`; what a step computes is in `step`; what processes that train
together tell each other is in `distributed`.
"""

import contextlib
import dataclasses
import hashlib
import math
import pathlib
from typing import Any

import jax

from ssm_moe import sharding
from ssm_moe.config import ConfigError, ExperimentConfig, to_dict
from ssm_moe.data.evaluation import EvalBatches
from ssm_moe.data.pipeline import TrainBatches
from ssm_moe.data.sources import check_sources
from ssm_moe.errors import UserError
from ssm_moe.models import accounting, lm
from ssm_moe.training import distributed, durable, initial, report, trainable
from ssm_moe.training import profile as profile_lib
from ssm_moe.training import step as step_lib
from ssm_moe.training import workdir as workdir_lib
from ssm_moe.training.checkpoint import Checkpointer
from ssm_moe.training.mesh_checks import check_fits
from ssm_moe.training.metrics import MetricsLogger, read_metrics
from ssm_moe.training.optimizer import make_schedule
from ssm_moe.training.program import Program
from ssm_moe.training.progress import NotFiniteError, Progress, Window
from ssm_moe.training.signals import StopSignals


class TrainingError(UserError):
  """A run that cannot go on: not a mistake in what was given, so another exit status."""

  exit_status = 1


def train_and_evaluate(
  config: ExperimentConfig, workdir: str | pathlib.Path, *, profile_steps: str | None = None
) -> dict | None:
  """Runs the experiment of `config`, or what is left of it, in `workdir`.

  A folder with checkpoints is gone on from; a finished run is only evaluated again. Of several
  processes each must call this, with a folder that all of them see; process 0 alone writes what is
  reported.

  Args:
    config: Of the experiment.
    workdir: Where logs and checkpoints go.
    profile_steps: START:STOP, the steps that a trace in `workdir`/profile is of; see `profile`.

  Returns:
    final_step, train_loss, valid_loss, valid_bits_per_byte, tokens_per_second, workdir; None if a
    signal stopped the run, after it was saved.

  Raises:
    UserError: something in the config, the data or the folder; nothing has been written over.
    TrainingError: the loss is no longer finite.
    SaveError or OSError: what the run writes cannot be written, on a full disk say.
  """
  profiled = profile_lib.parse_steps(profile_steps, config.train.num_steps)
  distributed.check_same(config=_digest(config), workdir=str(workdir))
  workdir = pathlib.Path(workdir)
  mesh = sharding.make_mesh(config.mesh)
  check_fits(config, mesh)
  lm.check_causal(config.model, 'evaluation')
  with (
    workdir_lib.held(workdir),
    Checkpointer(
      workdir / 'checkpoints', config=to_dict(config), keep_last=config.train.keep_checkpoints
    ) as checkpointer,
  ):
    if not distributed.on_first(checkpointer.steps):
      distributed.on_first(lambda: workdir_lib.check_own(workdir))
      with distributed.agreed():
        initial.check(config, workdir)
    trainable.check(config)
    train_data, eval_data = _open_data(config, workdir, mesh)
    program = Program(config, mesh)
    # Not sooner: Ctrl-C in the work above has nothing to save.
    with StopSignals() as stop:
      state, progress, notes = _restore_or_init(config, workdir, program, checkpointer, mesh)
      if not _is_done(config, progress):
        # Else the config in the folder stays that of the run which ended there.
        distributed.on_first(lambda: workdir_lib.write_config(workdir, config))
      with _open_metrics(config, workdir, progress) as metrics:
        metrics.say(
          report.banner(
            config, mesh, workdir, train_data, eval_data, progress.step, program.num_trained
          )
        )
        for note in notes:
          metrics.say(note)
        with distributed.agreed():
          profile = profile_lib.StepProfile(
            workdir / 'profile',
            profiled if distributed.is_first() else range(0),
            first_step=progress.step + 1,
            say=metrics.say,
          )
        run = _Run(
          config,
          workdir,
          program,
          train_data,
          eval_data,
          checkpointer,
          metrics,
          distributed.StopVote(stop),
          profile,
        )
        return run.run(state, progress)


class _Run:
  """One run: what its steps, evaluations and saves share."""

  def __init__(
    self,
    config: ExperimentConfig,
    workdir: pathlib.Path,
    program: Program,
    train_data: TrainBatches,
    eval_data: EvalBatches,
    checkpointer: Checkpointer,
    metrics: 'MetricsLogger | _NoMetrics',
    stop: distributed.StopVote,
    profile: profile_lib.StepProfile,
  ):
    self._config, self._workdir, self._program = config, workdir, program
    self._train_data, self._eval_data = train_data, eval_data
    self._checkpointer, self._metrics = checkpointer, metrics
    self._stop, self._profile = stop, profile
    self._schedule = make_schedule(config.optimizer, config.train.num_steps)
    self._alarm = report.ExpertAlarm()
    account = accounting.account(config.model, config.train.sequence_length)
    self._flops_per_token = account['flops_per_token_train']

  def run(self, state: step_lib.TrainState, progress: Progress) -> dict | None:
    """Trains, evaluates and reports; returns the summary, or None if a signal came before it."""
    try:
      state, evaluation = self.train(state, progress)
      summary = None if self._stop.poll() else self.finish(state, progress, evaluation)
    except NotFiniteError as error:
      self._checkpointer.wait()
      step = self._checkpointer.latest_step()
      kept = 'there is no checkpoint' if step is None else f'the checkpoint of step {step} is kept'
      raise TrainingError(f'{error}; {kept}; try a lower learning rate') from None
    except jax.errors.JaxRuntimeError as error:
      if jax.process_count() == 1:
        raise
      # Here it is most often a broken connection.
      raise TrainingError(
        f'step {progress.step}: {str(error).splitlines()[0]}; if another process is gone, '
        f'{distributed.GO_ON}'
      ) from error
    if summary is None:
      self._checkpointer.wait()
      self._metrics.say(
        f'{self._stop.poll()}: step {progress.step} is saved in {self._workdir}; '
        'the same command goes on from there'
      )
    return summary

  def train(
    self, state: step_lib.TrainState, progress: Progress
  ) -> tuple[step_lib.TrainState, report.Evaluation | None]:
    """Runs the steps that are left, and keeps `progress` up to date.

    Metrics of a step are fetched after the next one has been dispatched, so that the devices do not
    wait for them.

    Returns:
      The state, and the evaluation of the last step if there was one.

    Raises:
      NotFiniteError: a loss is not finite; names the step.
    """
    train = self._config.train
    evaluation = None
    if self._evaluation_is_missing(progress):
      evaluation = self._evaluate(state, progress)
      if evaluation is None:
        return state, None
      self._save(state, progress, evaluation)
    if _is_done(self._config, progress):
      return state, evaluation
    batches = self._train_data.iterate(progress.step)
    try:
      ahead = self._program.put(next(batches))
      self._metrics.say('compiling ...')
      train_step = self._program.compile_train_step(state, ahead)
      window = Window(self._write_row, progress, train)
      stop = False
      while progress.step < train.num_steps and not stop:
        step = progress.step + window.pending + 1
        if self._profile.starts_before(step):
          window.flush()
          self._profile.start()
          window.restart_clock()
        with jax.transfer_guard('disallow'), self._profile.step(step):
          state, step_metrics = train_step(state, ahead)
        ahead = self._program.put(next(batches))
        window.add(step_metrics)
        if self._profile.ends_after(step):
          window.flush()
          self._profile.stop(step)
          window.restart_clock()
        last = step == train.num_steps
        evaluate = self._evaluation_is_due(step)
        save = last or step % train.checkpoint_every == 0
        # Looked at once a step: the loop must not end at a signal that nothing was saved for.
        stop = bool(self._stop.poll())
        if evaluate or save or stop:
          window.flush()
          evaluation = self._evaluate(state, progress) if evaluate else None
          stop = stop or (evaluate and evaluation is None)
          if evaluation is not None:
            stop = stop or _is_done(self._config, progress)
            save = save or (train.early_stopping_patience and progress.best_step == step)
          if save and evaluation is None and not stop:
            self._check_loss(state, ahead, progress)
          if save or stop:
            self._save(state, progress, evaluation)
          window.restart_clock()
    finally:
      batches.close()
      self._profile.stop(progress.step)
    return state, evaluation

  def _evaluation_is_due(self, step: int) -> bool:
    train = self._config.train
    return step == train.num_steps or step % train.eval_every == 0

  def _evaluation_is_missing(self, progress: Progress) -> bool:
    """Whether a signal came in the evaluation of the restored step, before its row was written."""
    if not progress.step or not self._evaluation_is_due(progress.step):
      return False

    def is_missing() -> bool:
      rows = read_metrics(self._workdir / 'metrics.jsonl')
      return not any(row['step'] == progress.step and 'valid_loss' in row for row in rows)

    return distributed.on_first(is_missing)

  def finish(
    self, state: step_lib.TrainState, progress: Progress, evaluation: report.Evaluation | None
  ) -> dict | None:
    """Evaluates if the last step has not, draws, writes a sample, and returns the summary.

    Returns None if a signal came in the evaluation.
    """
    if evaluation is None:
      self._metrics.say('evaluating ...')
      evaluation = self._sum_evaluation(state, progress)
    if evaluation is None:
      return None
    self._checkpointer.wait()
    params = self._program.model_params(state)
    sample = report.sample(self._config, params, self._train_data.tokenizer)
    if progress.has_run_out(self._config.train.early_stopping_patience):
      self._metrics.say(
        f'stopped early at step {progress.step}: the last {progress.evaluations_since_best} '
        f'evaluations had no lower validation loss than {progress.best_valid_loss:.4f}, of step '
        f'{progress.best_step}; that checkpoint is kept, and is the one that is used'
      )

    def publish() -> None:
      report.draw(self._workdir, self._config.model, evaluation)
      if sample is not None:
        with durable.naming('standard output'):
          print(sample, flush=True)

    distributed.on_first(publish)
    return self._summary(progress, evaluation)

  def _summary(self, progress: Progress, evaluation: report.Evaluation) -> dict:
    speed = progress.tokens / progress.seconds if progress.seconds else None
    best = {'best_step': progress.best_step, 'best_valid_loss': progress.best_valid_loss}
    return {
      'final_step': progress.step,
      'train_loss': progress.train_loss,
      'valid_loss': evaluation.loss,
      'valid_bits_per_byte': evaluation.bits_per_byte,
      'tokens_per_second': speed,
      'workdir': str(self._workdir),
    } | (best if self._config.train.early_stopping_patience else {})

  def _evaluate(self, state: step_lib.TrainState, progress: Progress) -> report.Evaluation | None:
    """Evaluates and writes the row of it; None if a signal came meanwhile."""
    evaluation = self._sum_evaluation(state, progress)
    if evaluation is not None:
      progress.rate(evaluation.loss)
      self._metrics.write(self._row(progress) | evaluation.row(), **evaluation.loads())
      for line in self._alarm.lines(evaluation, progress.step):
        self._metrics.say(line)
    return evaluation

  def _sum_evaluation(
    self, state: step_lib.TrainState, progress: Progress
  ) -> report.Evaluation | None:
    sums, params = None, self._program.model_params(state)
    for batch in self._eval_data:
      if self._stop.poll():
        return None
      of_batch = self._program.eval_step(params, self._program.put(batch))
      sums = of_batch if sums is None else jax.tree.map(jax.numpy.add, sums, of_batch)
    evaluation = report.Evaluation.from_sums(
      jax.device_get(sums), self._config.model, num_bytes=self._eval_data.num_bytes
    )
    if not math.isfinite(evaluation.loss):
      raise NotFiniteError(f'step {progress.step}: the validation loss is {evaluation.loss}')
    return evaluation

  def _check_loss(
    self, state: step_lib.TrainState, batch: step_lib.Batch, progress: Progress
  ) -> None:
    """Raises if the next loss is not finite: what is saved must be fit to go on from.

    The loss of a step is that of the parameters before its update. A signal leaves no time for
    this, and an evaluation has done it.
    """
    nats = float(self._program.eval_step(self._program.model_params(state), batch).nats)
    if not math.isfinite(nats):
      raise NotFiniteError(f'step {progress.step + 1}: the loss is {nats}')

  def _save(
    self,
    state: step_lib.TrainState,
    progress: Progress,
    evaluation: report.Evaluation | None,
  ) -> None:
    self._checkpointer.save(
      progress.step,
      state,
      metadata={**dataclasses.asdict(progress), 'seed': self._config.train.seed},
      valid_loss=evaluation and evaluation.loss,
    )

  def _row(self, progress: Progress) -> dict[str, Any]:
    return {
      'step': progress.step,
      'tokens': progress.tokens,
      'flops': progress.tokens * self._flops_per_token,
      'seconds': progress.seconds,
    }

  def _write_row(
    self, progress: Progress, metrics: step_lib.StepMetrics, tokens_per_second: float
  ) -> None:
    routing = report.Routing.from_aux(metrics.aux, self._config.model)
    row = self._row(progress) | {
      'train_loss': progress.train_loss,
      'tokens_per_second': tokens_per_second,
      # Of the step that was done: the optimizer counts from 0.
      'learning_rate': float(self._schedule(progress.step - 1)),
      'gradient_norm': metrics.gradient_norm,
    }
    if self._train_data.bytes_per_token:
      bits = progress.train_loss / math.log(2)
      row['train_bits_per_byte'] = bits / self._train_data.bytes_per_token
    if routing.expert_load:
      row |= {'auxiliary_loss': metrics.auxiliary_loss} | routing.row()
    self._metrics.write(row, **routing.loads())


def _open_data(
  config: ExperimentConfig, workdir: pathlib.Path, mesh: jax.sharding.Mesh
) -> tuple[TrainBatches, EvalBatches]:
  rows = distributed.local_rows(sharding.batch_sharding(mesh), config.train.batch_size)
  # One process tokenises, and the others find the result, if they look for it in the same place.
  for turn in (True, False):
    with distributed.agreed():
      if distributed.is_first() == turn:
        data = _open_share(config, workdir, rows)
  return data


def _open_share(
  config: ExperimentConfig, workdir: pathlib.Path, rows: list[int]
) -> tuple[TrainBatches, EvalBatches]:
  """Opens the data for a process that reads `rows` of each batch."""
  # Both lists, before the one or the other is tokenised.
  check_sources(config.data, vocab_size=config.model.vocab_size)
  shared = {
    'batch_size': config.train.batch_size,
    'sequence_length': config.train.sequence_length,
    'vocab_size': config.model.vocab_size,
    'cache_dir': workdir / 'tokens',
    'rows': rows,
  }
  eval_data = EvalBatches(config.data, eval_tokens=config.train.eval_tokens, **shared)
  return TrainBatches(config.data, seed=config.train.seed, **shared), eval_data


class _NoMetrics:
  """Of a process whose metrics are those of process 0."""

  def write(self, row: dict[str, Any], **_: Any) -> None:
    pass

  def say(self, text: str) -> None:
    pass


def _open_metrics(
  config: ExperimentConfig, workdir: pathlib.Path, progress: Progress
) -> contextlib.AbstractContextManager:
  with distributed.agreed():
    if not distributed.is_first():
      return contextlib.nullcontext(_NoMetrics())
    return MetricsLogger(workdir, first_step=progress.step, total_steps=config.train.num_steps)


def _is_done(config: ExperimentConfig, progress: Progress) -> bool:
  train = config.train
  return progress.step >= train.num_steps or progress.has_run_out(train.early_stopping_patience)


def _digest(config: ExperimentConfig) -> str:
  return hashlib.sha256(repr(config).encode()).hexdigest()


def _restore_or_init(
  config: ExperimentConfig,
  workdir: pathlib.Path,
  program: Program,
  checkpointer: Checkpointer,
  mesh: jax.sharding.Mesh,
) -> tuple[step_lib.TrainState, Progress, list[str]]:
  """Returns the state and progress to go on from, and what to tell the user of it."""
  restored = checkpointer.restore(program.template, first={'params': program.template.params})
  if restored is None:
    notes = distributed.on_first(lambda: workdir_lib.set_aside(workdir))
    params = None
    if config.train.initialize_from is not None:
      params, of_source = initial.read(config, mesh)
      notes += of_source
    return program.init_state(params), Progress(), notes
  if restored.step > config.train.num_steps:
    raise ConfigError(
      f'config.train.num_steps is {config.train.num_steps}; the run in {workdir} is at step '
      f'{restored.step}, so it must be at least {restored.step}'
    )
  if restored.step == 0 and config.train.initialize_from is not None:
    raise ConfigError(
      f'config.train.initialize_from is {config.train.initialize_from}; {workdir} holds parameters '
      'to begin with already, give another workdir'
    )
  if restored.step == 0:  # as `first_checkpoint` writes it
    # Other fields than the model's may have changed: no step was done with them.
    note = f'begins   with the parameters of {restored.metadata["origin"]}'
    return program.init_state(restored.state['params']), Progress(), [note]
  known = {field.name for field in dataclasses.fields(Progress)}
  progress = Progress(**{k: v for k, v in restored.metadata.items() if k in known})
  return restored.state, progress, [f'changed  {change}' for change in restored.changes]
