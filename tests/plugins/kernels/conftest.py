"""Where the kernels' tables run: interpreted on the CPU, and compiled on a GPU under the marker gpu.

A process does one or the other: on a machine with a GPU the interpreter's half is skipped, unless the GPU is hidden.
"""

from collections import defaultdict

import pytest
import torch

from deepseek_trt.plugins.kernels import interpreter

if not torch.cuda.is_available():
    interpreter.enable()


def pytest_generate_tests(metafunc):
    """Each test that takes `device` runs twice."""
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)


@pytest.fixture
def device(request):
    """The torch device to put the operands on."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA GPU on this machine")
        return torch.device("cuda")
    if torch.cuda.is_available():
        pytest.skip("this process compiles kernels; set CUDA_VISIBLE_DEVICES to nothing to interpret them")
    return torch.device("cpu")


def ulp(dtype):
    """The distance from 1 to the next number."""
    return torch.finfo(dtype).eps


@pytest.fixture
def assert_within():
    """A check of a result against float64, in ulps of the result's dtype.

    First no inf or NaN; then each element, against `magnitude`, what its sum would be were all terms positive (an
    element that cancels to nearly nothing is not held to its own size); then the whole, as a root of mean squares.
    """

    def check(actual, expected, magnitude, ulps, rms_ulps):
        actual, expected, magnitude = (t.detach().cpu() for t in (actual, expected, magnitude))
        assert actual.isfinite().all(), "inf or NaN in the result"
        error = (actual.double() - expected).abs()
        worst = (error / magnitude.clamp(min=1e-30)).max().item() / ulp(actual.dtype)
        assert worst <= ulps, f"an element is {worst:.2f} ulps off; {ulps} allowed"
        rms = (error.norm() / expected.norm()).item() / ulp(actual.dtype)
        assert rms <= rms_ulps, f"the result is {rms:.2f} ulps off as a whole; {rms_ulps} allowed"

    return check


class Pages:
    """A page pool whose every unused slot is NaN and whose every unused table entry is far out of the pool."""

    FAR = 1 << 28

    def __init__(self, dtype, lengths, new, width, page, device, spare_entries=2):
        """Cache of lengths[b] random tokens a row, with room for new[b] more, in pages in random order."""
        entries = [-(-(past + more) // page) for past, more in zip(lengths, new, strict=True)]
        pages = (torch.randperm(sum(entries) + 3) + 1)[: sum(entries)].split(entries)  # page 0 is scratch
        self.page, self.lengths = page, lengths
        self.pool = torch.full((sum(entries) + 4, page, width), torch.nan).to(dtype)
        self.table = torch.full((len(lengths), max(entries) + spare_entries), self.FAR, dtype=torch.int32)
        self.past = torch.tensor(lengths, dtype=torch.int32)
        self.tokens = [torch.randn(past, width).to(dtype) for past in lengths]
        for row, used in enumerate(pages):
            self.table[row, : len(used)] = used.int()
            for t, token in enumerate(self.tokens[row]):
                self.pool[used[t // page], t % page] = token
        self.pool, self.table, self.past = (t.to(device) for t in (self.pool, self.table, self.past))

    def read(self, pool, row, length):
        """Tokens 0..length-1 of a row, in float64, as `pool` holds them."""
        table, pool = self.table.cpu().long(), pool.cpu()
        where = [(table[row, t // self.page], t % self.page) for t in range(length)]
        return torch.stack([pool[at] for at in where]).double()


@pytest.fixture
def make_pages():
    """The class Pages."""
    return Pages


@pytest.fixture
def use_tiles(monkeypatch):
    """Have interpreted kernels take the tiles that ship for a chip; a GPU keeps its own."""

    def use(sm, *modules):
        for module in modules:
            stock = module.chip_of
            monkeypatch.setattr(module, "chip_of", lambda t, stock=stock: sm if t.device.type == "cpu" else stock(t))

    return use


@pytest.fixture
def poison_new_memory(monkeypatch):
    """Have what the wrappers allocate hold NaN and nonsense, as a workspace may."""
    stock = torch.Tensor.new_empty

    def poisoned(self, *sizes, **options):
        out = stock(self, *sizes, **options)
        return out.fill_(torch.nan if out.is_floating_point() else -77)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.fixture
def note_accesses(monkeypatch):
    """Of each interpreted launch in turn: the addresses that each program loads, and that it stores to, by grid index.

    A program that stores to one address twice is noted with it once.
    """
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    launches = []
    stock_args, stock_load, stock_store = (
        GridExecutor._init_args_hst,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def note_launch(self, args, kwargs):
        launches.append((defaultdict(set), defaultdict(set)))
        return stock_args(self, args, kwargs)

    def note(found, builder, pointers, mask):
        found[builder.grid_idx].update(pointers.data[mask.data.astype(bool)].reshape(-1).tolist())

    def load(self, pointers, mask, *rest):
        note(launches[-1][0], self, pointers, mask)
        return stock_load(self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        note(launches[-1][1], self, pointers, mask)
        return stock_store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(GridExecutor, "_init_args_hst", note_launch)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", store)
    return launches


@pytest.fixture
def memory_watch(monkeypatch):
    """Have the interpreter refuse every load and store outside the tensors that the kernel was given."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    blocks = []
    stock_args, stock_load, stock_store = (
        GridExecutor._init_args_hst,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def note_args(self, args, kwargs):
        host = stock_args(self, args, kwargs)
        tensors = [arg for arg in host[0] if isinstance(arg, torch.Tensor)]
        blocks[:] = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]
        return host

    def check(pointers, mask):
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        for address in pointers.data[mask.data.astype(bool)].reshape(-1).astype("uint64").tolist():
            assert any(first <= address and address + size <= last for first, last in blocks), "out of bounds"

    def load(self, pointers, mask, *rest):
        check(pointers, mask)
        return stock_load(self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        check(pointers, mask)
        return stock_store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(GridExecutor, "_init_args_hst", note_args)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", store)
