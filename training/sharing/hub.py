"""Sharing a saved pipeline on the Hub: one commit, repeatable, with one sentence for each failure.

The upload is the pipeline alone, in one of the forms of `ddim_schedulers.export`, with its card.
Nothing on disk is changed. The token is read from where `hf auth login` or HF_TOKEN keep it, goes
into the request headers alone, and is cut out of every message.
"""

import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ddim_schedulers.export import Export, export_folder
from ddim_schedulers.forms import check_form
from ddim_schedulers.pipelines.ownership import own
from ddim_schedulers.training.sharing.failures import (
    OFFLINE,
    cause_of,
    is_passing,
    sentence_of,
    status_of,
    wait_after,
)
from ddim_schedulers.training.sharing.secrets import HUB_TOKEN, check_upload

R = TypeVar("R")

ATTEMPTS = 4
LONGEST_WAIT = 300.0  # the public Hub counts requests in 300 s and may ask for all of it
TIMEOUT = 120.0  # seconds without an answer; the Hub client has no limit

USER_IN_URL = re.compile(r"(?<=://)[^/\s]*@")  # "name:password@", as in the address of a proxy


@dataclass(frozen=True)
class Kind:
    """A kind of repository.

    Attributes:
        repo_type: its name on the Hub.
        word: what it holds, for messages.
        mark: the file by which one is known.
        creation: further arguments of `create_repo`.
    """

    repo_type: str
    word: str
    mark: str
    creation: Mapping[str, Any] = field(default_factory=dict)


MODEL = Kind("model", "pipeline", "model_index.json")
SPACE = Kind("space", "Space", "app.py", {"space_sdk": "gradio"})


@dataclass(frozen=True)
class PushSettings:
    """Where a push goes, and how; `push_pipeline` explains each.

    Raises:
        ValueError: for a `repo_id` or `attempts` that cannot be.
    """

    repo_id: str
    private: bool
    revision: str | None
    token: str | None = field(repr=False)
    message: str
    endpoint: str | None
    attempts: int

    def __post_init__(self) -> None:
        check_repo_id(self.repo_id)
        if self.attempts < 1:
            raise ValueError(f"`attempts` is {self.attempts}; it must be >= 1.")


class PushError(RuntimeError):
    """A push that did not happen; the message is one sentence that says what to do."""


def push_pipeline(
    pipeline_dir: str | os.PathLike[str],
    repo_id: str,
    *,
    form: str = "portable",
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Upload pipeline",
    endpoint: str | None = None,
    attempts: int = ATTEMPTS,
) -> str:
    """Create or update a model repository from a saved pipeline, in one commit.

    Pushing again with the same content makes no new commit. Files of the pipeline's folders that
    the new version lacks are deleted in the same commit; other files of the repository are kept.

    Args:
        pipeline_dir: a folder that `save_pretrained` wrote. Checkpoints, optimiser states and
            anything else that lies in it beside the pipeline is not uploaded.
        repo_id: `USER/NAME`.
        form: `portable`, `plug-in` or `self-contained`, see `ddim_schedulers.export`.
        private: create the repository as private; otherwise as the account or the organisation
            creates them.
        revision: branch; it is created where missing. `None` is `main`.
        token: `None` takes the one of `hf auth login` or HF_TOKEN.
        message: the commit's first line.
        endpoint: URL of the Hub; `None` takes HF_ENDPOINT or huggingface.co.
        attempts: how often a step is tried when the network or the Hub fails, >= 1.

    Returns:
        The URL of the commit.

    Raises:
        FolderInUseError: another process trains, calibrates or pushes the pipeline.
        ValueError: for an argument out of its range, or a folder that is not a pipeline.
        PushError: if the Hub cannot be reached or refuses.
    """
    check_form(form)
    settings = PushSettings(repo_id, private, revision, token, message, endpoint, attempts)
    root = Path(pipeline_dir)
    if not root.is_dir():  # raises, and names the fault
        export_folder(root, form)
    with own(root, "push", read_only=True):
        return send(_with_card(root, repo_id, form), MODEL, settings)


