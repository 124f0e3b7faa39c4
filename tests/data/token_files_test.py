"""Token folders hold what was written, whole or not at all, and damage is found on opening."""

import json
import os
import pathlib
import resource
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from ssm_moe.data import DataError, token_files
from ssm_moe.data.token_files import open_token_folder, write_token_folder
from ssm_moe.data.tokenizer import ByteTokenizer, load_tokenizer
from ssm_moe.errors import UserError
from ssm_moe.new_folder import FolderExistsError

DOCUMENTS = ['def f():\n', '', 'naïve 🐍', 'x' * 1000, '']


@pytest.fixture
def folder(tmp_path):
  write_token_folder(tmp_path / 'tokens', DOCUMENTS, ByteTokenizer(), source='test')
  return tmp_path / 'tokens'


def document(folder, i):
  start, stop = folder.document_offsets[i : i + 2]
  return folder.tokens[start:stop]


def test_documents_come_back_each_with_end_of_text(folder):
  tokenizer, opened = ByteTokenizer(), open_token_folder(folder)
  assert opened.num_documents == len(DOCUMENTS)
  assert opened.num_tokens == sum(len(text.encode()) + 1 for text in DOCUMENTS)
  assert opened.num_bytes == sum(len(text.encode()) for text in DOCUMENTS)
  assert opened.tokens.dtype == np.uint16
  assert opened.source == 'test'
  for i, text in enumerate(DOCUMENTS):
    *ids, last = document(opened, i).tolist()
    assert last == tokenizer.end_of_text
    assert tokenizer.decode(ids) == text
    assert opened.document_bytes[i] == len(text.encode())


def test_hugging_face_tokens_and_their_tokenizer_come_back(tokenizer_json, tmp_path):
  tokenizer = load_tokenizer(str(tokenizer_json))
  opened = write_token_folder(tmp_path / 'tokens', DOCUMENTS, tokenizer, source='test')
  assert [tokenizer.decode(document(opened, i)[:-1]) for i in range(5)] == DOCUMENTS
  again = load_tokenizer(str(tmp_path / 'tokens' / 'tokenizer.json'))
  assert again.sha256 == opened.tokenizer_sha256


def test_ids_above_65535_are_kept(tmp_path):
  class Wide(ByteTokenizer):
    vocab_size = 70_001
    end_of_text = 70_000

    def encode_batch(self, texts):
      return [np.arange(66_000, 66_000 + len(text), dtype=np.uint32) for text in texts]

  opened = write_token_folder(tmp_path / 'tokens', ['abc'], Wide(), source='test')
  assert opened.tokens.tolist() == [66_000, 66_001, 66_002, 70_000]


def test_memory_does_not_grow_with_the_text(tmp_path):
  text = 'x' * 20_000

  def peak(count):
    tracemalloc.start()
    documents = (text + str(i) for i in range(count))
    write_token_folder(tmp_path / str(count), documents, ByteTokenizer(), source='test')
    result = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result

  # 16 MB more of text, 24 MB more of tokens.
  assert peak(1000) < peak(200) + 1e6


def test_progress_adds_up_to_the_bytes(tmp_path):
  seen = []
  write_token_folder(
    tmp_path / 'tokens', ['é' * 600_000] * 3, ByteTokenizer(), source='test', progress=seen.append
  )
  assert sum(seen) == 3 * 1_200_000 and len(seen) > 1


def test_an_existing_folder_is_left_alone(folder, tmp_path):
  before = {path.name: path.read_bytes() for path in folder.iterdir()}
  with pytest.raises(FolderExistsError, match='exists already'):
    write_token_folder(folder, ['other'], ByteTokenizer(), source='test')
  assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
  file, empty = tmp_path / 'file', tmp_path / 'empty'
  file.write_text('mine')
  empty.mkdir()
  for path in (file, empty):
    documents = iter(['other'])
    with pytest.raises(FolderExistsError):
      write_token_folder(path, documents, ByteTokenizer(), source='test')
    assert next(documents) == 'other', 'read before it was refused'
  assert file.read_text() == 'mine' and not list(empty.iterdir())


def test_a_folder_that_appears_meanwhile_is_left_alone(tmp_path):
  def documents():
    yield 'a'
    (tmp_path / 'tokens').mkdir()
    (tmp_path / 'tokens' / 'mine').touch()

  with pytest.raises(FolderExistsError):
    write_token_folder(tmp_path / 'tokens', documents(), ByteTokenizer(), source='test')
  assert [path.name for path in tmp_path.rglob('*')] == ['tokens', 'mine']


