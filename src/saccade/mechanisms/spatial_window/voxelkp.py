"""VoxelKP: the occupied voxels of a point cloud attend within cubic boxes, as many as each box happens to hold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from saccade import attend
from saccade.contract import Attention, Case, Dims, Finding, Spec, claim
from saccade.errors import positive
from saccade.where import GridBlocks, Labels, Pattern, Plan

LARGEST = 2**31 - 1  # labels are below it


class VoxelKp(Attention):
    """Sparse box attention: a voxel sees the occupied voxels of its own box.

        o_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j   over the j with floor((c_j - c_0) / s) = floor((c_i - c_0) / s)

    q (B, H, N, D), k, v (B, Hkv, N, D): the voxels, in any order -> o (B, H, N, D). c: their coordinates, which a call
    takes as `coordinates`, integers (N, A) of one cloud or (B, N, A) of one each, any number of axes A; c_0: the least
    occupied ones, axis by axis, so that moving a cloud changes nothing. No position is encoded. Clouds of different
    sizes are packed into one row with the number of the cloud as one more axis, of size 1.
    Paper: arXiv 2312.08871, sparse box attention; the boxes, c_0 and the scale follow the authors' code
    and the library that it calls (SparseTransformer). Deviations: c_0 is that of each cloud where these are not packed;
    the authors take that of the batch, which packing keeps. Projections, norms and MLP are the host's; selective
    convolutions and the branches around them are no attention. Heads may share keys.
    size: s, voxels a side, one number or one an axis (default 6). Without coordinates every voxel of dims.grid is
    occupied, or the tokens lie in a line.
    Costs sum_b n_b^2 D for boxes of n_b voxels, in tiles of voxels sorted by box; coordinates on a GPU are waited for,
    and a new cloud is planned anew. Boxes are finer than tiles: of 16,384 voxels in a line, whose boxes hold 6, pairs
    are 0.04 % and tiles of 64 0.9 %, so that a call costs what starting it does. Errors: ValueError or TypeError for
    sizes that are no positive integers or not one an axis, coordinates that are no integers, not (N, A) or (B, N, A),
    and k that are not as many as q.

    >>> kp, x = VoxelKp(Dims(2, 8)), torch.randn(1, 2, 4, 8)
    >>> cloud = torch.tensor([[9, 4, 0], [2, 4, 0], [7, 4, 0], [8, 3, 1]])
    >>> kp(x, x, x, coordinates=cloud).shape, kp.plan(x, x, coordinates=cloud).dense()[0].int().tolist()
    (torch.Size([1, 2, 4, 8]), [[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]])
    """

    spec = Spec(
        id="voxelkp",
        name="VoxelKP (sparse box attention)",
        title="VoxelKP: A Voxel-based Network Architecture for Human Keypoint Estimation in LiDAR Data",
        paper="2312.08871",
        year=2023,
        family="spatial_window",
        uses=("attend", "Labels", "GridBlocks"),
    )

    def __init__(self, dims: Dims, *, size: int | Sequence[int] = 6) -> None:
        super().__init__(dims)
        self.size: int | tuple[int, ...] = tuple(size) if isinstance(size, (list, tuple)) else positive("size", size)
        for side in self.size if isinstance(self.size, tuple) else (self.size,):
            positive("size", side)

    def boxes(self, num_tokens: int, batch: int, coordinates: Tensor) -> Tensor:
        """The number of the box of each voxel, (N,) or (B, N); those of different entries are never the same."""
        if coordinates.is_floating_point() or coordinates.dtype == torch.bool:
            raise TypeError(f"coordinates: got {coordinates.dtype}; pass integers, the numbers of voxels on each axis")
        shape = tuple(coordinates.shape)
        if shape[:-1] not in ((num_tokens,), (batch, num_tokens)) or not shape[-1]:
            wanted = f"({num_tokens}, A), or ({batch}, {num_tokens}, A)"
            raise ValueError(f"coordinates: got shape {shape} for {num_tokens} voxels; pass {wanted}")
        if isinstance(self.size, tuple) and len(self.size) != shape[-1]:
            raise ValueError(f"size: got {self.size} for {shape[-1]} axes; pass one number, or one an axis")
        least = coordinates.amin(-2, keepdim=True)
        boxes = (coordinates - least) // torch.tensor(self.size, device=coordinates.device)
        if boxes.ndim == 3:
            entry = torch.arange(batch, device=boxes.device).view(-1, 1, 1).expand(-1, num_tokens, 1)
            boxes = torch.cat([entry, boxes], -1)
        counts = boxes.flatten(0, -2).amax(0).tolist()
        code = torch.zeros(boxes.shape[:-1], dtype=torch.int64, device=boxes.device)
        for axis, most in enumerate(counts):  # row-major
            code = code * (most + 1) + boxes[..., axis]
        if math.prod(most + 1 for most in counts) <= LARGEST:
            return code
        return torch.unique(code, return_inverse=True)[1]

    def everywhere(self, num_tokens: int) -> Pattern:
        """What voxels see without coordinates, where every place is occupied: the boxes of a grid."""
        grid = self.dims.grid or (num_tokens,)
        sides = self.size if isinstance(self.size, tuple) else (self.size,) * len(grid)
        if len(sides) != len(grid):
            raise ValueError(f"size: got {self.size} for {len(grid)} axes; pass one number, or one an axis")
        if math.prod(grid) != num_tokens:
            raise ValueError(f"q: got {num_tokens} tokens for the grid {grid}, every place of which is a voxel")
        return GridBlocks(grid, sides)

    def plan(self, q: Tensor, k: Tensor, *, coordinates: Tensor | None = None) -> Plan | None:
        """None when each entry of the batch has boxes of its own."""
        if coordinates is None:
            where: Pattern = self.everywhere(q.shape[2])
        else:
            boxes = self.boxes(q.shape[2], len(q), coordinates)
            if boxes.ndim == 2:
                return None
            where = Labels(boxes)
        return where.plan(q.shape[2], k.shape[2], q.shape[1], block=(64, 64), device=q.device)

    def compute(self, q: Tensor, k: Tensor, v: Tensor, *, coordinates: Tensor | None = None) -> Tensor:
        if k.shape[2] != q.shape[2]:
            raise ValueError(f"k: got {k.shape[2]} keys for {q.shape[2]} queries; both are the same voxels")
        if coordinates is None:
            return attend(q, k, v, self.everywhere(q.shape[2]))
        batch, boxes = len(q), self.boxes(q.shape[2], len(q), coordinates)
        if boxes.ndim == 1:
            return attend(q, k, v, Labels(boxes))
        q, k, v = (x.transpose(0, 1).flatten(1, 2)[None] for x in (q, k, v))  # one row of all entries
        return attend(q, k, v, Labels(boxes.flatten()))[0].unflatten(1, (batch, -1)).transpose(0, 1)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor, *, coordinates: Tensor | None = None) -> Tensor:
        if coordinates is None:
            places = itertools.product(*(range(side) for side in self.dims.grid or (q.shape[2],)))
            coordinates = torch.tensor(list(places))
        rows = []
        for entry in range(len(q)):
            cloud = (coordinates if coordinates.ndim == 2 else coordinates[entry]).T.tolist()
            sizes = self.size if isinstance(self.size, tuple) else [self.size] * len(cloud)
            apart = torch.zeros(q.shape[2], q.shape[2], dtype=torch.bool)
            for axis, side in zip(cloud, sizes, strict=True):
                box = torch.tensor([(c - min(axis)) // side for c in axis])
                apart |= box[:, None] != box
            heads = []
            for h in range(q.shape[1]):
                g = h // (q.shape[1] // k.shape[1])
                scores = (q[entry, h] @ k[entry, g].T / q.shape[3] ** 0.5).masked_fill(apart, -torch.inf)
                heads.append(scores.softmax(-1) @ v[entry, g])
            rows.append(torch.stack(heads))
        return torch.stack(rows)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 8, grid=(3, 5, 7)), 105, {"size": (2, 3, 4)}),
            Case(Dims(4, 4, 2, grid=(7, 9)), 63, {"size": 4}),
            Case(Dims(2, 4), 53, {"size": 5}, batch=1),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, object]:
        return {"size": max(dims.grid or (length,))}

    @classmethod
    def clouds(cls, count: int, num: int, side: int) -> tuple[Tensor, Tensor]:
        """q, k, v (3, count, 2, num, 8) in float64, and `num` voxels of side^3 for each entry, (count, num, 3)."""
        generator = torch.Generator().manual_seed(0)
        cells = torch.stack([torch.randperm(side**3, generator=generator)[:num] for _ in range(count)])
        coordinates = torch.stack([cells // side**2, cells // side % side, cells % side], -1)
        return torch.randn(3, count, 2, num, 8, generator=generator, dtype=torch.float64), coordinates - 7

    @claim("On scattered voxels it is dense attention under a mask of pairs in one box, clouds apart or packed.")
    def dense_under_mask(cls) -> Finding:
        (q, k, v), coordinates = cls.clouds(3, 97, 16)
        module = cls(Dims(2, 8))
        apart = module(q, k, v, coordinates=coordinates)
        error = float((apart - module.oracle(q, k, v, coordinates=coordinates)).abs().max())
        numbered = torch.cat([torch.arange(3).view(3, 1, 1).expand(3, 97, 1), coordinates], -1).flatten(0, 1)
        row = torch.randperm(291, generator=torch.Generator().manual_seed(1))  # lengths and order do not matter
        row = row[:200]
        x = [each.transpose(1, 2).flatten(0, 1)[row].transpose(0, 1)[None] for each in (q, k, v)]
        packed = cls(Dims(2, 8), size=(1, 6, 6, 6))
        other = packed(*x, coordinates=numbered[row])
        error = max(error, float((other - packed.oracle(*x, coordinates=numbered[row])).abs().max()))
        counts = module.boxes(97, 3, coordinates).unique(return_counts=True)[1]
        bound = torch.finfo(torch.float64).eps * 97 * float(v.abs().max())
        figure = f"{error:.0e} apart on 291 voxels in {len(counts)} boxes of {int(counts.min())} to {int(counts.max())}"
        return Finding(error <= bound, figure)

    @claim("Moving a cloud changes nothing; a voxel below the least coordinates draws all boxes anew.")
    def anchored(cls) -> Finding:
        (q, k, v), coordinates = cls.clouds(1, 200, 16)
        module, cloud = cls(Dims(2, 8)), coordinates[0]
        moved = module(q, k, v, coordinates=cloud + torch.tensor([40, -3, 7]))
        same = bool((moved == module(q, k, v, coordinates=cloud)).all())
        more = torch.cat([cloud, cloud.amin(0, keepdim=True) - 2])
        before, after = (Labels(module.boxes(len(c), 1, c)).dense(len(c))[0, :200, :200] for c in (cloud, more))
        kept = int((before & after).sum()) / int(before.sum())
        return Finding(same and kept < 1, f"the same bits after a move; one voxel more keeps {kept:.0%} of the pairs")

    @claim("The work is the sum of the squares of what the boxes hold: linear in the voxels at one density.")
    def work(cls) -> Finding:
        found, right = [], True
        for num, side in ((500, 24), (4000, 48)):
            (q, k, _), coordinates = cls.clouds(1, num, side)
            module = cls(Dims(2, 8))
            counts = module.boxes(num, 1, coordinates[0]).unique(return_counts=True)[1]
            plan = module.plan(q, k, coordinates=coordinates[0])
            assert plan is not None
            right &= int(plan.num_attended) == int(counts.square().sum())
            found.append((int(plan.num_attended) / num, plan.num_tiles * 64 * 64 / num))
        (few, tile), (many, tiles) = found
        holds = right and many < 1.2 * few and tiles < 1.2 * tile
        figure = f"{few:.1f} and {many:.1f} keys a voxel of 500 and 4000, {tile:.0f} and {tiles:.0f} in tiles of 64"
        return Finding(holds, figure)
