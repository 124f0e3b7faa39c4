"""A name becomes a source: text is tokenised once, and what does not fit is refused."""

import json
import os

import pytest

from ssm_moe.config import DataConfig
from ssm_moe.data import DataError, sources
from ssm_moe.data.sources import check_sources, open_sources
from ssm_moe.data.token_files import write_token_folder
from ssm_moe.data.tokenizer import ByteTokenizer, load_tokenizer


@pytest.fixture
def text(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text(''.join(json.dumps({'text': f'text {i}', 'body': 'b'}) + '\n' for i in range(9)))
  return path


def open_one(name, cache, *, vocab_size=300, split='train', **changes):
  config = DataConfig(train=(str(name),), valid=(str(name),), **changes)
  (source,) = open_sources(config, split, vocab_size=vocab_size, cache_dir=cache)
  return source


def contents(source):
  return source.tokenizer.decode(source.folder.tokens.tolist())


def test_text_is_tokenised_once(text, tmp_path, monkeypatch):
  first = open_one(text, tmp_path / 'cache')
  assert contents(first) == ''.join(f'text {i}<|endoftext|>' for i in range(9))
  monkeypatch.setattr(sources.token_files, 'write_token_folder', None)
  assert contents(open_one(text, tmp_path / 'cache')) == contents(first)


def test_whatever_decides_the_tokens_makes_another_folder(text, tmp_path, tokenizer_json):
  cache = tmp_path / 'cache'
  first = open_one(text, cache)
  assert open_one(text, cache, text_field='body').folder.num_bytes == 9
  by_file = open_one(text, cache, tokenizer=str(tokenizer_json))
  assert by_file.folder.vocab_size == by_file.tokenizer.vocab_size != 257
  os.utime(text, ns=(1, 1))
  assert open_one(text, cache).folder.name != first.folder.name
  text.write_text('{"text": "new"}')
  assert contents(open_one(text, cache)) == 'new<|endoftext|>'
  assert len(list(cache.iterdir())) == 5


def test_the_cache_directory_of_the_config_wins(text, tmp_path):
  source = open_one(text, tmp_path / 'cache', cache_dir=str(tmp_path / 'mine'))
  assert source.folder.name.startswith(str(tmp_path / 'mine'))
  assert not (tmp_path / 'cache').exists()


def test_two_processes_may_tokenise_at_once(text, tmp_path, monkeypatch):
  write = sources.token_files.write_token_folder

  def write_after_another_did(*args, **kwargs):
    monkeypatch.undo()
    open_one(text, tmp_path / 'cache')
    return write(*args, **kwargs)

  monkeypatch.setattr(sources.token_files, 'write_token_folder', write_after_another_did)
  assert open_one(text, tmp_path / 'cache').folder.num_documents == 9


def test_a_token_folder_is_used_in_place(tmp_path):
  write_token_folder(tmp_path / 'tokens', ['a', 'b'], ByteTokenizer(), source='test')
  source = open_one(tmp_path / 'tokens', tmp_path / 'cache')
  assert source.folder.name == str(tmp_path / 'tokens')
  assert not (tmp_path / 'cache').exists()


def test_the_standard_library_has_two_splits(tmp_path):
  train, valid = (open_one('stdlib', tmp_path, split=split) for split in ('train', 'valid'))
  assert train.folder.num_tokens > 10 * valid.folder.num_tokens
  assert 'import' in contents(valid)


def test_synthetic_sources_need_no_tokenizer(tmp_path):
  source = open_one('selective_copying', tmp_path, vocab_size=16, tokenizer='absent.json')
  assert source.vocab_size == 16


def test_what_does_not_fit_is_refused_in_one_line(text, tmp_path, tokenizer_json):
  cache = tmp_path / 'cache'
  tokens = tmp_path / 'tokens'
  write_token_folder(tokens, ['a'], ByteTokenizer(), source='test')
  cases = [
    (dict(name=text, vocab_size=256), 'vocab_size is 256; .* must be at least 257'),
    (dict(name='induction_heads', vocab_size=15), 'must be at least 16'),
    (dict(name=tokens, tokenizer=str(tokenizer_json)), 'made by another, set it to bytes'),
    (dict(name=tmp_path / 'absent.txt'), 'no such file .*stdlib, selective_copying'),
    (dict(name='stdlb'), 'stdlb: no such file .*stdlib'),
    (dict(name=text, text_field='author'), "a.jsonl:1: no field 'author'"),
  ]
  for arguments, reason in cases:
    with pytest.raises(DataError, match=reason) as caught:
      open_one(cache=cache, **arguments)
    assert '\n' not in str(caught.value)
  with pytest.raises(DataError, match=r'config\.data\.valid is empty'):
    open_sources(DataConfig(valid=()), 'valid', vocab_size=300, cache_dir=cache)
  assert not list(cache.glob('*')), 'text was tokenised, or files left, for nothing'


def test_all_sources_are_looked_at_before_one_is_tokenised(text, tmp_path, tokenizer_json):
  tokens, cache = tmp_path / 'tokens', tmp_path / 'cache'
  write_token_folder(tokens, ['a'], ByteTokenizer(), source='test')
  (tokens / 'metadata.json').write_text('{"schema": 99}')
  # Of the folder made by another tokenizer, the tokens are not read.
  other = tmp_path / 'other'
  write_token_folder(other, ['a'], load_tokenizer(str(tokenizer_json)), source='test')
  (other / 'tokens.bin').write_bytes(b'')
  for bad, reason in (
    (tmp_path / 'absent.txt', 'no such file'),
    (tokens, 'schema 99'),
    (other, 'made by another'),
  ):
    config = DataConfig(train=(str(text), str(bad)), valid=(str(text),))
    with pytest.raises(DataError, match=reason):
      open_sources(config, 'train', vocab_size=300, cache_dir=cache)
    for train, valid in ((str(text), str(bad)), (str(bad), str(text))):
      with pytest.raises(DataError, match=reason):
        check_sources(DataConfig(train=(train,), valid=(valid,)), vocab_size=300)
  assert not cache.exists()
  check_sources(DataConfig(train=(str(text),), valid=('stdlib',)), vocab_size=300)
  with pytest.raises(DataError, match='must be at least 257'):
    check_sources(DataConfig(train=(str(text),), valid=('induction_heads',)), vocab_size=256)
  assert not cache.exists()


def test_only_tokenising_that_lasts_is_logged(tmp_path, caplog, monkeypatch):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": "fine"}\nnot JSON\n')
  with caplog.at_level('INFO', logger='absl'), pytest.raises(DataError, match='not JSON'):
    open_one(path, tmp_path / 'cache')
  path.write_text('{"text": "fine"}\n')
  with caplog.at_level('INFO', logger='absl'):
    open_one(path, tmp_path / 'cache')
  assert not caplog.messages
  monkeypatch.setattr(sources, '_LOG_SECONDS', 0.0)
  path.write_text('{"text": "finer"}\n')
  with caplog.at_level('INFO', logger='absl'):
    open_one(path, tmp_path / 'cache')
  assert [message.partition(' ')[0] for message in caplog.messages] == ['Tokenising', 'Tokenised']


def test_a_damaged_cache_says_what_to_remove(text, tmp_path):
  folder = open_one(text, tmp_path / 'cache').folder.name
  os.truncate(os.path.join(folder, 'tokens.bin'), 4)
  with pytest.raises(DataError, match=f'truncated or damaged .remove {folder}'):
    open_one(text, tmp_path / 'cache')
