"""From a YAML file and `--set a.b=c` to a contract, or one error that lists every offender."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from adaptfleet.contracts.base import Spec
from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.names import near

S = TypeVar("S", bound=Spec)


class _StrictLoader(yaml.SafeLoader):
    """YAML without duplicate keys, and with `5e-4` a number as in YAML 1.2."""


def _unique_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise ContractError(f"line {key_node.start_mark.line + 1}: the key {key!r} stands twice; keep one.")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
_StrictLoader.yaml_implicit_resolvers = {first: list(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_contract(kind: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """The contract in a YAML file with `a.b=c` overrides laid over it. ContractError lists all that is wrong."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ContractError(f"cannot read the contract {file}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ContractError(f"the contract {file} is no UTF-8 text.") from None
    except ValueError as error:  # a path with a null byte
        raise ContractError(f"cannot read the contract {str(file)!r}: {error}.") from None
    return parse_contract(kind, text, overrides, origin=str(file))


def job_named(path: str | Path) -> str | None:
    """The `job` that a contract's file names. None: it names none, or is no contract, which `load_contract` tells better."""
    try:
        values = _yaml(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, ContractError):
        return None
    return values.get("job") if isinstance(values, dict) else None


def parse_contract(kind: type[S], text: str, overrides: Sequence[str] = (), origin: str = "contract") -> S:
    """The same from YAML text."""
    try:
        values = _yaml(text)
    except (yaml.YAMLError, ContractError) as error:
        raise ContractError(f"{origin} is no YAML: {error}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ContractError(f"{origin} holds a {type(values).__name__}, but a contract is a mapping of keys to values.")
    for override in overrides:
        _lay_over(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = offenders(kind, error)
        count = "1 thing is" if len(lines) == 1 else f"{len(lines)} things are"
        raise ContractError(f"{origin}: {count} wrong.\n" + "\n".join(f"  - {line}" for line in lines)) from None


def read_yaml(file: Path) -> Any:
    """What a YAML file holds, read as a contract is. ContractError: it cannot be read."""
    try:
        return _yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ContractError(f"cannot read {file}: {error.strerror}.") from None
    except (yaml.YAMLError, ContractError, UnicodeDecodeError) as error:
        raise ContractError(f"{file} is no YAML: {error}") from None


def offenders(kind: type[BaseModel], error: ValidationError) -> list[str]:
    """A line for each thing that is wrong, by the keys that the user wrote."""
    return [_offender(kind, e) for e in error.errors(include_url=False)]


def _yaml(text: str) -> Any:
    """The values, or YAMLError or ContractError. PyYAML lets Python's own errors through: `2001-99-99`, `[a]: b`, `!!int ''`."""
    try:
        return yaml.load(text, _StrictLoader)
    except RecursionError:
        raise ContractError("it is nested too deeply to be a contract.") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ContractError(f"a value in it cannot be read: {error}.") from None


def _lay_over(values: dict[str, Any], override: str) -> None:
    """Puts `a.b=c` in place; `c` is read as YAML, so `0.1`, `true`, `null` and `[q_proj, v_proj]` mean what they say."""
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ContractError(f"--set {override!r} is not of the form a.b=value.")
    try:
        value = _yaml(text)
    except (yaml.YAMLError, ContractError) as error:
        raise ContractError(f"--set {override!r}: the value is no YAML: {error}") from None
    place = values
    for key in keys[:-1]:
        inner = place.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ContractError(f"--set {override!r}: {key!r} holds {inner!r}, not keys.")
        place = inner
    place[keys[-1]] = value


def _offender(kind: type[BaseModel], error: Mapping[str, Any]) -> str:
    keys, spec = _place(kind, error["loc"][:-1]) if error["loc"] else ([], kind)
    last = str(error["loc"][-1]) if error["loc"] else ""
    path = ".".join(_place(kind, error["loc"])[0]) or "contract"
    if error["type"] == "extra_forbidden":
        known = sorted(spec.model_fields) if spec else []
        allowed = f" Allowed: {', '.join(known)}." if known else ""
        return f"{'.'.join([*keys, last])}: unknown key.{near(last, known)}{allowed}"
    if error["type"] == "missing":
        text = spec.model_fields[last].description if spec else None
        return f"{path}: missing." + (f" {text}" if text else "")
    if error["type"] == "union_tag_invalid":
        expected = str(error["ctx"]["expected_tags"]).replace("'", "")
        return f"{path}.kind: {error['ctx']['tag']!r} is not known.{near(error['ctx']['tag'], expected.split(', '))} Allowed: {expected}."
    message = error["msg"].removeprefix("Value error, ").rstrip(".")
    value = error["input"]
    shown = "" if isinstance(value, (dict, BaseModel)) else f" It is {value!r}."
    return f"{path}: {message}.{shown}"


def _place(kind: type[BaseModel], path: Sequence[str | int]) -> tuple[list[str], type[BaseModel] | None]:
    """The keys a user wrote on the way, and the spec class they lead to. Where several kinds are allowed, pydantic's path names the kind
    after the key, which the user did not write."""
    specs: list[type[BaseModel]] = [kind]
    keys: list[str] = []
    for part in path:
        if specs and isinstance(part, str) and not any(part in spec.model_fields for spec in specs):
            specs = [spec for spec in specs if "kind" in spec.model_fields and spec.model_fields["kind"].default == part] or specs
            continue
        keys.append(str(part))
        if isinstance(part, str):
            field = specs[0].model_fields.get(part) if specs else None
            specs = list(_specs_in(field.annotation)) if field else []
    return keys, specs[0] if specs else None


def _specs_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, Annotated, tuple):
        for inner in get_args(annotation):
            yield from _specs_in(inner)
