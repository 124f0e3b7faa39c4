"""A mistake on the command line or in a config file is one line that says where, and status 2."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from ssm_moe import command_line

ROOT = pathlib.Path(__file__).parents[1]

# What the scripts do, without their work: no JAX, so each run takes a fraction of a second.
SCRIPT = """
import json
from ml_collections import config_flags
from ssm_moe import command_line, config, errors
_CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)

class Failed(errors.UserError):
  exit_status = 1

def main():
  values = config.to_dict(config.from_flag(_CONFIG.value))
  if values['train']['seed'] == 7:
    raise Failed('step 3: it\\nfailed')
  if values['train']['seed'] == 8:
    raise RuntimeError('a bug')
  if values['train']['seed'] == 9:
    raise OSError('a library raised this')
  if values['train']['seed'] == 10:
    open('/absent/file')
  if values['train']['seed'] == 11:
    with open('/dev/full', 'w') as file:
      file.write('x')
  print(json.dumps(values))

command_line.run(main)
"""
CONFIG = """
from ssm_moe import config as config_lib

def get_config({parameters}):
  config = config_lib.defaults()
  {statement}
  return config
"""


# A script that takes arguments besides flags.
ARGUMENTS = """
from absl import flags
from ssm_moe import command_line
_LOUD = flags.DEFINE_bool('loud', False, 'Shout.')

def main(names):
  print(' '.join(names).upper() if _LOUD.value else ' '.join(names))

command_line.run(main, arguments='NAME')
"""


# A script that writes a file at the end of its work, and one that cleans up what it began.
OUTPUT = """
from absl import flags
from ssm_moe import command_line
_OUTPUT = flags.DEFINE_string('output', None, 'There.')

def main():
  command_line.check_output('output', _OUTPUT.value)
  print('work')
  open(_OUTPUT.value, 'a').write('done')

command_line.run(main)
"""
WAITING = """
import time
from ssm_moe import command_line

def main():
  try:
    print('ready', flush=True)
    time.sleep(60)
  finally:
    print('clean')

