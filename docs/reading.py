"""Writes reading.html, the paper and the code side by side: reading.txt, notes.md and the sources.

    pip install latex2mathml==3.81.1 pygments==2.21.0
    python docs/reading.py

reading.txt is Markdown with little in it: ## sections, paragraphs, lists, > lines of the paper's
Algorithm 1, $ and $$ formulas in TeX, and, for the right side,

    => talas.train from "run.step" before "return"

a function, class, method or constant by its name, or a part of it: from the first line with one
text to the line before the first with the other. What a block needs stands above it.
"""

import ast
import functools
import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

DOCS = Path(__file__).parent
PAGE = DOCS / "reading.html"
SECTION = re.compile(r"^## (.+)\n", re.MULTILINE)
CODE = re.compile(
    r'^=> (?P<name>[\w.]+)(?: from "(?P<start>.+?)")?(?: before "(?P<end>.+)")?$', re.MULTILINE
)


def bad(what):
    """End with one line: reading.txt needs mending."""
    raise SystemExit(f"error: docs/reading.txt: {what}")


# ---------------------------------------------------------------------------- the left: the paper
def math(tex, display="inline"):
    """A formula as a <math> element; ends the program at a command that the library lacks."""
    found = convert(html.unescape(tex), xmlns="", display=display).replace(' xmlns=""', "")
    plain = tex.replace(r"\{", "").replace(r"\}", "")
    if "\\" in found or plain.count("{") != plain.count("}"):
        bad(f"not understood: {tex}")
    return found.replace("<mo>&#x0005E;", '<mo stretchy="false">&#x0005E;')  # a hat fits its letter


def equation(line):
    """A line $$ ... \\tag{3} $$ with its number, to which links lead."""
    tex, _, tag = line.strip("$ ").partition("\\tag{")
    number = tag.rstrip("} ")
    kind = "eq small" if tex.startswith("\\small ") else "eq"
    formula = math(tex.removeprefix("\\small "), "block")
    where = f' id="eq{number}"' if number else ""
    link = f'<a href="#eq{number}">({number})</a>' if number else ""
    return f'<div class="{kind}"{where}>{formula}{link}</div>'


MORE = r"(?:(?:-|, | and )\d+)*"
RULES = [  # Markdown within a paragraph, and links to equations, appendices and notes
    (r"\$([^$]+)\$([.,;:)]*)", lambda m: f'<span class="whole">{math(m[1])}{m[2]}</span>'),
    (r"\*\*(.+?)\*\*", r"<strong>\1</strong>"),
    (r"\[([^]]+)\]\(((?:https://|#)[^)]+)\)", r'<a href="\2">\1</a>'),
    (r"\[([^]]+)\]\([^)]+\)", r"\1"),  # a file beside the page: it may not be there
    (r"Appendix ([A-F])", r'<a href="#\1">\g<0></a>'),
    (rf"Eqs?\. (\d+){MORE}", r'<a href="#eq\1">\g<0></a>'),
    (rf"\b[Nn]otes? \d+{MORE}", lambda m: re.sub(r"\d+", r'<a href="#note\g<0>">\g<0></a>', m[0])),
]


def inline(text, anchors):
    """A paragraph as HTML, with links to what it names."""

    def code(m):
        name = next((name for name in anchors if name.endswith(f".{m[1]}")), None)
        return f'<a href="#{name}"><code>{m[1]}</code></a>' if name else f"<code>{m[1]}</code>"

    text = html.escape(text, quote=False)
    for pattern, new in [*RULES, ("`([^`]+)`", code)]:
        text = re.sub(pattern, new, text)
    return text


def block(text, anchors):
    """A paragraph, a list, formulas or lines of Algorithm 1 as HTML."""
    lines = text.split("\n")
    if text.startswith("$$"):
        return "".join(map(equation, lines))
    if text.startswith("- "):
        items = [f"<li>{inline(line[2:], anchors)}</li>" for line in lines]
        return f"<ul>{''.join(items)}</ul>"
    if text.startswith("> "):
        return f"<blockquote>{'<br/>'.join(inline(x[2:], anchors) for x in lines)}</blockquote>"
    kind = ' class="open"' if text.startswith("Open:") else ""
    return f"<p{kind}>{inline(' '.join(lines).replace('Open:', '**Open:**', 1), anchors)}</p>"


