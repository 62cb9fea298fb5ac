"""The command line: list and show mechanisms, check them, compare, evaluate, draw and tune them; serve a model."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from saccade.bench.contestant import Configured
    from saccade.bench.inputs import Workload
    from saccade.contract import Mechanism

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="One engine, one vocabulary and one proof for efficient attention.",
)
Json = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]
Ids = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Mechanisms; none given: all of them.")]
Families = Annotated[list[str] | None, typer.Option("--family", help="All of a family; may be given several times.")]
Shape = Annotated[
    str | None,
    typer.Option(metavar="B,H,HKV,N,D", help="Random inputs: batch, query heads, key heads, tokens, channels."),
]
Capture = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Inputs from a transformers model: an id or a path.")
]


def main() -> None:
    """Run the command line."""
    app(prog_name="saccade")


@contextmanager
def _refusing(*kinds: type[Exception], extra: str = "bench") -> Iterator[None]:
    """Turn errors of these kinds into one line on stderr and exit code 2; `extra` brings what may be missing."""
    try:
        yield
    except kinds as error:
        text = " ".join(str(error).split())
        if isinstance(error, ModuleNotFoundError):
            text = f"{error.name} is missing; pip install 'saccade[{extra}]'"
        typer.echo(f"saccade: {text}", err=True)
        raise typer.Exit(2) from error


@app.command("list")
def list_(family: Families = None, as_json: Json = False) -> None:
    """List the mechanisms."""
    from dataclasses import asdict

    classes = _classes(None, family)
    if as_json:
        typer.echo(json.dumps([asdict(cls.spec) | {"contract": cls.contract()} for cls in classes], indent=1))
        return
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("id", "name", "family", "year", "paper"):
        table.add_column(column, no_wrap=column == "id")
    for spec in (cls.spec for cls in classes):
        table.add_row(spec.id, spec.name, spec.family, str(spec.year), spec.paper)
    _console().print(table)
    typer.echo(f"{len(classes)} mechanisms")


@app.command()
def show(id: Annotated[str, typer.Argument(help="A mechanism.")]) -> None:
    """Show one mechanism: its equations, parameters and claims."""
    import inspect

    cls = _classes([id])[0]
    spec = cls.spec
    typer.echo(f"{spec.name} ({spec.id})\n{spec.title}, {spec.year}, {spec.paper}\n")
    given = [k if v is inspect.Parameter.empty else f"{k}={v!r}" for k, v in cls.params().items()]
    about = {
        "family": spec.family,
        "contract": cls.contract(),
        "inputs": _inputs(cls),
        "uses": ", ".join(spec.uses),
        "params": ", ".join(given) or "none",
    }
    typer.echo("\n".join(f"{key:<9} {value}" for key, value in about.items()))
    typer.echo(f"\n{inspect.getdoc(cls)}")
    claims = [sentence for sentence, _ in cls.claims().values()]
    if claims:
        typer.echo("\nClaims\n" + "\n".join(f"- {sentence}" for sentence in claims))


@app.command()
def check(ids: Ids = None, family: Families = None, as_json: Json = False) -> None:
    """Prove mechanisms by the conformance suite; exit code 1 when one fails."""
    from saccade.testing import cli_table

    chosen = [cls.spec.id for cls in _classes(ids, family)]
    report = cli_table(chosen)
    if as_json:
        typer.echo(json.dumps(report.rows(), indent=1))
    else:
        _console().print(report)
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def compare(
    ids: Ids = None,
    family: Families = None,
    shape: Shape = None,
    capture: Capture = None,
    lengths: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Tokens (default 512,2048,8192; N of --shape).")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="float32 (default on the CPU), bfloat16 (elsewhere), float16, float64.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="Ask this backend of every mechanism; what runs another is FELL_BACK.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="For all of it (default 2 a mechanism, at least 100).")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What saccade tune wrote, beside its mechanism's defaults."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the report goes.")] = Path("saccade-report"),
) -> None:
    """Measure mechanisms beside dense attention on the same inputs: speed, memory, error; then write a report.

    The inputs are those of a small language model reading text, and patches of a photograph for grids. Ctrl-C, or a
    request to end, stops the measuring; the report is written of what there is.
    """
    with _refusing(ModuleNotFoundError):
        from saccade.bench import report
    from saccade.bench.compare import LENGTHS, compare
    from saccade.bench.console import tell
    from saccade.bench.inputs import Unreadable

    classes = _contestants(ids, family, config)
    with _refusing(ValueError, TypeError):
        sizes = _shape(shape) if shape else None
        tokens = _numbers("lengths", lengths) if lengths else [sizes[3]] if sizes else list(LENGTHS)
        workloads = _workloads(sizes, capture, tokens)
        number = _dtype(dtype)
        _check_device(device)
        _check_backend(backend)
        _check_folder(out)
        if budget is not None and not budget > 0:
            raise ValueError(f"budget: got {budget:g}; pass seconds > 0")
    with _refusing(Unreadable), _bar() as progress, _ended_gently():
        found = compare(
            classes,
            workloads,
            lengths=tokens,
            device=device,
            dtype=number,
            backend=backend,
            budget=budget,
            progress=progress,
        )
    tell(found, _console())
    for path in report.write(found, out):
        typer.echo(path)


@app.command()
def draw(
    what: Annotated[
        str, typer.Argument(metavar="ID|PATTERN", help="A mechanism, or a pattern such as 'Window(64) & Causal()'.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A .png (default: named after what is drawn).")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens (default 256; a grid's own).")] = None,
    shape: Shape = None,
    capture: Capture = None,
    cost: Annotated[
        bool, typer.Option("--cost", help="Also forecast how fast a GPU gets through the pattern, listed in every way.")
    ] = False,
) -> None:
    """Draw who attends to whom: what a mechanism does on real input, or what a pattern admits."""
    from saccade.bench.draw import draw_mechanism, draw_pattern
    from saccade.bench.expression import parse_pattern
    from saccade.bench.guard import Failed
    from saccade.bench.inputs import Unreadable
    from saccade.errors import positive

    path = out or Path(f"{what if what.isidentifier() else 'pattern'}.png")
    with _refusing(ValueError, TypeError, ModuleNotFoundError):
        if length is not None:
            positive("length", length)
        _check_image(path)
        if cost:
            typer.echo(_forecast(what, length, _shape(shape) if shape else None, path))
            return
        drawing = draw_pattern(parse_pattern(what), length) if "(" in what else None
        workloads = _workloads(_shape(shape) if shape else None, capture, [length or 256])
    if drawing is None:
        (cls,) = _classes([what])
        with _refusing(Unreadable, Failed):
            drawing = draw_mechanism(cls, workloads, length or 256)
    typer.echo(drawing.save(path))


@app.command()
def tune(
    id: Annotated[
        str,
        typer.Argument(
            metavar="ID|RECIPE",
            help="A mechanism whose heads have rules to choose from, whose gates learn or whose profile is searched "
            "(those with parameters or without: 'duo_attention(share=0.25)'), or a recipe of conversion.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Of gates and profiles: bundled (default), or a transformers model: an id or a path."
        ),
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Most attended pairs, as a share of the admissible ones (default 0.5).")
    ] = None,
    time: Annotated[
        float | None, typer.Option(help="Instead: most time, as a share of dense attention's on this machine.")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Tokens at which the model is profiled (default 512,1024; a recipe: 256; gates and profiles: 1024).",
        ),
    ] = None,
    beyond: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="An unseen length, under the budget too, at which the choice is made (default 2048); "
            "a recipe (1024), gates and profiles (2048) are measured there too.",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Samples a length (default 4; a recipe, gates and profiles: 8).")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="In which a recipe's feature maps are fitted, or gates learn (default 100).")
    ] = None,
    recovery: Annotated[
        float | None, typer.Option(help="Of a profile: the part of attention to recover (default 0.95).")
    ] = None,
    cost: Annotated[
        float | None,
        typer.Option(help="Instead: the most that it may hold or read, as a share of dense attention's."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of gates and profiles: of the prompts and what is random (default 0).")
    ] = None,
    finetune: Annotated[
        int | None, typer.Option(help="Of a recipe: steps of training the whole afterwards (default 60; 0: none).")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Of all but rules: cpu, cuda or cuda:N, where it runs (default cpu).")
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="A .json for compare --config and saccade.hf.apply.")
    ] = Path("tuned.json"),
) -> None:
    """Fit a mechanism to a language model, then write what was found.

    Choose parameters head by head and layer by layer under a budget; make the model's softmax attention linear; let
    gates learn which heads, blocks or tokens matter; or search what each head may leave out. While gates learn or a
    profile is searched, Ctrl-C, or a request to end, stops that, and what was found until then is written.
    """
    from saccade.bench.tune import tuner

    with _refusing(ValueError, TypeError):
        tokens = _numbers("lengths", lengths) if lengths else None
        if out.suffix == ".safetensors":
            raise ValueError(f"out: got {str(out)!r}, where the tensors go; pass a .json")
    given = {
        "model": model,
        "density": density,
        "time": time,
        "lengths": tokens,
        "beyond": beyond,
        "count": samples,
        "steps": steps,
        "recovery": recovery,
        "cost": cost,
        "seed": seed,
        "finetune": finetune,
        "device": device,
    }
    with _refusing(ValueError, TypeError, FileNotFoundError, ImportError), _bar() as progress, _ended_gently():
        run = tuner(id, **{name: value for name, value in given.items() if value is not None})
        if device is not None:
            _check_device(device)
        found = run(progress=progress)
    _console().print(found.table())
    typer.echo(found.save(out))


@app.command("eval")
def eval_(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[WHAT]...",
            help="Mechanisms, with parameters or without: moba, 'moba(block=64, top_k=4)'. Dense attention takes part.",
        ),
    ] = None,
    frontier: Annotated[
        bool,
        typer.Option(
            "--frontier",
            help="Every WHAT that takes a budget at each of several (none given: every cache policy), scores beside "
            "the memory held and the time of a decoded token, on one page.",
        ),
    ] = False,
    budgets: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE,...", help="Of a frontier: parts of the tokens (default 0.1,0.25,0.35,0.5,0.75,1.0)."
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="bundled, or a transformers model: an id or a path.")
    ] = "bundled",
    tasks: Annotated[str | None, typer.Option(metavar="NAME,NAME,...", help="Default: all there are.")] = None,
    lengths: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Tokens of a prompt and its answer (default 1k,2k).")
    ] = None,
    count: Annotated[int, typer.Option(help="Examples a task and length.")] = 20,
    questions: Annotated[int, typer.Option(help="About each context, at most.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the examples.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="float32 (default on the CPU), bfloat16 (elsewhere), float16, float64.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="For this run; the next one goes on (default: no end).")
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="For one contestant, task and length; what takes longer is left out."),
    ] = None,
    answered: Annotated[
        bool, typer.Option("--answered", help="Ask others only what dense attention can answer (score >= 0.5).")
    ] = False,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="PART",
            help="scores: no times, so that several processes may share a GPU; times: of a frontier, decoded tokens "
            "alone; report: nothing is measured, the rows in DIR and its folders are reported (default: all of it).",
        ),
    ] = None,
    recorded: Annotated[
        bool,
        typer.Option("--recorded", help="Replay steps, timed ones and replies', from CUDA graphs."),
    ] = False,
    at_once: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS", help="Of prompts that are read side by side, about (default: 16k, on a GPU 128k)."
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Where the results go; what is finished there is not measured again. The same command may run "
            "several times at once: the processes share the work.",
        ),
    ] = Path("saccade-eval"),
) -> None:
    """Score mechanisms inside a language model on generated long-context tasks with exact answers.

    Both with the question in what is read (query-aware), and asked after the context was read (query-agnostic).
    """
    with _refusing(ImportError):
        from saccade.bench.eval import BUDGETS, DECODE, LENGTHS, Contestant, at_budgets, chosen, evaluate
        from saccade.bench.eval_reader import load
        from saccade.bench.eval_summary import gathered
        from saccade.bench.inputs import Unreadable
        from saccade.errors import known, positive

        if frontier:
            from saccade.bench.frontier import tell, write
        else:
            from saccade.bench.eval_summary import tell, write

    with _refusing(ValueError, TypeError, SyntaxError):
        if only is not None:
            known("only", only, ("scores", "times", "report"))
        for name, given in (("budgets", budgets), ("only", only == "times"), ("recorded", recorded)):
            if given and not frontier:
                got = repr(budgets) if name == "budgets" else "times" if name == "only" else "it"
                raise ValueError(f"{name}: got {got} without a frontier; pass --frontier too")
        if recorded and not device.startswith("cuda"):
            raise ValueError(f"recorded: got it on {device}; a GPU records steps, so pass --device cuda")
        shares = _shares("budgets", budgets) if budgets else BUDGETS
        contestants = at_budgets(what or None, shares) if frontier else [Contestant.parse(one) for one in what or ()]
        names = [name.strip() for name in tasks.split(",")] if tasks else None
        chosen(names)
        tokens = _tokens("lengths", lengths) if lengths else list(LENGTHS)
        positive("count", count), positive("questions", questions), positive("seed", seed, least=0)
        if at_once is not None:
            positive("at_once", at_once)
        number = _dtype(dtype)
        _check_device(device)
        _check_folder(out)
        for name, seconds in (("budget", budget), ("limit", limit)):
            if seconds is not None and not seconds > 0:
                raise ValueError(f"{name}: got {seconds:g}; pass seconds > 0")
    if only == "report":
        with _refusing(ValueError):
            found = gathered(out, names, tokens if lengths else None)
    else:
        with _refusing(Unreadable):
            reader = load(model, device, number)
        with _refusing(ValueError), _bar() as progress, _ended_gently():
            found = evaluate(
                contestants,
                reader,
                tasks=names,
                lengths=tokens,
                count=count,
                questions=questions,
                seed=seed,
                budget=budget,
                folder=out,
                progress=progress,
                scores=only != "times",
                decode=DECODE if frontier and only != "scores" else None,
                recorded=recorded,
                answered=answered,
                at_once=at_once,
                limit=limit,
            )
    paths = write(found, out)
    tell(found, _console())
    for path in paths:
        typer.echo(path)


@app.command()
def serve(
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="bundled, or a transformers model: an id or a path.")
    ] = "bundled",
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="dense, or a policy of saccade.cache and its budget: snapkv=0.25, quest=512. Several may be "
            "given; requests choose by MODEL:POLICY, and the first is MODEL itself (default dense)."
        ),
    ] = None,
    pages: Annotated[int, typer.Option(help="Of the pool: 16 tokens of one key head of one layer each.")] = 65536,
    chunk: Annotated[int, typer.Option(help="Tokens of a prompt that are read at once.")] = 256,
    most: Annotated[int, typer.Option(help="Requests that are read and decoded at a time; others wait.")] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="float32 (default on the CPU), bfloat16 (elsewhere), float16, float64.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
) -> None:
    """Serve a language model over HTTP, many requests at once: completions, models, health and metrics."""
    with _refusing(ImportError, extra="serve"):
        import uvicorn

        from saccade.bench.eval_reader import load
        from saccade.bench.inputs import Unreadable
        from saccade.serve.engine import Engine
        from saccade.serve.policies import named
        from saccade.serve.server import Service, application

    with _refusing(ValueError, TypeError):
        chosen = dict(named(text) for text in policy or ["dense"])
        number = _dtype(dtype)
        _check_device(device)
    with _refusing(Unreadable):
        reader = load(model, device, number)
    with _refusing(ValueError, TypeError):
        engine = Engine(reader.model, chosen, pages=pages, chunk=chunk, most=most)
    typer.echo(f"{model} with {', '.join(chosen)}, {pages} pages; the address follows", err=True)
    service = Service(engine, reader.tokenizer, model, reader.end)
    uvicorn.run(application(service), host=host, port=port, log_level="info")


@contextmanager
def _ended_gently() -> Iterator[None]:
    """A request to end is an interrupt inside, so that what was measured is not lost."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _bar() -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr, on a terminal: a function of units done, units in all, what is under way."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = _console(stderr=True)
    # Drawn when something happens only: a thread that redraws would be felt in the times.
    bar = Progress(*columns, console=console, auto_refresh=False, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task("starting")

        def progress(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, description=text, refresh=True)

        yield progress


def _contestants(
    ids: list[str] | None, families: list[str] | None, config: Path | None
) -> list[type[Mechanism] | Configured]:
    """The mechanisms asked for; with a configuration, what it configures and its mechanism's defaults too."""
    if config is None:
        return list(_classes(ids, families))
    from saccade.bench.tune import load

    with _refusing(ValueError):
        tuned = load(config).contestants(config.stem)
    asked = _classes(ids, families) if ids or families else []
    return list(dict.fromkeys([*asked, *tuned]))


def _forecast(what: str, length: int | None, shape: tuple[int, int, int, int, int] | None, path: Path) -> Path:
    """Print what a pattern will cost, and draw it: whom it admits, or the fastest lists where that is too large."""
    from saccade.bench.cost import listings, shape_of, table
    from saccade.bench.draw import MOST_TOKENS, draw_pattern
    from saccade.bench.expression import parse_pattern

    if "(" not in what:
        raise ValueError(f"cost: got {what!r}; a forecast is made of a pattern, such as 'Window(64) & Causal()'")
    pattern = parse_pattern(what)
    shape = shape or shape_of(pattern, length)
    found = listings(pattern, shape)
    _console().print(table(found, shape))
    if shape[3] > MOST_TOKENS:
        return found[0].plan.draw(path)
    return draw_pattern(pattern, shape[3]).save(path)


def _console(stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr)


def _classes(ids: list[str] | None, families: list[str] | None = None) -> list[type[Mechanism]]:
    """The mechanisms asked for, by id and by family, each once; all of them where nothing was asked for."""
    from saccade.catalogue import mechanism, mechanisms
    from saccade.errors import known

    specs = mechanisms()
    with _refusing(ValueError):
        for family in families or ():
            known("family", family, sorted({spec.family for spec in specs}))
        of_families = [spec.id for spec in specs if not (ids or families) or spec.family in (families or ())]
        return [mechanism(id) for id in dict.fromkeys([*(ids or ()), *of_families])]


def _inputs(cls: type[Mechanism]) -> str:
    """What a mechanism takes, in words."""
    from saccade.contract import Mixer

    tensors = "hidden states (B, N, C)" if issubclass(cls, Mixer) else "q, k, v (B, H, N, D)"
    return f"{tensors}, {cls.spec.tokens}, {'causal' if cls.causal else 'not causal'}"


def _numbers(name: str, text: str) -> list[int]:
    """Positive integers between commas."""
    from saccade.errors import positive

    parts = [part.strip() for part in text.split(",")]
    if not all(part.lstrip("-").isdigit() for part in parts):
        raise ValueError(f"{name}: got {text!r}; pass integers between commas, like 1024,4096")
    return [positive(name, int(part)) for part in parts]


def _tokens(name: str, text: str) -> list[int]:
    """Like `_numbers`, and k stands for 1024."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.removesuffix("k").lstrip("-").isdigit() for part in parts):
        raise ValueError(f"{name}: got {text!r}; pass tokens between commas, like 2k,4k,8k")
    return _numbers(name, ",".join(str(1024 * int(p[:-1])) if p.endswith("k") else p for p in parts))


def _shares(name: str, text: str) -> list[float]:
    """Numbers between commas."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name}: got {text!r}; pass shares between commas, like 0.1,0.25,0.5") from None


