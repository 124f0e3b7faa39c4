"""Topologies: those that the compiler knows, and one line for the others."""

import importlib.util
import math

import pytest

from ssm_moe.analysis import chips
from ssm_moe.errors import UserError
from tests import tpu


@pytest.mark.parametrize('topology', ['v5e:3x3', 'v5e', 'h100:2x2', '', 'v4:1x1'])
def test_an_unknown_topology_names_those_there_are(topology):
  with pytest.raises(UserError, match=r'v5e:1x1, 2x2, .*; v5p:2x2x1') as raised:
    chips.chip_of(topology)
  assert '\n' not in str(raised.value)


def test_without_the_compiler_one_line_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"pip install 'ssm_moe\[tpu\]'"):
    chips.devices('v5e:2x2')


@tpu.needs_compiler
@pytest.mark.parametrize(
  'topology', [f'{chip.name}:{shape}' for chip in chips.CHIPS.values() for shape in chip.topologies]
)
def test_a_device_is_a_chip(topology):
  devices = chips.devices(topology)
  assert len(devices) == math.prod(int(n) for n in topology.partition(':')[2].split('x'))
  assert len({tuple(device.coords) for device in devices}) == len(devices)
