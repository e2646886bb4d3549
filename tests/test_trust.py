"""Files that others made are data: no code of a model's folder runs unless asked for, and no pickle runs at all."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from lab_tiny import exit_status, save_with_code, tiny_model
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.inputs import models

ROOT: Final = Path(__file__).resolve().parent.parent
FOLDERS: Final = (
    "optimized",
    "reference",
    "lab",
    "asv_benches",
    "benchmarks",
    "peers",
    "hub",
    "requirements",
)
SOURCES: Final = [
    ROOT / "noxfile.py",
    *sorted((ROOT / ".github").rglob("*.py")),
    *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))),
]
# Reading one of their files can run any code.
PICKLES: Final = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS: Final = {"read_pickle", "eval", "exec"}


def _name(node: ast.expr) -> str:
    """Return `a.b` as text, with a question mark for an object without a name."""
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def _value(call: ast.Call, keyword: str) -> Any:
    """Return a keyword's constant, or the name that is passed on for it."""
    found = next((one.value for one in call.keywords if one.arg == keyword), None)
    return found.value if isinstance(found, ast.Constant) else getattr(found, "id", None)


def _unsafe_call(call: ast.Call) -> bool:
    owner, _, name = _name(call.func).rpartition(".")
    if name == "from_pretrained":
        only_data = any(part in owner for part in ("Tokenizer", "Config"))
        safe = only_data or _value(call, "weights_only") is True or _value(call, "use_safetensors") is True
        # A parameter with this name is passed on; True is never written.
        return not safe or _value(call, "trust_remote_code") not in {False, "trust_remote_code"}
    if name == "load" and owner == "torch":
        return _value(call, "weights_only") is not True
    if name == "load" and owner in {"np", "numpy"}:
        return _value(call, "allow_pickle") is not False
    return (name in CALLS and owner in {"", "pd", "pandas", "builtins"}) or bool(_value(call, "shell"))


def unsafe(source: str) -> list[str]:
    """Return the statements and calls in a source that may run what a file says."""
    found: list[ast.AST] = []
    for node in ast.walk(ast.parse(source)):
        imported = [one.name for one in node.names] if isinstance(node, ast.Import) else []
        imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if {one.partition(".")[0] for one in imported} & PICKLES:
            found.append(node)
        if isinstance(node, ast.Call) and _unsafe_call(node):
            found.append(node)
    return [ast.unparse(node) for node in found]


def test_no_source_runs_what_a_file_says() -> None:
    """Every reader of a file that others made is a safe one, and says so where the safe way is not the only one."""
    assert len(SOURCES) > 100
    found = {path.relative_to(ROOT).as_posix(): unsafe(path.read_text("utf-8")) for path in SOURCES}
    assert {path: calls for path, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "numpy.load(path, allow_pickle=True)",
        "pd.read_pickle(path)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "AutoTokenizer.from_pretrained(folder)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
        "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)",
        "import_module('transformers').AutoModel.from_pretrained(folder, weights_only=True)",
        "AutoModel.from_pretrained(folder, weights_only=True, **options)",
    ],
)
def test_the_scan_finds(source: str) -> None:
    """Each way of running a file is one that the scan sees."""
    assert len(unsafe(source)) == 1


class _Attack:
    """An object whose pickle creates a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_weights_that_are_a_pickle_with_code_are_refused(tmp_path: Path) -> None:
    """`pytorch_model.bin` is read as tensors only; anything else in it is an error of one line."""
    tiny_model(torch.float32).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    weights = tmp_path / "model" / "pytorch_model.bin"
    torch.save({"weight": _Attack(tmp_path / "ran")}, weights)
    torch.load(weights, weights_only=False)
    (tmp_path / "ran").unlink()  # the attack works on a reader that is not careful
    with pytest.raises(LabError, match="cannot be loaded"):
        models.load_model(str(tmp_path / "model"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("asked", [False, True])
def test_code_of_a_model_runs_if_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, asked: bool
) -> None:
    """`--trust-remote-code` runs the code that a folder brings; without it, the error names the option."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    folder = save_with_code(tmp_path / "model", code, "AutoConfig", "AutoModelForCausalLM")
    (tmp_path / "text.txt").write_text("one two three", encoding="utf-8")
    command = ["perplexity", "--corpus", str(tmp_path / "text.txt"), "--model", str(folder)]
    assert exit_status(*command, *(["--trust-remote-code"] if asked else [])) == 2  # own.py has no class A
    assert (tmp_path / "ran").exists() == asked
    assert ("--trust-remote-code" in capsys.readouterr().err) == (not asked)


@pytest.mark.parametrize("command", ["tables", "perplexity", "speed", "verify", "floors"])
@pytest.mark.parametrize("asked", [False, True])
def test_every_command_that_loads_a_model_has_the_option(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, *, asked: bool
) -> None:
    """What is given reaches the loader, and by default no code is trusted."""
    given: list[bool] = []

    def load_model(*_: object, trust_remote_code: bool, **__: object) -> None:
        given.append(trust_remote_code)
        raise LabError("seen")

    monkeypatch.setattr(models, "load_model", load_model)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("one two three", encoding="utf-8")
    corpus = [] if command == "floors" else ["--corpus", "text.txt"]
    exit_status(command, *corpus, *(["--trust-remote-code"] if asked else []))
    assert given == [asked]
