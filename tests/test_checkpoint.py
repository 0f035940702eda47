"""Save and load: whole folders or nothing, and refusal of what is damaged."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packed_models import files, logits, packed, read_tensors
from safetensors import SafetensorError
from safetensors.torch import save_file
from tiny_models import FAMILIES, build
from torch import Tensor

from vlmq import checkpoint, staging
from vlmq.checkpoint import REPORT_FILE, load, load_report, save
from vlmq.linear import QuantLinear
from vlmq.report import LayerReport

UP = "model.layers.0.mlp.up_proj"
REPORT = LayerReport(UP, "ternary-g16", "rtn", 0.1, 3.0, 6144, 10, 9.5, 0.01, 0.2, ("damp raised",))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A packed model (all layers ternary), its folder and its logits; not to be written to."""
    model = packed("llama", ("ternary-g16",))
    model.get_submodule(UP).report = REPORT
    folder = save(model, tmp_path_factory.mktemp("saved") / "model", max_shard_size="40KB")
    return SimpleNamespace(model=model, folder=folder, logits=logits(model, "llama"))


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of the folder to damage."""
    return Path(shutil.copytree(saved.folder, tmp_path / "copy"))


class Processor:
    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "processor_config.json").write_text("{}")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a checkpoint and write them back as one file."""
    tensors = read_tensors(folder)
    change(tensors)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def store_as_version_2(folder: Path, model: torch.nn.Module) -> None:
    """Rewrite a checkpoint with the codes as they lie in memory."""
    codes = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(".qweight")}
    rewrite(folder, lambda tensors: tensors.update(codes))
    set_config(folder, format_version=2)


@pytest.mark.parametrize("family", ["llava", "clip", "llama"])
def test_load_takes_the_class_that_was_saved(family, tmp_path):
    model = packed(family)
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded, family), logits(model, family))


def test_save_writes_shards_reports_and_the_processor(saved, tmp_path):
    target = save(saved.model, tmp_path / "a" / "out", Processor(), max_shard_size="40KB")
    assert {"generation_config.json", REPORT_FILE, "processor_config.json"} <= files(target).keys()
    assert len(list(target.glob("*.safetensors"))) > 1
    assert load_report(target) == {UP: REPORT}
    assert load(target).get_submodule(UP).report == REPORT
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["out"]


def test_config_names_layers_calibration_and_version(saved):
    block = json.loads((saved.folder / "config.json").read_text())["quantization_config"]
    assert block["format_version"] == 3
    assert block["metadata"] == {"seed": 0, "calibration": "none"}
    assert set(block["modules"]["ternary-g16"]) == {
        name for name, m in saved.model.named_modules() if isinstance(m, QuantLinear)
    }


def test_save_is_deterministic(saved, tmp_path):
    save(saved.model, tmp_path / "a", max_shard_size="40KB")
    save(load(saved.folder), tmp_path / "b", max_shard_size="40KB")
    assert files(tmp_path / "a") == files(tmp_path / "b") == files(saved.folder)


def test_save_over_its_own_source_keeps_other_files(saved, folder):
    (folder / "README.md").write_text("mine")
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.txt").write_text("mine too")
    (folder / "model-00009-of-00009.safetensors").write_bytes(b"stale")
    model = load(folder)
    save(model, folder)
    assert {p.name for p in folder.glob("*.safetensors")} == {"model.safetensors"}
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / "extra" / "notes.txt").read_text() == "mine too"
    assert torch.equal(logits(load(folder), "llama"), saved.logits)


