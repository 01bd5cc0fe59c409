"""Checkpoints from the Hugging Face hub, where there is a network."""

from __future__ import annotations

import re
from pathlib import Path

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_FILES = ["config.json", "generation_config.json", "tokenizer*.json", "chat_template.jinja"]
# Not "*.safetensors": some repositories hold the weights a second time, under another name.
_FILES += ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]


def is_repo_id(name: str) -> bool:
    """Whether ``name`` has the form owner/name."""
    return _REPO_ID.fullmatch(name) is not None


def download(repo_id: str, revision: str | None = None) -> Path:
    """Fetches a repository's configuration, tokenizer and safetensors files into the hub's cache; returns the folder.

    Raises:
      ValueError: not of the form owner/name, or the hub cannot be reached or has no such repository.
    """
    from huggingface_hub import snapshot_download

    if not is_repo_id(repo_id):
        raise ValueError(f"{repo_id!r} is no hub id of the form owner/name")
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=_FILES))
    except Exception as error:  # the hub client raises a dozen kinds, network and access among them
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"cannot fetch {repo_id!r} from the hub ({reason}); pass a local folder or GGUF file") from error
