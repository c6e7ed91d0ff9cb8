#!/usr/bin/env bash
# Package: pydantic 2.14.3.
# Expected: FailFast() stops a list's validation at its first error wherever the list stands. It does for a field that is a
#   list, and pydantic's own Field(fail_fast=True) does the same.
# What happens: in a union (`list | str`, or typing.Union) the class with such a field cannot be made: FailFast is a
#   dataclass that compares by value, so it has no hash, and a union hashes what it holds. Field(fail_fast=True) works there.
set -euo pipefail
changed() {
    echo "Changed: FailFast() can stand in a union, or Field(fail_fast=True) no longer can."
    exit 1
}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check pydantic==2.14.3 ||
    { echo "The packages could not be installed."; exit 2; }
"$folder/venv/bin/python" - <<'PYTHON' || changed
import sys
from typing import Annotated, Union

from pydantic import FailFast, Field, TypeAdapter, ValidationError


def errors(annotation) -> int:
    try:
        TypeAdapter(annotation).validate_python(["a", "b", "c"])
    except ValidationError as error:
        return error.error_count()
    return 0


print("a list, plain and with FailFast():", errors(list[int]), errors(Annotated[list[int], FailFast()]), "errors")
seen = ""
try:
    Union[Annotated[list[int], FailFast()], int]
except TypeError as error:
    seen = str(error)
print("in a union:", seen or "no error")
inside = errors(Union[Annotated[list[int], Field(fail_fast=True)], int])
print("in a union, with Field(fail_fast=True):", inside, "errors (one of the list, one of int)")
sys.exit(not (seen == "unhashable type: 'FailFast'" and inside == 2 and errors(Annotated[list[int], FailFast()]) == 1))
PYTHON
