"""n:m weights: the layout, pruning and packing, operators, Triton and Gluon without a GPU."""

import os
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import interpret

from sparselearn import SparsityError
from sparselearn.kernels.semi_structured import fragments, gemv, pack, pack_transposable, reference, unpack
from sparselearn.structures import NM, TransposableNM

triton = pytest.importorskip("triton", reason="triton is not installed")

PATTERNS = [(2, 4), (1, 4), (2, 8), (1, 8), (2, 16), (1, 16), (1, 2), (1, 3), (3, 4), (5, 7), (15, 16)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def random_mask(neurons, groups, n, m, seed=0):
    g = torch.Generator().manual_seed(seed)
    return reference.magnitude_mask(torch.rand(neurons, groups * m, generator=g), n, m)


# ---- the layout ----------------------------------------------------------------------------------------------


def test_the_layout_by_hand():
    weight = torch.tensor([[0.0, 1, 0, 2, 3, 4, 0, 0, 0, 0, 5, 6], [7, 0, 0, 8, 0, 9, 10, 0, 11, 0, 12, 0]])
    values, places = pack(weight, weight != 0)
    assert values.tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]]
    # Places 1,3 | 0,1 | 2,3: the first is in the lowest bits.
    assert [f"{byte:08b}" for byte in places.flatten().tolist()] == ["01001101", "00001110", "10011100", "00001000"]
    one_of_eight = torch.zeros(1, 24)
    one_of_eight[0, [3, 15, 16]] = torch.tensor([1.0, 2.0, 3.0])
    values, places = reference.pack(one_of_eight, one_of_eight != 0, 1, 8)
    assert values.tolist() == [[1, 2, 3]]
    assert [f"{byte:08b}" for byte in places[0].tolist()] == ["01110011", "00000000"]


@settings(max_examples=40, deadline=None)
@given(pattern=st.sampled_from(PATTERNS), neurons=st.integers(1, 5), groups=st.integers(1, 9),
       dtype=st.sampled_from(FLOATS), seed=st.integers(0, 99))  # fmt: skip
def test_packing_loses_nothing(pattern, neurons, groups, dtype, seed):
    n, m = pattern
    mask = random_mask(neurons, groups, n, m, seed)
    weight = torch.randn(neurons, groups * m, generator=torch.Generator().manual_seed(seed)).to(dtype) * mask
    weight[mask & (torch.rand(mask.shape) < 0.2)] = 0.0  # just grown
    values, places = reference.pack(weight, mask, n, m)
    reference.check_packed(values, places, n, m)
    assert values.shape == (neurons, groups * n)
    assert places.shape == (neurons, reference.places_bytes(groups * n, m))
    assert torch.equal(reference.unpack(values, places, n, m), weight)
    ones = reference.unpack(torch.ones_like(values), places, n, m)
    assert torch.equal(ones == 1, mask)
    assert torch.equal(values.flatten(), weight[mask])  # the order of a checkpoint
    x = torch.randn(3, groups * m, dtype=torch.float64)
    product = reference.linear(x, values.double(), places, None, n, m)
    torch.testing.assert_close(product, x @ weight.double().T)


def test_what_is_not_of_the_pattern_is_refused():
    mask = random_mask(3, 4, 2, 4)
    weight = torch.randn(3, 16)
    broken = mask.clone()
    broken[1, 4:8] = torch.tensor([True, True, True, False])
    for make in (reference.pack, pack):
        with pytest.raises(SparsityError, match=r"exactly 2 active weights of every 4 inputs; neuron 1 has 3 of the "
                           r"inputs 4 to 7 \(shape \[3, 16\]; 1 groups are wrong\)"):  # fmt: skip
            make(weight, broken)
        with pytest.raises(SparsityError, match="must be bool"):
            make(weight, mask.float())
        with pytest.raises(SparsityError, match=r"shape \[3, 12\]; it has \[3, 16\]"):
            make(weight[:, :12], mask)
    for shape in ((3, 14), (3,), (0, 4), (2, 2, 4)):
        with pytest.raises(SparsityError, match="a multiple of 4"):
            pack(torch.randn(shape))
    with pytest.raises(SparsityError, match="a multiple of 4 neurons"):
        pack_transposable(torch.randn(6, 8))
    with pytest.raises(SparsityError, match=r"0 < n < m <= 16; got 1:32"):
        reference.magnitude_mask(torch.randn(2, 32), 1, 32)
    values, places = pack(weight, mask)
    for v, p, message in [
        (values[:, :7], places, "0 < n < m"),
        (values, places[:, :1], r"places \[3, 2\] of torch.uint8"),
        (values, places.int(), "of torch.int32"),
        (values.long(), places, "need to be floating-point"),
        (values, torch.zeros_like(places), "must ascend in every group, below 4"),
        (*pack(weight[:, :4], mask[:, :4])[:1], pack(weight[:, :4], mask[:, :4])[1] | 0x80, "must be 0; some are 1"),
    ]:
        with pytest.raises(SparsityError, match=message):
            reference.check_packed(v, p, 2, 4)