@pytest.mark.parametrize('error', [DataError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path, error):
  def documents():
    yield from ['a', 'b']
    raise error('in the middle')

  with pytest.raises(error):
    write_token_folder(tmp_path / 'a' / 'b' / 'c', documents(), ByteTokenizer(), source='test')
  assert not list(tmp_path.iterdir())
  (tmp_path / 'a').mkdir()  # but a folder that was there stays
  with pytest.raises(error):
    write_token_folder(tmp_path / 'a' / 'b', documents(), ByteTokenizer(), source='test')
  assert list(tmp_path.rglob('*')) == [tmp_path / 'a']


@pytest.mark.parametrize('name', ['tokens.bin', 'document_offsets.npy', 'metadata.json'])
def test_a_full_disk_is_said_of_the_folder_and_leaves_nothing(tmp_path, monkeypatch, name):
  def full(file, *args):
    return open('/dev/full' if str(file).endswith(name) else file, *args)

  monkeypatch.setattr(token_files, 'open', full, raising=False)
  with pytest.raises(OSError, match='No space left') as caught:
    write_token_folder(tmp_path / 'a' / 'tokens', ['a'], ByteTokenizer(), source='test')
  assert caught.value.filename == str(tmp_path / 'a' / 'tokens')
  assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_within_an_array_is_said_too(tmp_path):
  documents = ['a'] * 30_000  # 120 kB of tokens, 240 kB of offsets
  _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
  try:
    with pytest.raises(OSError, match='File too large') as caught:
      write_token_folder(tmp_path / 'tokens', documents, ByteTokenizer(), source='test')
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert caught.value.filename == str(tmp_path / 'tokens')


def test_an_error_of_reading_keeps_the_name_of_what_was_read(tmp_path):
  with pytest.raises(FileNotFoundError) as caught:
    documents = (pathlib.Path(name).read_text() for name in ['/absent/text'])
    write_token_folder(tmp_path / 'tokens', documents, ByteTokenizer(), source='test')
  assert caught.value.filename == '/absent/text'


KILLED = """
import sys
from ssm_moe.data.token_files import write_token_folder
from ssm_moe.data.tokenizer import ByteTokenizer

def documents():
  yield 'x' * 3_000_000
  print('ready', flush=True)
  sys.stdin.read()

write_token_folder(sys.argv[1], documents(), ByteTokenizer(), source='test')
"""


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_writes_is_not(
  tmp_path,
):
  path = tmp_path / 'tokens'
  process = subprocess.Popen(
    [sys.executable, '-c', KILLED, path],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)},
  )
  assert process.stdout.readline() == b'ready\n'
  (partial,) = tmp_path.iterdir()
  os.utime(partial, (1, 1))  # as if begun long ago

  def fail():
    raise DataError('stop')
    yield

  def write():
    with pytest.raises(DataError):
      write_token_folder(path, fail(), ByteTokenizer(), source='test')

  write()
  assert list(tmp_path.iterdir()) == [partial] and (partial / 'tokens.bin').stat().st_size
  process.kill()
  process.communicate()
  other = tmp_path / '.other.1-00000000.partial'
  other.mkdir()
  os.utime(partial)  # young: its writer may be about to lock it
  write()
  assert sorted(tmp_path.iterdir()) == sorted([partial, other])
  os.utime(partial, (1, 1))
  write()
  assert list(tmp_path.iterdir()) == [other]


def test_no_documents_and_no_place_are_errors(tmp_path):
  with pytest.raises(DataError, match='no document'):
    write_token_folder(tmp_path / 'tokens', [], ByteTokenizer(), source='test')
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match='cannot be written'):
    write_token_folder(tmp_path / 'file' / 'tokens', ['a'], ByteTokenizer(), source='test')


def change_metadata(folder, **changes):
  path = folder / 'metadata.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def set_token(folder, position, value):
  tokens = np.memmap(folder / 'tokens.bin', np.uint16, mode='r+')
  tokens[position] = value
  tokens.flush()


def swap_offsets(folder):
  offsets = np.load(folder / 'document_offsets.npy')
  offsets[[2, 3]] = offsets[[3, 2]]
  np.save(folder / 'document_offsets.npy', offsets)


def truncate(path, size):
  path.write_bytes(path.read_bytes()[:size])


DAMAGE = {
  'tokens cut': (lambda f: truncate(f / 'tokens.bin', -1), 'truncated or damaged'),
  'tokens gone': (lambda f: (f / 'tokens.bin').unlink(), 'truncated or damaged'),
  'offsets cut': (lambda f: truncate(f / 'document_offsets.npy', -8), 'truncated or damaged'),
  'bytes cut': (lambda f: truncate(f / 'document_bytes.npy', 40), 'truncated or damaged'),
  'offsets short': (lambda f: np.save(f / 'document_offsets.npy', np.arange(3)), r'int64 \[6\]'),
  'offsets back': (swap_offsets, 'does not cut'),
  'offsets wrong': (lambda f: np.save(f / 'document_offsets.npy', np.arange(6)), 'does not cut'),
  'bytes wrong': (lambda f: np.save(f / 'document_bytes.npy', np.arange(5)), 'does not add up'),
  'other schema': (lambda f: change_metadata(f, schema=99), 'schema 99'),
  'no schema': (lambda f: (f / 'metadata.json').write_text('{}'), 'not the metadata'),
  'no JSON': (lambda f: (f / 'metadata.json').write_text('tokens'), 'not the metadata'),
  'no metadata': (lambda f: (f / 'metadata.json').unlink(), 'cannot be read'),
  'other type': (lambda f: change_metadata(f, dtype='uint32'), 'contradicts'),
  'a missing field': (lambda f: change_metadata(f, num_tokens=None), 'contradicts'),
  'id too large': (lambda f: set_token(f, 3, 257), 'token id 257 at position 3'),
  'an end lost': (lambda f: set_token(f, -1, 7), 'does not end in end-of-text'),
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_damage_is_found_and_named_in_one_line(folder, damage):
  apply, reason = DAMAGE[damage]
  apply(folder)
  with pytest.raises(DataError, match=reason) as caught:
    open_token_folder(folder)
  assert str(folder) in str(caught.value) and '\n' not in str(caught.value)
