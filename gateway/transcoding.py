"""HTTP requests to messages by `google.api.http`: routes compiled from the descriptors, strict in what they take."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Final
from urllib.parse import unquote_to_bytes

import orjson
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from chassis.errors import FailedPrecondition, Invalid, NotFound, Unimplemented
from chassis.ids import new_id
from gateway.codec import Codec, Fill, Mismatch, camel, invalid, is_map, message_class
from gateway.contract import IDEMPOTENT, Rpc

_VERBS: Final = ("get", "post", "put", "patch", "delete")
_PARAMETER = re.compile(r"\{([a-z0-9_.]+)(?:=\*)?\}")
_QUERY_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,119}")
_KEY = re.compile(r"[\x21-\x7e]{1,100}")
_ETAG = re.compile(r'(?:W/)?("[\x21\x23-\x7e]{1,98}"|[\x21\x23-\x2b\x2d-\x7e]{1,98})')
_MOST_PARAMETERS: Final = 400
_DEEPEST: Final = 3
_WELL_KNOWN: Final = frozenset(("google.protobuf.Timestamp", "google.protobuf.Duration", "google.protobuf.FieldMask"))


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """What a request says, besides its method and path."""

    query: bytes
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes


@dataclass(frozen=True, slots=True)
class Leaf:
    """One field that a path or a query may set."""

    path: str
    """In JSON's spelling, for errors and for counting spellings as one."""
    field: FieldDescriptor
    steps: tuple[str, ...]
    fill: Fill

    def put(self, message: Any, value: Any) -> None:
        for step in self.steps:
            message = getattr(message, step)
        try:
            self.fill(message, value)
        except Mismatch as mismatch:
            # The whole path stands here already; only an index may be added.
            raise invalid(self.path + mismatch.path, mismatch.sentence, mismatch.reason) from None


