"""Prompts come from a file or standard input, and what is no prompt is named."""

import io
import sys

import pytest

from ssm_moe.errors import UserError
from ssm_moe.inference import prompts


def test_a_line_is_a_prompt(tmp_path):
  (tmp_path / 'p.txt').write_bytes('first one\r\n\nsecond é\n  \n third'.encode())
  assert prompts.read_file('f', str(tmp_path / 'p.txt')) == ['first one', 'second é', ' third']


def test_a_json_object_has_a_prompt(tmp_path):
  (tmp_path / 'p.jsonl').write_text('{"prompt": "a\\nb", "id": 3}\n\n{"prompt": ""}\n')
  assert prompts.read_file('f', str(tmp_path / 'p.jsonl')) == ['a\nb', '']


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('none.txt', None, r'cannot be read \(No such file or directory\)'),
    ('p.txt', b'\n \n', 'holds no prompt'),
    ('p.txt', b'ab\xff', 'byte 2 is not UTF-8'),
    (
      'p.jsonl',
      b'{"prompt": "a"}\n\n{"text": "b"}',
      'line 3 is no JSON object with a string named',
    ),
    ('p.jsonl', b'[1]', 'line 1 is no JSON object with a string named prompt'),
    ('p.jsonl', b'{"prompt": 3}', 'line 1 is no JSON object'),
  ],
)
def test_what_is_no_prompt_is_named(tmp_path, name, content, message):
  path = tmp_path / name
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(UserError, match=f'^--f={path}: {message}'):
    prompts.read_file('f', str(path))


def _standard_input(monkeypatch, content):
  monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(content)))
  return prompts.read_standard_input()


def test_standard_input_is_one_prompt(monkeypatch):
  assert _standard_input(monkeypatch, 'a\n\né\n'.encode()) == 'a\n\né'
  with pytest.raises(UserError, match='standard input: byte 1 is not UTF-8'):
    _standard_input(monkeypatch, b'a\xe9')
  monkeypatch.setattr(sys, 'stdin', None)
  with pytest.raises(UserError, match='standard input is closed'):
    prompts.read_standard_input()


@pytest.mark.parametrize(
  ('terminal', 'shown'), [(True, 'a\n\t\ufffd[31m\ufffd'), (False, 'a\n\t\x1b[31m\r')]
)
def test_a_terminal_is_not_controlled(monkeypatch, terminal, shown):
  monkeypatch.setattr(sys.stdout, 'isatty', lambda: terminal, raising=False)
  assert prompts.printable('a\n\t\x1b[31m\r') == shown
