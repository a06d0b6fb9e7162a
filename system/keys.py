"""Keys of a development system: made once, kept in its data folder, readable by their owner only."""

import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from joserfc.jwk import ECKey, KeySet, OKPKey

from system.process import write_private
from system.topology import NODES


@dataclass(frozen=True)
class Keys:
    """Where the keys of one folder lie. `ensure` makes those that are missing and changes none."""

    folder: Path

    @property
    def issuer_key_file(self) -> Path:
        """Private JWK (ES256) of the development issuer."""
        return self.folder / "issuer.jwk"

    @property
    def issuer_keys_file(self) -> Path:
        """JWKS with the issuer's public key."""
        return self.folder / "issuer.jwks"

    @property
    def service_keys_file(self) -> Path:
        """JWKS with the public keys of all services; `kid` is the service's name."""
        return self.folder / "services.jwks"

    def service_key_file(self, name: str) -> Path:
        """Private JWK (Ed25519) of one service."""
        return self.folder / f"{name}.jwk"

    @property
    def signing_secret(self) -> str:
        """Signs page tokens and offers."""
        return (self.folder / "signing-secret").read_text()

    def ensure(self, names: Iterable[str] = NODES) -> "Keys":
        """Makes what is missing, 0600, and returns itself."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not self.issuer_key_file.exists():
            made = ECKey.generate_key("P-256", {"kid": secrets.token_hex(8), "use": "sig", "alg": "ES256"})
            _write(self.issuer_key_file, made.as_dict(private=True))
        issuer = ECKey.import_key(json.loads(self.issuer_key_file.read_text()))
        _write_if_changed(self.issuer_keys_file, KeySet([issuer]).as_dict(private=False))
        for name in names:
            if not self.service_key_file(name).exists():
                _write(
                    self.service_key_file(name),
                    OKPKey.generate_key("Ed25519", {"kid": name, "use": "sig"}).as_dict(private=True),
                )
        every = [OKPKey.import_key(json.loads(self.service_key_file(name).read_text())) for name in names]
        _write_if_changed(self.service_keys_file, KeySet(list(every)).as_dict(private=False))
        secret = self.folder / "signing-secret"
        if not secret.exists():
            write_private(secret, secrets.token_urlsafe(32))
        return self


def _write(path: Path, content: object) -> None:
    write_private(path, json.dumps(content, indent=1))


def _write_if_changed(path: Path, content: object) -> None:
    # Running processes read it; what is the same isn't touched.
    if not path.exists() or json.loads(path.read_text()) != content:
        _write(path, content)
