"""The packages that a run computes with: a resumed run warns of other versions."""

import importlib.metadata

_VERSIONED = ("jax", "jaxlib", "flax", "optax", "grain", "numpy", "tokenizers")
"""Packages that affect the computed numbers or the order of examples."""


def installed() -> dict[str, str]:
    """Returns the installed version of each package."""
    return {name: importlib.metadata.version(name) for name in _VERSIONED}


def changed(saved: dict[str, str]) -> str:
    """Returns the packages with another version than the saved one, in words."""
    others = {name: now for name, now in installed().items() if saved.get(name, now) != now}
    return ", ".join(f"{name} {saved[name]}, now {now}" for name, now in others.items())
