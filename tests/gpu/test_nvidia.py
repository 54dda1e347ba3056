"""On an NVIDIA GPU: the packed kernels on shapes that are hard on them, as operators, under autograd and in a graph."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fewbit.errors import KernelError
from fewbit.kernels.nvidia import Nvidia, layout
from fewbit.kernels.nvidia.layout import Recipe
from fewbit.methods.base import Method
from fewbit.nn.choose import TOLERANCE, choose
from fewbit.nn.layers import QLinear
from fewbit.schemes.base import QTensor, parse
from fewbit.schemes.stacked import concatenated
from tests.contract.cases import SPECS, ordinary
from tests.contract.test_kernels import check_grouped
from tests.unit.test_nvidia import TOLD, shapes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
SERVED = [spec for spec in SPECS if isinstance(layout.recipe(parse(spec), 1024), Recipe)]


class Seen(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def packed(spec: str, n: int, k: int) -> QTensor:
    return Method().quantize(ordinary(n, k) + 0.02, parse(spec), None).weight.map(lambda t: t.cuda())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("spec", [spec for spec in SERVED if shapes(spec)])
def test_products(spec: str, dtype: torch.dtype) -> None:
    scheme = parse(spec)
    for n, k in shapes(spec):
        weight = packed(spec, n, k)
        w, prepared = weight.dequantize(), Nvidia().prepare(scheme, weight.parts, (n, k))
        for m in (0, 1, 9, 33, 65, 130, 200, 300, 600):
            x = (torch.randn(m, k, device="cuda") + 0.5).to(dtype)
            got, exact = Nvidia().linear(x, scheme, prepared, (n, k)).float(), x.float() @ w.T
            assert (got - exact).norm() <= TOLERANCE[dtype] * exact.norm(), (n, k, m)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("spec", [*TOLD, "nf4-b64"])
def test_each_row_meets_the_weight_of_its_expert(spec: str, dtype: torch.dtype) -> None:
    shapes = [(n, k) for n, k in ((48, 512), (32, 1024), (256, 272)) if parse(spec).why_not((n, k)) is None]
    kept = [(n, k) for n, k in shapes if isinstance(layout.recipe(parse(spec), k), Recipe)]
    served = [(n, k) for n, k in kept if Nvidia().why_not_grouped(parse(spec), (4, n, k)) is None]
    assert served
    assert served == kept or spec in ("nf4-b64-dq", "fp8-b128")  # whose scales belong to several rows
    for shape in served:
        check_grouped(Nvidia(), spec, dtype, shape, torch.device("cuda"))


def rolled(count: int, n: int, k: int) -> list[QTensor]:
    """Different weights in int4-g128, quickly made."""
    one = packed("int4-g128", n, k)
    return [QTensor(one.codec, one.shape, {name: t.roll(i, 0) for name, t in one.parts.items()}) for i in range(count)]


@pytest.mark.parametrize("path", ["few", "wide", "values", "loop"])
def test_every_way_of_multiplying_experts(path: str) -> None:
    """With more experts than a warp has lanes, and ragged numbers of rows."""
    from fewbit.kernels.nvidia import in_cuda, ops

    e, n, k = 70, 64, 512
    scheme = parse("int4-g128")
    weights = rolled(e, n, k)
    whole = concatenated(weights)
    prepared = list(Nvidia().prepare(scheme, whole.parts, whole.shape))
    how = layout.recipe(scheme, k)
    assert isinstance(how, Recipe)
    counts = [(i * i) % 23 if i % 3 else 0 for i in range(e)]
    m = sum(counts) + 2
    ends = torch.tensor(counts, device="cuda").cumsum(0, dtype=torch.int32)
    x = (torch.randn(m, k, device="cuda") + 0.5).bfloat16()
    sizes = {"few": (4, 1, 1, 2), "wide": (4, 2, 4, 1)}.get(path)
    config = (ops.CUDA, *in_cuda.Sizes(*sizes)) if sizes else ({"values": ops.VALUES, "loop": ops.LOOP}[path],)
    y = ops.grouped(x, prepared, how, ends, n, config)
    assert not y[m - 2 :].any()
    start = 0
    for weight, count in zip(weights, counts, strict=True):
        exact = x[start : start + count].float() @ weight.dequantize().T
        got = y[start : start + count].float()
        assert (got - exact).norm() <= TOLERANCE[torch.bfloat16] * exact.norm()
        start += count


def test_offsets_may_change_between_replays_of_a_graph() -> None:
    scheme, (e, n, k) = parse("int4-g128"), (16, 128, 512)
    weights = rolled(e, n, k)
    whole = concatenated(weights)
    prepared = Nvidia().prepare(scheme, whole.parts, whole.shape)
    x = torch.randn(8, k, device="cuda", dtype=torch.bfloat16)
    chosen = torch.zeros(8, dtype=torch.int64, device="cuda")
    numbers = torch.arange(e, device="cuda")

    def product() -> torch.Tensor:
        ends = torch.searchsorted(chosen.sort()[0], numbers, right=True, out_int32=True)
        return Nvidia().grouped(x, scheme, prepared, (e, n, k), ends)

    product()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = product()
    for seed in range(20):
        x.normal_()
        chosen.copy_(torch.randint(0, e, (8,), generator=torch.Generator().manual_seed(seed)))
        got.zero_()
        graph.replay()
        assert torch.equal(got, product())
        rows = [x[i : i + 1].float() @ weights[c].dequantize().T for i, c in enumerate(chosen.sort()[0].tolist())]
        exact = torch.cat(rows)
        assert (got.float() - exact).norm() <= TOLERANCE[torch.bfloat16] * exact.norm()


@pytest.mark.parametrize("spec", ["nf4-b64", "nf4-b64-dq", "fp4-b64"])
def test_rounded_levels_do_not_add_up_over_columns(spec: str) -> None:
    """Every weight of a code has the same rounding error, so inputs with a mean show it in rows of many columns."""
    n, k, scheme = 512, 7168, parse(spec)
    weight = Method().quantize(torch.randn(n, k) * 0.02, scheme, None).weight.map(lambda t: t.cuda())
    w, prepared = weight.dequantize(), Nvidia().prepare(scheme, weight.parts, (n, k))
    for m in (4, 64, 300):
        x = (torch.randn(m, k, device="cuda") + 0.5).bfloat16()
        got, exact = Nvidia().linear(x, scheme, prepared, (n, k)).float(), x.float() @ w.T
        assert (got - exact).norm() <= 0.4 * TOLERANCE[torch.bfloat16] * exact.norm(), m


@pytest.mark.parametrize(
    "spec", ["int4-g128", "nf4-b64-dq", "q6_k", "int3-g128", "llm.int8", "fp8-row", "fp8-b128", "mxfp4", "nvfp4"]
)
def test_products_as_on_gpus_that_are_not_hopper(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit.kernels.nvidia import in_cuda

    monkeypatch.setattr(in_cuda, "hopper", lambda device: False)
    n, k = 272, 1024
    weight, scheme = packed(spec, n, k), parse(spec)
    w, prepared = weight.dequantize(), Nvidia().prepare(scheme, weight.parts, (n, k))
    for m in (20, 64, 150):
        x = (torch.randn(m, k, device="cuda") + 0.5).bfloat16()
        got, exact = Nvidia().linear(x, scheme, prepared, (n, k)).float(), x.float() @ w.T
        assert (got - exact).norm() <= TOLERANCE[torch.bfloat16] * exact.norm(), m


@pytest.mark.parametrize("spec", ["int4-g128", "q6_k", "nvfp4", "llm.int8"])
def test_sums_that_blocks_share_are_the_same_each_time(spec: str) -> None:
    """Blocks wait for the partial sums of others, and add them in a fixed order."""
    (n, k), scheme = (4099, 4096), parse(spec)
    weight = Method().quantize(torch.randn(n, k, device="cuda") * 0.02, scheme, None).weight
    w, prepared = weight.dequantize(), Nvidia().prepare(scheme, weight.parts, (n, k))
    for m in (50, 100, 255, 300, 600, 1300, 2000):
        x = torch.randn(m, k, device="cuda").bfloat16()
        got = [Nvidia().linear(x, scheme, prepared, (n, k)) for _ in range(20)]
        exact = x.float() @ w.T
        assert (got[0].float() - exact).norm() <= TOLERANCE[torch.bfloat16] * exact.norm(), m
        assert all(torch.equal(each, got[0]) for each in got), m


@pytest.mark.parametrize("rows", [1, 12, 40, 200, 1000])
def test_products_that_overlap_in_a_graph(rows: int) -> None:
    """A chain of layers, each of which reads what the one before it writes while it is still at it."""
    layers = [QLinear(1024, 1024, None).adopt(packed("int4-g128", 1024, 1024), torch.bfloat16) for _ in range(6)]
    x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)

    def chain() -> torch.Tensor:
        y = x
        for layer in layers:
            y = layer(y)
        return y

    with torch.no_grad():
        chain()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = chain()
        for _ in range(50):
            x.normal_()
            expected = chain()
            got.zero_()
            graph.replay()
            assert torch.equal(got, expected)


@pytest.mark.parametrize("recorded", [False, True], ids=["launched", "graphs"])
@pytest.mark.parametrize("rows", [12, 40, 100, 300, 1000])
def test_products_on_two_streams_at_once(rows: int, recorded: bool) -> None:
    """Kernels that run at the same time do not share what they wait for, and do not wait for each other."""
    weights = rolled(6, 1040, 2048)
    layers = [QLinear(2048, 1040, None).adopt(weight, torch.bfloat16) for weight in weights]
    inputs = [torch.randn(rows, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in inputs]
    with torch.no_grad():
        expected = [[layer(x) for layer in layers] for x in inputs]
        torch.cuda.synchronize()
        graphs, outputs = [], []
        for x in inputs if recorded else ():
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1]):
                outputs.append([layer(x) for layer in layers])
        for _ in range(30):
            for number, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    if recorded:
                        graphs[number].replay()
                    else:
                        outputs.append([layer(inputs[number]) for layer in layers])
            torch.cuda.synchronize()
            for got, wanted in zip(outputs, expected, strict=True):
                assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))
            for each in outputs if recorded else ():
                for got in each:
                    got.zero_()
            outputs = outputs if recorded else []
            torch.cuda.synchronize()


def test_the_operator_is_one_that_pytorch_can_compile() -> None:
    from fewbit.kernels.nvidia import ops

    weight = packed("int4-g32", 64, 256)
    how = layout.recipe(weight.codec, 256)
    assert isinstance(how, Recipe)
    prepared = list(Nvidia().prepare(weight.codec, weight.parts, weight.shape))
    x = torch.randn(3, 256, device="cuda", dtype=torch.bfloat16)
    torch.library.opcheck(ops.packed_linear, (x, prepared, list(how), 64))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own code
def test_a_tracer_sees_the_operator_and_eager_code_skips_it() -> None:
    layer = QLinear(256, 64, None).adopt(packed("int4-g32", 64, 256), torch.bfloat16)
    x = torch.randn(3, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer(x)
        traced = torch.jit.trace(lambda given: layer(given), x)
        assert "fewbit::packed_linear" in str(traced.graph)
        assert torch.equal(traced(2 * x), layer(2 * x))
        with Seen() as seen:
            assert torch.equal(layer(x), expected)
        assert "fewbit.packed_linear.default" in seen.names
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), expected)


@pytest.mark.parametrize("rows", [1, 64, 256])
def test_a_product_is_the_first_work_of_a_thread(rows: int) -> None:
    """The driver is called directly, and a new thread has no context of the GPU yet."""
    layer = QLinear(512, 256, None).adopt(packed("int4-g128", 256, 512), torch.bfloat16)
    x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad(), ThreadPoolExecutor(1) as pool:
        expected = layer(x)
        with torch.inference_mode():
            assert torch.equal(pool.submit(lambda: layer(x).detach()).result(), expected)


def test_vmap_sees_the_operator() -> None:
    layer = QLinear(256, 64, None).adopt(packed("int4-g32", 64, 256), torch.bfloat16)
    x = torch.randn(2, 3, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(torch.func.vmap(layer)(x), torch.stack([layer(each) for each in x]))


def test_activations_elsewhere_are_refused() -> None:
    weight = packed("int4-g128", 256, 512)
    prepared = tuple(part.cpu() for part in Nvidia().prepare(weight.codec, weight.parts, weight.shape))
    with pytest.raises(KernelError, match=r"activations are on cuda:0 and the packed weight is on cpu"):
        Nvidia().linear(torch.ones(1, 512, device="cuda", dtype=torch.bfloat16), weight.codec, prepared, weight.shape)


def test_it_is_chosen_and_has_a_gradient() -> None:
    weight = packed("int4-g128", 256, 512)
    assert choose(weight, torch.device("cuda"), torch.bfloat16).name == "nvidia"
    layer = QLinear(512, 256, None).adopt(weight, torch.bfloat16)
    x = torch.randn(17, 512, device="cuda", dtype=torch.bfloat16).requires_grad_()
    seed = torch.randn(17, 256, device="cuda", dtype=torch.bfloat16)
    layer(x).backward(seed)
    exact = seed.float() @ weight.dequantize()
    assert x.grad is not None
    assert (x.grad.float() - exact).norm() <= 1e-2 * exact.norm()


@pytest.mark.parametrize("rows", [1, 16, 300, 3000])
def test_it_is_recorded_in_a_graph(rows: int) -> None:
    layer = QLinear(512, 256, None).adopt(packed("q4_k", 256, 512), torch.bfloat16)
    x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected, graph = layer(x), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = layer(x)
        got.zero_()
        graph.replay()
    assert torch.equal(got, expected)


def test_what_is_not_finite_stays_so_in_its_own_row() -> None:
    layer = QLinear(512, 256, None).adopt(packed("int4-g128", 256, 512), torch.bfloat16)
    for rows in (2, 100):
        x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
        x[1, 7] = torch.inf
        y = layer(x)
        assert not y[1].isfinite().any()
        assert y[0].isfinite().all()