def contents_of_push(
    pipeline_dir: str | os.PathLike[str], repo_id: str, form: str = "portable"
) -> dict[str, Path | bytes]:
    """Return what `push_pipeline` would send, by path in the repository; nothing is sent.

    No token and no network is needed. A file is bytes where the form writes it, as the card
    README.md, and otherwise the place of the file that is sent as it is.

    Raises:
        ValueError: as `push_pipeline`.
    """
    check_form(form)
    return contents(_with_card(Path(pipeline_dir), repo_id, form), MODEL, repo_id)


def contents(export: Export, kind: Kind, repo_id: str) -> dict[str, Path | bytes]:
    """Return the files that `send` would send, searched as it does.

    Raises:
        ValueError: for a name that no repository can have, or a file that holds a credential.
    """
    check_repo_id(repo_id)
    _check(export, kind, _stored_token() or "")
    return export.files


def _with_card(pipeline_dir: Path, repo_id: str, form: str) -> Export:
    from ddim_schedulers.training.sharing import cards

    export = export_folder(pipeline_dir, form)
    export.files["README.md"] = cards.card_for(export, repo_id, form)
    return export


def _check(export: Export, kind: Kind, token: str) -> None:
    """Refuse files with a credential in them; say on stderr what is left out."""
    for path, content in export.files.items():
        check_upload(path, content, token)
    if export.left_out:
        shown = ", ".join(export.left_out[:3]) + (", ..." if len(export.left_out) > 3 else "")
        print(
            f"Not part of the {kind.word}, and not uploaded: {shown} "
            f"({len(export.left_out)} files).",
            file=sys.stderr,
        )


def send(export: Export, kind: Kind, settings: PushSettings) -> str:
    """Send the files after a search for credentials; see `push_pipeline`."""
    token = _usable_token(settings.token)
    _check(export, kind, token)
    push = _Push(kind, settings, token)
    try:
        return push.run(export)
    except PushError:
        raise
    except Exception as error:  # all that the client raises becomes one sentence
        raise PushError(_scrub(sentence_of(error, push.repo_id, push.endpoint), token)) from None


