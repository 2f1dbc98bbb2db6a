"""`--help`: every flag of a command with its type, its other names, what it starts from, and what it is for.

tyro could print this too, but takes half a second to parse sources and types for it, and knows no aliases.
"""

from __future__ import annotations

import ast
import functools
import inspect
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

if typing.TYPE_CHECKING:
    from train.command import Setting

INDENT, WIDEST = " " * 8, 100


def help_text(cls: type, prog: str, found: list[Setting], default: Any, aliases: Mapping[str, str]) -> str:
    """What `--help` prints. found: the leaves of `cls`; default: what the flags start from, where not cls's own."""
    width = min(shutil.get_terminal_size().columns, WIDEST)
    positional = [each for each in found if each.positional]
    words = [each.path[-1].upper() if each.required else f"[{each.path[-1].upper()}]" for each in positional]
    about = textwrap.wrap(inspect.cleandoc(cls.__doc__ or ""), width)
    lines = [f"usage: {' '.join([prog, *words, '[flags]'])}", "", *about]
    shorter: dict[str, list[str]] = {}
    for name, flag in aliases.items():
        shorter.setdefault(flag, []).append(name)
    group, owner = None, cls
    for each in sorted(found, key=lambda one: (not one.positional, len(one.path) > 1)):
        if each.path[:-1] != group:
            group = each.path[:-1]
            owner = _owner(cls, group)
            heading = inspect.cleandoc(owner.__doc__ or "").splitlines()[0] if group else "flags"
            lines += ["", f"{'.'.join(group)}: {heading}" if group else heading]
        name = each.path[-1]
        if each.positional:
            lines.append(f"  {name.upper()}")
        else:
            names = [each.flag, *sorted(shorter.get(each.flag, []), key=len)]
            names[0] = opposite(each.flag) if _start(each, default) == "(true)" else names[0]
            lines.append(f"  {', '.join(names)}" + ("" if each.boolean else f" {kind(each.type)}"))
        said = " ".join(documentation(owner).get(name, "").split())
        lines += textwrap.wrap(
            f"{said} {_start(each, default)}".strip(), width, initial_indent=INDENT, subsequent_indent=INDENT
        )
    return "\n".join(lines)


def _owner(cls: type, group: tuple[str, ...]) -> type:
    for name in group:
        hint = typing.get_type_hints(cls, include_extras=True)[name]
        cls = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
    return cls


def _start(setting: Setting, default: Any) -> str:
    """The value that a flag starts from, in brackets."""
    if default is None and setting.required:
        return "(required)"
    value = setting.default if default is None else functools.reduce(getattr, setting.path, default)
    if value is None or value is False or value in ((), ""):
        return ""
    if isinstance(value, float):
        return f"({value:g})"
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    return f"({str(value).lower() if isinstance(value, bool) else value})"


def opposite(flag: str) -> str:
    """--amp -> --no-amp, and --speed.compile -> --speed.no-compile as tyro spells it."""
    head, dot, leaf = flag[2:].rpartition(".")
    return f"--{head}{dot}no-{leaf}"


def kind(hint: Any) -> str:
    """What a flag takes, as one or two words: INT, {auto,cpu}, FLOAT FLOAT, PATH ..."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return "|".join(kind(each) for each in inner if each is not type(None))
    if origin is typing.Literal:
        return "{" + ",".join(map(str, inner)) + "}"
    if origin is tuple:
        return f"{kind(inner[0])} ..." if inner[-1] is Ellipsis else " ".join(map(kind, inner))
    return getattr(hint, "__name__", str(hint)).upper()


@functools.cache
def documentation(cls: type) -> dict[str, str]:
    """Field -> the string below it in the source, which Python itself forgets."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        found.update(_classes(each.__module__).get(each.__name__, {}))
    return found


@functools.cache
def _classes(module: str) -> dict[str, dict[str, str]]:
    """Class -> field -> the string below it, of a module's source."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return {}
    found = {}
    for node in ast.parse(Path(file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = {
                field.target.id: below.value.value
                for field, below in pairwise(node.body)
                if isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            }
    return found
