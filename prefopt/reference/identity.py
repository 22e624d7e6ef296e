"""What makes two references the same: everything that changes a log-prob, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from prefopt.adapters import adapter_folder
from prefopt.errors import ModelError, Problem
from prefopt.models import ModelSource, check_source
from prefopt.paths import cache_root
from prefopt.quantization import quantization_settings

FORMAT = 1
"""Raised when the stored numbers would mean something else."""

# Fields of config.json that name or describe a model, or act only in training, generation or on the speed; at every
# depth. Whatever is not listed enters: an unknown field costs a build, a forgotten one would cost a wrong number.
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
        "dropout",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "finetuning_task",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "resid_pdrop",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
# The same for adapter_config.json: rank, alpha, targets, rslora and everything unknown enter, dropout and names do not.
# The kind of initialisation enters: PiSSA and its like change the base weights when the adapter is loaded.
_COSMETIC_ADAPTER = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "lora_dropout",
        "peft_version",
        "revision",
        "task_type",
    }
)
_MODEL_FILES = ("model.safetensors", "pytorch_model.bin")
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
RACY_SECONDS = 2.0
"""A file changed so recently is hashed again: it could change once more within the resolution of its time."""


POSITIONS = "from 0, continued through the completion"
LONG_ROTARY = "; frequencies by the length of each completion with its prompt"
"""Of models that have two sets of them (`prefopt.passes`)."""


@dataclass(frozen=True)
class ReferenceIdentity:
    """A reference model by content; equal identities give equal log-probs up to rounding."""

    weights: str
    """SHA-256 over the SHA-256 of every weight file."""
    config: str
    """SHA-256 of the configuration fields that change the forward pass."""
    quantization: dict[str, Any]
    """bitsandbytes' settings, skipped modules and threshold included; empty for none."""
    compute: str
    """Dtype of the matrix products."""
    weights_dtype: str
    """Dtype in which unquantized weights are held."""
    adapter: str = ""
    """SHA-256 of an adapter's weights and of its settings, scaling included; empty for none."""
    eos: str = "scored where the completion's ids hold it"
    positions: str = POSITIONS
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
    hashes = file_hashes(weight_files(source, folder))
    return ReferenceIdentity(
        weights=hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest(),
        config=_settings_hash(source, folder / "config.json", _COSMETIC),
        quantization=_quantization(source),
        compute=str(source.compute).removeprefix("torch."),
        weights_dtype=str(source.dtype).removeprefix("torch."),
        adapter=_adapter_hash(source, folder),
        positions=POSITIONS + (LONG_ROTARY if _turns_by_length(folder / "config.json") else ""),
    )


def _quantization(source: ModelSource) -> dict[str, Any]:
    """Return bitsandbytes' settings, and how a CPU multiplies with what it quantized."""
    settings = _ordered(quantization_settings(source.quantization, source.compute))
    return {**settings, "cpu": "weights expanded"} if settings else {}


def _turns_by_length(config: Path) -> bool:
    """Whether a configuration names the rotary positions of Phi-3 with 128k, by their name or their first one."""
    text = config.read_text(encoding="utf-8") if config.exists() else ""
    return '"longrope"' in text or '"su"' in text


def weight_files(source: ModelSource, folder: Path) -> list[Path]:
    """Return the weight files that `from_pretrained` would read, by the same preference; others do not count.

    Raises:
        ModelError: there are none, or an index names files that are not there.
    """
    for name in _MODEL_FILES:
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.exists():
            shards = [folder / shard for shard in sorted(set(_json(source, index).get("weight_map", {}).values()))]
            absent = [shard.name for shard in shards if not shard.exists()]
            if absent or not shards:
                raise ModelError(Problem(source.key, f"the files that {index.name} names", ", ".join(absent) or "none",
                                         "complete the download, or save the model again"))  # fmt: skip
            return shards
    raise ModelError(Problem(source.key, "a folder with model weights (model.safetensors, whole or in shards)",
                             str(folder), "save the model with save_pretrained"))  # fmt: skip


def _adapter_hash(source: ModelSource, folder: Path) -> str:
    """SHA-256 of the adapters that act: one beside the model's weights, and the one that is put on; empty for none."""
    beside = [folder] if (folder / "adapter_config.json").exists() else []
    put_on = [adapter_folder(source.adapter)] if source.adapter is not None else []
    hashes = []
    for where in [*beside, *put_on]:
        weights = [where / name for name in _ADAPTER_FILES if (where / name).exists()][:1]
        hashes += [_settings_hash(source, where / "adapter_config.json", _COSMETIC_ADAPTER), *file_hashes(weights)]
    return hashlib.sha256("".join(hashes).encode()).hexdigest() if hashes else ""


def _ordered(settings: dict[str, Any]) -> dict[str, Any]:
    """Put lists of names in one order: which modules are skipped counts, not who is named first."""
    return {name: sorted(value) if isinstance(value, list) else value for name, value in settings.items()}


def _settings_hash(source: ModelSource, file: Path, cosmetic: frozenset[str]) -> str:
    kept = _without(_json(source, file), cosmetic)
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _without(value: Any, names: frozenset[str]) -> Any:
    """Drop fields by name at every depth: a multimodal config holds that of its language model."""
    if isinstance(value, dict):
        return {name: _without(field, names) for name, field in value.items() if name not in names}
    return value


def _json(source: ModelSource, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(Problem(source.key, f"a readable {file.name}", f"{file}: {error}",
                                 "complete the download, or save the model again")) from error  # fmt: skip
    if not isinstance(content, dict):
        raise ModelError(Problem(source.key, f"a {file.name} with settings by name", str(file),
                                 "complete the download, or save the model again"))  # fmt: skip
    return content


def model_folder(source: ModelSource) -> Path:
    """Return the folder that holds a model's files; a hub model is fetched into the hub's own cache first."""
    check_source(source)
    path = Path(source.path).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "model*.safetensors", "adapter_model.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        found = Path(snapshot_download(source.path, revision=source.revision, allow_patterns=patterns))
        if any(found.glob("model*.safetensors")):
            return found
        patterns += ["pytorch_model*.bin", "adapter_model.bin"]  # only where there is nothing newer
        return Path(snapshot_download(source.path, revision=source.revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise ModelError(
            Problem(source.key, "a folder, or the name of a model on the hub", f"{source.path}: {reason}",
                    "check the name, the network and your access rights")
        ) from error  # fmt: skip


def file_hashes(files: Sequence[Path], *, rehash: bool = False) -> list[str]:
    """SHA-256 of each file, remembered by (path, size, modification time); `rehash` trusts no memory.

    Links are followed: a folder reached by two ways is hashed once. A file of the hub's cache is a link to a blob
    that bears its own SHA-256 as its name.
    """
    memo_file = cache_root() / "hashes.json"
    memo = _read_memo(memo_file)
    before = dict(memo)
    hashes = []
    for file in files:
        real = file.resolve()
        status = real.stat()
        key = f"{real}|{status.st_size}|{status.st_mtime_ns}"
        is_blob = real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name)
        known = memo.get(key) or (real.name if is_blob else None)
        if rehash or known is None:
            with real.open("rb") as stream:
                known = hashlib.file_digest(stream, "sha256").hexdigest()
            if abs(time.time() - status.st_mtime) > RACY_SECONDS:
                memo[key] = known
        hashes.append(known)
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
