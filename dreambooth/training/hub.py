"""Upload to the hub: checks before training, and one commit after it.

Adapter files, card and pictures are uploaded, and nothing else of the output folder: no trackers' logs, no
optimizer state. The token goes into Authorization headers only, never into a log, a file or a message.
Messages of the hub's library are shown with the token taken out.
"""

import contextlib
import importlib.util
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, validate_repo_id

from dreambooth.adapter_files.native import ADAPTER_NAME, KOHYA_NAME
from dreambooth.files.ownership import WrittenFiles
from dreambooth.io import console
from dreambooth.io.errors import UserError, shortened, shown
from dreambooth.options.reports import ReportOptions
from dreambooth.runtime.stops import Stop
from dreambooth.training.run_folder import CARD

_ANSWER_WITHIN = 20.0  # seconds; without a limit the library waits for ever
_COMMIT_WITHIN = 300.0  # seconds without a byte while the hub works on a commit
_ALTERNATIVE = "or leave out --push_to_hub and upload later with `hf upload`"
_RECORD_COMMAND_LINES = ("wandb", "comet_ml")  # trackers that send the command line to their servers


class UploadFailed(Exception):
    """The upload failed. The message has the reason and the command to try again, on one line."""


def notes(reports: ReportOptions) -> list[str]:
    """Notes on flags that have no effect."""
    if reports.push_to_hub:
        return []
    unused = [name for name in ("hub_token", "hub_model_id", "hub_private_repo") if getattr(reports, name)]
    return [f"You need not use --{name} without --push_to_hub." for name in unused]


# --- before training


def check(reports: ReportOptions, output_dir: Path) -> str | None:
    """OWNER/NAME of the repository that `push` uploads to. Without --push_to_hub: None, and no request.

    Raises UserError for every problem of the upload that is known before training: no network, a token that
    is missing, refused or read-only, an invalid name, a public repository with --hub_private_repo.
    """
    _check_trackers(reports)
    if not reports.push_to_hub:
        return None
    if constants.is_offline_mode():
        raise UserError(
            "--push_to_hub needs the hub, but HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: unset it, "
            "or leave out --push_to_hub"
        )
    name = _name(reports, output_dir)
    token, source = _token(reports)
    account = _account(token, source)
    repository = name if "/" in name else f"{account}/{name}"
    if reports.hub_private_repo:
        _check_private(repository, token)
    return repository


def _check_trackers(reports: ReportOptions) -> None:
    """Raises UserError if --hub_token would be sent to a tracker's server with the command line."""
    trackers = [name for name in _RECORD_COMMAND_LINES if reports.report_to in (name, "all")]
    installed = [name for name in trackers if importlib.util.find_spec(name) is not None]
    if reports.hub_token is not None and installed:
        raise UserError(
            f"--hub_token cannot be used with --report_to {installed[0]}, which records the command line: "
            "use `hf auth login` or HF_TOKEN"
        )


def _folder_name(folder: Path) -> str:
    return folder.absolute().resolve().name


def _name(reports: ReportOptions, output_dir: Path) -> str:
    """NAME or OWNER/NAME of the repository. Raises UserError if the name is not valid."""
    name = _folder_name(output_dir) if reports.hub_model_id is None else reports.hub_model_id
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        reason = shown(str(error).rstrip("."))
    else:
        return name
    if reports.hub_model_id is None:
        raise UserError(
            "--push_to_hub: the name of --output_dir is not valid for a repository; "
            f"give one as --hub_model_id. {reason}"
        )
    raise UserError(f"--hub_model_id: {reason}")


# RFC 6750, section 2.1. The library refuses any other token too, but in a message that shows it.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")


def _token(reports: ReportOptions) -> tuple[str, str]:
    """(the token, its source in words). Raises UserError if there is none."""
    login = "log in with `hf auth login`, or set HF_TOKEN"
    source, trouble = "--hub_token", ""
    token = reports.hub_token
    if token is None:
        source = "`hf auth login` or HF_TOKEN"
        try:
            token = get_token()
        except Exception as error:  # errors of files, of the network, of build servers' token exchange
            trouble = f" (it cannot be read: {type(error).__name__})"
        if token is None:
            raise UserError(f"--push_to_hub needs a token{trouble}: {login}")
    console.hide(token)
    if not _TOKEN.fullmatch(token):
        raise UserError(
            f"--push_to_hub: the token of {source} is empty or has characters that no token has: {login}"
        )
    return token, source


