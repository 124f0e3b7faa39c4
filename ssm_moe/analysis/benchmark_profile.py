"""Where the time of a step goes: a trace of JAX's profiler, by kernel and by class of kernel."""

import collections
import dataclasses
import gzip
import json
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

# A kernel is of the first class whose pattern is in its name, or in the place in the program that
# it comes from. Kernels of libraries have names of their own; a fusion has the place of its last
# operation.
_CLASSES = (
  # What is differentiated outside the model is the loss.
  ('cross entropy', r'^cross_entropy', r'jvp\(\)'),
  (
    'scan',
    r'selective_scan|ssd|^(forward|backward|carry|add_parts)$',
    r'selective_scan|\bssd\b|\.mix/while',
  ),
  ('grouped matmul', r'^(product|gradient)_kernel$|gmm', r'grouped_matmul|ragged_dot'),
  ('matmul', r'gemm|nvjet|cutlass|xmma|cublas', r'dot_general'),
  ('gather, scatter, sort', r'scatter|sort|topk', r'\bgather|scatter|sort|top_k|searchsorted'),
  ('stacks over layers', None, r'jvp\(LM\)\)?/while/body/(jit\()?dynamic_'),
  ('norm', None, r'norm'),
  # The rest of a mixer: what is not in one of its projections.
  (
    'conv',
    r'^conv_(forward|backward)$',
    r'causal_conv1d|\.mix/(?![\w.]*(proj|select|project|rout))',
  ),
  ('optimizer', None, r'^jit\(\w+\)/(?!\w*\(?jvp)[^/]*(/[a-z_]+)?$'),
  ('copy', r'^memcpy|^copy|memset', None),
)


# For a GPU: kernels that start together, as a CUDA graph, lose their instruction in the trace.
COMPILER_OPTIONS = {
  'xla_gpu_enable_command_buffer': '',
  'xla_gpu_graph_min_graph_size': 1_000_000,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
  """A kernel, over all steps that were traced.

  Attributes:
    name: Of it.
    op_name: Place in the program, as JAX names it; empty if unknown.
    kind: One of the classes.
    milliseconds: A step.
    calls: A step.
  """

  name: str
  op_name: str
  kind: str
  milliseconds: float
  calls: float


def op_names(hlo: str) -> dict[str, str]:
  """Returns the place in the program of each instruction of a compiled program's text."""
  found = re.finditer(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', hlo, re.MULTILINE)
  return {_plain(match[1]): match[2] for match in found}


def trace(
  step: Callable[..., Any], state: Any, batch: Any, *, hlo: str, steps: int = 3
) -> list['Kernel']:
  """Runs a few steps under the profiler, and returns their kernels as `read_kernels` does."""
  state, _ = jax.block_until_ready(step(state, batch))  # what happens at a first call is not meant
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(steps):
        state, metrics = step(state, batch)
      jax.block_until_ready((state, metrics))
    return read_kernels(folder, steps=steps, hlo=hlo)


def read_kernels(folder: str | pathlib.Path, *, steps: int, hlo: str = '') -> list[Kernel]:
  """Returns the kernels of a trace, those first that took longest.

  Args:
    folder: Where JAX's profiler wrote it.
    steps: How many steps it is of.
    hlo: Text of the compiled program, which says what trace and kernel name leave out.

  Raises:
    ValueError: there is no trace, or nothing in it that ran on a device.
  """
  paths = sorted(pathlib.Path(folder).rglob('*.trace.json.gz'))
  if not paths:
    raise ValueError(f'{folder}: there is no trace in it')
  with gzip.open(paths[-1], 'rt') as file:
    events = json.load(file)['traceEvents']
  places = op_names(hlo)
  totals: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0.0, 0])
  for event, microseconds in _device_events(events):
    arguments = event.get('args', {})
    instruction = _plain(arguments.get('hlo_op', event['name']))
    # The program first: on a GPU all that a trace says is that there is one.
    place = places.get(instruction) or arguments.get('tf_op')
    total = totals[event['name'], place or '']
    total[0] += microseconds / 1e3
    total[1] += 1
  if not totals:
    raise ValueError(f'{paths[-1]}: nothing in it ran on a device')
  kernels = [
    Kernel(
      name=name,
      op_name=place,
      kind=classify(name, place),
      milliseconds=milliseconds / steps,
      calls=calls / steps,
    )
    for (name, place), (milliseconds, calls) in totals.items()
  ]
  return sorted(kernels, key=lambda kernel: -kernel.milliseconds)


