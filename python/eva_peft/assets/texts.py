"""Text in every Python installation: its documentation, and its own source code.

Nothing is imported and nothing is downloaded: the files of the standard library are read and
parsed. The two collections do not overlap. `documentation_texts` holds the reference topics and
docstrings, on which the embedded model is trained; `source_texts` holds code with the docstrings
taken out, which is the text that the model has not seen and that the demo adapts it to.
"""

from __future__ import annotations

import ast
import hashlib
import os
import random
import sysconfig
from collections.abc import Container, Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Folders that some installations lack or fill with third-party code, and folders without prose.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
    | {"test", "tests", "idle_test"}
)
# Written by the build of the interpreter: they hold paths of the machine it was built on.
_GENERATED_PREFIXES = ("_sysconfigdata", "config-")

Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def standard_library_files() -> list[Path]:
    """List the Python files of the standard library, sorted by their path within it.

    Returns:
        Absolute paths; tests, third-party packages, character tables and generated files left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, inner, names in os.walk(root):  # skipped folders may be large: not entered
        inner[:] = (name for name in inner if _is_kept(name, _SKIPPED_FOLDERS))
        files += [Path(folder, name) for name in names if name.endswith(".py") and _is_kept(name)]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def documentation_texts() -> dict[str, str]:
    """Collect the reference topics and the docstrings of the standard library.

    Interactive examples are left out, and a paragraph that occurs twice is kept once (the topics
    repeat one another), so that no text is on both sides of a split by document.

    Returns:
        Document name -> text, in a fixed order: `topics/<name>` for every topic of `pydoc`, then
        `docstrings/<path>` with all docstrings of one source file.
    """
    texts = {f"topics/{name}": text for name, text in _pydoc_topics()}
    root = Path(sysconfig.get_paths()["stdlib"])
    for path, _, tree in _parsed_files(standard_library_files()):
        name = f"docstrings/{path.relative_to(root).as_posix()}"
        texts[name] = "\n\n".join(ast.get_docstring(node) or "" for node in _definitions(tree))
    seen: set[str] = set()
    kept = {name: _new_paragraphs(_without_examples(text), seen) for name, text in texts.items()}
    return {name: text for name, text in kept.items() if len(text) >= 40}


def is_held_out(name: str) -> bool:
    """Tell from the name alone whether a document is in the held-out part, 5 %.

    Args:
        name: document name as `documentation_texts` gives it.
    """
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 100 < 5


def source_texts(limit_bytes: int = 2_000_000, seed: int = 0) -> list[str]:
    """Collect Python source code of the standard library, its docstrings taken out.

    Args:
        limit_bytes: stop at the first file that would exceed this many bytes of UTF-8; at least
            one text is returned.
        seed: of the order of the files.

    Returns:
        One text per file. The same installation, limit and seed give the same list; files that are
        missing, empty, not UTF-8 or not parseable are skipped.
    """
    files = standard_library_files()
    random.Random(seed).shuffle(files)
    texts: list[str] = []
    total = 0
    for _, source, tree in _parsed_files(files):
        text = _without_docstrings(source, tree)
        size = len(text.encode())
        if size < 200:
            continue
        if texts and total + size > limit_bytes:
            break
        texts.append(text)
        total += size
    return texts


def token_stream(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[int]:
    """Join texts into one stream of token ids, each text preceded by the beginning-of-text token.

    Args:
        tokenizer: a fast tokenizer; its length limit is not applied.
        texts: any number of texts.
    """
    ids: list[int] = []
    for text in texts:
        ids.append(tokenizer.bos_token_id)
        ids.extend(tokenizer.backend_tokenizer.encode(text).ids)
    return ids


def _is_kept(name: str, skipped: Container[str] = ()) -> bool:
    return name not in skipped and not name.startswith(_GENERATED_PREFIXES)


def _parsed_files(paths: list[Path]) -> Iterator[tuple[Path, str, ast.Module]]:
    for path in paths:
        try:
            source = path.read_text(encoding="utf-8")
            yield path, source, ast.parse(source)
        except (OSError, SyntaxError, ValueError):  # UnicodeDecodeError is a ValueError
            continue


def _pydoc_topics() -> list[tuple[str, str]]:
    try:
        file = resources.files("pydoc_data") / "topics.py"
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (ImportError, OSError, SyntaxError, ValueError):
        return []
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return sorted(ast.literal_eval(node.value).items())
    return []


def _definitions(tree: ast.Module) -> list[Definition]:
    """List everything that may have a docstring, in source order."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    return sorted(nodes, key=lambda node: getattr(node, "lineno", 0))


def _without_examples(text: str) -> str:
    """Drop interactive examples: every `>>>` line up to the next blank line."""
    kept = []
    inside = False
    for line in text.splitlines():
        if line.lstrip().startswith(">>>"):
            inside = True
        elif not line.strip():
            inside = False
        if not inside:
            kept.append(line.rstrip())
    return "\n".join(kept).strip()


def _new_paragraphs(text: str, seen: set[str]) -> str:
    """Drop the paragraphs that are in `seen`, and add the others to it."""
    kept = []
    for paragraph in text.split("\n\n"):
        words = " ".join(paragraph.split())
        if words and words not in seen:
            seen.add(words)
            kept.append(paragraph.strip("\n"))
    return "\n\n".join(kept)


def _without_docstrings(source: str, tree: ast.Module) -> str:
    dropped: set[int] = set()
    for node in _definitions(tree):
        if ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            dropped.update(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    lines = source.splitlines()
    return "\n".join(line for i, line in enumerate(lines, 1) if i not in dropped).strip() + "\n"
