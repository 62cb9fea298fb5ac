"""Train the byte-level language model that measurements run on, on one GPU.

    python training/train_lm.py --minutes 8 --packages SITE_PACKAGES --out DIR

The text is the sources of Python's library and, with --packages, those of a folder of packages: the library alone is
read so often that it is known by heart (2.4 bits per byte of held-out text instead of 0.75). Files that share lines
with the held-out modules are left out. A third of the sequences are plain text; the others have spans repeated, or
codes planted in them that are asked for later on, strewn about or in the very format of `saccade.tasks.retrieval`. The
schedule follows the clock: short sequences first, where retrieval is learned fastest, then up to the full context. DIR
receives saccade_lm.safetensors, checkpoint.pt, log.jsonl, scores.json and loss.png; --resume goes on from what is there
(without a checkpoint, from the weights alone).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import queue
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from saccade.hosts.lm import LM, LMConfig
from saccade.tasks.retrieval import PASS_KEY, TASKS, digits, needle, score, words
from saccade.tasks.text import HELD_OUT, LEFT_OUT, held_out_text, python_text

ANSWER_WEIGHT = (
    10  # of a byte that answers, against 1 of a byte of text and 0 of a code that is said for the first time
)
ADAM_LR = 3e-3
WARM_UP = 200  # steps
STAGES = (
    (0.0, 1024),
    (0.25, 2048),
    (0.45, 4096),
    (0.6, 8192),
)  # from this share of the time on, sequences of this length
Drawn = tuple[np.ndarray, np.ndarray]
Event = tuple[
    float, bytes, bytes, int
]  # depth in [0, 1], words, the code that follows them, weight of the code's bytes


def plain(rng: np.random.Generator, length: int, text: np.ndarray) -> Drawn:
    """Text as it stands."""
    start = rng.integers(0, len(text) - length)
    return text[start : start + length], np.ones(length, np.uint8)


def repeated(rng: np.random.Generator, length: int, text: np.ndarray) -> Drawn:
    """Text with spans said again further on."""
    tokens, weights = plain(rng, length, text)
    tokens = tokens.copy()
    for _ in range(max(1, length // 1024)):
        span = int(rng.integers(16, min(256, length // 4)))
        source, target = np.sort(rng.integers(0, length - span, 2))
        tokens[target : target + span] = tokens[source : source + span].copy()
    return tokens, weights


def woven(events: list[Event], rng: np.random.Generator, length: int, text: np.ndarray) -> Drawn:
    """Text with `events` at their depths."""
    events = sorted(events, key=lambda event: event[0])
    room = length - sum(len(ask) + len(code) for _, ask, code, _ in events)
    if room < 0:
        return plain(rng, length, text)
    hay, ones = plain(rng, room, text)
    tokens, weights, read = [], [], 0
    for depth, ask, code, weight in events:
        stop = int(depth * room)
        tokens += [hay[read:stop], np.frombuffer(ask + code, np.uint8)]
        weights += [ones[read:stop], np.ones(len(ask), np.uint8), np.full(len(code), weight, np.uint8)]
        read = stop
    return np.concatenate([*tokens, hay[read:]]), np.concatenate([*weights, ones[read:]])


def some_word(rng: np.random.Generator) -> bytes:
    """A word of the library, or letters at random."""
    return (
        words()[rng.integers(len(words()))]
        if rng.random() < 0.7
        else bytes(rng.integers(97, 123, rng.integers(3, 10)).tolist())
    )


def strewn(rng: np.random.Generator, length: int, text: np.ndarray) -> Drawn:
    """Up to 24 codes, each asked for once or twice, anywhere after it was said or close to the end."""
    pairs = int(rng.integers(1, max(1, min(24, length // 96)) + 1))
    late = rng.random() < 0.4
    events: list[Event] = []
    for word in {some_word(rng) for _ in range(pairs)}:
        ask, code = needle(word), digits(rng, int(rng.choice([7, 7, 5, 6, 8])))
        said = rng.random() * (0.9 if late else 1)
        events.append((said, ask, code + b".\n", 0))
        for _ in range(int(rng.integers(1, 3))):
            again = 0.95 + 0.05 * rng.random() if late else said + (1 - said) * rng.random()
            events.append((again, ask, code + b"." + (b"\n" if rng.random() < 0.9 else b""), ANSWER_WEIGHT))
    return woven(events, rng, length, text)


def asked(rng: np.random.Generator, length: int, text: np.ndarray) -> Drawn:
    """Samples as `saccade.tasks.retrieval` makes them, with one to six keys and one or several questions at the end."""
    tokens: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    left = length
    while left:
        size = left if rng.random() < 0.5 else int(np.exp(rng.uniform(math.log(min(256, left)), math.log(left + 1))))
        if left - size < 256:
            size = left
        asks = [(needle(some_word(rng)), digits(rng, 7)) for _ in range(rng.integers(1, 7))]
        if rng.random() < 0.35:
            asks = [(PASS_KEY, digits(rng, 5))] + (asks if rng.random() < 0.3 else [])
        events: list[Event] = [(rng.random(), ask, code + b".\n", 0) for ask, code in dict(asks).items()]
        questions = rng.permutation(len(events))[: rng.integers(1, len(events) + 1)]
        events += [(1.0, events[i][1], events[i][2][:-1], ANSWER_WEIGHT) for i in questions]
        drawn = woven(events, rng, size, text)
        tokens.append(drawn[0])
        weights.append(drawn[1])
        left -= size
    return np.concatenate(tokens), np.concatenate(weights)


def sequence(rng: np.random.Generator, length: int, text: np.ndarray) -> Drawn:
    """One training sequence: bytes (length,) and the weights of their losses."""
    kind = (plain, repeated, strewn, asked)[rng.choice(4, p=(0.35, 0.1, 0.25, 0.3))]
    return kind(rng, length, text)


def package_text(folder: Path, most: int = 6_000_000) -> bytes:
    """Sources of the packages in `folder`, `most` bytes of each, without tests and copies of held-out modules."""
    known = {line for line in held_out_text().splitlines() if len(line.strip()) >= 40}
    kept: list[bytes] = []
    for package in sorted(path for path in folder.iterdir() if path.is_dir()):
        room = most
        for path in sorted(package.rglob("*.py")):
            inside = path.relative_to(folder).parts
            if (
                path.name in HELD_OUT
                or set(inside) & set(LEFT_OUT)
                or not 1000 < path.stat().st_size < min(room, 100_000)
            ):
                continue
            source = path.read_bytes()
            if len(known.intersection(source.splitlines())) < 5:
                kept.append(source)
                room -= len(source)
    return b"\n".join(kept)


class Feed:
    """Batches drawn from `text` by `workers` processes; `size`, the bytes of a sequence, may be set at any time."""

    def __init__(self, text: bytes, workers: int, seed: int, length: int, tokens_per_step: int) -> None:
        context = multiprocessing.get_context("fork")  # the text is shared
        self.text = np.frombuffer(text, np.uint8)
        self.queue, self.size, self.waited = context.Queue(24), context.Value("i", length), 0.0
        words()
        self.workers = [
            context.Process(target=self._work, args=(seed + i, tokens_per_step), daemon=True) for i in range(workers)
        ]
        for worker in self.workers:
            worker.start()

    def _work(self, seed: int, tokens_per_step: int) -> None:
        rng = np.random.default_rng(seed)
        while True:
            size = self.size.value
            drawn = [sequence(rng, size + 1, self.text) for _ in range(max(1, tokens_per_step // size))]
            self.queue.put(tuple(np.stack(part) for part in zip(*drawn, strict=True)))

    def get(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, N + 1) int64 and the weights (B, N + 1) float32 of their losses."""
        since = time.monotonic()
        try:
            parts = [torch.from_numpy(part) for part in self.queue.get(timeout=60)]
        except queue.Empty:
            codes = [worker.exitcode for worker in self.workers]
            raise RuntimeError(
                f"data: no batch within 60 s; exit codes of the workers (None: alive): {codes}"
            ) from None
        self.waited += time.monotonic() - since
        if device.type == "cuda":
            parts = [part.pin_memory() for part in parts]
        tokens, weights = (part.to(device, non_blocking=True) for part in parts)
        return tokens.long(), weights.float()

    def close(self) -> None:
        for worker in self.workers:
            worker.terminate()


