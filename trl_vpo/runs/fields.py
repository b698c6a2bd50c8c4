"""The fields of argument classes and the types that they take. Imports nothing heavy."""

from collections.abc import Iterable
from dataclasses import Field, fields
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def annotated_fields(types: Iterable[type]) -> dict[str, tuple[Field, Any]]:
    """Return name -> (field, annotation) of argument classes. Of equal names, the first, as in argparse."""
    result: dict[str, tuple[Field, Any]] = {}
    for kind in types:
        hints = get_type_hints(kind)
        for field in fields(kind):
            if field.init:
                result.setdefault(field.name, (field, hints[field.name]))
    return result


def union_members(annotation: Any) -> list[Any]:
    """Return the types of a union, of unions within it, too; of any other annotation, itself."""
    if get_origin(annotation) in (Union, UnionType):
        return [member for part in get_args(annotation) for member in union_members(part)]
    return [annotation]
