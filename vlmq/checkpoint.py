"""Save and load packed models.

A checkpoint is a transformers folder: config.json (with the block `quantization_config`, see
`vlmq.hf.VlmqConfig`), safetensors files (see `vlmq.integrity`), the
generation config and the processor's files; beside them `vlmq_report.json`, what quantizing each layer
gave. `model.save_pretrained`, `push_to_hub` and `from_pretrained` work as well; what the functions here and
`vlmq.push` (`vlmq.hub`) add:

- `save` writes whole folders or nothing (see `vlmq.staging`), with the processor and the reports.
- `load` finds the class, and gives each layer its report back.
- `push` uploads such a folder as one commit, with a model card.

Format version 1 is: packed layout v1 (`vlmq.kernels.packing`), tensors `qweight`, `scales`, `zeros` per layer, the
config block, the checksums. Version 2 adds the tensors of `vlmq.guard`, which stop a load without vlmq. Version 3
stores ternary codes five trits a byte (`vlmq.stored`). A change of any of them raises the version, and a reader
refuses versions that it does not know.
"""

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from vlmq.hf import QUANT_METHOD, VlmqQuantizer
from vlmq.imports import METHODS, load_foreign
from vlmq.integrity import read_header
from vlmq.linear import QuantLinear
from vlmq.report import LayerReport
from vlmq.staging import check_space, staged

REPORT_FILE = "vlmq_report.json"
CARD_FILE = "README.md"
CARD_MARK = (
    "<!-- This card was written by vlmq and is replaced by it; take this line out to keep your own. -->"
)
INDEX_FILE = "model.safetensors.index.json"
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download")


