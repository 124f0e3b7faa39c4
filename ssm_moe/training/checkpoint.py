"""Checkpoints that are whole or absent, and that are proven good before they are used.

  DIRECTORY/00000200/state/          the arrays, as Orbax writes them
  DIRECTORY/00000200/MANIFEST.json   step, metadata, config, shapes, size and SHA-256 of each file
  DIRECTORY/00000300.unfinished/     a save under way, or one that a kill cut short
  DIRECTORY/00000250.damaged/        set aside after a restore that had to fall back

A save is published by renaming its folder, after Orbax has committed and the manifest, with its own
checksum in it, is on disk, and if Orbax finds every array in it. A kill before the rename loses
this save only: older checkpoints are removed after it. Orbax alone restores flipped bits without a
word, hence the checksums.

The directory is on a POSIX file system, and one run writes to it; others may read meanwhile. If
several processes train together, all of them call `save`, `wait` and `restore`: each writes and
reads the arrays of its devices, process 0 decides and publishes, and what fails in one raises in
all. Nothing else in this project knows Orbax, but for `orbax_noise`.
"""

import concurrent.futures
import contextlib
import glob
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging

from ssm_moe.config import ExperimentConfig, to_dict
from ssm_moe.errors import UserError
from ssm_moe.shapes import PyTree
from ssm_moe.training import distributed, durable, orbax_noise
from ssm_moe.training import manifest as manifest_lib

_STATE = 'state'
_UNFINISHED = '.unfinished'
_DAMAGED = '.damaged'
_REMOVED = '.removed'
# Fields of the model's config that say how it is computed, not what: they may change on resume.
_EXECUTION_FIELDS = ('remat', 'scan_implementation')
_CHOOSE_WHAT_IS_TRAINED = ('lora.', 'optimizer.train_only', 'optimizer.freeze')
_ABSENT = object()


class SaveError(UserError):
  """A checkpoint that cannot be saved, such as on a full disk; those before it are as they were."""

  exit_status = 1


class Restored(NamedTuple):
  """What a checkpoint held.

  Attributes:
    state: The tree of the template, on the template's shardings.
    step: Training steps done.
    metadata: As given to `save`, after a round trip through JSON.
    skipped: One line for each newer checkpoint that was damaged.
    changes: One line for each field of the config that has changed since.
  """

  state: PyTree
  step: int
  metadata: dict[str, Any]
  skipped: list[str]
  changes: list[str]


