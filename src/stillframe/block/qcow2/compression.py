"""Compressed clusters, read: raw deflate with a 4 KiB window, or a zstd frame. One yields exactly one cluster.

Whatever the data claims, no more than a cluster is produced and no larger window than QEMU's encoder uses is set up.
"""

from stillframe.errors import ImageCorrupt

_ZSTD_WINDOW = 8 << 20


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