def notes(anchors):
    """notes.md as HTML: what stands before its list, and the list, to whose numbers links lead."""
    text = (DOCS / "notes.md").read_text("utf-8").split("\n", 1)[1]
    parts = [" ".join(part.split()) for part in re.split(r"^\d+\. ", text, flags=re.MULTILINE)]
    first, *others = [inline(part, anchors) for part in parts]
    items = [f'<li id="note{number}">{other}</li>' for number, other in enumerate(others, 1)]
    return f"<p>{first}</p><ol>{''.join(items)}</ol>"


# ----------------------------------------------------------------------------- the right: the code
@functools.cache
class Source:
    """A module of the repository: its lines, as text and coloured, its names and its imports."""

    def __init__(self, module):
        self.file = f"{module.replace('.', '/')}.py"
        text = (DOCS.parent / self.file).read_text("utf-8")
        lexer = PythonLexer(stripnl=False, ensurenl=False)
        self.lines = text.split("\n")
        self.coloured = highlight(text, lexer, HtmlFormatter(nowrap=True)).split("\n")
        self.places = {}  # of each name: its first and last line
        self.imports = {}  # a name in this file -> module.name
        for node in ast.parse(text).body:
            if isinstance(node, ast.ImportFrom):
                self.imports |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            for name, part in named(node):
                starts = [part, *getattr(part, "decorator_list", [])]
                self.places[name] = min(x.lineno for x in starts), part.end_lineno


def named(node):
    """(name, node) of a statement that gives a name, and of a class's methods."""
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        yield node.targets[0].id, node
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name, node
    if isinstance(node, ast.ClassDef):
        for method in node.body:
            yield from ((f"{node.name}.{name}", part) for name, part in named(method))


def locate(wanted):
    """(module, name, first line, last line) of a match of CODE."""
    parts = wanted["name"].split(".")
    size = 2 if parts[0] == "support" else 1
    module, name = ".".join(parts[:size]), ".".join(parts[size:])
    source = Source(module)
    if name not in source.places:
        bad(f"there is no {wanted['name']}")
    first, last = source.places[name]

    def find(text, start):
        found = [n for n in range(start, last + 1) if text in source.lines[n - 1]]
        return found[0] if found else bad(f"{wanted['name']} has no line with {text}")

    first = find(wanted["start"], first) if wanted["start"] else first
    last = find(wanted["end"], first + 1) - 1 if wanted["end"] else last
    while not source.lines[last - 1].strip():
        last -= 1
    return module, name, first, last


NAME = re.compile(r'(?<!<span class="o">\.</span>)<span class="n">(\w+)</span>')
PLAIN = re.compile(r'<span class="(?:n|o|p|w|nb|bp|nn)">(.*?)</span>')  # without a colour


def coloured(module, number, anchors):
    """A line of code as HTML, with links to functions and equations."""
    source = Source(module)

    def linked(m):
        target = source.imports.get(m[1], f"{module}.{m[1]}")
        return f'<a href="#{target}">{m[1]}</a>' if target in anchors else m[1]

    line = PLAIN.sub(r"\1", NAME.sub(linked, source.coloured[number - 1]))
    return re.sub(r"Eqs?\. (\d+)(-\d+)?", r'<a href="#eq\1">\g<0></a>', line)