# ---- which weights are kept ------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(pattern=st.sampled_from(PATTERNS), seed=st.integers(0, 99), ties=st.booleans())
def test_magnitude_masks_are_those_of_the_engine(pattern, seed, ties):
    g = torch.Generator().manual_seed(seed)
    n, m = pattern
    weight = torch.randint(-2, 3, (3, 4 * m), generator=g).float() if ties else torch.randn(3, 4 * m, generator=g)
    expected = NM(n, m).topk(weight.abs(), 3 * 4 * n)
    assert torch.equal(reference.magnitude_mask(weight, n, m), expected)


def test_tile_masks_are_all_there_are():
    masks = reference.tile_masks()
    assert len(masks) == len(set(masks)) == 90


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99))
def test_transposable_masks_are_those_of_the_engine(seed):
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mask = reference.transposable_mask(weight)
    assert torch.equal(mask, TransposableNM(2, 4).topk(weight.abs(), 48))
    reference.check_mask(mask.T, 2, 4)
    # Halves, quarters of ties: sums are exact, and the first mask wins.
    tied = (weight * 2).round() / 4
    assert torch.equal(reference.transposable_mask(tied), TransposableNM(2, 4).topk(tied.abs(), 48))


def test_packed_transposes():
    weight = torch.randn(8, 24)
    values, places, values_t, places_t = pack_transposable(weight)
    dense = unpack(values, places)
    assert torch.equal(unpack(values_t, places_t), dense.T)
    assert torch.equal(dense != 0, reference.transposable_mask(weight))
    values[:, 3] = 0.0  # a weight may become zero; its place stays
    again, places_again = reference.transpose(values, places)
    assert torch.equal(places_again, places_t)
    assert torch.equal(again, unpack(values, places).T[unpack(torch.ones_like(values_t), places_t) == 1].view_as(again))
    assert torch.equal(reference.transpose_values(values, places, places_t), again)
    with pytest.raises(SparsityError, match="exactly 2 active weights of every 4"):
        reference.transpose(*pack(torch.ones(4, 4)))


# ---- operators -------------------------------------------------------------------------------------------------


def packed(neurons=8, groups=6, n=2, m=4, dtype=torch.float64):
    torch.manual_seed(0)
    weight = torch.randn(neurons, groups * m, dtype=dtype)
    values, places = reference.pack(weight, random_mask(neurons, groups, n, m), n, m)
    return values, places, torch.randn(5, groups * m, dtype=dtype), torch.randn(neurons, dtype=dtype)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8)])
def test_gradients_are_those_of_finite_differences(n, m):
    values, places, x, bias = packed(4, 3, n, m)
    leaves = [t.requires_grad_() for t in (x, values, bias)]
    assert torch.autograd.gradcheck(lambda x, v, b: gemv(x, v, places, b, n, m), leaves)
    assert torch.autograd.gradcheck(lambda v: unpack(v, places, n, m), leaves[1:2])
    assert torch.autograd.gradgradcheck(lambda x, v, b: gemv(x, v, places, b, n, m), leaves)