class Checkpointer:
  """Saves and restores training states under one directory.

  Use it as a context manager, or call `close` in a `finally`: a save that is under way when the
  interpreter exits is lost.

  Args:
    directory: Made at the first save.
    config: The whole config as plain nested dictionaries; `config['model']` decides which
      checkpoints may be restored.
    keep_last: Newest checkpoints that are kept; the one of lowest validation loss is kept besides.

  Raises:
    UserError: the directory has a wildcard in its path.
  """

  def __init__(self, directory: str | os.PathLike, *, config: dict[str, Any], keep_last: int):
    self._directory = pathlib.Path(directory).absolute()
    if glob.escape(str(self._directory)) != str(self._directory):
      # Orbax looks for its own files by pattern: it would find none, and lose the arrays silently.
      raise UserError(
        f'{directory}: checkpoints need a path without *, ? and [; give another workdir'
      )
    self._config = config
    self._keep_last = keep_last
    self._damaged: set[int] = set()
    self._pending: concurrent.futures.Future | None = None
    self._finaliser = concurrent.futures.ThreadPoolExecutor(1, 'checkpoint')
    self._quiet = contextlib.ExitStack()
    self._quiet.enter_context(orbax_noise.kept_away())
    self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())

  def __enter__(self) -> 'Checkpointer':
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def steps(self) -> list[int]:
    """Returns the steps of whole checkpoints, oldest first, by manifest and file sizes."""
    return [step for step in self._published() if self._is_whole(step)]

  def latest_step(self) -> int | None:
    """Returns the newest of `steps`; a save under way does not count."""
    return max(self.steps(), default=None)

  def save(
    self, step: int, state: PyTree, *, metadata: dict[str, Any], valid_loss: float | None = None
  ) -> None:
    """Starts to save, after the save before has finished.

    When it returns, the arrays have been copied to the host and may be donated. A step that is
    saved already keeps its arrays; only its metadata and validation loss are replaced.

    Args:
      step: Training steps done.
      state: Arrays of any dtype, typed random keys among them, in any registered tree.
      metadata: What JSON can hold, without NaN and infinity.
      valid_loss: Decides which checkpoint is the best; None or NaN never is.

    Raises:
      ValueError or TypeError: `metadata` is not strict JSON.
      SaveError: this save, or in the background the one before, met a full disk or the like.
    """
    self.wait()
    arrays = _named_leaves(state)
    manifest = {
      'schema_version': manifest_lib.SCHEMA_VERSION,
      'step': step,
      'valid_loss': valid_loss if valid_loss is not None and math.isfinite(valid_loss) else None,
      'metadata': metadata,
      'config': self._config,
      'arrays': {name: _describe(array) for name, array in arrays.items()},
    }
    # A copy, and a refusal of what JSON cannot hold, before anything is touched.
    manifest = json.loads(manifest_lib.encode(manifest))
    folder = self._folder(step)
    unfinished = self._folder(step, _UNFINISHED)

    def prepare() -> bool:
      with _saving(folder):
        self._clean()
        if step in self.steps():
          manifest['files'] = manifest_lib.read(folder)['files']
          manifest_lib.write(folder, manifest)
          return False
        unfinished.mkdir(parents=True)
        return True

    if not distributed.on_first(prepare):
      return
    with distributed.agreed(), _saving(folder):
      # Orbax refuses arrays without elements; the template alone can make them again.
      arrays = {name: array for name, array in arrays.items() if array.size}
      self._orbax.save(unfinished / _STATE, args=ocp.args.PyTreeSave(arrays))
    self._pending = self._finaliser.submit(self._finalise, unfinished, folder, manifest)

  def wait(self) -> None:
    """Waits until the save under way is published; raises its SaveError once."""
    with distributed.agreed():
      self._wait_here()

  def _wait_here(self) -> None:
    pending, self._pending = self._pending, None
    if pending is not None:
      pending.result()

  def close(self) -> None:
    """Waits as `wait` does, and ends the background threads; without a word to other processes."""
    try:
      self._wait_here()
    finally:
      self._finaliser.shutdown()
      # What it raises once more has come out of `save` or `wait`.
      with self._quiet, contextlib.suppress(Exception):
        self._orbax.close()

  def restore(
    self,
    template: PyTree,
    *,
    first: PyTree | None = None,
    partial: bool = False,
    best: bool = False,
  ) -> Restored | None:
    """Restores the newest checkpoint whose every file has its checksum and that Orbax can read.

    Writes nothing. The next `save` sets aside what was found damaged here.

    Args:
      template: Tree of `jax.ShapeDtypeStruct` (or arrays) with a sharding each, on any mesh.
      first: In its place for a checkpoint of step 0, which a run does not write itself.
      partial: The checkpoint may hold arrays besides those of the template, for example to restore
        `{'params': ...}` of a whole training state.
      best: Takes that of lowest validation loss, if any has one, in place of the newest.

    Returns:
      None if there is no checkpoint.

    Raises:
      UserError: every checkpoint is damaged; the newest good one belongs to another architecture,
        or a newer version of this library wrote it.
    """
    self.wait()
    skipped: dict[int, str] = {}
    # Listed again after each failure: a run that is training may publish and remove meanwhile.
    while True:
      step = distributed.on_first(
        lambda: max(
          (step for step in self._published() if step not in skipped),
          key=self._rating if best else None,
          default=None,
        )
      )
      if step is None:
        break
      folder = self._folder(step)
      of_step = template if step or first is None else first
      targets = _named_leaves(of_step)
      for name, target in targets.items():
        if getattr(target, 'sharding', None) is None:
          raise ValueError(f'template: {name} has no sharding')
      try:
        with distributed.agreed(manifest_lib.DamagedError):
          manifest = manifest_lib.read(folder)
          if manifest['step'] != step:
            raise manifest_lib.DamagedError(f'holds step {manifest["step"]}')
          changes = self._check_config(folder, manifest)
          manifest_lib.check_files(folder, _share_of_files(manifest), checksums=True)
          _check_arrays(folder, manifest, targets, partial)
        with distributed.agreed(manifest_lib.DamagedError):
          state = _restore_arrays(self._orbax, folder / _STATE, targets)
      except manifest_lib.DamagedError as reason:
        skipped[step] = f'{folder.name}: {reason}'
        logging.warning('%s: checkpoint skipped: %s', folder, reason)
        continue
      self._damaged = set(skipped)
      leaves = [state[name] for name in targets]
      return Restored(
        jax.tree.unflatten(jax.tree.structure(of_step), leaves),
        manifest['step'],
        manifest['metadata'],
        list(skipped.values()),
        changes,
      )
    if skipped:
      raise UserError(
        f'{self._directory}: no checkpoint is good ({"; ".join(skipped.values())}); '
        'give another workdir to begin anew'
      )
    return None

  def _folder(self, step: int, suffix: str = '') -> pathlib.Path:
    return self._directory / f'{step:08d}{suffix}'

  def _published(self) -> list[int]:
    if not self._directory.is_dir():
      return []
    names = [path.name for path in self._directory.iterdir()]
    return sorted(int(name) for name in names if re.fullmatch(r'\d{8,}', name))

  def _rating(self, step: int) -> tuple[float, int]:
    """Orders checkpoints from the worst to the best, those without validation loss before all."""
    try:
      valid_loss = manifest_lib.read(self._folder(step))['valid_loss']
    except manifest_lib.DamagedError:
      valid_loss = None
    return -math.inf if valid_loss is None else -valid_loss, step

  def _is_whole(self, step: int) -> bool:
    folder = self._folder(step)
    if step in self._damaged:
      return False
    try:
      manifest_lib.check_files(folder, manifest_lib.read(folder), checksums=False)
    except manifest_lib.DamagedError:
      return False
    return True

  def _finalise(self, unfinished: pathlib.Path, folder: pathlib.Path, manifest: dict) -> None:
    try:
      with _saving(folder):
        # Of all processes: each waits for the others at the end of a save.
        self._orbax.wait_until_finished()
        if not distributed.is_first():
          return
        self._check_written(unfinished / _STATE, manifest['arrays'])
        manifest['files'] = manifest_lib.list_files(unfinished)
        manifest_lib.write(unfinished, manifest)
        if folder.exists():  # and is not whole, else `save` would have kept it
          _set_aside(folder)
        unfinished.rename(folder)
        durable.sync(self._directory)
        self._prune()
    except SaveError:
      with contextlib.suppress(Exception):
        # Orbax stops waiting at the first failure: what else it has begun must not miss its folder,
        # and have the next save fail.
        self._orbax.wait_until_finished()
      if distributed.is_first():
        # The disk may be full.
        shutil.rmtree(unfinished, ignore_errors=True)
      raise

  def _check_written(self, path: pathlib.Path, arrays: dict[str, Any]) -> None:
    """Checks that Orbax finds what it has just written: it has dropped arrays without a word."""
    metadata = self._orbax.metadata(path).item_metadata
    found = set() if metadata is None else set(metadata.tree)
    for name, array in arrays.items():
      if name not in found and 0 not in array['shape']:
        raise manifest_lib.DamagedError(f'Orbax did not write {name}')

  def _prune(self) -> None:
    steps = self.steps()
    keep = {*steps[-self._keep_last :], *sorted(steps, key=self._rating)[-1:]}
    for step in set(steps) - keep:
      # A kill in the middle of the removal must not leave a folder that looks like a checkpoint.
      removed = self._folder(step, _REMOVED)
      self._folder(step).rename(removed)
      shutil.rmtree(removed)

  def _clean(self) -> None:
    """Removes what kills left behind, and sets aside what the last restore found damaged."""
    for path in self._directory.glob('*'):
      if path.suffix in (_UNFINISHED, _REMOVED) and path.stem.isdigit():
        logging.info('%s: removed, a kill had cut it short', path)
        shutil.rmtree(path)
    for step in self._damaged:
      _set_aside(self._folder(step))
    self._damaged = set()

  def _check_config(self, folder: pathlib.Path, manifest: dict) -> list[str]:
    """Returns what differs from the config that saved; raises if it is the architecture."""
    # A field younger than the checkpoint has the default that stands for what was done before.
    defaults = to_dict(ExperimentConfig())
    there, here = (_merged(defaults, config) for config in (manifest['config'], self._config))
    changes = list(differences(there, here, ''))
    for change in changes:
      name = change.partition(' ')[0]
      if name.startswith('model.') and name.rpartition('.')[2] not in _EXECUTION_FIELDS:
        raise UserError(
          f'{folder}: belongs to another architecture: {change}; '
          'give another workdir, or the config of this one'
        )
      # At step 0 nothing has been trained.
      if manifest['step'] and name.startswith(_CHOOSE_WHAT_IS_TRAINED):
        raise UserError(
          f'{folder}: belongs to a run that trains other parameters: {change}; give the config of '
          'this one, or another workdir and this one as train.initialize_from'
        )
    return changes


