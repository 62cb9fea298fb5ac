"""The documentation is true: code blocks of its pages run, docstring examples hold, gallery pages say all they must."""

import contextlib
import doctest
import importlib
import importlib.util
import pkgutil
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import saccade
from saccade.testing.ambient import isolated
from saccade.testing.healthy import Sliding

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(page for page in DOCS.rglob("*.md") if "gallery" not in page.parts),
]
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.M | re.S)
CAPTION = re.compile(r"^:caption: (\S+)\n", re.M)
MODULES = [
    found.name
    for found in pkgutil.walk_packages(saccade.__path__, "saccade.")
    # Importing the first runs the command line, the other one needs vLLM (see tests/plugin).
    if not found.name.endswith(("__main__", "vllm.backend"))
]


def python_blocks(text):
    """(line of the first statement, caption or None, source) of each block of Python of a Markdown page."""
    for found in FENCE.finditer(text):
        if found["info"].strip() not in ("python", "{code-block} python"):
            continue
        body, start = found["body"], found.start("body")
        caption = CAPTION.match(body)
        if caption:
            body, start = body[caption.end() :], start + caption.end()
        yield text.count("\n", 0, start), caption and caption[1], body


def run_page(page, folder):
    """Run a page's blocks as one module, at the lines where they stand; a block with a file name becomes that file."""
    lines = []
    for line, caption, source in python_blocks(page.read_text(encoding="utf-8")):
        if caption:
            (folder / caption).write_text(source, encoding="utf-8")
        else:
            lines += [""] * (line - len(lines)) + source.split("\n")
    path = folder / f"page_{page.stem}.py"
    path.write_text("\n".join(lines), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # so that classes made in it know their source
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def importing(*folders):
    """Modules of these folders can be imported inside, and are forgotten afterwards."""
    before = set(sys.modules)
    sys.path[:0] = map(str, folders)
    try:
        yield
    finally:
        del sys.path[: len(folders)]
        for name in set(sys.modules) - before:
            origin = getattr(sys.modules[name], "__file__", None) or ""
            if origin.startswith(tuple(map(str, folders))):
                del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with importing(tmp_path), isolated():
        torch.set_num_threads(1)
        run_page(page, tmp_path)


def test_a_false_page_fails(tmp_path):
    """A block that raises is seen, at its own line."""
    page = tmp_path / "false.md"
    page.write_text("# False\n\nText.\n\n```python\nx = 1\n```\n\n```sh\nfalse\n```\n\n```python\nassert x == 2\n```\n")
    with importing(tmp_path), pytest.raises(AssertionError) as raised:
        run_page(page, tmp_path)
    assert raised.traceback[-1].lineno + 1 == 14


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(name)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    printed = []
    for test in doctest.DocTestFinder().find(module, extraglobs={"torch": torch} | vars(module)):
        doctest.DocTestRunner(optionflags=flags).run(test, out=printed.append)
    assert not printed, "".join(printed)


@pytest.fixture(scope="module")
def gallery():
    with importing(DOCS):
        module = importlib.import_module("gallery")
        module.LARGE = 512  # its plans are drawn small here
        yield module


SECTIONS = ("What it computes", "Where it looks", "Claims", "Parameters", "What it can do", "In Python")


@pytest.fixture(scope="module")
def written(gallery, tmp_path_factory):
    """The gallery of a mechanism on a grid, a layer, and one that is in no catalogue."""
    folder = tmp_path_factory.mktemp("gallery")
    (folder / "pages").mkdir()
    (folder / "pages" / "gone.rst").write_text("a mechanism that is no more")
    assert list(gallery.write(folder / "pages", CLASSES, folder / "kept")) == [cls.spec.id for cls in CLASSES]
    return folder


CLASSES = [saccade.mechanism("nat"), saccade.mechanism("set_transformer"), Sliding]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.spec.id)
def test_page_of_a_mechanism_says_everything(cls, gallery, written):
    page = (written / "pages" / f"{cls.spec.id}.rst").read_text(encoding="utf-8")
    lines = page.split("\n")
    at = [lines.index(section) for section in SECTIONS]
    assert at == sorted(at)
    spec = cls.spec
    for text in (spec.name, spec.title, str(spec.year), f"https://arxiv.org/abs/{spec.paper}", *spec.uses):
        assert text in page, text
    assert all(f"``{name}``" in page for name in cls.params())
    assert page.count("data:image/png;base64,") >= 1
    formula = next(line.strip() for line in cls.__doc__.split("\n") if line.startswith("        "))
    assert f"   {formula}" in lines
    claims = cls.claims()
    assert page.count('<div class="claim holds">') == len(claims) >= 1
    for name, (sentence, _) in claims.items():
        assert gallery.html.escape(sentence) in page
        assert f"<code>{name}</code>" in page


def test_index_has_a_card_a_mechanism(written):
    index = (written / "pages" / "index.rst").read_text(encoding="utf-8")
    assert index.startswith("Gallery\n")
    for cls in CLASSES:
        family = (written / "pages" / f"family-{cls.spec.family}.rst").read_text(encoding="utf-8")
        assert f"   family-{cls.spec.family}" in index.split("\n")
        assert f"   {cls.spec.id}" in family.split("\n")
        for page in (index, family):
            assert f'href="{cls.spec.id}.html"' in page