@dataclass(frozen=True, slots=True)
class Route:
    """One HTTP binding of one RPC."""

    rpc: Rpc
    method: str
    template: str
    """With the fields' JSON names, such as `/v1/appointments/{id}:cancel`."""
    positions: tuple[tuple[int, Leaf], ...]
    """Which segment of the path sets which field."""
    query: Mapping[str, Leaf | str]
    """By every spelling; a text is the reason why the field may not stand in the query."""
    body: str
    """"" for none, "*" for the whole request, else the field's name."""
    request: type[Message]
    response: type[Message]
    encode: Callable[[Any], Any]
    decode_body: Fill
    bound_in_body: tuple[tuple[FieldDescriptor, ...], ...]
    """Chains of fields, from the body's root, that the path has set already."""
    fields: frozenset[str]
    """Names of the request's fields."""
    response_has_etag: bool

    @property
    def streams(self) -> bool:
        """Whether it is a live view, answered by server-sent events."""
        return bool(self.rpc.method.server_streaming)

    @property
    def body_name(self) -> str:
        """JSON name of the field that is the body."""
        return self.request.DESCRIPTOR.fields_by_name[self.body].json_name

    def bind(self, values: Iterable[str], request: HttpRequest) -> Message:
        """The RPC's request. Raises Invalid (FIELD_…, BODY_…), FailedPrecondition `ETAG_REQUIRED`."""
        message = self.request()
        parsed = self._body(message, request)
        if request.query:
            self._query(message, request.query)
        for (_, leaf), value in zip(self.positions, values, strict=True):
            leaf.put(message, value)
        self._headers(message, request.headers, parsed)
        return message

    def _body(self, message: Any, request: HttpRequest) -> dict[str, Any] | None:
        """Fills the body in; answers it, parsed, where there is one."""
        if not self.body:
            return None
        if not request.body:
            if self.body != "*":
                raise Invalid("BODY_REQUIRED", "A JSON object is expected as the body.")
            return {}
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise Invalid("CONTENT_TYPE_UNSUPPORTED", "The body's content type must be application/json.")
        try:
            parsed = orjson.loads(request.body)
        except orjson.JSONDecodeError:
            raise Invalid("BODY_INVALID", "The body is not JSON.") from None
        if type(parsed) is not dict:
            raise Invalid("BODY_INVALID", "The body must be a JSON object.")
        for chain in self.bound_in_body:
            _refuse_bound(parsed, chain, "" if self.body == "*" else self.body_name)
        target = message
        if self.body != "*":
            target = getattr(message, self.body)
            target.SetInParent()
        try:
            self.decode_body(target, parsed)
        except Mismatch as mismatch:
            if self.body != "*":
                mismatch.inside(self.body_name)
            raise mismatch.problem() from None
        return parsed

    def _query(self, message: Any, query: bytes) -> None:
        given: dict[str, tuple[str, Leaf, list[str]]] = {}
        for name, value in _parameters(query):
            leaf = self.query.get(name)
            if leaf is None:
                shown = name if _QUERY_NAME.fullmatch(name) else "?"
                raise invalid(shown, "There is no such parameter.", "FIELD_UNKNOWN")
            if isinstance(leaf, str):
                raise invalid(name, "The field is set elsewhere in the request.", leaf)
            spelling, _, values = given.setdefault(leaf.path, (name, leaf, []))
            if spelling != name:
                raise invalid(leaf.path, "The field is given twice, in two spellings.")
            if values and not leaf.field.is_repeated:
                raise invalid(leaf.path, "The field takes one value.")
            values.append(value)
        for _, leaf, values in given.values():
            converted = [_from_text(leaf.field, value) for value in values]
            leaf.put(message, converted if leaf.field.is_repeated else converted[0])

    def _headers(self, message: Any, headers: Mapping[str, str], body: dict[str, Any] | None) -> None:
        if "request_id" in self.fields and self.rpc.idempotency == IDEMPOTENT:
            key = headers.get("idempotency-key")
            if key is not None:
                if not _KEY.fullmatch(key):
                    raise invalid("Idempotency-Key", "1 to 100 printable characters without spaces are expected.")
                if message.request_id:
                    raise invalid(
                        "requestId", "The field is set by the header Idempotency-Key.", "FIELD_BOUND_BY_HEADER"
                    )
                message.request_id = key
            elif not message.request_id:
                message.request_id = new_id()
        match = headers.get("if-match")
        if match is not None:
            found = _ETAG.fullmatch(match.strip())
            if found is None or found[1] == "*":
                raise invalid("If-Match", "One etag is expected, as it was read.")
            if "etag" not in self.fields:
                if self.method in ("GET", "HEAD"):
                    return
                raise invalid("If-Match", "This operation takes no etag.")
            if message.etag:
                raise invalid("etag", "The field is set by the header If-Match.", "FIELD_BOUND_BY_HEADER")
            message.etag = found[1] if found[1].startswith('"') else f'"{found[1]}"'
        if self.method == "PATCH":
            if "etag" in self.fields and not message.etag:
                raise FailedPrecondition("ETAG_REQUIRED", "Send the etag that was read in the header If-Match.")
            if "update_mask" in self.fields and not message.update_mask.paths:
                self._mask(message, body or {})

    def _mask(self, message: Any, body: dict[str, Any]) -> None:
        """Names what the body names: null clears, lists are replaced whole."""
        kind = self.request.DESCRIPTOR.fields_by_name[self.body].message_type
        assert kind is not None
        names = {spelling: field.name for field in kind.fields for spelling in (field.json_name, field.name)}
        if not body:
            raise Invalid("BODY_REQUIRED", "The body names no field to change.")
        message.update_mask.paths.extend(names[key] for key in body)


def _refuse_bound(value: Any, chain: tuple[FieldDescriptor, ...], path: str) -> None:
    if type(value) is not dict:
        return
    first, *rest = chain
    for spelling in (first.json_name, first.name):
        if spelling in value:
            name = f"{path}.{first.json_name}" if path else first.json_name
            if not rest:
                raise invalid(name, "The field is set by the path.", "FIELD_BOUND_BY_PATH")
            _refuse_bound(value[spelling], tuple(rest), name)


def _parameters(query: bytes) -> list[tuple[str, str]]:
    pieces = query.split(b"&")
    if len(pieces) > _MOST_PARAMETERS:
        raise Invalid("TOO_MANY_PARAMETERS", f"At most {_MOST_PARAMETERS} parameters are taken.")
    found = []
    for piece in pieces:
        if not piece:
            continue
        name, _, value = piece.partition(b"=")
        try:
            found.append((_text(name.replace(b"+", b" ")), _text(value.replace(b"+", b" "))))
        except UnicodeDecodeError:
            raise Invalid("QUERY_INVALID", "The query is not UTF-8.") from None
    return found


