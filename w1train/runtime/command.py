"""The decorator of every command. If an error of a file, a closed output, a limit on open files or Ctrl-C ends a command, it ends with one
message and without a traceback."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import resource
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from w1train.runtime.ctrl_c import ctrl_c_raises
from w1train.runtime.exit_status import ExitStatus
from w1train.runtime.masking import mask_output

_MOST_FILES = 1 << 20
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_ADVICE = {
    errno.ENOSPC: "make space on this disk, and run the same command again",
    errno.EDQUOT: "make space in your quota, and run the same command again",
    errno.EFBIG: "allow larger files (ulimit -f), and run the same command again",
    errno.EIO: "the disk fails, or the file system of a network: look into the system's log (dmesg)",
    errno.ESTALE: "the file system of the network has lost this file: run the same command again",
    errno.ENODEV: "the file system cannot map files into memory: copy the file to another file system",
    errno.EROFS: "choose a directory that can be written to",
    errno.EACCES: "get the permission (ls -ld shows who has it), or choose another file or directory",
    errno.EPERM: "get the permission (ls -ld shows who has it), or choose another file or directory",
    errno.ENOENT: "look whether the path is right, and its disk mounted",
    errno.ENOTDIR: "a part of the path is a file: choose another path",
    errno.EISDIR: "the path is a directory: choose another path",
    errno.ENAMETOOLONG: "choose a shorter path",
}
"""The advice to the user for each error of a file."""
_CLOSED_PIPE = 141
"""The exit status of a program that the signal SIGPIPE ends, as a shell gives it."""


def command[**Arguments, Result](program: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Decorate a command's ``main`` (``program`` is its name in messages).

    Passwords of URLs are masked in the output (masking.py). Characters that the console's encoding cannot show are replaced. If the reader
    of the output closes it (``| head -1``), the command ends without a message. After Ctrl-C it ends with status 130. The limit on open
    files is raised as far as the system allows; where that is not enough, a message says what to change.
    """

    def decorate(main: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(main)
        def run(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
            try:
                with ctrl_c_raises():
                    prepare_streams()
                    mask_output()
                    allow_open_files()
                    try:
                        return main(*arguments, **options)
                    finally:
                        sys.stdout.flush()
            except KeyboardInterrupt:
                end_interrupted(program)
            except (OSError, RuntimeError) as error:
                _end(program, error)
                raise

        return run

    return decorate


def prepare_streams() -> None:
    """Make standard output and error accept every text. In place of a stream that the caller has closed, /dev/null is opened: otherwise the
    next file that is opened would get the stream's descriptor, and would get the printed text."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            null = open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            setattr(sys, name, null)
        elif name == "stdout" and hasattr(stream, "reconfigure"):
            # Standard error replaces characters by itself.
            stream.reconfigure(errors="backslashreplace")


def allow_open_files() -> None:
    """Raise the soft limit on open files to the hard limit. A rank has sockets to other ranks, data workers and shards of datasets open,
    and many machines begin with a soft limit of 1024 and allow far more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, _MOST_FILES) if hard != resource.RLIM_INFINITY else _MOST_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    with contextlib.suppress(OSError, ValueError):  # the kernel has a limit of its own, and the old limit stays
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def text_argument(text: str) -> str:
    """Return an argument of the command line as text. In a locale that is not UTF-8 (``LC_ALL=C``), Python gives its bytes as
    surrogates."""
    is_escaped = any("\udc80" <= character <= "\udcff" for character in text)
    return os.fsencode(text).decode("utf-8", "surrogateescape") if is_escaped and sys.getfilesystemencoding() != "utf-8" else text


def is_out_of_files(error: BaseException) -> bool:
    """Tell whether an error means too many open files. torch's libraries show it only in the text of a RuntimeError."""
    if isinstance(error, OSError):
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return isinstance(error, RuntimeError) and os.strerror(errno.EMFILE) in str(error)


def describe_error(error: BaseException) -> str:
    """Return the error's text, and, where a file or the limit on open files is the cause, what to do."""
    if is_out_of_files(error):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        text = str(error) if isinstance(error, OSError) else os.strerror(errno.EMFILE)
        return (
            f"{text}: this process may have {limit} files open (ulimit -Hn). Allow more of them, 1024 at least, before the command starts"
        )
    advice = _ADVICE.get(error.errno or 0) if isinstance(error, OSError) and (_is_of_a_file(error) or error.errno in _OF_THE_DISK) else None
    return str(error) if advice is None else f"{error}: {advice}"


def _is_of_a_file(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.filename is not None


def _end(program: str, error: OSError | RuntimeError) -> None:
    """Exit if the environment is the cause of the error."""
    has_no_reader = isinstance(error, BrokenPipeError) and _has_no_reader()
    is_of_the_disk = _is_of_a_file(error) or getattr(error, "errno", None) in _OF_THE_DISK
    if not has_no_reader and not is_out_of_files(error) and not is_of_the_disk:
        return
    try:
        sys.stdout.flush()
    except OSError:
        _discard_output()
    if has_no_reader:
        sys.exit(_CLOSED_PIPE)
    print(f"{program}: {describe_error(error)}", file=sys.stderr)
    sys.exit(1)


def end_interrupted(program: str) -> NoReturn:
    """Exit after Ctrl-C. A second Ctrl-C, while Python tidies up, ends the process without a traceback."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    print(f"{program}: ended by Ctrl-C", file=sys.stderr)
    sys.exit(ExitStatus.INTERRUPTED)


def _has_no_reader() -> bool:
    """Tell whether standard output is a pipe that nobody reads from any more. The broken pipe may also be another file's."""
    watched = select.poll()
    watched.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in watched.poll(0))


def _discard_output() -> None:
    """Send the rest of standard output to /dev/null: Python would try to write it at its end, and print an error."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
