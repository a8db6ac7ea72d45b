"""The command `fastshift VERB`: arguments in, an exit code out.

0 done; 2 what the user gave cannot be used; 3 interrupted, can go on; 4 stopped itself.
"""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from fastshift import __version__
from fastshift.commands import RUNS
from fastshift.config import VERBS, read_file, resolve
from fastshift.errors import ConfigError, FastShiftError, NonFiniteLossError
from fastshift.options import Option
from fastshift.queries import QUERIES

__all__ = ["main"]

UNUSABLE, STOPPED_ITSELF = 2, 4
INTERRUPTED_QUERY = 130  # as shells have it: nothing to resume

_ABOUT = {
    "pretrain": "train a supernet",
    "search": "search for the best architectures, pre-training first where no supernet is given",
    "transfer": "carry a supernet to new data: a fresh head, then a search",
    "evaluate": "score architectures, write CSV",
    "rank": "order preservation of a score CSV against true accuracies",
    "retrain": "train one architecture from scratch",
    "export": "write one architecture's network to a file of its own",
    "report": "write a finished run's report.html",
    "spaces": "list the search spaces",
    "info": "versions, device, and which implementation of each kernel would run",
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as everything else does."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastshift",
        description="Neural architecture search by Supernet Shifting.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fastshift {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, about in _ABOUT.items():
        bare = [
            f"[{option.name.upper()}]" if option.metadata.get("optional") else option.name.upper()
            for option in _options(verb)
            if _is_positional(option)
        ]
        sub = verbs.add_parser(
            verb,
            help=about,
            description=about,
            allow_abbrev=False,
            usage=" ".join(["fastshift", verb, *bare, "[OPTIONS]"]),
        )
        for section in VERBS[verb]:
            group = sub.add_argument_group(section.title)
            for option in section.options():
                _add(group, option)
    return parser


def _parse(argv: Sequence[str] | None) -> dict[str, Any]:
    given, unknown = _parser().parse_known_args(argv)
    if unknown:
        flag, _, _ = unknown[0].partition("=")
        known = [option.flag for option in _options(given.verb) if not _is_positional(option)]
        near = difflib.get_close_matches(flag, known, n=3)
        hint = f"; expected one of {', '.join(near)}" if near else f"; see {given.verb} --help"
        what = "option" if flag.startswith("-") else "argument"
        raise ConfigError(f"unknown {what} {flag!r}{hint}")
    return vars(given)


def _options(verb: str) -> list[Option]:
    return [option for section in VERBS[verb] for option in section.options()]


def _is_positional(option: Option) -> bool:
    return bool(option.metadata.get("positional"))


def _add(group: Any, option: Option) -> None:
    text = option.help.replace("%", "%%")
    if option.default is True:
        text += " (default: yes)"
    elif option.default is not None and option.hint is not bool:
        text += f" (default: {option.default})"
    keywords: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
    if _is_positional(option):
        group.add_argument(option.name, nargs="?", metavar=option.name.upper(), **keywords)
        return
    if option.hint is bool or option.hint == bool | None:
        keywords["action"] = argparse.BooleanOptionalAction
    else:
        keywords["metavar"] = option.metavar
    if "bare" in option.metadata:
        keywords |= {"nargs": "?", "const": option.metadata["bare"]}
    group.add_argument(option.flag, dest=option.name, **keywords)


@contextmanager
def _stop_flag() -> Iterator[threading.Event]:
    """Let Ctrl-C and SIGTERM set a flag; a second one ends the program at once."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def handle(number: int, _frame: Any) -> None:
        if flag.is_set():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        flag.set()
        # Not print: the signal may have come within a write to the same stream.
        os.write(2, b"fastshift: stopping at the next step; once more stops at once\n")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: without the program's name; `sys.argv` by default.

    Returns:
        The exit code.
    """
    try:
        given = _parse(argv)
        verb = given.pop("verb")
        file = read_file(given["config"], verb) if given.get("config") else {}
        config = resolve(verb, given, file)
        config.check()
        if verb in QUERIES:
            code = QUERIES[verb](config)
        else:
            with _stop_flag() as flag:
                code = RUNS[verb](config, flag.is_set)
        sys.stdout.flush()  # here, where a full disk behind it is still an error with a message
        return code
    except NonFiniteLossError as error:
        return _fail(error, STOPPED_ITSELF)
    except BrokenPipeError:
        # The reader of a pipe has what it wanted; Python must not flush into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNUSABLE
    except KeyboardInterrupt:
        return _fail(KeyboardInterrupt("interrupted; nothing was written"), INTERRUPTED_QUERY)
    except (FastShiftError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        return _fail(error, UNUSABLE)


def _fail(error: BaseException, code: int) -> int:
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"fastshift: error: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