def save(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    processor: Any = None,
    *,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a packed model, its generation config, reports and processor into a folder, whole or not at all.

    A checkpoint that is already there is replaced; of its files, those that are neither weights nor written
    anew (a processor, a README) are kept. Needs room for the new folder beside the old one.

    Args:
        model: quantized by vlmq.
        path: the folder.
        processor: a processor, tokenizer or image processor to save along; anything with `save_pretrained`.
        max_shard_size: largest size of one safetensors file, in bytes or as "5GB".

    Returns:
        The folder.

    Raises:
        ValueError: the model is not quantized by vlmq, or the folder holds something that is no checkpoint.
        TypeError: the processor cannot be saved.
        OSError: no room, or another failure to write; the folder is then as it was before.
    """
    if not isinstance(getattr(model, "hf_quantizer", None), VlmqQuantizer):
        raise ValueError("the model holds no layer quantized by vlmq: call vlmq.quantize first")
    if processor is not None and not hasattr(processor, "save_pretrained"):
        raise TypeError(f"expected a processor with save_pretrained, got {type(processor).__name__}")
    target = Path(path).resolve()
    check_target(target)
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values()}.values()
    check_space(target, sum(t.numel() * t.element_size() for t in tensors))
    with staged(target, lambda name: _is_replaced(target / name)) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if processor is not None:
            processor.save_pretrained(folder)
        _save_report(model, folder)
        check_files(folder)
    return target


def load(path_or_id: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """Load a packed model from a folder or a repository of the hub, with the class that was saved.

    The layers stay packed; float16 scales stay float16 whatever `dtype=` is. Checkpoints of compressed-tensors,
    GPTQ and AWQ are read into packed layers with the same values (`vlmq.imports`).

    Args:
        path_or_id: folder or repository.
        **kwargs: go to `from_pretrained`: dtype, device_map, revision, token, ...

    Returns:
        The model in eval mode, with `report` on its packed layers where the checkpoint has one.

    Raises:
        ValueError: no packed checkpoint, one of another format that vlmq cannot say without loss, an unknown
            format version, or a truncated, damaged or incomplete one.
    """
    hub = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
    trust = {key: kwargs[key] for key in ("trust_remote_code",) if key in kwargs}
    config = open_config(path_or_id, **hub, **trust)
    block = getattr(config, "quantization_config", None) or {}
    if block.get("quant_method") in METHODS:
        return load_foreign(_model_class(config), path_or_id, config, kwargs)
    if block.get("quant_method") != QUANT_METHOD:
        found = block.get("quant_method", "none")
        raise ValueError(
            f"{path_or_id} is no vlmq checkpoint (quant_method: {found}); use transformers' Auto classes"
        )
    model = _model_class(config).from_pretrained(path_or_id, **{**kwargs, "use_safetensors": True})
    for name, report in load_report(path_or_id, **hub).items():
        layer = dict(model.named_modules()).get(name)
        if isinstance(layer, QuantLinear):
            layer.report = report
    return model


def load_report(path_or_id: str | os.PathLike[str], **hub: Any) -> dict[str, LayerReport]:
    """Return what quantizing gave, {layer name: its report}; empty if the checkpoint has no reports.

    Raises:
        ValueError: the file of reports is damaged.
    """
    file = cached_file(str(path_or_id), REPORT_FILE, _raise_exceptions_for_missing_entries=False, **hub)
    if file is None:
        return {}
    try:
        layers = json.loads(Path(file).read_text(encoding="utf-8"))["layers"]
        reports = [LayerReport(**{**line, "notes": tuple(line["notes"])}) for line in layers]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is damaged ({error}): delete it, the model loads without it") from error
    return {report.name: report for report in reports}


def open_config(path_or_id: str | os.PathLike[str], **kwargs: Any) -> PreTrainedConfig:
    """Read the config of a model by folder or hub name.

    Raises:
        OSError: neither gives one; the message names what was asked for.
        ValueError: it is no config of a model that transformers knows.
    """
    folder = Path(path_or_id, kwargs.get("subfolder", ""))
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"model: expected the folder of a model, {folder} holds no config.json")
    try:
        return AutoConfig.from_pretrained(path_or_id, **kwargs)
    except OSError as error:
        where = (
            "holds no config.json that can be read"
            if folder.is_dir()
            else "is no folder here, nor on the hub"
        )
        raise OSError(f"model {str(path_or_id)!r} {where}: {error}") from error


def check_target(target: Path) -> None:
    """Refuse a folder that `save` cannot or must not write, before hours are spent on what would go into it.

    Raises:
        ValueError: a file, a path below a file, or a folder that holds files but no model.
        OSError: the folder to write into is read-only.
    """
    existing = next(path for path in (target, *target.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(
            f"cannot save to {target}: expected a folder, {existing} is a file; choose another path"
        )
    try:
        with tempfile.TemporaryDirectory(
            prefix=".vlmq.", dir=existing if existing != target else target.parent
        ):
            pass
    except OSError as error:
        reason = (
            f"cannot save to {target}: no folder can be made there ({error.strerror}); choose another path"
        )
        raise OSError(reason) from error
    config = target / "config.json"
    is_filled = target.is_dir() and any(target.iterdir())
    is_model = config.is_file() and b'"model_type"' in config.read_bytes() or any(target.glob("*.gguf"))
    if is_filled and not is_model:
        raise ValueError(
            f"cannot save to {target}: it holds files but no model (no config.json with a model_type); "
            "choose an empty or new folder"
        )


def _is_replaced(path: Path) -> bool:
    """Whether a file tells of the weights that go: they themselves, what was measured on them, a card made of that."""
    name = path.name
    if name == CARD_FILE:
        return CARD_MARK in path.read_text(encoding="utf-8", errors="replace")
    return ".safetensors" in name or name.startswith(("pytorch_model", "vlmq_"))


def _save_report(model: PreTrainedModel, folder: Path) -> None:
    layers = [m.report for m in model.modules() if isinstance(m, QuantLinear) and m.report is not None]
    if layers:
        text = json.dumps({"layers": [asdict(report) for report in layers]}, indent=1)
        (folder / REPORT_FILE).write_text(text, encoding="utf-8")


def check_files(folder: Path) -> None:
    """Read the headers of all tensors.

    Raises:
        ValueError: a file is damaged.
        RuntimeError: files are missing, or name other tensors than the index.
    """
    where: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        where.update(dict.fromkeys(read_header(path), path.name))
    index = folder / INDEX_FILE
    if index.exists() and json.loads(index.read_text(encoding="utf-8"))["weight_map"] != where:
        raise RuntimeError(f"{index} and the files beside it name different tensors; save again")
    if not where:
        raise RuntimeError(f"no tensors were written to {folder}; save again")


def _model_class(config: PreTrainedConfig) -> Any:
    """The class that was saved; if it is not part of transformers, the Auto class that loads its code."""
    names = config.architectures or []
    for name in names:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for auto, reference in (getattr(config, "auto_map", None) or {}).items():
        if any(str(reference).endswith(f".{name}") for name in names):
            return getattr(transformers, auto)
    raise ValueError(f"config.json names the model class {names}, which this transformers does not have")
