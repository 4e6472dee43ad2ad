"""docs/reading.html: up to date, complete, well formed, and it loads nothing."""

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reading.html"
SOURCES = ["talas.py", "cache_teacher.py", "eval.py", "support", "docs"]
EQUATIONS = {  # as their letters follow one another in the paper's TeX
    1: "LKD=D(zS(x),zT(x))",
    2: "minwmax‖Tw−1ε‖2≤ρL(w+ε)",
    3: "LTAMD(l)=1N∑i=1NDcos(el,iSWl,eiT)",
    4: "RlS=E~lS(E~lS)⊤",
    5: "LLASD=1L−1∑l=1L−11N2‖Rl+1S−RlS‖F2",
    6: "LSimCSE=−1N∑i=1Nlogesim(eiz,eiz′)/τ∑j=1Nesim(eiz,ejz′)/τ",
    7: "Ltotal=λ1LSimCSE+λ2LTAMD+λ3LLASD",
    8: "minθmax‖ε‖2≤ρL(θ+ε)",
    9: "ε^=ρ∇θL(θ)‖∇θL(θ)‖2",
    10: "LDISAM(w)=max‖ε‖2≤ρ[∑i=1MαiLi(w+ε)−λVar{Li(w+ε)}i=1M]",
    11: "V(w+ε)=Var{Li(w+ε)}i=1M",
    12: "V(w+ε)=12M2∑i=1M∑j=1M(Li(w+ε)−Lj(w+ε))2",
}
ORDER = [  # the paper's
    "ASAM", "ASAM.ascent_step", "ASAM.descent_step", "embed", "tamd_loss", "relation_matrix",
    "lasd_loss", "simcse_loss", "total_loss", "Objective", "set_up", "train", "batches",
    "training_step", "largest_hessian_eigenvalue", "measure_sharpness", "disam_objective",
    "Settings", "parse_settings", "main",
]  # fmt: skip


@pytest.fixture(scope="module")
def tree():
    """The page as a tree; an error if a tag is left open or a sign is not escaped."""
    return ElementTree.fromstring(PAGE.read_text("utf-8"))


