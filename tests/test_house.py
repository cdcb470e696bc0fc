"""The rules of the house: how the tree is cut, and how large its pieces may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "server": {"api", "engine", "base", "cli"},
    "kernels": {"kernels"},
    "adapters_store": {"store", "merge"},
    "trainer": {"jobs", "training"},
}
FORBIDDEN_NAMES = {"http", "triton", "types", "queue"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

SOURCES = sorted(p for root in ROOMS for p in (ROOT / root).rglob("*.py"))
PACKAGES = sorted(
    ROOT / root / "gossamer" / room for root, rooms in ROOMS.items() for room in rooms
)


def _inside(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if p.name != "__pycache__"}


@pytest.mark.parametrize("root", ROOMS)
def test_a_root_folder_holds_only_its_part_of_the_namespace(root: str) -> None:
    # An __init__.py here would make `import kernels` find our folder, and transformers probes
    # for a package of that name and imports whatever it finds.
    assert _inside(ROOT / root) == {"gossamer"}
    assert _inside(ROOT / root / "gossamer") == ROOMS[root]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.name)
def test_a_room_is_a_typed_package(package: Path) -> None:
    assert (package / "__init__.py").is_file()
    assert (package / "py.typed").is_file()
    for folder in (p for p in package.rglob("*") if p.is_dir() and any(p.glob("*.py"))):
        assert folder.name not in FORBIDDEN_NAMES
        assert (folder / "__init__.py").is_file() or folder.name == "versions"


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(source: Path) -> None:
    text = source.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


def test_our_kernels_folder_is_never_importable_as_kernels() -> None:
    probe = "import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)"
    found = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd="/"
    )
    assert found.stdout.strip() == "None"