def _account(token: str, source: str) -> str:
    """The name of the token's account; one request. Raises UserError if the token cannot upload."""
    hub = f"--push_to_hub: the hub at {shown(constants.ENDPOINT)}"
    advice = f"make one with write access at {shown(constants.ENDPOINT)}/settings/tokens"
    status, account, trouble = 0, None, ""
    try:
        # not HfApi.whoami, which has no time limit
        answer = get_session().get(
            f"{constants.ENDPOINT}/api/whoami-v2",
            headers=build_hf_headers(token=token),
            timeout=_ANSWER_WITHIN,
        )
        status = answer.status_code
        account = answer.json() if status == 200 else None
    except Exception as error:  # errors of httpx, of addresses, of sockets, of JSON
        trouble = _reason(error)
    # Raised here and not above: the library's errors carry the token in their request's headers.
    if status == 401:
        raise UserError(f"{hub} refuses the token of {source}: {advice}")
    if status == 0:
        raise UserError(f"{hub} cannot be reached: {trouble}. Check the network, {_ALTERNATIVE}")
    if not isinstance(account, dict) or not isinstance(account.get("name"), str):
        raise UserError(
            f"{hub} did not name the account of the token of {source} (HTTP status {status}). "
            f"Try again later, {_ALTERNATIVE}"
        )
    if _role(account) == "read":
        raise UserError(f"--push_to_hub: the token of {source} can only read: {advice}")
    return account["name"]


def _role(account: Mapping[str, Any]) -> object:
    """`read`, `write` or `fineGrained`; None if the answer has no role."""
    value: Any = account
    for key in ("auth", "accessToken", "role"):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _check_private(repository: str, token: str) -> None:
    """Raises UserError if the repository exists and is public: an upload does not change its visibility."""
    is_public, trouble = False, ""
    try:
        is_public = HfApi(token=token).model_info(repository, timeout=_ANSWER_WITHIN).private is False
    except RepositoryNotFoundError:
        pass  # the upload creates it
    except Exception as error:  # as in `_account`
        trouble = _reason(error)
    if trouble:
        raise UserError(
            f"--hub_private_repo: the visibility of {repository} cannot be read: {trouble}. "
            f"Try again later, {_ALTERNATIVE}"
        )
    if is_public:
        raise UserError(
            f"--hub_private_repo: {repository} exists and is public; make it private in its settings, "
            "or give another --hub_model_id"
        )


# --- after training


def publish(reports: ReportOptions, output_dir: Path, card: str, pictures: Sequence[str]) -> None:
    """Write the card and upload it with adapter files and `pictures`. Raises Stop if that fails."""
    try:
        WrittenFiles(output_dir).write(CARD, card.encode())
        console.say(f"uploaded to {push(reports, output_dir, pictures)}")
    except (OSError, UploadFailed) as error:
        raise Stop(str(error)) from None


def push(reports: ReportOptions, output_dir: Path, pictures: Sequence[str]) -> str:
    """Upload adapter files, card and `pictures`, names in `output_dir`, as one commit. Returns the URL of the
    repository. Raises UploadFailed."""
    repository = reports.hub_model_id or _folder_name(output_dir)
    kohya = [KOHYA_NAME] if (output_dir / KOHYA_NAME).exists() else []
    names = [ADAPTER_NAME, *kohya, CARD, *pictures]
    try:
        repository = _name(reports, output_dir)
        token, _ = _token(reports)
        with _time_limit(_COMMIT_WITHIN):
            return _upload(
                HfApi(token=token), repository, output_dir, names, is_private=reports.hub_private_repo
            )
    except Exception as error:  # unexpected answers: the library raises ValueError, KeyError, ...
        reason = _reason(error)
    # Raised here and not above: the library's error carries the token in its request's headers.
    private = ["--private"] if reports.hub_private_repo else []
    included = [word for name in names for word in ("--include", name)]
    command = shlex.join(["hf", "upload", repository, str(output_dir), ".", *included, *private])
    raise UploadFailed(
        f"the upload to {shown(repository)} failed: {reason}; "
        f"nothing is lost, try again with: {shown(command)}"
    )


def _upload(api: HfApi, name: str, output_dir: Path, names: Sequence[str], *, is_private: bool) -> str:
    """Create the repository, commit the files, and check that the hub has them. Returns the URL."""
    # None leaves the visibility to the account's setting
    created = api.create_repo(name, exist_ok=True, private=is_private or None)
    repository = created.repo_id
    # create_repo does not change the visibility of an existing repository
    if is_private and not api.model_info(repository, timeout=_ANSWER_WITHIN).private:
        raise ValueError("it is a public repository, and --hub_private_repo asks for a private one")
    operations = [CommitOperationAdd(path_in_repo=file, path_or_fileobj=output_dir / file) for file in names]
    commit = api.create_commit(repository, operations, commit_message="End of training")
    # the library leaves out, without an error, files that a .gitignore of the repository names
    uploaded = {info.path for info in api.get_paths_info(repository, list(names), revision=commit.oid)}
    if missing := [file for file in names if file not in uploaded]:
        raise ValueError(
            f"the hub took the commit without {', '.join(missing)}; look for a .gitignore in the repository"
        )
    return str(created)


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Within the block the library gives up if the hub sends nothing for `seconds`."""
    session = get_session()
    before = session.timeout
    session.timeout = seconds
    try:
        yield
    finally:
        session.timeout = before


def _reason(error: Exception) -> str:
    """The error's message on one line, of at most 400 characters, with the token taken out before the cut."""
    return shortened(console.without_tokens(" ".join(str(error).split())) or type(error).__name__, 400)
