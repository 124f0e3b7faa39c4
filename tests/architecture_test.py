"""Imports go down only, and importing changes nothing."""

import ast
import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parent.parent

# A room may import rooms of a lower rank, and itself.
_RANKS = {
  'errors': 0,
  'shapes': 0,
  'config': 1,
  'new_folder': 1,
  'command_line': 2,
  'sharding': 2,
  'data': 2,
  'recipes': 2,
  'ops': 3,
  'layers': 4,
  'models': 5,
  'training': 6,
  'inference': 6,
  'analysis': 6,
  'interop': 6,
  'experiments': 7,
}
# `training` uses the others of its rank to report on a run, and `analysis` measures inference; not
# the other way round.
_ALLOWED = {
  ('training', 'analysis'),
  ('training', 'inference'),
  ('analysis', 'inference'),
  ('interop', 'inference'),
}


def _room(path):
  parts = path.relative_to(_ROOT).with_suffix('').parts
  return parts[1] if parts[0] == 'ssm_moe' else parts[0]


def _imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      yield node.module
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def _violations(path):
  room = _room(path)
  for name in _imports(path):
    parts = name.split('.')
    if parts[0] == 'experiments' and room != 'experiments':
      yield f'{path.name} imports {name}'
    if parts[0] != 'ssm_moe' or len(parts) < 2 or parts[1] not in _RANKS or parts[1] == room:
      continue
    if _RANKS[parts[1]] >= _RANKS[room] and (room, parts[1]) not in _ALLOWED:
      yield f'{path.name} imports {name}'


def test_imports_go_down_only():
  files = [p for d in ('ssm_moe', 'experiments') for p in (_ROOT / d).rglob('*.py')]
  assert len(files) > 20
  files = [p for p in files if p.name != '__init__.py' or len(p.relative_to(_ROOT).parts) > 2]
  assert [v for path in files for v in _violations(path)] == []


def test_an_upward_import_is_found(tmp_path, monkeypatch):
  monkeypatch.setitem(globals(), '_ROOT', tmp_path)
  planted = tmp_path / 'ssm_moe' / 'ops' / 'planted.py'
  planted.parent.mkdir(parents=True)
  planted.write_text('from ssm_moe.layers import mamba\n')
  assert list(_violations(planted))


@pytest.mark.parametrize('module', ['ssm_moe.interop.huggingface', 'ssm_moe.training.loop'])
def test_import_touches_no_device_and_no_flag(module):
  check = (
    f'import {module}, jax\n'
    'from jax._src import xla_bridge\n'
    'assert not xla_bridge.backends_are_initialized(), "a device was asked for"\n'
    'assert not jax.config.jax_enable_x64\n'
  )
  done = subprocess.run([sys.executable, '-c', check], capture_output=True, text=True, cwd=_ROOT)
  assert done.returncode == 0, done.stderr


def test_files_hold_one_idea():
  lengths = {p: len(p.read_text().splitlines()) for p in (_ROOT / 'ssm_moe').rglob('*.py')}
  assert {path.name: n for path, n in lengths.items() if n > 500} == {}
