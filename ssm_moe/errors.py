"""The one exception for mistakes that a user can cause and mend."""


class UserError(ValueError):
  """A mistake in what the user gave: a config, a file, a flag.

  The message is one line that names the thing and says what is allowed. Scripts print it on
  standard error and exit with `exit_status` (`ssm_moe/command_line.py`).
  """

  exit_status = 2
