"""Where kernels written in Triton can run, and how they are started.

They are started through jax-triton 0.4 or later, which needs jax 0.11, hence Python 3.12; Gluon,
the explicit half of Triton, comes with Triton 3.7. Modules with kernels import Triton themselves,
and are imported only where `unavailable` finds no reason against it.
"""

import functools
import importlib.metadata
from typing import Any

import jax

from ssm_moe.ops import implementation

# What is known to all compilers of CUDA 12.9 and 13: Triton would write for its own, the newest.
_PTX_VERSION = 87
_AMPERE = (8, 0)
HOPPER = (9, 0)


def unavailable(*, exactly: tuple[int, int] | None = None) -> str | None:
  """Returns why a Triton kernel cannot be part of the code that is being traced, or None.

  Args:
    exactly: The one compute capability whose instructions the kernel uses; any from Ampere on if
      None.
  """
  platform = implementation.platform()
  if platform != 'gpu':
    return f'its kernels are for GPUs, and this is for {platform}'
  if (missing := _missing_package()) is not None:
    return missing
  capability = compute_capability()
  if capability is None:
    return 'its kernels are for GPUs by NVIDIA'
  if exactly is not None and capability != exactly:
    wanted, here = ('{}.{}'.format(*version) for version in (exactly, capability))
    return f'its kernels are for compute capability {wanted}, and this GPU has {here}'
  if capability < _AMPERE:
    return 'its kernels are for compute capability 8.0 and later, and this GPU has {}.{}'.format(
      *capability
    )
  if not implementation.on_one_device():
    return (
      'its kernels are not split over devices, and this program is not known to be for one: '
      'say implementation.on_devices(1), or call inside jax.shard_map over all mesh axes'
    )
  return None


def compute_capability() -> tuple[int, int] | None:
  """Returns that of the GPU that is compiled for; Hopper's, where there is none to ask.

  None where the GPU is not by NVIDIA.
  """
  if jax.default_backend() != 'gpu':
    return HOPPER
  version = getattr(jax.devices()[0], 'compute_capability', '')
  parts = version.split('.')
  return (int(parts[0]), int(parts[1])) if len(parts) == 2 and parts[0].isdigit() else None


@functools.cache
def _missing_package() -> str | None:
  for package, least in (('jax-triton', (0, 4)), ('triton', (3, 7))):
    wanted = f'{package} {least[0]}.{least[1]} or later'
    try:
      version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      return f"it needs {wanted}, hence Python 3.12: pip install 'ssm_moe[gpu]'"
    if tuple(int(part) for part in version.split('.')[:2]) < least:
      return f'it needs {wanted}, and here is {version}'
  return None


def call(*arrays, kernel: Any, options: dict[str, Any] | None = None, **named) -> Any:
  """Starts a kernel written in Gluon: `jax_triton.triton_call`, with the compiler's passes right.

  Args:
    *arrays: Positional arguments of the kernel.
    kernel: Decorated by `gluon.jit`.
    options: Of the compiler: num_warps, maxnreg.
    **named: Other arguments of the kernel, and of `jax_triton.triton_call`.
  """
  import jax_triton

  _use_passes_of_gluon()
  return jax_triton.triton_call(
    *arrays,
    kernel=kernel,
    backend_options={'enable_fp_fusion': True, 'ptx_version': _PTX_VERSION} | (options or {}),
    **named,
  )


@functools.cache
def _use_passes_of_gluon() -> None:
  """Has jax-triton compile Gluon as Triton itself does.

  jax-triton up to 0.4.1 sends kernels of both languages through the passes for Triton's own, which
  choose layouts anew: in Gluon layouts are the author's, and instructions that exchange values
  between lanes would meet other values than they are written for.
  """
  from jax_triton import triton_lib

  of_triton = triton_lib.compile_ttir_to_ptx_inplace

  def compile_module(module, backend, options, compute_capability):
    if 'ttg.num-warps' in str(module):  # layouts are there already: it was written in Gluon
      backend = _PassesOfGluon(backend)
    return of_triton(module, backend, options, compute_capability)

  triton_lib.compile_ttir_to_ptx_inplace = compile_module


class _PassesOfGluon:
  """A backend of Triton that takes a Gluon module where it expects one of Triton."""

  def __init__(self, backend):
    self._backend = backend

  def make_ttir(self, module, *_):
    return module

  def make_ttgir(self, module, metadata, options, capability):
    return self._backend.gluon_to_ttgir(module, metadata, options, capability)

  def __getattr__(self, name):
    return getattr(self._backend, name)
