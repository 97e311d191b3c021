"""`diff`, and the sub-commands inspect, verify, export and diff: numbers by hand, texts, JSON."""

import argparse
import json
import math

import pytest
import torch
from torch import nn

from sparselearn import SparsityError
from sparselearn.checkpoint import save
from sparselearn.checkpoint.command import add_commands, share, size, table
from sparselearn.checkpoint.diff import diff
from sparselearn.checkpoint.legacy import write_legacy

safetensors = pytest.importorskip("safetensors.torch", reason="checkpoints need safetensors")


def command(*words):
    """What cli.py does with these sub-commands."""
    parser = argparse.ArgumentParser("sparselearn")
    add_commands(parser.add_subparsers())
    args = parser.parse_args(list(map(str, words)))
    return args.run(args)


# ---- diff ------------------------------------------------------------------------------------------------------------


def legacy(path, weight, mask, bias=None):
    weight = torch.tensor(weight).masked_fill(~torch.tensor(mask).bool(), 0)
    state = {"m.weight": weight} | ({"m.bias": torch.tensor(bias)} if bias is not None else {})
    write_legacy(state, {"m.weight": torch.tensor(mask).bool()}, path)
    return path


@pytest.fixture
def pair(tmp_path):
    """Kept: a 0 1 2 3, b 0 1 2 4 5 (of 8). Position 0 equal, 1 moves below bf16, 2 by 1; kept zero at 3 and 5."""
    a = legacy(tmp_path / "a", [[1.0, 2.0, 3.0, 0.0, 9, 9, 9, 9]], [[1, 1, 1, 1, 0, 0, 0, 0]], [1.0, 2.0])
    b = legacy(tmp_path / "b", [[1.0, 2.001, 4.0, 9, -7.0, 0.0, 9, 9]], [[1, 1, 1, 0, 1, 1, 0, 0]], [1.0, 2.5])
    return a, b


def test_diff_by_hand(pair):
    result = diff(*pair)
    bias, weight = sorted(result.weights, key=lambda w: w.name)
    assert (weight.name, weight.shape, weight.size) == ("m.weight", (1, 8), 8)
    assert (weight.kept_a, weight.kept_b, weight.shared, weight.compared) == (4, 5, 3, 6)
    assert (weight.jaccard, weight.kept_fraction) == (3 / 6, 3 / 4)
    # compared: 1=1, 2~2.001 (equal in bf16), 3->4, kept 0 -> pruned 0, 0 -> -7, pruned 0 -> kept 0
    assert (weight.equal_bf16, weight.equal_fp32, weight.max_abs) == (4, 3, 7.0)
    assert (bias.kept_a, bias.jaccard, bias.kept_fraction) == (0, None, None)
    assert (bias.compared, bias.equal_bf16, bias.equal_fp32, bias.max_abs) == (2, 1, 1, 0.5)
    total = result.total
    assert (total.size, total.kept_a, total.kept_b, total.shared, total.compared) == (10, 4, 5, 3, 8)
    assert (total.bf16_fraction, total.fp32_fraction, total.max_abs) == (5 / 8, 4 / 8, 7.0)


def test_diff_with_itself_and_with_a_dense_file(pair, tmp_path):
    a, _ = pair
    same = diff(a, a)
    assert all(w.fp32_fraction == w.bf16_fraction == 1 and w.max_abs == 0 for w in (*same.weights, same.total))
    assert same.total.jaccard == same.total.kept_fraction == 1
    dense = tmp_path / "dense.safetensors"
    safetensors.save_file({"m.weight": torch.full((1, 8), 2.0), "m.bias": torch.ones(2)}, dense)
    weight = next(w for w in diff(a, dense).weights if w.name == "m.weight")
    assert (weight.kept_a, weight.kept_b, weight.shared, weight.compared) == (4, 8, 4, 8)


