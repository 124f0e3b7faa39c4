"""Prompts of a user, from a file or standard input; and text that a terminal can show."""

import json
import pathlib
import sys

from ssm_moe.errors import UserError


def read_file(flag: str, path: str) -> list[str]:
  """Returns the prompts of a file: a line each, or in a .jsonl file the field `prompt` of each.

  Empty lines are none.

  Args:
    flag: Where `path` was given, for messages.
    path: Of the file, in UTF-8.

  Raises:
    UserError: it cannot be read, or holds no prompt, or a line that is none.
  """
  try:
    text = pathlib.Path(path).read_bytes().decode()
  except OSError as error:
    raise UserError(f'--{flag}={path}: cannot be read ({error.strerror})') from None
  except UnicodeDecodeError as error:
    raise UserError(f'--{flag}={path}: byte {error.start} is not UTF-8') from None
  lines = [(number, line) for number, line in enumerate(text.split('\n'), 1) if line.strip()]
  if path.endswith('.jsonl'):
    prompts = [_prompt(f'--{flag}={path}: line {number}', line) for number, line in lines]
  else:
    prompts = [line.removesuffix('\r') for _, line in lines]
  if not prompts:
    raise UserError(f'--{flag}={path}: holds no prompt')
  return prompts


def read_standard_input() -> str:
  """Returns all of standard input, without the end of its last line.

  Raises:
    UserError: it is closed, or not UTF-8.
  """
  if sys.stdin is None:
    raise UserError('--prompt is not given, and standard input is closed')
  try:
    return sys.stdin.buffer.read().decode().removesuffix('\n')
  except UnicodeDecodeError as error:
    raise UserError(f'standard input: byte {error.start} is not UTF-8') from None


def _prompt(where: str, line: str) -> str:
  try:
    prompt = json.loads(line)['prompt']
  except (ValueError, KeyError, TypeError):
    prompt = None
  if not isinstance(prompt, str):
    raise UserError(f'{where} is no JSON object with a string named prompt')
  return prompt


def printable(text: str) -> str:
  """Returns text for standard output: for a terminal, without what would control it."""
  if not sys.stdout.isatty():
    return text
  return ''.join(c if c.isprintable() or c in '\n\t' else '\ufffd' for c in text)
