"""Finished blocks of a run of `quantize`, kept in a folder, so that an interrupted run goes on after them.

    run.json               what decides the result: weights, plan, calibration data, settings, versions
    <block>.safetensors    qweight, scales, zeros of the layers of a finished block; in its header the reports of the
                           layers, and a checksum of it all

Only what was solved is kept. What goes into the next block is computed again: the walk runs each finished block once
per batch and path, as it does after solving one, so all later blocks see the same bits, and the folder is as large as
the packed layers. A saliency that differentiates the loss does so again. As with the seed, the same bits come from the
same machine with the same number of threads.

Every file is written whole or not at all (`vlmq.staging`). Nothing in the folder is ever deleted or begun again without
a word: the folder of another run is refused with what differs, a damaged file by its name.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from vlmq.calib.calibration_set import CalibrationSet
from vlmq.calib.tokens import CalibBatch
from vlmq.formats import QuantizedWeight
from vlmq.integrity import PACKED, checksum, listing
from vlmq.kernels.packing import unpack
from vlmq.report import LayerReport
from vlmq.run import Run
from vlmq.staging import PARTIAL, check_space, staged_file

RUN_FILE = "run.json"
PACKAGES = ("vlmq", "torch", "transformers")
N_SHOWN = 4


class FinishedBlocks:
    """The folder of one run: which blocks are finished, and their layers.

    As a context it notes on what stops the run how to go on.
    """

    def __init__(self, folder: Path, run: Run, decides: Mapping[str, Any]) -> None:
        """Open the folder of this run, or begin one.

        Args:
            folder: made if it does not exist.
            run: the call of `quantize`.
            decides: what decides the result, see `what_decides`; JSON values.

        Raises:
            ValueError: the folder holds another run, a damaged file, or files but no run.
            OSError: it cannot be written, or there is no room for the packed layers.
        """
        self.folder, self.run = folder, run
        check_folder(folder)
        file = folder / RUN_FILE
        if file.exists():
            _check_same(folder, _read_run(file), json.loads(json.dumps(decides)))
            for block in run.blocks():
                if self._file(block).exists():
                    self._read(block)
        else:
            check_space(folder, sum(run.plan.bits.values()) // 8)
            folder.mkdir(parents=True, exist_ok=True)
            with staged_file(file) as partial:
                partial.write_text(json.dumps(decides, indent=1), encoding="utf-8")

    def __enter__(self) -> Self:
        """Nothing happens."""
        return self

    def __exit__(self, kind: Any, stopped: BaseException | None, traceback: TracebackType | None) -> None:
        """Say on an error, or an interrupt, how the run goes on."""
        if stopped is not None:
            blocks = self.run.blocks()
            n_finished = sum(self._file(name).exists() for name in blocks)
            stopped.add_note(
                f"{n_finished} of {len(blocks)} blocks are finished in {self.folder}: the same arguments go on from "
                "there"
            )

    def keep(self, block: str) -> None:
        """Write the packed layers of a block, with their reports."""
        layers = {name: self.run.packed[name] for name in self._layers(block)}
        parts = {f"{name}.{leaf}": getattr(layer, leaf) for name, layer in layers.items() for leaf in PACKED}
        tensors = {name: t.detach().cpu().contiguous() for name, t in parts.items() if t is not None}
        reports = json.dumps([asdict(layer.report) for layer in layers.values() if layer.report is not None])
        with staged_file(self._file(block)) as partial:
            save_file(tensors, partial, {"reports": reports, "checksum": _sum(tensors, reports)})

    def put_back(self, block: str) -> bool:
        """Replace the layers of a block by those that an earlier call has kept; False if it has not.

        Raises:
            ValueError: the file of the block is damaged.
        """
        if not self._file(block).exists():
            return False
        tensors, reports = self._read(block)
        for name in reports:
            scheme = self.run.plan.schemes[name]
            layer: Any = self.run.model.get_submodule(name)
            found = {leaf: tensors.get(f"{name}.{leaf}") for leaf in PACKED}
            own = {leaf: t.to(layer.weight.device) for leaf, t in found.items() if t is not None}
            codes = unpack(own["qweight"], scheme.format.bits, layer.in_features)
            weight = QuantizedWeight(codes, own["scales"], own.get("zeros"), scheme.format, scheme.group_size)
            self.run.replace(name, weight, reports[name])
            self.run.progress.layer(reports[name], block)
        return True

    def _read(self, block: str) -> tuple[dict[str, Tensor], dict[str, LayerReport]]:
        """Tensors and reports of a finished block, by name."""
        path = self._file(block)
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise _damaged(path, str(error)) from error
        text = header.get("reports", "")
        if header.get("checksum") != _sum(tensors, text):
            raise _damaged(path, "its checksum is another")
        reports = [LayerReport(**{**line, "notes": tuple(line["notes"])}) for line in json.loads(text)]
        if {report.name for report in reports} != set(self._layers(block)):
            raise _damaged(path, "it holds the layers of another block")
        return tensors, {report.name: report for report in reports}

    def _file(self, block: str) -> Path:
        return self.folder / f"{block}.safetensors"

    def _layers(self, block: str) -> list[str]:
        infos = self.run.plan.layout.linears
        return [name for name in self.run.plan.in_blocks() if infos[name].block == block]


def what_decides(
    run: Run, batches: list[CalibBatch], device: torch.device | str | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """All that decides which bits come out, in values that a message can show.

    Args:
        run: the call of `quantize`, its model untouched.
        batches: the calibration data.
        device: as given to `quantize`.
        settings: by name.
    """
    model, schemes = run.model, run.plan.schemes
    where = model.device if device is None else torch.device(device)
    return {
        **{f"version of {package}": version(package) for package in PACKAGES},
        "model class": type(model).__name__,
        "config of the model": _config_sum(model),
        "weights of the model": checksum((n, t) for n, t in model.state_dict().items() if not t.is_meta),
        "calibration data": CalibrationSet(tuple(batches)).hash,
        "device": where.type,
        **settings,
        "layers": {
            name: " ".join([scheme.name, str(scheme.solver), json.dumps(scheme.options, sort_keys=True)])
            for name, scheme in schemes.items()
        },
    }


def check_folder(folder: Path) -> None:
    """Refuse a folder that is no place for finished blocks.

    Raises:
        ValueError: a file, or a folder that holds files but no run of `quantize`.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(
            f"checkpoint_dir {folder} is a file; expected a folder, or a path where one can be made"
        )
    others = [path.name for path in folder.glob("*") if not path.name.endswith(PARTIAL)]
    if others and RUN_FILE not in others:
        raise ValueError(
            f"checkpoint_dir {folder} holds files but no {RUN_FILE} of a run of quantize: {listing(sorted(others))}; "
            "choose an empty or new folder"
        )


