"""Runs a script's main function so that a user's mistake is answered with one line.

absl and ml_collections answer a mistyped flag with tens of lines and status 1. Here a `UserError`,
a flag that does not parse, a config key that does not exist and whatever a config file raises are
one line on standard error and exit status 2; for a config file it says which line of it. What the
operating system refuses, such as a full disk, is one line and status 1; Ctrl-C and SIGTERM are one
line and 128 and the signal's number, after what was half done has been cleaned up.
"""

import contextlib
import logging as python_logging
import os
import pathlib
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from absl import app, flags
from absl import logging as absl_logging

from ssm_moe import config
from ssm_moe.errors import UserError


class _SystemError(UserError):
  """What the operating system refused."""

  exit_status = 1


class _Terminated(BaseException):
  """SIGTERM, raised so that `finally` and `with` clean up."""


def run(main: Callable[..., Any], *, arguments: str | None = None) -> None:
  """Parses the flags, runs `main` and exits.

  With SSM_MOE_TRACEBACK=1 in the environment a mistake shows its whole traceback.

  Args:
    main: Called without arguments, or with the list of those that are no flags.
    arguments: What these are, in the singular; at least one must be given. None refuses them.
  """

  def parse(argv):
    try:
      _check_config_flags(argv[1:])
      rest = flags.FLAGS(['--help' if argument == '-h' else argument for argument in argv])
    except SystemExit:  # absl has printed the help, and would exit with status 1
      print(_describe_fields() if 'config' in flags.FLAGS else '', end='', flush=True)
      sys.exit(0)
    except Exception as error:
      # config_flags runs the config file and applies overrides while flags are parsed.
      mistake = _in_config_file(error, argv[1:])
      if mistake is None and isinstance(error, OSError):
        raise
      _refuse(mistake or _unwrapped(error, argv[1:]))
    if arguments is None and len(rest) > 1:
      _refuse(UserError(f'unexpected argument {rest[1]!r}; every option is a --flag'))
    if arguments is not None and len(rest) == 1:
      _refuse(UserError(f'no {arguments} is given; name at least one'))
    return rest

  def call(argv):
    main(*([argv[1:]] if arguments else []))
    sys.stdout.flush()

  _prepare()
  try:
    app.run(call, flags_parser=parse)
  except BrokenPipeError:
    # Whoever read the output, such as `head`, has seen enough.
    _discard_output()
    sys.exit(128 + signal.SIGPIPE)
  except UserError as error:
    _refuse(error)
  except OSError as error:
    # config_flags keeps what opening a file met until the config is first looked at.
    mistake = _in_config_file(error, sys.argv[1:]) or _refused_by_system(error)
    if mistake is None:
      raise
    _refuse(mistake)
  except KeyboardInterrupt:
    _end('interrupted', signal.SIGINT)
  except _Terminated:
    _end('terminated', signal.SIGTERM)


def _prepare() -> None:
  # Python has None for a stream that was closed before the start, which few callers expect.
  sys.stdout = sys.stdout or open(os.devnull, 'w')  # noqa: SIM115
  sys.stderr = sys.stderr or open(os.devnull, 'w')  # noqa: SIM115
  signal.signal(signal.SIGTERM, _terminate)
  # On a machine without a TPU, jax tells every user so, at level INFO; and how processes meet.
  for name in ('xla_bridge', 'distributed'):
    python_logging.getLogger(f'jax._src.{name}').setLevel(python_logging.WARNING)
  # config_flags warns of a get_config that returns nothing; here that is a mistake with its line.
  absl_logging.get_absl_logger().addFilter(lambda record: record.module != 'config_flags')


def _terminate(*_) -> None:
  raise _Terminated


@contextlib.contextmanager
def loading() -> Iterator[None]:
  """While large modules are imported, Ctrl-C and SIGTERM end the script at once, in one line.

  There is nothing to clean up yet, and an exception that comes up in the import of a native module
  crashes some of them and is swallowed by others.
  """

  def end(number: int, _) -> None:
    what = 'interrupted' if number == signal.SIGINT else 'terminated'
    os.write(2, f'{os.path.basename(sys.argv[0])}: {what}\n'.encode())
    os._exit(128 + number)

  former = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield
  finally:
    for number, handler in former.items():
      # None stands for a handler that was not installed from Python; it cannot be put back.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)


def check_output(flag: str, path: str | os.PathLike) -> None:
  """Checks that a file can be written, before the work that makes its contents.

  Args:
    flag: Where `path` was given, for the message.
    path: The file; the folders above it are made.

  Raises:
    UserError: it cannot.
  """
  path = pathlib.Path(path)
  existed = path.exists()
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'ab'):
      pass
    if not existed:
      path.unlink()
  except OSError as error:
    raise UserError(f'--{flag}={path} cannot be written ({error.strerror})') from None


def check_new_output(flag: str, path: str | os.PathLike) -> None:
  """Checks the same of a file that must not be there yet, so that none is written over."""
  if not os.fspath(path):
    raise UserError(f'--{flag}= has no file name')
  if os.path.lexists(path):
    raise UserError(f'--{flag}={path} is there already; give another name')
  check_output(flag, path)


def run_name(config_flag: str) -> str:
  """Returns what a run is called after: the name of the config's file, and its row if it has."""
  file, _, row = config_flag.partition(':')
  return '_'.join(part for part in (pathlib.Path(file).stem, row) if part)


