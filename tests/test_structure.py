"""Rules of the source tree: layers of imports, file sizes, no prints, exports, light import."""

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import eva_kernels

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {
    "eva_kernels": ROOT / "eva_kernels",
    "eva_peft": ROOT / "python" / "eva_peft",
}
UTILITIES = {"eva_kernels.errors", "eva_kernels._native"}

# Layer -> what it may import besides itself. A module belongs to the longest name that fits it.
LAYERS = {
    "eva_kernels.errors": set(),
    "eva_kernels._native": {"eva_kernels.errors"},
    "eva_kernels.kernels": {"eva_kernels._native"},
    "eva_kernels.reference": set(),
    "eva_kernels.ops": {"eva_kernels.kernels", "eva_kernels.reference", *UTILITIES},
    "eva_kernels.streaming": {"eva_kernels.ops", "eva_kernels.errors"},
    "eva_kernels._pca": {"eva_kernels.streaming", "eva_kernels.errors"},
    "eva_kernels": {"eva_kernels", "eva_peft"},  # the public names: the only import that goes up
    "eva_peft": {"eva_kernels", "eva_kernels.errors", "eva_kernels.ops", "eva_kernels.streaming"},
}
# The rooms of the PEFT layer from the bottom up: each may import itself and those before it.
ROOMS = [
    "eva_peft.errors",
    "eva_peft._peft_compat",
    "eva_peft.options",
    "eva_peft.surroundings",
    "eva_peft.model",
    "eva_peft.inputs",
    "eva_peft.passes",
    "eva_peft.resume",
    "eva_peft.processes",
    "eva_peft.lora",
    "eva_peft.results",
    "eva_peft.calibrate",
    "eva_peft.initialize",
    "eva_peft.check_padding",
    "eva_peft.peft_api",
    "eva_peft",  # the public names
    "eva_peft.assets",
    "eva_peft.demo",
    "eva_peft.command",
    "eva_peft.cli",
]
MODEL_LIBRARIES = {"accelerate", "datasets", "peft", "transformers"}
PUBLIC = [
    "EvaCallback",
    "EvaError",
    "EvaResult",
    "EvaRuntimeError",
    "EvaTypeError",
    "EvaValueError",
    "EvaWarning",
    "IncrementalPCA",
    "NonFiniteError",
    "NotConvergedError",
    "NotConvergedWarning",
    "NotInitializedError",
    "NotInitializedWarning",
    "OutOfMemoryError",
    "__version__",
    "calibrate",
    "check_padding",
    "estimate",
    "get_eva_state_dict",
    "initialize",
    "initialize_lora_eva_weights",
    "is_initialized",
    "pad_ranks",
    "patch_peft",
    "watch",
]


def modules() -> dict[str, Path]:
    """Return every module of both packages by its dotted name."""
    found = {}
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = path
    return found


MODULES = modules()


