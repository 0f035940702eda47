"""ONNX Runtime on a GPTQ export: the model builder of ONNX Runtime GenAI writes its layers as MatMulNBits.

    W[o, i] = scales[o, b(i)] (q[o, i] - zero_points[o, b(i)])        of 2, 4 or 8 bits, b(i) = i // block_size

Where no zero points are stored they are 2^(bits - 1). The codes stay as vlmq chose them; q, k and v become one node.
`accuracy_level=1` has inputs kept in float32 (the builder's own choice rounds them to 8 bits), and the output head
is left out of a rounding of the builder's own.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

OPTIONS = ("accuracy_level=1", "nodes_to_exclude=/lm_head/MatMul")


def build(gptq: Path, out: Path) -> None:
    """Let the builder make an ONNX model of a GPTQ folder.

    Raises:
        RuntimeError: it failed; the message is its last line.
    """
    folders = ["-i", gptq, "-o", out, "-c", out.with_name("cache")]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *folders, "-p", "int4", "-e", "cpu"]
    done = subprocess.run(
        [*map(str, command), "--extra_options", *OPTIONS], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the builder failed: {done.stderr.strip().splitlines()[-1]}")


class OnnxModel:
    """A model that the builder made, in ONNX Runtime on the CPU."""

    def __init__(self, folder: Path) -> None:
        import onnx  # pyright: ignore[reportMissingImports]
        import onnxruntime  # pyright: ignore[reportMissingImports]

        self.graph = onnx.load(folder / "model.onnx").graph
        self.to_array = onnx.numpy_helper.to_array
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)

    def logits(self, ids: Tensor) -> Tensor:
        """Of each token of one row, (n_tokens, n_words)."""
        feed = {"input_ids": ids[None].numpy(), "attention_mask": np.ones((1, len(ids)), dtype=np.int64)}
        for given in self.session.get_inputs():
            if given.name.startswith("past_key_values"):
                _, heads, _, width = given.shape
                width = width if isinstance(width, int) else self._head_dim()
                feed[given.name] = np.zeros((1, heads, 0, width), dtype=np.float32)
        return torch.from_numpy(self.session.run(["logits"], feed)[0][0])

    def weights(self) -> dict[str, Tensor]:
        """Of each MatMulNBits node, by its name: (out_features, in_features) float32."""
        stored = {tensor.name: tensor for tensor in self.graph.initializer}
        found = {}
        for node in self.graph.node:
            if node.op_type != "MatMulNBits":
                continue
            sizes = {a.name: a.i for a in node.attribute}
            bits, size, rows, width = (sizes[key] for key in ("bits", "block_size", "N", "K"))
            packed, scales, *points = (torch.tensor(self.to_array(stored[n])) for n in node.input[1:] if n)
            n_blocks = -(-width // size)
            codes = _unpack(packed.view(rows, -1), bits)[:, :width].float()
            zeros = torch.full((rows, n_blocks), 2.0 ** (bits - 1))
            if points:
                zeros = _unpack(points[0].view(rows, -1), bits)[:, :n_blocks].float()
            group = torch.arange(width) // size
            found[node.name] = scales.view(rows, n_blocks)[:, group] * (codes - zeros[:, group])
        return found

    def _head_dim(self) -> int:
        """Twice the width of the table of cosines."""
        return 2 * next(t.dims[1] for t in self.graph.initializer if t.name == "cos_cache")


def _unpack(data: Tensor, bits: int) -> Tensor:
    """Bytes (rows, n) -> numbers (rows, 8 n / bits), low bits first."""
    parts = data[..., None].int() >> torch.arange(0, 8, bits, dtype=torch.int32)
    return (parts & (2**bits - 1)).flatten(1)
