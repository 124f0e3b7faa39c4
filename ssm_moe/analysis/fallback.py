"""Which threshold to fall back below: how often tokens then do so, and what it costs in loss."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ssm_moe.analysis import plots
from ssm_moe.analysis.documents import Windows
from ssm_moe.analysis.routing import Layer, Totals, Traced, Tracer, routes_of
from ssm_moe.config import ModelConfig
from ssm_moe.errors import UserError
from ssm_moe.models import fallback
from ssm_moe.shapes import PyTree

# Shares of the top weights that lie below the thresholds that are tried.
QUANTILES = (0.02, 0.1, 0.2, 0.35, 0.5, 0.75, 0.95)


@dataclasses.dataclass(frozen=True)
class Point:
  """What a threshold does.

  Attributes:
    threshold: Of the best score.
    fallback_fraction: Share of the tokens below it, the mean over the layers that can fall back.
    loss: Nats a token.
    loss_rise: Over the loss of the model as it is.
  """

  threshold: float
  fallback_fraction: float
  loss: float
  loss_rise: float


class TopWeights:
  """The top weights of all tokens in the layers that can fall back."""

  def __init__(self, config: ModelConfig, layers: list[Layer]):
    self._raw = {}
    self._layers = [layer for layer in layers if _falls_back(config, layer)]
    for layer in self._layers:
      routing = config.routing_of(config.layers[layer.depth % len(config.layers)])
      self._raw[layer.router] = routing.weights == 'raw'
    self._found: list[np.ndarray] = []

  def add(self, real: np.ndarray, traced: Traced) -> None:
    """Takes those of a window; `real` says which tokens are no padding."""
    for layer in self._layers:
      weights = routes_of(traced.routes, layer).combine_weights[real.reshape(-1)]
      self._found.append(weights.max(axis=1))

  def thresholds(self) -> list[float]:
    """Returns thresholds to try, in rising order.

    Quantiles where weights are scores. Renormalized weights do not tell the score: then even steps
    up to 1.
    """
    if all(self._raw.values()):
      found = np.quantile(np.concatenate(self._found), QUANTILES)
    else:
      found = np.linspace(0, 1, len(QUANTILES) + 1)[1:]
    return sorted({float(np.float32(value)) for value in found})


def sweep(
  params: PyTree,
  config: ModelConfig,
  windows: Windows,
  thresholds: Sequence[float],
  *,
  base_loss: float,
) -> list[Point]:
  """Runs the model with each threshold, the same one in all layers that can fall back.

  Routing Mamba without a matrix to fall back to gets the mean of its experts.

  Args:
    params: Of the model.
    config: Of the model.
    windows: Of validation text.
    thresholds: To try.
    base_loss: Of the model as it is, on the same text.
  """
  params, config = fallback.with_mean_expert(params, config)
  points = []
  for threshold in thresholds:
    tracer = Tracer(params, fallback.with_threshold(config, threshold))
    totals, one_pass = Totals(tracer.layers), tracer.start()
    for window in windows:
      totals.add(window, one_pass.run(window))
    rates = [
      summary['fallback_fraction']
      for layer, summary in zip(tracer.layers, totals.summary())
      if _falls_back(config, layer)
    ]
    rate = float(np.mean(rates))
    points.append(Point(threshold, rate, totals.loss, totals.loss - base_loss))
  return points


def choose(points: Sequence[Point], tolerance: float) -> Point | None:
  """Returns the point of the largest threshold whose loss rises by at most `tolerance` nats."""
  good = [point for point in points if point.loss_rise <= tolerance]
  return max(good, key=lambda point: point.threshold, default=None)


def report(
  points: Sequence[Point], base_loss: float, tolerance: float, *, plot: str
) -> dict[str, Any]:
  """Chooses a threshold, draws the points to the file `plot`, and returns what is said of them."""
  chosen = choose(points, tolerance)
  plots.plot_fallback(
    [(point.fallback_fraction, point.loss_rise, point.threshold) for point in points],
    plot,
    tolerance=tolerance,
    chosen=None if chosen is None else chosen.threshold,
  )
  return {
    'plot': plot,
    'base_loss': base_loss,
    'tolerance': tolerance,
    'points': [dataclasses.asdict(point) for point in points],
    # 0: no threshold that was tried is cheap enough.
    'chosen_threshold': 0.0 if chosen is None else chosen.threshold,
  }


def sentence(points: Sequence[Point], tolerance: float) -> str:
  """Returns what `report` found, in words."""
  chosen = choose(points, tolerance)
  if chosen is None:
    return f'every fallback threshold that was tried costs more than {tolerance:g} nats a token'
  text = (
    f'fallback threshold {chosen.threshold:.4g}: {chosen.fallback_fraction:.1%} of the tokens fall '
    f'back, and the loss rises by {chosen.loss_rise:.4f} nats a token'
  )
  if not chosen.fallback_fraction:
    return text + '; no threshold that does anything is within the tolerance'
  if chosen is max(points, key=lambda point: point.threshold):
    return text + '; it is the largest that was tried'
  return text


def check(config: ModelConfig) -> None:
  """Raises UserError unless a layer of the model can fall back."""
  if not any(fallback.can_fall_back(config, letter) for letter in config.layers):
    raise UserError(
      'nothing to fall back to: the model needs a mixer with rom.kind, or feed-forward experts '
      'that tokens choose with moe.num_shared_experts of at least 1'
    )


def _falls_back(config: ModelConfig, layer: Layer) -> bool:
  return fallback.can_fall_back(config, config.layers[layer.depth % len(config.layers)])