@contextlib.contextmanager
def _saving(folder: pathlib.Path) -> Iterator[None]:
  """Turns what a save meets into one line; Orbax raises whatever the layers below it do."""
  try:
    yield
  except Exception as error:
    raise SaveError(f'{folder}: the checkpoint cannot be saved: {_reason(error)}') from error


def _reason(error: Exception) -> str:
  if isinstance(error, manifest_lib.DamagedError):
    return str(error)
  if isinstance(error, TimeoutError) and jax.process_count() > 1:  # of a barrier, it may be at once
    return 'another process has not done its part, or is gone'
  # TensorStore buries the number in a message of several hundred letters.
  number = re.search(r"os_error_code='(\d+)'", str(error))
  if number or (isinstance(error, OSError) and error.errno):
    return os.strerror(int(number[1]) if number else error.errno)
  line = str(error).partition('\n')[0][:200]
  return f'{type(error).__name__}: {line}'


def _named_leaves(tree: PyTree) -> dict[str, Any]:
  leaves = {}
  for path, leaf in jax.tree.leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if name in leaves:
      raise ValueError(f'two arrays of the state have the same path, {name}')
    leaves[name] = leaf
  return leaves


def _share_of_files(manifest: dict[str, Any]) -> dict[str, Any]:
  """Returns the manifest with the files that this process is to look at."""
  files = list(manifest['files'].items())[jax.process_index() :: jax.process_count()]
  return manifest | {'files': dict(files)}


