"""One plain line of a process that ends before it can say why.

A process that is killed runs no code after that, and one whose heartbeat tells JAX that another is
gone is aborted from a thread that no Python can catch, after some pages. What is left to speak is a
shell at the other end of a pipe: it hears either the end of the interpreter or nothing.
"""

import atexit
import contextlib
import subprocess

# A scheduler may send SIGTERM to all that it finds.
_SHELL = 'trap "" TERM; read -r end || printf "%s\\n" "$0" >&2'


def leave(line: str) -> None:
  """Has `line` on standard error if this process ends without an end of its interpreter.

  However the interpreter comes to its end, whatever ended it has said so by then, and the line is
  not written: not even if JAX aborts later, while it waits for the other processes.
  """
  with contextlib.suppress(OSError):  # where there is no shell, the line is all that is missing
    shell = subprocess.Popen(
      ['/bin/sh', '-c', _SHELL, line],
      stdin=subprocess.PIPE,
      stdout=subprocess.DEVNULL,
      start_new_session=True,  # else Ctrl-C would end it too
    )
    # Handlers run in reverse: this one before JAX's, which was there when JAX was imported.
    atexit.register(shell.communicate, b'\n')
