"""Upload to the hub: what is checked before training, and the one commit after it.

Adapter, card and pictures go up, nothing else of the output folder: tracker logs and optimizer states are nobody's business. The token goes
into Authorization headers and nowhere else: no log, no file, no message. The library's own words are shown with the token taken out.
"""

import contextlib
import importlib.util
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, validate_repo_id

from dreambooth.adapter_files.native import ADAPTER_NAME, KOHYA_NAME
from dreambooth.errors import UserError, shown
from dreambooth.options.training import ReportOptions

CARD_NAME = "README.md"
_ANSWER_WITHIN = 20.0  # seconds; the library itself waits for ever
_COMMIT_WITHIN = 300.0  # seconds without a byte, while the hub works on a commit
_ELSE = "or leave out --push_to_hub and upload later with `hf upload`"
_RECORD_COMMAND_LINES = ("wandb", "comet_ml")  # trackers that send the process's flags to their servers


class UploadFailed(Exception):
    """One line: why, and the command that tries again. Nothing in the output folder was changed."""


def notes(reports: ReportOptions) -> list[str]:
    """What is odd about the flags but no error."""
    given = (
        []
        if reports.push_to_hub
        else [name for name in ("hub_token", "hub_model_id", "hub_private_repo") if getattr(reports, name)]
    )
    return [f"You need not use --{name} without --push_to_hub." for name in given]


def check(reports: ReportOptions, output_dir: Path) -> str | None:
    """The full name of the repository that `push` will fill; None without --push_to_hub, and then the hub is not asked.

    Raises UserError for all that would stop the upload and can be known now rather than after hours: no network, no token, one that the hub
    does not take or that cannot write, a name that cannot be, a public repository where a private one is asked for.
    """
    chosen = (
        _RECORD_COMMAND_LINES
        if reports.report_to == "all"
        else {reports.report_to}.intersection(_RECORD_COMMAND_LINES)
    )
    recorder = next((name for name in chosen if importlib.util.find_spec(name) is not None), None)
    if reports.hub_token is not None and recorder is not None:
        raise UserError(
            f"--hub_token cannot be used with --report_to {recorder}, which records the command line: use `hf auth login` or HF_TOKEN"
        )
    if not reports.push_to_hub:
        return None
    if constants.is_offline_mode():
        raise UserError(
            "--push_to_hub needs the hub, but HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: unset it, or leave out --push_to_hub"
        )
    name = _name(reports, output_dir)
    token, source = _token(reports)
    account = _account(token, source)
    repository = name if "/" in name else f"{account['name']}/{name}"
    if reports.hub_private_repo:
        _check_private(repository, token)
    return repository


def push(reports: ReportOptions, output_dir: Path, pictures: Sequence[str]) -> str:
    """Upload adapter files, card and `pictures` (names in `output_dir`) as one commit, and return the repository's address.

    Raises UploadFailed, and then the files are still where they were.
    """
    token: str | None = None
    repository = reports.hub_model_id or _folder_name(output_dir)
    adapters = [
        name for name in (ADAPTER_NAME, KOHYA_NAME) if name == ADAPTER_NAME or (output_dir / name).exists()
    ]
    names = [*adapters, CARD_NAME, *pictures]
    try:
        repository = _name(reports, output_dir)
        token, _ = _token(reports)
        with _patience(_COMMIT_WITHIN):
            return _upload(
                HfApi(token=token), repository, output_dir, names, is_private=reports.hub_private_repo
            )
    except Exception as error:  # beside its own errors the library raises ValueError, KeyError, RuntimeError, ... for answers it does not expect
        reason = _reason(error, token)
    # raised here and not above: the library's error has the token in the headers of its request, and would come along as context
    private = ["--private"] if reports.hub_private_repo else []
    included = [word for name in names for word in ("--include", name)]
    command = shlex.join(["hf", "upload", repository, str(output_dir), ".", *included, *private])
    raise UploadFailed(
        f"the upload to {shown(repository)} failed: {reason}; nothing is lost, try again with: {shown(command)}"
    )


def _upload(api: HfApi, name: str, output_dir: Path, names: Sequence[str], *, is_private: bool) -> str:
    created = api.create_repo(
        name, exist_ok=True, private=is_private or None
    )  # None leaves it to the account's setting
    repository = created.repo_id
    if (
        is_private and not api.model_info(repository, timeout=_ANSWER_WITHIN).private
    ):  # one that was there keeps its visibility
        raise ValueError("it is a public repository, and --hub_private_repo asks for a private one")
    operations = [CommitOperationAdd(path_in_repo=file, path_or_fileobj=output_dir / file) for file in names]
    commit = api.create_commit(repository, operations, commit_message="End of training")
    # the library leaves out what a .gitignore of the repository names, and says nothing
    there = {info.path for info in api.get_paths_info(repository, list(names), revision=commit.oid)}
    if missing := [file for file in names if file not in there]:
        raise ValueError(
            f"the hub took the commit without {', '.join(missing)}; look for a .gitignore in the repository"
        )
    return str(created)