def test_diff_compares_bits(tmp_path):
    nan, inf = math.nan, math.inf
    cases = [  # a, b, equal bf16, equal fp32, max
        (0.0, -0.0, 0, 0, 0.0),
        (nan, nan, 1, 1, 0.0),
        (inf, inf, 1, 1, 0.0),
        (inf, -inf, 0, 0, inf),
        (nan, 1.0, 0, 0, nan),
        (1.0, 1.0 + 2**-9, 1, 0, 2**-9),  # below half of bfloat16's last place, 2^-8
        (1.0, 1.0 + 2**-7, 0, 0, 2**-7),
    ]
    a = {str(i): torch.tensor(case[0]) for i, case in enumerate(cases)}
    b = {str(i): torch.tensor(case[1]) for i, case in enumerate(cases)}
    result = diff(a, b)
    for (_, _, bf16, fp32, most), weight in zip(cases, result.weights, strict=True):
        assert (weight.equal_bf16, weight.equal_fp32) == (bf16, fp32)
        assert weight.max_abs == pytest.approx(most, nan_ok=True, abs=0)
    assert math.isnan(result.total.max_abs)


def test_diff_of_float64_tied_empty_and_integer_tensors():
    x = torch.ones(3, dtype=torch.float64)
    tied = torch.ones(2)
    a = {"x": x, "first": tied, "second": tied, "empty": torch.empty(0, 2), "steps": torch.tensor(3)}
    b = {**a, "x": x + 2**-50, "steps": torch.tensor(4)}
    result = diff(a, b)
    assert [w.name for w in result.weights] == ["x", "first", "empty"]
    assert (result.weights[0].equal_fp32, result.weights[0].max_abs) == (0, 2**-50)  # float32 would round it away
    assert result.weights[2].bf16_fraction is None
    half = diff({"x": torch.tensor([1.0, 0.1]).half()}, {"x": torch.tensor([1.0, 0.1])})
    assert half.total.equal_fp32 == 1


def test_diff_refuses_different_models():
    one = {"a.weight": torch.ones(2)}
    with pytest.raises(SparsityError, match=r"`a.weight` is not in the second checkpoint \(1 such names\).*`b.weight`"):
        diff(one, {"b.weight": torch.ones(2)})
    with pytest.raises(SparsityError, match="`b` is not in the first checkpoint"):
        diff(one, one | {"b": torch.ones(2)})
    with pytest.raises(SparsityError, match=r"must have one shape.*\[2\] in the first and \[3\] in the second"):
        diff(one, {"a.weight": torch.ones(3)})


def test_diff_command(pair, capsys):
    assert command("diff", *pair) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["m.weight", "1x8", "4", "5", "0.500000", "0.750000", "0.666667", "0.500000", "7.000e+00"] in lines
    assert ["m.bias", "2", "-", "-", "-", "-", "0.500000", "0.500000", "5.000e-01"] in lines
    assert ["total", "10", "4", "5", "0.500000", "0.750000", "0.625000", "0.500000", "7.000e+00"] in lines
    assert command("diff", *pair, "--json") == 0
    read = json.loads(capsys.readouterr().out)
    assert read["total"]["jaccard"] == 0.5
    assert {w["name"]: w["shape"] for w in read["weights"]} == {"m.weight": [1, 8], "m.bias": [2]}


def test_json_has_no_nan(tmp_path, capsys):
    for name, value in (("a", math.nan), ("b", 1.0)):
        safetensors.save_file({"w": torch.tensor([value])}, tmp_path / name)
    assert command("diff", tmp_path / "a", tmp_path / "b", "--json") == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["total"]["max_abs"] == "nan"


# ---- inspect, verify, export -----------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A sparse checkpoint of 8 x 64 (51 kept) and 4 x 8 (16 kept), biases dense."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))
    masks = {}
    for name, nnz in (("0.weight", 51), ("2.weight", 16)):
        weight = model.get_parameter(name)
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        mask[torch.randperm(weight.numel())[:nnz]] = True
        masks[name] = mask.view(weight.shape)
        weight.data.masked_fill_(~masks[name], 0)
    save(model, tmp_path / "sparse", masks=masks)
    return model, tmp_path / "sparse"