def check_repo_id(repo_id: str) -> str:
    """Return `repo_id` if the Hub can have a repository of that name.

    Raises:
        ValueError: otherwise.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
        if "/" in repo_id:
            return repo_id
    except HFValidationError:  # several sentences, one for each rule
        pass
    raise ValueError(
        f"`repo_id` is {repo_id!r}; it must be USER/NAME, of letters, digits and single '-', '_', "
        "'.', and not end in '.git'."
    )


def push_after_training(
    pipeline_dir: str | os.PathLike[str], repo_id: str, **options: Any
) -> str | None:
    """Push as `push_pipeline`, but never raise: a failed push must not fail the run before it.

    Returns:
        The URL of the commit, or `None` after saying on stderr what failed and how to repeat it.
        The local pipeline is left as it is.
    """
    try:
        return push_pipeline(pipeline_dir, repo_id, **options)
    except (Exception, KeyboardInterrupt) as error:
        reason = str(error) or f"it was stopped ({type(error).__name__})."
        reason = _scrub(reason, options.get("token") or _stored_token())
        print(
            f"The pipeline was not pushed to {repo_id}: {reason}\n"
            f"It is in {pipeline_dir}; to push it again:\n"
            f"  {repeat_command(pipeline_dir, repo_id, **options)}",
            file=sys.stderr,
        )
        return None


def repeat_command(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    option: str = "--pipeline",
    form: str | None = "portable",
    private: bool = False,
    revision: str | None = None,
    **ignored: Any,
) -> str:
    """Return the command line that does the same push; the token is never part of it."""
    words = ["ddim-schedulers", "push", option, os.fspath(folder), "--repo_id", repo_id]
    words += [] if form is None else ["--form", form]
    words += ["--private"] if private else []
    words += ["--revision", revision] if revision else []
    return shlex.join(words)


class _Push:
    """One push: the client, and the steps that are repeated while the network fails."""

    def __init__(self, kind: Kind, settings: PushSettings, token: str) -> None:
        from huggingface_hub import HfApi

        from ddim_schedulers import __version__

        self.kind = kind
        self.settings = settings
        self.repo_id = settings.repo_id
        self.api = HfApi(
            endpoint=settings.endpoint,
            token=token,
            library_name="ddim-schedulers",
            library_version=__version__,
        )
        self.endpoint: str = self.api.endpoint
        if USER_IN_URL.search(self.endpoint):
            raise PushError(
                "the Hub's address (HF_ENDPOINT) holds a name and a password, which would be sent "
                "in the place of the token, and be shown in errors; take them out of it."
            )

    def run(self, export: Export) -> str:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        private, revision = self.settings.private, self.settings.revision
        # `False` would overrule an organisation whose repositories are private by default
        visibility = True if private else None
        create, of = partial(self.api.create_repo, **self.kind.creation), self.kind.repo_type
        self._retry(
            lambda: create(repo_id=self.repo_id, repo_type=of, private=visibility, exist_ok=True)
        )
        if private and not self._retry(self._info).private:
            raise PushError(
                f"{self.repo_id} exists and is public, but --private was asked for; nothing was "
                "uploaded. Make it private in its settings, or take another name."
            )
        if revision is not None and revision != "main":
            self._retry(
                lambda: self.api.create_branch(
                    self.repo_id, repo_type=of, branch=revision, exist_ok=True
                )
            )

        def commit() -> str:
            # Made again for every attempt: the client marks operations as it goes. What arrived in
            # an attempt whose answer was lost is recognised by its hash, or no longer listed.
            there = self.api.list_repo_files(self.repo_id, repo_type=of, revision=revision)
            delete = [CommitOperationDelete(path) for path in self._stale(export, there)]
            add = [
                CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
                for path, content in export.files.items()
            ]
            done = self.api.create_commit(
                self.repo_id,
                [*add, *delete],
                repo_type=of,
                commit_message=self.settings.message,
                revision=revision,
            )
            return done.commit_url

        return self._retry(commit)

    def _info(self) -> Any:  # noqa: ANN401
        return self.api.repo_info(self.repo_id, repo_type=self.kind.repo_type)

    def _stale(self, export: Export, there: list[str]) -> list[str]:
        """Return the repository's files that the new version replaces by nothing."""
        kept = {".gitattributes", "README.md", "LICENSE"}
        if self.kind.mark not in there and not set(there) <= kept:
            raise PushError(
                f"{self.repo_id} exists and holds something else than a {self.kind.word} "
                f"({sorted(set(there) - kept)[0]}, ...); nothing was uploaded. Take another name."
            )
        folders = {path.partition("/")[0] for path in export.files if "/" in path}
        return [p for p in there if p.partition("/")[0] in folders and p not in export.files]

    def _retry(self, call: Callable[[], R]) -> R:
        attempts = self.settings.attempts
        for attempt in range(1, attempts + 1):
            try:
                with _timeout():
                    return call()
            except Exception as error:
                status, wait = status_of(error), wait_after(error, attempt)
                last = attempt == attempts or wait > LONGEST_WAIT
                if last or not is_passing(error):
                    raise
                reason = f"it answers {status}" if status else type(cause_of(error)).__name__
                print(
                    f"{self.endpoint} fails ({reason}); trying again in {wait:.0f} s "
                    f"({attempt} of {attempts - 1}).",
                    file=sys.stderr,
                )
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")


@contextmanager
def _timeout() -> Iterator[None]:
    """Bound the time without an answer of the Hub client's shared session."""
    from huggingface_hub.utils import get_session

    session = get_session()
    before = session.timeout
    session.timeout = TIMEOUT
    try:
        yield
    finally:
        session.timeout = before


def _stored_token() -> str | None:
    from huggingface_hub import get_token

    try:
        return get_token()
    except Exception:  # a broken credential store holds no token
        return None


def _usable_token(token: str | None) -> str:
    """Return the token without the space around it, which the client would quote in an error."""
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        raise PushError(OFFLINE)
    token = (token if token is not None else _stored_token() or "").strip()
    if not token:
        raise PushError("there is no Hugging Face token; run `hf auth login` or set HF_TOKEN.")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise PushError("the Hugging Face token holds characters that no token has.")
    return token


def _scrub(text: str, token: str | None) -> str:
    text = USER_IN_URL.sub("", text.replace(token, "<token>") if token else text)
    return HUB_TOKEN.sub("<token>", text)
