"""What a compiled step computes, moves and sends, on each device: read from its text by `hlo`.

Everything is per device and per step: loops count as often as they run.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable

from ssm_moe.analysis import hlo

COLLECTIVE_KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)

# Passes of the bfloat16 matrix unit over a float32 product of that precision.
_PASSES = {'default': 1, 'high': 3, 'highest': 6}

# Neither reads nor writes memory itself.
_FREE = frozenset(
  (
    *('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'iota', 'after-all'),
    *(
      'async-start',
      'while',
      'conditional',
      'call',
      'partition-id',
      'replica-id',
      'optimization-barrier',
    ),
  )
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
  """A collective operation of the program.

  Attributes:
    kind: One of `COLLECTIVE_KINDS`.
    name: As the program has it.
    source: What in the model it comes from, as far as the compiler says.
    results: What a device has after it.
    operand_bytes: What a device puts in.
    group_size: Devices that take part together.
    times: How often a step runs it.
  """

  kind: str
  name: str
  source: str
  results: tuple[hlo.ArrayType, ...]
  operand_bytes: int
  group_size: int
  times: int

  @property
  def sent_bytes(self) -> int:
    """Bytes that a device sends each time, by the algorithm of a ring; it receives as many."""
    others = self.group_size - 1
    match self.kind:
      case 'all-gather':
        return self.operand_bytes * others
      case 'all-reduce':
        return 2 * self.operand_bytes * others // self.group_size
      case 'reduce-scatter' | 'all-to-all' | 'ragged-all-to-all':
        return self.operand_bytes * others // self.group_size
      case _:
        return self.operand_bytes


@dataclasses.dataclass(frozen=True)
class Work:
  """An instruction outside fusions, or a fusion as a whole.

  Attributes:
    flops: Of its matrix products, each time.
    passes_flops: The same, a product of float32 precision counted once for each pass.
    hbm_bytes: Read from and written to the device's main memory, each time.
    times: How often a step runs it.
  """

  flops: int
  passes_flops: int
  hbm_bytes: int
  times: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """What a device does in a step.

  Attributes:
    work: Its instructions.
    collectives: An asynchronous one once, however many instructions it is spread over.
    unknown_loops: Loops whose number of passes depends on the data; counted once.
    kernels_without_flops: Calls of kernels that do not say how much they compute.
  """

  work: tuple[Work, ...]
  collectives: tuple[Collective, ...]
  unknown_loops: int
  kernels_without_flops: int

  @property
  def flops(self) -> int:
    return sum(work.flops * work.times for work in self.work)

  @property
  def hbm_bytes(self) -> int:
    return sum(work.hbm_bytes * work.times for work in self.work)

  def by_kind(self) -> dict[str, dict[str, int]]:
    """Returns count and sent bytes of each kind of collective that there is."""
    totals: dict[str, dict[str, int]] = {}
    for collective in self.collectives:
      total = totals.setdefault(collective.kind, {'count': 0, 'bytes': 0})
      total['count'] += collective.times
      total['bytes'] += collective.times * collective.sent_bytes
    return totals


def read_step(text: str) -> Step:
  """Reads a compiled program.

  A matrix product is a `dot` or a `convolution`, which the TPU compiler makes of it; two operations
  for each multiply and add, none for what falls into padding. A kernel written by hand counts what
  it declares. Elementwise work counts as memory traffic only.

  Args:
    text: From `jax.stages.Compiled.as_text()`.
  """
  program = hlo.Program(text)
  work: list[list[int]] = []
  silent_kernels = 0
  for event in program.events:
    if not event.fused:
      work.append([0, 0, _traffic(program, event), event.times])
    flops = _product_flops(event.instruction, event.computation)
    if _is_kernel(event.instruction):
      declared = _declared_flops(event.instruction)
      silent_kernels += event.times * (declared is None)
      flops += declared or 0
    work[-1][0] += flops
    work[-1][1] += flops * _passes(event.instruction)
  return Step(
    work=tuple(Work(*entry) for entry in work),
    collectives=tuple(_collectives(program)),
    unknown_loops=program.unknown_loops,
    kernels_without_flops=silent_kernels,
  )


# Matrix products.


def _product_flops(instruction: hlo.Instruction, computation: hlo.Computation) -> int:
  if instruction.opcode not in ('dot', 'convolution'):
    return 0
  left, right = (_arrays(computation, name)[0].shape for name in instruction.operands[:2])
  (result,) = instruction.arrays[:1]
  if instruction.opcode == 'dot':
    found = re.search(r'lhs_contracting_dims=\{([0-9,]*)\}', instruction.attributes)
    contracted = [left[int(axis)] for axis in found.group(1).split(',') if axis] if found else []
    return 2 * result.size * math.prod(contracted)
  return _convolution_flops(instruction, left, right, result.shape)


def _convolution_flops(instruction, left, right, result) -> int:
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.attributes)
  of_left, of_right, of_result = (
    dict(zip(text, shape)) for text, shape in zip(labels.groups(), (left, right, result))
  )
  batch_groups = re.search(r'batch_group_count=(\d+)', instruction.attributes)
  batch = of_left['b'] // (int(batch_groups.group(1)) if batch_groups else 1)
  products = batch * of_right['i'] * of_right['o']
  window = _window(instruction.attributes)
  for axis in range(len(left) - 2):
    key = str(axis)
    options = {name: values[axis] for name, values in window.items()}
    products *= _valid_positions(of_left[key], of_right[key], of_result[key], **options)
  return 2 * products


def _window(attributes: str) -> dict[str, list]:
  """Returns, for each axis, what the window attribute says apart from its size."""
  found = re.search(r'window=\{([^}]*)\}', attributes)
  window = {}
  for entry in found.group(1).split() if found else ():
    name, _, value = entry.partition('=')
    if name == 'pad':
      window['padding'] = [int(item.split('_')[0]) for item in value.split('x')]
    elif name in ('stride', 'lhs_dilate', 'rhs_dilate'):
      window[name] = [int(item) for item in value.split('x')]
  return window


@functools.cache
def _valid_positions(
  size: int,
  window: int,
  outputs: int,
  stride: int = 1,
  padding: int = 0,
  lhs_dilate: int = 1,
  rhs_dilate: int = 1,
) -> int:
  """Returns how many pairs of output and window position read an element, not padding."""
  last = (size - 1) * lhs_dilate
  count = 0
  for place in range(window):
    before = padding - place * rhs_dilate  # the first output reads so far before the start
    if lhs_dilate == 1:
      first = max(-(-before // stride), 0)
      count += max(min((last + before) // stride, outputs - 1) - first + 1, 0)
    else:
      reads = (output * stride - before for output in range(outputs))
      count += sum(0 <= read <= last and read % lhs_dilate == 0 for read in reads)
  return count


def _passes(instruction: hlo.Instruction) -> int:
  found = re.search(r'operand_precision=\{(\w+)', instruction.attributes)
  return _PASSES.get(found.group(1), 1) if found else 1


def _is_kernel(instruction: hlo.Instruction) -> bool:
  return 'custom_call_target="tpu_custom_call"' in instruction.attributes


def _declared_flops(instruction: hlo.Instruction) -> int | None:
  found = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', instruction.attributes)
  return int(found.group(1)) if found else None


# Memory traffic.


def _arrays(computation: hlo.Computation, name: str) -> tuple[hlo.ArrayType, ...]:
  return computation.instructions[name].arrays


def _in_hbm(arrays: Iterable[hlo.ArrayType]) -> int:
  return sum(array.num_bytes for array in arrays if array.in_hbm)


def _traffic(program: hlo.Program, event: hlo.Event) -> int:
  """Returns the bytes that an instruction reads from main memory and writes to it."""
  instruction, computation = event.instruction, event.computation
  opcode = instruction.opcode
  if opcode in _FREE or opcode.endswith(('-done', '-update')):
    return 0
  if opcode == 'custom-call' and not instruction.operands:
    return 0  # AllocateBuffer
  if opcode == 'fusion':
    return _fusion_traffic(program, instruction, computation)
  if opcode == 'copy-start':  # its result is where to, where from, and a token
    return _in_hbm(instruction.arrays[:2])
  if opcode.endswith('slice-start'):  # where from, where to
    source, target = instruction.arrays[:2]
    return target.num_bytes * (source.in_hbm + target.in_hbm)
  read = 0
  for position, name in enumerate(instruction.operands):
    part = _read_part(instruction, position)
    read += _in_hbm(_arrays(computation, name)) if part is None else part
  return read + _written(program, computation, instruction.name, instruction.arrays)


def _read_part(instruction: hlo.Instruction, position: int) -> int | None:
  """Returns how much of an operand is read; None if that is all of it."""
  if position:
    return None
  match instruction.opcode:
    case 'dynamic-slice' | 'slice' | 'gather':
      return sum(array.num_bytes for array in instruction.arrays)
    case 'dynamic-update-slice':
      return 0
  return None


def _fusion_traffic(
  program: hlo.Program, fusion: hlo.Instruction, computation: hlo.Computation
) -> int:
  inner = program.computations[fusion.called('calls')[0]]
  total = 0
  for number, name in enumerate(fusion.operands):
    whole = _in_hbm(_arrays(computation, name))
    if whole:
      total += min(whole, _read(program, inner, inner.parameters[number], whole))
  root = inner.instructions[inner.root]
  outputs = root.operands if root.opcode == 'tuple' else (root.name,)
  for output, array in zip(outputs, fusion.arrays):
    total += _written(program, inner, output, (array,))
  return total


def _read(program: hlo.Program, computation: hlo.Computation, name: str, whole: int) -> int:
  """Returns how many bytes of a fusion's parameter its instructions read."""
  total = 0
  for user in computation.users.get(name, ()):
    for position in (i for i, operand in enumerate(user.operands) if operand == name):
      if user.opcode == 'bitcast':
        total += _read(program, computation, user.name, whole)
      elif user.opcode == 'fusion':
        inner = program.computations[user.called('calls')[0]]
        total += _read(program, inner, inner.parameters[position], whole)
      elif user.opcode != 'tuple':
        part = _read_part(user, position)
        total += whole if part is None else part
  return min(total, whole)


