"""The frame of every command: a poor environment ends it with one message, if at all, and never with a traceback."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import resource
import select
import sys
from collections.abc import Callable

from w1train.runtime.masking import mask_output

_MOST_FILES = 1 << 20
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_CLOSED_PIPE = 141
"""The exit status of a program that the signal SIGPIPE ends, as a shell gives it."""


def command[**Arguments, Result](program: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Decorate a command's ``main`` (``program`` is its name in messages).

    Output has no passwords of URLs (masking.py).
    Output that the console's encoding cannot show is replaced. A reader of the output that goes away (``| head -1``) ends the command
    quietly. The limit on open files is raised as far as it goes; where that is not enough, a message says so.
    """

    def decorate(main: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(main)
        def run(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
            prepare_streams()
            mask_output()
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
            null = open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            setattr(sys, name, null)
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


def text_argument(text: str) -> str:
    """The type of an argument that is a text. In a locale that is not UTF-8 (``LC_ALL=C``), Python hands its bytes on as surrogates."""
    is_escaped = any("\udc80" <= character <= "\udcff" for character in text)
    return os.fsencode(text).decode("utf-8", "surrogateescape") if is_escaped and sys.getfilesystemencoding() != "utf-8" else text


def is_out_of_files(error: BaseException) -> bool:
    """Tell whether an error says that there are too many open files. torch's libraries say so in the text of a RuntimeError."""
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
    """Exit if the error is of the environment."""
    has_no_reader = isinstance(error, BrokenPipeError) and _has_no_reader()
    if not has_no_reader and not is_out_of_files(error) and getattr(error, "errno", None) not in _OF_THE_DISK:
        return
    try:
        sys.stdout.flush()
    except OSError:
        _discard_output()
    if has_no_reader:
        sys.exit(_CLOSED_PIPE)
    print(f"{program}: {describe_error(error)}", file=sys.stderr)
    sys.exit(1)


def _has_no_reader() -> bool:
    """Tell whether standard output is a pipe that nobody reads from any more; a broken pipe may be another's."""
    watched = select.poll()
    watched.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in watched.poll(0))


def _discard_output() -> None:
    """Throw away what standard output does not take: Python would try once more at its end, and complain."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
