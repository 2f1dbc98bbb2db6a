"""Paths of a source, which may hold any byte, as lines of text, and back."""

from __future__ import annotations

import re


def printable(path: bytes) -> str:
    r"""A path as one line of UTF-8 that names it exactly: `\\`, `\n`, and `\xNN` for bytes that cannot be shown.

    `unprintable()` is the inverse.
    """
    text = path.decode("utf-8", "surrogateescape")
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(_escape(character) for character in text)


def _escape(character: str) -> str:
    if character == "\\":
        return "\\\\"
    if character == "\n":
        return "\\n"
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))


def unprintable(text: str) -> bytes:
    """The path that `printable()` was given."""

    def byte(match: re.Match[bytes]) -> bytes:
        code = match[1]
        return {b"\\": b"\\", b"n": b"\n"}.get(code) or bytes.fromhex(code[1:].decode())

    return re.sub(rb"\\(\\|n|x[0-9a-f]{2})", byte, text.encode())
