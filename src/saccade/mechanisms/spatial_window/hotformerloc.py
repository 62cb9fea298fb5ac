"""HOTFormerLoc: octree nodes attend in runs of the z-order, and a relay token of every run carries to all others."""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, Weights, claim, reached, weighed
from saccade.errors import positive
from saccade.hosts.block import AttentionMixer, Block
from saccade.mix import cut_windows
from saccade.where import Blocks

NEAR = 3**3  # places around one, itself among them


class Level(NamedTuple):
    """The n nodes of one depth in z-order: places (n, 3); near (n, 27) and children (parents, 8), n where is none."""

    places: Tensor
    near: Tensor
    children: Tensor
    bits: int


def z_order(places: Tensor, bits: int) -> Tensor:
    """The bits of the coordinates (..., 3) interleaved, the first axis foremost."""
    key = torch.zeros_like(places[..., 0])
    for bit in range(bits):
        for axis in range(3):
            key = key | (places[..., axis] >> bit & 1) << (3 * bit + 2 - axis)
    return key


def grow(places: Tensor, bits: int, num_levels: int) -> tuple[Tensor, list[Level]]:
    """The order (N,) of distinct places (N, 3) along the curve, and the octree's depths from theirs upward.

    How many nodes a depth has, the places say: the host waits for each.
    """
    key, order = z_order(places, bits).sort()
    places, levels = places[order], []
    for level in range(num_levels):
        count, side = len(key), 2 ** (bits - level)
        beside = places[:, None] + torch.cartesian_prod(*[torch.arange(-1, 2, device=places.device)] * 3)
        wanted = z_order(beside.clamp(0, side - 1), bits - level)
        at = torch.searchsorted(key, wanted).clamp(max=count - 1)
        there = (key[at] == wanted) & ((beside >= 0) & (beside < side)).all(-1)
        above, parent = torch.unique_consecutive(key >> 3, return_inverse=True)
        children = torch.full((len(above), 8), count, device=places.device)
        children[parent, key & 7] = torch.arange(count, device=places.device)
        levels.append(Level(places, torch.where(there, at, count), children, bits - level))
        places, key = places[children.amin(1)] >> 1, above
    return order, levels


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def grown(grid: tuple[int, ...], bits: int, num_levels: int, device: torch.device) -> tuple[Tensor, list[Level]]:
    """`grow` for all places of a grid, found once."""
    return grow(torch.cartesian_prod(*(torch.arange(side, device=device) for side in grid)), bits, num_levels)


def gather(x: Tensor, at: Tensor) -> Tensor:
    """Rows of x (B, n, C) at the indices (m, t), zeros for n: (B, m, t, C)."""
    return torch.cat([x, x.new_zeros(len(x), 1, x.shape[2])], 1)[:, at]


