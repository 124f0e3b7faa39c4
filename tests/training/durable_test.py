"""A file has its old or its new content whatever happens, and an error says which file it was."""

import os
import pathlib

import pytest

from ssm_moe.training import durable
from tests.training import full_disk


def test_a_write_that_fails_leaves_the_old_content_and_names_the_file(tmp_path):
  path = tmp_path / 'file'
  durable.write(path, b'old')
  with full_disk.beyond(2), pytest.raises(OSError) as error:
    durable.write(path, b'new content')
  assert error.value.filename == str(path)
  assert path.read_bytes() == b'old'
  durable.write(path, b'new content')
  assert path.read_bytes() == b'new content'
  assert os.listdir(tmp_path) == ['file']


def test_a_name_that_an_error_has_is_kept():
  with pytest.raises(FileNotFoundError) as error, durable.naming('other'):
    pathlib.Path('/absent/file').read_text()
  assert error.value.filename == '/absent/file'
