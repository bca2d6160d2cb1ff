from __future__ import annotations

import gc
import itertools
import random
import weakref
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from latency.memory import PeakMemory, peak_memory
from latency.model import AdditiveCost
from supernet.choice import Architecture, Choice
from supernet.derive import Infeasible, check_limits, derive
from supernet.limits import Limit
from supernet.mixed_ops.base import Candidates
from supernet.network import Block, Network
from supernet.space import Diagram, SearchSpace, Select
from supernet.spaces.darts import Darts
from supernet.spaces.enas_macro import ENASMacro
from supernet.spaces.mbconv import MBConv
from supernet.spaces.nasbench201 import NasBench201

FLOAT = 4  # bytes


def conv(in_chs: int, out_chs: int) -> nn.Conv2d:
    return nn.Conv2d(in_chs, out_chs, 3, padding=1)


# ---- by hand


def test_a_chain_needs_the_largest_pair_of_neighbours() -> None:
    network = nn.Sequential(conv(3, 8), conv(8, 16), conv(16, 4), nn.Flatten(), nn.Linear(64, 5))
    # 4x4 images, two of them: 3 + 8, 8 + 16, 16 + 4 channels, then 64 + 5 numbers
    assert peak_memory(network, (2, 3, 4, 4)) == 2 * 16 * (8 + 16) * FLOAT


class Branch(nn.Module):
    """A residual connection around a wide and a narrow convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.narrow = conv(3, 8), conv(8, 16), conv(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.narrow(self.wide(x))


def test_a_residual_stays_alive() -> None:
    # x (8) beside the wide output (16) and the narrow one (8); without x it would be 8 + 16
    assert peak_memory(Branch(), (1, 3, 4, 4)) == 16 * (8 + 16 + 8) * FLOAT


def test_the_input_counts_until_it_is_read() -> None:
    assert peak_memory(nn.Identity(), (1, 3, 4, 4)) == 16 * 3 * FLOAT
    assert peak_memory(nn.Sequential(conv(30, 1), conv(1, 1)), (1, 30, 4, 4)) == 16 * 31 * FLOAT


def test_a_batch_norm_is_folded_where_it_alone_reads_a_convolution() -> None:
    def network(*after: nn.Module) -> nn.Module:
        return nn.Sequential(conv(3, 8), *after)

    shape, alone, twice = (1, 3, 4, 4), 16 * 11 * FLOAT, 16 * 16 * FLOAT
    assert peak_memory(network(nn.BatchNorm2d(8), nn.ReLU(inplace=True)), shape) == alone
    assert peak_memory(network(nn.ReLU(inplace=True)), shape) == alone
    assert peak_memory(network(nn.ReLU()), shape) == twice
    assert peak_memory(network(nn.ReLU(inplace=True), nn.BatchNorm2d(8)), shape) == twice

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = conv(3, 8), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return x + self.norm(x)  # a second reader: the norm cannot be folded

    assert peak_memory(Both(), shape) == 16 * 3 * 8 * FLOAT


def test_views_share_memory_and_keep_it() -> None:
    class Slice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            part = x[:, :1]
            return torch.cat([part.relu(), part], dim=1)

    # all of x, one channel of relu, two of the result
    assert peak_memory(Slice(), (1, 8, 4, 4)) == 16 * (8 + 1 + 2) * FLOAT


def test_bytes_go_by_the_networks_dtype_and_nothing_of_it_changes() -> None:
    network = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8)).train()
    network[1].eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    rng = torch.get_rng_state()
    full = peak_memory(network, (1, 3, 4, 4))
    assert peak_memory(network.half(), (1, 3, 4, 4)) == full / 2
    assert [m.training for m in network.modules()] == [True, True, False]
    after = network.float().state_dict()
    assert all(torch.allclose(after[name], tensor, atol=1e-3) for name, tensor in before.items())
    assert torch.equal(torch.get_rng_state(), rng)


# ---- against other ways to count


SPACES: dict[str, SearchSpace] = {
    "nasbench201": NasBench201(widths=(4, 8), num_cells=1, img_size=8),
    "mbconv": MBConv(
        img_size=16, stem_chs=8, first_chs=8, stages=[(8, 2, 1), (16, 2, 2)], kernels=(3, 5),
        expansions=(1, 4), head_chs=24,
    ),
}  # fmt: skip


def liveness(network: nn.Module, shape: tuple[int, ...]) -> int:
    """From a graph of the network without its batch norms: what each node keeps alive."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                act = getattr(child, "act", nn.Identity())
                setattr(parent, name, nn.Sequential(getattr(child, "drop", nn.Identity()), act))
    traced = make_fx(network.eval(), tracing_mode="fake", _allow_non_fake_inputs=True)
    graph = traced(torch.zeros(shape)).graph
    nodes = list(graph.nodes)
    owner: dict[object, object] = {}
    for node in nodes:
        target = str(node.target)
        aliases = "view" in target or "aten.t." in target or "_." in target or "detach" in target
        owner[node] = owner[node.args[0]] if aliases else node
    last = {}
    for step, node in enumerate(nodes):
        for used in (node, *node.all_input_nodes):
            last[owner[used]] = step
    first = {node: step for step, node in enumerate(nodes) if owner[node] is node}
    image = next(n for n in nodes if n.op == "placeholder")

    def size(node: object) -> int:
        value = node.meta["val"]
        return value.numel() * value.element_size()

    counted = [n for n in first if n is image or n.op == "call_function"]
    return max(
        sum(size(n) for n in counted if first[n] <= step <= last[n]) for step in range(len(nodes))
    )


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_the_liveness_of_a_graph(seed: int) -> None:
    """mbconv alone: the other space has batch norms that no convolution precedes."""
    space = SPACES["mbconv"]
    network = space.build_network(space.sample(torch.Generator().manual_seed(seed)), 10).eval()
    shape = (2, 3, 16, 16)
    assert peak_memory(network, shape) == liveness(network, shape)


