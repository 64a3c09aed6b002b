from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from tests.test_docs import rows
from trio_llm.errors import CheckpointError
from trio_llm.gguf.header import read_gguf

HUGE = 2**62


def _text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def _header(*, tensors: bytes = b"", num_tensors: int = 0, keys: bytes = b"", num_keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_keys) + keys + tensors


def _key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return _text(name) + struct.pack("<I", kind) + value


def _tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = b"".join(struct.pack("<Q", size) for size in shape)
    return _text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


VALID = _header(
    keys=_key("general.architecture", 8, _text("llama")) + _key("a.list", 9, struct.pack("<IQ3i", 5, 3, 1, -2, 3)),
    num_keys=2,
    tensors=_tensor("token_embd.weight", (8, 2)),
    num_tensors=1,
)
ARRAY = struct.pack("<IQ", 8, 2) + _text("x") + _text("y")

HOSTILE = {
    "empty": b"",
    "another format": b"PK\x03\x04" + VALID[4:],
    "big-endian": b"GGUF" + struct.pack(">I", 3) + VALID[8:],
    "version 1": b"GGUF" + struct.pack("<I", 1) + VALID[8:],
    "too many keys": _header(num_keys=HUGE),
    "too many tensors": _header(num_tensors=HUGE),
    "fewer keys than counted": _header(num_keys=5),
    "a string longer than the file": _header(keys=struct.pack("<Q", HUGE), num_keys=1),
    "a string that is not UTF-8": _header(keys=_key(b"\xff\xfe", 4, b"\0" * 4), num_keys=1),
    "a lone surrogate": _header(keys=_key(b"\xed\xa0\x80", 4, b"\0" * 4), num_keys=1),
    "a key twice": _header(keys=_key("a", 0, b"\1") * 2, num_keys=2),
    "an unknown type": _header(keys=_key("a", 99, b"\1"), num_keys=1),
    "an array longer than the file": _header(keys=_key("a", 9, struct.pack("<IQ", 4, HUGE)), num_keys=1),
    "an array of strings longer than the file": _header(keys=_key("a", 9, struct.pack("<IQ", 8, HUGE)), num_keys=1),
    "an array of arrays": _header(keys=_key("a", 9, struct.pack("<IQ", 9, 1) + ARRAY), num_keys=1),
    "nested arrays without end": _header(keys=_key("a", 9, struct.pack("<IQ", 9, 1) * 5000), num_keys=1),
    "an alignment of 0": _header(keys=_key("general.alignment", 4, b"\0" * 4), num_keys=1),
    "an alignment of text": _header(keys=_key("general.alignment", 8, _text("x")), num_keys=1),
    "no dimensions": _header(tensors=_tensor("t", ()), num_tensors=1),
    "five dimensions": _header(tensors=_tensor("t", (1,) * 5), num_tensors=1),
    "a dimension of 0": _header(tensors=_tensor("t", (0, 4)), num_tensors=1),
    "a dimension of 2**62": _header(tensors=_tensor("t", (HUGE, 4)), num_tensors=1),
    "a tensor twice": _header(tensors=_tensor("t", (1,)) * 2, num_tensors=2) + b"\0" * 64,
    "a tensor behind the end": _header(tensors=_tensor("t", (1,), offset=HUGE), num_tensors=1),
}
DOCUMENTED = dict(rows("security", "Hostile model files"))


def test_every_hostile_header_is_documented() -> None:
    """The table on the page has these files and no others."""
    assert list(DOCUMENTED) == list(HOSTILE)


def test_a_header_is_read(tmp_path: Path) -> None:
    """Values, arrays, shapes (rows first) and offsets, which begin at the next multiple of the alignment."""
    path = tmp_path / "model.gguf"
    path.write_bytes(VALID + b"\0" * 200)
    found = read_gguf(path)
    assert found.metadata == {"general.architecture": "llama", "a.list": [1, -2, 3]}
    assert found.tensors["token_embd.weight"].shape == (2, 8)
    assert found.tensors["token_embd.weight"].offset == -(-len(VALID) // 32) * 32


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_one_clear_line(name: str, tmp_path: Path) -> None:
    """Wrong lengths, counts, offsets, types and strings end in the error that docs/security.md has for them."""
    path = tmp_path / "model.gguf"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(CheckpointError) as caught:
        read_gguf(path)
    assert str(caught.value) == f"{path}: {DOCUMENTED[name]}"
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_a_header_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    """No prefix of a file is taken for a file."""
    path = tmp_path / "model.gguf"
    for length in range(len(VALID)):
        path.write_bytes(VALID[:length])
        with pytest.raises(CheckpointError):
            read_gguf(path)


def test_flipping_any_byte_never_raises_anything_else(tmp_path: Path) -> None:
    """A damaged header is read or refused; it never ends in another exception."""
    path = tmp_path / "model.gguf"
    for at in range(len(VALID)):
        for value in (0x00, 0x7F, 0xFF):
            path.write_bytes(VALID[:at] + bytes((value,)) + VALID[at + 1 :] + b"\0" * 200)
            try:
                read_gguf(path)
            except CheckpointError:
                continue


@pytest.mark.parametrize("kind", ["fifo", "directory", "missing", "device"])
def test_what_is_no_regular_file_is_not_opened(kind: str, tmp_path: Path) -> None:
    """A FIFO would block for ever, a device would never end."""
    path = tmp_path / "model.gguf"
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="no such file"):
        read_gguf(path)
