"""The building blocks of a page that stands alone: style, tables, notes and pictures inside one HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path


def document(title: str, sections: Iterable[str], footer: str) -> str:
    """A whole HTML file; title is text, sections and footer are HTML already."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escape(title)}</title>\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + f"\n<footer>{footer}</footer>\n</main>\n</body>\n</html>\n"
    )


def marked(sentence: str) -> str:
    """Escaped, with `commands` as code."""
    parts = escape(sentence).split("`")
    return "".join(f"<code>{part}</code>" if place % 2 else part for place, part in enumerate(parts))


def notes(title: str, sentences: Sequence[str], kind: str) -> str:
    if not sentences:
        return ""
    items = "".join(f"<li>{marked(sentence)}</li>" for sentence in sentences)
    return f'<section class="notes {kind}"><h2>{title}</h2><ul>{items}</ul></section>'


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, css: str = "") -> str:
    """A table of cells that are HTML already; the first `left` columns are words, the others numbers."""

    def cell(tag: str, place: int, text: str) -> str:
        return f"<{tag}{'' if place < left else ' class=n'}>{text}</{tag}>"

    head = "".join(cell("th", place, escape(text)) for place, text in enumerate(headings))
    body = "".join(f"<tr>{''.join(cell('td', place, text) for place, text in enumerate(row))}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{css}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def picture(path: Path, most: int) -> str | None:
    """A PNG as a data URI of at most `most` bytes before base64; a large one is turned into a JPEG, smaller if need be.
    None where the file is no picture."""
    from PIL import Image, UnidentifiedImageError

    data = path.read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if len(data) <= most and image.format == "PNG":
                return f"data:image/png;base64,{base64.b64encode(data).decode()}"
            image = image.convert("RGB")
    except (UnidentifiedImageError, OSError):
        return None
    for scale in (1.0, 0.7, 0.5, 0.35, 0.25):
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        for quality in (88, 70, 50):
            buffer = io.BytesIO()
            image.resize(size).save(buffer, "JPEG", quality=quality)
            if buffer.tell() <= most:
                return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return None


STYLE = """
:root{color-scheme:light dark;--ink:#16181d;--faint:#646b78;--paper:#fbfbfa;--card:#fff;--rule:#e2e4e8;
--good:#1f8a5b;--bad:#c2413a;--open:#b07d16;--soft:#f1f3f5}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaee;--faint:#9aa2af;--paper:#14161a;--card:#1c1f25;--rule:#2d323a;
--good:#4cc38a;--bad:#f0776f;--open:#e0b04a;--soft:#23272e}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:60rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:2rem;line-height:1.2;margin:.1rem 0 1.2rem;letter-spacing:-.02em;overflow-wrap:anywhere}
h2{font-size:1.3rem;margin:0 0 .4rem;letter-spacing:-.01em}
h3{font-size:1rem;margin:1.6rem 0 .3rem}
p{margin:.4rem 0 .8rem;max-width:48rem}
section{margin-top:2.8rem}
.kicker{color:var(--faint);text-transform:uppercase;letter-spacing:.08em;font-size:.8rem;margin:0}
.facts,footer,figcaption,small{color:var(--faint);font-size:.87rem}
.verdict{border-left:5px solid var(--open);background:var(--card);padding:1rem 1.25rem;border-radius:0 10px 10px 0;
box-shadow:0 1px 3px #0001}
.verdict.good{border-color:var(--good)}.verdict.bad{border-color:var(--bad)}
.verdict p{margin:.2rem 0;max-width:none}.answer{font-size:1.18rem;font-weight:600;line-height:1.45}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.8rem;margin:.2rem 0 1rem}
.tile{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:.8rem 1rem}
.tile b{display:block;font-size:1.7rem;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.tile span,.tile small{display:block;line-height:1.35}
.notes{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:1rem 1.25rem}
.notes.warn{border-color:var(--bad)}.notes h2{font-size:1.05rem}.notes ul{margin:.3rem 0 0;padding-left:1.1rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums;margin:.5rem 0}
th{font-weight:600;color:var(--faint);text-align:left;font-size:.82rem;vertical-align:bottom}
th,td{padding:.4rem .6rem;border-bottom:1px solid var(--rule)}
th:first-child,td:first-child{padding-left:0}
td:first-child,th:first-child{min-width:7rem}
table.plain td:last-child{overflow-wrap:anywhere}.n{text-align:right;white-space:nowrap}th.n{white-space:normal}
table.dense{font-size:.85rem}.dense small{font-size:.74rem}.dense th,.dense td{padding:.35rem .25rem}
.dense td:first-child,.dense th:first-child{min-width:5.5rem;padding-left:0}
table.plain thead{display:none}table.plain td:first-child{color:var(--faint);white-space:nowrap;width:12rem}
.yes{color:var(--good)}.no{color:var(--bad);font-weight:600}
.chip{display:inline-block;width:.75em;height:.75em;border-radius:50%;margin-right:.5em}
.legend span{margin-right:1.4rem}
figure{margin:.6rem 0 1.2rem}
.chart svg{width:100%;height:auto;display:block;stroke-linejoin:round}
.bar{display:flex;align-items:center;gap:.8rem;margin:.3rem 0}.bar>span{flex:0 0 9rem;overflow-wrap:anywhere}
.bar>div{flex:1;display:flex;height:1.4rem}.bar i{display:block;height:100%}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(20rem,1fr));gap:1rem}
.gallery img{max-width:100%;min-width:min(100%,36rem);height:auto;border-radius:6px;background:#fff;display:block}
.slides{margin-top:1.6rem;background:var(--soft);border-radius:10px;padding:.9rem 1.25rem}
.slides h3{margin-top:0}.slides p{font-size:.87rem;color:var(--faint)}
details{margin:.6rem 0}summary{cursor:pointer;color:var(--faint)}
pre{background:var(--soft);border-radius:8px;padding:.8rem 1rem;overflow-x:auto;font-size:.82rem;line-height:1.5}
code{font-size:.9em}
footer{margin-top:3rem;border-top:1px solid var(--rule);padding-top:.8rem}
"""
