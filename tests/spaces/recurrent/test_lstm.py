"""The LSTM baseline equals torch's own; weight drop equals masking by hand."""

import torch

from lmnas.core.genotype import load_genotype
from lmnas.core.seeds import generator
from lmnas.runs.build import covering_space

T, B, H = 6, 3, 5


def body(name):
    built = covering_space(load_genotype(name)).build(load_genotype(name), H)
    built.initialise(generator(0, "lstm"), 0.1)
    return built


def test_equals_torch_lstm():
    """Three layers without dropout are `nn.LSTM(num_layers=3)` with the same weights, states included."""
    ours = body("lstm-3")
    theirs = torch.nn.LSTM(H, H, num_layers=3)
    with torch.no_grad():
        for i, layer in enumerate(ours.layers):
            for name, parameter in layer.named_parameters():
                getattr(theirs, name.replace("l0", f"l{i}")).copy_(parameter)
    inputs, state = torch.randn(T, B, H), torch.randn(3, 2, B, H)
    expected, (h, c) = theirs(inputs, (state[:, 0].contiguous(), state[:, 1].contiguous()))
    outputs, new_state = ours(inputs, state, {})
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(new_state, torch.stack([h, c], dim=1))


def test_weight_drop_masks_the_recurrent_weights():
    dropped, plain = body("lstm-1"), body("lstm-1")
    inputs = torch.randn(T, B, H)
    masks = dropped.draw_masks(B, {"weight": 0.5}, generator(1, "masks"))
    assert set(masks) == {"weight_0"} and set(masks["weight_0"].unique().tolist()) == {0.0, 2.0}
    with torch.no_grad():
        plain.layers[0].weight_hh_l0.mul_(masks["weight_0"])
    outputs, _ = dropped(inputs, dropped.initial_state(B), masks)
    torch.testing.assert_close(outputs, plain(inputs, plain.initial_state(B), {})[0])
    outputs.sum().backward()
    gradient = dropped.layers[0].weight_hh_l0.grad
    assert gradient is not None and not gradient[masks["weight_0"] == 0].any()
