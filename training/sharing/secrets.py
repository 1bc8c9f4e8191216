"""What must not leave the machine in an upload: credentials of any kind, and files in disguise."""

import re
from pathlib import Path

# The forms in which credentials are issued, by what they are called in a message.
CREDENTIALS = {
    "a Hugging Face token": r"(?<![A-Za-z0-9])(hf_|api_org_)[A-Za-z0-9]{20,}(?![A-Za-z0-9])",
    "a GitHub token": r"\b(gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{50,})",
    "a GitLab token": r"\bglpat-[A-Za-z0-9_-]{20,}",
    "an API key": r"\b(sk-(ant-|proj-)[A-Za-z0-9_-]{20,}|sk-[A-Za-z0-9]{32,}|AIza[A-Za-z0-9_-]{35}"
    r"|xox[abeprs]-[A-Za-z0-9-]{10,})",
    "an AWS key": r"\b(AKIA|ASIA)[A-Z0-9]{16}\b",
    "a package index token": r"\b(pypi-AgE[A-Za-z0-9_-]{40,}|npm_[A-Za-z0-9]{36})",
    "a signed web token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----|PuTTY-User-Key-File-\d",
    "a password in an address": r"://[^/\s:@\"']+:[^/\s:@\"']{3,}@",
    "a secret": r"(?i)\b[a-z_]*(api_?key|secret_?(access_?)?key|access_?token|password)[\"']?"
    r"\s*[:=]\s*[\"']?[A-Za-z0-9+/_-]{20,}",
}
_PATTERNS = {name: re.compile(pattern.encode()) for name, pattern in CREDENTIALS.items()}
HUB_TOKEN = re.compile(CREDENTIALS["a Hugging Face token"])

LONGEST_HEADER = 100_000_000  # bytes; safetensors itself refuses a longer one

# The first bytes of the formats that are uploaded without being read as text.
PICTURES = {
    ".png": (b"\x89PNG\r\n\x1a\n",),
    ".jpg": (b"\xff\xd8\xff",),
    ".jpeg": (b"\xff\xd8\xff",),
    ".gif": (b"GIF87a", b"GIF89a"),
    ".webp": (b"RIFF",),
}


def check_upload(path: str, content: Path | bytes, token: str) -> None:
    """Refuse a file that holds a credential, or that is no picture in spite of its name.

    Of a safetensors file the header is searched; its numbers are not text.

    Args:
        path: the name in the repository, for the message.
        content: the file, or what it will hold.
        token: the credential of this upload itself, or "" without one.

    Raises:
        ValueError: naming the file and what it holds, never the credential.
    """
    data = content if isinstance(content, bytes) else _head(content)
    known = PICTURES.get(Path(path).suffix.lower())
    if known is not None and not data.startswith(known):
        raise ValueError(f"{path} is no picture in spite of its name; remove it before pushing.")
    for name, pattern in _PATTERNS.items():
        if pattern.search(data):
            raise ValueError(f"{path} holds {name}; remove it before pushing.")
    if token and token.encode() in data:
        raise ValueError(f"{path} holds a Hugging Face token; remove it before pushing.")


def _head(file: Path) -> bytes:
    """Return what is searched of a file: all of it, or a safetensors file's header."""
    with file.open("rb") as opened:
        if file.suffix != ".safetensors":
            return opened.read()
        length = int.from_bytes(opened.read(8), "little")
        return opened.read(min(length, LONGEST_HEADER))