def _text(quoted: bytes) -> str:
    return (unquote_to_bytes(quoted) if b"%" in quoted else quoted).decode("utf-8")


def _from_text(field: FieldDescriptor, text: str) -> Any:
    """What JSON would have for a parameter's text."""
    if field.type == FieldDescriptor.TYPE_BOOL:
        return {"true": True, "false": False}.get(text, text)
    return text


# -- compiling --------------------------------------------------------------------------------------------------------


def singular(name: str) -> str:
    """`patient_ids` to `patient_id`, `statuses` to `status`: how one value of a repeated filter may be written."""
    if name.endswith("statuses"):
        return name[:-2]
    if name.endswith("ies"):
        return name[:-3] + "y"
    return name[:-1] if name.endswith("s") else name


def _chain(kind: Descriptor, dotted: str) -> tuple[FieldDescriptor, ...]:
    fields: list[FieldDescriptor] = []
    current: Descriptor | None = kind
    for name in dotted.split("."):
        if current is None or name not in current.fields_by_name:
            raise ValueError(f"{kind.full_name} has no field {dotted}")
        fields.append(current.fields_by_name[name])
        current = fields[-1].message_type
    return tuple(fields)


def _leaf(codec: Codec, chain: tuple[FieldDescriptor, ...]) -> Leaf:
    path = ".".join(field.json_name for field in chain)
    return Leaf(path, chain[-1], tuple(field.name for field in chain[:-1]), codec.filler(chain[-1]))


def _spellings(chain: tuple[FieldDescriptor, ...]) -> Iterable[str]:
    return (".".join(names) for names in product(*({field.json_name, field.name} for field in chain)))


def _queryable(kind: Descriptor, before: tuple[FieldDescriptor, ...] = ()) -> Iterable[tuple[FieldDescriptor, ...]]:
    for one in kind.fields:
        chain = (*before, one)
        if is_map(one):
            continue
        if one.message_type is None or one.message_type.full_name in _WELL_KNOWN:
            if one.message_type is None or not one.is_repeated:
                yield chain
        elif not one.is_repeated and len(chain) < _DEEPEST:
            yield from _queryable(one.message_type, chain)


def _query_fields(
    codec: Codec, kind: Descriptor, body: str, bound: set[tuple[FieldDescriptor, ...]]
) -> dict[str, Leaf | str]:
    known: dict[str, Leaf | str] = {}
    for chain in _queryable(kind):
        leaf: Leaf | str
        if chain in bound:
            leaf = "FIELD_BOUND_BY_PATH"
        elif body == "*" or body == chain[0].name:
            leaf = "FIELD_BOUND_BY_BODY"
        else:
            leaf = _leaf(codec, chain)
        for spelling in _spellings(chain):
            known[spelling] = leaf
    for one in kind.fields:
        alias = singular(one.name)
        if one.is_repeated and one.message_type is None and alias != one.name and alias not in known:
            known[alias] = known[camel(alias)] = known[one.name]
    return known


def _routes_of(codec: Codec, rpc: Rpc) -> Iterable[Route]:
    kind = rpc.method.input_type
    for rule in (rpc.http, *rpc.http.additional_bindings):
        verb = rule.WhichOneof("pattern")
        if verb is None:
            continue
        if verb not in _VERBS:
            raise ValueError(f"{rpc.name}: custom HTTP methods are not built")
        written = getattr(rule, verb)
        positions: list[tuple[int, Leaf]] = []
        chains = []
        template = written
        for index, segment in enumerate(written.split("/")[1:]):
            if "{" not in segment:
                continue
            found = _PARAMETER.match(segment)
            if found is None:
                raise ValueError(f"{rpc.name}: the template {written} is not built")
            chain = _chain(kind, found[1])
            chains.append(chain)
            positions.append((index, _leaf(codec, chain)))
            template = template.replace(found[0], f"{{{chain[-1].json_name}}}")
        body = rule.body
        if body not in ("", "*") and kind.fields_by_name[body].message_type is None:
            raise ValueError(f"{rpc.name}: the body must be a message")
        body_kind = kind if body in ("", "*") else kind.fields_by_name[body].message_type
        assert body_kind is not None
        in_body = [chain for chain in chains if body == "*"] + [
            chain[1:] for chain in chains if body == chain[0].name and len(chain) > 1
        ]
        yield Route(
            rpc=rpc,
            method=verb.upper(),
            template=template,
            positions=tuple(positions),
            query=_query_fields(codec, kind, body, set(chains)),
            body=body,
            request=message_class(kind),
            response=message_class(rpc.method.output_type),
            encode=codec.encoder(rpc.method.output_type),
            decode_body=codec.decoder(body_kind),
            bound_in_body=tuple(in_body),
            fields=frozenset(kind.fields_by_name),
            response_has_etag="etag" in rpc.method.output_type.fields_by_name,
        )


