"""The gallery: a page a mechanism, written from the mechanism itself, with its pictures drawn and its claims measured.

Measuring takes a minute or so; what it found is kept in build/gallery under the hash of the mechanism's file and of the
primitives that it is made of, so that only what changed is measured again.
"""

from __future__ import annotations

import functools
import hashlib
import html
import inspect
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from docstrings import labelled, prose, to_rst
from PIL import Image
from torch import Tensor

import saccade
from saccade.bench.contestant import Entry
from saccade.bench.draw import influence
from saccade.bench.inputs import CapturedText, Photograph
from saccade.bench.sample import Sample
from saccade.contract import Attention, Case, Mechanism, Mixer
from saccade.testing.ambient import isolated
from saccade.testing.subject import seeded
from saccade.where import Plan
from saccade.where.draw import tile_map

HERE = Path(__file__).parent
CACHE = HERE.parent / "build" / "gallery"
ROOMS = ("where", "softmax", "scan", "mix", "hosts")
SMALL, LARGE = 144, 8192  # tokens of the drawn weights, and of the drawn plans
MOST_HEADS = 4  # drawn of a plan whose heads differ
SIDE = 128  # most cells a side
LINE = 88  # characters of code that fit the page


@dataclass(frozen=True)
class Picture:
    """image: a PNG whose alpha channel is the ink, as a data URI."""

    caption: str
    image: str


@dataclass(frozen=True)
class Plate:
    """Pictures of one kind, and what they show, in words."""

    text: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Claimed:
    """What a claim said and found. figure: measured, in words, or how it broke."""

    name: str
    sentence: str
    holds: bool
    figure: str


@dataclass(frozen=True)
class Measured:
    """What a page shows that must be computed."""

    claims: tuple[Claimed, ...]
    plates: tuple[Plate, ...]


# What must be computed.


def measure(cls: type[Mechanism]) -> Measured:
    """Run the claims of `cls` and draw it; a claim that raises does not hold."""
    claims = []
    for name, (sentence, function) in cls.claims().items():
        with alone():
            try:
                finding = function()
                claims.append(Claimed(name, sentence, bool(finding.holds), finding.figure))
            except Exception as error:  # a page tells of it; the conformance suite is where it fails
                claims.append(Claimed(name, sentence, False, f"{type(error).__name__}: {error}"))
    with alone():
        return Measured(tuple(claims), (draw_weights(cls), *draw_plan(cls)))


@contextmanager
def alone() -> Iterator[None]:
    """Seeded, on one thread: what is small gains nothing from several, and sums come out the same everywhere."""
    with isolated():
        torch.set_num_threads(1)
        yield


def measured(cls: type[Mechanism], folder: Path = CACHE) -> Measured:
    """`measure(cls)`, or what an earlier build found for the same code."""
    path = folder / f"{cls.spec.id}-{fingerprint(cls)}.json"
    if path.is_file():
        data = json.loads(path.read_text(encoding="utf-8"))
        plates = (Plate(one["text"], tuple(Picture(**row) for row in one["pictures"])) for one in data["plates"])
        return Measured(tuple(Claimed(**row) for row in data["claims"]), tuple(plates))
    found = measure(cls)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(f"{cls.spec.id}-*.json"):
        stale.unlink()
    path.write_text(json.dumps(asdict(found)), encoding="utf-8")
    return found


def fingerprint(cls: type[Mechanism]) -> str:
    """Of the mechanism's file, of the primitives under it and of this file."""
    return hashlib.sha256(Path(inspect.getfile(cls)).read_bytes() + _ground()).hexdigest()[:16]


@functools.cache
def _ground() -> bytes:
    root = Path(saccade.__file__).parent
    files = [Path(__file__), root / "contract.py", root / "bench" / "draw.py"]
    files += sorted(path for room in ROOMS for path in (root / room).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).digest()


def draw_weights(cls: type[Mechanism]) -> Plate:
    """How much each token moves each output: the first of the mechanism's own cases that runs, on real inputs of a
    drawable size where it can, at the case's own shape otherwise.
    """
    refused = ""
    for on_real in (True, False):
        for case in cls.cases():
            sample = real(SMALL, cls.spec.ranks[0]) if on_real else random(case)
            try:
                drawing = influence(Entry(cls, params=case.params), sample)
            except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
                refused = refused or " ".join(str(error).split())
                continue
            pictures = tuple(Picture(caption, image) for caption, image in drawing.images())
            return Plate(f"{WEIGHTS} {_told(sample, case.params)}", pictures)
    return Plate(f"It could not be drawn: {refused}", ())


