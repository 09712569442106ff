"""Public modules: they list what is public, say so when called like a function, and import names when asked."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:  # not imported by every command
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

__all__ = ["lazy", "show_public_names"]


class PublicModule(ModuleType):
    """A module whose `dir` is its `__all__`."""

    def __dir__(self) -> list[str]:
        return sorted(self.__all__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        functions = ", ".join(n for n in self.__all__ if callable(getattr(self, n, None)))
        raise TypeError(
            f"{self.__name__} is a module and cannot be called. Call what is in it: {functions}."
        )


def show_public_names(package: str) -> None:
    """Let `dir` of every public module of a package show its `__all__`, and calling one say what there is to call.

    Args:
        package: Name of the package. Its modules that are imported so far are changed, save those whose name has a part
            with an underscore.

    Examples:
        >>> import prunax
        >>> dir(prunax.lottery)
        ['Ticket', 'iterative_magnitude_pruning']
    """
    for name, module in list(sys.modules.items()):
        parts = name.split(".")
        public = parts[0] == package and not any(part.startswith("_") for part in parts)
        if public and hasattr(module, "__all__"):
            module.__class__ = PublicModule


def lazy(package: str, public: Sequence[str], modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Make the `__getattr__` of a package: the command line looks into a file without importing JAX.

    Args:
        package: Its name.
        public: Its `__all__`.
        modules: Module within it -> the names that are taken from there, with spaces between. Other names are those of
            modules.

    Returns:
        A function from name to what it names.

    Examples:
        >>> from prunax import _modules
        >>> _modules.lazy("json", ["JSONDecoder"], {"decoder": "JSONDecoder"})("JSONDecoder").__name__
        'JSONDecoder'
    """
    origins = {name: module for module, names in modules.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in public:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"{package}.{origins.get(name, name)}")
        show_public_names(package.partition(".")[0])
        found = getattr(module, name) if name in origins else module
        setattr(sys.modules[package], name, found)
        return found

    return get
