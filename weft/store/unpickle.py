"""PyTorch's pickled checkpoints to safetensors, in a process of its own that may do little. Nothing else in weft opens a pickle.

torch's restricted unpickler builds tensors and plain containers only. Should it ever be wrong, the process has no secrets in its
environment, no network where the system can take it away, and bounds on memory, time and what it writes; and what it leaves is
read like any stranger's file.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.error import FormatError, WeftError
from weft.store.files import told, unreadable

_KEPT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "LANG")
_USER, _NET = 0x10000000, 0x40000000


def unpickle(source: Path, target: Path) -> None:
    """Write a pickled checkpoint's tensors into a new safetensors file.

    Errors: PathError; FormatError for what holds more than tensors by name, compressed content, or more than its size.
    """
    _only_stored(source)
    env = {k: os.environ[k] for k in _KEPT if k in os.environ}
    env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "weft.store.unpickle", str(source.resolve()), str(target.resolve())]
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, check=False)  # noqa: S603
    if done.returncode or not target.is_file():
        said = done.stderr.decode("utf8", "replace").strip().splitlines()
        raise FormatError(
            "a pickled checkpoint cannot be read safely",
            where=source.name,
            got=said[-1] if said else f"its reader was stopped (exit {done.returncode})",
            want="tensors by name, and nothing else",
            fix="take the model in safetensors",
        )


def _only_stored(path: Path) -> None:
    """Refuse an archive that unpacks to more than it is."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            if f.read(4) != b"PK\x03\x04":
                return
        with zipfile.ZipFile(path) as z:
            members = z.infolist()
    except OSError as e:
        problem = unreadable(path, e, "a checkpoint")
        raise problem from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as e:
        got, want = str(e), "the archive that torch.save writes"
        raise FormatError("an archive is damaged", where=path.name, got=got, want=want, fix="copy it again") from None
    packed = [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]
    total = sum(m.file_size for m in members)
    if packed or total > size:
        got = f"{total:,} bytes in a file of {size:,}" + (f", {len(packed)} members compressed" if packed else "")
        fix = "do not use this model"
        raise FormatError(
            "an archive unpacks to more than it is", where=path.name, got=got, want="stored members", fix=fix
        )


def main() -> int:
    """The process: limits first, then the pickle. The last line of its errors says what was wrong."""
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        limit(source.stat().st_size)
        convert(source, target)
    except WeftError as e:
        sys.stderr.write(f"\n{e.what}: {e.got}")
        return 1
    except Exception as e:  # whatever a stranger's pickle provokes is one line for the parent
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(e)).strip().splitlines() or [""]
        line = next((line for line in text if "Unsupported" in line), text[0]).strip().split(" was not an allowed")[0]
        sys.stderr.write(f"\n{type(e).__name__}: {line}")
        return 1
    return 0


def limit(size: int) -> None:
    """No network, no core dump, and bounds on memory (three times the file, and 4 GB), processor time and written bytes."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        _ = libc.unshare(_NET) and libc.unshare(_USER | _NET)  # not every system lets go of its network
    try:
        import resource
    except ImportError:  # a system without such limits
        return
    used = 0
    if (status := Path("/proc/self/statm")).exists():
        used = int(status.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    bounds = {
        resource.RLIMIT_AS: used + 3 * size + (4 << 30),
        resource.RLIMIT_CPU: 60 + size // (10 << 20),
        resource.RLIMIT_FSIZE: 2 * size + (64 << 20),
        resource.RLIMIT_CORE: 0,
    }
    for what, most in bounds.items():
        hard = resource.getrlimit(what)[1]
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (least, least))


def convert(source: Path, target: Path) -> None:
    """What the process does: unpickle with torch's restricted unpickler, check, write."""
    import torch

    from weft.store.tensors import size_of, stream

    state: Any = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    wrong = not isinstance(state, Mapping) or not state
    if wrong or not all(isinstance(k, str) and type(v) in (torch.Tensor, torch.nn.Parameter) for k, v in state.items()):
        kinds = (
            sorted({type(v).__name__ for v in state.values()}) if isinstance(state, Mapping) else type(state).__name__
        )
        got, want, fix = str(kinds), "tensors by name", "convert it where it was made"
        raise FormatError("this is no state dict", where=source.name, got=got, want=want, fix=fix)
    held = {k: v.detach() for k, v in state.items()}
    total, size = sum(size_of(t) for t in held.values()), source.stat().st_size
    if total > 2 * size + (1 << 20):
        got, want, fix = f"tensors of {total:,} bytes", f"about the {size:,} of the file", "do not use this model"
        raise FormatError("tensors are larger than their file", where=source.name, got=got, want=want, fix=fix)
    with told(target):
        stream(target, held, hashed=False)


if __name__ == "__main__":
    sys.exit(main())
