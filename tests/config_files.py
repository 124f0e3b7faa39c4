"""Every config of the repository: each file, and each row of a file that has several."""

import pathlib
import runpy

import pytest

from ssm_moe.config import ExperimentConfig, from_config_dict

_FOLDER = pathlib.Path(__file__).parents[1] / 'experiments' / 'configs'
FILES = sorted(_FOLDER.rglob('*.py'))


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


NAMES = _names()
# The first row of each file; and all as test parameters, of which the others are run by hand.
FIRST = sorted({name.partition(':')[0]: name for name in reversed(NAMES)}.values())
FIRST_FAST = [
  name if name in FIRST else pytest.param(name, marks=pytest.mark.extended) for name in NAMES
]
