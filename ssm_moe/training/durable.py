"""Files that are whole or absent, and errors that name the file they are about."""

import contextlib
import os
import pathlib
from collections.abc import Iterator


def write(path: pathlib.Path, data: bytes) -> None:
  """Puts `data` in place of what `path` held, at once: a kill leaves the one or the other.

  Raises:
    OSError: names the file.
  """
  temporary = path.with_name(path.name + '.unfinished')
  with naming(path):
    with temporary.open('wb') as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def sync(folder: pathlib.Path) -> None:
  """Makes renames in `folder` survive a power cut."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


@contextlib.contextmanager
def naming(name: str | os.PathLike) -> Iterator[None]:
  """Puts `name` into an OSError without a file name, such as that of a write to a full disk."""
  try:
    yield
  except OSError as error:
    if error.filename is None:
      error.filename = str(name)
    raise
