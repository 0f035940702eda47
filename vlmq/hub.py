"""Push a packed model to a hub: checked, with a measured card, and so that a failed upload can go on.

What is uploaded is a folder, in one commit (the client splits one of more than 250 files). It asks the hub which
large files it holds already, by their sha256, and sends only the others; the same model always gives the same bytes. So
going on after a failure is to push again, and no file that had arrived is sent twice. The folder of a model that
was in memory is kept until it has arrived.

The token is the one stored by `hf auth login`, or HF_TOKEN, or the argument; it is never part of a message.
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel

from vlmq.card import is_own_card, keep_evaluation, write_card
from vlmq.checkpoint import CARD_FILE, CARD_MARK, check_files, load, save
from vlmq.eval.report import Table
from vlmq.eval.round_trip import PROCESSOR_FILES, check_round_trip, read_round_trip, weights_id
from vlmq.hf import QUANT_METHOD
from vlmq.opening import open_processor

logger = logging.getLogger(__name__)

# Files of an earlier upload that this one does not bring; transformers would read old weights before new ones.
REPLACED = ["*.safetensors", "*.safetensors.index.json", "pytorch_model*", "vlmq_*.json"]
ADVICE = {
    400: "it does not accept what was sent",
    401: "it does not know you: run `hf auth login`, or set HF_TOKEN to a token of https://huggingface.co/settings/tokens",
    403: "you may not write there: use a token with write access to this repository, or a repository of your own",
    404: "there is no such repository or branch, or you may not see it",
    409: "somebody else is changing the repository at the same time: push again",
    429: "it has had too many requests: wait some minutes, then push again",
}


def push(
    model: PreTrainedModel | str | os.PathLike[str],
    repo_id: str,
    processor: Any = None,
    private: bool = False,
    *,
    evaluation: Table | None = None,
    measured_on: str = "",
    base_model: str | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a model quantized with vlmq",
    create_pr: bool = False,
    trust_remote_code: bool = False,
) -> str:
    """Upload a packed model, or a folder that holds one, with a model card; after a failure, goes on where it stopped.

    Before the upload the model is loaded in a fresh process and compared (`vlmq.eval.round_trip`), unless the folder
    has passed that check with the same weights before. Files of an earlier model in the repository go.

    Args:
        model: quantized by vlmq, or the folder where one was saved.
        repo_id: "<owner>/<name>", or a name in your own space; made if it does not exist.
        processor: saved along, as in `save`; a folder has its own.
        private: make a new repository private.
        evaluation: what was measured before and after, see `vlmq.card.keep_evaluation`.
        measured_on: the data it was measured on; goes with `evaluation`.
        base_model: repository of the original; known already if the model was loaded from a hub.
        token: access token, by default the one that was stored by `hf auth login`.
        revision: branch to commit to.
        commit_message: title of the commit.
        create_pr: open a pull request instead of committing.
        trust_remote_code: run code that comes with the model.

    Returns:
        The URL of the commit.

    Raises:
        RuntimeError: the round-trip check failed; nothing was uploaded.
        ValueError: no packed model, a folder that failed its check, or the hub refuses the card or the name.
        PermissionError: no token, or one without the right to write.
        ConnectionError: the hub cannot be reached, is busy, or failed; push again.
    """
    repo_id = check_access(repo_id, private=private, token=token)
    if isinstance(model, str | os.PathLike):
        folder = Path(model).resolve()
        _check_folder(folder, trust_remote_code)
    else:
        folder = _saved(model, processor, trust_remote_code)
    if evaluation is not None:
        keep_evaluation(folder, evaluation, measured_on)
    write_card(folder, repo_id, base_model=base_model)
    command = f"vlmq push {folder} {repo_id}{' --private' if private else ''}"
    again = f"; nothing is lost, and what has arrived is not sent again: {command}"
    with explained(repo_id, again):
        url = _upload(HfApi(token=token), folder, repo_id, private, revision, commit_message, create_pr)
    if isinstance(model, PreTrainedModel):
        shutil.rmtree(folder.parent)
    return url


def check_access(repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Ask the hub whether this user can push there, before work is spent on what would be pushed.

    Args:
        repo_id: "<owner>/<name>", or a name in the user's own space.
        private: whether the repository is to be private.
        token: as in `push`.

    Returns:
        The name with its owner.

    Raises:
        ValueError: no name of a repository, no token in form, or a public repository where a private one is asked for.
        PermissionError: no token, one that can only read, or an owner the user does not belong to.
        ConnectionError: the hub cannot be reached.
    """
    if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token != ""):
        raise ValueError(
            "token: expected letters, digits and _ without spaces or line ends; it is not shown here"
        )
    api = HfApi(token=token)
    with explained(repo_id):
        validate_repo_id(repo_id)
        user = api.whoami()
        owner, _, name = repo_id.rpartition("/")
        repo_id = f"{owner or user['name']}/{name}"
        role = user.get("auth", {}).get("accessToken", {}).get("role")
        owners = [user["name"], *(org["name"] for org in user.get("orgs", ()))]
        if role == "read":
            raise PermissionError(f"cannot push to {repo_id}: the token can only read; {ADVICE[403]}")
        if owner and owner not in owners:
            raise PermissionError(
                f"cannot push to {repo_id}: you are {user['name']} and may write for {', '.join(owners)}; {ADVICE[403]}"
            )
        try:
            is_private = api.repo_info(repo_id).private
        except RepositoryNotFoundError:
            return repo_id
    if private and not is_private:
        raise ValueError(
            f"{repo_id} exists and is public, a private repository was asked for: make it private in its settings, "
            "or choose another name"
        )
    return repo_id


