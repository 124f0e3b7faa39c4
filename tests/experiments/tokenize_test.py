"""The script tokenises files, and leaves the standard library's module of its name alone."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from ssm_moe.data.token_files import open_token_folder
from ssm_moe.data.tokenizer import ByteTokenizer

ROOT = pathlib.Path(__file__).parents[2]


def run(*arguments):
  return subprocess.run(
    [sys.executable, *arguments],
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=100,
  )


@pytest.fixture
def texts(tmp_path):
  for i in range(3):
    (tmp_path / f'{i}.jsonl').write_text(f'{{"body": "text {i}"}}\n' * 2)
  return tmp_path


def test_files_become_a_folder_and_a_line_of_json(texts):
  result = run(
    'experiments/tokenize.py',
    f'--input={texts}/[01].jsonl',
    f'--input={texts}/2.jsonl',
    f'--output={texts}/tokens',
    '--text_field=body',
  )
  assert result.returncode == 0, result.stderr
  report = json.loads(result.stdout.splitlines()[-1])
  assert report == {
    'documents': 6,
    'tokens': 42,
    'bytes': 36,
    'bytes_per_token': round(36 / 42, 4),
    'output': f'{texts}/tokens',
  }
  folder = open_token_folder(texts / 'tokens')
  assert ByteTokenizer().decode(folder.tokens) == ''.join(
    f'text {i}<|endoftext|>' * 2 for i in range(3)
  )


def test_mistakes_are_told_and_nothing_is_written(texts):
  before = sorted(texts.iterdir())
  for arguments, reason in (
    ([f'--input={texts}/absent.txt', f'--output={texts}/tokens'], 'absent.txt: no such file'),
    ([f'--input={texts}/0.jsonl', f'--output={texts}/tokens'], "0.jsonl:1: no field 'text'"),
    ([f'--input={texts}/0.jsonl', f'--output={texts}/1.jsonl'], '1.jsonl exists already'),
    ([f'--input={texts}/0.jsonl'], '--output is not given'),
    ([f'--input={texts}/0.jsonl', '--outputs=x'], 'outputs'),
  ):
    result = run('experiments/tokenize.py', *arguments)
    assert result.returncode == 2
    assert reason in result.stderr and len(result.stderr.splitlines()) == 1
    assert not result.stdout
  assert sorted(texts.iterdir()) == before


def test_scripts_beside_it_still_import_the_standard_library_tokenize():
  # As Python does for a script of that folder.
  code = (
    'import sys; sys.path.insert(0, "experiments"); import inspect, tokenize;'
    'print(hasattr(tokenize, "generate_tokens"), sys.path[0])'
  )
  assert run('-c', code).stdout.split() == ['True', 'experiments']
