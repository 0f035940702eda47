"""A tokenizer as GGUF says it: a list of tokens with their kinds, and merges or scores.

Two kinds of byte-pair tokenizers have a counterpart in llama.cpp:

- "gpt2": bytes as letters; text is cut by one of the regular expressions that llama.cpp knows by a name, `PRE`, then
  merges apply in their order. A tokenizer that cuts differently is refused.
- "llama": sentencepiece, spaces as "\u2581", bytes as "<0x00>". llama.cpp joins the pair whose union has the highest
  score; a token's score is minus the rank of the first merge that makes it.

llama.cpp normalizes no text, so NFC and small letters are left to the caller and noted; other normalizations are
refused. Whether a text starts with a token of its own is found by asking the tokenizer.
"""

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
GPT2_SPLIT = "gpt-2"
_LETTERS_AND_REST = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
PRE = {
    _CONTRACTIONS + _LETTERS_AND_REST % r"\p{N}": "qwen2",
    _CONTRACTIONS + _LETTERS_AND_REST % r"\p{N}{1,3}": "llama-bpe",
}
NORMALIZERS = {
    "NFC": "brings text to Unicode's form NFC first",
    "Lowercase": "makes all letters small first",
}
IGNORES_MERGES = ("llama-bpe",)


@dataclass(frozen=True)
class Vocabulary:
    """What the file says of the tokenizer.

    Attributes:
        model: "gpt2" or "llama".
        tokens: by id; as many as the embedding has rows.
        kinds: of each token.
        pre: name of the regular expression that cuts text, "gpt2" only.
        merges: pairs with a space between, "gpt2" only.
        scores: of each token, "llama" only.
        special: {"bos": id, ...}.
        flags: {"add_bos_token": ..., ...}.
        chat_template: as transformers has it.
        notes: what differs.
    """

    model: str
    tokens: list[str]
    kinds: list[int]
    pre: str | None = None
    merges: list[str] | None = None
    scores: list[float] | None = None
    special: dict[str, int] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    chat_template: str | None = None
    notes: tuple[str, ...] = ()


def vocabulary(processor: Any, n_rows: int) -> Vocabulary:
    """Read the tokenizer of a processor.

    Args:
        processor: a tokenizer, or something that has one.
        n_rows: rows of the token embedding; those that the tokenizer does not know are unused tokens.

    Raises:
        ValueError: llama.cpp has no such tokenizer; the message says why.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(
            f"a GGUF file holds the tokenizer: expected one of the tokenizers library, got {type(tokenizer).__name__}"
        )
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    if parts["model"].get("type") != "BPE":
        raise ValueError(
            f"gguf is written for byte-pair tokenizers, this one is {parts['model'].get('type')}"
        )
    ids = tokenizer.get_vocab()
    if (last := max(ids.values())) >= n_rows:
        raise ValueError(
            f"the tokenizer has token {last}, the embedding has {n_rows} rows: not of this model"
        )
    tokens = [f"[PAD{i}]" for i in range(n_rows)]
    kinds = [UNUSED] * n_rows
    for token, i in ids.items():
        tokens[i], kinds[i] = token, NORMAL
    for i, added in tokenizer.added_tokens_decoder.items():
        kinds[i] = CONTROL if added.special else USER_DEFINED
    special = {
        name: i
        for name in ("bos", "eos", "unk", "pad")
        if (i := getattr(tokenizer, f"{name}_token_id", None)) is not None
    }
    around = tokenizer("a")["input_ids"]
    flags = {
        "add_bos_token": around[0] == special.get("bos"),
        "add_eos_token": around[-1] == special.get("eos"),
    }
    template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    common: dict[str, Any] = {
        "tokens": tokens,
        "kinds": kinds,
        "special": special,
        "flags": flags,
        "chat_template": template if isinstance(template, str) else None,
    }
    build = _sentencepiece if parts["model"].get("byte_fallback") else _byte_level
    return build(parts, common)


def _byte_level(parts: dict[str, Any], common: dict[str, Any]) -> Vocabulary:
    pre = _pre(parts["pre_tokenizer"])
    if bool(parts["model"].get("ignore_merges")) != (pre in IGNORES_MERGES):
        raise ValueError(f"llama.cpp's {pre!r} joins whole words in another way than this tokenizer")
    notes = ()
    if (normalizer := parts["normalizer"]) is not None:
        if normalizer["type"] not in NORMALIZERS:
            raise ValueError(f"llama.cpp normalizes no text, the tokenizer does ({normalizer['type']})")
        notes = (f"the tokenizer {NORMALIZERS[normalizer['type']]}, llama.cpp does not: give it such text",)
    return Vocabulary("gpt2", pre=pre, merges=_merges(parts), notes=notes, **common)


def _pre(pre_tokenizer: dict[str, Any] | None) -> str:
    """llama.cpp's name for what cuts text into words."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    kinds = [step and step["type"] for step in steps]
    has_prefix = any(step and step.get("add_prefix_space") for step in steps)
    if kinds and kinds[-1] == "ByteLevel" and not has_prefix:
        if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
            return GPT2_SPLIT
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"] and not steps[0]["invert"]:
            name = PRE.get(steps[0]["pattern"].get("Regex", ""))
            if name is not None and steps[0]["behavior"] == "Isolated":
                return name
    raise ValueError(f"llama.cpp has no name for the way in which this tokenizer cuts text: {pre_tokenizer}")


def _sentencepiece(parts: dict[str, Any], common: dict[str, Any]) -> Vocabulary:
    tokens, kinds = common["tokens"], list(common["kinds"])
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(_merges(parts)):
        ranks.setdefault(merge.replace(" ", ""), rank)
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    unknown = parts["model"].get("unk_token")
    for i, token in enumerate(tokens):
        if token == unknown:
            kinds[i] = UNKNOWN
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds[i] = BYTE
    flags = common["flags"] | {"add_space_prefix": _has_space_prefix(parts)}
    return Vocabulary("llama", scores=scores, **(common | {"kinds": kinds, "flags": flags}))


def _has_space_prefix(parts: dict[str, Any]) -> bool:
    """Whether a text gets a space in front; and check that spaces become "\u2581", and nothing else is done."""
    normalizer, pre = parts["normalizer"], parts["pre_tokenizer"]
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    kinds = [step["type"] for step in steps]
    if pre is None and kinds in (["Prepend", "Replace"], ["Replace"]):
        return kinds[0] == "Prepend"
    if not steps and pre is not None and pre["type"] == "Metaspace" and not pre.get("split", True):
        return pre["prepend_scheme"] != "never"
    raise ValueError(f"llama.cpp has no such sentencepiece tokenizer: normalizer {normalizer}, then {pre}")


def _merges(parts: dict[str, Any]) -> list[str]:
    return [m if isinstance(m, str) else " ".join(m) for m in parts["model"]["merges"]]


def write_vocabulary(writer: "GGUFWriter", words: Vocabulary) -> None:
    """Write the tokenizer."""
    writer.add_tokenizer_model(words.model)
    if words.pre is not None:
        writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.kinds)
    if words.merges is not None:
        writer.add_token_merges(words.merges)
    if words.scores is not None:
        writer.add_token_scores(words.scores)
    for name, i in words.special.items():
        getattr(writer, f"add_{name}_token_id")(i)
    for name, flag in words.flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", flag)
    if words.chat_template is not None:
        writer.add_chat_template(words.chat_template)
