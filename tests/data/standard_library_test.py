"""Files of the standard library are split and ordered by their names alone."""

import pathlib
import shutil
import sysconfig

import pytest

from ssm_moe.data import DataError
from ssm_moe.data.standard_library import list_files, read_documents


def relative(split, root=None):
  base = root or pathlib.Path(sysconfig.get_path('stdlib'))
  return [path.relative_to(base).as_posix() for path in list_files(split, root)]


def test_the_splits_are_disjoint_and_valid_is_a_twentieth():
  train, valid = relative('train'), relative('valid')
  assert not set(train) & set(valid)
  assert 0.02 < len(valid) / len(train + valid) < 0.1
  for name in ('dataclasses.py', 'json/decoder.py'):
    assert name in train + valid
  assert not any('test' in pathlib.PurePath(name).parts for name in train + valid)


def test_there_is_text_to_train_on():
  sizes = {split: sum(map(len, read_documents(split))) for split in ('train', 'valid')}
  assert sizes['train'] > 5e6
  assert sizes['valid'] > 1e5


@pytest.fixture
def library(tmp_path):
  root = tmp_path / 'lib'
  excluded = ['test/b.py', 'x/tests/c.py', 'x/d.txt', '_sysconfigdata_x.py', 'config-3/e.py']
  for name in [*(f'a{i}.py' for i in range(200)), *excluded]:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'# {name}\n')
  return root


def test_split_and_order_depend_on_names_only(library, tmp_path):
  valid, train = relative('valid', library), relative('train', library)
  assert sorted(train + valid) == sorted(f'a{i}.py' for i in range(200))
  assert train != sorted(train)
  elsewhere = tmp_path / 'site-packages' / 'lib'
  shutil.copytree(library, elsewhere)
  (elsewhere / valid[0]).write_text('# other text')
  assert (relative('valid', elsewhere), relative('train', elsewhere)) == (valid, train)
  # Another file moves none of the rest.
  (elsewhere / 'new.py').write_text('#')
  both = relative('valid', elsewhere) + relative('train', elsewhere)
  both.remove('new.py')
  assert both == valid + train


def test_empty_and_undecodable_files_are_left_out(library):
  names = relative('train', library)
  (library / names[0]).write_bytes(b'')
  (library / names[2]).write_bytes('# -*- coding: latin-1 -*- é'.encode('latin-1'))
  texts = list(read_documents('train', library))
  assert texts == [f'# {name}\n' for name in names if name not in (names[0], names[2])]


def test_a_library_without_files_is_an_error(tmp_path):
  with pytest.raises(DataError, match='no train file'):
    list_files('train', tmp_path)
