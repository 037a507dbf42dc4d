"""Content Credentials: a signed C2PA manifest in an image file, by the reference library (extra `sign`).

The manifest contains the same statement as the metadata, that a trained model generated the image, with a signature
over the whole file. Whether a reader trusts the signature depends on the certificate: it comes from an authority on the
C2PA trust list, or the reader trusts it for another reason. No time stamp authority is used; signing needs no network.
"""

from __future__ import annotations

import importlib
import io
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vultus.errors import UserError
from vultus.images.xmp import MEDIA_TYPES, MarkedFormat, Origin, source_of

MISSING = "signing needs the C2PA library: pip install 'vultus[sign]'"
CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}


class Signer:
    """Signs image files with a certificate chain and its private key.

    Args:
        certificates: PEM file: the signer's own certificate, then those up to the authority.
        key: PEM file with the private key, not encrypted: P-256, P-384, P-521, RSA of 2,048 bits or more, or Ed25519.

    Raises UserError that names the file if one is missing, is no PEM file, or the key is not that of the certificate;
    and if the library or the C2PA Technical Specification 2.2 (section 14.5) does not allow the certificate.
    """

    def __init__(self, certificates: str | Path, key: str | Path) -> None:
        try:
            self._c2pa: Any = importlib.import_module("c2pa")
        except ImportError:
            raise UserError(MISSING) from None
        self._path = Path(certificates)
        chain, secret = _read(certificates), _read(key)
        algorithm = _algorithm(self._path, chain, Path(key), secret)
        try:
            info = self._c2pa.C2paSignerInfo(getattr(self._c2pa.C2paSigningAlg, algorithm), chain, secret, None)
            self._signer = self._c2pa.Signer.from_info(info)
        except self._c2pa.C2paError as error:
            raise self._error(error) from None
        # A thumbnail of an image of 128 pixels would only make the file larger.
        self._context = self._c2pa.Context.from_dict({"builder": {"thumbnail": {"enabled": False}}})

    def __call__(self, data: bytes, kind: MarkedFormat, origin: Origin) -> bytes:
        """The file with the manifest. Every call gives other bytes: the manifest has an id, the signature a salt."""
        agent = {"name": "vultus", "version": version("vultus")}
        action = {
            "action": "c2pa.created",
            "digitalSourceType": source_of(origin),
            "softwareAgent": agent,
            "description": origin.description,
        }
        manifest = {
            "claim_generator_info": [agent],
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
        }
        signed = io.BytesIO()
        try:
            with self._c2pa.Builder(json.dumps(manifest), self._context) as builder:
                builder.sign(self._signer, MEDIA_TYPES[kind], io.BytesIO(data), signed)
        except self._c2pa.C2paError as error:
            raise self._error(error) from None
        return signed.getvalue()

    def _error(self, error: Exception) -> UserError:
        reason = " ".join(str(error).split())[:200]
        return UserError(f"{self._path}: the C2PA library rejects this certificate or its key ({reason}); use another")


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a PEM file") from None


def _algorithm(certificates: Path, chain: bytes, key: Path, secret: bytes) -> str:
    """The name of the signature algorithm for the key."""
    from cryptography import x509  # a dependency of the C2PA library
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        own = x509.load_pem_x509_certificates(chain)[0]
    except ValueError:
        raise UserError(f"{certificates}: holds no PEM certificate; give the chain, your own one first") from None
    try:
        private = load_pem_private_key(secret, None)
    except (ValueError, TypeError):  # TypeError: encrypted
        raise UserError(f"{key}: holds no PEM private key, or an encrypted one; decrypt it (openssl pkey)") from None
    if own.public_key() != private.public_key():
        raise UserError(f"{key}: is not the key of the first certificate in {certificates}; give its key")
    if isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name in CURVES:
        return CURVES[private.curve.name]
    if isinstance(private, rsa.RSAPrivateKey):
        return "PS256"
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return "ED25519"
    raise UserError(f"{key}: C2PA does not support this type of key; use P-256, P-384, P-521, RSA or Ed25519")


def read_credentials(data: bytes, kind: str) -> dict[str, Any] | None:
    """The C2PA manifest in a file: `state` (Valid, Trusted, Invalid), `source`, `signer`.

    None if there is no manifest, the format is none that vultus writes, or the library is not installed. Valid means
    that the file is unchanged since it was signed with the certificate of `signer`. Trusted would need a trust list,
    and the library contains none.
    """
    if kind not in MEDIA_TYPES:
        return None
    try:
        c2pa: Any = importlib.import_module("c2pa")
    except ImportError:
        return None
    try:
        reader = c2pa.Reader.try_create(MEDIA_TYPES[kind], io.BytesIO(data))
        if reader is None:
            return None
        with reader:
            manifest, state = reader.get_active_manifest() or {}, reader.get_validation_state()
    except c2pa.C2paError:
        return {"state": "Invalid", "source": None, "signer": None}
    actions = [
        action
        for assertion in manifest.get("assertions", [])
        if assertion.get("label", "").startswith("c2pa.actions")
        for action in assertion.get("data", {}).get("actions", [])
    ]
    sources = [action["digitalSourceType"] for action in actions if "digitalSourceType" in action]
    signature = manifest.get("signature_info") or {}
    return {
        "state": state,
        "source": sources[0] if sources else None,
        "signer": signature.get("common_name") or signature.get("issuer"),
    }
