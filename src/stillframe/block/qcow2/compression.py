"""Compressed clusters: raw deflate with a 4 KiB window, or a zstd frame. One yields exactly one cluster.

Whatever the data claims, no more than a cluster is produced and no larger window than QEMU's encoder uses is set up.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from stillframe.errors import ImageCorrupt

_ZSTD_WINDOW = 8 << 20
_ZSTD_LEVEL = 3
_THREADS = min(4, os.cpu_count() or 1)
_of_thread = threading.local()


def compress_clusters(data: memoryview, kind: str, cluster_size: int) -> list[bytes | None]:
    """Each cluster compressed, on several processors; None for one that does not get smaller.

    :param kind: "zlib" or "zstd". :param data: the last one may be cut short; zeroes are put behind it.
    """
    clusters = [data[at : at + cluster_size] for at in range(0, len(data), cluster_size)]
    pack = _deflate if kind == "zlib" else _zstd

    def packed(cluster: memoryview) -> bytes | None:
        whole = cluster if len(cluster) == cluster_size else bytes(cluster).ljust(cluster_size, b"\0")
        found = pack(whole)
        return found if len(found) < cluster_size else None

    if len(clusters) == 1:
        return [packed(clusters[0])]
    with ThreadPoolExecutor(_THREADS, "compress") as threads:
        return list(threads.map(packed, clusters))


def _deflate(data: bytes | memoryview) -> bytes:
    import zlib

    stream = zlib.compressobj(wbits=-12, memLevel=9)
    return stream.compress(data) + stream.flush()


def _zstd(data: bytes | memoryview) -> bytes:
    compress: Callable[[bytes | memoryview], bytes] | None = getattr(_of_thread, "zstd", None)
    if compress is None:
        import zstandard

        compress = _of_thread.zstd = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress
    return compress(data)


def decompress(data: bytes, kind: str, cluster_size: int) -> bytes:
    """The cluster that `data` begins with; what follows it belongs to others.

    :param kind: "zlib" or "zstd".
    :raise ImageCorrupt: it is not a whole cluster's data.
    """
    try:
        found = _inflate(data, cluster_size) if kind == "zlib" else _unzstd(data, cluster_size)
    except _errors(kind) as error:
        raise ImageCorrupt(f"A compressed cluster cannot be read: {error}") from error
    if len(found) != cluster_size:
        raise ImageCorrupt(f"A compressed cluster holds {len(found)} bytes instead of {cluster_size}")
    return found


def _inflate(data: bytes, cluster_size: int) -> bytes:
    import zlib

    return zlib.decompressobj(-12).decompress(data, cluster_size)


def _unzstd(data: bytes, cluster_size: int) -> bytes:
    import zstandard

    reader = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).stream_reader(data)
    found = bytearray()
    while len(found) < cluster_size:
        part = reader.read(cluster_size - len(found))
        if not part:
            break
        found += part
    return bytes(found)


def _errors(kind: str) -> type[Exception]:
    if kind == "zlib":
        import zlib

        return zlib.error
    import zstandard

    error: type[Exception] = zstandard.ZstdError
    return error
