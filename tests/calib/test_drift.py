"""Where a layer writes to the residual stream, and the shift that undoes the stream's drift."""

import pytest
import tiny_models
import torch

from vlmq.calib.batches import as_batches
from vlmq.calib.drift import OutputShift, SumPoint, find_sum_point
from vlmq.calib.statistics import collect_statistics
from vlmq.calib.walk import layer_inputs, walk_blocks
from vlmq.families import describe


def walk(family: str, part: str):
    model = tiny_models.build(family)
    batches = as_batches(tiny_models.inputs(family, 3), model)
    return model, walk_blocks(model, describe(model), batches, parts=[part])


@pytest.mark.parametrize(
    ("family", "part", "expected"),
    [
        (
            "llama",
            "language",
            {"self_attn.o_proj": SumPoint("post_attention_layernorm"), "mlp.down_proj": SumPoint(None)},
        ),
        ("clip", "vision", {"self_attn.out_proj": SumPoint("layer_norm2"), "mlp.fc2": SumPoint(None)}),
        ("qwen3_vl", "vision", {"attn.proj": SumPoint("norm2"), "mlp.linear_fc2": SumPoint(None)}),
        ("gemma3", "language", {"self_attn.o_proj": None, "mlp.down_proj": None}),
    ],
)
def test_sum_points_are_found_where_the_stream_is_written(family, part, expected):
    model, blocks = walk(family, part)
    for block in blocks:
        found = {name: find_sum_point(block, name) for name in block.linears()}
        assert {name: point for name, point in found.items() if name in expected} == expected
        assert all(point is None for name, point in found.items() if name not in expected)


@pytest.mark.parametrize("name", ["self_attn.o_proj", "mlp.down_proj"])
def test_shift_is_zero_on_equal_paths_and_undoes_the_drift_of_a_perturbed_one(name):
    model, blocks = walk("llama", "language")
    for i, block in enumerate(blocks):
        point = find_sum_point(block, name)
        assert point is not None
        weights = [torch.ones(kinds.numel()) for kinds in block.batches]
        shift = OutputShift(block, name, point, weights)
        statistics = collect_statistics(block, [name], None, with_shift=False, source=shift.inputs())[name]
        R = shift.result()
        if i == 0:
            assert torch.count_nonzero(R) == 0
            for layer in block.linears().values():
                weight = layer.weight.detach()
                layer.weight = torch.nn.Parameter(weight * (1 + 0.1 * torch.randn_like(weight)))
            continue
        u = torch.cat([x[name] for x in layer_inputs(block, [name])])
        H = u.T @ u / len(u)
        torch.testing.assert_close(statistics.H, H)
        layer = block.linears()[name]
        before = drift(block, point)
        step = torch.linalg.solve(H + 1e-6 * torch.eye(len(H)), R.T).T
        layer.weight = torch.nn.Parameter(layer.weight.detach() + step)
        after = drift(block, point)
        torch.testing.assert_close(before - (step @ u.T).T, after, rtol=1e-3, atol=1e-4)
        assert after.norm() < before.norm()
        gradient = after.T @ u / len(u)
        assert gradient.norm() < 0.02 * R.norm()


def drift(block, point: SumPoint) -> torch.Tensor:
    """y_F - y_U over all tokens, taken by hooks written out by hand for Llama."""
    rows = []
    for live, original in zip(block.inputs, block.original_inputs, strict=True):
        seen = []
        for call, is_original in ((original, True), (live, False)):
            module = block.original if is_original else block.module
            if point.entered is None:
                output = block.run(call, original=is_original)
                seen.append(output[0] if isinstance(output, tuple) else output)
                continue
            handle = module.get_submodule(point.entered).register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0])
            )
            block.run(call, original=is_original)
            handle.remove()
        rows.append((seen[0] - seen[1]).flatten(0, -2).detach())
    return torch.cat(rows)