def _written(
  program: hlo.Program,
  computation: hlo.Computation,
  name: str,
  arrays: tuple[hlo.ArrayType, ...],
) -> int:
  """Returns how many bytes of `arrays`, the result `name`, are written, not only passed on."""
  if not _in_hbm(arrays):
    return 0
  instruction = computation.instructions[name]
  match instruction.opcode:
    case 'parameter':
      return 0
    case 'bitcast':
      return _written(program, computation, instruction.operands[0], arrays)
    case 'dynamic-update-slice':
      return sum(array.num_bytes for array in _arrays(computation, instruction.operands[1]))
    case 'fusion' if len(arrays) == 1:
      inner = program.computations[instruction.called('calls')[0]]
      if inner.instructions[inner.root].opcode != 'tuple':
        return _written(program, inner, inner.root, arrays)
  return _in_hbm(arrays)


# Collectives.


def _collectives(program: hlo.Program) -> Iterable[Collective]:
  chains: dict[tuple[str, str], Collective] = {}
  for event in program.events:
    kind = event.instruction.opcode.removesuffix('-start')
    if kind not in COLLECTIVE_KINDS:
      continue
    collective = _collective(program, event, kind)
    # A collective that overlaps with other work is cut in several fusions, each of which holds it.
    chain = re.search(r'chain_id="(\d+)"', event.instruction.attributes)
    channel = re.search(r'channel_id=(\d+)', event.instruction.attributes)
    if chain is None or channel is None:
      yield collective
      continue
    key = (channel.group(1), chain.group(1))
    if key not in chains or chains[key].times < collective.times:
      chains[key] = collective
  yield from chains.values()