def parse(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def imports(name: str, tree: ast.Module) -> Iterator[str]:
    """Yield the modules that a module imports, wherever the statement stands."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*parents, node.module or ""]).strip(".") if node.level else node.module
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                yield submodule if submodule in MODULES else base


def layer_of(name: str) -> str:
    fitting = [layer for layer in LAYERS if name == layer or name.startswith(layer + ".")]
    if name not in LAYERS:  # only modules in the table belong to the public package itself
        fitting = [layer for layer in fitting if layer != "eva_kernels"]
    return max(fitting, key=len, default="")


def layer_violations(name: str, imported: Iterator[str]) -> list[str]:
    layer = layer_of(name)
    if not layer:
        return [f"{name} belongs to no layer of tests/test_structure.py"]
    bad = []
    for target in imported:
        root = target.split(".")[0]
        if root in MODEL_LIBRARIES and layer != "eva_peft":
            bad.append(f"{name} imports {target}: the engine knows no model")
        if root not in SOURCES or layer_of(target) == layer:
            continue
        if layer_of(target) not in LAYERS[layer] and layer != "eva_kernels":
            bad.append(f"{name} imports {target}: {layer} may not know {layer_of(target)}")
    return bad


def test_modules_of_both_packages_are_found() -> None:
    assert {"eva_kernels", "eva_peft", "eva_kernels.reference", "eva_kernels.ops"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_imports_follow_the_layers(name: str) -> None:
    assert layer_violations(name, imports(name, parse(name))) == []


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("eva_kernels.reference", "eva_kernels.ops"),
        ("eva_kernels.ops.sketch", "eva_kernels.streaming"),
        ("eva_kernels.streaming.fold", "eva_kernels.reference"),
        ("eva_kernels.streaming.fold", "eva_kernels"),
        ("eva_kernels.streaming.fold", "transformers"),
        ("eva_kernels._pca", "eva_peft.results.result"),
        ("eva_peft.passes.hooks", "eva_kernels.reference"),
        ("eva_peft.passes.hooks", "eva_kernels._native"),
        ("eva_kernels.somewhere", "torch"),
    ],
)
def test_layer_check_detects_a_wrong_import(name: str, target: str) -> None:
    assert len(layer_violations(name, iter([target]))) == 1


def room_of(name: str) -> int:
    """Return the index of a module's room, which may be that of its package."""
    top = ".".join(name.split(".")[:2])
    assert top in ROOMS, f"{name} is in no room of tests/test_structure.py"
    return ROOMS.index(top)


def without_types(tree: ast.Module) -> ast.Module:
    """Remove imports that are used only for annotations."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    return tree


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("eva_peft")])
def test_rooms_import_only_those_below(name: str) -> None:
    known = [m for m in imports(name, without_types(parse(name))) if m.startswith("eva_peft")]
    assert [m for m in known if room_of(m) > room_of(name)] == []


def test_room_map_names_every_module() -> None:
    text = (SOURCES["eva_peft"] / "README.md").read_text("utf-8")
    files = [
        p for p in SOURCES["eva_peft"].rglob("*.py") if p.parent.name not in ("assets", "demo")
    ]
    words = {f"{p.parent.name}/" if p.name == "__init__.py" else p.name for p in files}
    assert sorted(word for word in words - {"eva_peft/"} if f"`{word}`" not in text) == []


def test_relative_imports_are_resolved() -> None:
    tree = ast.parse("from .. import reference\nfrom .gram import gram\nfrom ..errors import E")
    found = list(imports("eva_kernels.ops.sketch", tree))
    assert found == ["eva_kernels.reference", "eva_kernels.ops.gram", "eva_kernels.errors"]


def test_native_code_includes_no_torch_headers() -> None:
    for path in (ROOT / "csrc").iterdir():
        text = path.read_text(encoding="utf-8")
        assert not any(header in text for header in ("<torch/", "<ATen/", "<c10/")), path


def test_no_file_has_more_than_500_lines() -> None:
    folders = ["eva_kernels", "python", "csrc", "tests", "bench"]
    suffixes = {".py", ".cpp", ".cu", ".cuh", ".h"}
    files = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in suffixes]
    long = {str(p): n for p in files if (n := len(p.read_text("utf-8").splitlines())) > 500}
    assert long == {}


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"eva_peft.cli"}))
def test_no_print_in_the_library(name: str) -> None:
    calls = [node for node in ast.walk(parse(name)) if isinstance(node, ast.Call)]
    prints = [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
    assert prints == []


def compares_versions(tree: ast.Module) -> list[int]:
    """Return the lines that compare or parse a version."""
    lines = []
    for node in ast.walk(tree):
        names = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
        names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        compared = isinstance(node, ast.Compare) and names & {"__version__", "version_info"}
        parsed = isinstance(node, ast.ImportFrom | ast.Import) and "packaging.version" in {
            getattr(node, "module", None),
            *(alias.name for alias in node.names),
        }
        if compared or parsed:
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("name", MODULES)
def test_versions_are_compared_in_one_place(name: str) -> None:
    if name != "eva_peft._peft_compat":
        assert compares_versions(parse(name)) == []


def test_version_check_detects_a_comparison() -> None:
    source = "from packaging.version import Version\nif Version(peft.__version__) < x: pass"
    assert compares_versions(ast.parse(source)) == [1, 2]


def test_public_exports() -> None:
    assert sorted(eva_kernels.__all__) == PUBLIC
    assert set(PUBLIC) <= set(dir(eva_kernels))
    for name in PUBLIC:
        assert getattr(eva_kernels, name) is not None


def test_unknown_attributes_raise() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'initialise'"):
        eva_kernels.initialise  # noqa: B018


IMPORT_PROBE = """
import json, sys, time
import torch
start = time.perf_counter()
import eva_kernels
seconds = time.perf_counter() - start
heavy = sorted({"transformers", "peft", "triton", "eva_peft"} & set(sys.modules))
print(json.dumps([seconds, heavy, torch.cuda.is_initialized()]))
"""


def test_import_is_light() -> None:
    run = subprocess.run([sys.executable, "-c", IMPORT_PROBE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    seconds, heavy, cuda = json.loads(run.stdout)
    assert heavy == []
    assert not cuda
    assert seconds < 2.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is skipped where there is a GPU")
def test_folder_named_like_a_marker_is_not_treated_as_one(tmp_path: Path) -> None:
    folder = tmp_path / "gpu"
    folder.mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", folder)
    (folder / "test_one.py").write_text("def test_one(): pass\n", "utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_one.py"]
    output = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout
    assert "1 passed" in output