WEIGHTS = (
    "How much every token (columns) moves every output (rows), found by running the module. Small, so that single keys "
    "can be seen:"
)
TILES = "The tiles that are computed with the paper's parameters; paler ones only in part."


def _told(sample: Sample, params: Mapping[str, Any]) -> str:
    d = sample.dims
    tokens = f"{' x '.join(map(str, d.grid))} tokens" if d.grid else f"{sample.length} tokens"
    inner = "".join(f", {name} = {value}" for name, value in params.items())
    source = {
        CapturedText.name: "read by a small language model in Python source",
        Photograph.name: "patches of a photograph",
    }.get(sample.workload, "random numbers")
    return f"{tokens}, {source}{inner}."


@functools.cache
def _text() -> CapturedText:
    return CapturedText([LARGE])


def real(length: int, rank: int) -> Sample:
    """Text for sequences, a photograph for grids."""
    return Photograph().sample(length, rank) if rank > 1 else _text().sample(length, rank)


def random(case: Case) -> Sample:
    d = case.dims
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, case.length, d.head_dim, generator=generator)
        for heads in (d.num_heads, d.num_kv_heads, d.num_kv_heads)
    )
    return Sample("random", d, q, k, v, torch.randn(1, case.length, d.dim, generator=generator))


@torch.no_grad()
def draw_plan(cls: type[Mechanism]) -> list[Plate]:
    """The tiles that it computes with the paper's parameters at LARGE tokens, one picture a kind of head; none for a
    mechanism without a plan, or whose parameters do not fit these inputs.
    """
    if not issubclass(cls, Attention) or cls.plan is Attention.plan:
        return []
    sample = real(LARGE, cls.spec.ranks[0])
    try:
        with seeded(0):
            plan = cls(sample.dims).plan(sample.q, sample.k)
    except (ValueError, TypeError, NotImplementedError):
        return []
    if not isinstance(plan, Plan):
        return []
    kinds: dict[int, list[int]] = defaultdict(list)
    for head, group in enumerate(plan.group_of[0].tolist()):
        kinds[group].append(head)
    pictures = []
    for heads in list(kinds.values())[:MOST_HEADS]:
        cells = pooled(tile_map(plan, head=heads[0]))
        alpha = torch.where(cells > 0, 60 + 195 * cells**2, 0.0).round().to(torch.uint8)
        whose = "all heads" if len(kinds) == 1 else f"head{'s' * (len(heads) > 1)} {_spans(heads)}"
        pictures.append(
            Picture(f"{whose}{', in the order of the plan' if plan.q_order is not None else ''}", uri(alpha))
        )
    where = f"{' x '.join(map(str, sample.dims.grid))} tokens" if sample.dims.grid else f"{sample.length:,} tokens"
    tile = f"tiles of {plan.block[0]} queries and {plan.block[1]} keys"
    return [Plate(f"{TILES} {where}, {tile}; {plan.density:.1%} of the admissible pairs.", tuple(pictures))]


def _spans(heads: list[int]) -> str:
    """0-2, 5"""
    runs: list[list[int]] = []
    for head in heads:
        if runs and head == runs[-1][-1] + 1:
            runs[-1].append(head)
        else:
            runs.append([head])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def pooled(cells: Tensor) -> Tensor:
    """At most SIDE cells a side: the fullest of those that share one."""
    kernel = tuple(math.ceil(size / SIDE) for size in cells.shape)
    return torch.nn.functional.max_pool2d(cells[None], kernel, ceil_mode=True)[0]


def uri(alpha: Tensor) -> str:
    """uint8 (rows, cols) as a PNG whose alpha channel it is."""
    import base64

    ink = Image.new("L", (alpha.shape[1], alpha.shape[0]), 0)
    buffer = BytesIO()
    Image.merge("LA", (ink, Image.fromarray(alpha.numpy()))).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# What is written.


