"""The folder of a run: tried before the work begins, held by one process, never another's.

Of several processes that train together, process 0 holds it for all of them.

A run may write over config.json, metrics.jsonl and its figures only if they are its own, or those
of a run that came to no checkpoint. WORKDIR/lock is there while a process trains and holds its id;
the lock itself belongs to the kernel, so that a kill frees it.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import re
import secrets
import time
from collections.abc import Iterator

import jax
from absl import logging

from ssm_moe.config import ExperimentConfig, from_config_dict, from_json, to_dict
from ssm_moe.errors import UserError
from ssm_moe.training import distributed, durable
from ssm_moe.training.metrics import read_metrics

_FILES = ('config.json', 'metrics.jsonl', 'loss.png', 'expert_load.png')
TOKENIZER = 'tokenizer.json'  # of a run that keeps its own
_FOLDERS = ('checkpoints', 'tensorboard')
# A network file system may show a new file only when its cache is a few seconds old.
_SEEN_SECONDS = 20


@contextlib.contextmanager
def held(workdir: pathlib.Path) -> Iterator[None]:
  """Makes the folder, tries that it can be written, and keeps other runs out of it.

  Folders made here are removed at the end if nothing has been written to them.

  Raises:
    UserError: it cannot be made or written, another run trains in it, or the processes of this one
      do not all see it.
  """
  with contextlib.ExitStack() as stack:
    with distributed.agreed():
      if re.match(r'\w+:/', str(workdir)):  # pathlib makes one slash of two
        raise UserError(f'{workdir}: the workdir must be a path; mount a bucket to write to it')
      if distributed.is_first():
        stack.enter_context(_held(workdir))
    _check_shared(workdir)
    yield


def _check_shared(workdir: pathlib.Path) -> None:
  """Checks that every process sees what process 0 writes: each saves its part of a checkpoint."""
  if jax.process_count() == 1:
    return
  name = distributed.on_first(lambda: f'shared-{secrets.token_hex(8)}')
  try:
    distributed.on_first(lambda: (workdir / name).touch())
    with distributed.agreed():
      until = time.monotonic() + _SEEN_SECONDS
      while not (workdir / name).exists():
        if time.monotonic() > until:
          raise UserError(
            f'{workdir} is not the folder of process 0; the workdir must be on storage that all '
            'processes share'
          )
        time.sleep(0.1)
  finally:
    if distributed.is_first():
      (workdir / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _held(workdir: pathlib.Path) -> Iterator[None]:
  made: list[pathlib.Path] = []
  try:
    with _refusing(workdir):
      made = [path for path in (workdir, *workdir.parents) if not os.path.lexists(path)]
      if not made and not workdir.is_dir():
        raise UserError(f'{workdir}: the workdir is a file; give a folder, or a path that is free')
      workdir.mkdir(parents=True, exist_ok=True)
      _check_kinds(workdir)
      descriptor = _lock(workdir)
    try:
      with _refusing(workdir):
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f'{os.getpid()}\n'.encode(), 0)
      yield
    finally:
      # Still locked: who has opened this file meanwhile finds that it is no longer in its place.
      (workdir / 'lock').unlink(missing_ok=True)
      os.close(descriptor)
  finally:
    for path in made:
      with contextlib.suppress(OSError):
        path.rmdir()


def check_own(workdir: pathlib.Path) -> None:
  """Checks a folder without checkpoints: what is in the way must be of a run of this library.

  Raises:
    UserError: names the file that would be written over.
  """
  there = [workdir / name for name in _FILES if (workdir / name).exists()]
  if there and _read_config(workdir) is None:
    raise UserError(
      f'{there[0]} is there and of no run that ssm_moe knows, but a run would write over it; '
      'give another workdir'
    )


def set_aside(workdir: pathlib.Path) -> list[str]:
  """Keeps, under other names, the config and the metrics of a run whose checkpoints are gone.

  Those of a run that was stopped before its first checkpoint stay, to be written over: the run that
  begins now does the same steps again.

  Args:
    workdir: Without checkpoints, and found to be a run's by `check_own`.

  Returns:
    What to tell the user.
  """
  config, metrics = _read_config(workdir), workdir / 'metrics.jsonl'
  steps = [row['step'] for row in read_metrics(metrics)] if metrics.exists() else []
  if not steps or max(steps) < min(config.train.checkpoint_every, config.train.num_steps):
    return []
  # A number is looked for that is free: nothing that was set aside is lost the next time.
  number, suffix = 1, '.old'
  while any(os.path.lexists(workdir / (name + suffix)) for name in _FILES[:2]):
    number += 1
    suffix = f'.old{number}'
  for name in _FILES[:2]:
    (workdir / name).rename(workdir / (name + suffix))
  return [
    f'the run that was in {workdir} has no checkpoint, so another begins; its metrics, up to step '
    f'{max(steps)}, and its config are kept as metrics.jsonl{suffix} and config.json{suffix}'
  ]


def write_config(workdir: pathlib.Path, config: ExperimentConfig) -> None:
  """Writes WORKDIR/config.json."""
  durable.write(workdir / 'config.json', json.dumps(to_dict(config), indent=2).encode() + b'\n')


def read_config(workdir: pathlib.Path) -> ExperimentConfig:
  """Reads WORKDIR/config.json of a run; a tokenizer in the folder is found where that is now.

  Raises:
    UserError: it is missing or cannot be understood.
  """
  file = workdir / 'config.json'
  if not file.is_file():
    raise UserError(f'{workdir}: has no config.json; it must be a folder that train.py wrote')
  experiment = from_json(file)
  named, own = pathlib.Path(experiment.data.tokenizer), workdir / TOKENIZER
  if named.name == TOKENIZER and not named.exists() and own.is_file():
    data = dataclasses.replace(experiment.data, tokenizer=str(own))
    experiment = dataclasses.replace(experiment, data=data)
  return experiment


def _read_config(workdir: pathlib.Path) -> ExperimentConfig | None:
  """Returns what `write_config` wrote; None if it did not."""
  try:
    values = json.loads((workdir / 'config.json').read_bytes())
    known = to_dict(ExperimentConfig()).keys()
    # Those of an older version have fewer groups of fields.
    is_one = isinstance(values, dict) and {'model', 'data', 'train'} <= values.keys() <= known
    return from_config_dict(values) if is_one else None
  except (OSError, ValueError, RecursionError):
    return None


def _check_kinds(workdir: pathlib.Path) -> None:
  for name in _FOLDERS:
    path = workdir / name
    if os.path.lexists(path) and not (path.is_dir() and os.access(path, os.W_OK | os.X_OK)):
      raise UserError(f'{path}: not a folder that can be written; give another workdir')
  for name in _FILES:
    path = workdir / name
    if os.path.lexists(path) and not (path.is_file() and os.access(path, os.W_OK)):
      raise UserError(f'{path}: not a file that can be written; give another workdir')


def _lock(workdir: pathlib.Path) -> int:
  """Returns the descriptor that holds the lock until it is closed."""
  path = workdir / 'lock'
  while True:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
      content = os.pread(descriptor, 100, 0)
      if not re.fullmatch(rb'\d*\n?', content):
        raise UserError(f'{path} is there and of no run that ssm_moe knows; give another workdir')
      try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        holder = f'another process ({content.decode().strip() or "just started"})'
        raise UserError(
          f'{holder} is training in {workdir}; wait for its end, or give another workdir'
        ) from None
      except OSError as error:
        logging.warning('%s cannot be locked (%s): let no other run use it', path, error.strerror)
      # The process that held it may have removed this file after it was opened here.
      if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
        return descriptor
    except BaseException:
      os.close(descriptor)
      raise
    os.close(descriptor)


@contextlib.contextmanager
def _refusing(workdir: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise UserError(f'{workdir}: the workdir cannot be written ({error.strerror})') from error
