"""The page `/docs`: reads /openapi.json and needs nothing from anywhere else."""

import base64
import hashlib
import re
from pathlib import Path
from typing import Final

_HTML: Final = (Path(__file__).parent / "pages" / "docs.html").read_text()


def _hashes(tag: str) -> str:
    parts = re.findall(rf"<{tag}>(.*?)</{tag}>", _HTML, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in parts)


PAGE: Final = _HTML.encode()
HEADERS: Final = [
    (b"content-type", b"text/html; charset=utf-8"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        (
            f"default-src 'none'; script-src {_hashes('script')}; style-src {_hashes('style')}; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ).encode(),
    ),
]
