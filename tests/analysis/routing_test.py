"""Decisions are recorded whole, given back exactly, and changed only where that is asked for."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from flax import linen as nn

from ssm_moe.analysis import fallback, plots, replay, routing, routing_record
from ssm_moe.analysis.documents import Documents, Windows
from ssm_moe.config import ConfigError, MambaConfig, ModelConfig, MoEConfig, RoMConfig
from ssm_moe.data.tokenizer import ByteTokenizer
from ssm_moe.errors import UserError
from ssm_moe.models import lm
from tests.tolerances import FLOAT32_REORDERED, assert_close

LENGTH, LANES = 16, 3
TEXTS = ['a first document, longer than a window', '', 'bc', 'one more\nof the documents', 'd']
HEADER = {'config': 'c'}
MODEL = ModelConfig(
  d_model=8,
  num_periods=2,
  pattern='M E',
  mamba=MambaConfig(
    d_state=4, scan_implementation='reference', rom=RoMConfig(kind='shared', num_experts=4, top_k=2)
  ),
  # Few enough rows that assignments are dropped.
  moe=MoEConfig(num_experts=5, d_ff=8, capacity_factor=0.7),
)


def make_params(config):
  model = lm.LM(config)
  params = nn.unbox(jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 4), jnp.int32))['params'])
  # Routers that are sure enough for routes to matter.
  grow = {'router', 'in_proj', 'wi', 'wo', 'out_proj'}
  return jax.tree.map_with_path(
    lambda path, leaf: 5 * leaf if grow & {getattr(k, 'key', '') for k in path} else leaf, params
  )


def make_windows(max_tokens=None):
  documents = Documents(TEXTS, ByteTokenizer(), max_tokens=max_tokens)
  return Windows(documents, lanes=LANES, length=LENGTH)


@pytest.fixture(scope='module')
def tracer():
  return routing.Tracer(make_params(MODEL), MODEL)


@pytest.fixture(scope='module')
def traced(tracer):
  """Every window with what the model does by itself."""
  own = tracer.start()
  return [(window, own.run(window)) for window in make_windows()]


@pytest.fixture(scope='module')
def rows(tracer, traced):
  text = routing_record.printable(ByteTokenizer())
  return [
    row for window, own in traced for row in routing_record.rows(window, own, tracer.layers, text)
  ]


def run(tracer, traced, change):
  """Runs all windows under changed routes; returns the totals and what `change` says of each."""
  totals, changed_pass, notes = routing.Totals(tracer.layers), tracer.start(), []
  runs = []
  for window, own in traced:
    routes, note = change(window, own)
    runs.append(changed_pass.run(window, routes))
    totals.add(window, runs[-1])
    notes.append(note)
  return totals, notes, runs


def own_totals(tracer, traced):
  totals = routing.Totals(tracer.layers)
  for window, own in traced:
    totals.add(window, own)
  return totals


def test_windows_hold_every_token_once_and_the_state_goes_through_a_document(tracer, traced):
  documents = make_windows().documents
  nats = [np.full(len(tokens), np.nan) for tokens in documents.tokens]
  for window, own in traced:
    for lane, column in np.argwhere(window.real):
      document, position = window.segment_ids[lane, column] - 1, window.position[lane, column]
      assert np.isnan(nats[document][position])
      assert window.targets[lane, column] == documents.tokens[document][position]
      nats[document][position] = own.nats[lane, column]
  assert not np.isnan(np.concatenate(nats)).any()
  assert documents.num_bytes == sum(len(text.encode()) for text in TEXTS)
  # Nothing is dropped in this one, so that its windows cannot differ from the whole document.
  config = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, dispatch='dropless'))
  dropless = routing.Tracer(tracer._params, config)
  model, one_pass = lm.LM(config), dropless.start()
  output = model.apply({'params': tracer._params}, jnp.asarray(documents.inputs(0))[None])
  logits = model.apply({'params': tracer._params}, output.hidden, method='logits')[0]
  whole = jax.nn.logsumexp(logits, axis=-1) - logits[np.arange(len(logits)), documents.tokens[0]]
  parts = [one_pass.run(window).nats[window.segment_ids == 1] for window in make_windows()]
  assert_close(np.concatenate(parts), np.asarray(whole), rtol=FLOAT32_REORDERED)


def test_a_window_that_begins_a_document_begins_with_an_empty_state(tracer):
  config = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, dispatch='dropless'))
  dropless = routing.Tracer(tracer._params, config)

  def nats(*texts):
    documents = Documents(texts, ByteTokenizer())
    one_pass = dropless.start()
    windows = list(Windows(documents, lanes=1, length=LENGTH))
    return np.concatenate([one_pass.run(window).nats[window.real] for window in windows])

  first, second = 'x' * (LENGTH - 1), 'another'  # the first fills a window, with its end-of-text
  both = nats(first, second)
  assert_close(both[LENGTH:], nats(second), rtol=FLOAT32_REORDERED)


def test_rows_cover_every_token_of_every_document_once_a_layer_and_no_padding(tracer, rows):
  documents = make_windows().documents
  found = sorted((row['document'], row['position'], row['layer']) for row in rows)
  assert [layer.name for layer in tracer.layers] == ['00 mamba', '01 moe', '02 mamba', '03 moe']
  assert found == [
    (document, position, layer)
    for document, tokens in enumerate(documents.tokens)
    for position in range(len(tokens))
    for layer in range(4)
  ]
  first = [row for row in rows if row['document'] == 3 and row['layer'] == 0]
  spelled = ''.join(row['text'] for row in sorted(first, key=lambda row: row['position']))
  assert spelled == '<|endoftext|>' + TEXTS[3].replace('\n', '\\n')


def test_rows_agree_with_a_router_worked_by_hand(tracer, rows):
  """The first layer of the first token reads nothing but its embedding and a norm."""
  params = tracer._params
  x = params['embedding'][256]
  norm = jax.tree.leaves(params['periods']['norm_mamba_0'])[0][0]
  x = x / np.sqrt(np.mean(np.square(x)) + MODEL.norm.epsilon) * norm
  logits = np.asarray(x @ params['periods']['layer_mamba_0']['routing']['router']['kernel'][0])
  probs = np.exp(logits) / np.exp(logits).sum()
  row = next(row for row in rows if row['position'] == 0 and row['layer'] == 0)
  assert row['experts'] == np.argsort(-probs)[:2].tolist()
  assert_close(np.array(row['weights']), np.sort(probs)[:1:-1], rtol=FLOAT32_REORDERED)
  assert row['router'] == 'mamba_0' and not row['fallback'] and not any(row['dropped'])


def test_the_summary_counts_the_rows(tracer, traced, rows):
  for summary in own_totals(tracer, traced).summary():
    of_layer = [row for row in rows if row['layer'] == summary['layer']]
    chosen = np.bincount(
      np.concatenate([row['experts'] for row in of_layer]), minlength=len(summary['expert_load'])
    )
    np.testing.assert_allclose(summary['expert_load'], chosen / chosen.sum())
    dropped = np.mean([row['dropped'] for row in of_layer])
    np.testing.assert_allclose(summary['dropped_fraction'], dropped)
    assert (dropped > 0) == ('moe' in summary['name'])
    top = np.mean([max(row['weights']) for row in of_layer])
    assert_close(np.array(summary['top_weight']), np.array(top), rtol=FLOAT32_REORDERED)


@pytest.mark.parametrize('name', ['routes.jsonl', 'routes.parquet'])
def test_a_record_gives_the_same_logits_back(tracer, traced, rows, tmp_path, name):
  path = tmp_path / name
  with routing_record.writer(path, HEADER) as write:
    write(rows[:50])
    write(rows[50:])
  header, found = routing_record.read(path)
  assert header['config'] == 'c'
  found = list(found)
  single = [{**row, 'weights': np.float32(row['weights']).tolist()} for row in rows]
  assert [{**row, 'weights': np.float32(row['weights']).tolist()} for row in found] == single

  record = replay.Record(str(path), found, make_windows().documents, tracer.layers)
  _, differing, runs = run(tracer, traced, lambda window, own: record.routes(window, own))
  assert sum(differing) == 0
  assert [tracer.difference(w, own, new) for (w, own), new in zip(traced, runs)] == [0] * len(runs)
  # Another decision in it is found, and moves the logits.
  found[0]['experts'] = [(expert + 1) % 4 for expert in found[0]['experts']]
  found[1]['dropped'] = [not dropped for dropped in found[1]['dropped']]
  found[-1]['weights'] = [2 * weight for weight in found[-1]['weights']]
  record = replay.Record(str(path), found, make_windows().documents, tracer.layers)
  _, differing, runs = run(tracer, traced, lambda window, own: record.routes(window, own))
  assert sum(differing) == 3
  changed = [tracer.difference(w, own, new) > 0 for (w, own), new in zip(traced, runs)]
  assert changed[0] and changed[-1]


def test_a_record_that_does_not_fit_is_refused(tracer, rows, tmp_path):
  documents = make_windows().documents

  def read(found):
    return replay.Record('r', found, documents, tracer.layers)

  with pytest.raises(UserError, match=r'r: 1 of \d+ rows are missing'):
    read(rows[1:])
  for change, message in (
    ({'token': 3}, 'does not fit'),
    ({'document': 9}, 'does not fit'),
    ({'layer': 7}, 'does not fit'),
    ({'experts': 3}, 'does not fit'),
    ({'weights': [0.5]}, 'experts, weights and dropped must have 2 entries each'),
    ({'experts': [7, 0]}, 'experts must be whole numbers from 0 to'),
    ({'experts': [1.5, 0]}, 'experts must be whole numbers from 0 to'),
    ({'experts': [4, 0]}, 'expert 4 is the fallback, for all or none'),
    ({'fallback': True}, 'fallback must be false'),
    ({'weights': [float('nan'), 0.1]}, 'weights must be finite'),
    ({'weights': [-0.1, 0.1]}, 'weights must be finite'),
    ({'weights': [float('inf'), 0.1]}, 'weights must be finite'),
    ({'dropped': [0, 1]}, 'dropped must be true or false'),
  ):
    with pytest.raises(UserError, match=f'r: row 1:? {message}'):
      read([{**rows[0], **change}, *rows[1:]])
  with pytest.raises(UserError, match=r'r: row 2: this token and layer are there twice'):
    read([rows[0], *rows])
  for name, text, message in [
    ('a.jsonl', '{"document": 0}\n', 'no record of routes'),
    ('b.jsonl', '', 'no record of routes'),
    ('c.jsonl', 'x\n', 'line 1 is not JSON'),
    ('d.parquet', 'x', 'not a readable Parquet file'),
  ]:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
      routing_record.read(tmp_path / name)
  with (
    pytest.raises(UserError, match='there already'),
    routing_record.writer(tmp_path / 'a.jsonl', {}),
  ):
    pass


def test_a_record_cut_short_by_an_error_is_removed(tmp_path):
  def fail(path):
    with routing_record.writer(path, HEADER):
      raise UserError('x')

  for name in ('a.jsonl', 'a.parquet'):
    with pytest.raises(UserError, match='x'):
      fail(tmp_path / name)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('which', [slice(1, 2), slice(0, 4)])
def test_injection_changes_the_tokens_and_layers_asked_for(tracer, traced, which):
  layers = tracer.layers[which]
  before = own_totals(tracer, traced)

  def change(window, own):
    return routing.inject(own.routes, layers, window, rate=0.5, seed=3)

  after, changed, _ = run(tracer, traced, change)
  for (window, own), tokens in zip(traced, changed):
    routes, _ = change(window, own)
    assert not (tokens & ~window.real.reshape(-1)).any()
    for layer in tracer.layers:
      old, new = (routing.routes_of(r, layer) for r in (own.routes, routes))
      np.testing.assert_array_equal(old.combine_weights, new.combine_weights)
      differ = (old.expert_index != new.expert_index).any(axis=1)
      expected = tokens[layers.index(layer)] if layer in layers else np.zeros_like(differ)
      np.testing.assert_array_equal(differ, expected)
      if layer in layers and layer.num_experts >= 2 * layer.top_k:
        same = old.expert_index[differ][:, :, None] == new.expert_index[differ][:, None, :]
        assert not same.any()
  share = sum(tokens.sum() for tokens in changed) / (len(layers) * before.tokens)
  assert 0.3 < share < 0.7
  assert after.loss != before.loss


def test_injection_at_rate_0_changes_nothing(tracer, traced):
  after, changed, _ = run(
    tracer,
    traced,
    lambda window, own: routing.inject(own.routes, tracer.layers, window, rate=0.0, seed=3),
  )
  assert not any(tokens.any() for tokens in changed)
  assert after.loss == own_totals(tracer, traced).loss


def test_what_a_greater_rate_changes_includes_what_a_smaller_one_does(tracer, traced):
  window, own = traced[0]
  less, more = (
    routing.inject(own.routes, tracer.layers, window, rate=rate, seed=0)[1] for rate in (0.2, 0.6)
  )
  assert less.any() and (less <= more).all() and more.sum() > less.sum()


def test_an_input_is_cut_at_the_number_of_tokens_asked_for():
  cut = Documents(TEXTS, ByteTokenizer(), max_tokens=45)
  assert (cut.num_tokens, cut.cut, len(cut)) == (45, True, 4)
  assert cut.num_bytes == 45 - 3  # without the end-of-texts of the first three
  whole = Documents(TEXTS, ByteTokenizer(), max_tokens=10_000)
  assert not whole.cut and whole.sha256 != cut.sha256


def test_expert_choice_is_refused():
  config = dataclasses.replace(MODEL, moe=MoEConfig(num_experts=5, d_ff=8, choice='expert'))
  with pytest.raises(ConfigError, match='the audit would not be autoregressive'):
    routing.Tracer({}, config)


def test_the_sweep_finds_the_largest_threshold_within_the_tolerance(tracer, traced):
  top = fallback.TopWeights(MODEL, tracer.layers)
  for window, own in traced:
    top.add(window.real, own)
  thresholds = top.thresholds()
  assert thresholds == sorted(thresholds) and thresholds[0] > 0.25 and thresholds[-1] <= 1
  base = own_totals(tracer, traced).loss
  points = fallback.sweep(
    tracer._params, MODEL, make_windows(), [0.0, thresholds[4]], base_loss=base
  )
  assert points[0].fallback_fraction == 0 and abs(points[0].loss_rise) < 1e-5
  assert 0.1 < points[1].fallback_fraction < 0.9 and points[1].loss_rise != 0
  point = fallback.Point
  made = [point(0.1, 0.1, 1.0, -0.01), point(0.2, 0.2, 1.0, 0.02), point(0.3, 0.5, 1.0, 0.005)]
  assert fallback.choose(made, 0.01).threshold == 0.3
  assert fallback.choose(made, 0.001).threshold == 0.1
  assert fallback.choose(made[1:], 0.001) is None


def test_a_model_without_anything_to_fall_back_to_is_refused():
  with pytest.raises(UserError, match='nothing to fall back to'):
    fallback.check(dataclasses.replace(MODEL, mamba=MambaConfig(d_state=4)))
  shared = MoEConfig(num_experts=5, d_ff=8, num_shared_experts=1)
  fallback.check(dataclasses.replace(MODEL, mamba=MambaConfig(d_state=4), moe=shared))


def test_rows_are_strict_json(rows):
  for row in rows[:20]:
    assert json.loads(json.dumps(row, allow_nan=False)) == row


@pytest.mark.parametrize('chosen', [0.3, None])
def test_thresholds_are_drawn(tmp_path, chosen):
  points = [(0.0, -0.001, 0.2), (0.2, 0.004, 0.3), (1.0, 2.0, 1.0)]
  plots.plot_fallback(points, tmp_path / 'a.png', tolerance=0.01, chosen=chosen)
  image = matplotlib.image.imread(tmp_path / 'a.png')[..., :3]
  assert image.shape[1] > 800 and (image < 0.9).any()
