"""Turning words typed by a person into a dataclass, and errors into one sentence and an exit code.

Every command is a frozen dataclass whose fields are the flags, which tyro parses. This module adds what tyro leaves
out: the nearest name for a wrong flag, `--amp false` beside `--no-amp`, snake_case, aliases, YAML; help.py prints them.
It imports neither torch nor numpy: `--help` and a wrong flag answer at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import signal
import sys
import threading
import time
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pipeline.errors import DaaeError, ResourceError, UsageError
from pipeline.limits import out_of_memory
from train.help import help_text, kind, opposite

T = TypeVar("T")
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One leaf of a tree of dataclasses: a flag, a YAML key."""

    path: tuple[str, ...]
    type: Any
    default: Any  # dataclasses.MISSING where the flag is required
    positional: bool

    @property
    def flag(self) -> str:
        return "--" + ".".join(self.path).replace("_", "-")

    @property
    def boolean(self) -> bool:
        return self.type is bool

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING


def settings(cls: type, prefix: tuple[str, ...] = ()) -> list[Setting]:
    """Every leaf of a dataclass and the dataclasses in it, in order of declaration."""
    found = []
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint, positional = hints[field.name], False
        if typing.get_origin(hint) is typing.Annotated:
            positional = any("Positional" in repr(extra) or "POSITIONAL" in repr(extra) for extra in hint.__metadata__)
            hint = hint.__origin__
        if dataclasses.is_dataclass(hint):
            found += settings(typing.cast(type, hint), (*prefix, field.name))
        else:
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            found.append(Setting((*prefix, field.name), hint, default, positional))
    return found


def nearest(word: str, known: Iterable[str]) -> str:
    """ " Did you mean X?" or nothing, ready to be put behind a sentence."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def normalise(cls: type, argv: Sequence[str], aliases: Mapping[str, str]) -> list[str]:
    """Rewrite aliases, snake_case and `--flag true|false`; refuse an unknown flag by its nearest name, and a value that
    its flag does not take."""
    known = {setting.flag: setting for setting in settings(cls) if not setting.positional}
    accepted = {**{flag: flag for flag in known}, **aliases}
    accepted.update({opposite(flag): opposite(flag) for flag, setting in known.items() if setting.boolean})
    words, result, at = list(argv), [], 0
    while at < len(words):
        word = words[at]
        at += 1
        if word == "--":
            return result + words[at - 1 :]
        if not word.startswith("--") or word == "--help":
            result.append(word)
            continue
        name, equals, value = word.partition("=")
        # Aliases are spelled as their own program spells them; ours are kebab-case and also taken with underscores.
        flag = accepted.get(name) or accepted.get(name.replace("_", "-"))
        if flag is None:
            raise UsageError(f"{name} is unknown.{nearest(name.replace('_', '-'), accepted)}")
        setting = known.get(flag)
        if setting is not None and setting.boolean:
            if not equals and at < len(words) and words[at].lower() in TRUE + FALSE:
                equals, value, at = "=", words[at], at + 1
            if equals and value.lower() not in TRUE + FALSE:
                raise UsageError(f"{name} takes true or false, not {value!r}.")
            result.append(opposite(flag) if equals and value.lower() in FALSE else flag)
        else:
            result.append(flag + equals + value)
            if setting is None or typing.get_origin(setting.type) is tuple:
                continue  # tyro counts the words of a tuple
            if not equals:
                if at == len(words) or words[at].startswith("--"):
                    raise UsageError(f"{name} wants {kind(setting.type)} behind it.")
                value, at = words[at], at + 1
                result.append(value)
            coerce(value, setting.type, name)
    return result


def parse(
    cls: type[T],
    argv: Sequence[str],
    *,
    prog: str,
    default: T | None = None,
    aliases: Mapping[str, str] | None = None,
) -> T:
    """Read flags into `cls`, starting from `default` where one is given.

    Raises UsageError (exit code 2) with one sentence. `--help` prints and exits 0.
    """
    words = normalise(cls, argv, aliases or {})
    if {"--help", "-h"} & set(words[: words.index("--") if "--" in words else None]):
        print(help_text(cls, prog, settings(cls), default, aliases or {}))
        raise SystemExit(0)
    import tyro

    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return (
                tyro.cli(cls, args=words, prog=prog, default=default)
                if default is not None
                else tyro.cli(cls, args=words, prog=prog)
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(_first_sentence(captured.getvalue(), prog)) from None


def _first_sentence(boxed: str, prog: str) -> str:
    """tyro's error box without its frame: what stands above the rule that parts message from advice."""
    lines = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", boxed).splitlines():
        text = line.strip(" │|")
        if line.lstrip().startswith(("╭", "╰")) or not text:
            continue
        if set(text) <= set("─-"):
            break
        lines.append(text)
    sentence = " ".join(lines) or "the flags could not be read"
    return f"{sentence.rstrip('.')}. See `{prog} --help`."