def ink(image: str, caption: str, *, caption_is_code: bool = False) -> str:
    """A figure whose image is painted in the page's own ink, light or dark."""
    words = html.escape(caption)
    below = f"<code>{words}</code>" if caption_is_code else words
    return (
        f'<figure class="picture"><span class="frame"><img src="{image}" alt="{words}"></span>'
        f"<figcaption>{below}</figcaption></figure>"
    )


def heading(text: str, line: str) -> list[str]:
    return [text, line * max(4, 2 * len(text)), ""]


def raw(markup: str) -> list[str]:
    return [".. raw:: html", "", f"   {markup}", ""]


def paper_link(paper: str) -> str:
    """reST for an arXiv id or a DOI."""
    if re.fullmatch(r"\d{4}\.\d{4,5}|[a-z-]+/\d{7}", paper):
        return f"`arXiv {paper} <https://arxiv.org/abs/{paper}>`__"
    if paper.startswith("10."):
        return f"`doi {paper} <https://doi.org/{paper}>`__"
    return prose(paper)


def family_title(family: str) -> str:
    """kv_cache -> KV cache"""
    first, *rest = family.split("_")
    return " ".join([first.upper() if len(first) < 3 else first.capitalize(), *rest])


def summary(cls: type[Mechanism]) -> str:
    return (inspect.getdoc(cls) or "").split("\n")[0]


@functools.cache
def primitives() -> dict[str, str]:
    """Public name of a primitive -> where its documentation stands."""
    import importlib

    found = {}
    for room in reversed(ROOMS):
        module = importlib.import_module(f"saccade.{room}")
        found |= {name: f"saccade.{room}.{name}" for name in getattr(module, "__all__", ())}
    return found


def facts(cls: type[Mechanism]) -> dict[str, str]:
    """What it declares and can do, reST by name."""
    spec = cls.spec
    given = "hidden states x (B, N, C)" if issubclass(cls, Mixer) else "q, k, v (B, H, N, D)"
    kinds = {0: "a sequence", 1: "a grid (X,)", 2: "a grid (Y, X)", 3: "a grid (T, Y, X)"}
    axes = ", or ".join(kinds[rank] for rank in spec.ranks)
    uses = [f":py:obj:`{name} <{primitives()[name]}>`" if name in primitives() else f"``{name}``" for name in spec.uses]
    causal = "yes" if cls.causal else "by a parameter" if "causal" in cls.params() else "no"
    if getattr(cls, "prefill", False):
        causal += ", but its choice reads the whole prompt"
    return {
        "Family": f":ref:`{family_title(spec.family)} <family-{spec.family}>`",
        "Contract": f":py:obj:`{cls.contract()} <saccade.contract.{cls.contract()}>`: {given}",
        "Tokens": axes,
        "Made of": ", ".join(uses),
        "Causal": causal,
        "Decodes token by token": "yes" if cls.can_step() else "no",
        "Packs sequences": "yes, by ``cu_seqlens``" if cls.can_varlen() else "no",
        "Decides by the data": "yes, with choices that have no gradient" if spec.discrete else "no",
        "Waits for the device": spec.waits or "no",
    }


def usage(cls: type[Mechanism]) -> list[str]:
    """Python that builds it and calls it, at the first of its cases."""
    case = cls.cases()[0]
    d = case.dims
    dims = [f"num_heads={d.num_heads}", f"head_dim={d.head_dim}"]
    dims += [f"num_kv_heads={d.num_kv_heads}"] if d.num_kv_heads != d.num_heads else []
    dims += [f"grid={d.grid}"] if d.grid else []
    lines = ["import torch", "from saccade import mechanism", "from saccade.contract import Dims", ""]
    lines += [f"dims = Dims({', '.join(dims)})"]
    # A parameter that prints as a constructor would need an import.
    given = [f"{name}={value!r}" for name, value in case.params.items() if not re.search(r"[A-Z]\w*\(", repr(value))]
    build = f'module = mechanism("{cls.spec.id}")(dims{"".join(f", {one}" for one in given)})'
    if len(build) > LINE:
        build = "\n".join(
            [f'module = mechanism("{cls.spec.id}")(', "    dims,", *(f"    {one}," for one in given), ")"]
        )
    lines += build.split("\n")
    if issubclass(cls, Mixer):
        return [*lines, f"y = module(torch.randn({case.batch}, {case.length}, dims.dim))"]
    n, width = case.length, d.head_dim
    lines += [f"q = torch.randn({case.batch}, {d.num_heads}, {n}, {width})"]
    lines += [f"k, v = torch.randn(2, {case.batch}, {d.num_kv_heads}, {n}, {width})"]
    return [*lines, "o = module(q, k, v)"]