# -- matching ---------------------------------------------------------------------------------------------------------

_Shape = tuple[str | None, ...]


class Routes:
    """Finds the route of a path: one dict look-up, plus one per place where templates of that length have parameters."""

    def __init__(self, codec: Codec, rpcs: Iterable[Rpc]) -> None:
        self.all: list[Route] = []
        self._static: dict[str, dict[str, Route]] = {}
        self._shapes: dict[int, list[frozenset[int]]] = {}
        self._dynamic: dict[tuple[_Shape, str], dict[str, Route]] = {}
        for rpc in rpcs:
            if not rpc.rule.internal:
                for route in _routes_of(codec, rpc):
                    self._add(route)

    def _add(self, route: Route) -> None:
        self.all.append(route)
        if not route.positions:
            methods = self._static.setdefault(route.template, {})
        else:
            *segments, last = route.template.split("/")[1:]
            last, verb = _verb(last)
            places = frozenset(index for index, _ in route.positions)
            shape = tuple(None if i in places else segment for i, segment in enumerate([*segments, last]))
            shapes = self._shapes.setdefault(len(shape), [])
            if places not in shapes:
                shapes.append(places)
            methods = self._dynamic.setdefault((shape, verb), {})
        if route.method in methods:
            raise ValueError(f"{route.method} {route.template} is claimed twice")
        methods[route.method] = route

    def match(self, method: str, raw_path: bytes) -> tuple[Route, list[str]]:
        """The route and the values of its path's fields. Raises NotFound `PATH_UNKNOWN`, `METHOD_NOT_ALLOWED`.

        `raw_path` is still percent-encoded: a %2F is part of a segment, a %3A is the colon of a custom method.
        """
        methods, values = self._find(raw_path)
        if methods is None:
            raise NotFound("PATH_UNKNOWN", "There is no such path.")
        route = methods.get("GET" if method == "HEAD" else method)
        if route is None:
            raise MethodNotAllowed([*methods, *(["HEAD"] if "GET" in methods else [])])
        return route, values

    def _find(self, raw_path: bytes) -> tuple[dict[str, Route] | None, list[str]]:
        try:
            segments = [_text(segment) for segment in raw_path.split(b"/")[1:]]
        except UnicodeDecodeError:
            return None, []
        found = self._static.get("/" + "/".join(segments)) if not any("/" in one for one in segments) else None
        if found is not None or not segments:
            return found, []
        segments[-1], verb = _verb(segments[-1])
        for places in self._shapes.get(len(segments), ()):
            shape = tuple(None if i in places else segment for i, segment in enumerate(segments))
            methods = self._dynamic.get((shape, verb))
            if methods is not None:
                values = [segments[i] for i in sorted(places)]
                return (methods, values) if all(values) else (None, [])
        return None, []


class MethodNotAllowed(Unimplemented):
    """The path exists, not with this method."""

    def __init__(self, allowed: list[str]) -> None:
        self.allowed = sorted(allowed)
        super().__init__(
            "METHOD_NOT_ALLOWED", f"The path takes {', '.join(self.allowed)}.", allowed=", ".join(self.allowed)
        )


def _verb(segment: str) -> tuple[str, str]:
    head, colon, verb = segment.rpartition(":")
    return (head, verb) if colon else (segment, "")
