"""Figures show what they are given: colours stand where the numbers put them."""

import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from ssm_moe.analysis.plots import (
  plot_comparison,
  plot_context_lengths,
  plot_expert_load,
  plot_loss,
)
from ssm_moe.analysis.speedup import Band, Curve

BLUE, ORANGE = (0, 114, 178), (213, 94, 0)
BROWN, PURPLE = (127, 59, 8), (45, 0, 75)  # the ends of the scale
WHITE = (247, 247, 247)  # its middle


def pixels(path, colour, width=1.0):
  """How many pixels have a colour, in a share of the width, from the left."""
  image = np.round(matplotlib.image.imread(path)[..., :3] * 255)
  image = image[:, : int(width * image.shape[1])]
  return int((np.abs(image - np.array(colour)) < 3).all(axis=-1).sum())


def rows(steps, **more):
  return [
    {'tokens': 100 * step, 'train_loss': 1 + 4 / step, 'valid_loss': None} | more
    for step in range(1, steps + 1)
  ]


VALID = {'tokens': 300, 'valid_loss': 2.0}


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize(
  ('metrics', 'train', 'valid'),
  [
    ([], False, False),
    (rows(1), True, False),
    (rows(5), True, False),
    (rows(200), True, False),
    ([VALID], False, True),
    ([*rows(30), VALID], True, True),
    ([*rows(30), VALID | {'valid_bits_per_byte': 3.0}], True, True),
    ([{'tokens': 1}, {'train_loss': 1.0}, {'tokens': 1, 'train_loss': float('nan')}], False, False),
    (rows(30, train_loss=2.0), True, False),
  ],
)
def test_the_curves_that_there_are_are_drawn(tmp_path, metrics, train, valid):
  path = tmp_path / 'loss.png'
  plot_loss(metrics, path)
  assert (pixels(path, BLUE) > 50) == train
  assert (pixels(path, ORANGE) > 50) == valid


def test_bits_per_byte_get_a_panel(tmp_path):
  plot_loss([VALID], tmp_path / 'one.png')
  plot_loss([VALID | {'valid_bits_per_byte': 3.0}], tmp_path / 'two.png')
  one, two = (matplotlib.image.imread(tmp_path / name) for name in ('one.png', 'two.png'))
  assert two.shape[1] > 1.5 * one.shape[1]


def band(points, width=0.0, offset=0.0):
  steps = np.arange(1, points + 1)
  loss = 1 + offset + 4 / steps
  mean = Curve(steps, steps[:, None] * np.ones(4), loss)
  return Band(mean, loss - width, loss + width)


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('points', [1, 2, 5, 200])
@pytest.mark.parametrize('loss', ['valid', 'train'])
def test_every_entry_of_a_comparison_is_drawn(tmp_path, points, loss):
  path = tmp_path / 'compare.png'
  bands = {name: band(points, offset=0.2 * i) for i, name in enumerate(('dense', 'one', 'two'))}
  plot_comparison(bands, path, loss=loss, target_loss=2.0)
  # More than what the legend alone would give: a line of 24 by 3 pixels.
  for colour in (BLUE, ORANGE):
    assert pixels(path, colour) > 150


def test_the_spread_over_seeds_is_a_band(tmp_path):
  pale = tuple(round(0.8 * 255 + 0.2 * c) for c in BLUE)
  for width in (0.0, 1.0):
    path = tmp_path / f'{width}.png'
    bands = {'dense': band(100), 'seeds': band(100, width)}
    plot_comparison(bands, path, loss='train', target_loss=2.0)
    assert (pixels(path, pale) > 10_000) == (width > 0)


def test_more_entries_than_colours_can_be_drawn_and_named_at_length(tmp_path):
  path = tmp_path / 'compare'  # a PNG file whatever its name
  bands = {f'a_rather_long_name_of_an_entry_{i}': band(30) for i in range(20)}
  plot_comparison(bands, path, loss='valid', target_loss=1.2)
  assert matplotlib.image.imread(path, format='png').shape[1] > 1500


@pytest.mark.parametrize('shape', [(1, 1), (1, 8), (12, 32), (100, 64)])
def test_perfect_balance_is_white(tmp_path, shape):
  layers, experts = shape
  path = tmp_path / 'load.png'
  plot_expert_load(np.full(shape, 1 / experts), path, [f'layer {i}' for i in range(layers)])
  height, width = matplotlib.image.imread(path).shape[:2]
  assert pixels(path, WHITE) > 0.25 * height * width
  # Of the colour bar only.
  assert max(pixels(path, BROWN), pixels(path, PURPLE)) < 0.01 * height * width


def test_a_hot_and_a_dead_expert_stand_out(tmp_path):
  load = np.full((4, 10), 0.1)
  load[1] = [0.6, 0.0, *[0.05] * 8]
  path = tmp_path / 'load.png'
  plot_expert_load(load, path, list('abcd'))
  height, width = matplotlib.image.imread(path).shape[:2]
  cell = height * width / 40
  assert pixels(path, PURPLE) > 0.3 * cell
  assert pixels(path, BROWN) > 0.3 * cell


def test_layers_may_have_different_numbers_of_experts(tmp_path):
  path = tmp_path / 'load.png'
  plot_expert_load([np.full(2, 0.5), np.full(8, 0.125)], path, ['M', 'E'])
  height, width = matplotlib.image.imread(path).shape[:2]
  assert pixels(path, (200, 200, 200)) > 0.1 * height * width
  assert pixels(path, PURPLE) < 0.01 * height * width  # both are balanced


def test_no_layers_is_a_figure_that_says_so(tmp_path):
  plot_expert_load([], tmp_path / 'load.png', [])
  assert pixels(tmp_path / 'load.png', (89, 89, 89)) > 10
  with pytest.raises(ValueError, match='1 layers of loads and 0 names'):
    plot_expert_load([np.ones(1)], tmp_path / 'load.png', [])


def test_pyplot_and_its_global_state_stay_out():
  program = 'import sys, ssm_moe.analysis.plots\nassert "matplotlib.pyplot" not in sys.modules\n'
  subprocess.run([sys.executable, '-c', program], check=True)


def by_context(*lengths, finite=True):
  value = 2.0 if finite else None
  return [
    {
      'context_length': length,
      'perplexity': value,
      'positions': [
        {'from': 0, 'to': 1, 'bits_per_byte': value},
        {'from': 1, 'to': length, 'bits_per_byte': value},
      ],
    }
    for length in lengths
  ]


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize(
  ('lengths', 'carried'), [((64,), False), (tuple(2**i for i in range(4, 20)), True)]
)
def test_context_lengths_are_drawn_where_they_are_finite(tmp_path, lengths, carried):
  drawn, empty = tmp_path / 'drawn.png', tmp_path / 'empty.png'
  plot_context_lengths(by_context(*lengths), drawn, trained=256, carried=carried)
  plot_context_lengths(by_context(*lengths, finite=False), empty, trained=256, carried=carried)
  left = pixels(drawn, BLUE, width=0.45)
  assert left > 20 and pixels(drawn, BLUE) > left + 50
  assert pixels(empty, BLUE, width=0.45) == 0
