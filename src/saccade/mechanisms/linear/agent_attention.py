"""Agent attention: a few pooled queries ask the tokens, and the tokens ask them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Attention, Case, Dims, Finding, Spec, claim
from saccade.errors import positive
from saccade.mix import DepthwiseConv, pool_tokens


class AgentBias(nn.Module):
    """Score bias of agents and tokens: a small map an agent, enlarged bilinearly, plus a row and a column term."""

    def __init__(self, num_heads: int, num_agents: int, grid: tuple[int, ...], size: int) -> None:
        super().__init__()
        self.num_agents, self.grid = num_agents, grid
        self.block, self.row, self.column = (
            nn.Parameter(nn.init.trunc_normal_(torch.empty(num_heads, num_agents, *shape), std=0.02))
            for shape in ((size, size), grid[:1], grid[1:])
        )

    def of(self, agents: Tensor, tokens: Tensor) -> Tensor:
        """(H, agents, tokens)."""
        y, x = tokens // self.grid[1], tokens % self.grid[1]
        stretch = (self.hats(y, 0)[:, :, None] * self.hats(x, 1)[:, None, :]).flatten(1)  # (tokens, size^2)
        whole = self.block.flatten(2) @ stretch.T + self.row[:, :, y] + self.column[:, :, x]
        return whole[:, agents]

    def hats(self, coordinates: Tensor, axis: int) -> Tensor:
        """(tokens, size): what each cell of the small map counts for at these coordinates; the edges are aligned."""
        size, dtype = self.block.shape[-1], torch.promote_types(self.block.dtype, torch.float32)
        at = (coordinates.to(dtype) + 0.5) * size / self.grid[axis] - 0.5
        apart = at.clamp(0, size - 1)[:, None] - torch.arange(size, device=at.device)
        return (1 - apart.abs()).clamp(min=0).to(self.block.dtype)


class AgentsAsk(AgentBias):
    """The bias where agents are the queries and tokens the keys; queries are the last of the positions."""

    def forward(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return self.of(q_pos - (torch.Size(self.grid).numel() - self.num_agents), k_pos)


class TokensAsk(AgentBias):
    """The bias where tokens are the queries and agents the keys."""

    def forward(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return self.of(k_pos, q_pos - (self.num_agents - torch.Size(self.grid).numel())).mT


class AgentAttention(Attention):
    """Agent attention: pooled queries gather from all tokens, and all tokens ask them.

        A = pool(Q),   O = softmax(Q A^T / sqrt(D) + B2) [softmax(A K^T / sqrt(D) + B1) V] + DWC(V)

    Q, K, V (B, H, N, D): tokens of a row-major grid (Y, X); A (B, H, n, D): the queries averaged over n cells of the
    grid; DWC: a biased depthwise convolution over the grid, one kernel for each channel of each head; B1 (H, n, N) and
    B2 (H, N, n) each b[h, a, (y, x)] = bilinear(block[h, a])[y, x] + row[h, a, y] + column[h, a, x].
    Paper: arXiv 2312.08874, section 4. Pooling, the parts of the biases and DWC on V follow the authors' code.
    Deviations: the projections and the reduction of keys in pyramids belong to the host. Grouped heads share V: query
    head h convolves the values of key head h // (H // Hkv).
    agent_grid: cells of the pooled grid, n = their product (default (7, 7)). bias_size: side of the block maps (7).
    kernel: side of the convolution (3).
    Costs 4 N n D multiplications a head.
    Errors: ValueError when dims.grid has not two axes, keys are not one a query, or values have not D channels.

    >>> layer = AgentAttention(Dims(num_heads=2, head_dim=4, grid=(5, 7)), agent_grid=(2, 3))
    >>> tuple(layer(*torch.randn(3, 1, 2, 35, 4)).shape)
    (1, 2, 35, 4)
    """

    spec = Spec(
        id="agent_attention",
        name="Agent Attention",
        title="Agent Attention: On the Integration of Softmax and Linear Attention",
        paper="2312.08874",
        year=2023,
        family="linear",
        uses=("attend", "pool_tokens", "depthwise_conv"),
        grid=2,
    )
    per_head = True

    def __init__(
        self, dims: Dims, *, agent_grid: tuple[int, int] = (7, 7), bias_size: int = 7, kernel: int = 3
    ) -> None:
        super().__init__(dims)
        if len(agent_grid) != 2:
            raise ValueError(f"agent_grid: got {agent_grid}; pass the rows and columns of the pooled grid")
        if positive("kernel", kernel) % 2 == 0:
            raise ValueError(f"kernel: got {kernel}, which has no centre; pass an odd size")
        self.grid, self.agent_grid = dims.grid or (), tuple(positive("agent_grid", cells) for cells in agent_grid)
        shape = (dims.num_heads, torch.Size(self.agent_grid).numel(), self.grid, positive("bias_size", bias_size))
        self.agents_ask, self.tokens_ask = AgentsAsk(*shape), TokensAsk(*shape)
        self.conv = DepthwiseConv(dims.dim, (kernel, kernel))

    def through_agents(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The two softmaxes without the convolution: (B, H, N, Dv)."""
        agents = pool_tokens(q.flatten(0, 1), self.grid, self.agent_grid).unflatten(0, q.shape[:2])  # (B, H, n, D)
        return attend(q, agents, attend(agents, k, v, bias=self.agents_ask), bias=self.tokens_ask)

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if k.shape[2] != q.shape[2]:
            raise ValueError(
                f"k: got {k.shape[2]} tokens beside {q.shape[2]} queries; pass those of the same grid {self.grid}"
            )
        if v.shape[3] != self.dims.head_dim:
            width = self.dims.head_dim
            raise ValueError(f"v: got {v.shape[3]} channels; the convolution was built for head_dim {width}")
        values = v.repeat_interleave(self.dims.group, 1).transpose(1, 2).flatten(2)  # (B, N, H * D)
        local = self.conv(values, self.grid).unflatten(2, (self.dims.num_heads, -1)).transpose(1, 2)
        return self.through_agents(q, k, v) + local

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w, (height, width), (rows, columns) = dict(self.named_parameters()), self.grid, self.agent_grid
        reads = [h // (q.shape[1] // k.shape[1]) for h in range(q.shape[1])]
        k, v = k[:, reads], v[:, reads]
        image, values = (t.reshape(*t.shape[:2], height, width, -1) for t in (q, v))

        def cell(index: int, cells: int, length: int) -> slice:
            return slice(index * length // cells, -(-(index + 1) * length // cells))

        def corners(index: int, length: int, size: int) -> list[tuple[int, float]]:
            at = min(max((index + 0.5) * size / length - 0.5, 0.0), size - 1.0)
            low = int(at)
            return [(low, 1 - at + low), (min(low + 1, size - 1), at - low)]

        def bias(name: str) -> Tensor:
            block, each = w[f"{name}.block"], []
            size = block.shape[-1]
            for y in range(height):
                for x in range(width):
                    total = w[f"{name}.row"][:, :, y] + w[f"{name}.column"][:, :, x]
                    for i, share in corners(y, height, size):
                        for j, part in corners(x, width, size):
                            total = total + share * part * block[:, :, i, j]
                    each.append(total)
            return torch.stack(each, -1)  # (H, n, N)

        def softmax(scores: Tensor) -> Tensor:
            weights = (scores - scores.detach().amax(-1, keepdim=True)).exp()
            return weights / weights.sum(-1, keepdim=True)

        patches = [(cell(i, rows, height), cell(j, columns, width)) for i in range(rows) for j in range(columns)]
        agents = torch.stack([image[:, :, y, x].mean((2, 3)) for y, x in patches], 2)
        scale = q.shape[-1] ** -0.5
        gathered = softmax(torch.einsum("bhad,bhnd->bhan", agents, k) * scale + bias("agents_ask")) @ v
        spread = softmax(torch.einsum("bhnd,bhad->bhna", q, agents) * scale + bias("tokens_ask").transpose(1, 2))
        local, reach = [], w["conv.weight"].shape[-1] // 2
        kernel, shift = (
            w[f"conv.{name}"].reshape(q.shape[1], q.shape[3], *w[f"conv.{name}"].shape[2:])
            for name in ("weight", "bias")
        )
        for y in range(height):
            for x in range(width):
                total = shift.expand(len(q), -1, -1)
                for i in range(max(0, y - reach), min(height, y + reach + 1)):
                    for j in range(max(0, x - reach), min(width, x + reach + 1)):
                        total = total + kernel[:, :, i - y + reach, j - x + reach] * values[:, :, i, j]
                local.append(total)
        return spread @ gathered + torch.stack(local, 2)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 3, grid=(5, 7)), 35, {"agent_grid": (2, 3), "bias_size": 3}),
            Case(Dims(4, 2, num_kv_heads=2, grid=(3, 11)), 33, {"agent_grid": (2, 2), "kernel": 5}, batch=1),
            Case(Dims(1, 5, grid=(3, 3)), 9),
        ]

    @claim("The two softmaxes compose to weights of rank at most n whose rows sum to 1.")
    def low_rank(cls) -> Finding:
        layer, (q, k, _) = cls._sample()
        with torch.no_grad():
            weights = layer.through_agents(q, k, torch.eye(35, dtype=q.dtype).expand(1, 2, -1, -1))
        rank, apart = int(torch.linalg.matrix_rank(weights).max()), float((weights.sum(-1) - 1).abs().max())
        # A row sums 35 products of 6 terms.
        holds = rank <= 6 and apart <= (35 + 6) * torch.finfo(q.dtype).eps
        return Finding(holds, f"rank {rank} of 35 x 35 weights with 6 agents, rows sum to 1 within {apart:.1e}")

    @claim("It is linear attention with the features softmax(Q A^T) of queries and softmax(A K^T)^T of keys.")
    def generalised_linear(cls) -> Finding:
        layer, (q, k, v) = cls._sample()
        with torch.no_grad():
            agents = pool_tokens(q[0], layer.grid, layer.agent_grid)[None]
            few, all_ = torch.arange(6), torch.arange(35)
            of_queries = (q @ agents.mT / 2 + layer.tokens_ask.of(few, all_).mT).softmax(-1)
            of_keys = (agents @ k.mT / 2 + layer.agents_ask.of(few, all_)).softmax(-1).mT
            dense, linear = (of_queries @ of_keys.mT) @ v, layer.through_agents(q, k, v)
        apart = float((dense - linear).abs().max() / v.abs().max())
        holds = apart <= (35 + 6) * torch.finfo(q.dtype).eps
        return Finding(holds, f"largest difference {apart:.1e} of the largest value")

    @claim("The work is O(N n): linear in the tokens, and less than that of all pairs.")
    def linear_work(cls) -> Finding:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        work = []
        for height in (16, 32):
            layer = cls(Dims(2, 8, grid=(height, 24)), agent_grid=(3, 3)).requires_grad_(False)
            # Fused kernels hide their products from the counter.
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                layer(*torch.randn(3, 1, 2, height * 24, 8))
            work.append(counter.get_total_flops())
        share = work[1] / (4 * 2 * 768**2 * 8)
        figure = f"{work[1] / work[0]:.2f} times the work at twice N, {share:.2f} of dense at 768"
        return Finding(work[1] <= 2 * work[0] and share < 1, figure)

    @classmethod
    def _sample(cls) -> tuple[AgentAttention, Tensor]:
        layer = cls(Dims(2, 4, grid=(5, 7)), agent_grid=(2, 3)).double()
        return layer, torch.randn(3, 1, 2, 35, 4, dtype=torch.float64)
