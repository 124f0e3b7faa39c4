"""Other libraries' implementations of the ops, on the same data: PyTorch, and what runs on it."""

import dataclasses
import functools
import importlib
import importlib.metadata
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from ssm_moe.analysis.benchmark_timing import Timing, measure

# Arguments are a dictionary of tensors and another tensor, or None; results a tensor.
Function = Callable[[dict[str, Any], Any], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
  """An op of another library.

  Attributes:
    name: Of the package; it may be missing.
    function: Takes the inputs, by name, and the constants; its result is the first of the op's.
    channels_first: Inputs, of three axes, of which the library wants the last two swapped; its
      result then is so too.
  """

  name: str
  function: Function
  channels_first: tuple[str, ...] = ()

  @property
  def title(self) -> str:
    return f'{self.name} {importlib.metadata.version(self.name.replace("_", "-"))}'

  def run(
    self, inputs: dict[str, Any], constants: Any, cotangents: Any, timing: Timing
  ) -> Iterator[tuple[str, list[float], Any, int | slice]]:
    """Yields each pass: its name, milliseconds, what it gives, and where in (outputs, gradients).

    Raises:
      ModuleNotFoundError: the library, or PyTorch, is not installed.
    """
    importlib.import_module(self.name)
    torch = importlib.import_module('torch')
    jax.block_until_ready((inputs, constants, cotangents))
    own = {
      name: self._swapped(name, torch.from_dlpack(array)).clone().requires_grad_()
      for name, array in inputs.items()
      if array is not None
    }
    if constants is not None:
      constants = jax.tree.map(torch.from_dlpack, constants)
    cotangents = torch.from_dlpack(cotangents)
    if self.channels_first:
      cotangents = cotangents.transpose(1, 2).contiguous()
    forward = functools.partial(self.function, own, constants)

    def gradients(outputs):
      return torch.autograd.grad(outputs, list(own.values()), cotangents, retain_graph=True)

    def forward_only():
      with torch.no_grad():
        return forward()

    outputs = forward()
    calls = {
      'forward': forward_only,
      'backward': lambda: gradients(outputs),
      'forward_backward': lambda: gradients(forward()),
    }
    passes = {name: _Calls(torch, call) for name, call in calls.items()}
    for call in passes.values():
      call.run(1)
    times = measure(passes, timing)
    found = dict(zip(own, gradients(outputs)))
    passes['forward'].run(1)  # waits for those before
    found = {
      name: _to_jax(self._swapped(name, found[name])) if name in found else None for name in inputs
    }
    value = outputs.transpose(1, 2) if self.channels_first else outputs
    value = _to_jax(value)
    yield 'forward', times['forward'], value, 0
    yield 'backward', times['backward'], found, 1
    yield 'forward_backward', times['forward_backward'], (value, found), slice(0, 2)

  def _swapped(self, name: str, tensor: Any) -> Any:
    tensor = tensor.detach()
    return tensor.transpose(1, 2).contiguous() if name in self.channels_first else tensor


class _Calls:
  def __init__(self, torch, function):
    self._wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    self._function = function

  def run(self, calls: int) -> float:
    self._wait()
    start = time.perf_counter()
    for _ in range(calls):
      self._function()
    self._wait()
    return 1e3 * (time.perf_counter() - start) / calls


def _to_jax(tensor: Any) -> jax.Array:
  return jnp.from_dlpack(tensor.detach().contiguous())


def _selective_scan(inputs, _):
  from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

  x, dt, A, B, C = (inputs[name] for name in ('x', 'dt', 'A', 'B', 'C'))
  return selective_scan_fn(
    *(x, dt, A, B, C),
    D=inputs.get('D'),
    z=inputs.get('z'),
    delta_bias=inputs.get('dt_bias'),
    delta_softplus=True,
  )


def _ssd(inputs, _):
  from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

  x, dt, A, B, C = (inputs[name] for name in ('x', 'dt', 'A', 'B', 'C'))
  return mamba_chunk_scan_combined(
    *(x, dt, A, B, C),
    chunk_size=256,
    D=inputs.get('D'),
    dt_bias=inputs.get('dt_bias'),
    dt_softplus=True,
  )


def _grouped_matmul(inputs, group_sizes):
  import torch

  ends = torch.cumsum(group_sizes, 0).to(torch.int32)
  return torch._grouped_mm(inputs['rows'], inputs['weights'], offs=ends)


SELECTIVE_SCAN = Peer(
  name='mamba_ssm', function=_selective_scan, channels_first=('x', 'dt', 'B', 'C', 'z')
)
SSD = Peer(name='mamba_ssm', function=_ssd)
GROUPED_MATMUL = Peer(name='torch', function=_grouped_matmul)
