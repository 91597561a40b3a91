"""Find the component class that a `_target_` names, with errors that help to spell it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import is_dataclass
from types import ModuleType

from moesaic.config.errors import ConfigError, did_you_mean

__all__ = ["class_path", "known_components", "resolve_target"]


def class_path(cls: type) -> str:
    """Return the `_target_` that names `cls`."""
    return f"{cls.__module__}.{cls.__qualname__}"


def known_components(base: type) -> list[type]:
    """Return the dataclasses that could stand in a field annotated with `base`, as far as they are imported by now."""
    found = {class_path(base): base}
    children: list[type] = base.__subclasses__()
    for child in children:
        found |= {class_path(cls): cls for cls in known_components(child)}
    return [cls for _, cls in sorted(found.items()) if is_dataclass(cls) and not inspect.isabstract(cls)]


def resolve_target(target: object, base: type, path: str) -> type:
    """Return the dataclass that `target` ("package.module.Class") names; it is `base` or a subclass of it.

    `path` is the full config path of the `_target_` key, used in messages.

    Raises: ConfigError where the module or the class is missing, is no dataclass, is abstract, or does not fit `base`.
    """
    if not isinstance(target, str) or "." not in target:
        raise ConfigError(f"{path}={target!r} is no 'package.module.Class'{_siblings(str(target), base)}")
    module_name, _, class_name = target.rpartition(".")
    module = _import(module_name, path, target, base)
    cls = getattr(module, class_name, None)
    if not isinstance(cls, type):
        raise ConfigError(
            f"{path}={target!r}: {module_name} has no class {class_name!r}{_classes(module, class_name, base)}"
        )
    if not is_dataclass(cls) or not issubclass(cls, base):
        raise ConfigError(f"{path}={target!r} is no {base.__name__}, which is wanted here{_siblings(target, base)}")
    if inspect.isabstract(cls):
        raise ConfigError(f"{path}={target!r} is abstract: name one of its kinds{_siblings(target, base)}")
    return cls


def _import(module_name: str, path: str, target: str, base: type) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name != missing and not module_name.startswith(f"{missing}."):
            raise ConfigError(f"{path}={target!r}: importing {module_name} failed: {error}") from error
        raise ConfigError(f"{path}={target!r}: no module named {missing!r}{_modules(missing)}{_known(base)}") from error
    except ImportError as error:
        raise ConfigError(f"{path}={target!r}: importing {module_name} failed: {error}") from error


def _modules(missing: str) -> str:
    """Suggest the sibling module nearest to `missing`, whose parent package is importable."""
    parent = missing.rpartition(".")[0]
    if not parent:
        return ""
    package = importlib.import_module(parent)
    return did_you_mean(
        missing, (f"{parent}.{info.name}" for info in pkgutil.iter_modules(getattr(package, "__path__", [])))
    )


def _classes(module: ModuleType, class_name: str, base: type) -> str:
    fitting = [n for n, c in vars(module).items() if isinstance(c, type) and is_dataclass(c) and issubclass(c, base)]
    here = f" {base.__name__} classes there: {', '.join(sorted(fitting))}." if fitting else _known(base)
    return did_you_mean(class_name, fitting) + here


def _siblings(target: str, base: type) -> str:
    by_name = {cls.__name__: class_path(cls) for cls in known_components(base)}
    suggestion = did_you_mean(target.rpartition(".")[2], by_name)
    for name, full in by_name.items():
        suggestion = suggestion.replace(f"{name!r}?", f"{full!r}?")
    return suggestion + _known(base)


def _known(base: type) -> str:
    known = ", ".join(class_path(cls) for cls in known_components(base))
    return f" Known {base.__name__} classes: {known}." if known else ""
