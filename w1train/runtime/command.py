"""What every command does around its work, so that a poor environment ends it with one message, if at all, and never with a traceback."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import resource
import sys
from collections.abc import Callable

_MOST_FILES = 1 << 20
_CLOSED_PIPE = 141
"""The exit status of a program that the signal SIGPIPE ends, as a shell gives it."""


def command[**Arguments, Result](program: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Decorate a command's ``main`` (``program`` is its name in messages).

    Output that the console's encoding cannot show is replaced. A reader of the output that goes away (``| head -1``) ends the command
    without a word. The limit on open files is raised as far as it goes; where that is not enough, a message says so.
    """

    def decorate(main: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(main)
        def run(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
            prepare_streams()
            allow_open_files()
            try:
                try:
                    return main(*arguments, **options)
                finally:
                    sys.stdout.flush()
            except (OSError, RuntimeError) as error:
                _end(program, error)
                raise

        return run

    return decorate


def prepare_streams() -> None:
    """Make standard output and error take every text. A stream that the caller has closed takes it and forgets it; its file descriptor is
    taken, or the next file that is opened would get what is printed."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115 - open to the end
        elif name == "stdout" and hasattr(stream, "reconfigure"):
            # Standard error does so by itself.
            stream.reconfigure(errors="backslashreplace")


def allow_open_files() -> None:
    """Raise the soft limit on open files to the hard one: a rank has sockets to other ranks, data workers, shards of datasets. Many
    machines begin with 1024, and allow far more to those who ask."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, _MOST_FILES) if hard != resource.RLIM_INFINITY else _MOST_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    with contextlib.suppress(OSError, ValueError):  # a limit of the kernel's own; what is there has to do
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def is_out_of_files(error: BaseException) -> bool:
    """Whether there are too many open files. torch's libraries say so in the text of a RuntimeError."""
    if isinstance(error, OSError):
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return isinstance(error, RuntimeError) and os.strerror(errno.EMFILE) in str(error)


def describe_error(error: BaseException) -> str:
    """The error's text (its last line, where a library has a stack in it), and what to do where it is that files ran out."""
    if not is_out_of_files(error):
        return str(error)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    text = str(error) if isinstance(error, OSError) else os.strerror(errno.EMFILE)
    return f"{text}: this process may have {limit} files open (ulimit -Hn). Allow more of them, 1024 at least, before the command starts"


def _end(program: str, error: OSError | RuntimeError) -> None:
    """Exit, if the error is of the environment."""
    output_error = _error_of_output()
    if isinstance(output_error, BrokenPipeError):
        sys.exit(_CLOSED_PIPE)
    if output_error is not None:
        print(f"{program}: cannot write to standard output: {output_error}", file=sys.stderr)
        sys.exit(1)
    if is_out_of_files(error):
        print(f"{program}: {describe_error(error)}", file=sys.stderr)
        sys.exit(1)


def _error_of_output() -> OSError | None:
    """Why standard output takes no more, if it does not. Then what it holds is thrown away: Python would try once more at its end."""
    try:
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
        return error
    return None
