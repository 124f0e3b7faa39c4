"""The decisions of a record, in arrays, to be given back to the model that made them."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from ssm_moe.analysis.documents import Documents, Window
from ssm_moe.analysis.routing import Layer, Traced
from ssm_moe.analysis.routing_record import Row
from ssm_moe.errors import UserError
from ssm_moe.layers.router import Routes
from ssm_moe.models.block import PeriodRoutes
from ssm_moe.shapes import Bool, Float, Int

_COLUMNS = ('document', 'position', 'token', 'layer', 'router', 'experts', 'weights', 'dropped')


class _Decisions(NamedTuple):
  """What a record says of one layer, at every token of all documents, laid end to end."""

  experts: Int[np.ndarray, 'T K']
  weights: Float[np.ndarray, 'T K']
  dropped: Bool[np.ndarray, 'T K']


class Record:
  """The decisions of a record.

  Attributes:
    path: Where it was read from.
  """

  def __init__(self, path: str, rows: Iterable[Row], documents: Documents, layers: list[Layer]):
    """Reads all rows.

    Raises:
      UserError: a row is of no token or layer of these, cannot be what a router decided, or is
        there twice or not at all.
    """
    self.path = path
    self._documents, self._layers = documents, layers
    self._decisions = []
    for layer in layers:
      shape = (documents.num_tokens, layer.top_k)
      unread = np.full(shape, -1, np.int32)
      self._decisions.append(_Decisions(unread, np.zeros(shape, np.float32), np.zeros(shape, bool)))
    places = {(layer.depth, layer.router): i for i, layer in enumerate(layers)}
    inputs = [documents.inputs(document).tolist() for document in range(len(documents))]
    for number, row in enumerate(rows, 1):
      try:
        self._take(row, places, inputs)
      except (LookupError, TypeError):
        raise UserError(f'{path}: row {number} does not fit the model and the input') from None
      except ValueError as error:
        raise UserError(f'{path}: row {number}: {error}') from None
    missing = sum(int((decisions.experts[:, 0] < 0).sum()) for decisions in self._decisions)
    if missing:
      every = documents.num_tokens * len(layers)
      raise UserError(f'{path}: {missing} of {every} rows are missing; the record is damaged')

  def _take(self, row: Row, places: dict[tuple[int, str], int], inputs: list[list[int]]) -> None:
    document, position, token, depth, router, experts, weights, dropped = (
      row[column] for column in _COLUMNS
    )
    place = places[depth, router]
    if document < 0 or position < 0 or inputs[document][position] != token:
      raise LookupError
    layer, decisions = self._layers[place], self._decisions[place]
    at = self._documents.starts[document] + position
    if decisions.experts[at, 0] >= 0:
      raise ValueError('this token and layer are there twice')
    if len({len(experts), len(weights), len(dropped), layer.top_k}) > 1:
      raise ValueError(f'experts, weights and dropped must have {layer.top_k} entries each')
    none = layer.num_experts
    if not all(type(expert) is int and 0 <= expert <= none for expert in experts):
      raise ValueError(f'experts must be whole numbers from 0 to {none}')
    if not layer.experts_choose:
      fallback = all(expert == none for expert in experts)
      if none in experts and not (fallback and layer.has_fallback):
        raise ValueError(f'expert {none} is the fallback, for all or none of the experts')
      if row['fallback'] is not fallback:
        raise ValueError(f'fallback must be {str(fallback).lower()}, as experts are {experts}')
    if not all(type(weight) in (int, float) and 0 <= weight < math.inf for weight in weights):
      raise ValueError('weights must be finite numbers, none of them negative')
    if not all(isinstance(flag, bool) for flag in dropped):
      raise ValueError('dropped must be true or false')
    decisions.experts[at], decisions.weights[at], decisions.dropped[at] = experts, weights, dropped

  def routes(self, window: Window, own: Traced) -> tuple[PeriodRoutes, int]:
    """Returns what the record says of a window, and how many of its decisions are not `own`.

    Padding, of which there are no rows, takes `own`.
    """
    real = np.flatnonzero(window.real.reshape(-1))
    at = self._at(window, real)
    index = {name: np.array(routes.expert_index) for name, routes in own.routes.items()}
    weights = {name: np.array(routes.combine_weights) for name, routes in own.routes.items()}
    differing = 0
    for layer, decisions in zip(self._layers, self._decisions):
      own_index, own_weights, own_dropped = (
        of_router[layer.router][layer.period] for of_router in (index, weights, own.dropped)
      )
      differs = own_index[real] != decisions.experts[at]
      differs |= own_weights[real] != decisions.weights[at]
      differs |= own_dropped[real] != decisions.dropped[at]
      differing += int(differs.any(axis=1).sum())
      own_index[real], own_weights[real] = decisions.experts[at], decisions.weights[at]
    return {name: Routes(index[name], weights[name]) for name in own.routes}, differing

  def _at(self, window: Window, real: Int[np.ndarray, '_']) -> Int[np.ndarray, '_']:
    document = window.segment_ids.reshape(-1)[real] - 1
    return self._documents.starts[document] + window.position.reshape(-1)[real]
