"""Parts of a block that cannot change any more are run once per call, and replayed after that.

The block is run again for every group of its linear layers, on the quantized path and on the full-precision
one. On the full-precision path nothing changes. On the quantized path the attention, say, is final once its
output projection is: from then on the feed-forward layers need its output, but not the attention itself. So
the outputs of the children of a block are kept, by path and call, as soon as they are final:

    a child is final when all linear layers are settled but those of the children that are called after it

Only children that hold linear layers and are called once per call of the block are kept, and not the last one,
whose output nothing reads again. Memory: these outputs, in CPU memory, on both paths, until the block is
left. For a block of attention and feed-forward that is one more hidden state per path.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vlmq.calib.forwards import patched, repeat_writes, run_with_writes
from vlmq.calib.trees import load, offload


@dataclass
class Settled:
    """What is final in one block.

    Attributes:
        layers: linear layers of the live block that stay as they are.
        order: children with linear layers in the order of their calls; empty until the full-precision copy has
            run as a whole.
        stored: (is original, child, call) -> output, and what was written to dicts among the arguments.
        unfit: children that one call of the block has called twice.
    """

    layers: set[str] = field(default_factory=set)
    order: list[str] = field(default_factory=list)
    stored: dict[tuple[bool, str, int], Any] = field(default_factory=dict)
    unfit: set[str] = field(default_factory=set)

    def is_final(self, child: str, layers: dict[str, set[str]], *, original: bool) -> bool:
        """Whether the output of a child is worth keeping: it stays, and is read again."""
        if child not in self.order[:-1] or child in self.unfit:
            return False
        after = self.order[self.order.index(child) + 1 :]
        return original or all(names <= self.layers for c, names in layers.items() if c not in after)

    def forget_live(self) -> None:
        """Drop what was stored of the live block; the full-precision path stays."""
        self.stored = {key: tree for key, tree in self.stored.items() if key[0]}


@contextmanager
def replayed(
    settled: Settled,
    module: nn.Module,
    i: int,
    *,
    original: bool,
    reach: Collection[str],
    device: torch.device,
) -> Iterator[None]:
    """Replace the forwards of final children for one forward of a block; arguments as in `Block.replaying`."""
    children = dict(module.named_children())
    layers = {name: names for name, child in children.items() if (names := _linears(name, child))}
    is_survey = original and not settled.order
    called: list[str] = []
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for name in layers:
        key = (original, name, i)
        if any(f"{path}.".startswith(f"{name}.") for path in reach):
            continue
        if key in settled.stored:
            forwards[children[name]] = _stub(settled.stored[key], device)
        elif is_survey or settled.is_final(name, layers, original=original):
            forwards[children[name]] = _recorder(settled, key, children[name].forward, called)
    with patched(forwards):
        yield
    if is_survey and len(forwards) == len(layers):
        settled.order = list(dict.fromkeys(called))
        for key in [k for k in settled.stored if k[1] not in settled.order[:-1]]:
            del settled.stored[key]


def _linears(name: str, child: nn.Module) -> set[str]:
    """Paths in the block of the linear layers that a child holds or is."""
    return {f"{name}.{path}".rstrip(".") for path, m in child.named_modules() if type(m) is nn.Linear}


def _stub(stored: Any, device: torch.device) -> Callable[..., Any]:
    def stub(*args: Any, **kwargs: Any) -> Any:
        output, written = load(stored, device)
        repeat_writes(written, args, kwargs)
        return output

    return stub


def _recorder(
    settled: Settled, key: tuple[bool, str, int], live: Callable[..., Any], called: list[str]
) -> Callable[..., Any]:
    name = key[1]

    def record(*args: Any, **kwargs: Any) -> Any:
        output, written = run_with_writes(live, args, kwargs)
        if name in called:
            settled.unfit.add(name)
            settled.stored.pop(key, None)
        else:
            settled.stored[key] = offload((output, written))
        called.append(name)
        return output

    return record