def _options(arguments: list[str]) -> Iterator[tuple[str, str]]:
  """Yields the name of each flag and its value, which may be the argument after it."""
  for argument, following in zip(arguments, [*arguments[1:], '']):
    name, equals, value = argument.partition('=')
    if argument.startswith('-'):
      yield name.lstrip('-'), value if equals else following


def _config_files(arguments: list[str]) -> list[str]:
  """Returns what --config is set to, without the parameter that may follow a colon."""
  return [value.partition(':')[0] for name, value in _options(arguments) if name == 'config']


def _check_config_flags(arguments: list[str]) -> None:
  """Checks names before config_flags does, whose answers name neither the file nor the choices."""
  for file in _config_files(arguments):
    if os.path.isdir(file):
      raise UserError(f'--config={file}: a folder; it must be a file')
    if not os.path.isfile(file):
      raise UserError(f'--config={file}: there is no such file')
  for name, _ in _options(arguments):
    if name.startswith('config.'):
      config.check_key(name, name.removeprefix('config.'))


def _in_config_file(error: Exception, arguments: list[str]) -> UserError | None:
  """Returns what a config file raised, and at which line; None if `error` is not from there."""
  files = list(_config_files(arguments))
  for cause in _causes(error):
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(cause.__traceback__)]
    if isinstance(cause, SyntaxError):
      places.append((cause.filename, cause.lineno))
    for file, line in reversed(places):
      if file in files:
        return UserError(f'{file}:{line}: {_describe(cause)}')
  return None


def _unwrapped(error: Exception, arguments: list[str]) -> Exception:
  """Returns `error`, or what config_flags met when it loaded the file and did not say plainly."""
  if isinstance(error, flags.IllegalFlagValueError):
    for name, value in _options(arguments):
      if name.startswith('config.') and str(error).startswith(f'flag --{name}={value}: '):
        try:
          config.check_value(name, value)
        except UserError as plainer:
          return plainer
  # Where it does wrap an error, it puts the traceback into the message.
  plain = isinstance(error, UserError | flags.Error) and '\n' not in str(error)
  files = _config_files(arguments)
  if plain or not files:
    return error
  cause = _causes(error)[0]
  if isinstance(cause, AttributeError) and str(cause).endswith("no attribute 'get_config'"):
    return UserError(f'--config={files[-1]}: it must define get_config, which returns the config')
  if isinstance(cause, KeyError) and 'NoneType' in str(cause):
    return UserError(f'--config={files[-1]}: its get_config returns nothing')
  if isinstance(cause, TypeError) and 'get_config() takes 0 positional' in str(cause):
    return UserError(f'--config={files[-1]} has no rows; give it without a colon')
  return UserError(f'--config={files[-1]}: {_describe(cause)}')


def _causes(error: BaseException) -> list[BaseException]:
  """Returns the errors that led to `error`, the first one first."""
  chain = [error]
  while cause := chain[-1].__cause__ or chain[-1].__context__:
    chain.append(cause)
  return chain[::-1]


def _describe(error: BaseException) -> str:
  if isinstance(error, UserError):
    return str(error)
  message = error.msg if isinstance(error, SyntaxError) else str(error)
  return f'{type(error).__name__}: {message}' if message else type(error).__name__


def _refused_by_system(error: OSError) -> UserError | None:
  """Returns one line about what the operating system refused; None for a library's own error."""
  if error.errno is None:
    return None
  name = None if isinstance(error.filename, int) else error.filename
  try:
    sys.stdout.flush()
  except OSError:
    name = name or 'standard output'
    _discard_output()
  return _SystemError(f'{os.fsdecode(name)}: {error.strerror}' if name else error.strerror)


def _discard_output() -> None:
  # Python flushes once more at exit, which would fail again.
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _describe_fields() -> str:
  """Returns every field of the config with its default, a group of fields a paragraph."""
  lines = [
    'Fields of the config, each as --config.GROUP.FIELD=VALUE or in the file, and their defaults;',
    'ssm_moe/config/*.py say what they mean:',
  ]

  def add(path, values):
    groups = {name: value for name, value in values.items() if isinstance(value, dict)}
    fields = [f'{name}={value!r}' for name, value in values.items() if name not in groups]
    if fields:
      text = f'{path}: {" ".join(fields)}'
      lines.extend(
        textwrap.wrap(
          text,
          width=100,
          initial_indent='  ',
          subsequent_indent='      ',
          break_long_words=False,
          break_on_hyphens=False,
        )
      )
    for name, group in groups.items():
      add(f'{path}.{name}', group)

  add('config', config.to_dict(config.ExperimentConfig()))
  return '\n'.join(lines) + '\n'


def _end(what: str, number: signal.Signals) -> None:
  """Says in one line that a signal ended the script, and exits as the shell expects."""
  print(f'{os.path.basename(sys.argv[0])}: {what}', file=sys.stderr, flush=True)
  # What was half done is cleaned up. At once, because a compilation may run on in a thread of
  # XLA's, which would end in a segmentation fault when Python takes down what it works on.
  os._exit(128 + number)


def _refuse(error: Exception) -> None:
  """Prints the error as one line and exits with its status."""
  if os.environ.get('SSM_MOE_TRACEBACK') == '1':
    raise error
  message = ' '.join(str(error.args[0] if error.args else error).split())
  name = os.path.basename(sys.argv[0])
  print(f'{name}: {message or type(error).__name__}', file=sys.stderr)
  sys.stderr.flush()
  sys.exit(getattr(error, 'exit_status', UserError.exit_status))
