"""docs/reading.html: what the sources give, complete, well formed, and it loads nothing."""

import ast
import importlib
import re
import sys
import unicodedata
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reading.html"
EQUATIONS = [  # 1 to 12, as their letters follow one another in the paper's TeX
    "LKD=D(zS(x),zT(x))",
    "minwmax‖Tw−1ε‖2≤ρL(w+ε)",
    "LTAMD(l)=1N∑i=1NDcos(el,iSWl,eiT)",
    "RlS=E~lS(E~lS)⊤",
    "LLASD=1L−1∑l=1L−11N2‖Rl+1S−RlS‖F2",
    "LSimCSE=−1N∑i=1Nlogesim(eiz,eiz′)/τ∑j=1Nesim(eiz,ejz′)/τ",
    "Ltotal=λ1LSimCSE+λ2LTAMD+λ3LLASD",
    "minθmax‖ε‖2≤ρL(θ+ε)",
    "ε^=ρ∇θL(θ)‖∇θL(θ)‖2",
    "LDISAM(w)=max‖ε‖2≤ρ[∑i=1MαiLi(w+ε)−λVar{Li(w+ε)}i=1M]",
    "V(w+ε)=Var{Li(w+ε)}i=1M",
    "V(w+ε)=12M2∑i=1M∑j=1M(Li(w+ε)−Lj(w+ε))2",
]
LINES = {"5": "for epoch in ", "6": "for rows in ", "7": "corpus.batch(rows)"}  # of Algorithm 1
LINES |= {"9": "loss.backward()", "11": "asam.ascent_step()", "13": "perturbed_loss.backward()"}
LINES |= {"15": "asam.descent_step()", "17": "run.step("}


@pytest.fixture(scope="module")
def tree():
    """The page as a tree; an error if a tag is left open or a sign is not escaped."""
    return ElementTree.fromstring(PAGE.read_text("utf-8"))


def generator():
    """The module docs/reading.py, where the library for formulas is there."""
    pytest.importorskip("latex2mathml")
    sys.path.append(str(ROOT / "docs"))
    return importlib.import_module("reading")


def test_the_page_is_what_the_sources_give():
    """But for the colours, which change with pygments' version."""
    pages = PAGE.read_text("utf-8"), generator().page()
    there, made = (re.sub(r'<span class="\w\w?">|</span>', "", page) for page in pages)
    assert there == made, "docs/reading.html is stale; run: python docs/reading.py"


def test_what_is_not_understood_ends_in_one_line():
    reading = generator()
    for tex in (r"\frac{1", "w}", r"\unknown"):
        with pytest.raises(SystemExit, match=r"^error: docs/reading.txt: not understood: "):
            reading.math(tex)
    for line in ("=> talas.other", '=> talas.train from "no such text"', "=> talas.other from x"):
        with pytest.raises(SystemExit, match=r"^error: docs/reading.txt: .*other|no such text"):
            reading.section("1 One", line, {}, set())


def test_talas_is_there_in_full(tree):
    """Every line of every function and class; all other lines that are shown are verbatim, too."""
    shown = set()
    for line in tree.iterfind(".//pre/span"):
        module, _, number = line[0].get("href")[1:].rpartition("-")
        lines = (ROOT / f"{module.replace('.', '/')}.py").read_text("utf-8").split("\n")
        assert "".join(line.itertext()) == f"{number}{lines[int(number) - 1]}\n"
        shown.add((module, int(number)))
    source = (ROOT / "talas.py").read_text("utf-8")
    definitions = [node for node in ast.parse(source).body if hasattr(node, "name")]
    assert len(definitions) > 10
    for node in definitions:
        wanted = range(node.lineno, node.end_lineno + 1)
        missing = {n for n in wanted if source.split("\n")[n - 1] and ("talas", n) not in shown}
        assert not missing, f"{node.name}: lines {missing} are not on the page"
    assert {module for module, _ in shown} > {"cache_teacher", "eval", "support.encoder"}


def test_equations_and_algorithm_1_are_the_papers(tree):
    """In its order; each line of Algorithm 1 beside the code that does it."""
    equations = [x for x in tree.iter() if re.fullmatch(r"eq\d+", x.get("id") or "")]
    assert [x.get("id") for x in equations] == [f"eq{n}" for n in range(1, 13)]
    texts = ["".join(x.find("math").itertext()) for x in equations]
    assert [unicodedata.normalize("NFKC", text) for text in texts] == EQUATIONS
    found = {}
    for row in tree.iterfind(".//div[@class='row']"):
        for bold in row.iterfind(".//blockquote/strong"):
            found[bold.text] = "".join(row.find("div[@class='listings']").itertext())
    assert [text for text in found if text.isdigit()] == ["3", *LINES]
    assert all(code in found[number] for number, code in LINES.items())


def test_links_lead_somewhere_and_nothing_is_loaded(tree):
    """On the page itself, where the notes stand, too, or on the web: a file may be elsewhere."""
    ids = [element.get("id") for element in tree.iter() if element.get("id")]
    targets = {link.get("href") for link in tree.iter("a")}
    assert len(set(ids)) == len(ids) and len([t for t in targets if t.startswith("#note")]) > 10
    in_code = {link.get("href") for link in tree.iterfind(".//pre//a")}
    assert {"#talas.total_loss", "#talas.ASAM", "#support.encoder.pool", "#eq5"} <= in_code
    for target in targets:
        assert target[1:] in ids if target[0] == "#" else target.startswith("https://")
    loading = {"script", "link", "img", "iframe", "object", "embed", "video", "audio", "base"}
    for element in tree.iter():
        assert element.tag not in loading
        assert not {"src", "srcset", "data", "style", "onload"} & set(element.attrib)
        assert "href" not in element.attrib or element.tag == "a"  # followed by a click alone
    assert not re.search(r"url\(|@import", tree.find("head/style").text)