@pytest.mark.parametrize("transposable", [False, True])
def test_the_training_product_has_the_dense_layers_gradients(transposable):
    weight = torch.randn(8, 24, dtype=torch.float64)
    values, places, _, places_t = pack_transposable(weight)
    x, bias = torch.randn(5, 24, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, values, bias)]
    other = (places_t, x.new_empty(0)) if transposable else (None, None)

    def product(x, values, bias):
        return torch.ops.sparselearn.sp24_linear(x, values, places, x.new_empty(0), *other, bias)

    torch.testing.assert_close(product(*leaves), F.linear(x, unpack(values, places), bias))
    assert torch.autograd.gradcheck(product, leaves)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own check reads it
def test_operators_pass_torchs_own_checks():
    op = torch.ops.sparselearn
    values, places, x, bias = packed(dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (x, values, bias)]
    torch.library.opcheck(op.nm_unpack.default, (leaves[1], places, 2, 4))
    torch.library.opcheck(op.nm_gather.default, (torch.randn(8, 24, requires_grad=True), places, 2, 4))
    torch.library.opcheck(op.nm_gemv.default, (x, leaves[1], places, leaves[2], 2, 4))
    weight = torch.randn(8, 24)
    values, places, _, places_t = pack_transposable(weight)
    torch.library.opcheck(op.sp24_pack.default, (weight, None))
    torch.library.opcheck(op.sp24_pack.default, (weight, reference.magnitude_mask(weight)))
    torch.library.opcheck(op.sp24_pack_transposable.default, (weight,))
    torch.library.opcheck(op.sp24_transpose_values.default, (values, places, places_t))
    nothing = torch.empty(0)
    arguments = (x, values.requires_grad_(), places, nothing, places_t, nothing, leaves[2])
    torch.library.opcheck(op.sp24_linear.default, arguments)


def test_whole_graphs_compile():
    values, places, x, bias = packed(dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (x, values, bias)]

    def f(x, values, bias):
        return (gemv(x, values, places, bias) + F.linear(x, unpack(values, places))).square().sum()

    expected = torch.autograd.grad(f(*leaves), leaves)
    actual = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


# ---- Triton without a GPU ------------------------------------------------------------------------------------


def test_kernels_agree_with_their_formulas_in_the_interpreter():
    interpret("triton_semi_structured.py")


PATTERN = {"n": 2, "m": 4, "PLACE_BITS": 2}
KERNELS = {  # kernel -> types of its pointers (* is the dtype) and constants
    "pack_kernel": (["*", "i8", "*", "u8"], {"BN": 16, "BG": 64, "HAS_MASK": True}),
    "pack_tiles_kernel": (["*", "*", "u8", "*", "u8"], {"TN": 8, "TI": 32, "LARGEST": 1e37}),
    "gemv_kernel": (["*", "*", "u8", "*", "*"], PATTERN | {"T": 8, "BN": 4, "BK": 64, "HAS_BIAS": True}),
    "unpack_kernel": (["*", "u8", "*"], PATTERN | {"BN": 4, "BI": 256}),
    "gather_kernel": (["*", "u8", "*"], PATTERN | {"BN": 4, "BK": 256}),
    "transpose_values_kernel": (["*", "u8", "u8", "*"], {"BI": 64, "BK": 32}),
}

without_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is chosen by the environment"
)


@without_interpreter
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_compile_for_three_generations_of_gpus(kernel, dtype):
    from triton_compile import TARGETS, compile_for, resources

    from sparselearn.kernels.semi_structured import launch, triton_kernels

    types, constants = KERNELS[kernel]
    if kernel == "pack_tiles_kernel":
        constants = constants | {"MASKS": launch._MASKS, "BITS": launch._BITS}
    for target in TARGETS:
        made = compile_for(
            getattr(triton_kernels, kernel), [dtype if t == "*" else t for t in types], constants, target
        )
        registers, spilled, shared = resources(made, target)
        assert registers <= 255
        assert not spilled, f"{spilled} bytes spilled on sm_{target}"
        assert shared <= 48 * 1024


# ---- sparse tensor cores: fragments by the rules of the PTX ISA, Gluon without a GPU ------------------------------


def exchanged(c, r):
    """The word of a step that lane c of four has in register r, by the instructions of `gluon_kernels.EXCHANGE`."""
    loaded = [[4 * lane + i for i in range(4)] for lane in range(4)]
    give, keep = zip(*[((w[0], w[2]), (w[1], w[3])) if lane % 2 else ((w[1], w[3]), (w[0], w[2]))
                       for lane, w in enumerate(loaded)], strict=True)  # fmt: skip
    got = give[c ^ 1]
    return (*got, *keep[c])[r] if c % 2 else (*keep[c], *got)[r]