def classify(name: str, op_name: str) -> str:
  """Returns the class of a kernel, by its name and its place in the program."""
  for kind, in_name, in_place in _CLASSES:
    if in_name and re.search(in_name, name, re.IGNORECASE):
      return kind
    if in_place and re.search(in_place, op_name):
      return kind
  return 'other'


def breakdown(kernels: Iterable[Kernel], *, most: int = 200) -> dict[str, Any]:
  """Returns, as JSON holds it, the milliseconds of a step by class, and the longest kernels."""
  kernels = list(kernels)
  by_kind: dict[str, float] = collections.defaultdict(float)
  for kernel in kernels:
    by_kind[kernel.kind] += kernel.milliseconds
  return {
    'milliseconds': sum(by_kind.values()),
    'by_class': dict(sorted(by_kind.items(), key=lambda item: -item[1])),
    'kernels': [dataclasses.asdict(kernel) for kernel in kernels[:most]],
  }


def table(kernels: Iterable[Kernel], *, most: int, width: int = 150) -> str:
  """Returns the classes and the longest kernels as lines."""
  kernels = list(kernels)
  found = breakdown(kernels)
  whole = found['milliseconds']
  lines = [f'{whole:9.3f} ms  kernels of a step']
  lines += [f'{ms:9.3f} ms  {ms / whole:5.1%}  {kind}' for kind, ms in found['by_class'].items()]
  for kernel in kernels[:most]:
    place = kernel.op_name.removeprefix('jit(train_step)/')
    line = f'{kernel.milliseconds:9.3f} ms {kernel.calls:6.0f}x  {kernel.kind}: {kernel.name[:40]}'
    lines.append(f'{line}  {place}'[:width])
  return '\n'.join(lines)


def _plain(name: str) -> str:
  """Kernels are named after instructions, with underscores for what C does not allow."""
  return re.sub(r'[^\w]', '_', name)


def _device_events(events: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], float]]:
  """Yields what ran on the device, with its microseconds less those of what it contains.

  On a GPU that is what stands in the lines of its streams: other lines of the device sum these up.
  On a CPU it is what is said to be an operation of the program.
  """
  processes, threads = {}, {}
  for event in events:
    if event.get('ph') == 'M' and event['name'] == 'process_name':
      processes[event['pid']] = event['args']['name']
    elif event.get('ph') == 'M' and event['name'] == 'thread_name':
      threads[event['pid'], event['tid']] = event['args']['name']
  streams = {
    key
    for key, name in threads.items()
    if name.startswith('Stream') and 'device:GPU' in processes.get(key[0], '')
  }
  lines = collections.defaultdict(list)
  for event in events:
    if event.get('ph') != 'X':
      continue
    key = (event['pid'], event['tid'])
    if key in streams if streams else 'hlo_op' in event.get('args', {}):
      lines[key].append(event)
  for line in lines.values():
    yield from _own_times(line)


def _end(event: dict[str, Any]) -> float:
  return event['ts'] + event['dur']


def _own_times(events: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], float]]:
  open_events: list[list[Any]] = []
  for event in sorted(events, key=lambda event: (event['ts'], -event['dur'])):
    # What begins in another event and ends after it is not part of it: by a clock's rounding, the
    # next kernel of a stream may begin before the last has ended.
    while open_events and _end(open_events[-1][0]) < _end(event):
      yield tuple(open_events.pop())
    while open_events and _end(open_events[-1][0]) <= event['ts']:
      yield tuple(open_events.pop())
    if open_events:
      open_events[-1][1] -= event['dur']
    open_events.append([event, event['dur']])
  yield from map(tuple, open_events)
