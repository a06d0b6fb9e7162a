"""Writes each service's own key and everybody's public keys into a folder, once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from joserfc.jwk import KeySet, OKPKey

SERVICES = ("patients", "scheduling", "referrals", "notifications", "feedback", "gateway")


def main(folder: Path) -> None:
    """Does nothing where the public keys are there already."""
    public = folder / "services.jwks"
    if public.exists():
        return
    keys = [OKPKey.generate_key("Ed25519", {"kid": name}, private=True) for name in SERVICES]
    for name, key in zip(SERVICES, keys, strict=True):
        path = folder / f"{name}.jwk"
        path.touch(mode=0o640)
        path.write_text(json.dumps(key.as_dict(private=True)))
    # Last: it says that all are there.
    public.write_text(json.dumps(KeySet(list(keys)).as_dict(private=False)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