def _folder_name(folder: Path) -> str:
    return folder.absolute().resolve().name


def _name(reports: ReportOptions, output_dir: Path) -> str:
    """NAME or OWNER/NAME of the repository. Raises UserError if none can be called so."""
    given = reports.hub_model_id
    name = _folder_name(output_dir) if given is None else given
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        reason = shown(str(error).rstrip("."))
    else:
        return name
    if given is None:
        raise UserError(
            f"--push_to_hub: the name of --output_dir is none for a repository; give one as --hub_model_id. {reason}"
        )
    raise UserError(f"--hub_model_id: {reason}")


# RFC 6750, section 2.1. Anything else would be refused by the library, in a message with the token in it.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")


def _token(reports: ReportOptions) -> tuple[str, str]:
    """(the token, where it is from, in words). Raises UserError if there is none."""
    login = "log in with `hf auth login`, or set HF_TOKEN"
    source, trouble = "--hub_token", ""
    token = reports.hub_token
    if token is None:
        source = "`hf auth login` or HF_TOKEN"
        try:
            token = get_token()
        except Exception as error:  # of files, of the network, of the machinery for tokens of build servers
            trouble = f" (it cannot be read: {type(error).__name__})"
        if token is None:
            raise UserError(f"--push_to_hub needs a token{trouble}: {login}")
    if not _TOKEN.fullmatch(token):
        raise UserError(
            f"--push_to_hub: the token of {source} is empty or has characters that no token has: {login}"
        )
    return token, source


def _account(token: str, source: str) -> dict[str, Any]:
    """Whose token it is, as the hub describes it: `name` is there. One request. Raises UserError if the token is not good for an upload."""
    hub = f"--push_to_hub: the hub at {shown(constants.ENDPOINT)}"
    advice = f"make one with write access at {shown(constants.ENDPOINT)}/settings/tokens"
    status, account, trouble = 0, None, ""
    try:
        # not HfApi.whoami, which waits for ever
        answer = get_session().get(
            f"{constants.ENDPOINT}/api/whoami-v2",
            headers=build_hf_headers(token=token),
            timeout=_ANSWER_WITHIN,
        )
        status = answer.status_code
        account = answer.json() if status == 200 else None
    except Exception as error:  # httpx's, those of addresses, of sockets, of JSON
        trouble = _reason(error, token)
    if status == 401:
        raise UserError(f"{hub} does not take the token of {source}: {advice}")
    if status == 0:
        raise UserError(f"{hub} cannot be reached: {trouble}. Check the network, {_ELSE}")
    if not isinstance(account, dict) or not isinstance(account.get("name"), str):
        raise UserError(
            f"{hub} does not say whose token that of {source} is (HTTP status {status}). Try again later, {_ELSE}"
        )
    if _role(account) == "read":
        raise UserError(
            f"--push_to_hub: the token of {source} can only read: make one with write access at {shown(constants.ENDPOINT)}/settings/tokens"
        )
    return account


def _role(account: Mapping[str, Any]) -> object:
    """`read`, `write` or `fineGrained`; None if the hub does not say."""
    found: Any = account
    for key in ("auth", "accessToken", "role"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _check_private(repository: str, token: str) -> None:
    """Raise UserError if there is such a repository and it is a public one: its visibility stays as it is."""
    is_public, trouble = False, ""
    try:
        is_public = HfApi(token=token).model_info(repository, timeout=_ANSWER_WITHIN).private is False
    except RepositoryNotFoundError:
        pass  # it will be made
    except Exception as error:  # as in `_account`
        trouble = _reason(error, token)
    if trouble:
        raise UserError(
            f"--hub_private_repo: the hub does not say whether {repository} is private: {trouble}. Try again later, {_ELSE}"
        )
    if is_public:
        raise UserError(
            f"--hub_private_repo: {repository} is there and public; make it private in its settings, or give another --hub_model_id"
        )


@contextlib.contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """Within the block the library gives up when the hub is silent for so long; its own session waits for ever."""
    session = get_session()
    before = session.timeout
    session.timeout = seconds
    try:
        yield
    finally:
        session.timeout = before


def _reason(error: Exception, token: str | None) -> str:
    """An error as part of a line, without the token, whoever put it there."""
    text = " ".join(str(error).split()) or type(error).__name__
    for secret in {token, quote(token, safe="")} if token else ():
        text = re.sub(re.escape(secret), "<token>", text, flags=re.IGNORECASE)
    return shown(text if len(text) <= 400 else f"{text[:400]} ...")