def overlay(default: T, values: Mapping[str, Any], source: str) -> T:
    """`default` with the nested mapping `values` (from YAML) laid over it.

    Raises UsageError: an unknown key names the nearest one; a value of the wrong type names what is wanted.
    """
    hints = typing.get_type_hints(type(default), include_extras=True)
    changes = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in hints:
            raise UsageError(f"{source}: {key} is unknown.{nearest(name, hints)}")
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise UsageError(f"{source}: {key} is a group of settings, not {value!r}.")
            changes[name] = overlay(getattr(default, name), value, f"{source}: {key}")
        else:
            changes[name] = coerce(value, hints[name], f"{source}: {key}")
    return dataclasses.replace(typing.cast(Any, default), **changes)


def coerce(value: Any, hint: Any, where: str) -> Any:
    """A value as YAML or JSON reads it, as the type a field wants (`1e-3` is text to YAML 1.1, tuples are lists)."""
    from pathlib import Path

    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return coerce(value, choices[0], where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in choices:
            return None
        for choice in (c for c in choices if c is not type(None)):
            with contextlib.suppress(UsageError):
                return coerce(value, choice, where)
    elif origin is typing.Literal:
        if value in choices:
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            inner = [choices[0]] * len(value) if choices[-1] is Ellipsis else choices
            if len(inner) == len(value):
                return tuple(coerce(item, one, where) for item, one in zip(value, inner, strict=True))
    elif origin is dict:
        if isinstance(value, Mapping):
            return {str(key): coerce(item, choices[1], where) for key, item in value.items()}
    elif hint is float:
        with contextlib.suppress(ValueError, TypeError):
            if not isinstance(value, bool):
                return float(value)
    elif hint is int:
        with contextlib.suppress(ValueError, TypeError):
            if not isinstance(value, bool) and float(value) == int(float(value)):
                return int(float(value))
    elif hint is Path:
        if isinstance(value, (str, Path)):
            return Path(value)
    elif hint is Any or isinstance(value, hint):
        return value
    close = nearest(value, map(str, choices)) if origin is typing.Literal and isinstance(value, str) else ""
    raise UsageError(f"{where} wants {kind(hint)}, not {value!r}.{close}")


def plain(value: Any) -> Any:
    """A dataclass as what YAML and JSON can write: the inverse of `overlay`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def read_yaml(path: os.PathLike | str) -> dict:
    """A YAML file with a mapping at its top. Raises UsageError."""
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file) or {}
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds {type(values).__name__}, not a mapping of settings.")
    return values


def exit_code(error: BaseException) -> int:
    """What a command ends with that raises this."""
    if isinstance(error, DaaeError):
        return error.code
    if isinstance(error, KeyboardInterrupt):
        return 130
    return ResourceError.code if out_of_memory(error) else 1


PARENT = "DAAE_PARENT"  # the process that has started this one, and waits for it


def _follow_parent() -> None:
    """SIGTERM, which saves and ends, when that process is gone: a run of a killed comparison does not train on."""
    parent = int(os.environ.pop(PARENT, "0"))

    def watch() -> None:  # the kernel's own signal comes once for each thread that the parent had
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    if parent:
        threading.Thread(target=watch, name="parent", daemon=True).start()


def run(main: Callable[[list[str]], int], argv: list[str] | None = None) -> int:
    """Call a command's `main` and turn what it raises into one sentence on stderr and an exit code."""
    _follow_parent()
    try:
        return main(sys.argv[1:] if argv is None else argv)
    except DaaeError as error:
        # Of the processes of one machine that train together the first speaks for all: it hears what ends the others.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return exit_code(error)
    except BrokenPipeError:  # `daae … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (KeyboardInterrupt, MemoryError) as error:
        print(f"error: {'out of memory' if isinstance(error, MemoryError) else 'stopped by Ctrl-C'}.", file=sys.stderr)
        return exit_code(error)
    except Exception as error:
        if os.environ.get("DAAE_TRACEBACK"):
            raise
        if out_of_memory(error):
            print(f"error: out of memory: {' '.join(str(error).split())[:300]}", file=sys.stderr)
            return exit_code(error)
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(where.filename)}:{where.lineno}"
        print(
            f"error: unexpected {type(error).__name__} at {place}: {error}. DAAE_TRACEBACK=1 shows where.",
            file=sys.stderr,
        )
        return 1
