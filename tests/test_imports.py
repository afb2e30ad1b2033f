"""Which folders may import which, without cycles; and side effects of importing the package."""

import ast
import itertools
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from paths import ROOT


PACKAGE = ROOT / "src" / "flextok_hf"
# The folders and what each may import. Modules next to the folders are public entry points.
MAY_IMPORT = {
    "embedded": set(),
    "utils": set(),
    "models": {"utils"},
    "cards": {"utils"},
    "pipelines": {"embedded", "utils", "models", "cards"},
    "data": {"utils", "models", "pipelines"},
    "conversion": {"utils", "models", "cards", "pipelines"},
    "training": {"utils", "models", "cards", "pipelines", "data"},
    "evaluation": {"utils", "models", "pipelines", "data"},
    "demo": {"utils", "models", "pipelines"},
    "cli": {"embedded", "utils", "models", "pipelines", "conversion", "training", "demo"},
    "auto_classes": {"models", "pipelines"},
    "__init__": {"embedded", "models", "pipelines"},
}
# The only import against these rules, made inside a function: (importing module, imported module, function).
EXCEPTION = ("pipelines.pipeline_flextok", "conversion.original", "from_original")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def folder(module: str) -> str:
    return module.partition(".")[0]


def as_module(name: str) -> str | None:
    """Return the key in `MODULES` of a dotted name, or `None` if it is not a module of the package."""
    target = name.removeprefix("flextok_hf").removeprefix(".") if name.split(".")[0] == "flextok_hf" else None
    return next((key for key in (target, f"{target}.__init__".lstrip(".")) if key in MODULES), None)


def imports_of(module: str) -> set[str]:
    """Return the package modules that a module imports anywhere: at the top, in functions, for type checkers."""
    found = set()
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    package = ["flextok_hf", *module.split(".")[:-1]]
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            own = {alias.name for alias in node.names if as_module(f"{origin}.{alias.name}")}
            names = [f"{origin}.{name}" for name in own]
            names += [origin] * (len(own) < len(node.names))
        found |= set(filter(None, map(as_module, names)))
    return found - {module, "__init__"}


IMPORTS = {module: imports_of(module) for module in MODULES}


def regular_imports(module: str) -> set[str]:
    importing, imported, _ = EXCEPTION
    return IMPORTS[module] - {imported} if module == importing else IMPORTS[module]


def test_every_folder_has_import_rules():
    assert {folder(module) for module in MODULES} == MAY_IMPORT.keys()


@pytest.mark.parametrize("importing, imported", itertools.permutations(MAY_IMPORT, 2))
def test_a_folder_imports_only_what_it_may(importing, imported):
    found = [
        f"{module} imports {target}"
        for module in MODULES
        for target in regular_imports(module)
        if (folder(module), folder(target)) == (importing, imported)
    ]
    assert not found or imported in MAY_IMPORT[importing], found


def test_import_rules_have_no_cycle():
    TopologicalSorter(MAY_IMPORT).prepare()


def test_modules_have_no_import_cycle_even_in_functions():
    try:
        TopologicalSorter({module: regular_imports(module) for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(f"Import cycle: {' -> '.join(error.args[1])}")


def test_the_exception_is_made_in_one_function_only():
    importing, imported, function = EXCEPTION
    tree = ast.parse(MODULES[importing].read_text(encoding="utf-8"))
    functions = {
        outer.name
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef)
        for node in ast.walk(outer)
        if isinstance(node, ast.ImportFrom) and imported in (node.module or "")
    }
    assert functions == {function} and imported in IMPORTS[importing]


def run_python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_auto_classes_are_registered_when_the_package_is_imported():
    program = """
import flextok_hf
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
encoder = AutoConfig.for_model("flextok_encoder")
prior = AutoConfig.for_model("flextok_prior")
print(AutoModel._model_mapping[type(encoder)].__name__, AutoModelForCausalLM._model_mapping[type(prior)].__name__)
"""
    assert run_python(program) == "FlexTokEncoder FlexTokPriorForCausalLM"


def test_the_command_starts_without_importing_pytorch():
    program = """
import sys
import flextok_command
from flextok_hf.cli import build_parser
build_parser().format_help()
print([name for name in ("torch", "transformers", "diffusers", "PIL") if name in sys.modules])
"""
    assert run_python(program) == "[]"


@pytest.mark.parametrize("name", ["flextok.py", "bin/flextok"])
def test_auto_classes_are_registered_in_a_program_of_any_name(name):
    program = f"""
import sys
sys.argv = ["{name}"]
import flextok_hf
from transformers import AutoConfig
print(AutoConfig.for_model("flextok").model_type)
"""
    assert run_python(program) == "flextok"


def test_the_command_registers_auto_classes_when_it_uses_a_model():
    program = """
import flextok_command
from flextok_hf import FlexTokPriorForCausalLM
from transformers import AutoModelForCausalLM
print(FlexTokPriorForCausalLM in AutoModelForCausalLM._model_mapping.values())
"""
    assert run_python(program) == "True"


def test_the_installed_command_starts_from_the_module_that_skips_pytorch():
    (script,) = entry_points(group="console_scripts", name="flextok")
    assert script.module == "flextok_command" and callable(script.load())


def test_every_public_name_can_be_imported():
    import flextok_hf

    assert all(getattr(flextok_hf, name) is not None for name in flextok_hf.__all__)


def test_an_unknown_name_raises_an_attribute_error():
    import flextok_hf

    with pytest.raises(AttributeError, match="no attribute 'FlexTok'"):
        flextok_hf.FlexTok
