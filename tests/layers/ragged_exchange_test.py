"""Rows that are sent in uneven sizes reach their experts and come back, once each and in order.

CPUs have no such collective; `_ragged_all_to_all` does here what JAX's documentation says of it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_moe import sharding
from ssm_moe.config import ConfigError, MeshConfig
from ssm_moe.layers import exchange, mesh_dispatch, ragged_exchange
from tests.layers import mesh_cases as cases


def _ragged_all_to_all(
  operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
  num_devices, me = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)

  def sent_to_me(values):
    return jax.lax.all_gather(values, axis_name).reshape(num_devices, num_devices, -1)[:, me]

  first, size, place = map(sent_to_me, (input_offsets, send_sizes, output_offsets))
  first, size, place = (values[None] for values in (first, size, place))
  row = jnp.arange(output.shape[0])[:, None, None]
  lands = ((row >= place) & (row < place + size)).reshape(row.shape[0], -1)
  from_row = (first + row - place).reshape(row.shape[0], -1)
  slice_ = jnp.argmax(lands, axis=1)
  sender = slice_ // first.shape[2]
  chosen = jnp.take_along_axis(from_row, slice_[:, None], axis=1)[:, 0]
  values = jax.lax.all_gather(operand, axis_name)[sender, chosen]
  received = jnp.where(jnp.any(lands, axis=1)[:, None], values, output)
  # What is said to come must be what is sent; two senders must not write one row.
  fits = jnp.all(recv_sizes == size.reshape(-1)) & jnp.all(jnp.sum(lands, axis=1) <= 1)
  return jnp.where(fits, received, jnp.nan)


@pytest.fixture
def ragged(monkeypatch):
  monkeypatch.setattr(jax.lax, 'ragged_all_to_all', _ragged_all_to_all)
  monkeypatch.setattr(exchange, '_ways', {'ragged': ragged_exchange}.get)


@pytest.mark.parametrize(
  ('mesh_sizes', 'kind'),
  [
    ({'expert': 8}, 'dropless'),
    pytest.param({'expert': 2, 'fsdp': 2, 'tensor': 2}, 'dropless', marks=pytest.mark.slow),
    # Dropless after the drops: some have no expert.
    pytest.param({'expert': 4, 'data': 2}, 'capacity', marks=pytest.mark.slow),
  ],
)
def test_tokens_make_what_they_make_on_one_device(rng, ragged, mesh_sizes, kind):
  inputs = cases.inputs_of(rng, cases.FEED_FORWARD_SHAPES)
  config = cases.routing(kind, 2 if kind == 'capacity' else 1)
  cases.check_exchanged(mesh_sizes, config, inputs, 'ragged')


def test_uneven_routing_takes_more_rounds_and_loses_nothing(rng, ragged):
  # All choices are of experts 0 and 1, all on the first of four devices: four windows, two rounds.
  expert_index, *others = cases.inputs_of(rng, cases.FEED_FORWARD_SHAPES)
  expert_index = jnp.stack([jnp.arange(cases.TOKENS) % 2, jnp.arange(cases.TOKENS) % 2], axis=1)
  inputs = (expert_index, *others)
  mesh_sizes = {'expert': 4, 'data': 2}
  cases.check_exchanged(mesh_sizes, cases.routing('dropless'), inputs, 'ragged')


@pytest.mark.parametrize(('devices', 'loops'), [(2, False), (4, True)])
def test_two_devices_need_no_loop(rng, ragged, devices, loops):
  expert_index, _, x, weights, matrices = cases.inputs_of(rng, cases.FEED_FORWARD_SHAPES)
  mesh = sharding.make_mesh(MeshConfig(expert=devices, data=8 // devices))

  def layer(x):
    plan = mesh_dispatch.make_plan(
      expert_index, cases.routing('dropless'), num_experts=cases.EXPERTS, exchange='ragged'
    )
    return plan.apply(x, matrices, weights, between=cases.gated, axes=cases.FEED_FORWARD)

  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    text = str(jax.make_jaxpr(layer)(x))
  # The devices agree on the number of rounds by their largest.
  assert ('pmax' in text) == loops


def test_every_row_is_sent_once_and_the_line_is_by_expert_and_sender():
  rng = np.random.default_rng(1)
  for num_devices, room in [(1, 7), (2, 5), (4, 16), (4, 100)]:
    counts = rng.integers(0, 6, (num_devices, cases.EXPERTS)) * rng.integers(
      0, 2, (num_devices, cases.EXPERTS)
    )
    own = cases.EXPERTS // num_devices
    starts = np.cumsum(counts, axis=1) - counts
    lines = [
      [
        (sender, starts[sender, e] + n)
        for e in range(own * owner, own * (owner + 1))
        for sender in range(num_devices)
        for n in range(counts[sender, e])
      ]
      for owner in range(num_devices)
    ]
    rounds = max(-(-len(line) // room) for line in lines)
    for i in range(rounds):
      chunks = ragged_exchange.make_chunks(jnp.array(counts), jnp.int32(i), room)
      windows = [{} for _ in lines]
      for sender in range(num_devices):
        for e in range(cases.EXPERTS):
          row, place, size = (int(field[sender, e]) for field in chunks)
          assert min(row, place) >= 0 and place + size <= room
          for n in range(size):
            assert windows[e // own].setdefault(place + n, (sender, row + n)) == (sender, row + n)
      for line, window in zip(lines, windows):
        assert [window[place] for place in sorted(window)] == line[i * room : (i + 1) * room]
        assert sorted(window) == list(range(len(window)))


def test_a_backend_without_the_collective_is_named(rng):
  inputs = cases.inputs_of(rng, cases.FEED_FORWARD_SHAPES)
  with pytest.raises(ConfigError, match=r'moe\.exchange is ragged, .* CPUs .*; padded would do'):
    cases.check_exchanged({'expert': 8}, cases.routing('dropless'), inputs, 'ragged')
