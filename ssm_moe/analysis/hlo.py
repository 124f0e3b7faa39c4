"""A compiled program's text: its instructions, and how often a step runs each.

XLA's own analysis counts the body of a loop once, and `nn.scan` over periods is a loop. Here an
instruction inside a `while` counts as often as the loop runs, and a loop inside another as often as
both together. That number is read from `known_trip_count` where the backend says it, as on CPU and
GPU; the TPU compiler does not, so it is worked out from the loop itself: a counter that starts at a
constant, that the body moves by a constant, and that the condition compares with a constant.
Copies, tuples, fusions and values that an outer loop hands on unchanged are seen through. A loop
whose bound depends on the data, such as the tiles of an expert's rows, counts once and is reported
as unknown: what is inside may run more often or never. Of the branches of a conditional the one
with the most instructions counts.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {
  'pred': 1,
  's4': 0.5,
  'u4': 0.5,
  's8': 1,
  'u8': 1,
  's16': 2,
  'u16': 2,
  's32': 4,
  'u32': 4,
  's64': 8,
  'u64': 8,
  'bf16': 2,
  'f16': 2,
  'f32': 4,
  'f64': 8,
  'c64': 8,
  'c128': 16,
}

_ARRAY = re.compile(r'\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](\{[^{}]*\})?')
_NAMES = re.compile(r'%([\w.\-]+)')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_COMMENT = re.compile(r'/\*.*?\*/')


class ArrayType(NamedTuple):
  """An array's type, as the program's text has it.

  Attributes:
    dtype: As XLA names it.
    shape: Of the part that a device holds.
    in_hbm: Whether it is in the device's main memory, not in a faster one beside the cores.
  """

  dtype: str
  shape: tuple[int, ...]
  in_hbm: bool

  @property
  def size(self) -> int:
    product = 1
    for size in self.shape:
      product *= size
    return product

  @property
  def num_bytes(self) -> int:
    return int(self.size * _BYTES.get(self.dtype, 0))


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: Of its result.
    opcode: What it does.
    result: The text of its type.
    operands: Names.
    text: What stands between its parentheses: a constant's value, a parameter's number.
    attributes: What stands after them.
  """

  name: str
  opcode: str
  result: str
  operands: tuple[str, ...]
  text: str
  attributes: str

  @functools.cached_property
  def arrays(self) -> tuple[ArrayType, ...]:
    """The arrays of its result: several if that is a tuple."""
    return tuple(
      ArrayType(
        dtype,
        tuple(int(size) for size in sizes.split(',') if size),
        re.search(r'S\([1-9]', layout) is None,
      )
      for dtype, sizes, layout in _ARRAY.findall(self.result)
      if dtype in _BYTES
    )

  def called(self, attribute: str) -> list[str]:
    """Returns the computations that an attribute names."""
    found = re.search(rf'\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)', self.attributes)
    return _NAMES.findall(found.group(1)) if found else []


@dataclasses.dataclass
class Computation:
  """A function of the program: its instructions by name, in order, and the name of its result."""

  instructions: dict[str, Instruction]
  root: str = ''

  @functools.cached_property
  def parameters(self) -> dict[int, str]:
    """Names, by number."""
    return {
      int(instruction.text): name
      for name, instruction in self.instructions.items()
      if instruction.opcode == 'parameter'
    }

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    """By name of an instruction, those that read its result."""
    users: dict[str, list[Instruction]] = {}
    for instruction in self.instructions.values():
      for name in dict.fromkeys(instruction.operands):
        users.setdefault(name, []).append(instruction)
    return users


class _Frame(NamedTuple):
  """A computation where it is called: by `caller`, in the frame `outer`; None for the entry."""

  computation: str
  caller: Instruction | None = None
  outer: '_Frame | None' = None
  operand: int = 0


class Event(NamedTuple):
  """An instruction that a step runs.

  Attributes:
    instruction: Itself.
    computation: Where its operands are.
    times: How often.
    fused: Whether it is part of a fusion, so that only the fusion reads and writes memory.
  """

  instruction: Instruction
  computation: Computation
  times: int
  fused: bool


class _Affine(NamedTuple):
  """An integer: element `index` of a loop's state (None: of nothing) plus `offset`."""

  index: int | None
  offset: int


