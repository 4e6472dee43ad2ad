"""Writes reading.html, the paper and the code side by side: reading.txt, notes.md and the sources.

    pip install latex2mathml==3.81.1 pygments==2.21.0
    python docs/reading.py

reading.txt is Markdown with little in it: ## sections, paragraphs, lists, > lines of the paper's
Algorithm 1, $ and $$ formulas in TeX. A line such as

    => talas.train

puts the function or class of that name beside the text above it.
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
MORE = r"((-|, | and )\d+)*"  # numbers, after a first one


def stop(message):
    """End the program: reading.txt needs mending."""
    raise SystemExit(f"error: docs/reading.txt: {message}")


# ---------------------------------------------------------------------------- the left: the paper
def math(tex, display="inline"):
    """A formula as a <math> element; ends the program at a command that the library lacks."""
    formula = convert(html.unescape(tex), xmlns="", display=display).replace(' xmlns=""', "")
    braces = tex.replace(r"\{", "").replace(r"\}", "")
    if "\\" in formula or braces.count("{") != braces.count("}"):
        stop(f"not understood: {tex}")
    # a hat that does not stretch fits its letter
    return formula.replace("<mo>&#x0005E;", '<mo stretchy="false">&#x0005E;')


def equation(line):
    """A line $$ ... \\tag{3} $$ as a block; its number is an address."""
    tex, _, tag = line.strip("$ ").partition("\\tag{")
    formula = math(tex.removeprefix("\\small "), "block")
    kind = "eq small" if tex.startswith("\\small ") else "eq"
    if not tag:
        return f'<div class="{kind}">{formula}</div>'
    number = tag.rstrip("} ")
    link = f'<a href="#eq{number}">({number})</a>'
    return f'<div class="{kind}" id="eq{number}">{formula}{link}</div>'


def inline(text, links):
    """A paragraph as HTML; what it names becomes a link. links: {name: address on the page}."""

    def formula(match):
        return f'<span class="whole">{math(match[1])}{match[2]}</span>'

    def notes(match):
        return re.sub(r"\d+", r'<a href="#note\g<0>">\g<0></a>', match[0])

    def code(match):
        element = f"<code>{match[1]}</code>"
        if match[1] not in links:
            return element
        return f'<a href="#{links[match[1]]}">{element}</a>'

    text = html.escape(text, quote=False)
    text = re.sub(r"\$([^$]+)\$([.,;:)]*)", formula, text)
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    text = re.sub(r"\[([^]]+)\]\(((?:https://|#)[^)]+)\)", r'<a href="\2">\1</a>', text)
    text = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", text)  # a file may not be beside the page
    text = re.sub(r"Appendix ([A-F])", r'<a href="#\1">\g<0></a>', text)
    text = re.sub(rf"Eqs?\. (\d+){MORE}", r'<a href="#eq\1">\g<0></a>', text)
    text = re.sub(rf"\b[Nn]otes? \d+{MORE}", notes, text)
    return re.sub("`([^`]+)`", code, text)


def block(text, links):
    """A paragraph, a list, formulas or lines of Algorithm 1 as HTML."""
    lines = text.split("\n")
    if text.startswith("$$"):
        return "".join(equation(line) for line in lines)
    if text.startswith("- "):
        items = [f"<li>{inline(line[2:], links)}</li>" for line in lines]
        return f"<ul>{''.join(items)}</ul>"
    if text.startswith("> "):
        quoted = [inline(line[2:], links) for line in lines]
        return f"<blockquote>{'<br/>'.join(quoted)}</blockquote>"
    if text.startswith("Open:"):
        text = text.replace("Open:", "**Open:**", 1)
        return f'<p class="open">{inline(text, links)}</p>'
    return f"<p>{inline(' '.join(lines), links)}</p>"


def notes(links):
    """notes.md as HTML: its introduction, and its numbered list."""
    text = (DOCS / "notes.md").read_text("utf-8").split("\n", 1)[1]
    first, *items = re.split(r"^\d+\. ", text, flags=re.MULTILINE)
    body = f"<p>{inline(first, links)}</p><ol>"
    for number, item in enumerate(items, 1):
        body += f'<li id="note{number}">{inline(" ".join(item.split()), links)}</li>'
    return f"{body}</ol>"


# ----------------------------------------------------------------------------- the right: the code
@functools.cache
def definitions(file):
    """{name: source} of a file's functions and classes."""
    text = (DOCS.parent / file).read_text("utf-8")
    lines = text.split("\n")
    sources = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            starts = [node, *node.decorator_list]
            first = min(start.lineno for start in starts)
            sources[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return sources


def listing(name, links):
    """The code of that name, such as talas.tamd_loss, as a figure."""
    module, _, short = name.rpartition(".")
    file = f"{module.replace('.', '/')}.py"
    if short not in definitions(file):
        stop(f"there is no {name}")
    lexer = PythonLexer(stripnl=False, ensurenl=False)
    code = highlight(definitions(file)[short], lexer, HtmlFormatter(nowrap=True))

    def linked(match):
        target = links.get(match[1], "")
        if module == "talas" or target.startswith(module):  # another file's name may mean another
            return f'<a href="#{target}">{match[1]}</a>' if target else match[1]
        return match[1]

    code = re.sub(r'(?<!<span class="o">\.</span>)<span class="n">(\w+)</span>', linked, code)
    code = re.sub(r'<span class="(?:n|o|p|w|nb|bp|nn)">(.*?)</span>', r"\1", code)  # no colour
    code = re.sub(r"Eqs?\. (\d+)(-\d+)?", r'<a href="#eq\1">\g<0></a>', code)
    caption = f'<figcaption>{file} <a href="#{name}">{short}</a></figcaption>'
    return f'<figure id="{name}">{caption}<pre>{code}</pre></figure>'


# ---------------------------------------------------------------------------------------- the page
def section_id(heading):
    """The address of a section: its number or letter, else its first word."""
    return heading.removeprefix("Appendix ").split()[0]


def row(left, right):
    """A row of the page."""
    text = f'<div class="text"><div>{left}</div></div>'
    return f'<div class="row">{text}<div class="listings">{right}</div></div>\n'


def section(heading, text, links):
    """A section as HTML; a new row begins after code."""
    address = section_id(heading)
    left, right = f'<h2><a href="#{address}">{heading}</a></h2>', ""
    rows = []
    for part in text.strip().split("\n\n"):
        if part.startswith("=> "):
            right += "".join(listing(line[3:], links) for line in part.split("\n"))
            continue
        if right:
            rows.append(row(left, right))
            left, right = "", ""
        left += block(part, links)
    rows.append(row(left, right))
    return f'<section id="{address}">\n{"".join(rows)}</section>\n'


def contents(sections):
    """The table of contents: a row a section, with its equations and its functions."""
    rows = []
    for heading, text in sections:
        equations = [f'<a href="#eq{n}">Eq. {n}</a>' for n in re.findall(r"\\tag\{(\d+)\}", text)]
        names = []
        for name in re.findall(r"^=> (.+)", text, re.MULTILINE):
            names.append(f'<a href="#{name}"><code>{name.rpartition(".")[2]}</code></a>')
        title = f'<a href="#{section_id(heading)}">{heading}</a>'
        rows.append(
            f"<tr><td>{title}</td><td>{', '.join(equations)}</td><td>{' '.join(names)}</td></tr>"
        )
    rows.append('<tr><td colspan="3"><a href="#notes">Notes</a></td></tr>')
    return f"<nav><table>{''.join(rows)}</table></nav>"


def page():
    """reading.html."""
    source = (DOCS / "reading.txt").read_text("utf-8")
    head, *parts = re.split(r"^## (.+)\n", source.partition("\n# ")[2], flags=re.MULTILINE)
    title, *introduction = head.strip().split("\n\n")
    sections = list(zip(parts[::2], parts[1::2]))
    names = re.findall(r"^=> (.+)", source, re.MULTILINE)
    links = {name.rpartition(".")[2]: name for name in names}
    before = "".join(block(text, links) for text in introduction)
    body = "".join(section(heading, text, links) for heading, text in sections)
    style = (DOCS / "reading.css").read_text("utf-8")
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{title}</title><style>
{style}</style></head><body>
<header><h1>{title}</h1>{before}{contents(sections)}</header>
<main>
{body}<section id="notes"><h2><a href="#notes">Notes</a></h2>
{notes(links)}</section>
</main>
<footer><p>The equations and the lines of Algorithm 1 are the paper's (Dao et al., 2026, CC BY 4.0).
The sentences around them and the code are ours.</p></footer></body></html>
"""


def main():
    """Write the page."""
    text = page()
    PAGE.write_text(text, "utf-8", newline="\n")
    print(f"{PAGE.name}: {len(text.encode()) / 1000:.0f} KB")


if __name__ == "__main__":
    main()
