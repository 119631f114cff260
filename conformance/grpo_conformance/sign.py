"""What makes a report checkable: a digest of its content, and the signature of a person's SSH key.

The digest shows that a file was not changed by accident. Who made it is shown by a signature only: OpenSSH's
own format (PROTOCOL.sshsig), made and checked by `ssh-keygen`, with the keys that people have anyway.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_core.errors import ConfigError

NAMESPACE = "grpo-conformance"
UNSIGNED = ("digest", "signature")


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 over the content without digest and signature, keys sorted, no spaces."""
    return "sha256:" + hashlib.sha256(_canonical(content)).hexdigest()


def sign(content: Mapping[str, Any], key: Path) -> str:
    """The armoured SSH signature of a report's digest. Raises `ConfigError` where ssh-keygen refuses."""
    with tempfile.TemporaryDirectory() as folder:
        message = Path(folder) / "message"
        message.write_text(digest(content), encoding="ascii")
        done = _ssh_keygen("-Y", "sign", "-q", "-f", str(key), "-n", NAMESPACE, str(message))
        if done.returncode:
            raise ConfigError(
                f"the report cannot be signed with {key}",
                why=done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "ssh-keygen failed",
                fix="give the private key of an SSH key pair (ssh-keygen -t ed25519 makes one)",
            )
        return message.with_name("message.sig").read_text(encoding="ascii")


def problem(content: Mapping[str, Any], *, signers: Path | None = None, identity: str = "") -> str | None:
    """Why a report cannot be believed, or None.

    Without `signers` only the digest is checked; with an OpenSSH allowed-signers file, the signature must be
    that of `identity` too.
    """
    if content.get("digest") != digest(content):
        return "its content is not what its digest was made from"
    if signers is None:
        return None
    signature = content.get("signature")
    if not isinstance(signature, str):
        return "it is not signed"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "signature"
        path.write_text(signature, encoding="ascii")
        done = _ssh_keygen(
            "-Y", "verify", "-f", str(signers), "-I", identity, "-n", NAMESPACE, "-s", str(path),
            message=digest(content),
        )  # fmt: skip
    said = (done.stderr or done.stdout).strip().splitlines()
    return None if done.returncode == 0 else f"its signature is not valid: {said[-1] if said else 'refused'}"


def _canonical(content: Mapping[str, Any]) -> bytes:
    signed = {key: value for key, value in content.items() if key not in UNSIGNED}
    # A round trip first: what is signed is what a reader of the file gets.
    plain = json.loads(json.dumps(signed))
    return json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()


def _ssh_keygen(*arguments: str, message: str = "") -> subprocess.CompletedProcess[str]:
    program = shutil.which("ssh-keygen")
    if program is None:
        raise ConfigError(
            "ssh-keygen is not installed",
            why="it makes and checks the signatures of reports",
            fix="install the OpenSSH client, or leave the signature out",
        )
    return subprocess.run(
        [program, *arguments], input=message, capture_output=True, text=True, timeout=60, check=False
    )
