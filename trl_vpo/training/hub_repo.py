"""A model repo on the Hub that a run pushes to, and what went wrong with it: for good or for now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RevisionNotFoundError
from huggingface_hub.utils import _http

from trl_vpo.data.identity import package_version
from trl_vpo.errors import HubError
from trl_vpo.runs.secrets import scrub

TIMEOUT = 120  # seconds without a byte; huggingface_hub itself waits for ever
LATER = {408, 409, 412, 425, 429}  # of the 4xx, those that may go well when tried again
LOG_IN = (
    "Log in with `hf auth login`, or set HF_TOKEN to a token that may write there. push_to_hub: false trains without "
    "pushing."
)


class HubRepo:
    """A repo to push to. Nothing is asked of the Hub before `open` or `commit`.

    Once it is opened, `name` has the namespace. Without a `token`, that of HF_TOKEN or of `hf auth login` is taken.
    """

    def __init__(self, name: str, *, private: bool | None, revision: str | None, token: str | None):
        self.name, self.private, self.revision = name, private, revision
        self._token, self._api, self._is_open = token, None, False

    @property
    def url(self) -> str:
        return f"{constants.ENDPOINT}/{self.name}"

    def open(self) -> None:
        """Create the repo, or check the existing one.

        Raises HubError where it cannot be pushed to; where the Hub cannot be reached, what huggingface_hub raises.
        """
        if self._api is None:
            self._api = HfApi(token=self._token, library_name="trl-vpo", library_version=package_version())
            make_client = _http._GLOBAL_CLIENT_FACTORY

            def client_with_timeout():
                client = make_client()
                client.timeout = TIMEOUT
                return client

            set_client_factory(client_with_timeout)
        try:
            self._token = self._token or get_token()  # kept to be starred out of messages
            if not self._token:
                raise HubError(f"push_to_hub: there is no token. {LOG_IN}")
            name = self._api.create_repo(self.name, private=self.private, exist_ok=True).repo_id
            self._check(name)
        except HFValidationError as error:
            raise HubError(f"hub_model_id, or else the name of output_dir: {error}") from None
        except Exception as error:
            if not is_refusal(error) or isinstance(error, (HubError, OfflineModeIsEnabled)):
                raise
            raise HubError(f"push_to_hub: the Hub refuses {self.name}: {self.reason(error)}. {LOG_IN}") from None
        self.name, self._is_open = name, True

    def _check(self, name: str) -> None:
        """Check an existing repo: is it private, may it be written, does it have the branch?"""
        if self.private and not self._api.model_info(name, timeout=TIMEOUT).private:
            raise HubError(
                f"hub_private_repo: {name} exists already, and it is public. Make it private in its settings, name "
                "another hub_model_id, or leave hub_private_repo out to push to the public one."
            )
        try:
            self._api.auth_check(name, write=True)  # creating an existing repo succeeds with a token that only reads
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403):
                raise
        if self.revision:
            try:
                self._api.model_info(name, revision=self.revision, timeout=TIMEOUT)
            except RevisionNotFoundError:
                self._api.create_branch(name, branch=self.revision, exist_ok=True)

    def commit(self, files: dict[str, Path | bytes], message: str, *, replace: str | None = None) -> None:
        """Upload files (path in the repo -> file, or its contents) in one commit; open the repo if that failed before.

        The folder `replace` holds no others afterwards. What is raised is as for `open`; then nothing was committed.
        """
        if not self._is_open:
            self.open()
        operations: list[Any] = [CommitOperationAdd(path, file) for path, file in files.items()]
        if replace:
            old = {path for path in self.files() if path.startswith(f"{replace}/")} - set(files)
            operations += [CommitOperationDelete(path) for path in sorted(old)]
        self._api.create_commit(self.name, operations, commit_message=message, revision=self.revision)

    def files(self) -> set[str]:
        """The paths of all files of the branch. What is raised is as for `open`."""
        if not self._is_open:
            self.open()
        return set(self._api.list_repo_files(self.name, revision=self.revision))

    def reason(self, error: BaseException) -> str:
        """An error in one line, without the token: servers and proxies may repeat what they were sent."""
        answered = _with_response(error)
        if answered is None:
            text = str(error.__cause__ or error) or type(error).__name__
        else:
            request, message = answered.response.request, getattr(answered, "server_message", None) or ""
            text = f"HTTP {answered.response.status_code} to {request.method} {request.url.path}: {message}"
        return scrub(" ".join(text.split()).rstrip(".:"), self._token or "")


def _with_response(error: BaseException | None) -> Any:
    """The error among the causes of this one that holds the Hub's answer; None where no answer came."""
    while error is not None and getattr(error, "response", None) is None:
        error = error.__cause__
    return error


def is_refusal(error: Exception) -> bool:
    """Return whether trying again would not help."""
    if isinstance(error, (HubError, OfflineModeIsEnabled)):
        return True
    answered = _with_response(error)
    return answered is not None and answered.response.status_code in set(range(400, 500)) - LATER
