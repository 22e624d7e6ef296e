"""A cache as a dataset repository of the hub: private unless asked otherwise, with a card that says what it holds."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from prefopt.errors import CacheError, Problem
from prefopt.reference.cache import HALF_STEP, Adopted, ReferenceCache
from prefopt.reference.certificate import Certificate
from prefopt.reference.certificate_file import (
    adopt_certificate,
    certificate_elsewhere,
    certificate_file,
    certificate_name,
    read_certificate,
    says_more,
)
from prefopt.reference.index import KeyIndex
from prefopt.reference.note import BROUGHT, CERTIFICATES, NOTE, note_of, refuse_other_reference
from prefopt.reference.publishing import SUFFIX
from prefopt.reference.remote import shards_without
from prefopt.reference.shards import damage, read_index, shard_names

CARD = "README.md"


def push_to_hub(cache: ReferenceCache, repository: str, *, private: bool = True) -> int:
    """Send the completions that a repository lacks, and a certificate of a larger sample, in one commit.

    Args:
        cache: whose completions.
        repository: `owner/name` of a dataset repository, which is made where there is none.
        private: of a repository that is made now; one that exists stays as it is.

    Returns:
        Completions sent.

    Raises:
        CacheError: the repository is another reference's, or cannot be reached.
    """
    api = HfApi()
    with _said_plainly(repository):
        api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        there = _fetch(api, repository)
    _refuse_other(cache, there, repository)
    names = shard_names(there)
    fingerprint = cache.identity.fingerprint
    held = KeyIndex([read_index(there / str(name), fingerprint=fingerprint)[0] for name in names])
    with tempfile.TemporaryDirectory(dir=cache.folder, prefix=".push-", suffix=SUFFIX) as temporary:
        folder = Path(temporary)
        _, rows = shards_without(cache, held, folder, after=names[-1].order if names else 0)
        if says_more(read_certificate(cache), _certificate(cache, there, repository)):
            shutil.copy(certificate_file(cache), folder)
        if not (there / NOTE).exists():
            (folder / NOTE).write_bytes(note_of(cache.identity))
        if not (there / CARD).exists():
            (folder / CARD).write_text(card(cache, repository), encoding="utf-8")
        if any(folder.iterdir()):
            with _said_plainly(repository):
                api.upload_folder(
                    repo_id=repository, repo_type="dataset", folder_path=folder,
                    commit_message=f"{rows:,} reference log-probs",
                )  # fmt: skip
    return rows


def pull_from_hub(cache: ReferenceCache, repository: str, *, revision: str | None = None) -> Adopted:
    """Take the completions of a repository that a cache lacks.

    Raises:
        CacheError: the repository is no cache, another reference's, damaged, or cannot be reached; nothing was taken.
    """
    with _said_plainly(repository):
        there = _fetch(HfApi(), repository, revision)
    if not (there / NOTE).exists():
        raise CacheError(Problem(repository, "a dataset repository that prefopt cache push made", f"it has no {NOTE}"))
    _refuse_other(cache, there, repository)
    files = [there / str(name) for name in shard_names(there)]
    wrong = [line for file in files if (line := damage(file)) is not None]
    if wrong:
        fix = "fetch it again: remove it from the hub's cache folder; or push it anew"
        raise CacheError([Problem(repository, "shards as they were pushed", line, fix) for line in wrong])
    certificate = _certificate(cache, there, repository)
    taken = sum((cache.adopt(file) for file in files), Adopted(0, 0, 0.0))
    if certificate is not None:
        adopt_certificate(cache, certificate)
    return taken


def _certificate(cache: ReferenceCache, there: Path, repository: str) -> Certificate | None:
    file = there / certificate_name(cache.identity)
    return certificate_elsewhere(file.read_bytes(), cache, place=repository) if file.exists() else None


def _fetch(api: HfApi, repository: str, revision: str | None = None) -> Path:
    """Fetch a repository's files into the hub's own cache, which holds each of them once."""
    patterns = ["shard-*.parquet", CERTIFICATES, NOTE, CARD]
    return Path(api.snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=patterns))


def _refuse_other(cache: ReferenceCache, there: Path, repository: str) -> None:
    if (there / NOTE).exists():
        refuse_other_reference(
            (there / NOTE).read_bytes(), cache.identity, where=repository, place=repository, fix=BROUGHT
        )


@contextmanager
def _said_plainly(repository: str) -> Iterator[None]:
    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise CacheError(
            Problem(repository, "a dataset repository of the hub that you may read and write", reason,
                    "check the name, the network and your rights: hf auth login")
        ) from error  # fmt: skip


def card(cache: ReferenceCache, repository: str) -> str:
    """Write the repository's card: whose log-probs, of what, in which units, and how to load them."""
    identity = json.dumps(asdict(cache.identity), indent=2)
    computed = "\n".join(
        f"- {name}: {', '.join(values)}" for name, values in cache.written_with().items() if name != "fingerprint"
    )
    return f"""---
tags: [prefopt, preference-optimization, reference-log-probs]
configs:
- config_name: default
  data_files: shard-*.parquet
---

# Log-probs of a reference model

What one language model says of the completions of a preference data set, kept by content: losses of preference
optimization (DPO and its relatives) need these numbers and not the model.

**Whose.** Reference `{cache.identity.fingerprint}`, the SHA-256 of

```json
{identity}
```

**Of what.** One row per completion, named by hashes of token ids; texts are not stored.

| column | |
|---|---|
| `prompt`, `completion` | BLAKE2b, 16 bytes, of the token ids as little-endian 64-bit integers |
| `logp_sum` | sum of log p(token given prompt and earlier tokens) over the completion, nats, 32 bit |
| `tokens` | tokens in the sum; the end-of-sequence token counts where the completion has one |
| `token_logps` | its terms, nats, 16 bit: relative error at most {HALF_STEP:g} |

Of several rows with one name, the first in the order of the shards' names holds.

Where the reference is quantized, `{CERTIFICATES}` states how far it is from full precision, on a sample.

**Computed with**

{computed}

**How to load.** For a recipe whose reference this is:

    prefopt cache pull RECIPE {repository}

or as a table:

    datasets.load_dataset("{repository}")
"""
