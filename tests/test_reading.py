"""docs/reading.html: what its sources give, complete, well formed, and it loads nothing."""

import ast
import re
import sys
import unicodedata
from xml.etree import ElementTree

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


HTML = reading.PAGE.read_text("utf-8")
TREE = ElementTree.fromstring(HTML)  # an error if a tag is open or a character is not escaped


def text_of(element):
    return "".join(element.itertext())


def test_the_page_is_what_the_sources_give():
    colours = r'<span class="\w\w?">|</span>'  # they change with pygments' version
    expected = re.sub(colours, "", reading.page())
    assert re.sub(colours, "", HTML) == expected, "it is stale; run: python docs/reading.py"


def test_every_function_of_talas_is_shown():
    for node in ast.parse((ROOT / "talas.py").read_text("utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert f'<figure id="talas.{node.name}">' in HTML


def test_equations_are_the_papers_in_its_order():
    equations = [element for element in TREE.iter("div") if element.get("id")]
    assert [element.get("id") for element in equations] == [f"eq{n}" for n in range(1, 13)]
    for element, letters in zip(equations, EQUATIONS):
        assert unicodedata.normalize("NFKC", text_of(element.find("math"))) == letters


def test_links_lead_somewhere_and_nothing_is_loaded():
    ids = [element.get("id") for element in TREE.iter() if element.get("id")]
    targets = {link.get("href") for link in TREE.iter("a")}
    for target in targets:
        assert target.startswith("https://") or target[1:] in ids
    assert {"#note21", "#eq12", "#B"} < targets
    links_in_code = {link.get("href") for link in TREE.iterfind(".//pre//a")}
    assert {"#talas.total_loss", "#talas.ASAM", "#eq5"} < links_in_code
    assert not re.search(r"<(script|link|img|iframe|object|embed)|src=|url\(|@import", HTML)