def test_save_refuses_a_folder_that_is_no_checkpoint(saved, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds files but no model"):
        save(saved.model, tmp_path)
    with pytest.raises(ValueError, match="expected a folder, .* is a file"):
        save(saved.model, tmp_path / "thesis.tex")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_save_refuses_what_it_cannot_save(saved, tmp_path):
    with pytest.raises(ValueError, match="call vlmq.quantize first"):
        save(build("llama"), tmp_path / "out")
    with pytest.raises(TypeError, match="processor with save_pretrained, got str"):
        save(saved.model, tmp_path / "out", "processor")
    assert list(tmp_path.iterdir()) == []


def _full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _full_disk_in_rust(tensors: dict[str, Tensor], path: str, metadata: Any) -> None:
    Path(path).write_bytes(b"half")
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def _interrupt(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["new", "old"])
@pytest.mark.parametrize(
    ("fail", "error", "message"),
    [
        (_full_disk, OSError, "nothing was changed: No space left"),
        (_full_disk_in_rust, OSError, "nothing was changed: I/O error: No space left"),
        (_interrupt, KeyboardInterrupt, None),
    ],
)
def test_failed_save_leaves_everything_as_it_was(place, fail, error, message, saved, folder, monkeypatch):
    target = folder if place == "old" else folder.parent / "new"
    before = files(folder)
    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", fail)
    with pytest.raises(error, match=message):
        save(saved.model, target)
    assert files(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == ["copy"]


def test_failed_rename_puts_the_old_folder_back(saved, folder, monkeypatch):
    before = files(folder)
    rename = Path.rename

    def fail(self: Path, to: Path) -> Path:
        if self.name.endswith(".new"):
            _full_disk()
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="nothing was changed"):
        save(saved.model, folder)
    assert files(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == ["copy"]


def test_save_asks_for_room_first(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="the model needs 0 MiB, 0 MiB are free") as caught:
        save(saved.model, tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_load_refuses_other_checkpoints(tmp_path):
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no vlmq checkpoint \(quant_method: none\)"):
        load(tmp_path)


def test_load_refuses_an_unknown_format_version(folder):
    set_config(folder, format_version=7)
    with pytest.raises(ValueError, match="format_version 7, this vlmq .* reads 1, 2, 3; upgrade vlmq"):
        load(folder)


def test_load_refuses_layers_that_the_model_lacks(folder):
    set_config(folder, modules={"ternary-g16": ["model.layers.7.mlp.up_proj", "model.norm"]})
    with pytest.raises(ValueError, match="no linear layer model.layers.7.mlp.up_proj, model.norm, which"):
        load(folder)


def test_load_refuses_another_scheme_of_the_same_shape(saved, folder):
    store_as_version_2(folder, saved.model)
    block = json.loads((folder / "config.json").read_text())["quantization_config"]
    names, sums = block["modules"]["ternary-g16"], block["checksums"]
    sums["layers"] = {"int2-sym-g16": sums["layers"]["ternary-g16"]}
    set_config(folder, modules={"int2-sym-g16": names}, checksums=sums)
    with pytest.raises(ValueError, match=rf"not as they were saved: {names[0]}"):
        load(folder)


@pytest.mark.parametrize("checksums", [None, [], {"layers": {}}])
def test_load_refuses_a_config_without_checksums(checksums, folder):
    set_config(folder, checksums=checksums)
    with pytest.raises(ValueError, match="has no checksums"):
        load(folder)


def _drop(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


def _set(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def _fill(value: float) -> Callable[[Tensor], Tensor]:
    def fill(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[5] = value
        return tensor

    return fill


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop(f"{UP}.scales"), f"lacks tensors of LlamaForCausalLM: {UP}.scales"),
        (_drop(f"{UP}.qweight"), f"lacks tensors of LlamaForCausalLM: {UP}.qweight"),
        (_drop("model.norm.weight"), "lacks tensors of LlamaForCausalLM: model.norm.weight"),
        (
            _set(f"{UP}.qweight", Tensor.int),
            rf"{UP}.qweight': expected \(96, 16\) torch.uint8, .* torch.int32",
        ),
        (_set(f"{UP}.qweight", lambda t: t[:, :8].contiguous()), rf"{UP}.qweight': expected \(96, 16\)"),
        (_set(f"{UP}.scales", lambda t: t[..., 0].contiguous()), rf"{UP}.scales': expected \(96, 4, 1\)"),
        (_set(f"{UP}.scales", Tensor.int), "float16, the checkpoint holds .* torch.int32"),
        (_set(f"{UP}.scales", _fill(torch.inf)), f"{UP}.scales' holds scales that are not finite"),
        (_set(f"{UP}.scales", _fill(0.25)), f"not as they were saved: {UP};"),
        (_set(f"{UP}.qweight", _fill(0xF3)), f"{UP}.qweight' holds code 3, ternary has codes 0 to 2"),
        (_set(f"{UP}.qweight", _fill(0)), f"not as they were saved: {UP};"),
        (_set("model.norm.weight", _fill(0)), "full-precision tensors are not as they were saved"),
        (lambda t: t.update({f"{UP}.weight": torch.ones(96, 64)}), f"that no format has: {UP}.weight"),
        (lambda t: t.update({f"{UP}.zeros": torch.ones(96, 4).byte()}), f"asks for 0 .* such as {UP}.zeros"),
        (lambda t: t.update({"extra.qweight": torch.ones(9).byte()}), "asks for 14 tensors 'qweight'"),
    ],
)
def test_load_refuses_wrong_tensors(change, message, folder):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_load_refuses_a_truncated_file(folder):
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{path.name} is not a whole safetensors file .*: download"):
        load(folder)


def test_load_refuses_pickles(folder):
    torch.save(read_tensors(folder), folder / "pytorch_model.bin")
    for path in [*folder.glob("*.safetensors*")]:
        path.unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        load(folder)
    with pytest.raises(ValueError, match="pickled weights are never read"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_other_floating_dtypes_load_though_they_cannot_be_compared(tmp_path):
    model = packed("llama")
    model.model.norm.float()
    save(model, tmp_path / "out")
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert block["checksums"]["unchecked"] == ["model.norm.weight"]
    assert load(tmp_path / "out").model.norm.weight.dtype == torch.bfloat16


def test_damaged_reports_say_that_the_model_is_whole(folder):
    (folder / REPORT_FILE).write_text('{"layers": [{"name": 3}]}')
    with pytest.raises(ValueError, match="delete it, the model loads without it"):
        load(folder)


def test_class_outside_transformers_needs_its_auto_map(saved):
    config = FAMILIES["llama"]()
    config.architectures = ["MyModel"]
    with pytest.raises(ValueError, match=r"class \['MyModel'\], which this transformers does not have"):
        checkpoint._model_class(config)
    config.auto_map = {"AutoModelForCausalLM": "modeling_mine.MyModel"}
    assert checkpoint._model_class(config) is transformers.AutoModelForCausalLM
