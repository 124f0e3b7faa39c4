"""What the flags of convert.py ask for, and how a mistake in them is answered."""

import dataclasses

import pytest
from absl import flags
from absl.testing import flagsaver

from ssm_moe.config import (
  ExperimentConfig,
  LoRAConfig,
  MambaConfig,
  ModelConfig,
  MoEConfig,
  RoMConfig,
  TrainConfig,
)
from ssm_moe.errors import UserError
from ssm_moe.interop import upcycle, upcycle_flags

_COPIES = RoMConfig(kind='shared', weights='uniform')


@pytest.fixture(autouse=True)
def parsed():
  with flagsaver.flagsaver():
    flags.FLAGS.mark_as_parsed()
    yield


@pytest.fixture
def asked(monkeypatch):
  """Returns what a model is made into, in place of making it, with flags as given."""

  def ask(model=None, **given):
    calls = []

    def grow(config, params, routing, key, **options):
      calls.append((routing, options))
      return dataclasses.replace(config, d_model=64), params

    for name in ('to_rom', 'to_moe_mamba'):
      monkeypatch.setattr(upcycle, name, grow)
    experiment = ExperimentConfig(
      model=model or ModelConfig(),
      lora=LoRAConfig(rank=2),
      train=TrainConfig(initialize_from='runs/x', num_steps=7),
    )
    with flagsaver.as_parsed(**given):
      assert upcycle_flags.requested()
      experiment, *_ = upcycle_flags.upcycled(experiment, {})
    assert experiment.model.d_model == 64
    # Adapters are in the parameters, and where those came from is past.
    assert experiment.lora == LoRAConfig() and experiment.train == TrainConfig(num_steps=7)
    return calls[0]

  return ask


def test_defaults_are_what_preserves_the_function(asked):
  assert asked(upcycle='rom') == (_COPIES, {'layers': None, 'expert_noise': 0.0})
  assert asked(upcycle='moe_mamba') == (MoEConfig(num_experts=8), {'layers': None})


def test_flags_say_the_rest(asked):
  routing, options = asked(
    upcycle='rom',
    num_experts='4',
    top_k='2',
    projections='out,gate',
    layers='5,0:4:2',
    expert_noise='0.1',
    routing=['kind=independent', 'load_balancing_coefficient=0.01'],
  )
  assert routing == dataclasses.replace(
    _COPIES,
    kind='independent',
    weight_at='each',
    num_experts=4,
    top_k=2,
    expert_projections=('out', 'gate'),
    load_balancing_coefficient=0.01,
  )
  assert options == {'layers': [5, 0, 2], 'expert_noise': 0.1}
  routing, _ = asked(upcycle='moe_mamba', routing=['dispatch=dropless', 'd_ff=24'])
  assert routing == MoEConfig(num_experts=8, dispatch='dropless', d_ff=24)


def test_what_routes_already_is_gone_on_with(asked):
  rom = dataclasses.replace(_COPIES, num_experts=3, expert_projections=('out',))
  routed = ModelConfig(pattern='M m', mamba=MambaConfig(rom=rom))
  assert asked(routed, upcycle='rom')[0] == rom
  more = asked(routed, upcycle='rom', projections='conv')[0]
  assert more == dataclasses.replace(rom, expert_projections=('conv',))
  assert asked(ModelConfig(pattern='M E'), upcycle='moe_mamba')[0] == MoEConfig()


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'layers': '1'}, r'^--layers belongs to --upcycle, which is not given'),
    ({'upcycle': 'moe_mamba', 'projections': 'out'}, r'^--projections belongs to --upcycle=rom'),
    ({'upcycle': 'rom', 'layers': '1,b'}, r"^--layers: 'b' is no depth"),
    ({'upcycle': 'rom', 'layers': '1:9:0'}, r"^--layers: '1:9:0' is no depth"),
    ({'upcycle': 'rom', 'routing': ['kind']}, r'^--routing=kind: it must be NAME=VALUE'),
    ({'upcycle': 'rom', 'routing': ['kinds=1']}, r'^--upcycle=rom: routing.kinds does not exist'),
    ({'upcycle': 'rom', 'top_k': '9'}, r'^--upcycle=rom: routing.top_k is 9; .* num_experts, 8'),
    ({'upcycle': 'rom', 'layers': '7'}, r'^--upcycle=rom: layers has 7; .* 0, 1, 2, 3$'),
  ],
)
def test_a_mistake_is_one_line(given, message):
  with flagsaver.as_parsed(**given), pytest.raises(UserError, match=message) as caught:
    upcycle_flags.requested()
    upcycle_flags.upcycled(ExperimentConfig(), {})
  assert '\n' not in str(caught.value)
