"""2:4 products through cuSPARSELt, by a library that stands in for it."""

import itertools

import pytest
import torch

from sparselearn import SparsityError
from sparselearn.kernels import crossover
from sparselearn.kernels.semi_structured import cslt, pack, reference
from sparselearn.kernels.semi_structured import search as search_module
from sparselearn.kernels.semi_structured.search import DEFAULT, Product, known, search


def packed(dtype):
    torch.manual_seed(0)
    values, places = pack(torch.randn(32, 64).to(dtype))
    return values, places, torch.randn(5, 64).to(dtype), torch.randn(32).to(dtype)


class Library:
    """Keeps values in row-major order, or not, and metadata in an order of its own, as the real one does."""

    def __init__(self, wrong=""):
        self.wrong, self.searched, self.used = wrong, 0, []

    def compress(self, dense):
        kept = dense != 0
        # Where a group has fewer than two weights that are not zero, the library fills up with what it likes.
        score = kept.unflatten(1, (-1, 4)).float() + torch.tensor([0.0, 0.1, 0.2, 0.3])
        values, places = reference.pack(dense, reference.magnitude_mask(score.flatten(1)))
        values = values.flip(1) if self.wrong == "values" else values
        meta = places.flip(0).flatten()
        self.shape = dense.shape
        return torch.cat([values.flatten(), meta.view(dense.dtype)]).view(len(dense), -1)

    def multiply(self, blob, b, bias=None, transpose_result=False, alg_id=0, split_k=1, split_k_mode=-1):
        assert transpose_result
        self.used.append((alg_id, split_k, split_k_mode))
        if self.wrong == "algorithm" and alg_id:
            raise RuntimeError("CUDA error: operation not supported")
        neurons, inputs = len(blob), len(b)
        flat = blob.flatten()
        values, meta = flat[: neurons * inputs // 2].view(neurons, -1), flat[neurons * inputs // 2 :]
        places = meta.view(torch.uint8).view(neurons, -1).flip(0)
        places = places.flip(1) if self.wrong == "metadata" else places
        y = b.T.float() @ reference.unpack(values.float(), places).T
        return (y + (0 if bias is None else bias.float())).to(b.dtype)

    def search(self, *arguments):
        self.searched += 1
        return (17, 1, -1, 40)


def on_cpu(products):
    return list(search_module.found_here(products, "cpu")), ""


@pytest.fixture
def library(monkeypatch, tmp_path, request):
    monkeypatch.setenv("SPARSELEARN_CACHE", str(tmp_path))
    monkeypatch.setattr(crossover, "_tables", {})
    made = Library(getattr(request, "param", ""))
    monkeypatch.setattr(torch, "_cslt_compress", made.compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", made.multiply)
    monkeypatch.setattr(search_module, "_in_a_process", on_cpu)
    monkeypatch.setattr(torch._C._cusparselt, "mm_search", made.search, raising=False)
    return made


def test_new_values_go_before_the_librarys_metadata(library):
    values, places, x, bias = packed(dtype=torch.bfloat16)
    values[:, ::3] = 0.0  # the library itself would choose other places
    blob = cslt.blob(values, cslt.metadata(values, places))
    x = torch.randn(21, 64, dtype=torch.bfloat16)
    y = cslt.product(x, blob, bias)
    assert y.shape == (21, 32)
    torch.testing.assert_close(y.float(), reference.linear(x.float(), values.float(), places, bias.float()),
                               rtol=1e-2, atol=1e-2)  # fmt: skip
    assert cslt.self_test(torch.device("cpu"), torch.bfloat16) == ""
    assert cslt.self_test(torch.device("cpu"), torch.float16) == ""


def of(tokens, dtype="bfloat16"):
    return Product(32, 64, dtype, tokens)


def test_algorithms_are_searched_once_for_each_bucket_and_kept(library):
    values, places, _, _ = packed(dtype=torch.bfloat16)
    blob = cslt.blob(values, cslt.metadata(values, places))
    x = torch.randn(30, 64).bfloat16()
    cslt.product(x, blob)
    assert (library.searched, library.used) == (0, [DEFAULT])  # a product does not search by itself
    search([of(20), of(32), of(30), of(33)])
    assert library.searched == 2
    cslt.product(x, blob)
    assert library.used[-1] == (17, 1, -1)
    crossover.table().save()
    crossover._tables.clear()
    search([of(20)])
    assert library.searched == 2
    cslt.product(x, blob)
    assert library.used[-1] == (17, 1, -1)
    cslt.product(torch.randn(99, 64).bfloat16(), blob)
    assert library.used[-1] == DEFAULT


@pytest.mark.parametrize("library", ["algorithm"], indirect=True)
def test_an_algorithm_that_does_not_take_other_tokens_is_given_up(library):
    values, places, x, _ = packed(dtype=torch.float16)
    blob = cslt.blob(values, cslt.metadata(values, places))
    expected = reference.linear(x.float(), values.float(), places)
    crossover.table().blocks[of(16, "float16").key] = (17, 1, -1)
    torch.testing.assert_close(cslt.product(x, blob).float(), expected, rtol=1e-2, atol=1e-2)
    cslt.product(x, blob)
    assert library.used == [(17, 1, -1), DEFAULT, DEFAULT]


@pytest.mark.parametrize("library", ["metadata"], indirect=True)
def test_an_algorithm_that_is_wrong_is_not_taken(library):
    search([of(16)])
    assert library.searched == 1
    assert known(of(16)) == DEFAULT


def test_a_search_that_dies_costs_one_product(library, monkeypatch):
    """As with cuSPARSELt on an H100, whose search in float16 makes the GPU unusable to its process."""

    def dies(products):
        before = list(itertools.takewhile(lambda product: product.dtype == "bfloat16", products))
        return on_cpu(before)[0], "RuntimeError: an illegal instruction was encountered"

    monkeypatch.setattr(search_module, "_in_a_process", dies)
    with pytest.warns(UserWarning, match=r"stopped at .*float16.*default algorithm is used.*illegal instruction"):
        search([of(16), of(32, "float16"), of(64)])
    assert [known(p) for p in (of(16), of(32, "float16"), of(64))] == [(17, 1, -1), DEFAULT, (17, 1, -1)]


def test_a_process_without_a_gpu_finds_nothing():
    found, error = search_module._in_a_process([of(16)])
    assert found == []
    assert error


@pytest.mark.parametrize("library", ["metadata", "values"], indirect=True)
def test_a_library_that_misreads_is_found_out(library, monkeypatch):
    cpu = torch.device("cpu")
    if library.wrong == "values":
        with pytest.raises(SparsityError, match="row-major order"):
            cslt.self_test(cpu, torch.bfloat16)
    else:
        assert "a product by cuSPARSELt is off by" in cslt.self_test(cpu, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    original = cslt.self_test
    monkeypatch.setattr(cslt, "self_test", lambda device, dtype: original(cpu, dtype))
    cslt.trusted.cache_clear()
    device = torch.device("cuda:0")
    with pytest.warns(UserWarning, match="computed densely for many tokens"):
        assert not cslt.trusted(device, torch.bfloat16)
    assert not cslt.trusted(device, torch.bfloat16)  # no second notice
    cslt.trusted.cache_clear()


def test_what_the_library_takes():
    assert cslt.fits(4096, 1024, torch.bfloat16)
    assert not cslt.fits(4096, 1024, torch.float32)
    assert not cslt.fits(48, 64, torch.bfloat16)
    assert not cslt.trusted(torch.device("cpu"), torch.bfloat16)
