"""docs/reading.html: what its sources give, complete, well formed, and it loads nothing."""

import ast
import re
import sys
import unicodedata
from xml.etree import ElementTree

import pytest
from helpers import ROOT

sys.path.append(str(ROOT / "docs"))

import reading

EQUATIONS = [  # 1 to 12: the letters of the paper's TeX, in their order
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


@pytest.fixture(scope="module")
def tree():
    """The page as a tree; an error if a tag is left open or a character is not escaped."""
    return ElementTree.fromstring(reading.PAGE.read_text("utf-8"))


def text_of(element):
    return "".join(element.itertext())


def without_colours(page):
    """Colours change with pygments' version."""
    return re.sub(r'<span class="\w\w?">|</span>', "", page)


def test_the_page_is_what_the_sources_give():
    page = reading.PAGE.read_text("utf-8")
    assert without_colours(page) == without_colours(reading.page()), (
        "docs/reading.html is stale; run: python docs/reading.py"
    )


@pytest.mark.parametrize("tex", [r"\frac{1", "w}", r"\unknown"])
def test_a_formula_that_is_not_understood(tex):
    with pytest.raises(SystemExit, match=r"^error: docs/reading.txt: not understood: "):
        reading.math(tex)


def test_a_function_that_is_missing():
    with pytest.raises(SystemExit, match=r"^error: docs/reading.txt: there is no talas.other$"):
        reading.section("1 One", "=> talas.other", {})


def test_every_function_of_talas_is_shown_in_full(tree):
    source = (ROOT / "talas.py").read_text("utf-8")
    shown = {}
    for figure in tree.iter("figure"):
        shown[figure.get("id")] = text_of(figure.find("pre"))
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert ast.get_source_segment(source, node) in shown[f"talas.{node.name}"]
    assert {"cache_teacher.main", "eval.score", "support.encoder.pool"} < set(shown)


def test_equations_are_the_papers_in_its_order(tree):
    equations = {}
    for element in tree.iter("div"):
        if element.get("id"):
            letters = unicodedata.normalize("NFKC", text_of(element.find("math")))
            equations[element.get("id")] = letters
    assert list(equations) == [f"eq{number}" for number in range(1, 13)]
    assert list(equations.values()) == EQUATIONS


def test_lines_of_algorithm_1_are_beside_their_function(tree):
    functions = {}
    for row in tree.findall(".//section[@id='Algorithm']/div"):
        for line in row.findall(".//blockquote/strong"):
            functions[line.text] = [figure.get("id") for figure in row.iter("figure")]
    for line in ("5", "6", "7", "17"):
        assert functions[line] == ["talas.train", "talas.batches"]
    for line in ("9", "11", "13", "15"):
        assert functions[line][0] == "talas.training_step"


def test_links_lead_somewhere_and_nothing_is_loaded(tree):
    ids = [element.get("id") for element in tree.iter() if element.get("id")]
    assert len(set(ids)) == len(ids)
    targets = {link.get("href") for link in tree.iter("a")}
    for target in targets:
        assert target[1:] in ids if target.startswith("#") else target.startswith("https://")
    assert {"#note21", "#eq12", "#B"} < targets
    links_in_code = {link.get("href") for link in tree.iterfind(".//pre//a")}
    assert {"#talas.total_loss", "#talas.ASAM", "#support.encoder.pool", "#eq5"} <= links_in_code
    for element in tree.iter():
        assert element.tag not in ("script", "link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "srcset", "data", "style", "onload"} & set(element.attrib)
    assert not re.search(r"url\(|@import", tree.find("head/style").text)