command_line.run(main)
"""


class Runner:
  def __init__(self, folder):
    self.folder = folder
    (folder / 'script.py').write_text(SCRIPT)
    (folder / 'arguments.py').write_text(ARGUMENTS)
    (folder / 'output.py').write_text(OUTPUT)
    (folder / 'waiting.py').write_text(WAITING)
    self.write()

  def write(self, statement='pass', name='config.py', parameters=''):
    (self.folder / name).write_text(CONFIG.format(statement=statement, parameters=parameters))

  def __call__(self, *arguments, script='script.py', shell=None, **environment):
    """Runs a script; `shell` is a command line in which "$@" is it and its arguments."""
    return subprocess.run(
      [*(['bash', '-c', shell, ''] if shell else []), sys.executable, script, *arguments],
      cwd=self.folder,
      env=self.environment | environment,
      capture_output=True,
      text=True,
      timeout=60,
    )

  @property
  def environment(self):
    return os.environ | {'PYTHONPATH': str(ROOT), 'PYTHONDONTWRITEBYTECODE': '1'}

  def refusal(self, *arguments):
    """Returns the one line that the script answers with, without its name."""
    result = self(*arguments)
    lines = result.stderr.splitlines()
    assert (result.returncode, result.stdout, len(lines)) == (2, '', 1), result.stderr
    name, _, message = lines[0].partition(': ')
    assert name == 'script.py'
    return message


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return Runner(tmp_path_factory.mktemp('scripts'))


def test_overrides_reach_the_config(run):
  result = run(
    '--config=config.py',
    '--config.model.moe.top_k=4',
    "--config.data.train=('a', 'b')",
    '--noconfig.model.tie_embeddings',
    '--config.train.eval_tokens=5',
    '--config.optimizer.weight_decay',
    '0',
  )
  assert result.returncode == 0, result.stderr
  values = json.loads(result.stdout)
  assert values['model']['moe']['top_k'] == 4
  assert values['model']['tie_embeddings'] is False
  assert values['data']['train'] == ['a', 'b']
  assert values['train']['eval_tokens'] == 5
  assert values['optimizer']['weight_decay'] == 0.0


@pytest.mark.parametrize(
  ('arguments', 'parts'),
  [
    ([], ['--config is missing', 'experiments/configs/quickstart.py']),
    (['--config=absent.py'], ['--config=absent.py: there is no such file']),
    (['--config', 'absent.py'], ['--config=absent.py: there is no such file']),
    (['--config=.'], ['--config=.: a folder; it must be a file']),
    (['--config=config.py', '--config.model.d_modle=8'], ['config.model.d_modle', 'd_model']),
    (['--config=config.py', '--config.model.d_modle', '8'], ['config.model.d_modle', 'd_model']),
    (['--config=config.py', '--config.train.seed.x=1'], ['config.train.seed.x does not exist']),
    (
      ['--config=config.py', '--config.model.d_model=x'],
      ["config.model.d_model is 'x'; it must be of type int"],
    ),
    (['--config=config.py', '--config.model.d_model', '1.5'], ["config.model.d_model is '1.5'; "]),
    (
      ['--config=config.py', '--config.train.eval_tokens=x'],
      ["eval_tokens is 'x'; it must be of type int"],
    ),
    (
      ['--config=config.py', '--config.model.scan_periods=x'],
      ["scan_periods is 'x'; it must be of type bool"],
    ),
    (['--config=config.py', '--config.model.moe=3'], ["config.model.moe is '3'; it is a group"]),
    (['--config=config.py', '--config.model.dtype=int8'], ['config.model.dtype', 'bfloat16']),
    (
      ['--config=config.py', '--config.model.moe.top_k=64'],
      ['config.model.moe.top_k is 64', 'num_experts, 32'],
    ),
    (['--config=config.py', '--confg.seed=1'], ['confg.seed']),
    (['--config=config.py', 'extra'], ["unexpected argument 'extra'"]),
    (['--config=config.py:small'], ['--config=config.py has no rows; give it without a colon']),
  ],
  ids=lambda value: ' '.join(value) if value and value[0].startswith('--') else '',
)
def test_a_mistake_in_a_flag_is_one_line(run, arguments, parts):
  message = run.refusal(*arguments)
  for part in parts:
    assert part in message, message


@pytest.mark.parametrize(
  ('statement', 'message'),
  [
    ('config.model.d_model = oops', "NameError: name 'oops' is not defined"),
    ('1 / 0', 'ZeroDivisionError: division by zero'),
    ('int("x")', "ValueError: invalid literal for int() with base 10: 'x'"),
    ('{}["k"]', "KeyError: 'k'"),
    ('import absent_module', "ModuleNotFoundError: No module named 'absent_module'"),
    ('open("absent.txt")', 'FileNotFoundError'),
    ('config.model.d_model = "x"', "TypeError: Could not override field 'd_model'"),
    ('config_lib.ModelConfig(d_model=-1)', 'd_model is -1; it must be positive'),
    ('return (', 'SyntaxError'),
  ],
)
def test_a_config_file_that_raises_says_at_which_line(run, statement, message):
  run.write(statement, 'raises.py')
  found = run.refusal('--config=raises.py')
  assert found.startswith(f'raises.py:6: {message}'), found


def test_a_mistake_below_a_config_file_names_the_line_of_the_file(run):
  run.write('json.loads("[")', 'raises.py', parameters='json=__import__("json")')
  assert run.refusal('--config=raises.py', '--config.train.seed=1').startswith('raises.py:6: JSON')


@pytest.mark.parametrize(
  ('statement', 'parts'),
  [
    ('config.model.d_modle = 8', ['config.model.d_modle does not exist', 'd_model']),
    ('config.train.update(num_step=8)', ['config.train.num_step does not exist', 'num_steps']),
    ('config.model.moe.top_k = 64', ['config.model.moe.top_k is 64', 'num_experts, 32']),
  ],
)
def test_a_config_file_with_a_wrong_key_or_value_names_it(run, statement, parts):
  run.write(statement, 'wrong.py')
  message = run.refusal('--config=wrong.py')
  for part in parts:
    assert part in message, message


def test_a_file_that_is_no_config_is_named(run):
  (run.folder / 'other.py').write_text('x = 1\n')
  message = run.refusal('--config=other.py')
  assert message.startswith('--config=other.py: ') and 'get_config' in message


@pytest.mark.parametrize('override', [[], ['--config.train.seed=1']])
def test_a_config_file_that_returns_nothing_is_a_mistake_in_one_line(run, override):
  (run.folder / 'none.py').write_text('def get_config():\n  pass\n')
  assert 'get_config returns nothing' in run.refusal('--config=none.py', *override)


def test_a_parameter_of_the_config_file_follows_a_colon(run):
  run.write('config.model.d_model = int(size)', 'sized.py', parameters='size')
  assert json.loads(run('--config=sized.py:24').stdout)['model']['d_model'] == 24


def test_an_error_has_its_own_exit_status_and_is_still_one_line(run):
  result = run('--config=config.py', '--config.train.seed=7')
  assert (result.returncode, result.stderr) == (1, 'script.py: step 3: it failed\n')


@pytest.mark.parametrize(('seed', 'kind'), [(8, 'RuntimeError: a bug'), (9, 'OSError: a library')])
def test_what_is_no_mistake_of_the_user_keeps_its_traceback(run, seed, kind):
  result = run('--config=config.py', f'--config.train.seed={seed}')
  assert result.returncode == 1
  assert 'Traceback' in result.stderr and kind in result.stderr


@pytest.mark.parametrize(
  ('seed', 'message'),
  [(10, '/absent/file: No such file or directory'), (11, 'No space left on device')],
)
def test_what_the_system_refuses_is_one_line_and_status_1(run, seed, message):
  result = run('--config=config.py', f'--config.train.seed={seed}')
  assert (result.returncode, result.stderr) == (1, f'script.py: {message}\n')


@pytest.mark.parametrize(
  ('shell', 'status', 'stderr'),
  [
    ('"$@" >&-', 0, ''),
    ('"$@" >/dev/full', 1, 'script.py: No space left on device\n'),
    ('"$@" --help >/dev/full', 1, 'script.py: No space left on device\n'),
    ('"$@" --confg=1 2>&-', 2, ''),
    ('set -o pipefail; "$@" | true', 141, ''),
  ],
)
def test_output_that_goes_nowhere_is_no_traceback(run, shell, status, stderr):
  result = run('--config=config.py', shell=shell)
  assert (result.returncode, result.stderr.replace('standard output: ', '')) == (status, stderr)


@pytest.mark.parametrize(
  ('number', 'message'), [(signal.SIGINT, 'interrupted'), (signal.SIGTERM, 'terminated')]
)
def test_a_signal_is_one_line_after_cleaning_up(run, number, message):
  process = subprocess.Popen(
    [sys.executable, 'waiting.py'],
    cwd=run.folder,
    env=run.environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'ready\n'
  process.send_signal(number)
  stdout, stderr = process.communicate(timeout=60)
  assert (stdout, stderr) == ('clean\n', f'waiting.py: {message}\n')
  assert process.returncode == 128 + number


def test_an_output_file_is_tried_before_the_work(run, tmp_path):
  (tmp_path / 'file').write_text('mine ')
  for output in (tmp_path / 'file' / 'x', tmp_path, '/proc/x/y', '/dev/full/x'):
    result = run(f'--output={output}', script='output.py')
    assert (result.returncode, result.stdout) == (2, '')
    assert f'--output={output} cannot be written (' in result.stderr
    assert len(result.stderr.splitlines()) == 1
  for output, text in ((tmp_path / 'file', 'mine done'), (tmp_path / 'new' / 'x', 'done')):
    assert run(f'--output={output}', script='output.py').stdout == 'work\n'
    assert output.read_text() == text


@pytest.mark.parametrize('flag', ['--help', '-h', '--helpfull'])
def test_help_is_no_mistake_and_names_every_field(run, flag):
  result = run(flag)
  assert (result.returncode, result.stderr) == (0, '')
  fields = result.stdout.partition('Fields of the config')[2]
  for part in ('  config.model: vocab_size=257', " pattern='M'", '  config.model.mamba.rom: '):
    assert part in fields
  assert max(map(len, fields.splitlines())) <= 100
  result = run(flag, script='output.py')
  assert result.returncode == 0 and '--output' in result.stdout
  assert 'Fields of the config' not in result.stdout


def test_the_whole_traceback_can_be_had(run):
  run.write('oops', 'raises.py')
  result = run('--config=raises.py', SSM_MOE_TRACEBACK='1')
  assert result.returncode == 1
  assert 'Traceback' in result.stderr and 'in get_config' in result.stderr


def test_arguments_reach_a_script_that_takes_them_with_flags_anywhere(run):
  for order in (('a', '--loud', 'b=c'), ('--loud', 'a', 'b=c'), ('a', 'b=c', '--loud')):
    result = run(*order, script='arguments.py')
    assert (result.returncode, result.stdout) == (0, 'A B=C\n'), result.stderr
  result = run(script='arguments.py')
  message = 'arguments.py: no NAME is given; name at least one\n'
  assert (result.returncode, result.stdout, result.stderr) == (2, '', message)


def test_a_run_is_called_after_its_config_and_row():
  assert command_line.run_name('experiments/configs/quickstart.py') == 'quickstart'
  assert command_line.run_name('configs/moe_mamba/table4.py:experts_8') == 'table4_experts_8'
