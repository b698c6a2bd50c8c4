"""A griffe extension for the pages: the help of `option(default, help)` is the docstring of a config's field.

`zensical.toml` names this file. Each field is documented once, where `trl-vpo COMMAND --help` reads it, too.
"""

import ast
import re

import griffe

LINK = re.compile(r"\[(`[^`\]]+`)\](?![\[(])")  # TRL's form of a link to a class
LIST = re.compile(r"^(?!- |\s*$)(.+)\n(?=- )", re.M)  # Markdown wants an empty line in front of a list


class OptionHelp(griffe.Extension):
    """Give the fields of a config their help as docstring, and their default as value; mend the Markdown of others."""

    def on_instance(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = LIST.sub("\\1\n\n", LINK.sub(r"\1", obj.docstring.value))

    def on_attribute_instance(self, *, node, attr, **kwargs):
        call = getattr(node, "value", None)
        if not isinstance(call, ast.Call):
            return
        kind = getattr(call.func, "id", None)
        if kind == "option" and len(call.args) > 1:
            attr.value = griffe.get_expression(call.args[0], parent=attr.parent)
            _document(attr, call.args[1])
        elif kind == "field":
            for keyword in call.keywords:
                if keyword.arg == "metadata" and isinstance(keyword.value, ast.Dict):
                    for key, value in zip(keyword.value.keys, keyword.value.values):
                        if isinstance(key, ast.Constant) and key.value == "help":
                            _document(attr, value)


def _document(attr, text: ast.expr) -> None:
    """Set a docstring that is written as one string, or as several that Python joins."""
    if isinstance(text, ast.Constant) and isinstance(text.value, str):
        attr.docstring = griffe.Docstring(text.value, parent=attr)
