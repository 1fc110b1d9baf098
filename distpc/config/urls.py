"""What a place may be called: a path, or a URL of an object store without credentials."""

from __future__ import annotations

SCHEME = "s3"


def require_place(text: str) -> None:
    """Refuse a URL that names no object store, or that carries credentials (never repeated).

    Raises:
        ValueError: as said.
    """
    scheme, mark, rest = text.partition("://")
    if not mark:
        return
    bucket = rest.partition("/")[0]
    if "@" in bucket:
        raise ValueError(
            f"the URL of {bucket.rpartition('@')[2]} carries credentials: leave them out and set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
        )
    if scheme != SCHEME or not bucket:
        raise ValueError(f"'{text}' is neither a path nor of the form {SCHEME}://bucket/prefix")
