"""What a run says of itself: layers by depth, bits per byte, a sample that any screen can show."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from ssm_moe import sharding
from ssm_moe.config import (
  DataConfig,
  ExperimentConfig,
  MambaConfig,
  MeshConfig,
  ModelConfig,
  MoEConfig,
  RoMConfig,
  SampleConfig,
  TrainConfig,
)
from ssm_moe.data.evaluation import EvalBatches
from ssm_moe.data.pipeline import TrainBatches
from ssm_moe.data.tokenizer import ByteTokenizer
from ssm_moe.layers.router import RoutingAux
from ssm_moe.training import report
from ssm_moe.training.step import EvalSums

_PERIODS = 3
_ROUTED = ModelConfig(
  pattern='M E',
  num_periods=_PERIODS,
  mamba=MambaConfig(rom=RoMConfig(kind='shared', num_experts=2)),
  moe=MoEConfig(num_experts=4),
)
_NAMES = ['00 mamba', '01 moe', '02 mamba', '03 moe', '04 mamba', '05 moe']


def _loads(scale=1.0):
  """Stacked over periods; the first expert of the layer at depth d gets d / 10 of the tokens."""

  def load(depth, experts):
    first = depth / 10
    return [first] + [(1 - first) / (experts - 1)] * (experts - 1)

  return {
    # Against the order of depth, which must not come from the dictionary.
    'moe_1': scale * np.array([load(2 * p + 1, 4) for p in range(_PERIODS)]),
    'mamba_0': scale * np.array([load(2 * p, 2) for p in range(_PERIODS)]),
  }


def test_layers_are_in_the_order_of_depth():
  aux = {
    name: RoutingAux(
      load_balancing_loss=10 * load[:, 0],
      router_z_loss=load[:, 0],
      expert_load=load,
      router_entropy=20 * load[:, 0],
      dropped_fraction=load[:, 0],
      fallback_fraction=load[:, 0],
    )
    for name, load in _loads().items()
  }
  routing = report.Routing.from_aux(aux, _ROUTED)
  assert routing.names == _NAMES
  assert [len(load) for load in routing.expert_load] == [2, 4] * _PERIODS
  assert [load[0] for load in routing.expert_load] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
  row = routing.row()
  np.testing.assert_allclose(row['dropped_fraction'], [0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
  np.testing.assert_allclose(row['load_balancing_loss'], [0, 1, 2, 3, 4, 5])
  np.testing.assert_allclose(row['router_entropy'], [0, 2, 4, 6, 8, 10])
  assert row['dead_experts'] == [1, 0, 0, 0, 0, 0]
  # E max(p) - 1: with 2 experts at 0.4 and 0.6, 0.2; with 4 at 0.5 and three times 1/6, 1.
  np.testing.assert_allclose(row['max_violation'][4:], [0.2, 1.0])
  assert set(row) >= {'expert_load_entropy'}
  assert routing.loads() == {'expert_load': routing.expert_load, 'layer_names': _NAMES}


def test_a_kind_that_is_not_routed_keeps_its_place_in_the_depth():
  dense_mamba = ModelConfig(pattern='M E', num_periods=_PERIODS, moe=MoEConfig(num_experts=4))
  loads = {'moe_1': _loads()['moe_1']}
  sums = EvalSums(nats=np.float32(1), scored=np.float32(1), tokens=np.float32(1), expert_load=loads)
  evaluation = report.Evaluation.from_sums(sums, dense_mamba, num_bytes=1)
  assert evaluation.names == ['01 moe', '03 moe', '05 moe']
  assert [load[0] for load in evaluation.expert_load] == [0.1, 0.3, 0.5]


def test_an_evaluation_is_a_mean_over_all_tokens():
  tokens = 200.0
  sums = EvalSums(
    nats=np.float32(300), scored=np.float32(150), tokens=np.float32(tokens), expert_load=_loads(200)
  )
  evaluation = report.Evaluation.from_sums(sums, _ROUTED, num_bytes=120)
  assert evaluation.loss == 2.0
  # 300 nats are 300 / ln 2 bits, over 120 bytes: 3.6067.
  assert evaluation.bits_per_byte == pytest.approx(3.606737602, rel=1e-9)
  assert evaluation.names == _NAMES
  np.testing.assert_allclose([sum(load) for load in evaluation.expert_load], np.ones(6))
  row = evaluation.row()
  assert (row['valid_loss'], row['valid_bits_per_byte']) == (2.0, evaluation.bits_per_byte)
  assert len(row['expert_load_entropy']) == 6


@pytest.mark.parametrize('num_bytes', [None, 0])
def test_without_text_there_are_no_bits_per_byte(num_bytes):
  sums = EvalSums(nats=np.float32(4), scored=np.float32(2), tokens=np.float32(2), expert_load={})
  evaluation = report.Evaluation.from_sums(sums, ModelConfig(), num_bytes=num_bytes)
  assert evaluation.bits_per_byte is None
  assert evaluation.row() == {'valid_loss': 2.0}


def test_figures_are_drawn_for_layers_of_different_sizes(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "tokens": 8, "train_loss": 2.0}\n')
  loads = [row for pair in zip(_loads()['mamba_0'], _loads()['moe_1']) for row in pair]
  evaluation = report.Evaluation(2.0, 3.0, _NAMES, loads)
  report.draw(tmp_path, _ROUTED, evaluation)
  for name in ('loss.png', 'expert_load.png'):
    assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')


def test_the_banner_names_what_will_be_trained(tmp_path):
  (tmp_path / 'text.txt').write_text('some words ' * 100)
  source = (str(tmp_path / 'text.txt'),)
  config = ExperimentConfig(
    model=ModelConfig(d_model=8, num_periods=1),
    data=DataConfig(train=source, valid=source),
    train=TrainConfig(num_steps=20, batch_size=8, sequence_length=16),
  )
  sizes = {'batch_size': 8, 'sequence_length': 16, 'vocab_size': 257, 'cache_dir': tmp_path}
  text = report.banner(
    config,
    sharding.make_mesh(MeshConfig()),
    tmp_path / 'run',
    TrainBatches(config.data, seed=0, **sizes),
    EvalBatches(config.data, **sizes),
    5,
    num_trained=64,
  )
  # 20 steps of 128 tokens, over the 1088 of 1101 tokens that fill windows: 2.35 epochs.
  for part in (
    'parameters',
    'active',
    'trained  64 of the ',
    'FLOPs per token',
    '5 done of 20',
    '2,560 tokens, 2.35 epochs',
    'devices  8 x',
    'data 8',
    'train    ',
    'valid    ',
    f'workdir  {tmp_path / "run"}',
  ):
    assert part in text, part


class TestSample:
  @pytest.fixture
  def written(self, monkeypatch):
    """Sets the tokens that the model writes."""

    def write(*tokens):
      def generate(params, prompt, key, *, config, num_tokens, temperature):
        del params, key, config, temperature
        self.prompt = np.asarray(prompt)
        assert num_tokens == 9
        return jnp.asarray([tokens])

      monkeypatch.setattr(report, 'generate', generate)
      config = ExperimentConfig(sample=SampleConfig(prompt='né', num_tokens=9))
      return report.sample(config, {}, ByteTokenizer())

    return write

  def test_the_prompt_follows_an_end_of_text(self, written):
    assert written(*b' xy') == 'né xy'
    assert self.prompt.tolist() == [[256, *'né'.encode()]]

  def test_ends_with_the_document(self, written):
    assert written(*b'ab', 256, *b'cd') == 'néab'

  def test_holds_no_control_sequences(self, written):
    assert written(*b'\x1b[31m\ta\nb\r\x00', 0xFF) == 'né\ufffd[31m\ta\nb\ufffd\ufffd\ufffd'

  @pytest.mark.parametrize(('encoding', 'shown'), [('ascii', 'n? ?'), ('latin-1', 'né ?')])
  def test_can_be_printed_whatever_the_encoding_of_the_terminal(
    self, written, monkeypatch, encoding, shown
  ):
    class Terminal:
      pass

    terminal = Terminal()
    terminal.encoding = encoding
    monkeypatch.setattr(report.sys, 'stdout', terminal)
    text = written(*' 語'.encode())
    monkeypatch.undo()
    assert text == shown

  def test_can_be_written_where_standard_output_is_closed(self, written, monkeypatch):
    with monkeypatch.context() as patch:
      patch.setattr(report.sys, 'stdout', None)
      text = written(*' 語'.encode())
    assert text == 'né 語'

  def test_nothing_to_write_is_none(self):
    without = ExperimentConfig(sample=SampleConfig(num_tokens=0))
    assert report.sample(without, {}, ByteTokenizer()) is None
    assert report.sample(ExperimentConfig(), {}, None) is None


def test_bits_and_nats_agree_with_the_uniform_model():
  # A uniform choice among 256 bytes costs ln 256 nats: 8 bits a byte.
  sums = EvalSums(
    nats=np.float64(50 * math.log(256)),
    scored=np.float64(50),
    tokens=np.float64(50),
    expert_load={},
  )
  evaluation = report.Evaluation.from_sums(sums, ModelConfig(), num_bytes=50)
  assert evaluation.bits_per_byte == pytest.approx(8.0, rel=1e-12)


def test_experts_without_tokens_are_named_once_until_they_change():
  alarm = report.ExpertAlarm()

  def lines(step, *loads):
    loads = [np.array(load) for load in loads]
    return alarm.lines(report.Evaluation(1.0, None, ['00 mamba', '01 moe'], loads), step)

  even, one, two = [0.25] * 4, [0.0, 0.4, 0.3, 0.3], [0.0, 0.5, 0.002, 0.498]
  assert lines(1, even, even) == []
  assert lines(2, even, one) == [
    'layer 01 moe: expert 0 gets less than 0.25 % of the assignments at step 2'
  ]
  assert lines(3, even, one) == []
  assert lines(4, one, two) == [
    'layer 00 mamba: expert 0 gets less than 0.25 % of the assignments at step 4',
    'layer 01 moe: experts 0, 2 get less than 0.25 % of the assignments at step 4',
  ]
  assert lines(5, one, even) == ['layer 01 moe: every expert gets its tokens again at step 5']
  # 1/100 of an even share is just enough.
  assert lines(6, one, [0.0025, 0.3325, 0.3325, 0.3325]) == []
  many = np.eye(1, 16)[0]
  assert lines(7, one, many)[0].startswith(
    'layer 01 moe: experts 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 5'
  )
