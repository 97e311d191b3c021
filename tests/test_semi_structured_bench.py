"""Which parts of the benchmark of n:m weights are run, and its table."""

import pytest

from sparselearn import SparsityError

pytest.importorskip("triton", reason="triton is not installed")


def test_the_benchmark_takes_parts_and_appends_rows(tmp_path, monkeypatch):
    from argparse import Namespace

    from sparselearn.kernels.semi_structured import bench

    def part(sections, tokens=None, layers=None, patterns=None):
        return bench.wanted(Namespace(sections=sections, tokens=tokens, layers=layers, patterns=patterns))

    everything = part(bench.SECTIONS)
    assert len(everything) == len(set(everything)) == 1 + 4 * 6 + 2 * 6 + 2 * 5 * 3 + 3
    some = part(["gemv", "decode"], [1, 16], ["4096x4096"])
    assert [(section, case.tokens, case.pattern) for section, case in some] == [
        *[("gemv", 1, pattern) for pattern in bench.PATTERNS], ("decode", 1, "2:4"), ("decode", 16, "2:4"),
    ]  # fmt: skip
    assert [case.inputs for _, case in part(["gemv"], [1], patterns=["1:8"])] == [4096, 4096, 14336]
    assert part(["pack"]) == [("pack", None)]
    monkeypatch.setattr(bench, "facts", lambda: {"gpu": "none"})
    path = tmp_path / "table.csv"
    head = ["gemv", 8, 16, "1:4", 1, "bfloat16"]
    bench.Writer(path).write(head, {"dense": 4e-6, "gemv": 1e-6}, "dense")
    bench.Writer(path).write(head, {"dense": 4e-6}, "dense")
    assert path.read_text().splitlines() == [
        "section,neurons,inputs,pattern,tokens,dtype,method,us,speedup,gpu",
        "gemv,8,16,1:4,1,bfloat16,dense,4.00,1.000,none",
        "gemv,8,16,1:4,1,bfloat16,gemv,1.00,4.000,none",
        "gemv,8,16,1:4,1,bfloat16,dense,4.00,1.000,none",
    ]
    path.write_text("other\n")
    with pytest.raises(SparsityError, match="has other columns"):
        bench.Writer(path)