class Program:
  """A compiled program, read from `jax.stages.Compiled.as_text()`.

  Attributes:
    computations: By name.
    entry: The name of the one that a step runs.
    num_partitions: Devices that run it.
    unknown_loops: Loops whose number of passes is not known; counted as one.
  """

  def __init__(self, text: str):
    self.computations: dict[str, Computation] = {}
    self.entry = ''
    found = re.search(r'num_partitions=(\d+)', text[:100_000])
    self.num_partitions = int(found.group(1)) if found else 1
    self._read(text)
    self.unknown_loops = 0
    self.events: tuple[Event, ...] = tuple(self._walk(_Frame(self.entry), 1))

  def _read(self, text: str) -> None:
    current = None
    for line in text.splitlines():
      if not line.startswith(' '):
        header = _HEADER.match(line)
        if header:
          current = Computation({})
          self.computations[header.group(2)] = current
          self.entry = header.group(2) if header.group(1) else self.entry
        continue
      parsed = _parse(line) if current is not None else None
      if parsed is not None:
        current.instructions[parsed.name] = parsed
        if line.lstrip().startswith('ROOT '):
          current.root = parsed.name

  def _walk(self, frame: _Frame, times: int, fused: bool = False) -> Iterator[Event]:
    computation = self.computations[frame.computation]
    for instruction in computation.instructions.values():
      yield Event(instruction, computation, times, fused)
      match instruction.opcode:
        case 'while':
          body = instruction.called('body')[0]
          count = self._trip_count(instruction, frame)
          self.unknown_loops += count is None
          inner = _Frame(body, instruction, frame)
          yield from self._walk(inner, times * (1 if count is None else count))
        case 'conditional':
          branches = instruction.called('branch_computations') or [
            *instruction.called('true_computation'),
            *instruction.called('false_computation'),
          ]
          before = self.unknown_loops
          walks = []
          for i, branch in enumerate(branches):
            self.unknown_loops = before
            events = list(self._walk(_Frame(branch, instruction, frame, i + 1), times))
            walks.append((events, self.unknown_loops))
          events, self.unknown_loops = max(walks, key=lambda walk: len(walk[0]))
          yield from events
        case 'call' | 'fusion' | 'async-start':
          names = instruction.called('calls') or instruction.called('to_apply')
          for name in names:
            inside = fused or instruction.opcode == 'fusion'
            yield from self._walk(_Frame(name, instruction, frame), times, inside)

  # How often a loop runs.

  def _trip_count(self, loop: Instruction, frame: _Frame) -> int | None:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
      return int(known.group(1))
    comparison = self._comparison(loop.called('condition')[0])
    if comparison is None:
      return None
    left, right, direction = comparison
    if left.index is None:
      left, right = right, left
      direction = {'LT': 'GT', 'GT': 'LT', 'LE': 'GE', 'GE': 'LE'}.get(direction, direction)
    inside = _Frame(loop.called('body')[0], loop, frame)
    step = self._next(inside, left.index)
    start = self._element(frame, loop.operands[0], left.index)
    limit = right.offset if right.index is None else self._value(inside, right)
    if step is None or step.index != left.index or not step.offset or None in (start, limit):
      return None
    distance = limit - (start + left.offset)
    if direction in ('LE', 'GE'):
      distance += 1 if direction == 'LE' else -1
    return max(-(-distance // step.offset), 0)

  def _comparison(self, condition: str) -> tuple[_Affine, _Affine, str] | None:
    """Returns what a loop's condition compares, in elements of the loop's state."""
    name, arguments = condition, None
    while True:
      computation = self.computations[name]
      root = computation.instructions[computation.root]
      if root.opcode in ('bitcast', 'copy'):
        root = computation.instructions[root.operands[0]]
      sides = [self._affine(computation, operand, arguments) for operand in root.operands]
      if root.opcode != 'fusion':
        break
      name, arguments = root.called('calls')[0], sides
    if root.opcode != 'compare' or None in sides:
      return None
    return *sides, re.search(r'direction=(\w+)', root.attributes).group(1)

  def _affine(
    self, computation: Computation, name: str, arguments: list[_Affine | None] | None = None
  ) -> _Affine | None:
    """Returns an integer in elements of the computation's one parameter, a loop's state.

    Args:
      computation: Where `name` is.
      name: Of the integer.
      arguments: What a fusion's parameters are; None outside fusions.
    """
    instruction = computation.instructions.get(name)
    if instruction is None:
      return None
    match instruction.opcode:
      case 'constant':
        return _Affine(None, int(instruction.text)) if _is_integer(instruction.text) else None
      case 'parameter':
        number = int(instruction.text)
        return arguments[number] if arguments and number < len(arguments) else None
      case 'copy' | 'bitcast' | 'reshape' | 'convert' | 'copy-done' | 'copy-start':
        return self._affine(computation, instruction.operands[0], arguments)
      case 'get-tuple-element':
        index = int(re.search(r'index=(\d+)', instruction.attributes).group(1))
        source = computation.instructions[instruction.operands[0]]
        if source.opcode == 'parameter' and arguments is None:
          return _Affine(index, 0)
        if source.opcode == 'tuple':
          return self._affine(computation, source.operands[index], arguments)
        return None
      case 'add' | 'subtract':
        left, right = (self._affine(computation, x, arguments) for x in instruction.operands)
        if left is None or right is None or (left.index is not None and right.index is not None):
          return None
        if instruction.opcode == 'subtract':
          return (
            None if right.index is not None else left._replace(offset=left.offset - right.offset)
          )
        index = left.index if left.index is not None else right.index
        return _Affine(index, left.offset + right.offset)
      case 'fusion':
        inner = self.computations[instruction.called('calls')[0]]
        given = [self._affine(computation, x, arguments) for x in instruction.operands]
        return self._affine(inner, inner.root, given)
    return None

  def _next(self, inside: _Frame, index: int | None) -> _Affine | None:
    """Returns what a pass makes of an element of the loop's state."""
    body = self.computations[inside.computation]
    root = body.instructions[body.root]
    if index is None or root.opcode != 'tuple' or index >= len(root.operands):
      return None
    return self._affine(body, root.operands[index])

  def _element(self, frame: _Frame, name: str, index: int) -> int | None:
    """Returns the integer that is element `index` of the tuple `name`."""
    computation = self.computations[frame.computation]
    made = computation.instructions[name]
    if made.opcode == 'tuple':
      value = self._affine(computation, made.operands[index])
      return None if value is None else self._value(frame, value)
    if made.opcode in ('copy', 'bitcast', 'optimization-barrier'):
      return self._element(frame, made.operands[0], index)
    if made.opcode == 'parameter':
      return self._value(frame, _Affine(index, 0))
    return None

  def _value(self, frame: _Frame, affine: _Affine) -> int | None:
    """Returns the integer itself, where whoever called `frame` passed a constant."""
    if affine.index is None:
      return affine.offset
    if frame.caller is None:
      return None
    if frame.caller.opcode == 'while' and self._next(frame, affine.index) != _Affine(
      affine.index, 0
    ):
      return None
    passed = self._element(frame.outer, frame.caller.operands[frame.operand], affine.index)
    return None if passed is None else passed + affine.offset


def _is_integer(text: str) -> bool:
  return re.fullmatch(r'-?\d+', text) is not None


def _parse(line: str) -> Instruction | None:
  """Returns the instruction of a line; None if it holds none."""
  name, equals, rest = _COMMENT.sub('', line).strip().removeprefix('ROOT ').partition(' = ')
  if not equals:
    return None
  end = _closing(rest, 0) + 1 if rest.startswith('(') else rest.find(' ')
  result, rest = rest[:end], rest[end:].lstrip()
  opening = rest.find('(')
  closing = _closing(rest, opening)
  text = rest[opening + 1 : closing]
  return Instruction(
    name=name.removeprefix('%'),
    opcode=rest[:opening],
    result=result,
    operands=tuple(_NAMES.findall(text)),
    text=text,
    attributes=rest[closing + 1 :],
  )


def _closing(text: str, opening: int) -> int:
  """Returns where the parenthesis that opens at `opening` closes."""
  depth = 0
  for found in re.compile(r'[()]').finditer(text, opening):
    depth += 1 if found.group() == '(' else -1
    if depth == 0:
      return found.start()
  return len(text)
