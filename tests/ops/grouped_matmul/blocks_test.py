"""Sizes of blocks come from the table where it has a shape that is near, else from a rule."""

import dataclasses
import json

import pytest

from ssm_moe.ops.grouped_matmul import blocks


def _row(**sizes):
  return dataclasses.asdict(blocks.Blocks(**sizes)) | {'milliseconds': 1.0, 'tflops': 1.0}


@pytest.fixture
def table(monkeypatch):
  shapes = {
    blocks.shape_name(4096, 512, 1024, 8): {
      'product': [_row(band=4), _row(band=8)],
      'd_rows': [_row(stages=3)],
      'd_weights': [_row(inner=128)],
    },
    blocks.shape_name(65536, 512, 1024, 8): {
      kernel: [_row(columns=128)] for kernel in ('product', 'd_rows', 'd_weights')
    },
  }
  parsed = blocks.parse_table(json.loads(json.dumps(shapes)))
  monkeypatch.setattr(blocks, '_table', lambda: parsed)


def test_the_fastest_of_the_nearest_shape(table):
  expected = blocks.BlockSizes(
    product=blocks.Blocks(band=4),
    d_rows=blocks.Blocks(stages=3),
    d_weights=blocks.Blocks(inner=128),
  )
  assert blocks.default_block_sizes(4096, 512, 1024, 8) == expected
  assert blocks.default_block_sizes(8192, 512, 700, 7) == expected
  far = blocks.default_block_sizes(40000, 512, 1024, 8)
  assert far.product == blocks.Blocks(columns=128)


@pytest.mark.parametrize('shape', [(4096, 512, 64, 8), (64, 512, 1024, 8), (4096, 512, 1024, 64)])
def test_a_rule_where_no_shape_is_near(table, shape):
  assert blocks.default_block_sizes(*shape) == blocks.by_rule(*shape)
  few_rows = shape[0] <= 64 * shape[3]
  assert blocks.default_block_sizes(*shape).product.rows == (64 if few_rows else 128)


def test_the_table_that_is_there_has_sizes_that_a_kernel_can_have():
  for shape, sizes in blocks.parse_table(json.loads(blocks.TABLE.read_text())):
    assert blocks.default_block_sizes(*shape) == sizes
    for own in dataclasses.astuple(sizes):
      assert own[0] in (64, 128) and own[1] in (64, 128, 256) and own[4] in (4, 8)


@pytest.mark.parametrize(
  ('table', 'message'),
  [
    ({'S 1, M 2': {}}, "'S 1, M 2' is no shape; it must be like 'S 4096, M 512, F 1024, E 8'"),
    ({'S 0, M 1, F 1, E 1': {}}, 'is no shape'),
    ({'S 1, M 1, F 1, E 1': {}}, "product lacks 'product'"),
    ({'S 1, M 1, F 1, E 1': {'product': []}}, 'product lacks list index out of range'),
    ({'S 1, M 1, F 1, E 1': {'product': [_row(band='x')]}}, 'all must be integers'),
  ],
)
def test_what_is_no_table_is_refused(table, message):
  with pytest.raises(ValueError, match=message):
    blocks.parse_table(table)
