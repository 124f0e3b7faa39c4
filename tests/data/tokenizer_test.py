"""Tokenizers give back the text they were given, and never mistake text for its end."""

import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_moe.data import DataError
from ssm_moe.data.tokenizer import ByteTokenizer, load_tokenizer


@settings(deadline=None)
@given(st.text())
def test_bytes_round_trip_and_never_give_end_of_text(text):
  tokenizer = ByteTokenizer()
  ids = tokenizer.encode(text)
  assert len(ids) == len(text.encode())
  assert tokenizer.end_of_text not in ids
  assert tokenizer.decode(ids) == text


@settings(deadline=None)
@given(st.lists(st.integers(0, 300)))
def test_bytes_decode_whatever_a_model_samples(ids):
  assert isinstance(ByteTokenizer().decode(ids), str)


def test_bytes_decode_shows_where_a_document_ends():
  # The two bytes of é on both sides of the end are no é.
  assert ByteTokenizer().decode([97, 0xC3, 256, 0xA9, 98, 299]) == 'a\ufffd<|endoftext|>\ufffdb'


@pytest.mark.parametrize('text', ['', 'the cat', 'naïve 🐍\n', ' <|endoftext|> </s> <s>'])
def test_hugging_face_round_trips_all_of_the_text_and_only_the_text(tokenizer_json, text):
  tokenizer = load_tokenizer(str(tokenizer_json))
  ids = tokenizer.encode(text).tolist()
  assert tokenizer.decode(ids) == text
  specials = {0, 1, 2}
  assert specials.isdisjoint(ids)
  assert [batch.tolist() for batch in tokenizer.encode_batch([text, 'mat', text])][::2] == [ids] * 2


@pytest.mark.parametrize('text', ['', 'the cat', 'naïve 🐍\n'])
def test_bytes_of_tokens_are_those_of_the_text_and_the_end_has_none(tokenizer_json, text):
  for name in ('bytes', str(tokenizer_json)):
    tokenizer = load_tokenizer(name)
    ids = np.append(tokenizer.encode(text), np.uint32(tokenizer.end_of_text))
    assert tokenizer.num_bytes(ids) == len(text.encode())
  # A character that is cut counts by its bytes.
  assert ByteTokenizer().num_bytes(ByteTokenizer().encode('🐍')[:3]) == 3


def test_hugging_face_prefers_endoftext_and_counts_ids(tokenizer_json):
  tokenizer = load_tokenizer(str(tokenizer_json))
  assert tokenizer.end_of_text == 1  # not </s>, which is 0
  ids = json.loads(tokenizer_json.read_bytes())['model']['vocab'].values()
  assert tokenizer.vocab_size == max(ids) + 1
  assert isinstance(tokenizer.decode([1, tokenizer.vocab_size + 5]), str)


def test_two_tokenizers_have_two_hashes(tokenizer_json, tmp_path):
  other = tmp_path / 'other.json'
  other.write_bytes(tokenizer_json.read_bytes() + b'\n')
  hashes = {load_tokenizer(name).sha256 for name in ('bytes', str(tokenizer_json), str(other))}
  assert len(hashes) == 3


def test_bad_tokenizers_are_named_in_one_line(tokenizer_json, tmp_path):
  values = json.loads(tokenizer_json.read_bytes())
  values['added_tokens'] = []
  values['post_processor'] = None
  values['model']['vocab'] = {name: id for name, id in values['model']['vocab'].items() if id > 2}
  no_end = tmp_path / 'no_end.json'
  no_end.write_text(json.dumps(values))
  broken = tmp_path / 'broken.json'
  broken.write_text('{"model": 3}')
  for path, reason in (
    (no_end, 'no end-of-text token'),
    (broken, 'not a Hugging Face tokenizer.json'),
    (tmp_path / 'absent.json', 'cannot be read'),
  ):
    with pytest.raises(DataError, match=reason) as caught:
      load_tokenizer(str(path))
    assert str(path) in str(caught.value) and '\n' not in str(caught.value)


def test_a_missing_library_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tokenizers', None)
  with pytest.raises(DataError, match=r"pip install 'ssm_moe\[hf\]'"):
    load_tokenizer('tokenizer.json')