class Muon:
    """Momentum, orthogonalised by five Newton-Schulz steps (K. Jordan, 2024), for all matrices of a shape at once."""

    def __init__(self, matrices: list[nn.Parameter]) -> None:
        self.groups: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in matrices:
            self.groups.setdefault(matrix.shape, []).append(matrix)
        self.momentum = [
            torch.zeros(len(group), *shape, device=group[0].device) for shape, group in self.groups.items()
        ]

    @torch.no_grad()
    def step(self, lr: float, beta: float = 0.95, decay: float = 0.05) -> None:
        for (shape, group), momentum in zip(self.groups.items(), self.momentum, strict=True):
            grad = torch.stack([matrix.grad for matrix in group])
            momentum.lerp_(grad, 1 - beta)
            x = grad.lerp(momentum, beta).bfloat16()
            tall = shape[0] > shape[1]
            x = x.mT if tall else x
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):
                a = x @ x.mT
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            x = x.mT if tall else x
            torch._foreach_mul_(group, 1 - lr * decay)
            torch._foreach_add_(group, list(x.float().unbind()), alpha=-lr * max(1.0, shape[0] / shape[1]) ** 0.5)


class Trainer:
    """Model, optimisers, feed and log of a run that lasts `total` seconds, in one piece or several."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.out, self.smoke, self.lr = args.out, args.smoke, args.lr
        self.total = (args.total_minutes or args.minutes) * 60
        self.out.mkdir(parents=True, exist_ok=True)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.weights, self.checkpoint = self.out / "saccade_lm.safetensors", self.out / "checkpoint.pt"
        tiny = LMConfig(dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=96)
        self.stages = ((0.0, 128), (0.5, 512)) if self.smoke else STAGES
        self.longest = self.stages[-1][1]
        self.step, self.seen, self.before = 0, 0, 0.0
        rows = [row for row in self.rows() if "saved" in row] if args.resume else []
        if args.resume and not rows:
            raise SystemExit(f"--resume: {self.out} holds no saved state; drop --resume to start a run there")
        if not args.resume and self.weights.exists():
            raise SystemExit(f"--out: {self.out} holds a run; pass --resume to go on with it, or another folder")
        if rows:
            self.step, self.seen, self.before = (rows[-1][name] for name in ("step", "bytes", "seconds"))
        self.started = time.monotonic()
        text = b"\n".join([python_text(), *map(package_text, args.packages)])
        workers, tokens_per_step = (1, 2**11) if self.smoke else (args.workers, 2**17)
        self.feed = Feed(text, workers, 1000 * self.step, self.length(), tokens_per_step)

        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        model = LM.from_pretrained(self.weights) if rows else LM(tiny if self.smoke else LMConfig())
        self.model = model.to(self.device).train()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if not rows and name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter.zero_()
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in self.model.named_parameters() if p.ndim != 2 or "embed" in n]
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(
            others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=self.device.type == "cuda"
        )
        full = bool(rows) and self.checkpoint.exists()
        if full:
            state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
            if state["step"] != self.step:
                raise SystemExit(
                    f"--resume: checkpoint.pt is of step {state['step']}, the log's last of step {self.step}"
                )
            self.model.load_state_dict(state["model"])
            self.adam.load_state_dict(state["adam"])
            self.muon.momentum = state["muon"]
        if self.device.type == "cuda":
            torch._dynamo.config.recompile_limit = 64
            for layer in self.model.layers:
                layer.compile(dynamic=False)
        # The rate warms up where the momentum starts from nothing.
        self.first = -WARM_UP if full else self.step
        one = f"one {torch.cuda.get_device_name()}" if self.device.type == "cuda" else f"CPU, {platform.machine()}"
        self.note(
            machine=one,
            python=platform.python_version(),
            torch=torch.__version__,
            parameters=sum(p.numel() for p in self.model.parameters()),
            text_bytes=len(text),
            resumed="checkpoint" if full else "weights" if rows else "",
        )

    def rows(self) -> list[dict]:
        log = self.out / "log.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def note(self, **row: object) -> None:
        row = {"step": self.step, "seconds": round(self.elapsed(), 1), "bytes": self.seen, **row}
        with (self.out / "log.jsonl").open("a") as log:
            print(json.dumps(row), file=log)
        print(*(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)

    def elapsed(self) -> float:
        """Seconds of training in this run and the ones that it continues."""
        return self.before + time.monotonic() - self.started

    def share(self) -> float:
        return min(1.0, self.elapsed() / self.total)

    def length(self) -> int:
        return [size for at, size in self.stages if self.share() >= at][-1]

    def train_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of both optimisers; the loss and the weight of every byte."""
        self.feed.size.value = self.length()
        rate = min(1.0, (self.step - self.first + 1) / WARM_UP) * min(1.0, (1 - self.share()) / 0.4 + 0.01)
        tokens, weights = self.feed.get(self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.model(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        weight = weights[:, 1:].flatten()
        ((loss * weight).sum() / weight.sum()).backward()
        self.muon.step(self.lr * rate)
        for group in self.adam.param_groups:
            group["lr"] = ADAM_LR * rate
        self.adam.step()
        self.model.zero_grad(set_to_none=True)
        self.step, self.seen = self.step + 1, self.seen + weight.numel()
        return loss.detach(), weight

    def demand_finite(self, what: str, tensors: Iterable[torch.Tensor]) -> None:
        """End the run, before anything is overwritten, if a number is not finite."""
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            self.note(stopped=f"{what} is not finite")
            raise SystemExit(f"step {self.step}: {what} is not finite; {self.out} holds the last good state")

    def report(self, loss: torch.Tensor, weight: torch.Tensor) -> None:
        """Log a step's losses."""
        self.demand_finite("the loss", [loss])
        kinds = {"text_bpb": loss[weight == 1], "answer_bpb": loss[weight == ANSWER_WEIGHT]}
        bits = {name: part.mean().item() / math.log(2) for name, part in kinds.items() if part.numel()}
        self.note(length=self.feed.size.value, waited=round(self.feed.waited, 2), **bits)

    def save(self) -> None:
        """Write the weights, and all that is needed to go on."""
        self.demand_finite("a weight", self.model.parameters())
        self.model.save(self.weights)
        state = {
            "model": self.model.state_dict(),
            "adam": self.adam.state_dict(),
            "muon": self.muon.momentum,
            "step": self.step,
        }
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.checkpoint)

    def evaluate(self, lengths: tuple[int, ...], count: int) -> dict[str, dict[str, float]]:
        """Exact-match scores of the saved bfloat16 weights, loaded again; noted beside held-out bits per byte."""
        self.save()
        model = LM.from_pretrained(self.weights, dtype=torch.bfloat16).to(self.device)
        scores = {task: {str(n): score(model, task, n, count) for n in lengths} for task in TASKS}
        self.note(saved=True, samples=count, scores=scores, held_out_bpb=held_out_bits(model, min(self.longest, 4096)))
        return scores

    def run(self, minutes: float, every: float = 90.0) -> None:
        """Train for `minutes`, with an evaluation each `every` seconds and a long one in the end."""
        if minutes <= 0 or self.elapsed() >= self.total:
            raise SystemExit(f"--total-minutes: {self.elapsed() / 60:.1f} of {self.total / 60:.1f} are over; pass more")
        stop, due = self.elapsed() + minutes * 60, self.elapsed() + (8 if self.smoke else every)
        while self.elapsed() < min(stop, self.total):
            loss, weight = self.train_step()
            if self.step % 20 == 0:
                self.report(loss, weight)
            if self.elapsed() > due:
                self.report(loss, weight)
                self.evaluate((1024, self.longest) if not self.smoke else (self.longest,), 32)
                due = self.elapsed() + every
        self.report(loss, weight)
        self.feed.close()
        count, lengths = (4, (512,)) if self.smoke else (256, (1024, 2048, 4096, 8192))
        scores = self.evaluate(lengths, count)
        row = self.rows()[-1]
        (self.out / "scores.json").write_text(json.dumps({**row, "machine": self.machines()}, indent=1) + "\n")
        table = Table(
            "task",
            *map(str, lengths),
            title=f"exact match over {count} samples; held out {row['held_out_bpb']:.3f} bits per byte",
        )
        for task, found in scores.items():
            table.add_row(task, *(f"{100 * value:.1f} %" for value in found.values()))
        Console(width=100).print(table)
        self.plot()

    def machines(self) -> str:
        return ", then ".join(dict.fromkeys(row["machine"] for row in self.rows() if "machine" in row))

    def plot(self) -> None:
        """Loss curves of the log."""
        rows = [row for row in self.rows() if "text_bpb" in row]
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for name, label in (("text_bpb", "text"), ("answer_bpb", "answers")):
            with_it = [row for row in rows if name in row]
            axes.plot([row["bytes"] / 1e6 for row in with_it], [row[name] for row in with_it], label=label, linewidth=1)
        axes.set(xlabel="million bytes read", ylabel="bits per byte", yscale="log", title="Training loss")
        axes.legend(frameon=False)
        figure.savefig(self.out / "loss.png", dpi=150)


def held_out_bits(model: LM, length: int, count: int = 32) -> float:
    """Bits per byte on text that was held out."""
    text = np.frombuffer(held_out_text(), np.uint8)
    device = next(model.parameters()).device
    losses = []
    with torch.no_grad():
        for start in np.linspace(0, len(text) - length - 1, count).astype(int):
            window = torch.from_numpy(text[start : start + length + 1].astype(np.int64)).to(device)
            losses.append(F.cross_entropy(model(window[None, :-1])[0].float(), window[1:]).item())
    return float(np.mean(losses) / math.log(2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15, help="how long to train now, compilation included")
    parser.add_argument(
        "--total-minutes", type=float, help="how long all runs into this folder train together (default: --minutes)"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument(
        "--packages", type=Path, action="append", default=[], help="folder of packages whose sources are read, too"
    )
    parser.add_argument("--lr", type=float, default=0.02, help="Muon's learning rate")
    parser.add_argument("--workers", type=int, default=8, help="processes that draw sequences")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see every path run on a CPU")
    args = parser.parse_args()
    Trainer(args).run(args.minutes)


if __name__ == "__main__":
    main()
