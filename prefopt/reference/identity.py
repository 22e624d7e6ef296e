"""What makes two references the same: everything that changes a log-prob, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from prefopt.errors import ModelError, Problem
from prefopt.models import ModelSource, check_source, quantization_settings
from prefopt.paths import cache_root

FORMAT = 1
"""Raised when the stored numbers would mean something else."""

# Fields of config.json that name or describe a model without changing its forward pass.
_COSMETIC = frozenset(
    {
        "_attn_implementation",
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_pdrop",
        "auto_map",
        "bos_token_id",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "finetuning_task",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "label2id",
        "pad_token_id",
        "problem_type",
        "resid_pdrop",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class ReferenceIdentity:
    """A reference model by content; equal identities give equal log-probs up to rounding."""

    weights: str
    """SHA-256 over the SHA-256 of every weight file."""
    config: str
    """SHA-256 of the configuration fields that change the forward pass."""
    quantization: dict[str, Any]
    """bitsandbytes' settings; empty for none."""
    compute: str
    """Dtype of the matrix products."""
    weights_dtype: str
    """Dtype in which unquantized weights are held."""
    positions: str = "from 0, continued through the completion"
    format: int = FORMAT

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all fields, 64 hexadecimal digits."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Name the fields in which a stored identity differs, with both values."""
        mine = asdict(self)
        return [
            f"{name}: {_short(other.get(name))} there, {_short(mine[name])} here"
            for name in mine
            if mine[name] != other.get(name)
        ]


def identify(source: ModelSource) -> ReferenceIdentity:
    """Read off a model's identity from its files, without loading it.

    Raises:
        ModelError: the folder or hub model cannot be read.
    """
    folder = model_folder(source)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {name: value for name, value in config.items() if name not in _COSMETIC}
    files = next((found for pattern in _WEIGHTS if (found := sorted(folder.glob(pattern)))), [])
    if not files:
        raise ModelError(Problem(source.key, "a folder with model weights (*.safetensors)", str(folder),
                                 "save the model with save_pretrained"))  # fmt: skip
    # An adapter beside the weights is applied when they are loaded; its scaling is in its own config.
    hashes = sorted(file_hashes([*files, *folder.glob("adapter_config.json")]))
    return ReferenceIdentity(
        weights=hashlib.sha256("".join(hashes).encode()).hexdigest(),
        config=hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest(),
        quantization=quantization_settings(source.quantization, source.compute),
        compute=str(source.compute).removeprefix("torch."),
        weights_dtype=str(source.dtype).removeprefix("torch."),
    )


def model_folder(source: ModelSource) -> Path:
    """Return the folder that holds a model's files; a hub model is fetched into the hub's own cache first."""
    check_source(source)
    path = Path(source.path).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        return Path(snapshot_download(source.path, revision=source.revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise ModelError(
            Problem(source.key, "a folder, or the name of a model on the hub", f"{source.path}: {reason}",
                    "check the name, the network and your access rights")
        ) from error  # fmt: skip


def file_hashes(files: Sequence[Path], *, rehash: bool = False) -> list[str]:
    """SHA-256 of each file, remembered by (path, size, modification time); `rehash` trusts no memory.

    A file of the hub's cache is a link to a blob that bears its own SHA-256 as its name.
    """
    memo_file = cache_root() / "hashes.json"
    memo = _read_memo(memo_file)
    before = dict(memo)
    hashes = []
    for file in files:
        real = file.resolve()
        if not rehash and real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
            hashes.append(real.name)
            continue
        status = real.stat()
        key = f"{real}|{status.st_size}|{status.st_mtime_ns}"
        if rehash or key not in memo:
            with real.open("rb") as stream:
                memo[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        hashes.append(memo[key])
    if memo != before:
        _write_memo(memo_file, memo)
    return hashes


def _read_memo(file: Path) -> dict[str, str]:
    try:
        memo = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return memo if isinstance(memo, dict) else {}


def _write_memo(file: Path, memo: dict[str, str]) -> None:
    """Write the memo whole; a disk that refuses costs only the memory."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(memo), encoding="utf-8")
        os.replace(partial, file)
    except OSError:
        partial.unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if re.fullmatch(r"[0-9a-f]{64}", text) else text