def test_page_of_a_mechanism_that_is_gone_is_removed(written):
    assert sorted(path.name for path in (written / "pages").iterdir()) == sorted(
        [
            *(f"{cls.spec.id}.rst" for cls in CLASSES),
            *{f"family-{cls.spec.family}.rst" for cls in CLASSES},
            "index.rst",
        ]
    )


def test_measurements_are_kept_by_the_hash_of_the_code(gallery, written, monkeypatch):
    """The same code is not measured again, changed code is, and what was found for the old code goes."""

    def refuse(cls):
        raise AssertionError(f"measured {cls.spec.id} again")

    before = (written / "pages" / "sliding.rst").read_text(encoding="utf-8")
    monkeypatch.setattr(gallery, "measure", refuse)
    assert gallery.page(Sliding, gallery.measured(Sliding, written / "kept")) == before
    monkeypatch.setattr(gallery, "_ground", lambda: b"other primitives")
    with pytest.raises(AssertionError, match="measured sliding again"):
        gallery.measured(Sliding, written / "kept")
    monkeypatch.setattr(gallery, "measure", lambda cls: gallery.Measured((), ()))
    gallery.measured(Sliding, written / "kept")
    assert len(list((written / "kept").glob("sliding-*.json"))) == 1


def unnamed(extras):
    """(where, extra) of those that a page does not name, and of those that code names though there are none."""
    pages = [ROOT / "README.md", DOCS / "installation.md"]
    missing = [(p.name, extra) for p in pages for extra in extras if f"`{extra}`" not in p.read_text(encoding="utf-8")]
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")}
    return missing + [
        (path.name, extra)
        for path, text in sources.items()
        for names in re.findall(r"pip install '?saccade\[([a-z0-9,]+)\]", text)
        for extra in names.split(",")
        if extra not in extras
    ]


def test_every_extra_is_named_and_every_one_that_is_named_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert unnamed(extras) == []
    assert unnamed({*extras, "other"} - {"vmm"}) == [
        ("README.md", "other"),
        ("installation.md", "other"),
        *[("virtual.py", "vmm")] * 2,
    ]


def test_page_tells_of_what_fails(gallery):
    """A claim that does not hold or raises, and a picture that cannot be drawn, stand on the page as such."""

    class Broken(Sliding):
        spec = Sliding.spec

        @saccade.contract.claim("Pigs fly.")
        def pigs(cls):
            return saccade.contract.Finding(False, "0 of 3 <pigs>")

        @saccade.contract.claim("It runs.")
        def runs(cls):
            raise ZeroDivisionError("by nought")

        def compute(self, *inputs, **options):
            raise ValueError("q: got no wings")

    found = gallery.measure(Broken)
    page = gallery.page(Broken, found)
    assert "does not hold here: 0 of 3 &lt;pigs&gt;" in page
    assert "does not hold here: ZeroDivisionError: by nought" in page
    assert "It could not be drawn: q: got no wings" in page
    assert "2020 · 1 of 3 claims hold" in gallery.index({Broken: found})


@pytest.mark.parametrize("spec", saccade.mechanisms(), ids=lambda spec: spec.id)
def test_usage_on_a_page_runs(spec, gallery):
    exec("\n".join(gallery.usage(saccade.mechanism(spec.id))), {})


def test_docstrings_become_what_they_mean():
    with importing(DOCS):
        docstrings = importlib.import_module("docstrings")
        assert docstrings.prose("S_ |x| *a* \\") == r"S\_ \|x\| \*a\* \\"
        assert docstrings.prose("S_t top_k") == "S_t top_k"
        assert docstrings.to_rst(["see `Plan`s"])[0] == r"see \ :py:obj:`Plan`\ s"
        assert docstrings.to_rst(["a `b c` d"])[0] == r"a \ ``b c``\  d"
        assert docstrings.to_rst(["size: keys. stride: gap."])[0] == r"**size**\ : keys. **stride**\ : gap."
        formula = docstrings.to_rst(["Text.", "", "    o_i = a *", "      b", "", "More."])
        assert formula[2:7] == [".. code-block:: text", "   :class: formula", "", "   o_i = a *", "     b"]
        assert ".. code-block:: python" in docstrings.to_rst(["", "    report = check(A)", "    report.raise_()"])
        two = docstrings.to_rst(["", "    from a import b", "", "    b()", "", "End."])
        assert two[:7] == [".. code-block:: python", "   :class: example", "", "   from a import b", "", "   b()", ""]
        assert docstrings.to_rst(["-y . v: Hebbian"])[0] == "-y . v: Hebbian"
        hanging = docstrings.to_rst(["size: keys,", "    its own too.", "stride: gap."])
        assert hanging[:2] == ["**size**", "   keys, its own too."]
        assert docstrings.to_rst([">>> f(`x`)", "2", "", "End."])[:2] == [">>> f(`x`)", "2"]


def test_docstrings_are_read_by_label():
    with importing(DOCS):
        docstrings = importlib.import_module("docstrings")
        text = (
            "Does it.\n\n    x = size: y\n\nTwo\nheads; lo: low. Paper: P, 2.\nCosts N. lo, hi: ends (1).\n\n>>> f()\n3"
        )
        rest, said = docstrings.labelled(text, ["Paper", "Costs", "lo", "hi", "size"])
        assert said == {"Paper": "P, 2.", "Costs": "N.", "lo": "ends (1).", "hi": "ends (1)."}
        assert rest == "Does it.\n\n    x = size: y\n\nTwo\nheads; lo: low.\n\n>>> f()\n3"