def listing(wanted, anchors, seen):
    """The lines that a match of CODE names, as HTML; `seen`: the addresses that are taken."""
    module, name, first, last = locate(wanted)
    source = Source(module)

    def address(what):
        where = "" if what in seen else f' id="{what}"'
        seen.add(what)
        return where

    known = "again" if f"{module}-{first}" in seen else "continued"
    anchor, lines = f"{module}.{name}", []
    for number in range(first, last + 1):
        text, place = source.lines[number - 1], f"{module}-{number}"
        indent = len(text) - len(text.lstrip())
        link, code = f'<a href="#{place}">{number}</a>', coloured(module, number, anchors)
        lines.append(f'<span class="in{indent}"{address(place)}>{link}{code}\n</span>')
    part = "" if first == source.places[name][0] else f", {known}"
    caption = f'<figcaption>{source.file} <a href="#{anchor}">{name}</a>{part}</figcaption>'
    return f"<figure{address(anchor)}>{caption}<pre>{''.join(lines)}</pre></figure>"


# ---------------------------------------------------------------------------------------- the page
def section_id(heading):
    """The address of a section: its number or letter, else its first word."""
    return heading.removeprefix("Appendix ").split()[0]


def section(heading, text, anchors, seen):
    """A section as HTML; a new row begins after code and at a line of Algorithm 1."""
    address = section_id(heading)
    rows = [[f'<h2><a href="#{address}">{heading}</a></h2>', ""]]  # left, right
    for part in text.strip().split("\n\n"):
        if rows[-1][1] or (part[0] == ">" and not rows[-1][0].endswith("</h2>")):
            rows.append(["", ""])
        if part.startswith("=> "):
            wanted = [CODE.fullmatch(line) or bad(line) for line in part.split("\n")]
            rows[-1][1] = "".join(listing(one, anchors, seen) for one in wanted)
        else:
            rows[-1][0] += block(part, anchors)
    body = "".join(
        f'<div class="row"><div class="text"><div>{left}</div></div>'
        f'<div class="listings">{right}</div></div>\n'
        for left, right in rows
    )
    return f'<section id="{address}">\n{body}</section>\n'


def contents(sections):
    """The table of contents: a row a section, its equations and its functions."""
    rows = []
    for heading, text in sections:
        equations = [f'<a href="#eq{n}">{n}</a>' for n in re.findall(r"\\tag\{(\d+)\}", text)]
        label = ("Eq. " if len(equations) == 1 else "Eqs. ") if equations else ""
        names = dict.fromkeys(m["name"] for m in CODE.finditer(text))
        short = {name: re.sub(r"^(support\.)?\w+\.", "", name) for name in names}
        links = [f'<a href="#{name}"><code>{short[name]}</code></a>' for name in names]
        cells = [f'<a href="#{section_id(heading)}">{heading}</a>', label + ", ".join(equations)]
        rows.append("".join(f"<td>{cell}</td>" for cell in [*cells, " ".join(links)]))
    rows.append('<td colspan="3"><a href="#notes">Notes</a></td>')
    return f"<nav><table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table></nav>"


def page():
    """reading.html."""
    source = (DOCS / "reading.txt").read_text("utf-8")
    head, *parts = SECTION.split(source[source.index("\n# ") + 1 :])
    title, *introduction = head.strip().split("\n\n")
    title, sections = title.removeprefix("# "), list(zip(parts[::2], parts[1::2]))
    anchors, seen = dict.fromkeys(m["name"] for m in CODE.finditer(source)), set()
    body = "".join(section(heading, text, anchors, seen) for heading, text in sections)
    before = "".join(block(text, anchors) for text in introduction)
    style = (DOCS / "reading.css").read_text("utf-8")
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{title}</title><style>
{style}</style></head><body>
<header><h1>{title}</h1>{before}{contents(sections)}</header>
<main>
{body}<section id="notes"><h2><a href="#notes">Notes</a></h2>
{notes(anchors)}</section>
</main>
<footer><p>The equations and the lines of Algorithm 1 are the paper's (Dao et al., 2026, CC BY 4.0).
The sentences around them and the code are ours.</p></footer></body></html>
"""


def main():
    """Write the page."""
    made = page()
    PAGE.write_text(made, "utf-8", newline="\n")
    print(f"{PAGE.name}: {len(made.encode()) / 1000:.0f} KB")


if __name__ == "__main__":
    main()
