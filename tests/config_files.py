"""Every config of the repository: each file, and each row of a file that has several."""

import dataclasses
import pathlib
import runpy

import pytest

from ssm_moe.config import ExperimentConfig, ModelConfig, from_config_dict

_FOLDER = pathlib.Path(__file__).parents[1] / 'experiments' / 'configs'
# One has no config of its own.
FILES = sorted(path for path in _FOLDER.rglob('*.py') if path.stem != 'of_workdir')


def name_of(path: pathlib.Path) -> str:
  return str(path.relative_to(_FOLDER).with_suffix(''))


def load(name: str) -> ExperimentConfig:
  """Returns the config `name`: a path below experiments/configs without suffix, maybe :row."""
  stem, _, row = name.partition(':')
  get_config = runpy.run_path(str(_FOLDER / f'{stem}.py'))['get_config']
  return from_config_dict(get_config(row) if row else get_config())


def _names() -> list[str]:
  names = []
  for path in FILES:
    rows = runpy.run_path(str(path)).get('ROWS', ())
    names += [f'{name_of(path)}:{row}' for row in rows] or [name_of(path)]
  return names


def shrunken(model: ModelConfig) -> ModelConfig:
  """The same design, small enough to train: the rows of a sweep often come to the same model.

  The time is in compiling: of the scans' implementations, the one that compiles fastest.
  """
  roms = {
    name: dataclasses.replace(
      getattr(model, name).rom,
      num_experts=min(getattr(model, name).rom.num_experts, 4),
      bottleneck=getattr(model, name).rom.bottleneck and 6,
    )
    for name in ('mamba', 'mamba2')
  }
  return dataclasses.replace(
    model,
    vocab_size=31,
    d_model=16,
    num_periods=1,
    dtype='float32',
    mamba=dataclasses.replace(
      model.mamba,
      d_inner=model.mamba.d_inner and 24,
      d_state=4,
      scan_implementation='reference',
      rom=roms['mamba'],
    ),
    mamba2=dataclasses.replace(
      model.mamba2, d_state=4, head_dim=8, scan_implementation='reference', rom=roms['mamba2']
    ),
    attention=dataclasses.replace(model.attention, num_heads=2, window=8),
    mlp=dataclasses.replace(model.mlp, d_ff=24),
    moe=dataclasses.replace(model.moe, num_experts=min(model.moe.num_experts, 4), d_ff=24),
  )


def _values(tree, path=''):
  """Every field's value, with where it stands."""
  if isinstance(tree, dict):
    return {value for key, leaf in tree.items() for value in _values(leaf, f'{path}.{key}')}
  return {(path, repr(tree))}


def _rows_with_every_value():
  """Names of rows that have, among them, each value that a field has in any row, when shrunken."""
  rows = {name: _values(dataclasses.asdict(shrunken(load(name).model))) for name in NAMES}
  left, names = set.union(*rows.values()), []
  while left:
    names.append(max(rows, key=lambda name: len(rows[name] & left)))
    left -= rows[names[-1]]
  return names


NAMES = _names()
VARIED = _rows_with_every_value()
# The first row of each file; and all as test parameters, of which others are slow if they are
# among those with every value, else run by hand.
FIRST = sorted({name.partition(':')[0]: name for name in reversed(NAMES)}.values())
FIRST_FAST = [
  name
  if name in FIRST
  else pytest.param(name, marks=pytest.mark.slow if name in VARIED else pytest.mark.extended)
  for name in NAMES
]