@pytest.fixture(scope="module")
def reading():
    """The module docs/reading.py."""
    spec = importlib.util.spec_from_file_location("reading", ROOT / "docs" / "reading.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def addresses(tree):
    """Every id on the page, in order."""
    return [element.get("id") for element in tree.iter() if element.get("id")]


def shown(tree):
    """{(module, line number): the line as it stands on the page}."""
    lines = {}
    for line in tree.iterfind(".//pre/span"):
        number, *_ = line
        module = number.get("href").removeprefix("#").rpartition("-")[0]
        text = "".join(line.itertext()).removeprefix(number.text).removesuffix("\n")
        lines[module, int(number.text)] = text
    return lines


def test_the_page_is_up_to_date():
    command = [sys.executable, ROOT / "docs" / "reading.py", "--check"]
    check = subprocess.run(command, capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


def test_a_change_makes_the_page_stale(tmp_path):
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)

    def run(*arguments):
        command = [sys.executable, tmp_path / "docs" / "reading.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    def replace(name, old, new):
        text = (tmp_path / name).read_text("utf-8")
        assert old in text
        (tmp_path / name).write_text(text.replace(old, new, 1), "utf-8")

    run()
    assert run("--check").returncode == 0
    replace("docs/reading.html", '<i class="k">', '<i class="s">')  # another version of pygments
    assert run("--check").returncode == 0
    replace("talas.py", "def tamd_loss", "\ndef tamd_loss")  # the same, a line further down
    assert run("--check").returncode == 1
    run()
    replace("docs/reading.md", "is the anchor of", "is the anchor for")
    assert run("--check").returncode == 1
    run()
    (tmp_path / "docs/reading.html").unlink()
    assert run("--check").returncode == 1
    replace("talas.py", "def lasd_loss", "def another_loss")
    result = run()
    assert result.returncode == 1
    assert result.stderr == "error: docs/reading.md: there is no talas.lasd_loss\n"


def test_talas_is_there_in_full(tree):
    """Every line of every function and class; all other lines that are shown are verbatim, too."""
    lines = shown(tree)
    source = (ROOT / "talas.py").read_text("utf-8").split("\n")
    definitions = [
        node for node in ast.parse("\n".join(source)).body if hasattr(node, "name")
    ]  # functions and classes
    assert len(definitions) > 10
    for node in definitions:
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        wanted = range(first, node.end_lineno + 1)
        missing = [n for n in wanted if source[n - 1] and ("talas", n) not in lines]
        assert not missing, f"{node.name}: lines {missing} are not on the page"
    for (module, number), text in lines.items():
        path = ROOT / f"{module.replace('.', '/')}.py"
        assert text == path.read_text("utf-8").split("\n")[number - 1]
    others = {module for module, _ in lines} - {"talas"}
    assert others == {"cache_teacher", "eval", "support.encoder", "support.data", "support.run"}


def test_equations_are_the_papers(tree):
    found = {}
    for element in tree.iter():
        if number := re.fullmatch(r"eq(\d+)", element.get("id") or ""):
            text = "".join(element.find("math").itertext())
            found[int(number[1])] = unicodedata.normalize("NFKC", text)
    assert list(found) == list(EQUATIONS)
    assert found == EQUATIONS


def test_the_order_is_the_papers(tree):
    ids = addresses(tree)
    places = [ids.index(f"talas.{name}") for name in ORDER]
    assert places == sorted(places)
    headings = [h2.find("a").get("href") for h2 in tree.iter("h2")]
    parts = ["2", "3", "3.1", "3.2", "3.3", "Algorithm-1", "4.1", "5", "B", "C", "D", "E"]
    assert headings == [f"#{part}" for part in [*parts, "The-command"]]


def test_algorithm_1_line_by_line(tree):
    """Each line of the paper stands beside the line of training_step or train that does it."""
    code = {
        "5": "for epoch in range(",
        "6": "for rows in batches(",
        "7": "corpus.batch(rows)",
        "9": "loss.backward()",
        "11": "asam.ascent_step()",
        "13": "perturbed_loss.backward()",
        "15": "asam.descent_step()",
        "17": "log.step(",
    }
    found = {}
    for row in tree.iterfind(".//div[@class='row']"):
        for quote in row.iter("blockquote"):
            numbers = [b.text.split()[0] for b in quote.iter("strong") if b.text[0].isdigit()]
            right = "".join(row.find("div[@class='listings']").itertext())
            found |= {number: right for number in numbers if not number.endswith(".")}
    assert list(found) == ["3", *code]
    for number, text in code.items():
        assert text in found[number]


def test_links_lead_somewhere(tree):
    ids = Counter(addresses(tree))
    assert set(ids.values()) == {1}
    for link in tree.iter("a"):
        target = link.get("href")
        if target.startswith("#"):
            assert target[1:] in ids
        elif not target.startswith("https://"):
            assert (ROOT / "docs" / target).exists(), target


def test_notes_have_these_numbers(tree):
    notes = (ROOT / "docs" / "notes.md").read_text("utf-8")
    links = ["".join(a.itertext()) for a in tree.iter("a") if a.get("href") == "notes.md"]
    numbers = {number for text in links for number in re.findall(r"\d+", text)}
    assert len(numbers) > 10
    for number in numbers:
        assert re.search(rf"^\W*{number}\.", notes, re.MULTILINE), f"there is no note {number}"


def test_nothing_is_loaded(tree):
    loading = {"script", "link", "img", "iframe", "object", "embed", "video", "audio", "base"}
    for element in tree.iter():
        assert element.tag not in loading
        assert not {"src", "srcset", "data", "style", "onload"} & set(element.attrib)
        if "href" in element.attrib:
            assert element.tag == "a"  # followed by a click alone
    style = tree.find("head/style").text
    assert not re.search(r"url\(|@import|@font-face", style)
    for medium in ("prefers-color-scheme: dark", "max-width: 800px", "@media print"):
        assert medium in style
    assert PAGE.stat().st_size < 250_000


@pytest.mark.parametrize(
    ("tex", "inside"),
    [
        (r"\frac{1}{N}", "<mfrac><mrow><mn>1</mn></mrow><mrow><mi>N</mi></mrow></mfrac>"),
        ("w_l^2", "<msubsup><mi>w</mi><mi>l</mi><mn>2</mn></msubsup>"),
        ("w^2_l", "<msubsup><mi>w</mi><mi>l</mi><mn>2</mn></msubsup>"),
        (r"\sum_i^N", "<munderover><mo>∑</mo><mi>i</mi><mi>N</mi></munderover>"),
        (r"\mathbf{W} \mathcal{L}", "<mi>𝐖</mi><mi>ℒ</mi>"),
        (r"0.75 < x", "<mn>0.75</mn><mo>&lt;</mo><mi>x</mi>"),
    ],
)
def test_formulas(reading, tex, inside):
    assert reading.math(tex) == f"<math>{inside}</math>"


@pytest.mark.parametrize("tex", [r"\frac{1}", "{w", "w}", r"\unknown", "w_"])
def test_formulas_that_are_not_understood(reading, tex):
    with pytest.raises(ValueError):
        reading.math(tex)
