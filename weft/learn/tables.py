"""Tables of columns: Parquet and Arrow files, through pyarrow where it is installed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from weft.error import FormatError, ResourceError


def rows(path: Path, fields: Collection[str]) -> Iterator[dict[str, Any]]:
    """Records of a Parquet file, or of an Arrow one, as a stream or a file, with these fields of those it has.

    Errors: ResourceError without pyarrow; FormatError for a file that is broken.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as e:
        want, fix = "the package pyarrow", "pip install 'weft[data]'"
        raise ResourceError("this data needs a package", where=path.name, got=str(e), want=want, fix=fix) from None
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as f:
                names = [n for n in f.schema_arrow.names if n in fields]
                for batch in f.iter_batches(columns=names):
                    yield from batch.to_pylist()
        else:
            with pa.memory_map(str(path)) as f:
                yield from (r for batch in _arrow(pa, f) for r in batch.to_pylist())
    except (pa.ArrowException, OSError) as e:
        got, fix = f"{type(e).__name__}: {e}", "make the file again, or convert the data to .jsonl"
        raise FormatError("a table cannot be read", where=path.name, got=got, want="rows", fix=fix) from e


def _arrow(pa: Any, f: Any) -> Iterator[Any]:
    if f.read(6) == b"ARROW1":
        file = pa.ipc.open_file(f)
        return (file.get_batch(i) for i in range(file.num_record_batches))
    f.seek(0)
    return iter(pa.ipc.open_stream(f))
