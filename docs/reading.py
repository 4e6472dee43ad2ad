"""Writes reading.html, the paper and the code side by side, from reading.md and the sources.

    python docs/reading.py            # write it
    python docs/reading.py --check    # exit with 1 if the page is not what this would write

reading.md is Markdown with little in it: ## sections, paragraphs, lists, > lines of the paper's
Algorithm 1, $ and $$ formulas in TeX, which become MathML, and, for the right side,

    => talas.train from "log.step" before "return"

a function, class, method or constant by its name, or a part of it: from the first line with one
text to the line before the first with the other. What a block needs stands above it.
"""

import ast
import functools
import html
import re
import sys
from collections import deque
from pathlib import Path
from typing import NamedTuple

from pygments.lexers import PythonLexer
from pygments.token import Comment, Keyword, Name, Number, Operator, String

DOCS = Path(__file__).parent
PAGE = DOCS / "reading.html"
CODE = re.compile(r'=> (?P<name>[\w.]+)(?: from "(?P<start>.+?)")?(?: before "(?P<end>.+)")?')

# ------------------------------------------------------------------------------- formulas: MathML
TEX = re.compile(
    r"\\text\{[^}]*\}|\\math(?:cal|bf)\{\w\}|\\[A-Za-z]+|\\.|\d+(?:\.\d+)?|\S", re.DOTALL
)
LETTERS = {
    "\\alpha": "α", "\\beta": "β", "\\epsilon": "ϵ", "\\eta": "η", "\\theta": "θ",
    "\\lambda": "λ", "\\rho": "ρ", "\\tau": "τ",
}  # fmt: skip
OPERATORS = {
    "\\in": "∈", "\\le": "≤", "\\ge": "≥", "\\leftarrow": "←", "\\subset": "⊂", "\\times": "×",
    "\\cdot": "⋅", "\\nabla": "∇", "\\top": "⊤", "\\prime": "′", "\\sum": "∑", "-": "−",
    "\\|": "‖", "\\{": "{", "\\}": "}",
} | {sign: html.escape(sign) for sign in "+=/,;:<>()[]|"}  # fmt: skip
ACCENTS = {"\\tilde": "~", "\\hat": "^"}
FUNCTIONS = {"\\max", "\\min", "\\log"}
SCRIPT = dict(zip("BEFHILMR", "ℬℰℱℋℐℒℳℛ"))  # the letters that Unicode had before


def math(tex, display=False):
    """A formula as a <math> element; ValueError if it is not understood."""
    tokens = deque(TEX.findall(tex))
    body = "".join(parts(tokens))
    return f'<math display="block">{body}</math>' if display else f"<math>{body}</math>"


def parts(tokens, end=None):
    """The elements up to the token `end`, which goes, or up to the last."""
    found = []
    while tokens and tokens[0] != end:
        found.append(scripted(tokens))
    if end:
        take(tokens)
    return found


def take(tokens):
    """The next token."""
    if not tokens:
        raise ValueError("the formula ends too early")
    return tokens.popleft()


def scripted(tokens):
    """One element with its subscript and superscript; those of a sum, max or min stand below."""
    limits, base, scripts = tokens[0] in ("\\sum", "\\max", "\\min"), atom(tokens), {}
    while tokens and tokens[0] in ("_", "^"):
        sign = take(tokens)
        scripts[sign] = atom(tokens)
    kinds = {"_": "under", "^": "over"} if limits else {"_": "sub", "^": "sup"}
    tag = "m" + "".join(kinds[key] for key in sorted(scripts, reverse=True))
    lower_first = "".join(scripts[key] for key in "_^" if key in scripts)
    return f"<{tag}>{base}{lower_first}</{tag}>" if scripts else base


