"""Push by the real client to a hub on localhost, and what happens when that hub fails."""

import json
import logging
import re
import shutil
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import READ, WRITE, Fault, connect
from packed_models import packed, run_here
from tiny_processors import build as build_processor

import vlmq
from vlmq import checkpoint
from vlmq.card import EVALUATION_FILE
from vlmq.checkpoint import CARD_FILE
from vlmq.eval import round_trip
from vlmq.eval.report import Column, Table
from vlmq.eval.round_trip import ROUND_TRIP_FILE, check_round_trip, read_round_trip

COLUMNS = (Column("model", "Model"), Column("perplexity", "Perplexity", ".2f"))
MEASURED = Table("Evaluation", COLUMNS, (("original", 20.0), ("model", 21.5)))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = connect(monkeypatch, tmp_path)
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """A packed model in two files, with its processor, that has passed the round-trip check."""
    model, folder = packed("llama"), tmp_path_factory.mktemp("checked") / "tiny"
    processor = build_processor("llama")
    checkpoint.save(model, folder, processor, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(round_trip, "_run_fresh", run_here)
        check_round_trip(model, folder, processor)
    return folder


@pytest.fixture
def folder(checked, tmp_path):
    return Path(shutil.copytree(checked, tmp_path / "tiny"))


def arrived_once(hub, folder):
    """Every large file has arrived whole, once, and the repository holds what the folder holds."""
    assert sorted(hub.arrived.values()) == [1] * len(list(folder.glob("*.safetensors")))
    there = {path: data for path, (_, data) in hub.repos["me/tiny"].files.items()}
    assert there == {path.name: path.read_bytes() for path in folder.iterdir()}
    return True


def wait_until(is_so, seconds=10.0):
    """The client uploads in threads, and stops when the first one fails."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        threading.Event().wait(0.01)


def test_push_brings_the_whole_folder_with_a_card(hub, folder):
    url = vlmq.push(folder, "me/tiny", private=True, evaluation=MEASURED, measured_on="a test")
    assert arrived_once(hub, folder)
    assert url == f"{hub.endpoint}/me/tiny/commit/{hub.repos['me/tiny'].head()}"
    assert hub.repos["me/tiny"].private
    names = {
        CARD_FILE,
        ROUND_TRIP_FILE,
        EVALUATION_FILE,
        "config.json",
        "generation_config.json",
        "tokenizer.json",
    }
    assert names <= hub.repos["me/tiny"].files.keys()


def test_pushing_again_sends_and_commits_nothing(hub, folder):
    first = vlmq.push(folder, "tiny")
    hub.requests.clear()
    assert vlmq.push(folder, "me/tiny") == first
    assert hub.count("PUT", "lfs") == hub.count("POST", "/commit/") == 0


def test_files_of_an_earlier_model_go_and_others_stay(hub, folder):
    vlmq.push(folder, "me/tiny")
    hub.repos["me/tiny"].change(**{"model.safetensors": b"old weights", "notes.txt": b"notes"})
    (folder / "notes.txt").write_bytes(b"notes")
    vlmq.push(folder, "me/tiny")
    assert arrived_once(hub, folder)


def test_card_of_somebody_else_is_kept(hub, folder, caplog):
    vlmq.push(folder, "me/tiny")
    hub.repos["me/tiny"].change(**{CARD_FILE: b"# mine\n"})
    vlmq.push(folder, "me/tiny")
    assert hub.repos["me/tiny"].files[CARD_FILE] == (None, b"# mine\n")
    assert "me/tiny has a README.md of its own, which is kept" in caplog.text
    (folder / CARD_FILE).write_text("# written by hand\n")
    vlmq.push(folder, "me/tiny")
    assert hub.repos["me/tiny"].files[CARD_FILE] == (None, b"# written by hand\n")


def test_advice_keeps_what_was_to_be_private_private(hub, folder):
    hub.faults.append(Fault("POST", "repos/create", 500))
    with pytest.raises(ConnectionError, match=f"vlmq push {folder} me/tiny --private$"):
        vlmq.push(folder, "me/tiny", private=True)


def test_pull_request_leaves_the_branch_alone(hub, folder):
    assert vlmq.push(folder, "me/tiny", create_pr=True).endswith("/me/tiny/discussions/1")
    assert hub.repos["me/tiny"].pull_requests == 1
    assert hub.repos["me/tiny"].files == {}


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (
            Fault("POST", "repos/create", 403),
            PermissionError,
            "answers 403: you may not write there: use a token",
        ),
        (
            Fault("POST", "preupload", 401),
            PermissionError,
            "answers 401: it does not know you: run `hf auth login`",
        ),
        (Fault("PUT", "lfs/upload", 403), PermissionError, "answers 403"),
        (
            Fault("POST", "/commit/", 409, message="A commit has happened since"),
            ConnectionError,
            "push again",
        ),
        (Fault("POST", "/commit/", 429), ConnectionError, "too many requests: wait some minutes"),
        (
            Fault("POST", "/commit/", 500, message="disk full"),
            ConnectionError,
            "hub failed.*it says: disk full",
        ),
        (Fault("PUT", "lfs/upload", 500, 99), ConnectionError, "answers 500"),
        (Fault("PUT", "lfs/upload", "cut", 99), ConnectionError, "connection failed"),
        (Fault("POST", "/commit/", "cut"), ConnectionError, "connection failed"),
        (Fault("POST", "validate-yaml", 400, message="no such licence"), ValueError, "no such licence"),
    ],
    ids=lambda value: f"{value.pattern} {value.kind}" if isinstance(value, Fault) else "",
)
def test_failed_push_says_what_to_do_and_goes_on(hub, folder, fault, error, message, capfd):
    hub.faults.append(fault)
    with pytest.raises(error, match=message) as raised:
        vlmq.push(folder, "me/tiny")
    assert f"what has arrived is not sent again: vlmq push {folder} me/tiny" in str(raised.value)
    assert hub.repos.get("me/tiny") is None or hub.repos["me/tiny"].files == {}
    if fault.pattern == "validate-yaml":
        assert hub.arrived == {}, "weights were sent before the card was refused"
    hub.faults.clear()
    vlmq.push(folder, "me/tiny")
    assert arrived_once(hub, folder)
    assert WRITE not in str(raised.value) + "".join(capfd.readouterr())


@pytest.mark.parametrize("kind", [429, 500, "cut"])
def test_fault_that_passes_is_sat_out_by_the_client(hub, folder, kind):
    hub.faults.append(Fault("PUT", "lfs/upload", kind, times=2))
    vlmq.push(folder, "me/tiny")
    assert arrived_once(hub, folder)
    assert hub.count("PUT", "lfs/upload") == 4


def test_second_file_is_sent_alone_when_the_first_had_arrived(hub, folder):
    large = sorted(folder.glob("*.safetensors"))
    sums = {huggingface_hub.utils.sha.sha_fileobj(path.open("rb")).hex(): path.name for path in large}
    hub.faults.append(Fault("PUT", next(s for s, name in sums.items() if "-00002-of" in name), 403))
    with pytest.raises(PermissionError):
        vlmq.push(folder, "me/tiny")
    wait_until(lambda: [sums[oid] for oid in hub.arrived] == [large[0].name])
    hub.requests.clear()
    vlmq.push(folder, "me/tiny")
    assert hub.count("PUT", "lfs") == 1
    assert arrived_once(hub, folder)


def test_commit_whose_answer_was_lost_is_not_made_twice(hub, folder):
    hub.faults.append(Fault("POST", "/commit/", "lost"))
    with pytest.raises(ConnectionError, match="connection failed"):
        vlmq.push(folder, "me/tiny")
    vlmq.push(folder, "me/tiny")
    assert len(hub.repos["me/tiny"].commits) == 2, "the empty one of a new repository, and one"
    assert arrived_once(hub, folder)


@pytest.mark.parametrize(
    ("token", "repository", "error", "message"),
    [
        (READ, "me/tiny", PermissionError, "the token can only read"),
        ("hf_unknown", "me/tiny", PermissionError, "run `hf auth login`"),
        (None, "me/tiny", PermissionError, "no token; .*run `hf auth login`"),
        (WRITE, "them/tiny", PermissionError, "you are me and may write for me, ours"),
        (WRITE, "me/tiny/more", ValueError, "Repo id must be"),
        (WRITE, "me/public", ValueError, "exists and is public"),
    ],
)
def test_what_cannot_be_pushed_is_known_before(hub, folder, monkeypatch, token, repository, error, message):
    huggingface_hub.HfApi(token=WRITE).create_repo("me/public")
    monkeypatch.setenv("HF_TOKEN", token or "")
    hub.requests.clear()
    with pytest.raises(error, match=message) as raised:
        vlmq.push(folder, repository, private=True)
    assert {method for method, _ in hub.requests} <= {"GET"}
    assert token is None or token not in str(raised.value)


def test_hub_that_is_not_there(hub, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="cannot push to me/tiny: the connection failed"):
        vlmq.push(folder, "me/tiny")


def test_token_is_in_no_message_log_or_file(hub, folder, monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    monkeypatch.delenv("HF_TOKEN")
    for logger in ("huggingface_hub", "httpx2", "vlmq"):
        monkeypatch.setattr(logging.getLogger(logger), "propagate", True)
        monkeypatch.setattr(logging.getLogger(logger), "level", logging.DEBUG)
    hub.faults.append(Fault("POST", "/commit/", 500))
    with pytest.raises(ConnectionError):
        vlmq.push(folder, "me/tiny", token=WRITE)
    vlmq.push(folder, "me/tiny", token=WRITE)
    with pytest.raises(ValueError, match="it is not shown here"):
        vlmq.push(folder, "me/tiny", token=f"{WRITE}\n")
    files = b"".join(data for _, data in hub.repos["me/tiny"].files.values())
    assert len(caplog.text) > 1000
    assert WRITE not in caplog.text + "".join(capfd.readouterr())
    assert WRITE.encode() not in files


def test_model_in_memory_is_checked_pushed_and_loads_from_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = packed("llama")
    hub.faults.append(Fault("POST", "/commit/", 500))
    with pytest.raises(ConnectionError, match="vlmq push (.*) me/tiny$") as raised:
        vlmq.push(model, "me/tiny", build_processor("llama"))
    kept = Path(re.findall("vlmq push (.*) me/tiny$", str(raised.value))[0])
    vlmq.push(kept, "me/tiny")
    assert arrived_once(hub, kept)
    loaded = vlmq.load("me/tiny")
    ids = torch.arange(1, 9)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert WRITE not in json.dumps(loaded.config.to_dict())


def test_model_that_does_not_come_back_the_same_is_not_pushed(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = packed("llama")
    model.model.rotary_emb.inv_freq *= 1.5
    with pytest.raises(RuntimeError, match="logits differ by up to .*rotary_emb.inv_freq") as raised:
        vlmq.push(model, "me/tiny")
    kept = Path(re.findall("check of (.*) failed", str(raised.value))[0])
    found = read_round_trip(kept)
    assert found is not None
    assert (found.is_ok, found.is_identical) == (False, False)
    assert found.max_difference is not None
    assert found.max_difference > 0
    with pytest.raises(ValueError, match="failed its round-trip check .logits differ"):
        vlmq.push(kept, "me/tiny")
    assert hub.repos == {}


@pytest.mark.parametrize("what", ["nothing", "unpacked", "damaged"])
def test_folder_without_a_whole_packed_model_is_not_pushed(hub, folder, what):
    config = folder / "config.json"
    if what == "nothing":
        config.unlink()
    elif what == "unpacked":
        config.write_text(json.dumps({"model_type": "llama"}))
    else:
        path = next(iter(folder.glob("*.safetensors")))
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="no config.json|no model packed by vlmq|not a whole safetensors"):
        vlmq.push(folder, "me/tiny")
    assert hub.repos == {}
