"""Generates Python, the descriptor set and the third-party .proto texts under gen/ from protos/."""

from __future__ import annotations

import fcntl
import filecmp
import hashlib
import importlib.util
import re
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import Message
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
GEN = ROOT / "gen"
THIRD_PARTY = ("google/api/annotations.proto", "google/api/http.proto", "google/api/field_behavior.proto")

F = descriptor_pb2.FieldDescriptorProto
SCALARS = {number: name[5:].lower() for name, number in F.Type.items()}


class ProtoText:
    """Prints one proto2 or proto3 file descriptor as the .proto text that protoc and buf read.

    The wheel of protovalidate carries only the descriptor; buf wants text. Comments are lost.
    """

    def __init__(self, file: descriptor_pb2.FileDescriptorProto, dependencies: list[bytes]) -> None:
        # Options that the file itself declares (buf.validate.predefined) are readable only through a pool that knows them.
        pool = descriptor_pool.DescriptorPool()
        for dependency in dependencies:
            pool.AddSerializedFile(dependency)
        pool.AddSerializedFile(file.SerializeToString())
        self.pool = pool
        self.file = file
        self.lines: list[str] = []

    def __str__(self) -> str:
        file = self.file
        if file.syntax not in ("", "proto2", "proto3"):
            raise SystemExit(f"{file.name}: syntax {file.syntax} cannot be printed as text yet")
        self.lines = [f'syntax = "{file.syntax or "proto2"}";', f"package {file.package};"]
        public = set(file.public_dependency)
        for i, name in enumerate(file.dependency):
            self.lines.append(f'import {"public " if i in public else ""}"{name}";')
        for option in self._options(file.options, "FileOptions"):
            self.lines.append(f"option {option};")
        for enum in file.enum_type:
            self._enum(enum, "")
        for message in file.message_type:
            self._message(message, "")
        self._extensions(file.extension, "")
        return "\n".join(self.lines) + "\n"

    def _options(self, options: Message, name: str) -> list[str]:
        kind = message_factory.GetMessageClass(self.pool.FindMessageTypeByName(f"google.protobuf.{name}"))
        known = kind.FromString(options.SerializeToString())
        printed = []
        for field, value in known.ListFields():
            if field.name == "map_entry":
                continue
            left = f"({field.full_name})" if field.is_extension else field.name
            values = value if field.is_repeated else [value]
            for one in values:
                if field.message_type:
                    right = "{ " + text_format.MessageToString(one, as_one_line=True, descriptor_pool=self.pool) + " }"
                elif field.enum_type:
                    right = field.enum_type.values_by_number[one].name
                elif isinstance(one, bool):
                    right = str(one).lower()
                elif isinstance(one, str):
                    right = '"' + one.replace("\\", "\\\\").replace('"', '\\"') + '"'
                else:
                    right = repr(one)
                printed.append(f"{left} = {right}")
        return printed

    def _enum(self, enum: descriptor_pb2.EnumDescriptorProto, pad: str) -> None:
        self.lines.append(f"{pad}enum {enum.name} {{")
        for option in self._options(enum.options, "EnumOptions"):
            self.lines.append(f"{pad}  option {option};")
        for value in enum.value:
            options = self._options(value.options, "EnumValueOptions")
            self.lines.append(f"{pad}  {value.name} = {value.number}{self._in_brackets(options)};")
        self._reserved(enum, pad, inclusive=True)
        self.lines.append(f"{pad}}}")

    def _message(self, message: descriptor_pb2.DescriptorProto, pad: str) -> None:
        self.lines.append(f"{pad}message {message.name} {{")
        inner = pad + "  "
        for option in self._options(message.options, "MessageOptions"):
            self.lines.append(f"{inner}option {option};")
        entries = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
        for enum in message.enum_type:
            self._enum(enum, inner)
        for nested in message.nested_type:
            if nested.name not in entries:
                self._message(nested, inner)
        open_oneof = -1
        for field in message.field:
            oneof = field.oneof_index if field.HasField("oneof_index") and not field.proto3_optional else -1
            if oneof != open_oneof:
                if open_oneof >= 0:
                    self.lines.append(f"{inner}}}")
                if oneof >= 0:
                    declared = message.oneof_decl[oneof]
                    self.lines.append(f"{inner}oneof {declared.name} {{")
                    for option in self._options(declared.options, "OneofOptions"):
                        self.lines.append(f"{inner}  option {option};")
                open_oneof = oneof
            self._field(field, inner + ("  " if oneof >= 0 else ""), entries, labelled=oneof < 0)
        if open_oneof >= 0:
            self.lines.append(f"{inner}}}")
        for span in message.extension_range:
            end = "max" if span.end > 536870911 else str(span.end - 1)
            self.lines.append(f"{inner}extensions {span.start}{'' if end == str(span.start) else f' to {end}'};")
        self._reserved(message, pad, inclusive=False)
        self._extensions(message.extension, inner)
        self.lines.append(f"{pad}}}")

    def _field(
        self, field: F, pad: str, entries: dict[str, descriptor_pb2.DescriptorProto], labelled: bool = True
    ) -> None:
        label = ""
        if field.label == F.LABEL_REPEATED:
            label = "repeated "
        elif field.label == F.LABEL_REQUIRED:
            label = "required "
        elif labelled and (self.file.syntax != "proto3" or field.proto3_optional):
            label = "optional "
        kind = field.type_name or SCALARS[field.type]
        entry = entries.get(field.type_name.rsplit(".", 1)[-1])
        if entry is not None and field.label == F.LABEL_REPEATED:
            key, value = entry.field
            label, kind = "", f"map<{SCALARS[key.type]}, {value.type_name or SCALARS[value.type]}>"
        options = self._options(field.options, "FieldOptions")
        if field.HasField("default_value"):
            quoted = field.type in (F.TYPE_STRING, F.TYPE_BYTES)
            options.insert(0, "default = " + (f'"{field.default_value}"' if quoted else field.default_value))
        self.lines.append(f"{pad}{label}{kind} {field.name} = {field.number}{self._in_brackets(options)};")

    def _extensions(self, extensions: object, pad: str) -> None:
        for field in extensions:  # type: ignore[attr-defined]
            self.lines.append(f"{pad}extend {field.extendee} {{")
            self._field(field, pad + "  ", {})
            self.lines.append(f"{pad}}}")

    def _reserved(
        self, of: descriptor_pb2.DescriptorProto | descriptor_pb2.EnumDescriptorProto, pad: str, inclusive: bool
    ) -> None:
        for span in of.reserved_range:
            end = span.end if inclusive else span.end - 1
            self.lines.append(f"{pad}  reserved {span.start}{'' if end == span.start else f' to {end}'};")
        for name in of.reserved_name:
            self.lines.append(f'{pad}  reserved "{name}";')

    @staticmethod
    def _in_brackets(options: list[str]) -> str:
        return f" [{', '.join(options)}]" if options else ""


