"""Local attention: each query attends to its neighbourhood, and to one key of each cell of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ..attention.fit import FEWEST, MOST, SURE, solve_tikhonov
from ..attention.grid import cells, landmark_cell, sampled
from ..attention.landmarks import HEAVY, SAMPLE, SUPERPIXEL, count_heavy, heavy_hitters, superpixels, taken_at
from .base import LayerPlan, Method, SelfAttention, Settings, Span, counted, register, untouched

if TYPE_CHECKING:
    from torch import Tensor

# Side of a window of queries, and what its keys reach beyond it: docs/zoo.md has the figures of others.
WINDOW, HALO = 16, 4
# Weight of the penalty of the fit.
MU = 0.05
# Kernels of fused attention take biases of rows that long as they are.
_ALIGNED = 16
# Bytes of the copies of keys and values at a time.
_COPIES = 192 * 2**20
# On the CPU, bytes of either copy in float32 that are taken at once, and of each piece of what is more.
_WHOLE, _PIECE = 12 * 2**20, 2 * 2**20


@dataclass(frozen=True)
class LocalPlan(LayerPlan):
    """What local attention does to one transformer block.

    Attributes:
        near: number of keys in the neighbourhood of a window, all of which its queries attend to.
        rows: number of agents, the queries at which the values are fitted; some count twice on ragged grids.
    """

    near: int = 0
    rows: int = 0

    @property
    def keys(self) -> int:
        """Number of keys that a query attends to, with those that fill up a row of biases."""
        return _aligned(self.near + self.agents + self.heavy)


@register
class Local(Method):
    name = "local"
    summary = (
        "full attention to the neighbourhood of each token, and to one key of each cell of the rest, its value fitted; "
        "it has no k_scale2 and no k_shortcut"
    )
    noun = "landmarks"
    reads = ("agent_ratio", "max_agents", "landmarks", "attn_precision")
    tuned_from = SURE
    candidates = ({"agent_ratio": 0.98}, {"agent_ratio": 0.95}, {"agent_ratio": 0.95, "landmarks": HEAVY})

    def plan(self, settings: Settings, height: int, width: int, r: int) -> LayerPlan:
        """Landmarks in the cells of corrected agents, where all that is attended to is less than half of the layer.

        Where that would be too many, a cell is doubled along one axis after the other.
        """
        N, most = height * width, min(settings.max_agents or MOST, MOST)
        cell, n = landmark_cell(settings.agent_ratio, height, width, FEWEST, most)
        sy, sx = cell
        if n < min(FEWEST, N):
            return untouched(N, f"at most {most} landmarks are too few to fit", "max_agents", r=r)
        y, x = _Axis(height, sy), _Axis(width, sx)
        near = y.near * x.near
        heavy = count_heavy(settings.landmarks, (height, width), cell)
        # every query attends to the near keys and the landmarks, and all tokens are attended to by the agents
        if 2 * (near + 2 * n + heavy) < N:
            rows = y.windows * y.agents * x.windows * x.agents
            return LocalPlan(self.action, N, N, n, cell, r, near=near, rows=rows, heavy=heavy)
        why = f"{near} near keys and {n} landmarks are too many for {N} tokens"
        return untouched(N, why, "agent_ratio" if 2 * near < N else "method", r=r)

    def attend(self, attention: SelfAttention) -> Tensor:
        step = partial(
            local_attention,
            size=attention.size,
            cell=attention.plan.cell,
            landmarks=attention.settings.landmarks,
        )
        return attention.project_out(attention.by_heads(step, *attention.project(attention.x)))

    def flops(self, plan: LayerPlan, channels: int) -> int:
        """As everywhere; WᵀW grows with the number of heads, which is taken to be that of heads of 64 channels."""
        C, N, n, R, K = channels, plan.tokens, plan.agents + plan.heavy, plan.rows, plan.keys
        attention = 4 * N * K * C + 4 * R * N * C  # of the queries, and of the agents to all tokens
        fit = 4 * R * K * C + 2 * R * n * C + 2 * R * n * n * -(-C // 64)
        return 8 * N * C * C + attention + fit

    def steps(self, plan: LayerPlan) -> tuple[tuple[int, int], ...]:
        keys = getattr(plan, "keys", _aligned(plan.agents))
        return ((getattr(plan, "rows", plan.agents), plan.tokens), (plan.tokens, keys))

    def kernels(self, plan: LayerPlan) -> int:
        return 40 if plan.heavy else 20

    def traffic(self, plan: LayerPlan) -> float:
        # keys and values of each neighbourhood are gathered
        return 64.0 if plan.heavy else 50.0

    def words(self, plan: LayerPlan) -> str:
        heavy = f" and {counted(plan.heavy, 'heavy hitters')}" if plan.heavy else ""
        return f"{plan.tokens} tokens → {plan.near} near keys and {plan.agents} landmarks{heavy}"

    def marks(self, plan: LayerPlan, height: int, width: int, agent_tokens: Sequence[int]) -> list[Span]:
        rows, columns = (sampled(*axis) for axis in zip((height, width), plan.cell or (1, 1), strict=True))
        return [(y, x, y + 1, x + 1) for y in rows for x in columns]

    def caption(self, plan: LayerPlan) -> str:
        return (
            f"Dots: {plan.agents} landmarks, one token of each cell. A token attends to its neighbourhood, and to the "
            "landmarks outside it."
        )


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    size: tuple[int, int],
    cell: tuple[int, int],
    window: int = WINDOW,
    halo: int = HALO,
    mu: float = MU,
    landmarks: str = SAMPLE,
) -> Tensor:
    """Full attention to what is near, and to landmarks for the rest, in one softmax.

    Queries are taken in windows. A window's keys are all tokens of its neighbourhood 𝒩, and the landmarks: one token j
    of each cell, which stands for the c_j tokens of its cell outside 𝒩.

        W = σ(Q [K_𝒩, K̄]ᵀ · d^-½ + [0, log c])
        O = W [V_𝒩, Y]

    Y is fitted as in corrected agents, but to what the landmarks have to make up for: at the agents, the queries of
    the landmarks, O is to be full attention V_A. With W there split into W_𝒩 and W̄,

        Y = V̄ − (W̄ᵀW̄ + μ m I)⁻¹ W̄ᵀ (W_𝒩 V_𝒩 + W̄ V̄ − V_A),  m = ‖W‖² / n

    The penalty is measured by all of W: where nearly all attention is near, the landmarks' own weights are tiny, and a
    penalty in proportion to them would let the fit amplify noise.

    Where windows reach over everything, or each token is a landmark, this is full attention.

    Args:
        q: queries (B, H, N, d), N = height · width, in row-major order.
        k: keys (B, H, N, d).
        v: values (B, H, N, d).
        size: (height, width) of the grid of tokens; any.
        cell: (height, width) of a cell in tokens.
        window: upper limit on the side of a window in tokens.
        halo: tokens that a neighbourhood reaches beyond its window on each side; at the edges of the grid, and where
            windows are cut short, it reaches further on the other side.
        mu: weight of the penalty, above 0.
        landmarks: K̄ and V̄: "sample" (those of the tokens j), "superpixel" (means; see `superpixels`), or "heavy" (the
            sample, and `heavy_hitters`, which stand for themselves in windows that they are not near).

    Returns:
        (B, H, N, d). Only W at the agents exists as a matrix. It and the fit are float32 whatever the tensors are.
        Large grids are taken a few heads at a time, as many as keep copies of keys and values below 200 MiB.
    """
    import torch

    from ..attention.tensors import scaled_dot_product_attention

    heavy = count_heavy(landmarks, size, cell)
    rows, heads = _at_once(q, size, cell, window, halo, heavy)
    if (rows, heads) != q.shape[:2]:
        step = partial(local_attention, size=size, cell=cell, window=window, halo=halo, mu=mu, landmarks=landmarks)
        outs = [_of_heads(step, *some, heads) for some in zip(*(t.split(rows) for t in (q, k, v)), strict=True)]
        return (outs[0] if len(outs) == 1 else torch.cat(outs)).transpose(1, 2)
    at = _tables(q, size, cell, window, halo, heavy)
    queries, a = _by_window(q, at)
    # (B·H, windows, keys, d): windows are what fused attention takes for heads, so that one mask does for all
    near = _near(k, v, at)
    if landmarks == SUPERPIXEL:
        near[..., -at.landmarks :, :] = superpixels(k, v, size, cell).flatten(1, 2)[:, :, None]
    bias, far = at.bias, at.far
    if heavy:
        index = heavy_hitters(k, a, size, cell)
        near[..., -heavy:, :] = torch.stack([taken_at(k, index), taken_at(v, index)]).flatten(1, 2)[:, :, None]
        bias = _hiding(index.flatten(0, 1), at, size[1])
        far = bias.float().flatten(0, 1)
    delta = _misfit(a, near, scaled_dot_product_attention(a, k, v), at, far, mu)
    near_v = near[1].clone() if delta.requires_grad else near[1]  # autograd needs these values as they are
    # 0 where the fit failed; float16 ends at 65504
    near_v[:, :, -at.landmarks :].sub_(delta[:, None]).nan_to_num_(0.0)
    out = scaled_dot_product_attention(queries, near[0], near_v, attn_mask=bias)
    # fused kernels lay their output out as these queries or by them, so this is a view
    out = out.transpose(1, 2).flatten(1, 2).unflatten(0, q.shape[:2])
    return out.transpose(1, 2).index_select(1, at.places).transpose(1, 2)


def _at_once(
    q: Tensor, size: tuple[int, int], cell: tuple[int, int], window: int, halo: int, heavy: int
) -> tuple[int, int]:
    """(rows, heads) whose copies of keys and values fit in memory at a time."""
    from ..eager import compiling

    (B, H), bytes_each = q.shape[:2], q.element_size()
    y, x = (_Axis(length, side, window, halo) for length, side in zip(size, cell, strict=True))
    keys = y.windows * x.windows * _aligned(y.near * x.near + len(y.sample) * len(x.sample) + heavy) * q.shape[-1]
    if q.device.type == "cpu" and not compiling():
        # the C library gives larger pieces back to the system, which maps them anew, page by page, in each call
        pairs = B * H if 4 * keys * B * H <= _WHOLE else _PIECE // (4 * keys)
    else:
        pairs = _COPIES // (keys * (2 * bytes_each if bytes_each == 4 else 2 * bytes_each + 8))
    return (min(B, pairs // H), H) if pairs >= H else (1, max(1, pairs))


def _of_heads(step: Any, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """(B, N, H, d): a step taken for so many heads at a time."""
    import torch

    some = zip(*(t.split(heads, dim=1) for t in (q, k, v)), strict=True)
    outs = [step(*each).transpose(1, 2) for each in some]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


def _by_window(q: Tensor, at: _Tables) -> tuple[Tensor, Tensor]:
    """Queries (B·H, windows, M, d), and agents (B, H, windows · m, d)."""
    both = q.index_select(2, at.queries)
    count = both.shape[2] - at.agents
    return both[:, :, :count].flatten(0, 1).unflatten(1, (-1, at.windows)).transpose(1, 2), both[:, :, count:]


def _near(k: Tensor, v: Tensor, at: _Tables) -> Tensor:
    """Keys and values of each window (2, B·H, windows, keys, d)."""
    import torch

    if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
        near = torch.stack([t.index_select(2, at.keys) for t in (k, v)])
    else:  # into one tensor, which is cast by one kernel
        near = k.new_empty(2, *k.shape[:2], len(at.keys), k.shape[-1])
        for t, part in zip((k, v), near, strict=True):
            torch.index_select(t, 2, at.keys, out=part)
    return near.flatten(1, 2).unflatten(2, (at.windows, -1))


def _hiding(index: Tensor, at: _Tables, width: int) -> Tensor:
    """The biases (B·H, windows, 1, keys) that hide heavy hitters, at (B·H, m), from windows that they are near."""
    y, x = index // width, index % width
    near = at.near_y[y][..., None] & at.near_x[x][:, :, None]  # (B·H, m, windows along y, along x)
    bias = at.bias.repeat(len(index), 1, 1, 1)
    bias[..., 0, -index.shape[1] :].masked_fill_(near.flatten(2).mT, float("-inf"))
    return bias


def _misfit(a: Tensor, near: Tensor, v_a: Tensor, at: _Tables, far: Tensor, mu: float) -> Tensor:
    """V̄ − Y of the landmarks (B·H, n, d), float32."""
    import torch

    from ..attention.tensors import no_autocast

    n, batch = at.landmarks, near.shape[1:3]
    with no_autocast(a.device.type):
        near_k, near_v = near.float().flatten(1, 2)
        agents = a.float().reshape(len(near_k), -1, a.shape[-1])
        w = torch.baddbmm(far, agents, near_k.mT, alpha=a.shape[-1] ** -0.5).softmax(dim=-1)
        r = (w @ near_v).view(v_a.shape).sub_(v_a).flatten(0, 1)
        w = w.unflatten(0, batch).flatten(1, 2)
        norm = torch.linalg.vector_norm(w, dim=(-2, -1))[:, None]
        return solve_tikhonov(w[..., -n:], r, (norm, norm), mu / n)


class _Axis(NamedTuple):
    """One axis of a grid: `length` tokens, landmarks in cells of `cell`."""

    length: int
    cell: int
    window: int = WINDOW
    halo: int = HALO

    @property
    def windows(self) -> int:
        """Number of windows."""
        return cells(self.length, self.window)

    @property
    def side(self) -> int:
        """Tokens of a window; all windows are alike, and the last one may reach beyond the edge."""
        return cells(self.length, self.windows)

    @property
    def near(self) -> int:
        """Tokens of a neighbourhood."""
        return min(self.length, self.side + 2 * self.halo)

    @property
    def sample(self) -> range:
        """Where the landmarks are."""
        return sampled(self.length, self.cell)

    @property
    def agents(self) -> int:
        """Agents of a window."""
        return cells(self.side, self.cell)

    def tables(self, device: Any) -> dict[str, Tensor]:
        """What is where along the axis, one row for each window."""
        import torch

        arange = partial(torch.arange, device=device)
        first = self.sample
        begin = self.side * arange(self.windows)[:, None]
        start = (begin - self.halo).clamp(0, self.length - self.near)
        # cells of the landmarks; a cell that is cut short before its middle belongs to the landmark before it
        edges = torch.nn.functional.pad(self.cell * arange(len(first)), (0, 1), value=self.length)
        reach = torch.minimum(start + self.near, edges[1:]) - torch.maximum(start, edges[:-1])
        # a window with fewer landmarks than others takes the next ones too: they are queries like any other
        agents = (begin - first.start + self.cell - 1).clamp(min=0) // self.cell + arange(self.agents)
        return {
            "queries": (begin + arange(self.side)).clamp(max=self.length - 1),
            "keys": start + arange(self.near),
            "landmarks": first.start + self.cell * arange(len(first))[None],
            "agents": first.start + self.cell * agents.clamp(max=len(first) - 1),
            "sizes": edges.diff()[None],
            "inside": reach.clamp(min=0),
            "near": (arange(self.length)[:, None] >= start.T) & (arange(self.length)[:, None] < start.T + self.near),
            "window": arange(self.length)[None] // self.side,
            "offset": arange(self.length)[None] % self.side,
        }


class _Tables(NamedTuple):
    """Which tokens go where.

    Attributes:
        windows: number of windows.
        landmarks: n, and the heavy hitters.
        agents: number of agents of all windows.
        queries: the first token of each window, the second of each, and so on; then the agents of the first window, of
            the second, and so on.
        keys: near keys of each window and the landmarks; between them as many masked ones as align the rows of `bias`.
        bias: log c, 0 for near keys, −∞ for landmarks inside and for what is masked (1, windows, 1, keys).
        far: the same for the windows of each row and head (B · H · windows, 1, keys), float32.
        places: where each token's output is among those of `queries`.
        near_y: whether each row of the grid is near each window along y (height, windows).
        near_x: the same of columns (width, windows).
    """

    windows: int
    landmarks: int
    agents: int
    queries: Tensor
    keys: Tensor
    bias: Tensor
    far: Tensor
    places: Tensor
    near_y: Tensor
    near_x: Tensor


def _tables(q: Tensor, size: tuple[int, int], cell: tuple[int, int], window: int, halo: int, heavy: int) -> _Tables:
    import torch

    # tensors without values, as counters of FLOPs use them, must not be kept
    make = _kept_tables if type(q) is torch.Tensor else _make_tables
    return make(size, cell, window, halo, heavy, len(q) * q.shape[1], q.device, q.dtype)


def _make_tables(
    size: tuple[int, int],
    cell: tuple[int, int],
    window: int,
    halo: int,
    heavy: int,
    pairs: int,
    device: Any,
    dtype: Any,
) -> _Tables:
    import torch

    axes = [_Axis(length, side, window, halo) for length, side in zip(size, cell, strict=True)]
    with torch.inference_mode(False), torch.no_grad():
        y, x = (axis.tables(device) for axis in axes)

        def tokens(name: str) -> Tensor:
            return _pairs(size[1] * y[name], x[name], torch.add)

        windows, n = axes[0].windows * axes[1].windows, tokens("landmarks").shape[1]
        keys = tokens("keys")
        outside = _pairs(y["sizes"], x["sizes"], torch.mul) - _pairs(y["inside"], x["inside"], torch.mul)
        filler = _aligned(keys.shape[1] + n + heavy) - keys.shape[1] - n - heavy
        far = torch.nn.functional.pad(outside.to(dtype).log(), (filler, 0), value=-torch.inf)
        far = torch.nn.functional.pad(far, (0, heavy))
        # what fills up is masked; a near key, for a weight of 0 does not hide a value that is not finite
        keys = torch.cat([keys, keys[:, :1].expand(-1, filler)], dim=1)
        window_of = _pairs(axes[1].windows * y["window"], x["window"], torch.add)
        offset = _pairs(axes[1].side * y["offset"], x["offset"], torch.add)
        agents = tokens("agents").flatten()
        bias = torch.cat([far.new_zeros(windows, keys.shape[1] - filler), far], dim=1)
        # what the heavy hitters' places hold at first does not matter
        landmarks = torch.nn.functional.pad(tokens("landmarks"), (0, heavy)).expand(windows, -1)
        return _Tables(
            windows,
            n + heavy,
            len(agents),
            torch.cat([tokens("queries").mT.flatten(), agents]),
            torch.cat([keys, landmarks], dim=1).flatten(),
            bias[None, :, None],
            bias.float().repeat(pairs, 1)[:, None],
            (offset * windows + window_of).flatten(),
            y["near"],
            x["near"],
        )


_kept_tables = lru_cache(maxsize=32)(_make_tables)


def _pairs(y: Tensor, x: Tensor, combine: Any) -> Tensor:
    """Combine the tables of two axes: (a, i), (b, j) → (a·b, i·j), or (1, …) where neither has windows."""
    return combine(y[:, None, :, None], x[None, :, None, :]).flatten(2).flatten(0, 1)


def _aligned(length: int) -> int:
    return _ALIGNED * cells(length, _ALIGNED)
