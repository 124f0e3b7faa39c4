"""Documents come out of every kind of file as they went in, and bad files are named."""

import gzip
import json
import lzma
import sys

import pytest

from ssm_moe.data import DataError
from ssm_moe.data.text import find_files, read_documents

TEXTS = ['one\ntwo\r\n', '', 'naïve 🐍 \u2028 x', ' ' * 70_000]
PACK = {'': lambda data: data, '.gz': gzip.compress, '.xz': lzma.compress}


def json_lines(texts, field='text'):
  return ''.join(json.dumps({'id': i, field: text}) + '\n' for i, text in enumerate(texts)).encode()


@pytest.mark.parametrize('packing', PACK)
def test_text_file_is_one_document(tmp_path, packing):
  path = tmp_path / f'a.txt{packing}'
  path.write_bytes(PACK[packing]('one\r\n\ntwo é'.encode()))
  assert list(read_documents([path])) == ['one\r\n\ntwo é']


@pytest.mark.parametrize('packing', PACK)
def test_json_lines_are_documents(tmp_path, packing):
  path = tmp_path / f'a.jsonl{packing}'
  path.write_bytes(PACK[packing](json_lines(TEXTS, 'body') + b'\n'))
  assert list(read_documents([path], 'body')) == TEXTS


def test_parquet_rows_are_documents(tmp_path):
  pa = pytest.importorskip('pyarrow')
  from pyarrow import parquet

  texts = TEXTS * 200
  path = tmp_path / 'a.parquet'
  parquet.write_table(pa.table({'id': range(len(texts)), 'text': texts}), path, row_group_size=300)
  assert list(read_documents([path])) == texts


def test_files_are_found_by_name_folder_and_glob_in_order(tmp_path):
  for name in ('b.txt', 'a.jsonl.xz', 'sub/c.txt.gz', 'README.md'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()

  def names(pattern):
    return [path.relative_to(tmp_path).as_posix() for path in find_files(pattern)]

  assert names(tmp_path) == ['a.jsonl.xz', 'b.txt', 'sub/c.txt.gz']
  assert names(tmp_path / 'b.txt') == ['b.txt']
  assert names(tmp_path / '*.txt') == ['b.txt']
  assert names(tmp_path / '**' / '*.txt*') == ['b.txt', 'sub/c.txt.gz']


@pytest.mark.parametrize(
  ('name', 'reason'),
  [('absent.txt', 'no such file'), ('*.txt', 'matches no file'), ('.', 'holds no file')],
)
def test_nothing_found_is_an_error(tmp_path, name, reason):
  with pytest.raises(DataError, match=reason):
    find_files(tmp_path / name)


def test_an_empty_name_does_not_mean_the_current_folder(tmp_path, monkeypatch):
  (tmp_path / 'a.txt').touch()
  monkeypatch.chdir(tmp_path)
  with pytest.raises(DataError, match='the name of a file is empty'):
    find_files('')


def test_an_unknown_suffix_is_an_error(tmp_path):
  (tmp_path / 'a.md').touch()
  with pytest.raises(DataError, match=r'a\.md.* must end in \.txt'):
    find_files(tmp_path / 'a.md')


GOOD_LINE = json_lines(['fine'])
BAD = {
  'empty.txt': (b'', 'the file is empty'),
  'empty.jsonl': (b'\n\n', 'the file is empty'),
  'empty.txt.xz': (lzma.compress(b''), 'the file is empty'),
  'latin.txt': ('é'.encode('latin-1'), 'not UTF-8'),
  'latin.jsonl': (GOOD_LINE + '{"text": "é"}'.encode('latin-1'), ':2: not UTF-8'),
  'broken.jsonl': (GOOD_LINE * 2 + b'{"text": ', ':3: not JSON'),
  'list.jsonl': (b'["text"]', ':1: of type list; each line must be'),
  'deep.jsonl': (GOOD_LINE + b'[' * 200_000, ':2: JSON that cannot be read .nested too deep'),
  'long.jsonl': (b'9' * 10_000, ':1: JSON that cannot be read .too many digits'),
  'field.jsonl': (b'{"body": "a"}', r":1: no field 'text'; there are: body"),
  'number.jsonl': (GOOD_LINE + b'{"text": 3}', ":2: the field 'text' is of type int"),
  'surrogate.jsonl': (rb'{"text": "\ud800"}', ':1: not Unicode text'),
  'cut.jsonl.xz': (lzma.compress(GOOD_LINE * 99)[:-20], 'truncated or damaged'),
  'cut.jsonl.gz': (gzip.compress(GOOD_LINE * 99)[:-20], 'truncated or damaged'),
  'not.txt.gz': (b'plain text', 'truncated or damaged'),
  'not.txt.xz': (b'plain text', 'truncated or damaged'),
  'not.parquet': (b'plain text', 'not a readable Parquet file'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_files_are_named_in_one_line(tmp_path, name):
  data, reason = BAD[name]
  path = tmp_path / name
  path.write_bytes(data)
  with pytest.raises(DataError, match=reason) as caught:
    list(read_documents([path]))
  assert str(path) in str(caught.value) and '\n' not in str(caught.value)


def test_bad_parquet_columns_are_named(tmp_path):
  pa = pytest.importorskip('pyarrow')
  from pyarrow import parquet

  path = tmp_path / 'a.parquet'
  parquet.write_table(pa.table({'body': ['a', None]}), path)
  with pytest.raises(DataError, match="no column 'text'; there are: body"):
    list(read_documents([path]))
  with pytest.raises(DataError, match=r'row 2: the field .* is of type NoneType'):
    list(read_documents([path], 'body'))


def test_a_missing_file_and_a_missing_library_are_errors(tmp_path, monkeypatch):
  with pytest.raises(DataError, match='no such file'):
    list(read_documents([tmp_path / 'absent.txt']))
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  with pytest.raises(DataError, match=r"pip install 'ssm_moe\[hf\]'"):
    list(read_documents([tmp_path / 'a.parquet']))
