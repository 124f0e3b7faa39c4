"""TPU: the Mosaic kernels of megablox, which come with jax, behind the whole contract of the op.

gmm multiplies rows by the matrix of their group, tgmm sums outer products of rows by group. Both go
through tiles of rows: a tile at the border of two groups is computed once for each, and what is not
of the group is left out. What they leave to their caller, and is done here: rows that do not fill
the last tile, rows of no group (gmm never writes them), no rows in any group, weights with several
output axes, and settings of jax that they do not run under.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from ssm_moe.ops import implementation
from ssm_moe.shapes import Array, Float, Int

# The matrix unit is 128 x 128 (v4, v5) or 256 x 256 (v6): fewer rows than 128 at a time would wait
# for the next piece of the matrix. More than 512 rows bring nothing more: at 512, a piece of matrix
# that is read again for each tile already gives 512 FLOPs a byte, and v5e needs 240.
_ROW_TILES = (512, 256, 128)
# Work done twice at the borders is at most a tile for each group: a quarter of the mean group.
_TILES_PER_GROUP = 4
# megablox counts visits to tiles by a histogram with float32 edges. With 5000 tiles it loses some,
# and says nothing; with 1024 the edges still lie several roundings off the numbers counted.
_MAX_ROW_TILES = 1024
# The compiler gives a kernel 16 MiB of VMEM unless told otherwise, and megablox does not tell. The
# rest is for what the compiler adds: masks and float32 copies of blocks.
_VMEM_BYTES = 10 * 2**20
_LANES = 128


class Tiles(NamedTuple):
  """Sizes of the blocks in VMEM, as megablox orders them.

  Attributes:
    rows: Of S.
    inputs: Of the axis that gmm sums over; for tgmm, of the gradient's first axis.
    outputs: Of the axis that comes out; for tgmm, of the gradient's second axis.
  """

  rows: int
  inputs: int
  outputs: int


def row_tile(num_rows: int, num_groups: int) -> int:
  """Returns how many rows to take at a time."""
  if num_rows < _ROW_TILES[-1]:
    return _round_up(num_rows, 16)  # bfloat16 is packed in 16 rows
  most = num_rows // (num_groups * _TILES_PER_GROUP)
  tile = next((size for size in _ROW_TILES if size <= most), _ROW_TILES[-1])
  while num_rows > tile * _MAX_ROW_TILES and tile < _ROW_TILES[0]:
    tile *= 2
  return tile


def gmm_tiles(rows: int, inputs: int, outputs: int, itemsize: int) -> Tiles:
  """Returns tiles for a product of so many inputs and outputs.

  512 outputs, so that the rows, which are read again for each tile of outputs, give 512 FLOPs a
  byte. Then as many inputs as fit, all of them if possible: a group's matrix stays in VMEM from one
  tile of its rows to the next.
  """
  tile = _even_tile(outputs, 512)
  # Two buffers of each block, and the float32 accumulator.
  left = _VMEM_BYTES - rows * tile * (2 * itemsize + 4)
  return Tiles(rows, _even_tile(inputs, left // (2 * itemsize * (rows + tile))), tile)


def tgmm_tiles(rows: int, inputs: int, outputs: int, itemsize: int) -> Tiles:
  """Returns tiles for the gradient of matrices of so many inputs and outputs.

  Blocks of the gradient of 1024 x 512 give 340 FLOPs for each byte of the rows and cotangents.
  """
  return Tiles(rows, _even_tile(inputs, 1024 if itemsize == 2 else 512), _even_tile(outputs, 512))


def _even_tile(size: int, most: int) -> int:
  """Returns a tile of at most `most` that splits `size` with the least left over."""
  if size <= most:
    return size
  most = max(most // _LANES, 1) * _LANES
  return _round_up(-(-size // -(-size // most)), _LANES)


def _round_up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple


def supports(rows: Array, weights: Array) -> str | None:
  """Returns why megablox cannot multiply these, or None."""
  if implementation.platform() != 'tpu':
    return f'its kernels are for TPUs, and this is compiled for {implementation.platform()}'
  if rows.dtype not in (jnp.bfloat16, jnp.float32):
    return f'its kernels take bfloat16 or float32, not {rows.dtype}'
  if 0 in (*rows.shape, *weights.shape):
    return 'its kernels take no empty arrays'
  if rows.shape[0] > _ROW_TILES[0] * _MAX_ROW_TILES:
    return f'its kernels take at most {_ROW_TILES[0] * _MAX_ROW_TILES} rows, not {rows.shape[0]}'
  if not implementation.on_one_device():
    return (
      'its kernels are not split over devices, and this program is not known to be for one: '
      'say implementation.on_devices(1), or call inside jax.shard_map over all mesh axes'
    )
  return None


def grouped_matmul(
  rows: Float[Array, 'S M'],
  weights: Float[Array, 'E M *F'],
  group_sizes: Int[Array, 'E'],
  *,
  interpret: bool = False,
) -> Float[Array, 'S *F']:
  """Runs `api.grouped_matmul`; `interpret` runs the kernels' Python instead of compiling them.

  Several output axes are made one: where they are the last two and the last but one is small, as in
  [E, M, 2, D], the compiler may have to copy the weights for it.
  """
  matrices = weights.reshape(*weights.shape[:2], -1)
  y = _multiply(interpret, rows, matrices, group_sizes.astype(jnp.int32))
  return y.reshape(rows.shape[0], *weights.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(
  interpret: bool,
  rows: Float[Array, 'S M'],
  weights: Float[Array, 'E M F'],
  group_sizes: Int[Array, 'E'],
) -> Float[Array, 'S F']:
  return _gmm(rows, weights, group_sizes, interpret=interpret)


def _forward(interpret, rows, weights, group_sizes):
  return _multiply(interpret, rows, weights, group_sizes), (rows, weights, group_sizes)


def _backward(interpret, residuals, dy):
  rows, weights, group_sizes = residuals
  d_rows = _gmm(dy, weights, group_sizes, transpose_rhs=True, interpret=interpret)
  return d_rows, _tgmm(rows, dy, group_sizes, interpret=interpret), None


_multiply.defvjp(_forward, _backward)


def _gmm(rows, weights, group_sizes, *, transpose_rhs=False, interpret):
  num_groups, *sides = weights.shape
  inputs, outputs = reversed(sides) if transpose_rhs else sides
  num_rows = rows.shape[0]
  tiles = gmm_tiles(row_tile(num_rows, num_groups), inputs, outputs, rows.dtype.itemsize)
  total = group_sizes.sum()
  # Without any row the kernel would have no step to do, and its prefetch nothing to wait for it:
  # never seen on a chip. The product of this row is taken out below.
  group_sizes = group_sizes.at[-1].add((total == 0).astype(jnp.int32))
  with _kernel_settings(rows.dtype):
    y = gmm(
      _pad_rows(rows, tiles.rows),
      weights,
      group_sizes,
      preferred_element_type=rows.dtype,
      tiling=tiles,
      transpose_rhs=transpose_rhs,
      interpret=interpret,
    )[:num_rows]
  # What is not of any group holds whatever was in memory.
  return jnp.where((jnp.arange(num_rows) < total)[:, None], y, jnp.zeros((), y.dtype))


def _tgmm(rows, dy, group_sizes, *, interpret):
  tile = row_tile(rows.shape[0], group_sizes.shape[0])
  tiles = tgmm_tiles(tile, rows.shape[1], dy.shape[1], rows.dtype.itemsize)
  with _kernel_settings(rows.dtype):
    return tgmm(
      _pad_rows(rows, tile).T,
      _pad_rows(dy, tile),
      group_sizes,
      preferred_element_type=rows.dtype,
      tiling=tiles,
      interpret=interpret,
    )


def _pad_rows(rows: Array, tile: int) -> Array:
  return jnp.pad(rows, ((0, -rows.shape[0] % tile), (0, 0)))


@contextlib.contextmanager
def _kernel_settings(dtype: jnp.dtype) -> Iterator[None]:
  """What the kernels need of jax, whatever the caller asked of it."""
  with contextlib.ExitStack() as stack:
    # megablox joins booleans and integers.
    stack.enter_context(jax.numpy_dtype_promotion('standard'))
    if dtype == jnp.bfloat16:
      # Mosaic refuses to multiply bfloat16 at 'highest'. The products are exact in float32 anyway.
      stack.enter_context(jax.default_matmul_precision('default'))
    yield
