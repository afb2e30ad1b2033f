"""Which folders may import which, without circles; and what importing the package does and does not do."""

import ast
import itertools
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from paths import ROOT


PACKAGE = ROOT / "src" / "flextok_hf"
# The folders in the order of the data, and what each may import. Modules beside the folders are public doors.
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
    "cli": {"embedded", "utils", "models", "pipelines", "conversion", "demo"},
    "auto_classes": {"models"},
    "__init__": {"embedded", "models", "pipelines"},
}
# The one import against this order, made when it is called: who, whom, in which function.
DOOR = ("pipelines.pipeline_flextok", "conversion.original", "from_original")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def folder(module: str) -> str:
    return module.partition(".")[0]


def as_module(name: str) -> str | None:
    """The key in `MODULES` of a dotted name, or None if it is no module of the package."""
    target = name.removeprefix("flextok_hf").removeprefix(".") if name.split(".")[0] == "flextok_hf" else None
    return next((key for key in (target, f"{target}.__init__".lstrip(".")) if key in MODULES), None)


def imports_of(module: str) -> set[str]:
    """Modules of the package that a module imports anywhere: at its top, in functions, for type checkers."""
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


def imports_but_the_door(module: str) -> set[str]:
    who, whom, _ = DOOR
    return IMPORTS[module] - {whom} if module == who else IMPORTS[module]


def test_every_folder_has_its_place_in_the_order():
    assert {folder(module) for module in MODULES} == MAY_IMPORT.keys()


@pytest.mark.parametrize("importing, imported", itertools.permutations(MAY_IMPORT, 2))
def test_a_folder_imports_only_what_it_may(importing, imported):
    found = [
        f"{module} imports {target}"
        for module in MODULES
        for target in imports_but_the_door(module)
        if (folder(module), folder(target)) == (importing, imported)
    ]
    assert not found or imported in MAY_IMPORT[importing], found


def test_what_folders_may_import_has_no_circle():
    TopologicalSorter(MAY_IMPORT).prepare()


def test_no_modules_import_each_other_in_a_circle_not_even_in_functions():
    try:
        TopologicalSorter({module: imports_but_the_door(module) for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(f"These import each other: {' -> '.join(error.args[1])}")


def test_the_door_is_open_in_one_function_only():
    who, whom, function = DOOR
    tree = ast.parse(MODULES[who].read_text(encoding="utf-8"))
    holders = {
        outer.name
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef)
        for node in ast.walk(outer)
        if isinstance(node, ast.ImportFrom) and whom in (node.module or "")
    }
    assert holders == {function} and whom in IMPORTS[who]


def run_python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_auto_classes_know_the_models_once_the_package_is_imported():
    program = """
import flextok_hf
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
encoder = AutoConfig.for_model("flextok_encoder")
prior = AutoConfig.for_model("flextok_prior")
print(AutoModel._model_mapping[type(encoder)].__name__, AutoModelForCausalLM._model_mapping[type(prior)].__name__)
"""
    assert run_python(program) == "FlexTokEncoder FlexTokPriorForCausalLM"


def test_the_command_starts_without_loading_pytorch():
    program = """
import sys
sys.argv = ["bin/flextok", "--help"]
from flextok_hf import cli
cli.build_parser().format_help()
print([name for name in ("torch", "transformers", "diffusers", "PIL") if name in sys.modules])
"""
    assert run_python(program) == "[]"


def test_auto_classes_know_the_models_in_a_program_called_flextok_once_it_uses_one():
    program = """
import sys
sys.argv = ["flextok.py"]
from flextok_hf import FlexTokPriorForCausalLM
from transformers import AutoModelForCausalLM
print(FlexTokPriorForCausalLM in AutoModelForCausalLM._model_mapping.values())
"""
    assert run_python(program) == "True"


def test_every_public_name_can_be_imported():
    import flextok_hf

    assert all(getattr(flextok_hf, name) is not None for name in flextok_hf.__all__)


def test_an_unknown_name_is_an_attribute_error():
    import flextok_hf

    with pytest.raises(AttributeError, match="no attribute 'FlexTok'"):
        flextok_hf.FlexTok
