//! TLS as libpq's sslmodes mean it, on rustls.
//!
//! Two things differ from rustls's own ways. A certificate that is itself in `sslrootcert` is
//! trusted, also when it is marked as an authority: self-signed server certificates are made that
//! way, and libpq takes them. And SCRAM can be bound to the channel (tls-server-end-point, RFC
//! 5929), for which the hash of the server's certificate is taken here.

use std::io;
use std::path::Path;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
};
use sha2::{Digest, Sha256, Sha384, Sha512};

use super::dsn::{RootCert, Ssl, SslMode};
use super::error::Error;

/// Reads the certificate files and makes the configuration that both connections use. Called for
/// each connection, so that renewed files need no restart.
pub(super) fn client_config(ssl: &Ssl) -> Result<ClientConfig, Error> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = Verifier::new(ssl, Arc::clone(&provider))?;
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(Error::TlsSetup)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match &ssl.client {
        None => builder.with_no_client_auth(),
        Some((cert, key)) => {
            let certificates = certificates("sslcert", cert)?;
            let pem = PrivateKeyDer::from_pem_slice(&read("sslkey", key)?)
                .map_err(|error| unusable("sslkey", key, error))?;
            let signer = provider
                .key_provider
                .load_private_key(pem)
                .map_err(|error| unusable("sslkey", key, error))?;
            // Not `with_client_auth_cert`: that reads the certificate, and refuses version 1, which
            // openssl makes by default. What is good enough is the server's decision.
            let certified = CertifiedKey::new(certificates, signer);
            builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certified)))
        }
    };
    if ssl.direct {
        // Postgres 17 demands this name where TLS starts with the first byte.
        config.alpn_protocols = vec![b"postgresql".to_vec()];
    }
    Ok(config)
}

fn read(option: &'static str, path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|source| Error::TlsFile {
        option,
        path: path.display().to_string(),
        source,
    })
}

fn unusable(option: &'static str, path: &Path, error: impl std::fmt::Display) -> Error {
    Error::TlsFile {
        option,
        path: path.display().to_string(),
        source: io::Error::new(io::ErrorKind::InvalidData, error.to_string()),
    }
}

fn certificates(option: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let pem = read(option, path)?;
    let certificates = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| unusable(option, path, error))?;
    if certificates.is_empty() {
        return Err(unusable(option, path, "there is no certificate in the file"));
    }
    Ok(certificates)
}

