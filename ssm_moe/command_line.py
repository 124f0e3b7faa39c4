"""Runs a script's main function so that a user's mistake is answered with one line.

absl and ml_collections answer a mistyped flag with tens of lines and status 1. Here a `UserError`,
a flag that does not parse, a config key that does not exist and whatever a config file raises are
one line on standard error and exit status 2; for a config file it says which line of it.
"""

import logging as python_logging
import os
import pathlib
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from absl import app, flags

from ssm_moe import config
from ssm_moe.errors import UserError


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
      rest = flags.FLAGS(argv)
    except Exception as error:
      # config_flags runs the config file and applies overrides while flags are parsed.
      _refuse(_in_config_file(error, argv[1:]) or _unwrapped(error, argv[1:]))
    if arguments is None and len(rest) > 1:
      _refuse(UserError(f'unexpected argument {rest[1]!r}; every option is a --flag'))
    if arguments is not None and len(rest) == 1:
      _refuse(UserError(f'no {arguments} is given; name at least one'))
    return rest

  def guarded(argv):
    try:
      main(*([argv[1:]] if arguments else []))
      sys.stdout.flush()
    except BrokenPipeError:
      # Whoever read the output, such as `head`, has seen enough. Python's own flush at exit would
      # fail once more.
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      sys.exit(128 + signal.SIGPIPE)
    except UserError as error:
      _refuse(error)
    except OSError as error:
      # config_flags keeps what opening a file met until the config is first looked at.
      mistake = _in_config_file(error, sys.argv[1:])
      if mistake is None:
        raise
      _refuse(mistake)

  # On a machine without a TPU, jax tells every user so, at level INFO.
  python_logging.getLogger('jax._src.xla_bridge').setLevel(python_logging.WARNING)
  app.run(guarded, flags_parser=parse)


def run_name(config_flag: str) -> str:
  """Returns what a run is called after: the name of the config's file, and its row if it has."""
  file, _, row = config_flag.partition(':')
  return '_'.join(part for part in (pathlib.Path(file).stem, row) if part)


def _config_files(arguments: list[str]) -> Iterator[str]:
  """Yields what --config is set to, without the parameter that may follow a colon."""
  for i, argument in enumerate(arguments):
    name, equals, value = argument.partition('=')
    if name in ('-config', '--config') and (equals or i + 1 < len(arguments)):
      yield (value if equals else arguments[i + 1]).partition(':')[0]


def _check_config_flags(arguments: list[str]) -> None:
  """Checks names before config_flags does, whose answers name neither the file nor the choices."""
  for file in _config_files(arguments):
    if not os.path.isfile(file):
      raise UserError(f'--config={file}: there is no such file')
  for argument in arguments:
    name = argument.lstrip('-').partition('=')[0]
    if argument.startswith('-') and name.startswith('config.'):
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
  # Where it does wrap an error, it puts the traceback into the message.
  plain = isinstance(error, UserError | flags.Error) and '\n' not in str(error)
  files = list(_config_files(arguments))
  if plain or not files:
    return error
  return UserError(f'--config={files[-1]}: {_describe(_causes(error)[0])}')


def _causes(error: BaseException) -> list[BaseException]:
  """Returns the errors that led to `error`, the first one first."""
  chain = [error]
  while cause := chain[-1].__cause__ or chain[-1].__context__:
    chain.append(cause)
  return chain[::-1]


def _describe(error: BaseException) -> str:
  message = error.msg if isinstance(error, SyntaxError) else str(error)
  return f'{type(error).__name__}: {message}' if message else type(error).__name__


def _refuse(error: Exception) -> None:
  """Prints the error as one line and exits with its status."""
  if os.environ.get('SSM_MOE_TRACEBACK') == '1':
    raise error
  message = ' '.join(str(error.args[0] if error.args else error).split())
  name = os.path.basename(sys.argv[0])
  print(f'{name}: {message or type(error).__name__}', file=sys.stderr)
  sys.stderr.flush()
  sys.exit(getattr(error, 'exit_status', UserError.exit_status))