def page(cls: type[Mechanism], found: Measured) -> str:
    """The page of one mechanism, reStructuredText."""
    spec = cls.spec
    rest, said = labelled(inspect.getdoc(cls) or "", [*NOTES, *cls.params()])
    lines = [f".. _mechanism-{spec.id}:", ""]
    lines += heading(prose(spec.name), "=")
    lines += [f"*{prose(spec.title)}*, {spec.year}, {paper_link(spec.paper)}", ""]
    lines += heading("What it computes", "-") + to_rst(rest.split("\n"))
    lines += _terms({name: prose(said[name]) for name in NOTES if name in said})
    lines += heading("Where it looks", "-")
    for plate in found.plates:
        lines += [prose(plate.text), ""]
        lines += raw(f'<div class="pictures">{"".join(ink(p.image, p.caption) for p in plate.pictures)}</div>')
    lines += heading("Claims", "-")
    lines += ["The paper's headlines at a scale that a laptop can check, measured when this page was built.", ""]
    lines += raw("".join(map(_claim, found.claims)))
    lines += on_gpu(spec.id)
    lines += heading("Parameters", "-") + _parameters(cls, said)
    lines += heading("What it can do", "-") + _terms(facts(cls))
    lines += heading("In Python", "-")
    lines += [".. code-block:: python", "", *(f"   {line}".rstrip() for line in usage(cls)), ""]
    lines += ["On the command line:", "", ".. code-block:: sh", ""]
    lines += [f"   saccade {verb} {spec.id}" for verb in ("show", "check", "compare", "draw")]
    return "\n".join([*lines, ""])


@functools.cache
def _gpu_results() -> dict[str, Any]:
    path = HERE.parent / "benchmarks" / "results" / "static_gpu.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": []}


def on_gpu(id: str) -> list[str]:
    """What `benchmarks/static_gpu.py` found, in a paragraph; nothing where it was not measured."""
    data = _gpu_results()
    row = next((row for row in data["rows"] if row["pattern"] == id), None)
    if row is None:
        return []
    bound, where = row["of the bound"], f"{row['tokens']:,} tokens, {data['heads']} heads of {data['head_dim']}"
    text = (
        f"One {row['machine']}, {where}, bfloat16, the paper's parameters, {row['date']}: {row['ms']:g} ms forward, "
        f"{row['effective']:g} times as fast as dense attention ({row['dense']}, {row['dense ms']:g} ms). "
        f"It attends to {row['density']:.1%} of the admissible pairs and multiplies {row['tile density']:.1%} of them, "
        f"tile by tile; at the dense rate that alone would take {1 / bound:.0%} of its time."
    )
    if bound > 1.15:
        text += " The rest goes to tiles that are cut or lists that are short, and to what it does beside attention."
    return [*heading("On a GPU", "-"), prose(text), ""]


NOTES = ("Paper", "Deviations", "Cost", "Costs", "Errors")


def _terms(pairs: Mapping[str, str]) -> list[str]:
    """A table of two columns, without lines."""
    if not pairs:
        return []
    lines = [".. list-table::", "   :class: terms", "   :widths: auto", "   :stub-columns: 1", ""]
    for name, text in pairs.items():
        lines += [f"   * - {name}", f"     - {text}"]
    return [*lines, ""]


def _claim(one: Claimed) -> str:
    kind, mark, word = ("holds", "✓", "holds") if one.holds else ("fails", "✗", "does not hold here")
    return (
        f'<div class="claim {kind}"><span class="mark">{mark}</span><p>{html.escape(one.sentence)}</p>'
        f'<p class="figure">{word}: {html.escape(one.figure)} <code>{one.name}</code></p></div>'
    )