def atom(tokens):
    """One element without scripts."""
    token = take(tokens)
    if token == "{":
        return f"<mrow>{''.join(parts(tokens, '}'))}</mrow>"
    if token == "\\frac":
        return f"<mfrac>{atom(tokens)}{atom(tokens)}</mfrac>"
    if token in ACCENTS:
        mark = f'<mo stretchy="false">{ACCENTS[token]}</mo>'
        return f'<mover accent="true">{atom(tokens)}{mark}</mover>'
    if token == "\\left":  # brackets as tall as what they hold
        left = f"<mo>{OPERATORS[take(tokens)]}</mo>"
        body = "".join(parts(tokens, "\\right"))
        return f"<mrow>{left}{body}<mo>{OPERATORS[take(tokens)]}</mo></mrow>"
    if token == "\\,":
        return '<mspace width="0.17em"></mspace>'
    if token.startswith("\\text{"):
        return f"<mtext>{token[6:-1].replace(chr(92), '')}</mtext>"
    if token.startswith(("\\mathcal{", "\\mathbf{")):
        return f"<mi>{styled(token[-2], bold='bf' in token)}</mi>"
    if token in FUNCTIONS:
        return f'<mo lspace="0.17em" rspace="0.17em" movablelimits="true">{token[1:]}</mo>'
    if token in LETTERS or token.isalpha():
        return f"<mi>{LETTERS.get(token, token)}</mi>"
    if token[0].isdigit():
        return f"<mn>{token}</mn>"
    if token not in OPERATORS:
        raise ValueError(f"unknown: {token}")
    fixed = ' stretchy="false"' if token in ("(", ")", "[", "]", "|", "\\|", "\\{", "\\}") else ""
    return f"<mo{fixed}>{OPERATORS[token]}</mo>"


def styled(letter, bold):
    """A letter as Unicode's mathematical bold or script letter."""
    if not bold:
        return SCRIPT.get(letter) or chr(0x1D49C + ord(letter) - ord("A"))
    return chr((0x1D400 - ord("A") if letter.isupper() else 0x1D41A - ord("a")) + ord(letter))


# ---------------------------------------------------------------------------- the left: reading.md
class Row(NamedTuple):
    """A row of the page: blocks of Markdown on the left, matches of CODE on the right."""

    text: list
    code: list


def read_notes():
    """(title, introduction, [(heading, rows)]) of reading.md."""
    head, *sections = (DOCS / "reading.md").read_text("utf-8").split("\n## ")
    title, *introduction = head.strip().split("\n\n")
    return title.removeprefix("# "), introduction, [read_section(text) for text in sections]


def read_section(text):
    """(heading, rows); a new row begins after code and at a line of Algorithm 1."""
    heading, *blocks = text.strip().split("\n\n")
    rows = [Row([], [])]
    for block in blocks:
        if rows[-1].code or (block[0] == ">" and rows[-1].text):
            rows.append(Row([], []))
        if block.startswith("=> "):
            rows[-1].code.extend(CODE.fullmatch(line) or bad(line) for line in block.split("\n"))
        else:
            rows[-1].text.append(block)
    return heading, rows


def bad(what):
    """End with one line: reading.md needs mending."""
    raise SystemExit(f"error: docs/reading.md: {what}")


INLINE = re.compile(
    r"\$(?P<math>[^$]+)\$(?P<after>[.,;:)]*)|`(?P<code>[^`]+)`|\*\*(?P<bold>.+?)\*\*"
    r"|\[(?P<text>[^]]+)\]\((?P<url>[^)]+)\)|(?P<appendix>Appendix (?P<letter>[A-F]))"
    r"|(?P<eq>Eqs?\. (?P<number>\d+)(?:(?:-|, | and )\d+)*)"
    r"|(?P<note>notes? \d+(?:(?:, | and )\d+)*)"
)


def inline(text, anchors):
    """Markdown within a paragraph as HTML, with links to equations, functions and notes."""

    def element(m):
        if m["math"]:
            return f'<span class="whole">{math(m["math"])}{m["after"]}</span>'
        if m["bold"]:
            return f"<strong>{inline(m['bold'], anchors)}</strong>"
        if m["code"]:
            code = f"<code>{html.escape(m['code'], quote=False)}</code>"
            name = next((name for name in anchors if name.endswith(f".{m['code']}")), None)
            return f'<a href="#{name}">{code}</a>' if name else code
        if m["eq"]:
            return f'<a href="#eq{m["number"]}">{m["eq"]}</a>'
        if m["appendix"]:
            return f'<a href="#{m["letter"]}">{m["appendix"]}</a>'
        return f'<a href="{m["url"] or "notes.md"}">{m["text"] or m["note"]}</a>'

    pieces, end = [], 0
    for m in INLINE.finditer(text):
        pieces += [html.escape(text[end : m.start()], quote=False), element(m)]
        end = m.end()
    return "".join(pieces) + html.escape(text[end:], quote=False)


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


