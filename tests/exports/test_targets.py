"""What a refusal tells to do is something that the target then does."""

import re

import pytest
import torch
from gguf_models import byte_level, packed_text
from packed_models import packed, round_to_nearest

from vlmq.exports import TARGETS, export_model
from vlmq.scheme import parse_scheme


@pytest.mark.parametrize("to", TARGETS)
def test_the_scheme_of_its_messages_can_be_said(to):
    weight = round_to_nearest(torch.randn(32, 512), parse_scheme(TARGETS[to].example))
    TARGETS[to].say(weight)


@pytest.mark.parametrize("to", TARGETS)
def test_a_refusal_names_options_that_work(to, tmp_path):
    processor, model = None, packed("llama", ("int2-g32",))
    if to.startswith("gguf"):
        pytest.importorskip("gguf")
        processor, model = byte_level(), packed_text("llama", ("int2-g32",))
    with pytest.raises(ValueError, match="cannot say layer") as refused:
        export_model(model, to, tmp_path / "out", processor)
    ways = re.findall(r"--convert (\S+)", str(refused.value))
    assert ways == [TARGETS[to].example, *TARGETS[to].roundings]
    for way in ways:
        assert export_model(model, to, tmp_path / way, processor, convert=way).n_converted == 14