def test_inspect_table(saved, capsys):
    assert command("inspect", saved[1]) == 0
    layers, encodings = capsys.readouterr().out.split("\n\n")
    rows = {line.split()[0]: line.split() for line in layers.splitlines()}
    assert next(iter(rows)) == "weight"
    assert rows["0.weight"][3:7] == ["float32", "8x64", "51", "0.0996"]
    assert rows["2.weight"][3:7] == ["float32", "4x8", "16", "0.5000"]
    assert rows["total"][1:4] == ["556", "79", "0.1421"]
    assert encodings.splitlines()[-1].split()[:4] == ["total", "4", "79", "0.1421"]


def test_inspect_json_agrees_with_itself_and_with_the_files(saved, capsys):
    assert command("inspect", saved[1], "--json") == 0
    read = json.loads(capsys.readouterr().out)
    weights = {weight["name"]: weight for weight in read["weights"]}
    assert set(weights) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert weights["0.weight"]["nnz"] == 51
    assert weights["0.weight"]["dense"] == 4 * 8 * 64
    assert 51 * 4 < weights["0.weight"]["stored"] <= 51 * 4 + 64  # at most as a bitmask
    for part in ("size", "nnz", "stored", "dense", "tensors"):
        assert sum(w[part] for w in read["weights"]) == read["total"][part]
        assert sum(e[part] for e in read["encodings"]) == read["total"][part]
    assert read["total"]["stored"] <= sum(path.stat().st_size for path in saved[1].rglob("*"))


def test_inspect_draws_a_picture(saved, tmp_path):
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    assert command("inspect", saved[1], "--plot", tmp_path / "out.png") == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SparsityError, match=r"must end in one of \.png"):
        command("inspect", saved[1], "--plot", tmp_path / "out.xyz")


def test_verify_command(saved, capsys):
    assert command("verify", saved[1]) == 0
    assert capsys.readouterr().out == f"{saved[1]}: all 4 tensors are as they were saved\n"
    assert command("verify", saved[1], "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"file": str(saved[1]), "ok": True, "weights": 4}
    shard = next(saved[1].glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(SparsityError):
        command("verify", saved[1])


def test_export_command(saved, tmp_path, capsys):
    model, path = saved
    assert command("export", path, tmp_path / "dense.safetensors") == 0
    assert "dense.safetensors, safetensors, " in capsys.readouterr().out
    read = safetensors.load_file(tmp_path / "dense.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in model.state_dict().items())
    assert command("export", path, tmp_path / "old", "--format", "sparse-bitmask", "--json") == 0
    assert json.loads(capsys.readouterr().out)["format"] == "sparse-bitmask"
    result = diff(path, tmp_path / "old").total
    assert (result.fp32_fraction, result.jaccard, result.kept_a) == (1, 1, 67)
    with pytest.raises(SparsityError, match="must keep exactly 2 of every 4"):
        command("export", path, tmp_path / "24", "--format", "sparse-24-bitmask")
    assert command("export", tmp_path / "old", tmp_path / "again.safetensors") == 0
    assert all(torch.equal(t, read[n]) for n, t in safetensors.load_file(tmp_path / "again.safetensors").items())


def test_export_to_a_hugging_face_folder(saved, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "x"}')
    assert command("export", saved[1], tmp_path / "hf", "--format", "huggingface", "--base", base) == 0
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["inspect", "verify", "export", "diff"])
def test_help_has_an_example_and_json(name, capsys):
    with pytest.raises(SystemExit):
        command(name, "--help")
    text = capsys.readouterr().out
    assert f"example:\n  sparselearn {name} " in text
    assert "--json" in text


def test_texts():
    assert table([("a", "bb"), ("ccc", "1"), ("t", "22")]) == "a    bb\n-------\nccc   1\n-------\nt    22"
    assert [size(n) for n in (0, 1023, 1024, 1536 * 1024, 3 * 2**30)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 MiB",
        "3.00 GiB",
    ]
    assert [share(x) for x in (None, 0, 1, 1 - 1e-9, 1e-9, 0.25)] == [
        "-", "0.000000", "1.000000", "0.999999", "0.000001", "0.250000",
    ]  # fmt: skip
