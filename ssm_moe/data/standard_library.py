"""The source code of the running Python's standard library: real text that every machine has.

A file belongs to the validation split if the SHA-256 of its path, relative to the library, is in
the lowest twentieth; both splits are in the order of that hash. A file is therefore in the same
split on every machine and, as long as it keeps its name, in every version of Python.
"""

import hashlib
import os
import pathlib
import sysconfig
from collections.abc import Iterator
from typing import Literal

from ssm_moe.data import DataError

Split = Literal['train', 'valid']
VALID_FRACTION = 0.05
# The library's own tests are more than half of its text, and distributions package them apart, as
# they do the second group: without both, most machines hold the same files. The third are tables
# that a program wrote: cheap to predict, and one file of 0.7 MB would outweigh the valid split.
_TESTS = ('test', 'tests', 'idle_test')
_APART = ('idlelib', 'tkinter', 'turtledemo', 'lib2to3', 'distutils', 'ensurepip')
_TABLES = ('encodings', 'pydoc_data')
_NOT_LIBRARY = ('site-packages', 'dist-packages', '__pycache__')
EXCLUDED_FOLDERS = frozenset((*_TESTS, *_APART, *_TABLES, *_NOT_LIBRARY))
# These hold the settings of one build, paths of the machine among them.
_EXCLUDED_PREFIXES = ('_sysconfigdata', 'config-')


def list_files(split: Split, root: pathlib.Path | None = None) -> list[pathlib.Path]:
  """Returns the files of `split`, in hash order; `root` is the running Python's library if None.

  Raises:
    DataError: there are none, as in a Python that keeps its library in a zip file.
  """
  root = pathlib.Path(sysconfig.get_path('stdlib')) if root is None else root
  hashed = []
  for folder, subfolders, names in os.walk(root):
    # In place, so that excluded folders are not even entered: site-packages can be a hundred
    # times as large as the library.
    subfolders[:] = [
      name
      for name in subfolders
      if name not in EXCLUDED_FOLDERS and not name.startswith(_EXCLUDED_PREFIXES)
    ]
    for name in names:
      path = pathlib.Path(folder, name)
      if path.suffix == '.py' and not name.startswith(_EXCLUDED_PREFIXES):
        digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
        if (int.from_bytes(digest[:8]) / 2**64 < VALID_FRACTION) == (split == 'valid'):
          hashed.append((digest, path))
  if not hashed:
    raise DataError(f'stdlib: no {split} file among the .py files under {root}')
  return [path for _, path in sorted(hashed)]


def read_documents(split: Split, root: pathlib.Path | None = None) -> Iterator[str]:
  """Yields the files of `split`; those that are empty or not UTF-8 are left out."""
  for path in list_files(split, root):
    try:
      text = path.read_bytes().decode('utf-8')
    except UnicodeDecodeError:
      continue
    if text:
      yield text