@contextmanager
def explained(repo_id: str, then: str = "") -> Iterator[None]:
    """Turn what the client of the hub raises into one line that says what to do.

    Args:
        repo_id: what is talked about.
        then: what follows the line.
    """
    try:
        yield
    except PermissionError:
        raise
    except LocalTokenNotFoundError as error:
        raise PermissionError(f"cannot push to {repo_id}: no token; {ADVICE[401]}{then}") from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise _explanation(error, f"cannot push to {repo_id}: ", then) from error


def _explanation(error: BaseException, start: str, then: str) -> Exception:
    """The error to raise in place of the client's, by the answer of the hub that is behind it."""
    answer = next((e for e in _causes(error) if isinstance(e, HfHubHTTPError)), None)
    if answer is None:
        reason = " ".join(str(list(_causes(error))[-1] or error).split())
        if isinstance(error, ValueError):
            return ValueError(f"{start}{' '.join(str(error).split())}{then}")
        return ConnectionError(f"{start}the connection failed ({reason}){then}")
    status = answer.response.status_code
    said = f" (it says: {' '.join(answer.server_message.split())})" if answer.server_message else ""
    advice = ADVICE.get(status, "the hub failed: push again later" if status >= 500 else "it refuses")
    text = f"{start}the hub answers {status}: {advice}{said}{then}"
    if status in (401, 403):
        return PermissionError(text)
    if isinstance(error, ValueError) and status == 400:  # what the hub does not like in a card
        return ValueError(f"{start}{' '.join(str(error).split())}{then}")
    return ConnectionError(text) if status in (408, 409, 429) or status >= 500 else ValueError(text)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _saved(model: PreTrainedModel, processor: Any, trust_remote_code: bool) -> Path:
    """Save a model to a new temporary folder and check it; only a folder that failed the check is left behind."""
    scratch = Path(tempfile.mkdtemp(prefix="vlmq-push-"))
    try:
        folder = save(model, scratch / "model", processor)
        check_round_trip(model, folder, processor, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError):
        shutil.rmtree(scratch)
        raise
    return folder


def _check_folder(folder: Path, trust_remote_code: bool) -> None:
    """See that a folder holds a whole packed model that has passed its round-trip check, or passes it now."""
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"{folder}: expected the folder of a packed model, it holds no config.json")
    block = json.loads(config.read_text(encoding="utf-8")).get("quantization_config") or {}
    if block.get("quant_method") != QUANT_METHOD:
        raise ValueError(
            f"{folder} holds no model packed by vlmq (quant_method: {block.get('quant_method')})"
        )
    check_files(folder)
    found = read_round_trip(folder)
    if found is not None and found.weights == weights_id(folder):
        if not found.is_ok:
            raise ValueError(
                f"{folder} failed its round-trip check ({found.problem}); quantize and save it again"
            )
        return
    processor = None
    if any((folder / name).is_file() for name in PROCESSOR_FILES):
        processor = open_processor(str(folder), trust_remote_code=trust_remote_code)
    model = load(folder, trust_remote_code=trust_remote_code)
    check_round_trip(model, folder, processor, trust_remote_code=trust_remote_code)


def _upload(
    api: HfApi,
    folder: Path,
    repo_id: str,
    private: bool,
    revision: str | None,
    commit_message: str,
    create_pr: bool,
) -> str:
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    ignored = []
    if is_own_card(folder / CARD_FILE) and api.file_exists(repo_id, CARD_FILE, revision=revision):
        there = Path(api.hf_hub_download(repo_id, CARD_FILE, revision=revision))
        if CARD_MARK not in there.read_text(encoding="utf-8", errors="replace"):
            logger.warning("%s has a %s of its own, which is kept", repo_id, CARD_FILE)
            ignored = [CARD_FILE]
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message=commit_message,
        create_pr=create_pr,
        ignore_patterns=ignored,
        delete_patterns=REPLACED,
    )
    return commit.pr_url if create_pr and commit.pr_url else commit.commit_url