def _read_run(file: Path) -> dict[str, Any]:
    with suppress(ValueError):
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    raise ValueError(f"{file} is damaged: give another checkpoint_dir, or delete the folder to begin again")


def _check_same(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    lines = [line for key in {**there, **here} for line in _differences(key, there.get(key), here.get(key))]
    if lines:
        more = f"; and {len(lines) - N_SHOWN} more" if len(lines) > N_SHOWN else ""
        raise ValueError(
            f"checkpoint_dir {folder} is of another run: {'; '.join(lines[:N_SHOWN])}{more}. Give the same arguments "
            "to go on with it, or another checkpoint_dir; nothing was changed"
        )


def _differences(key: str, there: Any, here: Any) -> Iterable[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        for name in {**there, **here}:
            yield from _differences(name, there.get(name), here.get(name))
    elif there != here:
        yield f"{key} is {json.dumps(there)} there and {json.dumps(here)} here"


def _config_sum(model: PreTrainedModel) -> str:
    """A checksum of the config without what says only where it came from, and with the kind of attention."""
    values: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    values = {k: v for k, v in values.items() if k not in ("_name_or_path", "transformers_version")}
    kind = getattr(model.config, "_attn_implementation", None)
    return checksum((), json.dumps([values, kind], sort_keys=True))


def _sum(tensors: Mapping[str, Tensor], reports: str) -> str:
    return checksum(sorted(tensors.items()), reports)


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is damaged ({why}): delete this file, and its block is quantized again")
