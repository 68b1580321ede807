"""What weights are: a digest that no order of tensors and no metadata changes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

#: Names of dtypes in safetensors headers, as torch writes them.
_TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def safetensors_digest(path: Path) -> str:
    """What the weights in a file are, read without torch; equal to `training.checkpoint.weights_digest` of its tensors.

    Independent of the order of tensors and of the file's metadata, which safetensors does not keep stable.

    Raises
    ------
    ValueError
        The file is no safetensors file, or holds a kind of number that is not known here.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        try:
            length = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(length)) if length < 100_000_000 else {"": None}
            header.pop("__metadata__", None)
            for name in sorted(header):
                start, end = header[name]["data_offsets"]
                shape = tuple(header[name]["shape"])
                digest.update(f"{name}|torch.{_TORCH_NAMES[header[name]['dtype']]}|{shape}|".encode())
                stream.seek(8 + length + start)
                while start < end:
                    block = stream.read(min(1 << 24, end - start))
                    if not block:
                        raise ValueError("truncated")
                    digest.update(block)
                    start += len(block)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not readable as safetensors ({type(error).__name__}: {error})") from None
    return digest.hexdigest()