def test_never_more_than_what_python_keeps_alive() -> None:
    """Python's frames hold tensors past their last use: an upper bound, with real storages."""

    class Live(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.now = self.most = 0
            self.known: set[int] = set()

        def add(self, tensor: Tensor) -> None:
            storage = tensor.untyped_storage()
            if storage._cdata in self.known:
                return
            key, size = storage._cdata, storage.nbytes()
            self.known.add(key)
            self.now += size
            self.most = max(self.most, self.now)

            def gone() -> None:
                self.known.discard(key)
                self.now -= size

            weakref.finalize(storage, gone)

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            if isinstance(output, Tensor) and not func._schema.is_mutable:
                self.add(output)
            return output

    space = SPACES["mbconv"]
    for seed in range(3):
        network = space.build_network(space.sample(torch.Generator().manual_seed(seed)), 10).eval()
        for module in list(network.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, getattr(child, "act", nn.Identity()))
        live = Live()
        x = torch.zeros(1, 3, 16, 16)
        live.add(x)
        live.known.update(p.untyped_storage()._cdata for p in network.parameters())
        with torch.no_grad(), live:
            network(x)
        gc.collect()
        assert peak_memory(network, (1, 3, 16, 16)) <= live.most


# ---- as a cost


def everything(space: SearchSpace) -> list[Architecture]:
    names = [choice.name for choice in space.choices]
    options = itertools.product(*(choice.options for choice in space.choices))
    return [space.architecture(dict(zip(names, chosen, strict=True))) for chosen in options]


def cost_of(space: SearchSpace, **settings: str) -> PeakMemory:
    return PeakMemory(space, 10, (1, 3, space.img_size, space.img_size), **settings)


@pytest.fixture(scope="module", params=SPACES)
def measured(request) -> tuple[SearchSpace, PeakMemory, dict[Architecture, int]]:
    """A space, its cost, and the true peaks of 60 (or all) of its architectures."""
    space = SPACES[request.param]
    generator = torch.Generator().manual_seed(0)
    few = space.size <= 300
    some = everything(space) if few else [space.sample(generator) for _ in range(60)]
    shape = (1, 3, space.img_size, space.img_size)
    peaks = {a: peak_memory(space.build_network(a, 10), shape) for a in some}
    return space, cost_of(space), peaks


def test_architectures_are_as_their_networks(measured) -> None:
    _, cost, peaks = measured
    assert len(set(peaks.values())) > 1
    assert {a: cost.of(a) for a in peaks} == peaks


def test_some_options_never_need_more_than_all(measured) -> None:
    space, cost, peaks = measured
    generator = torch.Generator().manual_seed(1)
    for architecture, peak in peaks.items():
        kept = torch.rand(len(space.choices), generator=generator) < 0.5
        part = {n: o for (n, o), keep in zip(architecture, kept.tolist(), strict=True) if keep}
        assert cost.at_least({}) <= cost.at_least(part) <= peak


def test_edges_that_are_left_out_take_no_memory() -> None:
    space = Darts(width=4, num_cells=3, img_size=8)
    cost, generator = cost_of(space), torch.Generator().manual_seed(0)
    for _ in range(2):
        architecture = space.sample(generator)
        peak = peak_memory(space.build_network(architecture, 10), (1, 3, 8, 8))
        part = {n: o for n, o in architecture if n.startswith("normal")}
        assert cost.at_least({}) <= cost.at_least(part) <= cost.of(architecture) == peak


def test_states_that_are_cut_take_no_memory() -> None:
    space = ENASMacro(width=4, num_layers=3, img_size=8)
    cost, generator = cost_of(space), torch.Generator().manual_seed(0)
    for _ in range(2):
        architecture = space.sample(generator)
        peak = peak_memory(space.build_network(architecture, 10), (1, 3, 8, 8))
        part = {n: o for n, o in architecture if n.startswith("layer")}
        assert cost.at_least({}) <= cost.at_least(part) <= cost.of(architecture) == peak


def test_rows_and_cuts_forbid_nothing_that_is_within(measured) -> None:
    _, cost, peaks = measured
    upper = sorted(peaks.values())[len(peaks) // 3]
    for architecture in [a for a, peak in peaks.items() if peak > upper][:10]:
        assert not cost.cut(architecture, upper).holds(architecture)
    rows = cost.rows(upper)
    assert all(row.holds(a) for a, peak in peaks.items() if peak <= upper for row in rows)
    low = min(peaks.values())
    assert all(row.holds(a) for a, p in peaks.items() if p <= low for row in cost.rows(low))


def random_scores(space: SearchSpace, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        c.name: torch.rand(len(c.options), generator=generator, dtype=torch.float64)
        for c in space.choices
    }


def total(scores: Mapping[str, Tensor], space: SearchSpace, architecture: Architecture) -> float:
    return sum(scores[c.name][c.index(architecture[c.name])].item() for c in space.choices)


def assert_exact(space: SearchSpace, cost: PeakMemory, peaks: dict[Architecture, int]) -> None:
    """Derivation under every peak there is finds what trying all architectures finds."""
    valid = {a: peak for a, peak in peaks.items() if space.is_valid(a)}
    for seed, upper in enumerate(sorted(set(valid.values()))):
        scores = random_scores(space, seed)
        own = space.scores(scores)
        best = max(total(own, space, a) for a, peak in valid.items() if peak <= upper)
        found = derive(space, scores, limits=[Limit(cost, upper)])
        assert valid[found] <= upper
        assert total(own, space, found) == pytest.approx(best, abs=1e-9)
    low = min(valid.values())
    with pytest.raises(Infeasible, match=f"peak_memory <= {low - 1} bytes: .* {low} bytes and"):
        derive(space, random_scores(space, 0), limits=[Limit(cost, low - 1)])


@pytest.mark.parametrize(
    "settings",
    [
        {"expansions": (1, 4), "stages": [(8, 2, 1), (16, 2, 2)]},
        {"expansions": (1, 2, 6), "stages": [(8, 3, 2)]},
    ],
)
def test_derivation_from_a_chain_is_exact(settings) -> None:
    space = MBConv(
        img_size=8, stem_chs=8, stem_stride=1, first_chs=8, kernels=(3,), head_chs=8, **settings
    )
    every = everything(space)
    cost = cost_of(space)
    peaks = {a: peak_memory(space.build_network(a, 10), (1, 3, 8, 8)) for a in every}
    assert len(set(peaks.values())) > 1
    assert_exact(space, cost, peaks)


class Small(NasBench201):
    """The cell with few operations, so that all of them can be tried."""

    def __init__(self, *, in_chans: int = 3, img_size: int = 4) -> None:
        super().__init__(in_chans=in_chans, img_size=img_size, widths=(4,), num_cells=1)
        self.settings = '{"img_size":4,"in_chans":3}'


def test_derivation_from_a_cell_is_exact() -> None:
    space = Small()
    space.exclude(["*=nor_conv_1x1", "*=avg_pool_3x3", "edge_0_1=none", "edge_1_2=none"])
    space.exclude(["edge_2_3=none"])
    every = [a for a in everything(space) if space.excluded.isdisjoint(a)]
    assert len(every) == 2**3 * 3**3
    cost = cost_of(space)
    peaks = {a: peak_memory(space.build_network(a, 10), (1, 3, 4, 4)) for a in every}
    assert len(set(peaks.values())) > 1
    assert_exact(space, cost, peaks)


class Constant(nn.Module):
    """Reads nothing, and its output is smaller than it looks."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(1, dtype=x.dtype, device=x.device).expand(x.shape)


class Half(nn.Module):
    """Its output is a view of twice the memory."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], dim=1)[:, : x.shape[1]]


CANDIDATES = {
    "conv": lambda: conv(4, 4),
    "wide": lambda: nn.Sequential(conv(4, 6), conv(6, 4)),
    "skip": nn.Identity,
    "norm": lambda: nn.BatchNorm2d(4),
    "half": Half,
    "constant": Constant,
}


class Tangle(SearchSpace):
    """Random steps on random states: searchable layers, batch norms and sums."""

    def __init__(self, *, in_chans: int = 3, img_size: int = 4, seed: int = 0) -> None:
        draw = random.Random(seed)
        options = [tuple(draw.sample(sorted(CANDIDATES), 3)) for _ in "abc"]
        choices = tuple(Choice(name, o) for name, o in zip("abc", options, strict=True))
        settings = {"in_chans": in_chans, "img_size": img_size, "seed": seed}
        super().__init__(choices, settings)
        kinds = [*"abc", *draw.choices(["norm", "sum", "a"], k=5)]
        draw.shuffle(kinds)
        self.steps = [
            (kind, draw.randint(max(0, n - 2), n), draw.randint(0, n))
            for n, kind in enumerate(kinds)
        ]

    def build(self, select: Select, num_classes: int, search: bool) -> Network:
        layers: list[nn.Module] = []
        for kind, _, _ in self.steps:
            if kind in self.by_name:
                choice = self.by_name[kind]
                candidates: Candidates = {o: CANDIDATES[o] for o in choice.options}
                layers.append(select(choice, candidates))
            else:
                layers.append(nn.BatchNorm2d(4) if kind == "norm" else nn.Identity())
        trunk = Trunk(layers, self.steps)
        return Network(
            stem=conv(self.in_chans, 4), stem_stride=1, blocks=[Block(trunk, 4, 1)],
            final=nn.Identity(), num_features=4, num_classes=num_classes,
            in_chans=self.in_chans, img_size=self.img_size,
        )  # fmt: skip

    def diagram(self, architecture: Architecture) -> Diagram:
        raise NotImplementedError


class Trunk(nn.Module):
    def __init__(self, layers: list[nn.Module], steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.layers, self.steps = nn.ModuleList(layers), steps

    def forward(self, x: Tensor) -> Tensor:
        states = [x]
        for layer, (kind, first, second) in zip(self.layers, self.steps, strict=True):
            inner = states[first] + states[second] if kind == "sum" else states[first]
            states.append(layer(inner))
        return states[-1]


@pytest.mark.parametrize("seeds", [range(6), pytest.param(range(6, 40), marks=pytest.mark.slow)])
def test_bounds_hold_where_views_constants_and_norms_cross_positions(seeds: range) -> None:
    tight = 0
    for seed in seeds:
        space = Tangle(seed=seed)
        cost, every = cost_of(space), everything(space)
        peaks = {a: peak_memory(space.build_network(a, 10), (1, 3, 4, 4)) for a in every}
        for architecture, peak in peaks.items():
            assert cost.of(architecture) == peak
        for count in range(3):
            for part in {p for a in every for p in itertools.combinations(a, count)}:
                least = min(peak for a, peak in peaks.items() if set(part) <= set(a))
                assert cost.at_least(dict(part)) <= least, (seed, part)
                tight += cost.at_least(dict(part)) == least
        assert_exact(space, cost, peaks)
    assert tight > 100


def test_excluded_candidates_free_no_memory() -> None:
    space = SPACES["nasbench201"]
    allowed = NasBench201(widths=(4, 8), num_cells=1, img_size=8)
    allowed.exclude(["*=none", "*=skip_connect", "*=avg_pool_3x3"])
    assert cost_of(allowed).at_least({}) > cost_of(space).at_least({})


def test_half_precision_halves_and_int8_quarters_the_peak() -> None:
    space = SPACES["mbconv"]
    architecture = space.sample(torch.Generator().manual_seed(0))
    full = cost_of(space).of(architecture)
    assert cost_of(space, dtype="float16").of(architecture) == full / 2
    assert cost_of(space, dtype="int8").of(architecture) == full / 4


def test_limits_that_exclude_each_other_are_named_with_what_each_reaches() -> None:
    space = SPACES["mbconv"]
    memory = cost_of(space)
    sizes = {a: memory.of(a) for a in everything(space)}
    low = min(sizes.values())
    rewards = {c.name: torch.ones(len(c.options), dtype=torch.float64) for c in space.choices}
    for name in ("stage1_0", "stage2_1"):  # cheap where the memory is large
        rewards[name] = torch.tensor([9.0, 9.0, 0.0, 0.0, 9.0][: len(rewards[name])]).double()
    cost = AdditiveCost(space.choices, 0.0, rewards, "latency", "ms")
    both = [a for a, size in sizes.items() if size == low and cost.of(a) <= 2.0]
    assert not both
    check_limits(space, cost, 2.0, [])
    check_limits(space, cost, None, [Limit(memory, low)])
    with pytest.raises(Infeasible, match=rf"latency <= 2 ms and peak_memory <= {low} bytes tog"):
        check_limits(space, cost, 2.0, [Limit(memory, low)])
