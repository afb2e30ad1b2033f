"""Documentation matches the code: examples run, documented arguments exist, no private paths appear."""

import ast
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from paths import ROOT
from quick_model import link_quick_model

from flextok_hf import cli, embedded


SOURCES = sorted((ROOT / "src").rglob("*.py"))
SCRIPTS = sorted([*(ROOT / "scripts").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


BLOCK = re.compile(r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```", re.M | re.S)


@dataclass(frozen=True)
class CodeBlock:
    """A code block of a page; `reason` says why it is not run, if it is not."""

    language: str
    code: str
    reason: str | None


def all_blocks(page: Path) -> list[CodeBlock]:
    matches = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [CodeBlock(match["language"], match["code"], match["reason"]) for match in matches]


def code_blocks(page: Path, language: str) -> list[str]:
    return [block.code for block in all_blocks(page) if block.language == language]


def shell_commands(code: str) -> list[list[str]]:
    """Return the commands of a shell block as words; a backslash continues a line."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def tracked_files() -> list[Path]:
    """Return the files that git tracks or would add; skip the test without a git checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A working folder as the pages assume it, with a `photo.jpg`, so that outputs stay out of the repository."""
    for name in ("docs", "scripts", "src", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "photo.jpg").write_bytes((ROOT / "docs" / "assets" / "parrots.jpg").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.fixture
def quick_model(tmp_path_factory, monkeypatch):
    """Examples find an embedded model that takes few steps unless they say how many."""
    folder = link_quick_model(tmp_path_factory.mktemp("models") / "embedded")
    monkeypatch.setattr(embedded, "EMBEDDED_MODEL_FOLDER", folder)


@pytest.mark.slow
@pytest.mark.skipif(
    not (embedded.EMBEDDED_MODEL_FOLDER / "model_index.json").is_file(), reason="the embedded model is missing"
)
@pytest.mark.parametrize("page", [page for page in PAGES if all_blocks(page)], ids=names)
def test_examples_run_or_state_why_not(page, workplace, quick_model):
    scope: dict = {}  # shared by the page: later examples may build on earlier ones
    for block in all_blocks(page):
        if block.reason is not None:
            assert len(block.reason) > 10
        elif block.language == "python":
            exec(compile(block.code, str(page), "exec"), scope)
        elif block.language == "bash":
            for words in shell_commands(block.code):
                assert words[0] == "flextok", (
                    f"{names(page)}: `{' '.join(words)}` cannot be run in a test. Put a line"
                    " `<!-- not run: the reason -->` right before its block."
                )
                assert cli.main(words[1:]) == 0, words


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_python_examples_parse(page):
    for block in code_blocks(page, "python"):
        ast.parse(block)


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_flextok_commands_of_the_docs_parse(page):
    for words in [words for block in code_blocks(page, "bash") for words in shell_commands(block)]:
        if words[0] == "flextok":
            cli.build_parser().parse_args(words[1:])


def test_every_page_is_in_the_navigation_of_the_site():
    listed = set(re.findall(r"^ +- [^:]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")}, "add new pages to `nav` in mkdocs.yml"


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in code_blocks(ROOT / "README.md", "bash"):
        for words in shell_commands(block):
            if words[0] == "make":
                assert {word for word in words[1:] if "=" not in word} <= targets


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_within_the_repository_have_a_target(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{names(page)} links to {target}"


def documented_arguments(docstring: str) -> list[str]:
    """Return the names in the `Args:` section of a docstring."""
    section = re.search(r"^( *)Args:\n((?:\1 +\S.*\n|\s*\n)*)", docstring + "\n", re.MULTILINE)
    if section is None:
        return []
    entries: list[str] = []
    lines = [line for line in section.group(2).splitlines() if line.strip()]
    indent = len(lines[0]) - len(lines[0].lstrip())
    for line in lines:
        if len(line) - len(line.lstrip()) == indent:
            entries.append(line.strip())
        else:  # continuation of an entry
            entries[-1] += " " + line.strip()
    return [name.strip("` *") for entry in entries for name in re.split(r"[:(]", entry)[0].split(",")]


def public_functions(tree: ast.Module):
    """Yield (name, function, node with the docstring) for public functions, methods and constructors of a module."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node, node
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and (
                    not method.name.startswith("_") or method.name in ("__init__", "__call__")
                ):
                    yield f"{node.name}.{method.name}", method, method
                    if method.name == "__init__":
                        yield node.name, method, node


@pytest.mark.parametrize("path", SOURCES, ids=names)
def test_docstrings_document_existing_arguments_in_order(path):
    for name, function, documented in public_functions(ast.parse(path.read_text(encoding="utf-8"))):
        described = documented_arguments(ast.get_docstring(documented) or "")
        arguments = function.args
        known = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
        known += [argument.arg for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
        assert [entry for entry in known if entry in described] == described, f"{names(path)}: {name}"


@pytest.mark.parametrize("path", SOURCES, ids=names)
def test_public_functions_of_more_than_three_statements_have_docstrings(path):
    for name, function, _ in public_functions(ast.parse(path.read_text(encoding="utf-8"))):
        is_short = len(function.body) <= 3
        if function.name not in ("__init__", "__call__") and not is_short:
            assert ast.get_docstring(function), f"{names(path)}: {name}"


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=names)
def test_torchvision_is_not_imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
        assert not any(module.split(".")[0] == "torchvision" for module in modules)


def test_no_file_contains_a_private_path():
    # Absolute paths that exist on one machine only. Split into parts, because this file is checked too.
    private = re.compile(
        r"(?<![\w.~])/(?:" + "|".join(["ho" + "me/", "Us" + "ers/", "ro" + "ot/", "wo" + "rk/", "tm" + "p/"]) + ")"
    )
    found = []
    for path in tracked_files():
        if (
            path.suffix in (".py", ".md", ".toml", ".yaml", ".yml", ".json", ".cff", ".sh", "")
            and path.name != "LICENSE"
        ):
            text = path.read_text(encoding="utf-8", errors="ignore")
            found += [f"{names(path)}: {match.group(0)}" for match in private.finditer(text)]
    assert not found


def test_python_files_are_ascii():
    for path in tracked_files():
        if path.suffix == ".py":
            text = path.read_text(encoding="utf-8")
            assert text.isascii(), names(path)