def _parameters(cls: type[Mechanism], said: Mapping[str, str]) -> list[str]:
    if not cls.params():
        return ["It has none.", ""]
    lines = [".. list-table::", "   :header-rows: 1", "   :widths: auto", ""]
    lines += ["   * - name", "     - default", "     - meaning"]
    for name, default in cls.params().items():
        shown = default.__name__ if isinstance(default, type) else repr(default)
        value = "required" if default is inspect.Parameter.empty else f"``{shown}``"
        lines += [f"   * - ``{name}``", f"     - {value}", f"     - {prose(said.get(name, 'see above'))}"]
    return [*lines, ""]


def families(found: Mapping[type[Mechanism], Measured]) -> dict[str, list[type[Mechanism]]]:
    """The mechanisms of each family, families by name."""
    members: dict[str, list[type[Mechanism]]] = defaultdict(list)
    for cls in found:
        members[cls.spec.family].append(cls)
    return dict(sorted(members.items()))


def family_page(family: str, members: list[type[Mechanism]], found: Mapping[type[Mechanism], Measured]) -> str:
    """The page of a family, under which those of its mechanisms stand."""
    lines = [f".. _family-{family}:", "", *heading(family_title(family), "=")]
    lines += [f"{len(members)} mechanism{'s' * (len(members) > 1)}.", ""]
    lines += raw('<div class="cards">' + "".join(_card(cls, found[cls]) for cls in members) + "</div>")
    lines += [".. toctree::", "   :hidden:", ""]
    lines += [f"   {cls.spec.id}" for cls in sorted(members, key=lambda cls: cls.spec.name.lower())]
    return "\n".join([*lines, ""])


def index(found: Mapping[type[Mechanism], Measured]) -> str:
    """The gallery's first page: a card a mechanism, by family."""
    grouped = families(found)
    claims = [claim for one in found.values() for claim in one.claims]
    lines = heading("Gallery", "=")
    lines += [
        f"{len(found)} mechanisms of {len(grouped)} families, {sum(c.holds for c in claims)} of {len(claims)} claims "
        "hold. Every page is written from the mechanism's own file: its docstring, its declaration, its claims, run "
        "when this documentation was built, and its weights, drawn from what the module computes.",
        "",
    ]
    for family, members in grouped.items():
        lines += heading(family_title(family), "-")
        lines += raw('<div class="cards">' + "".join(_card(cls, found[cls]) for cls in members) + "</div>")
    lines += [".. toctree::", "   :hidden:", "", *(f"   family-{family}" for family in grouped)]
    return "\n".join([*lines, ""])


def _card(cls: type[Mechanism], found: Measured) -> str:
    spec, holds = cls.spec, sum(claim.holds for claim in found.claims)
    pictures = [picture for plate in found.plates for picture in plate.pictures]
    picture = f'<img src="{pictures[0].image}" alt="">' if pictures else ""
    return (
        f'<a class="card" href="{spec.id}.html"><span class="frame">{picture}</span>'
        f'<span class="words"><strong>{html.escape(spec.name)}</strong><span>{html.escape(summary(cls))}</span>'
        f"<small>{spec.year} · {holds} of {len(found.claims)} claims hold</small></span></a>"
    )


def write(folder: Path, classes: list[type[Mechanism]], cache: Path = CACHE) -> Iterator[str]:
    """Write the pages into `folder`, remove those of mechanisms that are gone; yields each id before its turn."""
    found, pages = {}, {}
    for cls in classes:
        yield cls.spec.id
        found[cls] = measured(cls, cache)
        pages[f"{cls.spec.id}.rst"] = page(cls, found[cls])
    pages["index.rst"] = index(found)
    pages |= {f"family-{name}.rst": family_page(name, members, found) for name, members in families(found).items()}
    folder.mkdir(parents=True, exist_ok=True)
    for stale in set(folder.glob("*.rst")) - {folder / name for name in pages}:
        stale.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:  # unchanged pages are not built again
            path.write_text(text, encoding="utf-8")


def write_all(app: Any) -> None:
    """Write docs/gallery; called before Sphinx reads."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    classes = [saccade.mechanism(spec.id) for spec in saccade.mechanisms()]
    columns = (TextColumn("gallery: {task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=len(classes))
        for done, id in enumerate(write(HERE / "gallery", classes)):
            bar.update(task, description=id, completed=done)
        bar.update(task, description="done", completed=len(classes))
