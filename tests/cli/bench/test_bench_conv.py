"""`lmnas bench conv`: both sides do the same work, and the operations are counted."""

import json

import pytest
import torch
from torch import nn

from lmnas.cli.bench import conv
from lmnas.cli.bench.cell import check
from lmnas.cli.bench.conv import ROWS, Sizes, plain_features, step_flops
from lmnas.cli.main import main
from lmnas.core.seeds import generator, rng
from lmnas.spaces.conv.cells import DartsConv, EnasMicro

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ROWS)
def test_both_sides_do_the_same(name):
    row = ROWS[name](Sizes.small(), CPU)
    check(name, row.ours(), row.plain(), True)


@pytest.mark.parametrize("space", [DartsConv(cells=3), EnasMicro(cells=4)], ids=["darts", "enas"])
def test_plain_features_in_double_precision(space):
    """A path of the supernet and a mixture, which `Sizes` take by turns for the two spaces."""
    net = space.supernet(3)
    net.initialise(generator(0), 0.0)
    net.double()
    images = torch.randn(3, 3, 8, 8, generator=generator(1), dtype=torch.float64)
    genotype = space.sample(rng(2))
    path = net(images, None, {}, genotype)[0][:, net.columns(genotype)]
    torch.testing.assert_close(plain_features(net, images, genotype), path, rtol=0, atol=1e-10)
    tables = {
        t.name: torch.rand(len(t.edges), len(t.ops), generator=generator(3), dtype=torch.float64)
        for t in space.tables()
    }
    torch.testing.assert_close(plain_features(net, images, tables), net(images, None, {}, tables)[0], rtol=0, atol=1e-9)


def test_operations_are_those_of_forward_and_backward():
    """Per convolution 2 x 3 x outputs x inputs of one output."""
    row, total = ROWS["darts-retrain"](Sizes.small(), CPU), 0

    def count(module, inputs, output):
        nonlocal total
        total += 2 * 3 * output.numel() * module.weight[0].numel()

    for module in row.model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    assert step_flops(row) == total  # `step_flops` has run the model
    assert total > 0


def test_the_command(tmp_path, capsys):
    arguments = ["conv", "--small", "--threads", "1", "--rounds", "1", "--rows", "darts-search,enas-retrain"]
    assert main(["bench", *arguments, "--json", "--out", str(tmp_path)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["row"] for row in document["rows"]] == ["darts-search", "enas-retrain"]
    for row in document["rows"]:
        rate = row["ours_per_second"] * row["flops_per_image"] / 1e9
        assert row["rate_fraction"] == pytest.approx(rate / document["convolution_gflops"])
        assert row["ratio_min"] <= row["ratio_median"] <= row["ratio_max"]
    assert (tmp_path / "conv.png").read_bytes().startswith(b"\x89PNG")
    assert "MFLOP/image" in conv.text(document)


def test_an_unknown_row(capsys):
    assert main(["bench", "conv", "--small", "--rows", "dart-search"]) == 2
    assert "row 'dart-search' is unknown. Did you mean 'darts-search'" in capsys.readouterr().err
