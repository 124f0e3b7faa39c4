"""Pieces of text add up to the text, whatever its letters; a stop string ends it."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ssm_moe.data.tokenizer import ByteTokenizer
from ssm_moe.inference.text_stream import TextStream

_BYTES = ByteTokenizer()
# Bytes of letters of two to four bytes, in any order, and of stop strings.
_TOKENS = st.lists(
  st.one_of(st.integers(0, 255), st.sampled_from([*'é€🐍ab\n'.encode()])), max_size=24
)


def _streamed(tokens, tokenizer=_BYTES, **options):
  stream = TextStream(tokenizer, **options)
  pieces = [stream.push(token) for token in tokens]
  return ''.join(pieces) + stream.finish(), stream


def _oracle(text, stop):
  """Ends the text as if its letters came one by one."""
  for end in range(1, len(text) + 1):
    found = [len(s) for s in stop if text[:end].endswith(s)]
    if found:
      return text[: end - max(found)], True
  return text, False


@settings(deadline=None, max_examples=50)
@given(_TOKENS)
@example([0xE2, 0x82, 0xFF, 0xFF, 0xFF])  # the first two are one letter that is none
def test_pieces_add_up_to_the_text_of_all_tokens(tokens):
  assert _streamed(tokens)[0] == _BYTES.decode(tokens)


@settings(deadline=None, max_examples=50)
@given(_TOKENS, st.lists(st.text('ab\né\ufffd', min_size=1, max_size=3), max_size=3))
@example([*b'ab'], ['b', 'ab'])
@example([*b'aab'], ['b', 'aabb'])
def test_a_stop_string_ends_it_as_if_letters_came_one_by_one(tokens, stop):
  text, stream = _streamed(tokens, stop=stop)
  assert (text, stream.stopped) == _oracle(_BYTES.decode(tokens), stop)


@settings(deadline=None, max_examples=50)
@given(st.text('abé🐍', max_size=12), st.lists(st.text('ab🐍', min_size=1, max_size=3), max_size=2))
def test_tokens_count_when_all_of_their_text_is_given_out(text, stop):
  given_out, stream = _streamed(text.encode(), stop=stop)
  assert stream.num_tokens == len(given_out.encode())


def test_letters_wait_for_their_bytes_and_no_longer():
  stream = TextStream(_BYTES)
  assert [stream.push(byte) for byte in 'aé🐍'.encode()] == ['a', '', 'é', '', '', '', '🐍']
  # What is no letter waits until nothing can make it one.
  pieces = [stream.push(0xFF) for _ in range(6)]
  assert pieces == ['', '', '', '\ufffd', '\ufffd', '\ufffd']
  assert stream.finish() == '\ufffd' * 3


def test_the_beginning_of_a_stop_string_waits():
  stream = TextStream(_BYTES, stop=['end', 'enough'])
  assert [stream.push(byte) for byte in b'keen'] == ['k', '', 'e', '']
  assert stream.push(ord('x')) == 'enx'
  assert ''.join(stream.push(byte) for byte in b'the end of it') == 'the '
  assert stream.stopped and stream.finish() == ''


class _Spaced(ByteTokenizer):
  """Words with a space before them, which is left out before the first, as some tokenizers do."""

  def decode(self, tokens):
    return ''.join(f' w{token}' for token in tokens)[1:]


def test_a_first_word_is_spelled_as_one_that_follows():
  assert _streamed([1, 2, 3], _Spaced())[0] == 'w1 w2 w3'
  assert _streamed([1, 2, 3], _Spaced(), context=[7, 8])[0] == ' w1 w2 w3'
  # Of two stop strings in one word, the one that is complete first.
  assert _streamed([1, 2, 3], _Spaced(), stop=['w2', '1 '])[0] == 'w'


def test_a_hugging_face_tokenizer():
  tokenizers = pytest.importorskip('tokenizers')
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  spelled = tokenizers.models.BPE(
    vocab={letter: i for i, letter in enumerate(sorted(alphabet))}, merges=[]
  )
  library = tokenizers.Tokenizer(spelled)
  library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  library.decoder = tokenizers.decoders.ByteLevel()
  text = 'naïve 🐍\n snake'
  tokens = library.encode(text).ids
  assert len(tokens) == len(text.encode())
  tokenizer = ByteTokenizer()
  tokenizer.decode = library.decode
  assert _streamed(tokens, tokenizer)[0] == text