class NodeBias(nn.Module):
    """The sum over the axes of a table of differences, for pairs of nodes; 0 with relay tokens, whose place is < 0."""

    def __init__(self, table: nn.Parameter, places: Tensor) -> None:
        super().__init__()
        self.table, self.places = table, places

    def forward(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        one, other = self.places[q_pos][:, None], self.places[k_pos]
        reach = self.table.shape[2] // 2
        apart = (one - other).clamp(-reach, reach) + reach
        found = torch.stack([self.table[:, axis][:, apart[..., axis]] for axis in range(3)]).sum(0)
        return found.masked_fill((one[..., 0] < 0) | (other[..., 0] < 0), 0.0)


class Runs(nn.Module):
    """Attention inside runs of a relay token and its nodes, the last run perhaps shorter; q, k, v (B, H, n + W, D)."""

    def __init__(self, dims: Dims, window: int) -> None:
        super().__init__()
        self.dims, self.pattern = dims, Blocks(window + 1)
        self.table = nn.Parameter(torch.empty(dims.num_heads, 3, 2 * (4 * window // 5) + 1))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, places: Tensor) -> Tensor:
        return attend(q, k, v, self.pattern, bias=NodeBias(self.table, places))


class Hosa(nn.Module):
    """Hierarchical octree self-attention of one depth: nodes (B, n, C), relay tokens (B, W, C) -> the same."""

    def __init__(self, dims: Dims, window: int, mlp_ratio: int) -> None:
        super().__init__()
        self.window = window
        self.conv = nn.Parameter(torch.empty(NEAR, dims.dim).uniform_(-1, 1) * NEAR**-0.5)
        self.norm = nn.LayerNorm(dims.dim)
        self.block = Block(dims, AttentionMixer(Runs(dims, window)), mlp_ratio=mlp_ratio)

    def forward(self, x: Tensor, relays: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        x = x + self.norm((gather(x, level.near) * self.conv).sum(2))
        count, run = x.shape[1], self.window + 1
        at = torch.arange(count + relays.shape[1], device=x.device)
        own = at % run == 0
        source = torch.where(own, count + at // run, at - at // run - 1)
        places = torch.cat([level.places, level.places.new_full((relays.shape[1], 3), -1)])[source]
        y = self.block(torch.cat([x, relays], 1)[:, source], places=places)
        return y[:, source.argsort()].tensor_split([count], 1)  # type: ignore[return-value]


class Hotformerloc(Mixer):
    """The HOTFormer stage: relay token self-attention over all depths, then octree attention within runs at each depth.

        r_{d, w} = mean of x_d over run w + MLP(mean and covariance of its places),   x_{d + 1} = LN Down(x_d)     first
        r <- r + MHSA(LN r),  r <- r + MLP(LN r)                          a block: all relay tokens of all depths,
        x_d <- x_d + LN DW(x_d),   y = [r_{d, w}; its nodes]                                     then each depth d,
        y <- y + MHSA(LN y; B),  y <- y + MLP(LN y)                                              and each run w
        B_ij = sum_a table_a(clamp(p_{i a} - p_{j a}))    between nodes, 0 with the relay token

    x (B, N, C): the nodes of an octree, in any order -> (B, N, C). A call takes their `coordinates`, integers >= 0,
    (N, 3) for all or (B, N, 3) for each entry, all different; without them, every voxel of dims.grid is a node. x_0: x
    along the z-order, runs of k nodes; x_d, d < levels: the nodes of d depths further up; p: their coordinates there;
    Down: a linear map of the eight children side by side, DW: a depthwise convolution over the 27 nodes next to one,
    both zero where there is none; the 9 numbers of the distribution are those of places in [-1, 1]^3, the covariance's
    divided by count - 1, its upper triangle; their MLP is C wide. Each depth and each block has weights of its own,
    those of the relay tokens serve all depths. Tables reach 4 k / 5 nodes.
    Paper: arXiv 2503.08140; the layers follow the authors' code (hotformerloc_backbone.py, octree.py).
    Deviations: runs start anew in each cloud and the last one is shorter; the authors cut a row of all clouds, where a
    run of two clouds serves the first. The stages before (octree convolutions, OctFormer) and the pooling behind are
    the host's. The convolutions' first weights are torch's. Heads may share keys.
    window: k (default 48; 64 on the larger clouds). levels: depths (3). depth: blocks (1; the paper has 10). mlp_ratio:
    hidden width of the MLPs over C (4). octree_depth: bits of a coordinate (None: the fewest that do).
    Costs N (k + 1) + R^2 pairs a block and head, R = sum_d N_d / k, beside the layers.
    Errors: ValueError or TypeError for coordinates that are no such integers, or too large for octree_depth, and where
    there are neither coordinates nor a grid.

    >>> layer, x = Hotformerloc(Dims(2, 4), window=4), torch.randn(1, 20, 8)
    >>> cloud = torch.randperm(8**3)[:20, None] // torch.tensor([64, 8, 1]) % 8
    >>> layer(x, coordinates=cloud).shape, [len(level.places) for level in layer.tree(x, cloud)[1]][0]
    (torch.Size([1, 20, 8]), 20)
    """

    spec = Spec(
        id="hotformerloc",
        name="HOTFormerLoc (Hierarchical Octree Attention)",
        title="HOTFormerLoc: Hierarchical Octree Transformer for Versatile Lidar Place Recognition Across Ground and "
        "Aerial Views",
        paper="2503.08140",
        year=2025,
        family="spatial_window",
        uses=("attend", "Blocks", "cut_windows"),
        grid=(3, 0),
    )

    def __init__(
        self,
        dims: Dims,
        *,
        window: int = 48,
        levels: int = 3,
        depth: int = 1,
        mlp_ratio: int = 4,
        octree_depth: int | None = None,
    ) -> None:
        super().__init__(dims)
        self.window, self.levels, self.depth = positive("window", window), positive("levels", levels), depth
        self.octree_depth = octree_depth
        if octree_depth is not None and positive("octree_depth", octree_depth) < levels - 1:
            raise ValueError(f"octree_depth: got {octree_depth} for {levels} levels; pass at least {levels - 1}")
        self.down = nn.ModuleList(
            nn.Sequential(nn.Linear(8 * dims.dim, dims.dim), nn.LayerNorm(dims.dim)) for _ in range(levels - 1)
        )
        self.distribution = nn.Sequential(nn.Linear(9, dims.dim), nn.GELU(), nn.Linear(dims.dim, dims.dim))
        self.relay, self.local = nn.ModuleList(), nn.ModuleList()
        for _ in range(positive("depth", depth)):
            self.relay.append(Block(dims, AttentionMixer(attend, dims=dims), mlp_ratio=mlp_ratio))
            self.local.extend(Hosa(dims, window, mlp_ratio) for _ in range(levels))

    def tree(self, x: Tensor, coordinates: Tensor | None) -> tuple[Tensor, list[Level]]:
        """The nodes' order along the curve and all depths of their octree."""
        if coordinates is None:
            if self.dims.grid is None:
                raise ValueError("coordinates: got none, and dims.grid is None; pass integers (N, 3)")
            if math.prod(self.dims.grid) != x.shape[1]:
                raise ValueError(f"x: got {x.shape[1]} nodes for a grid of {self.dims.grid}; pass their coordinates")
            return grown(self.dims.grid, self.bits(0, max(self.dims.grid) - 1), self.levels, x.device)
        if coordinates.is_floating_point() or coordinates.dtype == torch.bool:
            raise TypeError(f"coordinates: got {coordinates.dtype}; pass integers, the numbers of voxels on each axis")
        if tuple(coordinates.shape) != (x.shape[1], 3) or len(torch.unique(coordinates, dim=0)) < x.shape[1]:
            got = f"shape {tuple(coordinates.shape)} for {x.shape[1]} nodes"
            raise ValueError(f"coordinates: got {got}; pass ({x.shape[1]}, 3), all different")
        bits = self.bits(int(coordinates.min()), int(coordinates.max()))
        return grow(coordinates.long(), bits, self.levels)

    def bits(self, least: int, most: int) -> int:
        """Of the coordinates, which lie between these."""
        bits = max(self.levels - 1, 1, most.bit_length()) if self.octree_depth is None else self.octree_depth
        if least < 0 or most >= 2**bits:
            raise ValueError(f"coordinates: got {least} to {most}; pass 0 to {2**bits - 1}, or another octree_depth")
        return bits

    def relays(self, x: Tensor, level: Level) -> Tensor:
        """The first relay tokens of one depth, (B, W, C)."""

        def mean(t: Tensor, less: int = 0) -> Tensor:  # the sum over the nodes of each run, by their number - less
            windows = cut_windows(t, (t.shape[1],), self.window)
            number = cut_windows(torch.ones_like(t[:1, :, :1]), (t.shape[1],), self.window).sum(2)
            return windows.sum(2) / (number - less).clamp(min=1)

        points = level.places.double()[None] * 2.0 ** (1 - level.bits) - 1
        centre = mean(points)
        off = points - centre.repeat_interleave(self.window, 1)[:, : points.shape[1]]
        first, second = torch.triu_indices(3, 3, device=x.device)
        known = torch.cat([centre, mean(off[..., first] * off[..., second], 1)], 2)
        return mean(x) + self.distribution(known.to(x.dtype))

    def encode(self, x: Tensor, coordinates: Tensor | None = None) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """The nodes (B, N_d, C) and relay tokens (B, W_d, C) of all depths, in z-order, and the order (N,)."""
        order, levels = self.tree(x, coordinates)
        nodes = [x[:, order]]
        for down, level in zip(self.down, levels, strict=False):
            nodes.append(down(gather(nodes[-1], level.children).flatten(2)))
        relays = [self.relays(y, level) for y, level in zip(nodes, levels, strict=True)]
        for index, relay in enumerate(self.relay):
            relays = list(relay(torch.cat(relays, 1)).split([r.shape[1] for r in relays], 1))
            for at, level in enumerate(levels):
                nodes[at], relays[at] = self.local[index * self.levels + at](nodes[at], relays[at], level)
        return nodes, relays, order

    def compute(self, x: Tensor, *, coordinates: Tensor | None = None) -> Tensor:
        if coordinates is not None and coordinates.ndim == 3 and len(coordinates) == len(x):
            clouds = zip(x.split(1), coordinates, strict=True)
            return torch.cat([self.compute(one, coordinates=places) for one, places in clouds])
        nodes, _, order = self.encode(x, coordinates)
        return nodes[0][:, order.argsort()]

    def oracle(self, x: Tensor, *, coordinates: Tensor | None = None) -> Tensor:
        if coordinates is not None and coordinates.ndim == 3:
            return torch.cat([self.oracle(x[b : b + 1], coordinates=coordinates[b]) for b in range(len(x))])
        w, d, k, each = Weights(self), self.dims, self.window, itertools.product
        found = list(each(*map(range, d.grid or ()))) if coordinates is None else [*map(tuple, coordinates.tolist())]
        bits = self.octree_depth or max(self.levels - 1, 1, max(map(max, found)).bit_length())

        def curve(place: tuple[int, ...]) -> str:
            return "".join("".join(axis) for axis in zip(*(f"{c:0{bits}b}" for c in place), strict=True))

        def block(t: Tensor, name: str, bias: Tensor) -> Tensor:  # bias (H or 1, n, n)
            counts = d.dim, d.num_kv_heads * d.head_dim, d.num_kv_heads * d.head_dim
            q, k, v = w.linear(w.norm(t, f"{name}.norm_mixer"), f"{name}.mixer.qkv").split(counts, -1)
            t = t + w.linear(weighed(q, k, v, d.head_dim, bias), f"{name}.mixer.out")
            return t + w.mlp(w.norm(t, f"{name}.norm_mlp"), f"{name}.mlp")

        order = sorted(range(len(found)), key=lambda node: curve(found[node]))
        places, nodes = [[found[node] for node in order]], [[x[:, node] for node in order]]
        for level in range(self.levels - 1):
            families: dict[tuple[int, ...], Tensor] = {}
            for place, value in zip(places[-1], nodes[-1], strict=True):
                family = families.setdefault(tuple(c // 2 for c in place), x.new_zeros(len(x), 8, d.dim))
                family[:, place[0] % 2 * 4 + place[1] % 2 * 2 + place[2] % 2] = value
            places.append(list(families))
            nodes.append([])
            for family in families.values():
                nodes[-1].append(w.norm(w.linear(family.flatten(1), f"down.{level}.0"), f"down.{level}.1"))
        relays: list[list[Tensor]] = []
        for level, (where, values) in enumerate(zip(places, nodes, strict=True)):
            relays.append([])
            for start in range(0, len(where), k):
                points = torch.tensor(where[start : start + k], dtype=torch.float64) / 2 ** (bits - level - 1) - 1
                off = points - points.mean(0)
                spread = off.T @ off / max(1, len(points) - 1)
                known = torch.cat([points.mean(0), spread[0], spread[1, 1:], spread[2, 2:]]).to(x)
                relays[-1].append(torch.stack(values[start : start + k]).mean(0) + w.mlp(known, "distribution"))
        for index in range(self.depth):
            every = [token for level in relays for token in level]
            rest = iter(block(torch.stack(every, 1), f"relay.{index}", x.new_zeros(1, 1, 1)).unbind(1))
            relays = [[next(rest) for _ in level] for level in relays]
            for level, where in enumerate(places):
                name, old = f"local.{index * self.levels + level}", nodes[level]
                number = {place: i for i, place in enumerate(where)}
                for i, place in enumerate(where):
                    near = x.new_zeros(len(x), d.dim)
                    for tap, move in enumerate(each((-1, 0, 1), repeat=3)):
                        beside = number.get(tuple(c + m for c, m in zip(place, move, strict=True)))
                        if beside is not None:
                            near = near + w[f"{name}.conv"][tap] * old[beside]
                    nodes[level] = [*nodes[level][:i], old[i] + w.norm(near, f"{name}.norm"), *nodes[level][i + 1 :]]
                table = w[f"{name}.block.mixer.attention.table"]
                for run, start in enumerate(range(0, len(where), k)):
                    held = torch.tensor(where[start : start + k])
                    apart = (held[:, None] - held).clamp(-(4 * k // 5), 4 * k // 5) + 4 * k // 5
                    bias = x.new_zeros(d.num_heads, len(held) + 1, len(held) + 1)
                    for axis in range(3):
                        bias[:, 1:, 1:] = bias[:, 1:, 1:] + table[:, axis][:, apart[..., axis]]
                    tokens = torch.stack([relays[level][run], *nodes[level][start : start + k]], 1)
                    relays[level][run], *rows = block(tokens, f"{name}.block", bias).unbind(1)
                    nodes[level][start : start + k] = rows
        return torch.stack([nodes[0][order.index(node)] for node in range(len(order))], 1)

    @classmethod
    def cases(cls) -> list[Case]:
        every = {"window": 5, "levels": 2, "depth": 2, "mlp_ratio": 1, "octree_depth": 4}
        return [
            Case(Dims(2, 3, grid=(2, 3, 3)), 18, every),
            Case(Dims(4, 2, num_kv_heads=2, grid=(3, 1, 5)), 15, {"window": 4, "mlp_ratio": 2}, batch=1),
            Case(Dims(1, 4, grid=(1, 2, 3)), 6, {"window": 7, "levels": 1, "mlp_ratio": 1}),
        ]

    @classmethod
    def cloud(cls, num: int, side: int) -> Tensor:
        """`num` scattered voxels of side^3, (num, 3)."""
        cells = torch.randperm(side**3, generator=torch.Generator().manual_seed(0))[:num]
        return cells[:, None] // torch.tensor([side**2, side, 1]) % side

    @claim("The pairs of all depths are a small part of N^2: runs of k + 1, and relay tokens among themselves.")
    def cost(cls) -> Finding:
        shares, module = [], cls(Dims(1, 8), window=16)
        for num in (500, 2000):
            x = torch.zeros(1, num, 8)
            pairs = total = 0
            for level in module.tree(x, cls.cloud(num, 32))[1]:
                count = len(level.places)
                runs = -(-count // 16)
                pairs += int(Blocks(17).plan(count + runs, count + runs, 1).num_attended)
                total += runs
            shares.append((pairs + total**2) / num**2)
        return Finding(shares[1] < shares[0] < 1, f"{shares[0]:.1%} of N^2 at N = 500, {shares[1]:.1%} at N = 2000")

    @claim("One block links any two nodes; without attention among the relay tokens it does not.")
    def links(cls) -> Finding:
        seen, cloud = [], cls.cloud(200, 16)
        for across in (True, False):
            module = cls(Dims(2, 4), window=8).double()
            if not across:
                module.relay[0] = nn.Identity()
            x = torch.randn(1, 200, 8, dtype=torch.float64)
            found = reached(functools.partial(module, coordinates=cloud), x, (0, 0))
            seen.append(int(found.sum()))
        figure = f"of 200 scattered nodes one depends on {seen[0]}, without the relay tokens' attention on {seen[1]}"
        return Finding(seen[0] == 200 and seen[1] < 200, figure)

    @claim("The order in which the nodes come does not matter.")
    def any_order(cls) -> Finding:
        module, cloud = cls(Dims(2, 4), window=8).double(), cls.cloud(150, 16)
        x, order = torch.randn(1, 150, 8, dtype=torch.float64), torch.randperm(150)
        with torch.no_grad():
            y = module(x, coordinates=cloud)
            differ = int(module(x[:, order], coordinates=cloud[order]).ne(y[:, order]).any(-1).sum())
        return Finding(differ == 0, f"{differ} of 150 nodes differ when they are shuffled")

    @claim("On scattered clouds, one for each entry, it is what the equations say.")
    def scattered(cls) -> Finding:
        module = cls(Dims(2, 4), window=4, octree_depth=6).double()
        clouds = torch.stack([cls.cloud(40, 8), cls.cloud(80, 40)[40:]])
        x = torch.randn(2, 40, 8, dtype=torch.float64)
        with torch.no_grad():
            y = module(x, coordinates=clouds)
            error = float((y - module.oracle(x, coordinates=clouds)).abs().max())
        allowed = 40 * 8 * torch.finfo(torch.float64).eps * float(y.abs().max())
        return Finding(error <= allowed, f"largest difference {error:.1e} of {float(y.abs().max()):.1f}")
