"""Runs a script's main function so that a user's mistake is answered with one line.

absl and ml_collections answer a mistyped flag with tens of lines and status 1. Here a `UserError`,
a flag that does not parse, and a config key that does not exist are one line on standard error and
exit status 2.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags

from ssm_moe import config
from ssm_moe.errors import UserError


def run(main: Callable[[], Any]) -> None:
  """Parses the flags, runs `main` and exits.

  With SSM_MOE_TRACEBACK=1 in the environment a mistake shows its whole traceback.
  """

  def parse(argv):
    try:
      _check_config_flags(argv[1:])
      rest = flags.FLAGS(argv)
    except flags.Error as error:
      _refuse(error)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      # config_flags reads the config file and applies overrides while flags are parsed.
      _refuse(error)
    if len(rest) > 1:
      _refuse(UserError(f'unexpected argument {rest[1]!r}; every option is a --flag'))
    return rest

  def guarded(argv):
    del argv
    try:
      main()
    except UserError as error:
      _refuse(error)

  app.run(guarded, flags_parser=parse)


def _check_config_flags(arguments: list[str]) -> None:
  """Checks names before config_flags does, whose answers name neither the file nor the choices."""
  for argument in arguments:
    name, equals, value = argument.lstrip('-').partition('=')
    if name.startswith('config.'):
      config.check_key(name, name.removeprefix('config.'))
    elif name == 'config' and equals:
      file = value.partition(':')[0]  # a parameter of the config file may follow
      if not os.path.isfile(file):
        raise UserError(f'--config={file}: there is no such file')


def _refuse(error: Exception) -> None:
  """Prints the error as one line and exits with its status."""
  if os.environ.get('SSM_MOE_TRACEBACK') == '1':
    raise error
  message = ' '.join(str(error.args[0] if error.args else error).split())
  name = os.path.basename(sys.argv[0])
  print(f'{name}: {message or type(error).__name__}', file=sys.stderr)
  sys.stderr.flush()
  sys.exit(getattr(error, 'exit_status', UserError.exit_status))