def validate_proto() -> str:
    """The text of buf/validate/validate.proto, from the descriptor in protovalidate's wheel."""
    from protovalidate._gen.buf.validate import validate_pb

    described = validate_pb.desc()
    file = descriptor_pb2.FileDescriptorProto.FromString(described.proto.to_binary())
    dependencies = [dependency.proto.to_binary() for dependency in described.dependencies]
    return str(ProtoText(file, dependencies))


def write_third_party(out: Path) -> None:
    """Writes buf/validate and google/api as text, with whatever those import."""
    target = out / "buf/validate/validate.proto"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(validate_proto())
    spec = importlib.util.find_spec("google.api")
    assert spec and spec.submodule_search_locations
    wheel = Path(next(iter(spec.submodule_search_locations))).parent.parent
    wanted = set(THIRD_PARTY)
    for proto in PROTOS.rglob("*.proto"):
        wanted.update(re.findall(r'^import "(google/(?!protobuf/)[^"]+)";', proto.read_text(), re.M))
    while wanted:
        name = wanted.pop()
        target = out / name
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(wheel / name, target)
        wanted.update(re.findall(r'^import "(google/(?!protobuf/)[^"]+)";', target.read_text(), re.M))


def inputs() -> str:
    """A hash over all that the result depends on."""
    seen = hashlib.sha256()
    for path in sorted([*PROTOS.rglob("*.proto"), Path(__file__)]):
        seen.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    for package in ("grpcio-tools", "protobuf", "protovalidate", "googleapis-common-protos"):
        seen.update(f"{package} {version(package)}\n".encode())
    return seen.hexdigest()


def compile_protos(out: Path) -> None:
    """Runs protoc over all protos into `out`."""
    third_party = out / "third_party"
    write_third_party(third_party)
    sources = sorted(str(p.relative_to(PROTOS)) for p in PROTOS.rglob("*.proto"))
    well_known = Path(protoc.__file__).parent / "_proto"
    includes = [f"-I{third_party}", f"-I{well_known}"]
    python = [f"--python_out={out}", f"--pyi_out={out}"]
    described = [f"--descriptor_set_out={out / 'descriptors.binpb'}", "--include_imports", "--include_source_info"]
    ours = [f"-I{PROTOS}", *includes, *python, f"--grpc_python_out={out}", *described, *sources]
    if sources and protoc.main(["protoc", *ours]) != 0:
        raise SystemExit("make gen: protoc failed; gen/ is as it was")
    code = protoc.main(["protoc", *includes, *python, "buf/validate/validate.proto"])
    if code != 0:
        raise SystemExit("make gen: buf/validate/validate.proto was printed wrong")
    for top in (out / "care", out / "buf"):
        top.mkdir(exist_ok=True)
        for folder in [top, *(p for p in top.rglob("*") if p.is_dir())]:
            (folder / "__init__.py").touch()
    # protoc types an extension as a plain descriptor, which is not what `Extensions[...]` takes.
    for typed in out.rglob("*_pb2.pyi"):
        text = typed.read_text()
        loose = re.sub(r"^(\w+): _descriptor\.FieldDescriptor$", r"\1: _Any", text, flags=re.M)
        if loose != text:
            typed.write_text(f"from typing import Any as _Any\n{loose}")
    # A file without services has nothing to say here.
    for stub in (out / "care").rglob("*_pb2_grpc.py"):
        if "class " not in stub.read_text():
            stub.unlink()


def mirror(fresh: Path, target: Path) -> None:
    """Makes `target` equal to `fresh`, touching only what differs: others may be importing it meanwhile."""
    names = {p.relative_to(fresh) for p in fresh.rglob("*") if p.is_file()}
    for name in names:
        to = target / name
        if to.exists() and filecmp.cmp(fresh / name, to, shallow=False):
            continue
        to.parent.mkdir(parents=True, exist_ok=True)
        (fresh / name).replace(to)
    for old in list(target.rglob("*")):
        if old.is_file() and old.relative_to(target) not in names and "__pycache__" not in old.parts:
            if old.name not in (".stamp", ".lock"):
                old.unlink()


def main() -> None:
    """Generates when something changed since the last time."""
    GEN.mkdir(exist_ok=True)
    with open(GEN / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = GEN / ".stamp"
        now = inputs()
        if stamp.exists() and stamp.read_text() == now and "--force" not in sys.argv:
            return
        with tempfile.TemporaryDirectory(dir=GEN, prefix=".fresh-") as fresh:
            compile_protos(Path(fresh))
            mirror(Path(fresh), GEN)
        stamp.write_text(now)


if __name__ == "__main__":
    main()
