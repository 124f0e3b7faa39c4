"""A checkpoint is whole or absent, what is restored is what was saved, and damage is never used."""

import hashlib
import json
import logging as python_logging
import random
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from ssm_moe.errors import UserError
from ssm_moe.training import manifest as manifest_lib
from tests.training.small_state import CONFIG, make, save_steps, small_state, template_of


def bits(tree):
  """The tree as integers, so that NaNs and the sign of zero are compared too."""

  def leaf_bits(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    return np.frombuffer(np.asarray(leaf).tobytes(), np.uint8)

  return jax.tree.map(leaf_bits, tree)


def snapshot(directory):
  """Every path below `directory`, and what is in it."""
  return {
    path.relative_to(directory): path.read_bytes() if path.is_file() else None
    for path in directory.rglob('*')
  }


class TestRoundTrip:
  def test_every_kind_of_leaf_comes_back_bit_for_bit(self, tmp_path, rng):
    params = {'scan/0': jax.random.normal(rng, (5, 7)), 'b.c': jnp.float32([-0.0, np.nan, np.inf])}
    nan_with_payload = np.array([0x7FC1, 0xFF81, 0x8000, 1], np.uint16).view(jnp.bfloat16)
    state = {
      'params': params,
      'optimizer': optax.adamw(1e-3).init(params),  # NamedTuples, an int32 scalar, empty nodes
      'carry': (None, jnp.asarray(nan_with_payload), jnp.zeros((0, 3), jnp.bfloat16)),
      'key': jax.random.key(7),
      'keys': jax.random.split(jax.random.key(8, impl='rbg'), 3),
      'mask': np.array([True, False]),
    }
    metadata = {'position': [1, 2], 'best_loss': None, 'seconds': 0.1, 'name': 'é'}
    with make(tmp_path / 'c') as checkpointer:
      checkpointer.save(12, state, metadata=metadata, valid_loss=1.5)
      device = SingleDeviceSharding(jax.devices()[0])
      restored = checkpointer.restore(template_of(state, device))
    chex.assert_trees_all_equal_structs(restored.state, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored.state, state)
    chex.assert_trees_all_equal(bits(restored.state), bits(state))
    assert (restored.step, restored.metadata, restored.skipped) == (12, metadata, [])

  def test_part_of_a_state_can_be_restored(self, tmp_path):
    state = small_state(3)
    template = {'params': template_of(state)['params']}
    with make(tmp_path) as checkpointer:
      save_steps(checkpointer, [3])
      restored = checkpointer.restore(template, partial=True)
      with pytest.raises(UserError, match='step is int32'):
        checkpointer.restore(template)
    chex.assert_trees_all_equal(restored.state, {'params': state['params']})

  def test_step_0_has_a_template_of_its_own_also_as_the_last_resort(self, tmp_path):
    params = {'params': small_state()['params']}
    whole = template_of(small_state())
    with make(tmp_path) as checkpointer:
      checkpointer.save(0, params, metadata={})
      save_steps(checkpointer, [3])
      assert checkpointer.restore(whole, first=template_of(params)).step == 3
      shutil.rmtree(tmp_path / '00000003' / 'state')
      restored = checkpointer.restore(whole, first=template_of(params))
    assert restored.step == 0 and len(restored.skipped) == 1
    chex.assert_trees_all_equal(restored.state, params)

  def test_restores_on_other_meshes(self, tmp_path, rng):
    def sharding(devices, spec):
      mesh = jax.make_mesh(
        (devices,), ('x',), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
      )
      return NamedSharding(mesh, spec)

    values = {'matrix': jax.random.normal(rng, (8, 16)), 'scalar': jnp.int32(5)}
    before = bits(values)
    specs = [PartitionSpec('x'), PartitionSpec(None, 'x'), PartitionSpec(), PartitionSpec('x')]
    state = values
    for step, (devices, spec) in enumerate(zip([8, 4, 1, 8], specs, strict=True)):
      shardings = {'matrix': sharding(devices, spec), 'scalar': sharding(devices, PartitionSpec())}
      if step == 0:
        state = jax.device_put(values, shardings)
      else:
        template = jax.tree.map(
          lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), values, shardings
        )
        with make(tmp_path) as checkpointer:
          state = checkpointer.restore(template).state
      chex.assert_trees_all_equal(bits(state), before)
      assert jax.tree.map(lambda x: x.sharding, state) == shardings
      with make(tmp_path) as checkpointer:
        checkpointer.save(step, state, metadata={})

  def test_arrays_may_be_donated_as_soon_as_save_returns(self, tmp_path):
    bump = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)
    device = SingleDeviceSharding(jax.devices()[0])
    state = jax.device_put([jnp.zeros(2**20) + i for i in range(8)], device)
    with make(tmp_path) as checkpointer:
      for step in range(3):
        checkpointer.save(step, state, metadata={})
        for _ in range(3):
          state = bump(state)
        restored = checkpointer.restore(template_of(state))
        expected = [np.full(2**20, 3 * step + i, np.float32) for i in range(8)]
        chex.assert_trees_all_equal(jax.device_get(restored.state), expected)

  def test_metadata_is_taken_when_save_is_called(self, tmp_path):
    metadata = {'tokens': 1}
    with make(tmp_path) as checkpointer:
      checkpointer.save(1, small_state(), metadata=metadata)
      metadata['tokens'] = 2
      assert checkpointer.restore(template_of(small_state())).metadata == {'tokens': 1}

  def test_nothing_saved_is_none(self, tmp_path):
    with make(tmp_path / 'absent') as checkpointer:
      assert checkpointer.restore(template_of(small_state())) is None
      assert checkpointer.latest_step() is None
    assert not (tmp_path / 'absent').exists()

  def test_metadata_that_json_cannot_hold_is_refused_before_anything_is_written(self, tmp_path):
    with make(tmp_path) as checkpointer:
      with pytest.raises(ValueError, match='JSON'):
        checkpointer.save(1, small_state(), metadata={'loss': float('nan')})
      assert not list(tmp_path.iterdir())

  def test_a_step_saved_again_takes_the_new_metadata(self, tmp_path):
    with make(tmp_path, keep_last=1) as checkpointer:
      save_steps(checkpointer, [1])
      checkpointer.save(1, small_state(1), metadata={'tokens': 7}, valid_loss=0.5)
      save_steps(checkpointer, [2])
      assert checkpointer.steps() == [1, 2]  # 1 is the best now
      shutil.rmtree(tmp_path / '00000002')
      assert checkpointer.restore(template_of(small_state())).metadata == {'tokens': 7}


