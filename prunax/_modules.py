"""Public modules that list what is public, and that say so when they are called like a function."""

import sys
from types import ModuleType
from typing import Any

__all__ = ["show_public_names"]


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
