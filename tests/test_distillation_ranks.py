"""Distillation by two processes, as `accelerate launch` starts them: one result, that of one process on whole batches.

Run as a script, this file is one of the two processes.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import tiny_models
import torch
from packed_models import packed

import vlmq

OPTIONS = {"n_steps": 6, "learning_rate": 1e-2, "options": {"eval_every": 2, "validation_share": 0.3}}


def distilled(is_joined: bool) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """A step of two processes takes one of two batches each; joined they are the one batch of a step."""
    held_out, *parts = tiny_models.inputs("llama", 3, rows=8)
    if is_joined:
        parts = [{name: torch.cat([part[name] for part in parts]) for name in parts[0]}]
    place = int(torch.randperm(1 + len(parts), generator=torch.Generator().manual_seed(0))[0])
    data = [*parts[:place], held_out, *parts[place:]]
    model = packed("llama", ("ternary-g16",), torch.float32)
    vlmq.distill(model, data, teacher=tiny_models.build("llama"), **OPTIONS)
    return model.state_dict(), model.config.quantization_config.metadata["distilled"]


def test_two_processes_end_with_the_weights_of_one(tmp_path):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    files = [tmp_path / f"{rank}.pt" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, file],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, file in enumerate(files)
    ]
    whole, record = distilled(is_joined=True)
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    (first, first_record), (second, second_record) = (torch.load(file) for file in files)

    start = packed("llama", ("ternary-g16",), torch.float32).state_dict()
    scales = [name for name in whole if name.endswith("scales")]
    assert first_record == second_record
    assert [name for name, tensor in first.items() if not torch.equal(tensor, second[name])] == []
    assert all(not torch.equal(first[name], start[name]) for name in scales)
    assert first_record["best_step"] == record["best_step"] > 0
    assert abs(first_record["validation_loss"] - record["validation_loss"]) < 1e-4 * record["validation_loss"]
    far = [(first[name] - whole[name]).abs() > 2e-3 * whole[name].abs() for name in scales]
    assert torch.cat([f.flatten() for f in far]).float().mean() < 0.01


if __name__ == "__main__":
    torch.set_num_threads(1)
    state, record = distilled(is_joined=False)
    assert torch.distributed.get_world_size() == 2
    torch.save((state, record), Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
