"""The settings of pushes to the Hub, of a trained model and of the report of an evaluation; ids of repositories."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ham_hf.settings import SettingsGroup, same_as, setting

HUB = "https://huggingface.co"
DEFAULT_REVISION = "main"
"""The branch of the Hub that is meant where none is named."""
_PART = r"\w(?:[\w.-]{0,94}\w)?"
_ID = re.compile(rf"(?!.*(?:--|\.\.))(?:(?P<owner>{_PART})/)?{_PART}(?<!\.git)", re.ASCII)


def is_hub_id(text: str, *, with_owner: bool = False) -> bool:
    """Whether ``text`` can be the id of a repository, ``owner/name`` or, unless ``with_owner``, ``name``.

    The rules are those of ``huggingface_hub.utils.validate_repo_id``: each part has at most 96 letters, digits, "_",
    "-" and ".", with a letter, digit or "_" at both ends, and there is no "--", no ".." and no ".git" at the end.
    """
    found = _ID.fullmatch(text)
    return found is not None and (found["owner"] is not None or not with_owner)


def split_revision(source: str) -> tuple[str, str | None] | None:
    """Id and revision of ``[hf-hub:]OWNER/NAME[@REVISION]``; None if ``source`` is something else."""
    hub_id, at, revision = source.removeprefix("hf-hub:").partition("@")
    if not is_hub_id(hub_id, with_owner=True) or (at and not re.fullmatch(r"\S+", revision)):
        return None
    return hub_id, revision or None


def target_problems(repo_id: str | None) -> Iterator[str]:
    """Problems of ``--hub_model_id``: a repository to make has at most 96 characters in all."""
    if repo_id is not None and not (is_hub_id(repo_id) and len(repo_id) <= 96):
        yield (
            f"--hub_model_id {repo_id!r}: expected owner/name of at most 96 letters, digits and single '-', '_' or "
            "'.', such as me/robust-cifar10"
        )


@dataclass(frozen=True, kw_only=True)
class HubConfig(SettingsGroup):
    """Where the finished model goes."""

    push_to_hub: bool = setting(False, "push the output folder to the Hub")
    hub_model_id: str | None = setting(None, "repository on the Hub: owner/name")
    hub_private_repo: bool = setting(False, "make the repository private when it is created")
    hub_revision: str = setting(DEFAULT_REVISION, "branch to push to")
    hub_strategy: Literal["end", "every_save"] = setting("end", "push at the end, or after every checkpoint too")
    hub_space: bool = setting(False, "publish report.html as a static Space of the same owner/name too, at the end")
    publish_images: bool = setting(False, "push the images of a dataset that is not public too")
    model_license: str = setting("apache-2.0", "license of the trained weights, for the model card")

    def contradictions(self) -> Iterator[str]:
        """A push without a target, or to an impossible one; settings of a push without a push."""
        if self.push_to_hub and self.hub_model_id is None:
            yield "--push_to_hub needs --hub_model_id OWNER/NAME"
        if not self.push_to_hub:
            idle = "hub_model_id hub_private_repo hub_revision hub_strategy hub_space publish_images"
            yield from self.idle(idle.split(), "--push_to_hub")
        yield from target_problems(self.hub_model_id)


@dataclass(frozen=True, kw_only=True)
class EvaluationHubConfig(SettingsGroup):
    """Where the report of an evaluation goes."""

    push_to_hub: bool = setting(False, "push the report to the model's repository on the Hub")
    create_pr: bool = setting(False, "as a pull request, for a repository that is not one's own")
    hub_model_id: str | None = setting(None, "repository on the Hub: owner/name; none = the model's own")
    publish_images: bool = same_as(HubConfig, "publish_images")

    def contradictions(self) -> Iterator[str]:
        """Settings of a push without a push, and an impossible target."""
        if not self.push_to_hub:
            yield from self.idle(["create_pr", "hub_model_id", "publish_images"], "--push_to_hub")
        if self.hub_model_id is not None and not is_hub_id(self.hub_model_id, with_owner=True):
            yield f"--hub_model_id {self.hub_model_id!r}: expected owner/name, such as me/robust-cifar10"