def equation(line):
    """A line $$ ... \\tag{3} $$ with its number, to which links lead."""
    tex, _, tag = line.strip("$ ").partition("\\tag{")
    number = tag.rstrip("} ")
    small = " small" if tex.startswith("\\small ") else ""
    try:
        formula = math(tex.removeprefix("\\small "), display=True)
    except (ValueError, KeyError) as error:
        bad(f"{line}: {error}")
    if not number:
        return f'<div class="eq{small}">{formula}</div>'
    link = f'<a href="#eq{number}">({number})</a>'
    return f'<div class="eq{small}" id="eq{number}">{formula}{link}</div>'


# ----------------------------------------------------------------------------- the right: the code
class Source(NamedTuple):
    """A file: its lines, the first and last line of each name in it, and what it imports."""

    lines: list
    tokens: list  # pairs of a token's kind and text, for each line
    places: dict
    imports: dict  # a name in this file -> module.name


@functools.cache
def read_source(module):
    """The Source of a module of the repository."""
    text = (DOCS.parent / f"{module.replace('.', '/')}.py").read_text("utf-8")
    places, imports = {}, {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom):
            imports |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        for name, part in named(node):
            first = min([part.lineno, *(d.lineno for d in getattr(part, "decorator_list", []))])
            places[name] = first, part.end_lineno
    tokens = [[]]
    for kind, piece in PythonLexer(stripnl=False, ensurenl=False).get_tokens(text):
        first, *others = piece.split("\n")
        tokens[-1].append((kind, first))
        tokens += [[(kind, other)] for other in others]
    return Source(text.split("\n"), tokens, places, imports)


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
    source = read_source(module)
    if name not in source.places:
        bad(f"there is no {wanted['name']}")
    first, last = source.places[name]

    def find(text, start):
        found = [n for n in range(start, last + 1) if text in source.lines[n - 1]]
        return found[0] if found else bad(f"{name} has no line with {text}")

    first = find(wanted["start"], first) if wanted["start"] else first
    last = find(wanted["end"], first + 1) - 1 if wanted["end"] else last
    while not source.lines[last - 1].strip():
        last -= 1
    return module, name, first, last


KINDS = {Comment: "c", String: "s", Number: "n", Keyword: "k", Operator.Word: "k"}
KINDS |= {Name.Function: "f", Name.Class: "f", Name.Decorator: "d"}


def coloured(module, number, anchors):
    """A line of code as HTML: <i class=...> for the colours, links to functions and equations."""
    source, pieces, before = read_source(module), [], ""
    for kind, text in source.tokens[number - 1]:
        escaped = html.escape(text, quote=False)
        colour = next((KINDS[known] for known in KINDS if kind in known), None)
        target = source.imports.get(text, f"{module}.{text}")
        if colour is None and target in anchors and before != ".":
            escaped = f'<a href="#{target}">{escaped}</a>'
        if colour is None and text.endswith("("):
            escaped += "<wbr/>"  # where a narrow screen may break a line
        if colour in ("c", "s"):
            escaped = re.sub(r"Eqs?\. (\d+)(-\d+)?", r'<a href="#eq\1">\g<0></a>', escaped)
        if pieces and pieces[-1][0] == colour:
            escaped = pieces.pop()[1] + escaped
        pieces.append((colour, escaped))
        before = text[-1:] or before
    return "".join(f'<i class="{c}">{x}</i>' if c and x else x for c, x in pieces)


def listing(wanted, anchors, seen):
    """The lines that a match of CODE names, as HTML; `seen`: the addresses that are taken."""
    module, name, first, last = locate(wanted)
    source, file = read_source(module), module.replace(".", "/") + ".py"
    known = "again" if f"{module}-{first}" in seen else "continued"
    lines = []
    for number in range(first, last + 1):
        text, address = source.lines[number - 1], f"{module}-{number}"
        indent = len(text) - len(text.lstrip())
        where = "" if address in seen else f' id="{address}"'
        seen.add(address)
        link = f'<a href="#{address}">{number}</a>'
        code = coloured(module, number, anchors)
        lines.append(f'<span class="i{indent}"{where}>{link}{code}\n</span>')
    anchor = f"{module}.{name}"
    where = "" if anchor in seen else f' id="{anchor}"'
    seen.add(anchor)
    more = "" if first == source.places[name][0] else f", {known}"
    caption = f'<figcaption>{file} <a href="#{anchor}">{name}</a>{more}</figcaption>'
    return f"<figure{where}>{caption}<pre>{''.join(lines)}</pre></figure>"


