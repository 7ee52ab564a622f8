"""The keys of a deployment: a CA, the server's certificate, and an EC key pair for each node.

Flower 1.42 asks two things: the address that nodes call must be in the certificate's
subjectAltName, and a node's key must be an OpenSSH file of a NIST curve (P-384 as in its guide).
"""

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pfedmoap_flwr.errors import UsageError

CA_DAYS = 3650
SERVER_DAYS = 730
LOOPBACK = ("localhost", "127.0.0.1", "::1")
CERTIFICATE, KEY = "ca.crt", "ca.key"


@dataclass(frozen=True)
class Authority:
    """A certificate authority of one deployment: whoever holds its key can pose as the server."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def create(cls) -> "Authority":
        """Make a new one, valid for ten years; it can sign servers, and no other authority."""
        key = ec.generate_private_key(ec.SECP384R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pfedmoap deployment CA")])
        usage = _usage(key_cert_sign=True, crl_sign=True)
        builder = (
            _dated(CA_DAYS)
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        )
        return cls(builder.sign(key, hashes.SHA384()), key)

    @classmethod
    def read(cls, folder: Path) -> "Authority":
        """Read the one that an earlier kit left. Raises UsageError where there is none."""
        try:
            certificate = x509.load_pem_x509_certificate((folder / CERTIFICATE).read_bytes())
            key = serialization.load_pem_private_key((folder / KEY).read_bytes(), None)
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(
                f"--ca {folder}: no {CERTIFICATE} with its {KEY} there ({error})"
            ) from error
        if (
            not isinstance(key, ec.EllipticCurvePrivateKey)
            or certificate.public_key() != key.public_key()
        ):
            raise UsageError(f"--ca {folder}: {KEY} is not the key of {CERTIFICATE}")
        return cls(certificate, key)

    def server(self, host: str) -> tuple[bytes, bytes]:
        """Return certificate and key, in PEM, of a server that is called by this name or address.

        Loopback names are in it as well: the reverse proxy and `flwr` on the server use them.
        """
        key = ec.generate_private_key(ec.SECP384R1())
        names = [_general_name(name) for name in dict.fromkeys((host, *LOOPBACK))]
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = (
            _dated(SERVER_DAYS)
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])]))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(issuer, critical=False)
        )
        return pem(builder.sign(self.key, hashes.SHA384())), private_pem(key)


def pem(certificate: x509.Certificate) -> bytes:
    """Return a certificate as a PEM file."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as a PEM file without a password: a service starts by itself."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def node_pair(site: str) -> tuple[bytes, bytes]:
    """Return a node's private and public key as OpenSSH files, as `ssh-keygen -t ecdsa -b 384`."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return private, public + f" {site}\n".encode()


def _dated(days: int) -> x509.CertificateBuilder:
    # An hour back: the clocks of the nodes are not the one of this machine
    start = datetime.now(UTC) - timedelta(hours=1)
    return (
        x509.CertificateBuilder()
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=days))
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _usage(**allowed: bool) -> x509.KeyUsage:
    nothing = dict.fromkeys(
        (
            *("digital_signature", "content_commitment", "key_encipherment"),
            *("data_encipherment", "key_agreement", "key_cert_sign", "crl_sign"),
            *("encipher_only", "decipher_only"),
        ),
        False,
    )
    return x509.KeyUsage(**{**nothing, **allowed})
