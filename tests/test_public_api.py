"""What users can reach has a name in `__all__`, exists, and is documented."""

import importlib
import importlib.metadata
import inspect
import pkgutil
import sys
import types
import typing

import pytest

import prunax

MODULES = ["prunax"] + [
    module.name
    for module in pkgutil.walk_packages(prunax.__path__, "prunax.")
    if not any(part.startswith("_") for part in module.name.split("."))
]


def exported() -> dict[str, object]:
    """Dotted name -> object, for every name in a public module's `__all__`."""
    found = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for entry in module.__all__:
            found[f"{name}.{entry}"] = getattr(module, entry, None)
    return found


EXPORTED = exported()
FUNCTIONS = {name: item for name, item in EXPORTED.items() if inspect.isfunction(item)}


def own_docstring(item) -> str:
    """The docstring; not the one a dataclass or a NamedTuple is given when it has none."""
    text = inspect.getdoc(item) or ""
    generated = inspect.isclass(item) and text.startswith(f"{item.__name__}(")
    return "" if generated else text


def test_root_names():
    assert {"compute_masks", "apply_masks", "straight_through", "prune", "summarize"} <= set(
        prunax.__all__
    )


def test_dir_shows_what_is_public():
    modules = [prunax, *(getattr(prunax, name) for name in prunax.__all__)]
    for module in filter(inspect.ismodule, modules):
        assert dir(module) == sorted(module.__all__), module


def test_every_public_name_has_one_address():
    addresses: dict[int, list[str]] = {}
    for name, item in EXPORTED.items():
        if isinstance(item, types.ModuleType | type | types.FunctionType):
            addresses.setdefault(id(item), []).append(name)
    assert not [names for names in addresses.values() if len(names) > 1]
    assert len(addresses) > 100


def test_every_public_name_has_one_meaning():
    """A name at two addresses is one idea, on masks or scores, or as it is found and as it is searched."""
    addresses: dict[str, list[str]] = {}
    for name in EXPORTED:
        addresses.setdefault(name.rpartition(".")[2], []).append(name)
    assert {name: at for name, at in addresses.items() if len(at) > 1} == {
        "straight_through": ["prunax.straight_through", "prunax.learned.straight_through"],
        "branches": ["prunax.search.branches", "prunax.structured.branches"],
    }


def test_no_function_has_the_name_of_a_module():
    assert not FUNCTIONS.keys() & sys.modules.keys()


def test_version_is_the_installed_one():
    assert prunax.__version__ == importlib.metadata.version("prunax")


@pytest.mark.parametrize("name", MODULES)
def test_module_is_documented(name):
    assert importlib.import_module(name).__doc__


@pytest.mark.parametrize("name", EXPORTED)
def test_name_exists_and_is_documented(name):
    item = EXPORTED[name]
    assert item is not None, f"{name} is in __all__ and not in the module"
    alias = typing.get_origin(item) is not None  # of a type; the reference shows the text below it
    if (inspect.ismodule(item) or callable(item)) and not alias:
        assert own_docstring(item), f"{name} has no docstring"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_docstring_sections(name):
    signature = inspect.signature(FUNCTIONS[name])
    wanted = ["Examples:"]
    if signature.parameters:
        wanted.append("Args:")
    if signature.return_annotation not in (None, "None"):
        wanted.append("Returns:")
    text = own_docstring(FUNCTIONS[name])
    missing = [section for section in wanted if f"{section}\n" not in text]
    assert not missing, f"{name} lacks {missing}"
