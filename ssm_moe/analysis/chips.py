"""TPU chips by their published figures, and slices of them that can be compiled for without one.

Sources: https://docs.cloud.google.com/tpu/docs/v4, and v5e, v5p and v6e there, which give peak,
memory and, except for v4, the bidirectional interconnect bandwidth of a chip, here divided by two
directions and the number of its links. v4's links: https://arxiv.org/abs/2304.01433.
"""

import dataclasses
import importlib.util
import os

import jax
from jax.experimental import topologies

from ssm_moe.errors import UserError

_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """A TPU chip; a device of JAX is a whole one.

  Attributes:
    name: Before the colon of a topology.
    peak_flops: Operations per second of bfloat16 matrix products.
    hbm_bytes: Main memory.
    hbm_bandwidth: Of that, in bytes per second.
    ici_link_bandwidth: Of one link to a neighbour, one way, in bytes per second.
    ici_links: Links of a chip.
    topologies: Slices that Google Cloud lends, smallest first.
    accelerator_type: Of such a slice, as the driver wants it named.
    chip_config: How the driver is to see a chip; None is as it does.
  """

  name: str
  peak_flops: float
  hbm_bytes: int
  hbm_bandwidth: float
  ici_link_bandwidth: float
  ici_links: int
  topologies: tuple[str, ...]
  accelerator_type: str
  chip_config: str | None = None


_PLANES = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8')

CHIPS = {
  chip.name: chip
  for chip in (
    Chip(
      name='v4',
      peak_flops=275e12,
      hbm_bytes=32 * _GIB,
      hbm_bandwidth=1200e9,
      ici_link_bandwidth=50e9,
      ici_links=6,
      topologies=_CUBES,
      accelerator_type='v4-8',
      # Else each of the two cores of a chip is a device.
      chip_config='megacore',
    ),
    Chip(
      name='v5e',
      peak_flops=197e12,
      hbm_bytes=16 * _GIB,
      hbm_bandwidth=819e9,
      ici_link_bandwidth=50e9,
      ici_links=4,
      topologies=_PLANES,
      accelerator_type='v5litepod-4',
    ),
    Chip(
      name='v5p',
      peak_flops=459e12,
      hbm_bytes=95 * _GIB,
      hbm_bandwidth=2765e9,
      ici_link_bandwidth=100e9,
      ici_links=6,
      topologies=_CUBES,
      accelerator_type='v5p-8',
    ),
    Chip(
      name='v6e',
      peak_flops=918e12,
      hbm_bytes=32 * _GIB,
      hbm_bandwidth=1638e9,
      ici_link_bandwidth=100e9,
      ici_links=4,
      topologies=_PLANES,
      accelerator_type='v6e-4',
    ),
  )
}


def chip_of(topology: str) -> Chip:
  """Returns the chip of a topology such as 'v5e:4x4'.

  Raises:
    UserError: there is no such chip, or no slice of that shape; the message has those there are.
  """
  name, _, shape = topology.partition(':')
  if name not in CHIPS:
    raise UserError(f'topology {topology!r}: there is no chip {name!r}; {_allowed()}')
  if shape not in CHIPS[name].topologies:
    raise UserError(f'topology {topology!r}: {name} has no slice {shape!r}; {_allowed()}')
  return CHIPS[name]


def _allowed() -> str:
  slices = '; '.join(f'{chip.name}:{", ".join(chip.topologies)}' for chip in CHIPS.values())
  return f'there are {slices}'


def devices(topology: str) -> list[jax.Device]:
  """Returns the devices of a slice: they can be compiled for, and hold no data.

  Loads the TPU compiler, and sets those of its environment variables that are not set.

  Raises:
    UserError: as `chip_of`, or the compiler is not installed.
  """
  chip = chip_of(topology)
  if importlib.util.find_spec('libtpu') is None:
    raise UserError(
      "the TPU compiler is not installed; pip install 'ssm_moe[tpu]' brings it, for Linux"
    )
  # The driver would ask the metadata server of a TPU machine who it is, complain that there is
  # none, refuse to be loaded by two processes, and write a log.
  for name, value in (
    ('TPU_SKIP_MDS_QUERY', '1'),
    ('ALLOW_MULTIPLE_LIBTPU_LOAD', '1'),
    ('TPU_WORKER_HOSTNAMES', 'localhost'),
    ('TPU_ACCELERATOR_TYPE', chip.accelerator_type),
    ('TPU_LOG_DIR', 'disabled'),
  ):
    os.environ.setdefault(name, value)
  options = {}
  if chip.chip_config is not None:
    options['chip_config_name'] = chip.chip_config
  if topology.partition(':')[2] == '1x1':
    # The driver of jax 0.10 takes hosts to have four chips.
    options['chips_per_host_bounds'] = (1, 1, 1)
  slice_ = topologies.get_topology_desc(platform='tpu', topology_name=topology, **options)
  return list(slice_.devices)
