"""How fast each backend of `attend` is on this GPU, by kind of work: the table that `auto` chooses by.

python benchmarks/backends_gpu.py            # rewrites src/saccade/softmax/measured/sm_XY.json
python benchmarks/backends_gpu.py --backends triton flex --head-dims 128 --dtypes bfloat16
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import show

from saccade.softmax import measure
from saccade.softmax.rates import MEASURED, Table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["sdpa", "fa4", "triton", "hopper", "flex"])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--out", type=Path, help="default: the table that the package brings")
    options = parser.parse_args()
    major, minor = torch.cuda.get_device_capability()
    path = options.out or MEASURED / f"sm_{major}{minor}.json"
    dtypes = [getattr(torch, name) for name in options.dtypes]
    measure(backends=options.backends, head_dims=options.head_dims, dtypes=dtypes, path=path)
    table = Table.load(path)
    show(f"TFLOP/s, {table.about}", [_shown(row) for row in table.rows])


def _shown(row: object) -> dict[str, object]:
    found = dict(vars(row))
    rates = found.pop("rates")
    found |= {"host": f"{found['host'] * 1e6:.0f} us", "tables": f"{found['tables'] * 1e6:.0f} us"}
    kinds = ("full", "causal", "window", "tiles", "cut", "cut more", "cells", "rows")
    return found | {kind: f"{rates[kind] / 1e12:.0f}" if kind in rates else None for kind in kinds}


if __name__ == "__main__":
    main()
