"""Why a linear layer stays in full precision unless an override names it; some stay whatever is said."""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from vlmq.families.parts import AUDIO, never_run

TIED = "embedding-tied"
SHARED = "weight shared with another layer"
STEP = "time step of a state space, read by its kernel"
NEVER_RUN = "never run by this class"
FIXED_REASONS = ("router", "multihead attention", TIED, "subclass of nn.Linear", SHARED, STEP, NEVER_RUN)


def prefixes(name: str) -> Iterator[str]:
    """Paths of the modules around the module at path `name`, outermost first."""
    components = name.split(".")
    return (".".join(components[:depth]) for depth in range(1, len(components)))


def why_kept(
    model: PreTrainedModel, name: str, module: nn.Linear, part: str, block: str | None
) -> str | None:
    """Why a linear layer stays in full precision by default, or None."""
    if fixed := _why_fixed(model, name, module):
        return fixed
    if block is not None:
        return "projector (off by default)" if part == "projector" else None
    if any(module.weight is m.weight for m in model.modules() if isinstance(m, nn.Embedding)):
        return TIED
    if module is model.get_output_embeddings() or name.rpartition(".")[2] == "lm_head":
        return "lm_head"
    if "patch" in name:
        return "patch embedding"
    if part == "projector" and "." not in name:
        return "projection head"
    if part == "projector":
        return "projector (off by default)"
    return "audio tower" if part == AUDIO else "outside the blocks"


def _why_fixed(model: PreTrainedModel, name: str, module: nn.Linear) -> str | None:
    """What no override can change, but the tying of weights.

    The kernels of the first Mamba read the weight of `dt_proj` and never call the layer, so no input of it is seen.
    """
    parents = [model.get_submodule(prefix) for prefix in prefixes(name)]
    if any(isinstance(parent, nn.MultiheadAttention) for parent in parents):
        return "multihead attention"
    if _is_router(name, module, parents[-1] if parents else model):
        return "router"
    if type(module) is not nn.Linear:
        return f"subclass of nn.Linear ({type(module).__name__})"
    if name.rpartition(".")[2] == "dt_proj":
        return STEP
    return NEVER_RUN if never_run(model, name) else None


def _is_router(name: str, module: nn.Linear, parent: nn.Module) -> bool:
    last = name.rpartition(".")[2]
    has_experts = any("experts" in key for key, _ in parent.named_children())
    return (
        "router" in name.lower()
        or type(module).__name__.endswith("Router")
        or (last in ("gate", "shared_expert_gate") and has_experts)
    )