def _collective(program: hlo.Program, event: hlo.Event, kind: str) -> Collective:
  instruction, computation = event.instruction, event.computation
  operands = [array for name in instruction.operands for array in _arrays(computation, name)]
  results = instruction.arrays
  if instruction.opcode == 'all-gather-start':
    results = results[len(operands) :]
  root = computation.instructions[computation.root]
  # The TPU compiler writes a reduce-scatter as a fusion that takes a slice of an all-reduce.
  if kind == 'all-reduce' and event.fused and root.opcode == 'dynamic-slice':
    kind, results = 'reduce-scatter', root.arrays
  source = re.search(r'op_name="([^"]*)"', instruction.attributes)
  return Collective(
    kind=kind,
    name=instruction.name,
    source=source.group(1) if source else '',
    results=results,
    operand_bytes=sum(array.num_bytes for array in operands),
    group_size=_group_size(instruction.attributes, program.num_partitions),
    times=event.times,
  )


def _group_size(attributes: str, num_partitions: int) -> int:
  axes = re.search(r'replica_groups=\S*mesh\S*\[([^\]]*)\]\s*\{([^}]*)\}', attributes)
  if axes:
    sizes = dict(re.findall(r"'?(\w+)'?=(\d+)", axes.group(1)))
    size = 1
    for name, part in re.findall(r"'?([a-zA-Z_]\w*)'?(?::\(\d+\)(\d+))?", axes.group(2)):
      size *= int(part or sizes[name])
    return size
  iota = re.search(r'replica_groups=\[\d+,(\d+)\]', attributes)
  if iota:
    return int(iota.group(1))
  listed = re.search(r'replica_groups=\{\{([0-9,]+)\}', attributes)
  return len(listed.group(1).split(',')) if listed else num_partitions
