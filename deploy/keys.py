"""Makes the certificates and keys of a federation: `python -m deploy.keys FOLDER NODE...`.

FOLDER/coordinator  for the coordinator's machine: the CA's certificate and key, the server's certificate and key, the secret
                    shared by SuperLink and SuperExec, and the public key of every node
FOLDER/NODE         for one node's machine: the CA's certificate and the node's own private key

Existing files are kept, so a second start changes nothing; missing files are made. The server's certificate is also made
again if the CA did not issue it, a name is missing, or it expires within a month. Its names are those of docker-compose.yml
and those in MEADOW_SERVER_NAMES ("a.example,10.0.0.7").
"""

import datetime
import ipaddress
import os
import secrets
import sys
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

NAMES = ("superlink", "proxy", "localhost", "127.0.0.1")
DAYS = 825
"""Validity of the certificates in days."""
RENEWAL = datetime.timedelta(days=30)
"""A certificate that expires sooner is replaced."""


def main(folder: Path, nodes: list[str], below: str = "", now: datetime.datetime | None = None) -> None:
    """Make missing files. `below`: a subfolder of each machine's folder. `now`: replaces the clock's time."""
    coordinator = folder / "coordinator" / below
    coordinator.mkdir(parents=True, exist_ok=True)
    if not (coordinator / "ca.crt").exists():
        _authority(coordinator)
    more = os.environ.get("MEADOW_SERVER_NAMES", "").split(",")
    names = [*NAMES, *(name.strip() for name in more if name.strip())]
    if not _serves(coordinator, names, now or datetime.datetime.now(datetime.UTC)):
        _server(coordinator, names)
    if not (coordinator / "superexec.secret").exists():
        _write(coordinator / "superexec.secret", secrets.token_hex(32).encode())
    for node in nodes:
        own = folder / node / below
        own.mkdir(parents=True, exist_ok=True)
        if not (own / "node.key").exists():
            key = ec.generate_private_key(ec.SECP384R1())
            public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
            _write(coordinator / f"{node}.pub", public)
            _write(own / "node.key", key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        _write(own / "ca.crt", (coordinator / "ca.crt").read_bytes())


def _authority(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Meadow federation CA")])
    certificate = (
        _certificate(name, name, key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    _write(folder / "ca.key", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    _write(folder / "ca.crt", certificate.public_bytes(Encoding.PEM))


def _serves(folder: Path, names: list[str], now: datetime.datetime) -> bool:
    """Whether the server has a certificate by this CA that has all these names and is valid for another month."""
    if not (folder / "server.crt").exists() or not (folder / "server.key").exists():
        return False
    certificate = x509.load_pem_x509_certificate((folder / "server.crt").read_bytes())
    try:
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes()))
    except (InvalidSignature, ValueError, TypeError):
        return False
    good_for = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {_name(name) for name in names} <= set(good_for) and certificate.not_valid_after_utc - now > RENEWAL


def _server(folder: Path, names: list[str]) -> None:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    signer = load_pem_private_key((folder / "ca.key").read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, names[0])])
    certificate = (
        _certificate(subject, authority.subject, key.public_key())
        .add_extension(x509.SubjectAlternativeName([_name(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(signer, hashes.SHA384())
    )
    _write(folder / "server.key", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    _write(folder / "server.crt", certificate.public_bytes(Encoding.PEM))


def _certificate(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=DAYS))
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read, atomically."""
    part = path.with_suffix(path.suffix + ".part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