/// Checks as much of the server's certificate as the sslmode asks for.
#[derive(Debug)]
struct Verifier {
    /// Checks chain and name; nothing where the sslmode asks for no check.
    inner: Option<Arc<dyn ServerCertVerifier>>,
    /// The certificates of `sslrootcert` themselves.
    pinned: Vec<CertificateDer<'static>>,
    check_name: bool,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn new(ssl: &Ssl, provider: Arc<CryptoProvider>) -> Result<Self, Error> {
        let checks = match ssl.mode {
            SslMode::Disable | SslMode::Prefer => false,
            // libpq: a root certificate turns `require` into `verify-ca`.
            SslMode::Require => ssl.root_cert != RootCert::Unset,
            SslMode::VerifyCa | SslMode::VerifyFull => true,
        };
        let (inner, pinned): (Option<Arc<dyn ServerCertVerifier>>, _) = match &ssl.root_cert {
            _ if !checks => (None, Vec::new()),
            RootCert::File(path) => {
                let certificates = certificates("sslrootcert", path)?;
                let mut roots = RootCertStore::empty();
                roots.add_parsable_certificates(certificates.iter().cloned());
                let verifier = WebPkiServerVerifier::builder_with_provider(
                    Arc::new(roots),
                    Arc::clone(&provider),
                )
                .build()
                .map_err(|error| unusable("sslrootcert", path, error))?;
                (Some(verifier), certificates)
            }
            RootCert::Unset | RootCert::System => {
                let verifier = rustls_platform_verifier::Verifier::new(Arc::clone(&provider))
                    .map_err(Error::TlsSetup)?;
                (Some(Arc::new(verifier)), Vec::new())
            }
        };
        let check_name = ssl.mode == SslMode::VerifyFull;
        Ok(Self { inner, pinned, check_name, provider })
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(inner) = &self.inner else {
            return Ok(ServerCertVerified::assertion());
        };
        if self.pinned.iter().any(|pinned| pinned.as_ref() == end_entity.as_ref()) {
            if self.check_name {
                let parsed = ParsedCertificate::try_from(end_entity)?;
                rustls::client::verify_server_name(&parsed, server_name)?;
            }
            return Ok(ServerCertVerified::assertion());
        }
        let verified =
            inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        match verified {
            // The name is looked at last: the chain was good.
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if !self.check_name => Ok(ServerCertVerified::assertion()),
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// The data that binds SCRAM to this TLS channel: the certificate's hash, by the hash function of
/// its own signature (SHA-256 in place of MD5 and SHA-1). Nothing for signatures without one.
pub(super) fn channel_binding(certificate: &[u8]) -> Option<Vec<u8>> {
    match signature_hash(signature_algorithm(certificate)?)? {
        Hash::Sha256 => Some(Sha256::digest(certificate).to_vec()),
        Hash::Sha384 => Some(Sha384::digest(certificate).to_vec()),
        Hash::Sha512 => Some(Sha512::digest(certificate).to_vec()),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hash {
    Sha256,
    Sha384,
    Sha512,
}

/// Which hash function belongs to a signature algorithm, by the bytes of its object identifier.
fn signature_hash(oid: &[u8]) -> Option<Hash> {
    /// 1.2.840.113549.1.1, PKCS #1.
    const RSA: &[u8] = &[0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x01];
    /// 1.2.840.10045.4.3, ECDSA with SHA-2.
    const ECDSA: &[u8] = &[0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x04, 0x03];
    if let Some(last) = oid.strip_prefix(RSA) {
        return match last {
            // md5, sha1, sha256
            [4 | 5 | 11] => Some(Hash::Sha256),
            [12] => Some(Hash::Sha384),
            [13] => Some(Hash::Sha512),
            _ => None,
        };
    }
    match oid.strip_prefix(ECDSA)? {
        [2] => Some(Hash::Sha256),
        [3] => Some(Hash::Sha384),
        [4] => Some(Hash::Sha512),
        _ => None,
    }
}

/// The object identifier in `Certificate { tbsCertificate, signatureAlgorithm { oid, … }, … }`.
fn signature_algorithm(certificate: &[u8]) -> Option<&[u8]> {
    const SEQUENCE: u8 = 0x30;
    const OBJECT_IDENTIFIER: u8 = 0x06;
    let (fields, _) = der_value(certificate, SEQUENCE)?;
    let (_, after_tbs) = der_value(fields, SEQUENCE)?;
    let (algorithm, _) = der_value(after_tbs, SEQUENCE)?;
    Some(der_value(algorithm, OBJECT_IDENTIFIER)?.0)
}

/// The contents of a DER value with this tag, and what follows it.
fn der_value(bytes: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (&found, rest) = bytes.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = match first {
        0..=0x7F => (usize::from(first), rest),
        0x81..=0x84 => {
            let (digits, rest) = rest.split_at_checked(usize::from(first & 0x7F))?;
            (digits.iter().fold(0, |length, &digit| length << 8 | usize::from(digit)), rest)
        }
        _ => return None,
    };
    let (value, rest) = rest.split_at_checked(length)?;
    (found == tag).then_some((value, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A certificate as far as this module reads one, with this algorithm.
    fn certificate(oid: &[u8]) -> Vec<u8> {
        let value = |tag: u8, contents: &[u8]| {
            let length = u16::try_from(contents.len()).unwrap().to_be_bytes();
            [&[tag, 0x82], length.as_slice(), contents].concat()
        };
        let algorithm = value(0x30, &value(0x06, oid));
        value(0x30, &[value(0x30, &[0; 300]), algorithm, vec![3, 1, 0]].concat())
    }

    #[test]
    fn the_hash_is_that_of_the_signature() {
        fn check(oid: &[u8], length: Option<usize>) {
            let found = channel_binding(&certificate(oid)).map(|hash| hash.len());
            assert_eq!(found, length, "{oid:x?}");
        }
        let rsa = |last| [0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x01, last];
        let ecdsa = |last| [0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x04, 0x03, last];
        check(&rsa(5), Some(32));
        check(&rsa(11), Some(32));
        check(&rsa(12), Some(48));
        check(&rsa(13), Some(64));
        check(&rsa(10), None);
        check(&ecdsa(2), Some(32));
        check(&ecdsa(3), Some(48));
        check(&ecdsa(4), Some(64));
        check(&[0x2B, 0x65, 0x70], None); // Ed25519
    }

    #[test]
    fn cut_certificates_are_no_panic() {
        let whole = certificate(&[0x2B, 0x65, 0x70]);
        for end in 0..whole.len() {
            assert_eq!(channel_binding(&whole[..end]), None);
        }
    }
}
