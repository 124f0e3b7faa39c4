"""A folder that appears whole or not at all, whatever ends the process that writes it."""

import contextlib
import fcntl
import glob
import os
import pathlib
import secrets
import shutil
import time
from collections.abc import Iterator

from ssm_moe.errors import UserError

# A partial folder that is younger may not yet be locked by its writer.
_UNLOCKED_SECONDS = 2


class FolderExistsError(UserError):
  """The folder to be written exists already."""


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Gives a folder of another name to write to, which is renamed to `path` at the end.

  If the block raises, nothing of it stays. What a killed process left under its other name, the
  next one that writes the same folder removes.

  Args:
    path: A folder that does not exist yet; the folders above it are made.

  Raises:
    FolderExistsError: `path` exists; nothing in it is touched.
    UserError: `path` cannot be made.
    OSError: the system refuses to write, as on a full disk; `filename` is `path`.
  """
  path = pathlib.Path(path)
  exists = FolderExistsError(f'{path} exists already; name another folder, or remove it first')
  if os.path.lexists(path):
    raise exists
  made = [folder for folder in path.parents if not folder.exists()]
  partial = path.with_name(f'.{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial')
  try:
    partial.mkdir(parents=True)
  except OSError as error:
    raise UserError(f'{path} cannot be written ({error.strerror})') from None
  try:
    with _locked(partial):
      _remove_abandoned(path)
      yield partial
      try:
        partial.rename(path)
      except OSError:
        if not path.exists():
          raise
        raise exists from None
  except BaseException as error:
    shutil.rmtree(partial, ignore_errors=True)
    for folder in made:  # the deepest first
      with contextlib.suppress(OSError):
        folder.rmdir()
    ours = isinstance(error, OSError) and str(error.filename or partial).startswith(str(partial))
    if ours and error.errno is not None:
      raise OSError(error.errno, error.strerror, str(path)) from None
    raise


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[bool]:
  """Holds a lock on `folder`, which the system frees however the process ends; says if it could.

  A file system without such locks has none held, and none that can be held.
  """
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      yield False
    else:
      yield True
  finally:
    os.close(descriptor)


def _remove_abandoned(path: pathlib.Path) -> None:
  """Removes what killed processes have written of `path`."""
  for partial in path.parent.glob(f'.{glob.escape(path.name)}.*.partial'):
    with contextlib.suppress(OSError):
      if time.time() - partial.stat().st_mtime > _UNLOCKED_SECONDS:
        with _locked(partial) as abandoned:
          if abandoned:
            shutil.rmtree(partial, ignore_errors=True)
