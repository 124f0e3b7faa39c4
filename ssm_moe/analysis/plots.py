"""Figures as PNG files: losses of runs, loads of experts, perplexity by context."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, ScalarFormatter

from ssm_moe.analysis.speedup import Band
from ssm_moe.shapes import Float

# Okabe and Ito's palette, which readers with any colour vision can tell apart.
_BLUE, _ORANGE, _GREY = '#0072B2', '#D55E00', '#595959'
_GREEN, _PINK, _SKY, _AMBER = '#009E73', '#CC79A7', '#56B4E9', '#E69F00'
# Of the entries of a comparison; the baseline is black. More than these are dashed, then dotted.
_ENTRIES = (_BLUE, _ORANGE, _GREEN, _PINK, _SKY, _AMBER)
_TIME_UNITS = (('days', 86400), ('hours', 3600), ('minutes', 60), ('seconds', 1))
# Cells that can still be read with a number in them.
_MAX_LABELLED_EXPERTS, _MAX_LABELLED_LAYERS = 16, 32


def plot_loss(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
  """Draws training and validation loss against tokens, and bits per byte where rows have them.

  Args:
    rows: Of metrics.jsonl: `tokens` with `train_loss`, or with `valid_loss` and
      `valid_bits_per_byte`; losses in nats a token. Rows and values may be missing.
    path: Of the PNG file.
  """
  train = _curve(rows, 'train_loss')
  valid = _curve(rows, 'valid_loss')
  bits = _curve(rows, 'valid_bits_per_byte')
  panels = 2 if len(bits) else 1
  figure = _figure(5.2 * panels + 0.8, 4.2)
  axes = figure.subplots(1, panels, squeeze=False)[0]

  loss = axes[0]
  smooth = _smoothed(train)
  if len(smooth) != len(train):
    loss.plot(*train.T, color=_BLUE, alpha=0.25, linewidth=0.8)
  if len(train):
    marker = 'o' if len(train) < 3 else None
    loss.plot(*smooth.T, color=_BLUE, linewidth=1.8, marker=marker, label='training')
  if len(valid):
    loss.plot(*valid.T, color=_ORANGE, linewidth=1.8, marker='o', markersize=4, label='validation')
  title = 'Loss'
  if len(valid):
    title = f'Validation loss {valid[-1, 1]:.3f} after {_tokens(valid[-1, 0])} tokens'
  elif len(train):
    title = f'Training loss {smooth[-1, 1]:.3f} after {_tokens(train[-1, 0])} tokens'
  _finish(loss, title, 'cross entropy [nats per token]', np.concatenate([smooth, valid]))
  if len(train) or len(valid):
    loss.legend(frameon=False)
  else:
    _say_instead(loss, 'no losses yet')

  if len(bits):
    axes[1].plot(*bits.T, color=_ORANGE, linewidth=1.8, marker='o', markersize=4)
    title = f'Validation {bits[-1, 1]:.3f} bits per byte'
    _finish(axes[1], title, 'bits per byte', bits)
  figure.savefig(path)


def plot_comparison(
  bands: Mapping[str, Band], path: str | os.PathLike, *, loss: str, target_loss: float
) -> None:
  """Draws the loss of several entries against tokens and against seconds.

  Args:
    bands: By name of the entry, the baseline first: a line for the mean over the seeds, and from
      the least to the greatest loss a band.
    path: Of the PNG file.
    loss: 'valid' or 'train'.
    target_loss: The loss at which speed-ups are given, a line across.
  """
  figure = _figure(9.6 + 0.09 * max(map(len, bands)), 4.4)
  panels = figure.subplots(1, 2, sharey=True)
  seconds = max(band.mean.costs[-1, 3] for band in bands.values())
  unit, divisor = next(
    (name, size) for name, size in _TIME_UNITS if seconds >= 2 * size or size == 1
  )
  for axes, column, scale in zip(panels, (1, 3), (1, divisor)):
    # The baseline last, and so on top.
    for i, (name, band) in reversed(list(enumerate(bands.items()))):
      x = band.mean.costs[:, column] / scale
      style = {'color': 'black', 'linewidth': 2.2}
      if i:
        round_, place = divmod(i - 1, len(_ENTRIES))
        dashes = ('-', '--', ':')[min(round_, 2)]
        style = {'color': _ENTRIES[place], 'linewidth': 1.6, 'linestyle': dashes}
      few = len(x) < 3 or (loss == 'valid' and len(x) <= 40)
      axes.fill_between(x, band.low, band.high, color=style['color'], alpha=0.2, linewidth=0)
      style['marker'] = 'o' if few else None
      axes.plot(x, band.mean.loss, markersize=3.5, label=name, **style)
    axes.axhline(target_loss, color=_GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
  word = {'valid': 'Validation', 'train': 'Training'}[loss]
  _finish(panels[0], f'{word} loss by tokens', 'cross entropy [nats per token]', np.zeros((0, 2)))
  _finish(panels[1], f'{word} loss by training time', '', np.zeros((0, 2)))
  panels[0].set_ylim(*_readable_losses(bands, target_loss))
  panels[1].set_xlabel(unit)
  panels[1].xaxis.set_major_formatter(ScalarFormatter())
  # At the left, where all curves are higher.
  panels[0].annotate(
    f"{target_loss:.3f}, the baseline's last",
    (0, target_loss),
    xycoords=panels[0].get_yaxis_transform(),
    xytext=(4, -3),
    textcoords='offset points',
    va='top',
    color=_GREY,
    fontsize=8,
  )
  handles, labels = panels[0].get_legend_handles_labels()
  figure.legend(handles[::-1], labels[::-1], loc='outside right upper', frameon=False)
  figure.savefig(path, format='png')


def plot_fallback(
  points: Sequence[tuple[float, float, float]],
  path: str | os.PathLike,
  *,
  tolerance: float,
  chosen: float | None,
) -> None:
  """Draws how much the loss rises against the share of the tokens that fall back.

  Args:
    points: Share of the tokens, rise of the loss in nats a token, threshold; by rising threshold.
    path: Of the PNG file.
    tolerance: Rise that is accepted, a line across.
    chosen: The threshold that is taken, if one is.
  """
  figure = _figure(6.4, 4.2)
  axes = figure.subplots()
  rates, rises, thresholds = np.asarray(points, np.float64).T
  title = 'No threshold that was tried costs so little'
  if chosen is not None:
    rate = rates[list(thresholds).index(chosen)]
    title = f'Threshold {chosen:.3g}: {rate:.1%} of the tokens fall back'
  axes.plot(100 * rates, rises, color=_BLUE, linewidth=1.6, marker='o', markersize=4)
  label = 'rise of the loss [nats per token; symlog]'
  _finish(axes, title, label, np.zeros((0, 2)))
  # Linear up to the tolerance, where the choice is made; beyond, rises are of many magnitudes.
  axes.set_yscale('symlog', linthresh=max(tolerance, 1e-3))
  axes.yaxis.set_major_formatter(ScalarFormatter())
  axes.axhline(tolerance, color=_GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
  place = axes.get_yaxis_transform()
  label = {'xytext': (-4, 3), 'textcoords': 'offset points', 'fontsize': 8, 'color': _GREY}
  axes.annotate(f'tolerance {tolerance:g}', (1, tolerance), xycoords=place, ha='right', **label)
  last = None
  for rate, rise, threshold in zip(rates, rises, thresholds):
    taken = threshold == chosen
    if taken:
      axes.plot(100 * rate, rise, color=_ORANGE, marker='o', markersize=8, zorder=4)
    elif last is not None and 100 * (rate - last) < 6:
      continue  # its label would lie on the one before
    last = rate
    colour = {'color': _ORANGE, 'weight': 'bold'} if taken else {}
    # At the left edge there is room on the right only.
    side = {'ha': 'left', 'xytext': (5, -11)} if rate < 0.12 else {'ha': 'right'}
    text = label | side | colour
    axes.annotate(f'{threshold:.3g}', (100 * rate, rise), va='bottom', **text)
  axes.set_xlabel('tokens that fall back, mean over layers [%]; beside each point its threshold')
  axes.xaxis.set_major_formatter(ScalarFormatter())
  figure.savefig(path, format='png')


def plot_expert_load(
  load: Float[np.ndarray, 'layers E'] | Sequence[Float[np.ndarray, '_']],
  path: str | os.PathLike,
  layer_names: Sequence[str],
) -> None:
  """Draws which share of the assignments each expert of each layer got.

  Colours are shares in multiples of 1/E, white at perfect balance, so that layers with different
  numbers of experts can be compared.

  Args:
    load: By layer and expert; each layer adds up to 1. A list where layers have different
      numbers of experts.
    path: Of the PNG file.
    layer_names: One a layer.
  """
  layers = [np.asarray(row, np.float64) for row in load]
  if len(layers) != len(layer_names):
    raise ValueError(f'{len(layers)} layers of loads and {len(layer_names)} names')
  experts = max((len(row) for row in layers), default=0)
  labelled = experts <= _MAX_LABELLED_EXPERTS and len(layers) <= _MAX_LABELLED_LAYERS
  cell = 0.62 if labelled else 0.24
  figure = _figure(max(5.6, 2.4 + cell * experts), max(2.6, 1.6 + 0.34 * min(len(layers), 40)))
  axes = figure.subplots()
  unit = ', in %' if labelled else ''
  title = f'Share of assignments per expert{unit}\n{_balance(layers)}'
  axes.set_title(title, loc='left', fontsize=11)
  axes.set_xlabel('expert')
  if not experts:
    _say_instead(axes, 'no expert layers')
    figure.savefig(path)
    return

  share = np.full((len(layers), experts), np.nan)
  for index, row in enumerate(layers):
    share[index, : len(row)] = row * len(row)
  # 4 keeps a single hot expert from bleaching all others; the colour bar says that it is cut there.
  top = 4.0 if np.nanmax(share, initial=0.0) > 2 else 2.0
  axes.set_facecolor('#C8C8C8')  # where a layer has no such expert
  image = axes.imshow(
    np.ma.masked_invalid(share), cmap='PuOr', norm=TwoSlopeNorm(1, 0, top), aspect='auto'
  )
  bar = figure.colorbar(image, ax=axes, extend='max', ticks=np.linspace(0, top, int(top) + 1))
  bar.set_label('share, in multiples of 1/E')
  bar.outline.set_visible(False)
  every = -(-len(layers) // 40)
  axes.set_yticks(range(0, len(layers), every), layer_names[::every])
  axes.set_xticks(range(0, experts, -(-experts // 16)))
  axes.tick_params(length=0)
  axes.spines[:].set_visible(False)
  # White lines between cells.
  axes.set_xticks(np.arange(0.5, experts - 1), minor=True)
  axes.set_yticks(np.arange(0.5, len(layers) - 1), minor=True)
  axes.grid(which='minor', color='white', linewidth=1)
  axes.tick_params(which='minor', length=0)
  if labelled:
    for index, row in enumerate(layers):
      for expert, value in enumerate(row):
        dark = not 0.35 < share[index, expert] < 1 + 0.65 * (top - 1)
        axes.text(
          expert,
          index,
          f'{100 * value:.0f}' if value == 0 or value >= 0.0095 else '<1',
          ha='center',
          va='center',
          fontsize=8,
          color='white' if dark else 'black',
        )
  figure.savefig(path)


def plot_context_lengths(
  lengths: Sequence[Mapping[str, Any]], path: str | os.PathLike, *, trained: int, carried: bool
) -> None:
  """Draws perplexity against the length of the context, and bits per byte against the position.

  Args:
    lengths: One or more, as `context_length.report` returns them; what is None is left out.
    path: Of the PNG file.
    trained: Length of the windows in training, a line across.
    carried: Whether windows went on from those before them.
  """
  figure = _figure(10.6, 4.2)
  by_length, by_position = figure.subplots(1, 2)
  points = [(row['context_length'], row['perplexity']) for row in lengths]
  points = [point for point in points if point[1] is not None]
  title = 'No perplexity is finite'
  if points:
    best, least = min(points, key=lambda point: point[1])
    title = f'Least perplexity {least:.4g}, with windows of {_binary(best)}'
    by_length.plot(*zip(*points), color=_BLUE, linewidth=1.8, marker='o', markersize=4)
    # Else a curve that is flat but for rounding would fill the figure.
    by_length.update_datalim([(best, 0.99 * least), (best, 1.01 * least)])
    by_length.autoscale_view()
  _finish(by_length, title, 'perplexity of a token', np.zeros((0, 2)))
  for i, row in enumerate(lengths):
    known = [part for part in row['positions'] if part['bits_per_byte'] is not None]
    by_position.plot(
      [((part['from'] + 1) * part['to']) ** 0.5 for part in known],
      [part['bits_per_byte'] for part in known],
      color=_ENTRIES[i % len(_ENTRIES)],
      linestyle=('-', '--', ':')[min(i // len(_ENTRIES), 2)],
      linewidth=1.6,
      marker='o',
      markersize=3.5,
      label=_binary(row['context_length']),
    )
  where = 'document' if carried else 'window'
  _finish(by_position, f'By position in the {where}', 'bits per byte', np.zeros((0, 2)))
  how = 'state carried over them' if carried else 'each read from nothing'
  ticks = [row['context_length'] for row in lengths]
  positions = max(row['positions'][-1]['to'] for row in lengths)
  for axes, label, places in (
    (by_length, f'length of the windows [tokens, log]; {how}', [*ticks, trained]),
    (by_position, f'place in the {where}, from 1 [tokens, log]', [1, positions, trained]),
  ):
    axes.set_xscale('log', base=2)
    axes.set_xlim(min(places) / 1.3, max(places) * 1.3)
    axes.set_xlabel(label)
    axes.axvline(trained, color=_GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
      f'trained at {_binary(trained)}',
      (trained, 1),
      xycoords=axes.get_xaxis_transform(),
      xytext=(4, -2),
      textcoords='offset points',
      va='top',
      color=_GREY,
      fontsize=8,
    )
  by_length.set_xticks(ticks, map(_binary, ticks))
  fours = [4**i for i in range(16) if 4**i <= positions]
  by_position.set_xticks(fours, map(_binary, fours))
  by_length.minorticks_off()
  by_position.minorticks_off()
  figure.legend(loc='outside right upper', frameon=False, title='window')
  figure.savefig(path, format='png')


def _readable_losses(bands: Mapping[str, Band], target_loss: float) -> tuple[float, float]:
  """Returns limits that leave out what happens in the first tenth of each run."""
  low, high = target_loss, target_loss
  for band in bands.values():
    tokens = band.mean.costs[:, 1]
    later = tokens >= 0.1 * tokens[-1]
    low, high = min(low, band.low[later].min()), max(high, band.high[later].max())
  margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
  return low - margin, high + margin


def _balance(layers: Sequence[np.ndarray]) -> str:
  sizes = sorted({len(row) for row in layers})
  balance = ' or '.join(f'1/{size} = {100 / size:.3g} %' for size in sizes)
  dead = sum(int((row == 0).sum()) for row in layers)
  unused = f'; {dead} expert{"s" if dead > 1 else ""} unused' if dead else ''
  return f'perfect balance is {balance}{unused}' if sizes else ''


def _figure(width: float, height: float) -> Figure:
  figure = Figure(figsize=(width, height), dpi=150, layout='constrained')
  FigureCanvasAgg(figure)
  return figure


def _say_instead(axes: Any, text: str) -> None:
  axes.set_axis_off()
  axes.text(0.5, 0.5, text, ha='center', va='center', color=_GREY, transform=axes.transAxes)


def _finish(axes: Any, title: str, label: str, points: np.ndarray) -> None:
  axes.set_title(title, loc='left', fontsize=11)
  axes.set_xlabel('tokens')
  axes.set_ylabel(label)
  axes.xaxis.set_major_formatter(EngFormatter(sep=''))
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(axis='y', color='#DDDDDD', linewidth=0.6)
  axes.set_axisbelow(True)
  axes.set_xlim(left=0)
  # The first steps of a run are far above all that follows: show the part that is to be read.
  if len(points) > 20:
    low, usual, high = np.quantile(points[:, 1], [0, 0.98, 1])
    if usual > low:
      margin = 0.05 * (usual - low)
      axes.set_ylim(low - margin, min(high, low + 1.6 * (usual - low)) + margin)


def _curve(rows: Sequence[Mapping[str, Any]], key: str) -> Float[np.ndarray, 'points 2']:
  """Returns tokens and values of the rows that have a finite number there."""
  points = [
    (row['tokens'], row[key])
    for row in rows
    if row.get('tokens') is not None and row.get(key) is not None
  ]
  curve = np.asarray(points, np.float64).reshape(-1, 2)
  return curve[np.isfinite(curve).all(axis=1)]


def _smoothed(curve: Float[np.ndarray, 'points 2']) -> Float[np.ndarray, 'fewer 2']:
  """Returns running means over a fiftieth of the points, if there are many."""
  width = len(curve) // 50
  if width < 2:
    return curve
  kernel = np.full(width, 1 / width)
  return np.stack([np.convolve(column, kernel, 'valid') for column in curve.T], axis=1)


def _tokens(count: float) -> str:
  return EngFormatter(places=3 if count >= 1e9 else 1, sep='')(count)


def _binary(count: int) -> str:
  for unit, size in (('M', 1 << 20), ('K', 1 << 10)):
    if count % size == 0:
      return f'{count // size}{unit}'
  return str(count)
