"""Draw the picture of the README: where eight mechanisms look, measured by running them. `python docs/picture.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from saccade import mechanism
from saccade.bench.contestant import Entry
from saccade.bench.draw import influence
from saccade.bench.inputs import CapturedText, Photograph

TOKENS = 512
PANELS: list[tuple[str, str, dict[str, Any]]] = [
    ("duo_attention", "full and streaming heads", {"sink": 16, "recent": 48}),
    ("s2_attention", "stripes, another set a head", {"block": 16, "local_blocks": 3, "stride": 8}),
    ("moba", "blocks that answer best", {"block": 32, "top_k": 4}),
    ("minference", "vertical and slanted lines", {}),
    ("hyper_attention", "hash buckets and samples", {"block": 32, "samples": 32, "min_seq_len": 64}),
    ("agent_attention", "through pooled agents", {"agent_grid": (4, 4)}),
    ("nat", "a pixel's neighbourhood", {"kernel": 7}),
    ("van_lka", "a large convolution", {}),
]


def main() -> None:
    text, photo = CapturedText([TOKENS]), Photograph()
    pictures = []
    for name, caption, params in PANELS:
        cls = mechanism(name)
        if name == "minference":
            from saccade.mechanisms.dynamic_sparse.minference import VerticalSlash

            params = {"heads": VerticalSlash(34, 102)}
        rank = cls.spec.ranks[0]
        sample = (photo if rank else text).sample(576 if rank else TOKENS, rank)
        drawing = influence(Entry(cls, params=params), sample)
        matrix = drawing.matrix if drawing.field is None else drawing.field
        pictures.append((cls.spec.name, caption, (matrix / matrix.amax(-1, keepdim=True).clamp_min(1e-30)).sqrt()))
    for path, ink, paper in (("picture.svg", "#1f2328", "Blues"), ("picture-dark.svg", "#e6edf3", "cividis")):
        with mpl.rc_context({"text.color": ink, "svg.fonttype": "none", "font.family": "sans-serif"}):
            figure = Figure(figsize=(10, 5.6), layout="constrained")
            figure.patch.set_alpha(0)
            for axes, (title, caption, values) in zip(figure.subplots(2, 4).flat, pictures, strict=True):
                axes.imshow(values.numpy(), cmap=paper, vmin=0, vmax=1, interpolation="nearest", aspect="auto")
                axes.set_xticks([])
                axes.set_yticks([])
                for side in axes.spines.values():
                    side.set_visible(False)
                axes.set_title(f"{title.split(' (')[0]}\n", fontsize=12, fontweight="bold", pad=2)
                axes.text(0.5, 1.03, caption, transform=axes.transAxes, ha="center", fontsize=10, alpha=0.8)
            figure.savefig(Path(__file__).with_name(path), metadata={"Date": None})


if __name__ == "__main__":
    main()
