"""An estimate of how long a compiled step takes on a chip that is not at hand.

Each instruction takes as long as its matrix products at the chip's peak, or as its memory traffic
at the chip's bandwidth, whichever is longer; collectives come on top. It is a bound to rank designs
by, not a promise: no chip has timed it.
"""

import dataclasses

from ssm_moe.analysis.chips import Chip
from ssm_moe.analysis.compiled import Collective, Step

# A message needs about this long for each chip that it passes. An assumption: no figure of it is
# published.
HOP_SECONDS = 1e-6
# A ring of chips along one axis of the slice uses a link in each direction.
RING_LINKS = 2

ASSUMPTIONS = (
  'matrix products run at the published bfloat16 peak, those of float32 precision in 3 or 6 passes',
  'an instruction takes its products or its memory traffic, whichever is longer, at published '
  'bandwidth; instructions do not overlap, and starting one costs nothing',
  'elementwise work costs its memory traffic only: the vector units have no published rate',
  f'collectives run alone, as rings over {RING_LINKS} links, with {HOP_SECONDS:g} s for each chip '
  'that half a ring passes',
  'of a loop whose number of passes depends on the data, one counts, which is too few or too many; '
  'a kernel counts the operations that it declares',
  'the work of the host and between steps is left out',
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
  """Of one step.

  Attributes:
    seconds: The whole; the sum of `device_seconds` and `collective_seconds`.
    device_seconds: Instructions, one after the other.
    compute_seconds: The matrix products alone.
    memory_seconds: The memory traffic alone.
    collective_seconds: Collectives, of which `latency_seconds` do not depend on their size.
    latency_seconds: See there.
    tokens_per_second: Over all devices.
    mfu: Closed-form operations of the model, over what the devices could do in that time.
  """

  seconds: float
  device_seconds: float
  compute_seconds: float
  memory_seconds: float
  collective_seconds: float
  latency_seconds: float
  tokens_per_second: float
  mfu: float


def estimate(
  step: Step, chip: Chip, *, num_devices: int, tokens: int, model_flops: int
) -> Estimate:
  """Estimates the time of a step.

  Args:
    step: What a device does.
    chip: That it does it on.
    num_devices: How many there are.
    tokens: Of a step, over all devices.
    model_flops: Closed form, of all tokens.
  """
  device = sum(
    work.times * max(work.passes_flops / chip.peak_flops, work.hbm_bytes / chip.hbm_bandwidth)
    for work in step.work
  )
  latency = sum((_latency(collective) for collective in step.collectives), 0.0)
  sent = sum(collective.times * collective.sent_bytes for collective in step.collectives)
  collective = latency + sent / (RING_LINKS * chip.ici_link_bandwidth)
  seconds = device + collective
  return Estimate(
    seconds=seconds,
    device_seconds=device,
    compute_seconds=sum(work.times * work.passes_flops for work in step.work) / chip.peak_flops,
    memory_seconds=step.hbm_bytes / chip.hbm_bandwidth,
    collective_seconds=collective,
    latency_seconds=latency,
    tokens_per_second=tokens / seconds,
    mfu=model_flops / (seconds * num_devices * chip.peak_flops),
  )


def _latency(collective: Collective) -> float:
  hops = 1 if collective.kind == 'collective-permute' else collective.group_size / 2
  return collective.times * hops * HOP_SECONDS