def _describe(array: Any) -> dict[str, Any]:
  return {'shape': list(array.shape), 'dtype': str(array.dtype)}


def _restore_arrays(orbax: ocp.AsyncCheckpointer, path: pathlib.Path, targets: dict) -> dict:
  structs = {
    name: jax.ShapeDtypeStruct(target.shape, target.dtype, sharding=target.sharding)
    for name, target in targets.items()
    if target.size
  }
  restored = {}
  if structs:
    args = ocp.args.PyTreeRestore(
      item=structs,
      restore_args=ocp.checkpoint_utils.construct_restore_args(structs),
      partial_restore=True,
    )
    try:
      restored = orbax.restore(path, args=args)
    except (MemoryError, jax.errors.JaxRuntimeError):  # says nothing about the files
      raise
    except Exception as error:
      raise manifest_lib.DamagedError(f'Orbax cannot read it: {_reason(error)}') from error
  for name, target in targets.items():
    if not target.size:
      restored[name] = jnp.zeros(target.shape, target.dtype, device=target.sharding)
  return restored


def _check_arrays(
  folder: pathlib.Path, manifest: dict[str, Any], targets: dict[str, Any], partial: bool
) -> None:
  saved = manifest['arrays']
  wanted = {name: _describe(target) for name, target in targets.items()}
  for name in wanted if partial else wanted | saved:
    if wanted.get(name) == saved.get(name):
      continue
    there, here = (
      f'{tree[name]["dtype"]}{tree[name]["shape"]}' if name in tree else 'absent'
      for tree in (saved, wanted)
    )
    raise UserError(
      f'{folder}: belongs to another architecture: {name} is {there} in the checkpoint and '
      f'{here} now; give another workdir, or the config of this one'
    )


def _merged(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
  result = dict(defaults)
  for key, value in values.items():
    both = isinstance(value, dict) and isinstance(defaults.get(key), dict)
    result[key] = _merged(defaults[key], value) if both else value
  return result


def differences(there: Any, here: Any, path: str) -> Iterator[str]:
  """Yields one line for each field of two configs that differs."""
  if isinstance(there, dict) and isinstance(here, dict):
    for key in there | here:
      below = f'{path}.{key}' if path else key
      yield from differences(there.get(key, _ABSENT), here.get(key, _ABSENT), below)
    return
  there, here = (list(value) if isinstance(value, tuple) else value for value in (there, here))
  if there != here:
    there, here = ('absent' if value is _ABSENT else repr(value) for value in (there, here))
    yield f'{path} is {there} in the checkpoint and {here} now'


def _set_aside(folder: pathlib.Path) -> None:
  target = folder.with_name(folder.name + _DAMAGED)
  if folder.exists():
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)
    logging.warning('%s: damaged, set aside as %s', folder, target.name)
