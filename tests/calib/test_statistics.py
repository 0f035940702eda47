"""Statistics against sums written out in float64, and what they refuse."""

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from vlmq.calib import statistics
from vlmq.calib.block import Block, BlockCall
from vlmq.calib.statistics import collect_statistics
from vlmq.calib.tokens import PADDING, TEXT
from vlmq.families import BlockSpec


class Toy(nn.Module):
    """Two layers on one input, one on another, and one that is called only for long inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(10, 6), nn.Linear(10, 6)
        self.o = nn.Linear(6, 10)
        self.rare = nn.Linear(10, 4)
        self.ran: list[str] = []
        self.o.register_forward_hook(lambda *_: self.ran.append("o"))

    def forward(self, x: Tensor) -> Tensor:
        y = self.o(torch.tanh(self.q(x) + self.k(x)))
        if x.shape[1] > 100:
            self.rare(x)
        return x + y


def make_block(n_batches: int = 3, *, n_tokens: int = 7, parted: bool = True) -> Block:
    module, original = Toy(), Toy()
    original.load_state_dict(module.state_dict())
    inputs = [BlockCall((torch.randn(2, n_tokens, 10),), {}) for _ in range(n_batches)]
    originals = [BlockCall((c.args[0] + 0.3 * torch.randn_like(c.args[0]),), {}) for c in inputs]
    originals = originals if parted else inputs
    return Block(
        spec=BlockSpec("model.layers.0", "language"),
        module=module,
        original=original,
        inputs=inputs,
        original_inputs=originals,
        original_outputs=[original(c.args[0]) for c in originals],
        batches=[torch.full((2, n_tokens), TEXT, dtype=torch.int8) for _ in inputs],
        batch_indices=list(range(n_batches)),
        device=torch.device("cpu"),
    )


def stacked(calls: list[BlockCall]) -> Tensor:
    return torch.cat([c.args[0].flatten(0, 1) for c in calls]).double()


def test_statistics_equal_the_written_out_sums():
    block = make_block()
    weights = [torch.rand(14) for _ in block.inputs]
    made = collect_statistics(block, ["q"], {"q": weights}, with_shift=True)["q"]
    u, f, s = stacked(block.inputs), stacked(block.original_inputs), torch.cat(weights).double()
    torch.testing.assert_close(made.H.double(), (u.T * s) @ u / s.sum(), rtol=1e-5, atol=1e-6)
    assert made.D is not None
    torch.testing.assert_close(made.D.double(), ((f - u).T * s) @ u / s.sum(), rtol=1e-5, atol=1e-6)
    assert made.n_tokens == 42
    assert made.n_effective == pytest.approx(float(s.sum() ** 2 / s.square().sum()))


def test_tiles_and_chunks_change_nothing(monkeypatch):
    block = make_block()
    whole = collect_statistics(block, ["q"], with_shift=True)["q"]
    monkeypatch.setattr(statistics, "CHUNK_TOKENS", 5)
    monkeypatch.setattr(statistics, "TILE_FEATURES", 3)
    pieces = collect_statistics(block, ["q"], with_shift=True)["q"]
    torch.testing.assert_close(whole.H, pieces.H)
    torch.testing.assert_close(whole.D, pieces.D)
    assert torch.equal(pieces.H, pieces.H.T)


def test_layers_with_one_input_and_one_weighting_share_their_statistics():
    block = make_block()
    made = collect_statistics(block, ["q", "k", "o"])
    assert made["q"] is made["k"]
    assert made["o"].H.shape == (6, 6)
    one, other = [torch.rand(14) for _ in range(3)], [torch.rand(14) for _ in range(3)]
    shared = collect_statistics(block, ["q", "k"], {"q": one, "k": [w.clone() for w in one]})
    assert shared["q"] is shared["k"]
    apart = collect_statistics(block, ["q", "k"], {"q": one, "k": other})
    assert not torch.equal(apart["q"].H, apart["k"].H)


def test_padding_never_counts():
    block = make_block()
    expected = collect_statistics(block, ["q"], with_shift=True)["q"]
    for i, (call, original) in enumerate(zip(block.inputs, block.original_inputs, strict=True)):
        padding = torch.full((2, 3, 10), torch.nan)
        for c in (call, original):
            c.args = (torch.cat([padding, c.args[0]], dim=1),)
        block.batches[i] = torch.cat([torch.full((2, 3), PADDING, dtype=torch.int8), block.batches[i]], dim=1)
    padded = collect_statistics(block, ["q"], with_shift=True)["q"]
    assert padded.n_tokens == expected.n_tokens
    torch.testing.assert_close(padded.H, expected.H)
    torch.testing.assert_close(padded.D, expected.D)


def test_a_token_of_weight_zero_is_as_good_as_absent():
    block = make_block(n_batches=1)
    weights = torch.ones(14)
    weights[5:] = 0
    made = collect_statistics(block, ["q"], {"q": [weights]})["q"]
    u = stacked(block.inputs)[:5]
    torch.testing.assert_close(made.H.double(), u.T @ u / 5, rtol=1e-5, atol=1e-6)


def test_equal_paths_have_no_shift():
    made = collect_statistics(make_block(parted=False), ["q", "o"], with_shift=True)
    assert made["q"].D is not None
    assert int(made["q"].D.count_nonzero()) == 0
    assert made["o"].D is not None
    assert int(made["o"].D.count_nonzero()) == 0


def test_later_layers_see_what_earlier_ones_became():
    block = make_block(parted=False)
    block.module.q.weight.data.mul_(0.5)  # type: ignore[operator, union-attr]
    made = collect_statistics(block, ["o"], with_shift=True)["o"]
    x = stacked(block.inputs).float()
    u = torch.tanh(block.module.q(x) + block.module.k(x)).detach()  # type: ignore[operator]
    f = torch.tanh(block.original.q(x) + block.original.k(x)).detach()  # type: ignore[operator]
    torch.testing.assert_close(made.H, u.T @ u / 42, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made.D, (f - u).T @ u / 42, rtol=1e-5, atol=1e-6)


def test_without_shift_the_original_path_is_not_touched():
    block = make_block()
    block.original.forward = None  # type: ignore[method-assign, assignment]
    assert collect_statistics(block, ["q"])["q"].D is None


def test_the_forward_stops_after_the_named_layers():
    block = make_block()
    collect_statistics(block, ["q"])
    block.module.ran.clear()  # type: ignore[operator, union-attr]
    collect_statistics(block, ["q", "k"])
    assert block.module.ran == []


def test_layers_that_part_in_a_later_batch_get_statistics_of_their_own():
    class Parting(Toy):
        def forward(self, x: Tensor) -> Tensor:
            shared = torch.equal(x, first)
            return self.q(x) + self.k(x if shared else 2 * x)

    block = make_block()
    first = block.inputs[0].args[0]
    parting = Parting()
    block.module = parting
    made = collect_statistics(block, ["q", "k"])
    u = stacked(block.inputs)
    v = torch.cat([u[:14], 2 * u[14:]])
    torch.testing.assert_close(made["q"].H.double(), u.T @ u / 42, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made["k"].H.double(), v.T @ v / 42, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("path", ["inputs", "original_inputs"])
def test_an_input_that_is_not_finite_is_named(bad, path):
    block = make_block()
    getattr(block, path)[1].args[0][0, 3, 2] = bad
    with pytest.raises(RuntimeError, match="block 'model.layers.0', layer 'q', batch 1: the inputs hold NaN"):
        collect_statistics(block, ["q"], with_shift=True)


def test_a_layer_without_tokens_is_refused():
    with pytest.raises(RuntimeError, match="block 'model.layers.0': no calibration token reached rare"):
        collect_statistics(make_block(), ["q", "rare"])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([torch.ones(14)], "layer 'q': expected token weights for each of 3 calls, got 1"),
        ([torch.ones(13)] * 3, "batch 0: expected 14 token weights, got 13"),
        ([-torch.ones(14)] * 3, "minimum -1"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        collect_statistics(make_block(), ["q"], {"q": weights})


def test_only_tokens_of_weight_zero_are_no_tokens():
    with pytest.raises(RuntimeError, match="no calibration token reached q"):
        collect_statistics(make_block(), ["q"], {"q": [torch.zeros(14)] * 3})


def test_a_layer_that_gets_other_tokens_on_each_path_has_no_shift():
    block = make_block()
    for call in block.original_inputs:
        call.args = (call.args[0][:, :5],)
    assert collect_statistics(block, ["q"], with_shift=True)["q"].D is None


def test_bfloat16_inputs_lose_nothing():
    block = make_block()
    block.module.bfloat16(), block.original.bfloat16()
    for call in (*block.inputs, *block.original_inputs):
        call.args = (call.args[0].bfloat16(),)
    u = stacked(block.inputs)
    made = collect_statistics(block, ["q"])["q"]
    torch.testing.assert_close(made.H.double(), u.T @ u / 42, rtol=1e-5, atol=1e-5)


def test_inputs_written_to_after_the_layer_are_taken_before():
    class InPlace(Toy):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = self.q(x)
            x.zero_()
            return y + self.k(x)

    block = make_block()
    block.module = InPlace()
    made = collect_statistics(block, ["q", "k"])
    u = stacked(block.inputs)
    torch.testing.assert_close(made["q"].H.double(), u.T @ u / 42, rtol=1e-5, atol=1e-6)
    assert int(made["k"].H.count_nonzero()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_float32_in_a_whole_model(dtype):
    from vlmq.calib.tokens import CalibBatch
    from vlmq.calib.walk import calls_in_order, walk_blocks
    from vlmq.families import describe

    model = tiny_models.build("llama", dtype)
    batches = [
        CalibBatch(b, torch.full((1, 12), TEXT, dtype=torch.int8)) for b in tiny_models.inputs("llama")
    ]
    for block in walk_blocks(model, describe(model), batches):
        for group in calls_in_order(block):
            for made in collect_statistics(block, group, with_shift=True).values():
                assert made.H.dtype == torch.float32
                assert made.n_tokens == 24