def _shape(text: str) -> tuple[int, int, int, int, int]:
    sizes = _numbers("shape", text)
    if len(sizes) != 5:
        raise ValueError(f"shape: got {text!r}; pass B,H,HKV,N,D, like 1,8,2,4096,64")
    batch, heads, kv_heads, tokens, channels = sizes
    return batch, heads, kv_heads, tokens, channels


def _workloads(shape: tuple[int, int, int, int, int] | None, capture: str | None, lengths: list[int]) -> list[Workload]:
    """Where the inputs come from."""
    from saccade.bench.inputs import CapturedModel, CapturedText, Photograph, Synthetic

    if shape and capture:
        raise ValueError(f"shape: got {','.join(map(str, shape))} beside capture {capture!r}; pass one of them")
    if shape:
        return [Synthetic(shape)]
    return [CapturedModel(capture, lengths) if capture else CapturedText(lengths), Photograph()]


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    from saccade.errors import known

    return None if name is None else getattr(torch, known("dtype", name, ("float16", "bfloat16", "float32", "float64")))


def _check_device(name: str) -> None:
    import torch

    if name == "cpu":
        return
    kind, _, index = name.partition(":")
    if kind != "cuda" or not (index.isdigit() or name == "cuda"):
        raise ValueError(f"device: got {name!r}; pass cpu, cuda or cuda:N")
    if int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {name!r}, but there are {torch.cuda.device_count()} CUDA devices here; pass cpu")


def _check_backend(name: str | None) -> None:
    from saccade.errors import known
    from saccade.softmax.backends import ORDER

    if name is not None:
        known("backend", name, ORDER)


def _check_folder(path: Path) -> None:
    """Found out before the measuring, not after it."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"out: got {str(path)!r}, which is a file; pass a folder")


def _check_image(path: Path) -> None:
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"out: got {str(path)!r}; pass a file whose name ends in .png")