@pytest.mark.parametrize(
  ('losses', 'kept'),
  [
    (None, [4, 5]),
    ([3.0, 1.0, 2.0, 5.0, 4.0], [2, 4, 5]),
    ([1.0, 1.0, None, float('nan'), 2.0], [2, 4, 5]),
    ([5.0, 4.0, 3.0, 2.0, 1.0], [4, 5]),
  ],
)
def test_keeps_the_last_and_the_best(tmp_path, losses, kept):
  with make(tmp_path, keep_last=2) as checkpointer:
    save_steps(checkpointer, [1, 2, 3, 4, 5], losses)
    assert checkpointer.steps() == kept
    assert checkpointer.latest_step() == 5
  assert sorted(int(path.name) for path in tmp_path.iterdir()) == kept


class TestDamage:
  @pytest.fixture
  def two(self, tmp_path):
    with make(tmp_path) as checkpointer:
      save_steps(checkpointer, [1, 2])
      yield checkpointer, tmp_path

  def test_any_flip_truncation_or_loss_in_any_file_falls_back(self, two):
    checkpointer, directory = two
    chance = random.Random(0)
    paths = sorted(path for path in (directory / '00000002').rglob('*') if path.is_file())
    assert len(paths) > 5
    assert checkpointer.restore(template_of(small_state())).step == 2
    for path in paths:
      whole = path.read_bytes()
      damages = [None, whole[: chance.randrange(len(whole))], whole[:-1], whole + b'\n']
      for _ in range(3):
        flipped = bytearray(whole)
        flipped[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        damages.append(bytes(flipped))
      for damage in damages:
        path.unlink()
        if damage is not None:
          path.write_bytes(damage)
        restored = checkpointer.restore(template_of(small_state()))
        assert restored.step == 1, (path, damage)
        chex.assert_trees_all_equal(restored.state, small_state(1))
        (reason,) = restored.skipped
        assert reason.startswith('00000002: ') and path.name in reason and '\n' not in reason
        if damage is None or len(damage) != len(whole):
          with make(directory) as reader:  # which has restored nothing: seen without checksums
            assert reader.steps() == [1]
        path.write_bytes(whole)

  def test_none_good_names_the_folder_and_every_reason(self, two):
    checkpointer, directory = two
    (directory / '00000001' / 'MANIFEST.json').write_text('{}')
    next((directory / '00000002' / 'state').glob('d/*')).unlink()
    with pytest.raises(UserError) as error:
      checkpointer.restore(template_of(small_state()))
    message = str(error.value)
    assert str(directory) in message and '\n' not in message
    assert '00000001: MANIFEST.json' in message and '00000002: state/d/' in message

  def test_a_damaged_one_takes_no_place_of_a_good_one(self, tmp_path):
    with make(tmp_path, keep_last=1) as checkpointer:
      save_steps(checkpointer, [5, 9], [1.0, 2.0])
      path = next((tmp_path / '00000009' / 'state').glob('d/*'))
      path.write_bytes(path.read_bytes()[:-1] + b'?')  # same size: only the checksum tells
    with make(tmp_path, keep_last=1) as checkpointer:
      before = snapshot(tmp_path)
      restored = checkpointer.restore(template_of(small_state()))
      assert (restored.step, len(restored.skipped)) == (5, 1)
      assert checkpointer.steps() == [5]
      assert snapshot(tmp_path) == before
      save_steps(checkpointer, [7])
      assert checkpointer.steps() == [5, 7]
      assert checkpointer.restore(template_of(small_state())).step == 7
      save_steps(checkpointer, [9])
      assert checkpointer.restore(template_of(small_state())).step == 9
    assert (tmp_path / '00000009.damaged').is_dir()

  def test_a_folder_under_another_step_is_not_used(self, two):
    checkpointer, directory = two
    (directory / '00000002').rename(directory / '00000003')
    restored = checkpointer.restore(template_of(small_state()))
    assert (restored.step, restored.skipped) == (1, ['00000003: holds step 2'])

  def test_what_orbax_cannot_read_falls_back_though_its_checksums_are_right(self, two):
    checkpointer, directory = two
    folder = directory / '00000002'
    (folder / 'state' / 'manifest.ocdbt').unlink()
    manifest = manifest_lib.read(folder)
    (folder / 'MANIFEST.json').unlink()
    manifest_lib.write(folder, manifest | {'files': manifest_lib.list_files(folder)})
    assert checkpointer.steps() == [1, 2]
    restored = checkpointer.restore(template_of(small_state()))
    assert restored.step == 1
    assert restored.skipped[0].startswith('00000002: Orbax cannot read it: ')
    assert '\n' not in restored.skipped[0]


class TestRefusal:
  @pytest.mark.parametrize('name', ['lr[3]', 'what?', 'a*b'])
  def test_a_path_with_a_wildcard_is_refused(self, tmp_path, name):
    with pytest.raises(UserError, match='need a path without') as error:
      make(tmp_path / name / 'checkpoints')
    assert name in str(error.value) and '\n' not in str(error.value)
    assert list(tmp_path.iterdir()) == []

  @pytest.mark.parametrize(
    ('change', 'message'),
    [
      ({'d_model': 256}, 'model.d_model is 128 in the checkpoint and 256 now'),
      ({'mamba': {'rom': {'kind': 'shared'}}}, "model.mamba.rom.kind is 'none' in .* 'shared' now"),
      ({'unheard_of': 1}, 'model.unheard_of is absent in the checkpoint and 1 now'),
    ],
  )
  def test_another_config_is_refused_and_nothing_touched(self, tmp_path, change, message):
    with make(tmp_path) as checkpointer:
      save_steps(checkpointer, [1])
    before = snapshot(tmp_path)
    model = json.loads(json.dumps(CONFIG['model']))
    for key, value in change.items():
      model[key] = model[key] | value if isinstance(value, dict) else value
    with (
      make(tmp_path, config=CONFIG | {'model': model}) as checkpointer,
      pytest.raises(UserError, match=message) as error,
    ):
      checkpointer.restore(template_of(small_state()))
    assert '\n' not in str(error.value) and str(tmp_path) in str(error.value)
    assert snapshot(tmp_path) == before

  @pytest.mark.parametrize(
    ('change', 'message'),
    [
      (lambda s: s | {'step': jnp.float32(0)}, r'step is int32\[\] in .* float32\[\] now'),
      (lambda s: s | {'params': {'kernel': jnp.zeros((3, 5))}}, r'params/kernel is .*\[3, 5\] now'),
      (lambda s: s | {'more': jnp.zeros(2)}, r'more is absent in the checkpoint'),
      (lambda s: {'step': s['step']}, r'params/kernel is float32\[3, 4\] .* absent now'),
    ],
  )
  def test_another_tree_is_refused_and_nothing_touched(self, tmp_path, change, message):
    with make(tmp_path) as checkpointer:
      save_steps(checkpointer, [1])
      before = snapshot(tmp_path)
      template = template_of(change(small_state()), SingleDeviceSharding(jax.devices()[0]))
      with pytest.raises(UserError, match=message) as error:
        checkpointer.restore(template)
    assert '\n' not in str(error.value)
    assert snapshot(tmp_path) == before

  def test_fields_of_execution_and_of_training_may_change(self, tmp_path):
    with make(tmp_path) as checkpointer:
      save_steps(checkpointer, [1])
    config = CONFIG | {
      'model': CONFIG['model'] | {'remat': 'period'},
      'train': CONFIG['train'] | {'num_steps': 7},
    }
    with make(tmp_path, config=config) as checkpointer:
      assert checkpointer.restore(template_of(small_state())).step == 1

  def test_a_field_younger_than_the_checkpoint_has_its_default(self, tmp_path):
    old = {key: value for key, value in CONFIG['model'].items() if key != 'final_norm'}
    old['mamba'] = {key: value for key, value in old['mamba'].items() if key != 'd_conv'}
    with make(tmp_path, config=CONFIG | {'model': old}) as checkpointer:
      save_steps(checkpointer, [1])
    with make(tmp_path) as checkpointer:
      assert checkpointer.restore(template_of(small_state())).step == 1
    changed = CONFIG | {'model': CONFIG['model'] | {'final_norm': False}}
    with (
      make(tmp_path, config=changed) as checkpointer,
      pytest.raises(UserError, match='final_norm is True in the checkpoint and False now'),
    ):
      checkpointer.restore(template_of(small_state()))

  def test_a_newer_schema_is_refused(self, tmp_path):
    with make(tmp_path) as checkpointer:
      save_steps(checkpointer, [1, 2])
      manifest = manifest_lib.read(tmp_path / '00000002')
      manifest_lib.write(tmp_path / '00000002', manifest | {'schema_version': 99})
      with pytest.raises(UserError, match=r'newer ssm_moe wrote it \(schema 99\)') as error:
        checkpointer.restore(template_of(small_state()))
    assert '\n' not in str(error.value)


def test_orbax_does_not_talk_over_the_progress_bar(tmp_path):
  records = []

  class Recorder(python_logging.Handler):
    def emit(self, record):
      records.append(record)

  handler, verbosity = Recorder(), logging.get_verbosity()
  logging.set_verbosity(logging.INFO)
  logging.get_absl_logger().addHandler(handler)
  try:
    with make(tmp_path) as checkpointer:
      save_steps(checkpointer, [1])
    logging.info('ours')
  finally:
    logging.set_verbosity(verbosity)
    logging.get_absl_logger().removeHandler(handler)
  assert [record.getMessage() for record in records] == ['ours']


def test_the_manifest_lists_every_file_with_its_checksum(tmp_path):
  with make(tmp_path) as checkpointer:
    save_steps(checkpointer, [1])
  folder = tmp_path / '00000001'
  files = json.loads((folder / 'MANIFEST.json').read_text())['files']
  expected = {
    path.relative_to(folder).as_posix(): {
      'bytes': path.stat().st_size,
      'sha256': hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    for path in folder.rglob('*')
    if path.is_file() and path.name != 'MANIFEST.json'
  }
  assert files == expected
