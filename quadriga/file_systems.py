"""The file systems of URLs, with fsspec: object stores, other machines, memory."""

from __future__ import annotations

from typing import Any

from quadriga.errors import Problem, UserError

DRIVERS = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}


def file_system_of(url: str, where: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it. Raises UserError about `where` if its protocol has no driver."""
    try:
        from fsspec.core import url_to_fs

        system, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        driver = DRIVERS.get(url.partition("://")[0])
        fix = f"pip install {driver or 'fsspec'}" if driver or isinstance(error, ImportError) else "see fsspec's list"
        raise UserError(Problem(where, f"cannot be reached: {error}", url, fix=fix)) from None
    return system, str(path)
