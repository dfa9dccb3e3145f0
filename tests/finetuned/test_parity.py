"""`Client` and `AsyncClient` are one interface."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from finetuned import AsyncClient, Client

METHODS = sorted(name for name in dir(Client) if not name.startswith("_"))


def parameters(function: Any) -> list[tuple[str, Any, Any, Any]]:
    return [(p.name, p.kind, p.default, p.annotation) for p in signature(function).values()]


def signature(function: Any) -> Any:
    return inspect.signature(function).parameters


def test_both_have_the_same_methods() -> None:
    assert sorted(name for name in dir(AsyncClient) if not name.startswith("_")) == METHODS


@pytest.mark.parametrize("name", [*METHODS, "__init__"])
def test_a_method_takes_the_same_arguments_in_both(name: str) -> None:
    assert parameters(getattr(Client, name)) == parameters(getattr(AsyncClient, name))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_the_async_client_is_awaited_or_iterated(name: str) -> None:
    method = getattr(AsyncClient, name)
    assert inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method)
    assert inspect.isasyncgenfunction(method) == inspect.isgeneratorfunction(getattr(Client, name))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_docstring(name: str) -> None:
    assert getattr(Client, name).__doc__
    assert getattr(AsyncClient, name).__doc__


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_described_in_full_in_both(name: str) -> None:
    assert getattr(AsyncClient, name).__doc__ == getattr(Client, name).__doc__