# ------------------------------------------------------------------------------------- the page
STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1f2328; --dim: #59636e; --code: #f6f8fa;
  --line: #d1d9e0; --link: #0758b8; --mark: #fff3bf; --k: #b31d28; --s: #0a3069; --n: #0550ae;
  --f: #6f42c1; --open: #9a6700;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace }
@media screen and (prefers-color-scheme: dark) { :root { --bg: #0d1117; --fg: #e6edf3;
  --dim: #9198a1; --code: #151b23; --line: #3d444d; --link: #6cb6ff; --mark: #3b3212; --k: #ff7b72;
  --s: #a5d6ff; --n: #79c0ff; --f: #d2a8ff; --open: #d29922 } }
* { box-sizing: border-box }
html { scroll-padding-top: 1rem; -webkit-text-size-adjust: 100%; text-size-adjust: 100% }
body { margin: 0; background: var(--bg); color: var(--fg);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif }
a { color: var(--link); text-decoration: none } a:hover { text-decoration: underline }
header, footer { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1.25rem }
footer { color: var(--dim); font-size: .875rem }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem }
h2 { font-size: 1.15rem; line-height: 1.3; margin: 0 0 .75rem } h2 a { color: inherit }
p, ul, blockquote { margin: .6rem 0 }
nav table { border-collapse: collapse; font-size: .875rem; width: 100%; margin-top: 1rem }
nav td { padding: .2rem 1rem .2rem 0; word-spacing: .1rem; vertical-align: top;
  border-top: 1px solid var(--line) }
@media (min-width: 801px) { nav td:nth-child(2) { white-space: nowrap } }
.row { display: grid; grid-template-columns: minmax(0, 1fr) auto;
  border-top: 1px solid var(--line) }
.row + .row { border-top-style: dashed }
.text { container-type: inline-size }
.text > div { padding: 1rem 1.25rem; max-width: 38rem; margin-left: auto; position: sticky; top: 0 }
.text > div > :first-child { margin-top: 0 }
.text ul { padding-left: 1.1rem; font-size: .9rem }
.text li { margin: .15rem 0 }
.open { font-size: .9rem; border-left: 3px solid var(--open); padding-left: .6rem }
blockquote { margin-left: 0; padding: .5rem .75rem; background: var(--code); border-radius: 6px }
.whole { white-space: nowrap }
math { font-family: "STIX Two Math", "Cambria Math", "Latin Modern Math", "TeX Gyre Termes Math",
  "Libertinus Math", "DejaVu Math TeX Gyre", "Noto Sans Math", math; font-size: 1.06em;
  font-size-adjust: .45 }
.eq { display: grid; grid-template-columns: minmax(0, 1fr) auto; align-items: center; gap: .4rem;
  margin: .7rem 0; font-size: min(1rem, (100cqi - 5rem) / 22) }
.eq math { margin: 0 } .eq > a { font-size: 1rem }
.eq.small { font-size: min(1rem, (100cqi - 5rem) / 32) }
@container (max-width: 30rem) {
  .eq.small { display: block; font-size: calc((100cqi - 2.5rem) / 32) }
  .eq.small > a { display: block; text-align: right } }
.listings { background: var(--code); --size: clamp(11px, (100vw - 22rem) / 67, 13px);
  font: var(--size)/1.5 var(--mono); width: 108ch; padding: .6rem 0 }
figure { margin: 0 } figure + figure { margin-top: 1rem }
figcaption { color: var(--dim); padding: .3rem 0 .3rem 5ch }
code { font-family: var(--mono); font-size: .86em }
pre { margin: 0; font: inherit; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4 }
pre span { display: block; padding-left: calc(5ch + var(--i, 0ch) + 4ch);
  text-indent: calc(-9ch - var(--i, 0ch)); padding-right: 1ch }
pre span > a:first-child { display: inline-block; width: 5ch; padding-right: 1.5ch; text-indent: 0;
  text-align: right; color: var(--dim); user-select: none; -webkit-user-select: none }
pre i { font-style: normal } .c { color: var(--dim) } .s { color: var(--s) } .n { color: var(--n) }
.k { color: var(--k) } .f, .d { color: var(--f) } .f { font-weight: 600 }
.i4 { --i: 4ch } .i8 { --i: 8ch } .i12 { --i: 12ch } .i16 { --i: 16ch } .i20 { --i: 20ch }
pre :target, .eq:target { background: var(--mark) }
@media (max-width: 1080px) { .row { display: block } .text > div { position: static; margin: 0;
    max-width: 44rem; padding-bottom: .25rem }
  .listings { width: auto; --size: min((100vw - 1rem) / 66, 13px) } }
@media (max-width: 800px) { nav td { display: inline; border: 0; padding: 0 .5rem 0 0 }
  nav tr { display: block; padding: .35rem 0; border-top: 1px solid var(--line) }
  pre span { padding-left: calc(4ch + var(--i, 0ch) + 4ch);
    text-indent: calc(-8ch - var(--i, 0ch)) }
  pre span > a:first-child { width: 4ch; padding-right: 1ch }
  figcaption { padding-left: 4ch }
  .listings { --size: max(12px, (100vw - 1rem) / 66); padding-left: .3rem } }
@media print { @page { margin: 14mm } html { font-size: 10pt } body { font-size: 1rem }
  .row { display: block }
  .text > div { position: static; max-width: none; margin: 0; padding: .5rem 0 }
  .listings { width: auto; --size: 7.6pt } h2, figcaption, .eq, blockquote { break-after: avoid }
  figure, .eq, li { break-inside: avoid } header, footer { max-width: none; padding: 0 }
  a { color: inherit } }
"""


def contents(sections, anchors):
    """The table of contents: a row a section, its equations and its functions."""
    rows = []
    for heading, parts_ in sections:
        text = "\n".join("\n".join(row.text) for row in parts_)
        equations = [f'<a href="#eq{n}">{n}</a>' for n in re.findall(r"\\tag\{(\d+)\}", text)]
        label = ("Eq. " if len(equations) == 1 else "Eqs. ") if equations else ""
        names = dict.fromkeys(m["name"] for row in parts_ for m in row.code)
        links = [f'<a href="#{name}"><code>{short(name)}</code></a>' for name in names]
        cells = [f'<a href="#{section_id(heading)}">{heading}</a>', label + ", ".join(equations)]
        rows.append("".join(f"<td>{cell}</td>" for cell in [*cells, " ".join(links)]))
    return f"<nav><table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table></nav>"


def short(name):
    """talas.ASAM.restore -> ASAM.restore."""
    return re.sub(r"^(support\.)?\w+\.", "", name)


def section_id(heading):
    """The address of a section: its number, or its first words."""
    first, second, *_ = heading.split()
    if first == "Appendix":
        return second
    return first if first[0].isdigit() else f"{first}-{second}"


def page():
    """reading.html."""
    title, introduction, sections = read_notes()
    anchors = dict.fromkeys(m["name"] for _, rows in sections for row in rows for m in row.code)
    seen, body = set(), []
    for heading, rows in sections:
        address = section_id(heading)
        left = f'<h2><a href="#{address}">{heading}</a></h2>'
        body.append(f'<section id="{address}">')
        for row in rows:
            left += "".join(block(text, anchors) for text in row.text)
            code = "".join(listing(wanted, anchors, seen) for wanted in row.code)
            right = f'<div class="listings">{code}</div>'
            body.append(f'<div class="row"><div class="text"><div>{left}</div></div>{right}</div>')
            left = ""
        body.append("</section>")
    head = f"<h1>{title}</h1>" + "".join(block(text, anchors) for text in introduction)
    width = '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
    parts_ = [
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>{width}',
        f"<title>{title}</title><style>{STYLE}</style></head><body>",
        f"<header>{head}{contents(sections, anchors)}</header>",
        f"<main>{''.join(body)}</main>",
        "<footer><p>The equations and the lines of Algorithm 1 are the paper's (Dao et al., 2026, ",
        "CC BY 4.0). The sentences around them and the code are ours.</p></footer></body></html>",
    ]
    return "\n".join(parts_) + "\n"


def uncoloured(text):
    """The page without what may change with pygments' version."""
    return re.sub(r'<i class="\w">|</i>|<wbr/>', "", text)


def main(argv):
    """Write the page, or check it."""
    made = page()
    if argv == ["--check"]:
        there = PAGE.read_text("utf-8") if PAGE.exists() else ""
        if uncoloured(there) != uncoloured(made):
            raise SystemExit("docs/reading.html is stale; run: python docs/reading.py")
    elif argv:
        raise SystemExit("usage: python docs/reading.py [--check]")
    else:
        PAGE.write_text(made, "utf-8", newline="\n")
        print(f"{PAGE.name}: {len(made.encode()) / 1000:.0f} KB")


if __name__ == "__main__":
    main(sys.argv[1:])