def multiplied_by_ptx(kept, places, x, neurons):
    """What `mma.sp.m16n8k32` makes of the fragments, written from the PTX ISA, lane by lane.

    A: register a of lane 4·g + c holds the kept numbers 8·(a // 2) + 2·c and + 1 of row g + 8·(a % 2) of 16. Places:
    2 bits for each kept number; those of row g are the low and of row g + 8 the high half of the word of lanes
    4·g + 2·s and + 1 (s the selector), 8 numbers each. B: register r of lane 4·g + c holds the inputs 8·r + 2·c and + 1
    of token g; those are, after the kernel's exchange, word 2·(c // 2 · 4 + r) + c % 2 of a step.
    """
    y = torch.zeros(len(x), neurons, dtype=torch.float64)
    for block in range(len(kept)):
        for step in range(kept.shape[1]):
            words, selector = places[block, step // 8, :, step % 8 // 2].tolist(), step % 2
            numbers = kept[block, step].contiguous().view(torch.bfloat16).view(32, 4, 2).double()
            for lane in range(32):
                g, c = divmod(lane, 4)
                for register in range(4):
                    for half in range(2):
                        number, row = 8 * (register // 2) + 2 * c + half, g + 8 * (register % 2)
                        word = words[4 * g + 2 * selector + number // 8] >> 16 * (register % 2)
                        k = number // 2 * 4 + (word >> 2 * (number % 8) & 3)
                        column = step * 32 + 2 * exchanged(k // 2 % 4, k // 8) + k % 2
                        y[:, block * 16 + row] += x[:, column].double() * numbers[lane, register, half]
    return y


def test_fragments_are_what_sparse_tensor_cores_read():
    torch.manual_seed(0)
    values, places = pack(torch.randn(32, 512).bfloat16())
    kept, words = fragments.fragments(values, places)
    assert kept.shape == (2, 16, 32, 4)
    assert words.shape == (2, 2, 32, 4)
    x = torch.randn(2, 512).bfloat16()
    expected = reference.linear(x.double(), values.double(), places)
    torch.testing.assert_close(multiplied_by_ptx(kept, words, x, 32), expected)
    assert fragments.fits(32, 512, torch.bfloat16)
    assert not fragments.fits(32, 480, torch.bfloat16)
    assert not fragments.fits(32, 512, torch.float32)


@without_interpreter
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("groups", "chosen"), [
    (1, (1, 8, 1, 1)), (1, (1, 16)), (1, (2, 4, 1, 1)), (2, (2, 4)), (2, (2, 4, 2, 3)), (8, (1, 4)), (8, (4, 2, 4, 2)),
])  # fmt: skip
def test_the_sparse_tensor_core_kernels_compile_for_three_generations_of_gpus(dtype, groups, chosen):
    pytest.importorskip("triton.experimental.gluon", reason="this triton has no Gluon")
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton_compile import TARGETS, GPUTarget, resources

    from sparselearn.kernels.semi_structured import gluon_kernels
    from sparselearn.kernels.semi_structured.launch import DECODE, DecodeBlocks, decode_options

    chosen = DecodeBlocks(*chosen)
    assert chosen in DECODE[groups]
    blocks, warps, rows, stages = chosen
    staged = stages > 1
    kernel = gluon_kernels.staged_decode_kernel if staged else gluon_kernels.decode_kernel
    steps = gluon_kernels.instructions({"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])
    options = decode_options(chosen, groups)
    constants = {"BR": blocks, "BT": groups, "BW": warps, "EVEN": warps != 4, "STEPS": steps, "HAS_BIAS": True}
    constants |= {"RW": rows, "STAGES": stages} if staged else {"X_TOO": stages == 1}
    types = iter(["i32", "i32", "i32", dtype, dtype])
    signature = {
        name: f"*{next(types)}" if name.endswith("_ptr") else "constexpr" if name in constants else "i32"
        for name in kernel.arg_names
    }
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    known = [n.endswith("_ptr") or n in ("neurons", "inputs") for n in kernel.arg_names]
    aligned = {(i,): [["tt.divisibility", 16]] for i, is_known in enumerate(known) if is_known}
    for target in TARGETS:
        source = GluonASTSource(kernel, signature, places, aligned)
        made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
        ptx = made.asm["ptx"]
        assert ptx.count("mma.sp::ordered_metadata") == 8 * blocks // rows * groups
        registers, spilled, shared = resources(made, target)
        assert registers <= options.get("maxnreg", 255)
        assert spilled <= (160 if "maxnreg" in options else 16)  # bytes; of 64 registers; sm_80 with 64 tokens
        assert shared <= 227 * 1024  # of an H100
        if staged:  # places, weights and inputs, 16 bytes at a time, in every stage but the last and in the loop
            copies = stages * (blocks // rows * 9 + groups * 8)
            assert ptx.count("cp.async.cg.shared.global") == copies
            assert "cp.async.ca" not in ptx
        else:
            assert "ld.global.cg.v4.b32" in ptx
            assert "ld.global.cg.b32" not in ptx
            # The pieces of a chunk are on their way together: they fill registers, see `arrived`.
            assert registers >= 36 * blocks + (32 * groups if stages else 0)


@without_interpreter
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("n", "m", "neurons", "warps"), [(1, 4, 4, 4), (2, 4, 8, 4), (1, 8, 8, 2), (1, 16, 8, 1)])
def test_the_kernel_of_cells_compiles_without_gathers(n, m, neurons, warps):
    pytest.importorskip("triton.experimental.gluon", reason="this triton has no Gluon")
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton_compile import TARGETS, GPUTarget, resources

    from sparselearn.kernels.semi_structured import gluon_gemv, launch

    assert launch.Blocks(neurons, 0, warps) in launch.CELLS
    kernel, bits = gluon_gemv.gemv_kernel, reference.place_bits(m)
    constants = {"n": n, "m": m, "PLACE_BITS": bits, "BN": neurons, "BW": warps, "HAS_BIAS": True}
    types = iter(["i32", "bf16", f"i{8 * bits}", "bf16", "bf16"])
    signature = {
        name: f"*{next(types)}" if name.endswith("_ptr") else "constexpr" if name in constants else "i32"
        for name in kernel.arg_names
    }
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    for target in TARGETS:
        source = GluonASTSource(kernel, signature, places, aligned)
        made = triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": warps})
        # 16 bytes of values for each neuron, and as many inputs as a cell has, which pass shared memory once; one
        # instruction for every four inputs of a weight.
        ptx = made.asm["ptx"]
        assert ptx.count("ld.global.v4.b32") == neurons + m // n
        for way in ("ld", "st"):  # with those of the sum over warps
            assert m // n <= len(re.findall(rf"{way}\.shared\S*\.v4\.b32", ptx)) <= m // n + neurons
        assert len(re.findall(r"prmt\.b32 +%r\d+, %r\d+, %r\d+, %r\d+;", ptx)) == 2 * neurons * m
        registers, spilled, shared = resources(made, target)
        assert registers <= 255
        assert not spilled
        assert shared <= max(16 * m // n * 32 * warps, 4 * neurons * warps)


def test_which_products_are_made_of_cells():
    from sparselearn.kernels.semi_structured import launch

    for n, m, groups, dtype, tokens, fits in [
        (1, 4, 16, torch.bfloat16, 1, True), (2, 16, 4, torch.float16, 1, True), (1, 4, 16, torch.bfloat16, 2, False),
        (1, 4, 12, torch.bfloat16, 1, False), (1, 4, 16, torch.float32, 1, False), (3, 8, 8, torch.float16, 1, False),
        (1, 3, 16, torch.float16, 1, False),
    ]:  # fmt: skip
        weight = torch.randn(3, groups * m).to(dtype)
        values, places = reference.pack(weight, reference.magnitude_mask(weight, n, m), n, m)
        x = torch.randn(tokens, groups * m).to(dtype)
        assert launch.cells_fit(x, values, places, n, m) is fits
        assert (launch.CELLS[0] in launch.gemv_candidates(x, values, places, n, m)) is fits
